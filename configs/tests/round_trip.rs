//! What is written loads again to an equal config, and no text makes the loader panic.

use proptest::prelude::*;
use run_config::{InitFrom, RopeScaling, RunConfig};
use std::path::{Path, PathBuf};

const GOOD: &str = include_str!("../runs/quickstart.yaml");

fn config(sets: &[String]) -> RunConfig {
    match RunConfig::from_yaml_str(GOOD, Path::new("/somewhere/configs/runs"), sets) {
        Ok(loaded) => loaded.config,
        Err(errors) => panic!("{errors}"),
    }
}

fn check_round_trip(config: &RunConfig) {
    let text = config.to_yaml();
    let again = RunConfig::from_yaml_str(&text, Path::new("/elsewhere"), &[]);
    let again = again.unwrap_or_else(|e| panic!("{e}\n{text}")).config;
    assert_eq!(&again, config);
    assert_eq!(again.hash(), config.hash());
    assert_eq!(again.to_yaml(), text);
}

#[test]
fn presets_are_the_published_figures() {
    let preset = |name: &str| {
        let sets = [format!("model={{preset: {name}}}")];
        let config = config(&sets);
        check_round_trip(&config);
        config.model
    };
    let m = preset("llama3-8b");
    assert_eq!((m.layers, m.dim, m.ffn_dim, m.heads, m.kv_heads), (32, 4096, 14336, 32, 8));
    assert_eq!((m.vocab_size, m.head_dim, m.rope.theta), (128_256, 128, 500_000.0));
    assert!(!m.tied_embeddings && m.rope.scaling.is_none() && m.norm_eps == 1e-5);
    let m = preset("llama3-70b");
    assert_eq!((m.layers, m.dim, m.ffn_dim, m.heads, m.kv_heads), (80, 8192, 28672, 64, 8));
    let m = preset("llama3-405b");
    assert_eq!((m.layers, m.dim, m.ffn_dim, m.heads, m.kv_heads), (126, 16384, 53248, 128, 8));
    let m = preset("llama3.2-1b");
    assert_eq!((m.layers, m.dim, m.ffn_dim, m.heads, m.head_dim), (16, 2048, 8192, 32, 64));
    let scaling = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 8192,
    };
    assert_eq!((m.tied_embeddings, m.rope.scaling), (true, Some(scaling)));
    let m = preset("llama3.2-3b");
    assert_eq!((m.layers, m.dim, m.ffn_dim, m.heads, m.head_dim), (28, 3072, 8192, 24, 128));
}

#[test]
fn checkpoints_by_themselves_and_to_an_object_store() {
    for remote in ["s3://bucket/a/b", "gs://bucket", "az://container/x", "file:///mnt/a-b/c"] {
        let set = format!("checkpoint={{every_steps: auto, remote: '{remote}/'}}");
        let config = config(&[set]);
        assert_eq!(config.checkpoint.every_steps, None);
        assert_eq!(config.checkpoint.remote.as_deref(), Some(remote));
        check_round_trip(&config);
    }
    let memory = "checkpoint.memory={every_steps: 5, folder: /mnt/memory}".to_owned();
    let config_in_memory = config(&[memory]);
    let memory = &config_in_memory.checkpoint.memory;
    assert_eq!((memory.every_steps, memory.folder.to_str()), (5, Some("/mnt/memory")));
    check_round_trip(&config_in_memory);
    let plain = config(&[]).checkpoint;
    assert_eq!((plain.memory.every_steps, plain.memory.folder.to_str()), (0, Some("/dev/shm")));
    assert_eq!((plain.failures_per_node_day, plain.remote), (0.0065, None));
}

#[test]
fn every_field_of_a_preset_can_be_overridden() {
    let sets = ["model={preset: llama3.2-1b, layers: 2, rope: {scaling: {factor: 8}}}".to_owned()];
    let m = config(&sets).model;
    assert_eq!((m.layers, m.dim), (2, 2048));
    let Some(RopeScaling::Llama3 { factor, high_freq_factor, .. }) = m.rope.scaling else {
        panic!("no scaling")
    };
    assert_eq!((factor, high_freq_factor), (8.0, 4.0));
    let off = ["model={preset: llama3.2-1b, rope: {scaling: null}}".to_owned()];
    assert_eq!(config(&off).model.rope.scaling, None);
}

#[test]
fn places_of_weights() {
    let from = |text: &str| config(&[format!("model.init_from={text}")]);
    let expect = |text: &str, expected: InitFrom| {
        let config = from(text);
        check_round_trip(&config);
        assert_eq!(config.model.init_from, Some(expected));
    };
    let run = |run: &str, step| InitFrom::Run { run: run.to_owned(), step };
    expect("hf:../x", InitFrom::HuggingFace(PathBuf::from("/somewhere/configs/x")));
    expect("meta:/abs/a b", InitFrom::Meta(PathBuf::from("/abs/a b")));
    expect("run:base", run("base", None));
    expect("run:a@b@20", run("a@b", Some(20)));
}

#[test]
fn hashes_say_what_changed() {
    let (a, b) = (config(&[]), config(&["seed=1".to_owned()]));
    assert_ne!(a.hash(), b.hash());
    assert_eq!(a.model_hash(), b.model_hash());
    let wider = config(&["model.ffn_dim=1024".to_owned()]);
    assert_ne!(a.model_hash(), wider.model_hash());
    let other_start = config(&["model.init_std=0.03".to_owned()]);
    assert_eq!(a.model_hash(), other_start.model_hash());
    assert_eq!(a.hash().len(), 64);
}

#[test]
fn the_launcher_fills_in_the_cluster() {
    let filled = config(&[]).with_cluster(4, 3).unwrap().config;
    assert_eq!(filled.num_ranks(), Some(4));
    assert_eq!(filled.cluster.threads_per_rank, Some(3));
    assert!(config(&[]).with_cluster(3, 1).unwrap_err().to_string().contains("data-parallel"));
}

prop_compose! {
    fn any_sets()(
        name in "[a-z0-9][a-z0-9._-]{0,20}",
        seed in any::<u64>(),
        path in "[^\\p{Cc}]{1,40}".prop_filter("a path", |p| !p.contains("://")),
        rate in 1e-12f64..1.0,
        eps in 1e-300f64..1e-3,
        beta in 0.0f64..0.999_999,
        weight in 1e-6f64..1e6,
        clip in proptest::option::of(1e-6f64..1e6),
        stages in proptest::collection::vec((1usize..5, 0u32..3), 1..4),
        kind in prop::sample::select(vec!["cosine", "linear", "wsd", "constant"]),
        compute in prop::sample::select(vec!["fp32", "bf16", "fp64"]),
        ranks in prop::sample::select(vec!["auto", "2", "4", "8"]),
        scaling in proptest::option::of(1.0f64..100.0),
        flag in any::<bool>(),
        timeout in 1u64..=3600,
        contiguous in prop::sample::select(vec!["auto", "1", "2"]),
        zscore in proptest::option::of(1e-3f64..1e6),
        left_out in proptest::collection::vec((any::<u16>(), any::<u16>()), 0..4),
    ) -> Vec<String> {
        let stages: Vec<String> = stages.iter().enumerate().map(|(i, (batch, shift))| format!(
            "{{from_tokens: {}, global_batch: {}, sequence_length: {}}}",
            i * 100_000, batch * 8, 64usize << shift,
        )).collect();
        let quoted = serde_json::Value::from(path).to_string();
        let or_null = |number: Option<f64>| number.map_or("null".to_owned(), |n| format!("{n:?}"));
        let left_out: Vec<String> = left_out.iter().map(|(first, more)| format!(
            "{{first: {first}, last: {}}}", u32::from(*first) + u32::from(*more),
        )).collect();
        let left_out = match left_out.is_empty() {
            true => "null".to_owned(),
            false => format!("[{}]", left_out.join(", ")),
        };
        let scaling = scaling.map_or("null".to_owned(), |f| format!("{{factor: {f:?}}}"));
        vec![
            format!("name={name}"), format!("seed={seed}"),
            format!("data.sources=[{{name: s, path: {quoted}, weight: {weight:?}}}]"),
            format!("data.tokenizer={quoted}"), format!("data.shuffle={flag}"),
            format!("optimizer={{learning_rate: {rate:?}, eps: {eps:?}, betas: [{beta:?}, 0.95]}}"),
            format!("training.clip_norm={}", or_null(clip)),
            format!("numeric={{loss_zscore: {}, on_spike: rollback}}", or_null(zscore)),
            format!("data.skip_samples={left_out}"),
            format!("training.global_batch=[{}]", stages.join(", ")),
            format!("schedule.kind={kind}"), format!("precision.compute={compute}"),
            format!("cluster={{ranks_per_node: {ranks}, timeout_s: {timeout}, \
                     check_collectives: all}}"),
            format!("parallelism.pipeline={{stages: 2, schedule: zero-bubble, virtual_stages: 2, \
                     contiguous_micro_batches: {contiguous}}}"),
            format!("model.rope.scaling={scaling}"),
        ]
    }
}

proptest! {
    #[test]
    fn round_trips(sets in any_sets()) {
        check_round_trip(&config(&sets));
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let text = String::from_utf8_lossy(&bytes);
        let _ = RunConfig::from_yaml_str(&text, Path::new("/"), &[]);
        let _ = RunConfig::from_yaml_str(GOOD, Path::new("/"), &[text.into_owned()]);
    }

    #[test]
    fn no_yaml_like_text_makes_it_panic(text in "[\\[\\]{}:,*&!|>'\"#%@`?\\-a-c0-9 \n]{0,120}") {
        let _ = RunConfig::from_yaml_str(&text, Path::new("/"), &[]);
    }

    #[test]
    fn no_mutation_makes_it_panic(
        edits in proptest::collection::vec(
            (any::<prop::sample::Index>(), any::<u8>(), 0..3u8), 1..6,
        )
    ) {
        let mut bytes = GOOD.as_bytes().to_vec();
        for (index, byte, kind) in edits {
            let at = index.index(bytes.len());
            match kind {
                0 => bytes[at] = byte & 0x7f,
                1 => bytes.insert(at, byte & 0x7f),
                _ => drop(bytes.remove(at)),
            }
        }
        let text = String::from_utf8_lossy(&bytes);
        if let Err(errors) = RunConfig::from_yaml_str(&text, Path::new("/"), &[]) {
            prop_assert!(!errors.problems.is_empty());
            prop_assert!(!errors.to_string().contains("internal:"), "{errors}");
        }
    }

    #[test]
    fn no_value_makes_it_panic(
        key in prop::sample::select(vec![
            "model.dim", "model.heads", "model.kv_heads", "model.head_dim", "training.steps",
            "training.global_batch", "training.micro_batch", "data.sequence_length",
            "parallelism.tensor", "parallelism.context", "parallelism.pipeline.stages",
            "parallelism.pipeline.virtual_stages", "parallelism.shard.ranks",
            "parallelism.replicate", "cluster.nodes", "cluster.ranks_per_node", "training.tokens",
            "schedule.warmup_steps", "checkpoint.keep_every_steps", "cluster.threads_per_rank",
            "parallelism.pipeline.contiguous_micro_batches", "cluster.timeout_s", "model.ffn_dim",
            "model.layers", "model.vocab_size",
        ]),
        other in prop::sample::select(vec!["parallelism.replicate", "cluster.nodes", "model.heads",
            "training.micro_batch", "data.sequence_length", "training.global_batch"]),
        value in prop_oneof![0u64..70, Just(4096), Just(1 << 20), Just(1 << 24), any::<u64>()],
        second in prop_oneof![0u64..70, Just(4096), Just(1 << 20), Just(1 << 24), any::<u64>()],
    ) {
        let sets = [format!("{key}={value}"), format!("{other}={second}")];
        let _ = RunConfig::from_yaml_str(GOOD, Path::new("/"), &sets);
    }
}
