//! Every ready config loads, without a warning, and is what its name says.

use run_config::{NoteLevel, RunConfig};
use std::path::{Path, PathBuf};

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("runs").join(name)
}

fn load(name: &str) -> RunConfig {
    RunConfig::load(&path(name), &[]).unwrap_or_else(|e| panic!("{e}")).config
}

#[test]
fn every_ready_config_loads() {
    let mut num_configs = 0;
    for entry in std::fs::read_dir(path("")).unwrap() {
        let path = entry.unwrap().path();
        let loaded = RunConfig::load(&path, &[]).unwrap_or_else(|e| panic!("{e}"));
        // A machine with fewer cores than ranks is no fault of the config.
        let warnings = loaded.notes.iter().filter(|note| note.level == NoteLevel::Warning);
        let warnings: Vec<_> = warnings.filter(|note| !note.key.starts_with("cluster.")).collect();
        assert!(warnings.is_empty(), "{}: {warnings:?}", path.display());
        assert_eq!(Some(loaded.config.name.as_str()), path.file_stem().and_then(|s| s.to_str()));
        let again = RunConfig::from_yaml_str(&loaded.config.to_yaml(), Path::new("/"), &[]);
        assert_eq!(again.unwrap_or_else(|e| panic!("{e}")).config, loaded.config);
        num_configs += 1;
    }
    assert!(num_configs >= 8, "{num_configs}");
}

/// Any layout of the quickstart must divide: scripts rely on it.
#[test]
fn the_quickstart_divides() {
    let c = load("quickstart.yaml");
    assert!(c.model.layers >= 4 && c.model.layers.is_multiple_of(2));
    assert!(c.model.heads >= 4 && c.model.kv_heads >= 2);
    assert!(c.model.vocab_size.is_multiple_of(8));
    let stage = c.training.batch_stages[0];
    assert!(stage.sequence_length.is_multiple_of(16));
    assert!(stage.global_batch.is_multiple_of(8));
    assert_eq!((c.training.micro_batch, c.num_ranks()), (1, Some(2)));
    assert!(c.validation.every_steps > 0 && c.data.validation_fraction > 0.0);
    assert_eq!(c.checkpoint.every_steps, Some(50));
    for ranks in [1, 2, 4, 8] {
        let set = [format!("cluster.ranks_per_node={ranks}")];
        RunConfig::load(&path("quickstart.yaml"), &set).unwrap_or_else(|e| panic!("{e}"));
    }
}

#[test]
fn the_405b_follows_the_paper() {
    let c = load("llama3-405b.yaml");
    assert_eq!((c.optimizer.learning_rate, c.schedule.warmup_steps), (8e-5, 8000));
    let stages: Vec<_> = c
        .training
        .batch_stages
        .iter()
        .map(|s| (s.from_tokens, s.global_batch * s.sequence_length))
        .collect();
    assert_eq!(stages, [(0, 4_194_304), (252_000_000, 8_388_608), (2_870_000_000_000, 16_777_216)]);
    assert!((1_000_000..1_200_000).contains(&c.training.steps), "{}", c.training.steps);
}
