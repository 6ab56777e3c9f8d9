//! Every class of error, as a user reads it.

use run_config::{ConfigErrors, Loaded, RunConfig};
use std::path::Path;

const GOOD: &str = "\
name: test
model: {dim: 64, layers: 2, heads: 4, kv_heads: 2, ffn_dim: 172, vocab_size: 512}
data:
  tokenizer: tokenizer.json
  sources: [{name: web, path: shards/*.parquet}]
  sequence_length: 64
training: {steps: 100, global_batch: 8}
";

fn load(text: &str, sets: &[&str]) -> Result<Loaded, ConfigErrors> {
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    RunConfig::from_yaml_str(text, Path::new("/runs"), &sets)
}

fn errors(text: &str, sets: &[&str]) -> String {
    match load(text, sets) {
        Ok(loaded) => panic!("must be refused:\n{}", loaded.config.to_yaml()),
        Err(errors) => errors.to_string(),
    }
}

/// The errors of a text; of the good one with `old` replaced by `new`; of the good one with sets.
fn swap(old: &str, new: &str) -> String {
    assert!(GOOD.contains(old), "{old}");
    errors(&GOOD.replace(old, new), &[])
}

#[test]
fn the_good_one_is_good() {
    let loaded = load(GOOD, &[]).unwrap_or_else(|e| panic!("{e}"));
    assert!(loaded.notes.is_empty(), "{:?}", loaded.notes);
    assert_eq!(loaded.config.model.head_dim, 16);
    assert_eq!(loaded.config.data.tokenizer, Path::new("/runs/tokenizer.json"));
    assert_eq!(loaded.config.data.sources[0].path, "/runs/shards/*.parquet");
}

#[test]
fn unknown_keys() {
    insta::assert_snapshot!(errors(
        &format!(
            "{GOOD}trainnig: {{steps: 3}}\nlearning_rate: 1.0\nzzz: 1\nschedule:\n  warmup: 3\n"
        ),
        &[]
    ));
}

#[test]
fn unknown_key_in_a_list_item() {
    insta::assert_snapshot!(swap("name: web, ", "name: web, wieght: 2, "));
}

#[test]
fn merge_keys_are_not_taken() {
    insta::assert_snapshot!(errors(&format!("{GOOD}<<: {{seed: 1}}\n"), &[]));
}

#[test]
fn duplicate_keys() {
    insta::assert_snapshot!(errors(&format!("{GOOD}seed: 1\nseed: 2\nname: again\n"), &[]));
}

#[test]
fn wrong_types() {
    insta::assert_snapshot!(errors(
        "name: 5\nseed: [1]\nmodel: {dim: wide, layers: 2.5, heads: true, kv_heads: {a: 1}, \
         ffn_dim: '172', vocab_size: 1_000, tied_embeddings: yes, init_std: x}\n\
         data: 7\ntraining: {steps: ten, global_batch: [3]}\n\
         optimizer: {betas: 0.9}\nmetrics: {tensorboard: 'true'}\n",
        &[]
    ));
}

#[test]
fn out_of_range() {
    insta::assert_snapshot!(errors(
        &format!(
            "{GOOD}seed: -1\noptimizer: {{learning_rate: .nan, eps: 0, betas: [0.9, 1.0], \
             weight_decay: .inf}}\nschedule: {{kind: cosin, final_fraction: 1.5}}\n\
             cluster: {{device: gpu, ranks_per_node: 0}}\ncheckpoint: {{keep_last: 0}}\n\
             precision: {{compute: fp16}}\nvalidation: {{every_steps: 1e300}}\n"
        ),
        &[]
    ));
}

#[test]
fn names_that_are_no_folder() {
    for name in ["../up", "a/b", "-x", ".hidden", "''", "'a b'"] {
        let text = swap("name: test", &format!("name: {name}"));
        assert!(text.contains("config:1:7: name: "), "{text}");
        assert!(text.contains("1 to 100 letters"), "{text}");
    }
}

#[test]
fn missing_keys() {
    insta::assert_snapshot!(errors("seed: 1\n", &[]));
}

#[test]
fn missing_keys_in_list_items() {
    insta::assert_snapshot!(errors(
        "name: x\nmodel: {preset: llama3-8b, rope: {scaling: {kind: llama3}}}\n\
         data: {tokenizer: t, sources: [{weight: 1}]}\n\
         training: {steps: 1, global_batch: [{from_tokens: 0}]}\n",
        &[]
    ));
}

#[test]
fn unknown_preset() {
    insta::assert_snapshot!(errors(GOOD, &["model.preset=llama-8b"]));
}

#[test]
fn steps_and_tokens() {
    let both = swap("steps: 100", "steps: 100, tokens: 1000");
    assert!(both.contains("training.tokens: both `steps` and `tokens` are given"), "{both}");
    let neither = swap("steps: 100, ", "");
    assert!(neither.contains("training.steps: neither `steps` nor `tokens`"), "{neither}");
    let tokens = load(&GOOD.replace("steps: 100", "tokens: 1e6"), &[]).unwrap();
    assert_eq!(tokens.config.training.steps, 1954); // 1e6 / 512 = 1953.1
}

#[test]
fn conflicts_of_the_model() {
    insta::assert_snapshot!(errors(GOOD, &["model.heads=5", "model.kv_heads=3"]));
    let odd = errors(GOOD, &["model.head_dim=15"]);
    assert!(odd.contains("model.head_dim: 15 is odd"), "{odd}");
    let scaling =
        errors(GOOD, &["model.rope.scaling={factor: 8, low_freq_factor: 4, high_freq_factor: 4}"]);
    assert!(scaling.contains("high_freq_factor: 4 is not above 4"), "{scaling}");
}

#[test]
fn samples_to_leave_out() {
    let backwards = errors(GOOD, &["data.skip_samples=[{first: 8, last: 7}]"]);
    assert!(
        backwards.contains("data.skip_samples[0].last: 7 is before the first, 8"),
        "{backwards}"
    );
    let partial = errors(GOOD, &["data.skip_samples=[{first: 8}]"]);
    assert!(partial.contains("data.skip_samples[0].last: the key is required"), "{partial}");
    let ranges = load(GOOD, &["data.skip_samples=[{first: 8, last: 8}]"]).unwrap().config.data;
    assert_eq!(ranges.skip_samples, [run_config::SampleRange { first: 8, last: 8 }]);
}

#[test]
fn numeric_trouble() {
    let word = errors(GOOD, &["numeric.on_spike=stop"]);
    assert!(word.contains("numeric.on_spike"), "{word}");
    let notes = |sets: &[&str]| {
        let notes: Vec<String> =
            load(GOOD, sets).unwrap().notes.iter().map(ToString::to_string).collect();
        notes.join("\n")
    };
    let off = ["numeric={on_spike: skip, loss_zscore: null, grad_norm_zscore: null}"];
    assert!(notes(&off).contains("has no effect while loss_zscore"), "{}", notes(&off));
    let far = ["numeric.on_non_finite=rollback", "checkpoint.every_steps=0"];
    assert!(notes(&far).contains("begins from the start"), "{}", notes(&far));
}

#[test]
fn degrees_against_the_ranks() {
    insta::assert_snapshot!(errors(
        GOOD,
        &["cluster.ranks_per_node=6", "parallelism.tensor=4", "parallelism.context=2"]
    ));
    let replicas = errors(GOOD, &["cluster.ranks_per_node=4", "parallelism.replicate=3"]);
    assert!(replicas.contains("1 x 1 x 1 x 1 x 3 = 3 are not the 4 ranks"), "{replicas}");
}

#[test]
fn the_batch_against_the_data_ranks() {
    insta::assert_snapshot!(errors(GOOD, &["cluster.ranks_per_node=3"]));
    insta::assert_snapshot!(errors(GOOD, &["training.micro_batch=3"]));
}

#[test]
fn what_tensor_parallelism_must_divide() {
    insta::assert_snapshot!(errors(GOOD, &["parallelism.tensor=3"]));
}

#[test]
fn what_context_and_pipeline_must_divide() {
    insta::assert_snapshot!(errors(
        GOOD,
        &[
            "parallelism.context=5",
            "parallelism.pipeline={stages: 3, virtual_stages: 2}",
            "parallelism.shard.ranks=2"
        ]
    ));
}

/// The degrees in hints go with the other degrees and the ranks.
#[test]
fn degrees_that_would_do_divide_the_ranks() {
    let layers = ["model.layers=6", "model.heads=12", "model.kv_heads=12", "model.head_dim=16"];
    let check = |ranks: usize, sets: &[&str], expected: &str, not: &str| {
        let ranks = format!("cluster.ranks_per_node={ranks}");
        let text = errors(GOOD, &[&layers, sets, &[&ranks]].concat());
        assert!(text.contains(expected) && (not.is_empty() || !text.contains(not)), "{text}");
    };
    let stages = "parallelism.pipeline.stages=";
    check(16, &["parallelism.pipeline.stages=16"], &format!("{stages}4 would do"), "");
    check(2, &["parallelism.pipeline.stages=16"], &format!("{stages}2 would do"), "");
    let tensor = ["parallelism.tensor=8", "model.vocab_size=516", "model.ffn_dim=12"];
    check(8, &tensor, "parallelism.tensor=4 would do", " or 12");
    check(2, &tensor, "parallelism.tensor=2 would do", "tensor=4");
    let with_stages = [&tensor[..], &["parallelism.pipeline.stages=2"]].concat();
    check(4, &with_stages, "parallelism.tensor=2 would do", "tensor=4");
    check(12, &["parallelism.context=6"], "parallelism.context=4 would do", "context=8");
}

/// One problem where sequence parallelism alone does not go, with both ways out.
#[test]
fn tensor_parallelism_against_the_sequence() {
    let text = errors(GOOD, &["parallelism.tensor=4", "data.sequence_length=66"]);
    assert!(text.contains("the run config has a problem"), "{text}");
    assert!(text.contains("the 66 tokens of a sequence = 4 x 16 + 2"), "{text}");
    let hint = "parallelism.tensor=2 would do; with parallelism.sequence=false sequences are not";
    assert!(text.contains(hint), "{text}");
    let off = ["parallelism.tensor=4", "data.sequence_length=66", "parallelism.sequence=false"];
    load(GOOD, &off).unwrap();
    let chunks = errors(GOOD, &["parallelism.tensor=4", "parallelism.context=16"]);
    let name = "the 2 tokens of each of the 32 chunks of a sequence of 64 = 4 x 0 + 2";
    assert!(chunks.contains(name) && chunks.contains("has a problem"), "{chunks}");
}

/// With one stage there is nothing to interleave, whatever the schedule.
#[test]
fn chunks_of_one_stage() {
    for schedule in ["interleaved-1f1b", "zero-bubble", "1f1b"] {
        let set = format!("parallelism.pipeline={{schedule: {schedule}, virtual_stages: 2}}");
        for ranks in ["auto", "2"] {
            let text = errors(GOOD, &[&set, &format!("cluster.ranks_per_node={ranks}")]);
            for part in [
                "the run config has a problem",
                "parallelism.pipeline.virtual_stages: 2 model chunks on 1 stage, which holds",
                "limit: 1 while stages is 1",
                "hint: set parallelism.pipeline.stages to 2 or more",
            ] {
                assert!(text.contains(part), "{part} is not in\n{text}");
            }
        }
    }
}

const INTERLEAVED: &str =
    "parallelism.pipeline={stages: 2, schedule: interleaved-1f1b, virtual_stages: 2}";

#[test]
fn contiguous_micro_batches() {
    let key = "parallelism.pipeline.contiguous_micro_batches";
    let set = |number: usize| format!("{key}={number}");
    let base = [INTERLEAVED, "model.layers=4", "cluster.ranks_per_node=4"];
    // 8 sequences on 2 replicas.
    for number in ["auto", "2", "3", "4"] {
        let loaded = load(GOOD, &[&base[..], &[&format!("{key}={number}")]].concat()).unwrap();
        let expected = number.parse().ok();
        assert_eq!(loaded.config.parallelism.pipeline.contiguous_micro_batches, expected);
        assert!(loaded.notes.iter().all(|note| note.key != key), "{:?}", loaded.notes);
    }
    insta::assert_snapshot!(errors(GOOD, &[&base[..], &[&set(5)]].concat()));
    insta::assert_snapshot!(errors(GOOD, &[&set(2), "parallelism.pipeline.stages=2"]));
    let zero = errors(GOOD, &[&set(0)]);
    assert!(zero.contains("an integer from 1 to 16777216, or auto"), "{zero}");
    let few = load(GOOD, &[&base[..], &[&set(1)]].concat()).unwrap();
    let note = few.notes.iter().find(|note| note.key == key).unwrap().to_string();
    assert!(note.contains("1 in a row are fewer than the 2 stages"), "{note}");
}

/// What would overflow whoever computes with it.
#[test]
fn sizes_that_make_no_sense() {
    let ranks = "cluster.ranks_per_node=2";
    let tokens = ["data.sequence_length=16777216", "training.micro_batch=16777216"];
    let batch = "training.global_batch=16777216";
    insta::assert_snapshot!(errors(GOOD, &[&tokens[..], &[batch, "training.steps=4"]].concat()));
    let chunks = "parallelism.pipeline={stages: 2, virtual_stages: 64, schedule: interleaved-1f1b}";
    insta::assert_snapshot!(errors(GOOD, &["model.layers=128", batch, chunks, ranks]));
    let blocks = errors(GOOD, &["model.layers=4096", "training.global_batch=8192", ranks]);
    let arithmetic = "4096 micro-batches x 4096 blocks x 2 passes = 33554432 passes through blocks";
    assert!(blocks.contains(arithmetic) && blocks.contains("2048 micro-batches"), "{blocks}");
    let model = "model={dim: 262144, layers: 4096, heads: 4096, head_dim: 4096, kv_heads: 4096, \
                 ffn_dim: 1048576, vocab_size: 16777216}";
    insta::assert_snapshot!(errors(GOOD, &[model, ranks]));
    let model = model.replace("head_dim: 4096, ", "head_dim: 64, ");
    let fewer = model.replace("layers: 4096", "layers: 64");
    let large = ["data.sequence_length=65536", "training.global_batch=65536"];
    let text = errors(GOOD, &[&[fewer.as_str(), ranks], &large[..]].concat());
    assert!(text.contains("training.global_batch: a rank may hold or send"), "{text}");
    let timeout = errors(GOOD, &["cluster.timeout_s=0"]);
    assert!(timeout.contains("an integer from 1 to 3600"), "{timeout}");
}

/// Stages whose lengths do not go together have no beginnings to compute.
#[test]
fn ramps_at_the_limits() {
    let ramp = "training.global_batch=[{from_tokens: 0, global_batch: 16777216, \
                sequence_length: 16777215}, {from_tokens: 1, global_batch: 16777216, \
                sequence_length: 16777213}, {from_tokens: 2, global_batch: 1}]";
    let text = errors(GOOD, &[ramp, "data.sequence_length=16777216", "training.steps=1"]);
    assert!(text.contains("16777213 does not divide 16777216"), "{text}");
    let tokens = ["training.steps=null", "training.tokens=1000000000000000"];
    errors(GOOD, &[&[ramp, "data.sequence_length=16777216"], &tokens[..]].concat());
}

#[test]
fn the_405b_splits_over_16_stages() {
    let text = GOOD.replace(
        "model: {dim: 64, layers: 2, heads: 4, kv_heads: 2, ffn_dim: 172, vocab_size: 512}",
        "model: {preset: llama3-405b}",
    );
    let set = ["parallelism.pipeline.stages=16", "data.sequence_length=8192"];
    let sets = set.map(str::to_owned);
    RunConfig::from_yaml_str(&text, Path::new("/"), &sets).unwrap();
}

#[test]
fn not_yet_supported() {
    insta::assert_snapshot!(errors(
        GOOD,
        &[
            "parallelism.tensor=2",
            "parallelism.context=2",
            "parallelism.pipeline={stages: 2, virtual_stages: 1}",
            "parallelism.shard={ranks: 2, level: optimizer}",
            "parallelism.recompute=full",
            "cluster={kind: slurm, nodes: 2, ranks_per_node: 8}",
            "data.sources.0.path=s3://bucket/*.parquet",
        ]
    ));
}

/// What FP8 products go with, and each way in which sizes do not.
#[test]
fn fp8() {
    let fp8 = "precision.matmul=fp8";
    let sound = ["model.ffn_dim=176", fp8];
    load(GOOD, &sound).unwrap();
    load(GOOD, &["model.ffn_dim=352", "parallelism.tensor=2", fp8]).unwrap();
    insta::assert_snapshot!(errors(
        GOOD,
        &[fp8, "precision.compute=fp32", "model.dim=72", "model.heads=9", "model.head_dim=10"]
    ));
    let split = ["parallelism.tensor=2", "model.ffn_dim=176", "model.head_dim=8", fp8];
    insta::assert_snapshot!(errors(GOOD, &split));
    let tokens = ["data.sequence_length=24", "parallelism.context=3", "model.ffn_dim=176", fp8];
    insta::assert_snapshot!(errors(GOOD, &tokens));
    let several = [&sound[..], &["data.sequence_length=24", "training.micro_batch=2"]].concat();
    load(GOOD, &several).unwrap();
    let ramp = "training.global_batch=[{from_tokens: 0, global_batch: 8, sequence_length: 8}, \
                {from_tokens: 640, global_batch: 8}]";
    let text = errors(GOOD, &[&sound[..], &[ramp]].concat());
    assert!(text.contains("made of 1 sequences x 8 = 8 tokens\n"), "{text}");
}

#[test]
fn ramps() {
    insta::assert_snapshot!(errors(
        GOOD,
        &["training.global_batch=[{from_tokens: 5, global_batch: 8, sequence_length: 48}, \
           {from_tokens: 5, global_batch: 8}]"]
    ));
    let empty = errors(GOOD, &["training.global_batch=[]"]);
    assert!(empty.contains("the list has 0 items"), "{empty}");
    let never = errors(
        GOOD,
        &[
            "training.global_batch=[{from_tokens: 0, global_batch: 1, sequence_length: 32}, \
           {from_tokens: 10, global_batch: 2, sequence_length: 64}, \
           {from_tokens: 100000000000000, global_batch: 16777216}]",
            "training.steps=1000000000",
            "data.sequence_length=16777216",
        ],
    );
    assert!(never.contains("may see 281474976710656000000000 tokens"), "{never}");
}

#[test]
fn validation_without_documents() {
    let text = errors(GOOD, &["validation.every_steps=5", "data.validation_fraction=0"]);
    assert!(text.contains("data.validation_fraction is 0"), "{text}");
}

#[test]
fn remotes_that_are_no_folder_of_an_object_store() {
    let wrong = ["s3:bucket", "s3://", "s3:///x", "ftp://host/x", "file://rel/x", "file:///", "/x"];
    let tricky = ["s3://b/../x", "s3://b//x", "gs://b/a%2fb", "az://c/x?y=1", "s3://u:p@b/x"];
    for url in wrong.into_iter().chain(tricky) {
        let text = errors(GOOD, &[&format!("checkpoint.remote={url}")]);
        assert!(text.contains(&format!("checkpoint.remote: \"{url}\" is no folder of")), "{text}");
        assert!(text.contains("s3://BUCKET[/PREFIX]"), "{text}");
    }
}

#[test]
fn checkpoints_in_memory() {
    let sets = ["checkpoint.memory={every_steps: 5}", "cluster.nodes=2"];
    let text = errors(GOOD, &sets);
    assert!(
        text.contains("not yet supported in this version: checkpoints in the memory"),
        "{text}"
    );
    let text = errors(GOOD, &["checkpoint.memory.folder=s3://bucket/x"]);
    assert!(text.contains("checkpoint.memory.folder") && text.contains("is no path"), "{text}");
}

#[test]
fn two_sources_of_one_name() {
    let text = errors(GOOD, &["data.sources=[{name: a, path: x}, {name: a, path: y}]"]);
    assert!(text.contains("data.sources[1].name: a second source is called \"a\""), "{text}");
}

#[test]
fn paths_and_urls() {
    let text = errors(GOOD, &["data.tokenizer=https://x/t.json", "model.init_from=hf"]);
    insta::assert_snapshot!(text);
}

#[test]
fn bad_overrides() {
    insta::assert_snapshot!(errors(
        GOOD,
        &[
            "steps",
            "=3",
            "training..steps=3",
            "training.steps.deep=3",
            "training.steps=[1",
            "training.stepz=3",
            "training.micro_batch=0",
            "data.sources.4.path=x",
            "a.b.c.d.e.f.g.h.i.j=1",
        ]
    ));
}

#[test]
fn a_file_and_its_overrides_are_reported_together() {
    insta::assert_snapshot!(errors(
        &GOOD.replace("ffn_dim: 172", "ffn_dim: -172"),
        &["seed=x", "schedule.kind=cosin"]
    ));
}

#[test]
fn broken_yaml() {
    insta::assert_snapshot!(errors("name: test\nmodel: {dim: 64\ndata: [\n", &[]));
    insta::assert_snapshot!(errors("name: test\n\tseed: 3\n", &[]));
    insta::assert_snapshot!(errors("name: a\n---\nname: b\n", &[]));
    insta::assert_snapshot!(errors("- name: a\n", &[]));
    insta::assert_snapshot!(errors("? [a, b]\n: 3\n", &[]));
    insta::assert_snapshot!(errors("name: !secret x\n", &[]));
    insta::assert_snapshot!(errors("name: *nobody\n", &[]));
}

#[test]
fn empty_texts() {
    for text in ["", " \n\t\n"] {
        assert!(errors(text, &[]).contains("the file is empty"));
    }
    for text in ["# only a comment\n", "---\n", "null\n", "---\n...\n"] {
        assert!(errors(text, &[]).contains("holds no keys"), "{text}: {}", errors(text, &[]));
    }
}

#[test]
fn bombs_are_bounded() {
    let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for level in 1..20 {
        let refs = vec![format!("*a{}", level - 1); 10].join(", ");
        bomb.push_str(&format!("a{level}: &a{level} [{refs}]\n"));
    }
    assert!(errors(&bomb, &[]).contains("over 20000 values"), "{}", errors(&bomb, &[]));
    for (open, close) in [("[", "]"), ("{a: ", "}")] {
        let deep = format!("name: {}x{}\n", open.repeat(100_000), close.repeat(100_000));
        let text = errors(&deep, &[]);
        assert!(text.contains("levels deep") || text.contains("not valid YAML"), "{text}");
    }
    let deep: String = (0..1000).map(|i| format!("{}a:\n", " ".repeat(i))).collect();
    assert!(errors(&deep, &[]).contains("levels deep"));
    let set = format!("seed={}", "[".repeat(100_000));
    assert!(errors(GOOD, &[&set]).contains("--set seed=[["));
    assert!(errors("a: &a [*a]\n", &[]).contains("hint"));
}

#[test]
fn files_that_are_no_config() {
    let dir = tempfile::tempdir().unwrap();
    let check = |name: &str, content: Option<&[u8]>, part: &str| {
        let path = dir.path().join(name);
        if let Some(content) = content {
            std::fs::write(&path, content).unwrap();
        }
        let text = RunConfig::load(&path, &[]).expect_err("must be refused").to_string();
        assert!(text.contains(part), "{text}");
        assert!(text.contains(name), "{text}");
        assert!(text.lines().count() <= 4, "{text}");
    };
    check("missing.yaml", None, "No such file");
    check("empty.yaml", Some(b""), "the file is empty");
    check("nul.yaml", Some(b"name: \0\n"), "control character at byte 6");
    check("elf.yaml", Some(b"\x7fELF\xff\xfe\0\0"), "byte 4 is not UTF-8");
    check("utf16.yaml", Some(b"\xff\xfen\0a\0"), "byte 0 is not UTF-8");
    std::fs::create_dir(dir.path().join("folder.yaml")).unwrap();
    check("folder.yaml", None, "this is a folder");
    let huge = dir.path().join("huge.yaml");
    std::fs::File::create(&huge).unwrap().set_len(100 << 20).unwrap();
    check("huge.yaml", None, "has 104857600 bytes; a config has at most 1048576");
}

#[test]
fn a_flood_of_problems_is_cut() {
    let text: String = (0..9000).map(|i| format!("k{i}: 1\n")).collect();
    let text = errors(&text, &[]);
    assert!(text.lines().count() < 500 && text.contains(" more"), "{}", text.len());
}

#[test]
fn pipes_and_devices_are_refused_unread() {
    for path in ["/dev/zero", "/dev/null"] {
        let text = RunConfig::load(Path::new(path), &[]).unwrap_err().to_string();
        assert!(text.contains("no regular file"), "{text}");
    }
}

#[test]
fn notes() {
    let sets = [
        "schedule={kind: linear, warmup_steps: 200, decay_fraction: 0.5}",
        "cluster={ranks_per_node: 4096, device: cpu}",
        "training.global_batch=[{from_tokens: 0, global_batch: 4096}, \
         {from_tokens: 1e9, global_batch: 8192}]",
        "checkpoint={every_steps: 20, keep_every_steps: 30}",
        "parallelism.pipeline.schedule=zero-bubble",
        "parallelism.shard={level: gradients, reshard_after_forward: true}",
    ];
    let notes: Vec<String> =
        load(GOOD, &sets).unwrap().notes.iter().map(ToString::to_string).collect();
    let cores = std::thread::available_parallelism().unwrap().to_string();
    let plural = if cores == "1" { "" } else { "s" };
    let text = notes.join("\n").replace(&format!("on {cores} core{plural}"), "on N cores");
    insta::assert_snapshot!(text);
}
