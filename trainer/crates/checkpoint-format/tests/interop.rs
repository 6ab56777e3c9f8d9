//! Hugging Face's and Meta's formats: bit-equal round trips, and files written by PyTorch and
//! transformers themselves (`tests/meta/make.py` makes them; `$PHALANX_REFERENCES` may name more
//! folders with a model each).
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use checkpoint_format::export::{ExportOptions, Exported, export_hf};
use checkpoint_format::hf::HfSource;
use checkpoint_format::import::import;
use checkpoint_format::meta::MetaSource;
use checkpoint_format::source::{CheckpointSource, WeightSource, check_model, read_rows_as};
use checkpoint_format::{Checkpoint, Dtype, FormatError};
use proptest::prelude::*;
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/meta").join(name)
}

fn options(source: &dyn WeightSource) -> ExportOptions {
    ExportOptions {
        model: source.model().unwrap().clone(),
        dtype: None,
        max_shard_bytes: u64::MAX,
        max_positions: 128,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        tokenizer: None,
    }
}

/// Imports as step 0 of a run, opens that, and exports it again.
fn through_a_checkpoint(
    source: &dyn WeightSource,
    folder: &Path,
    shard: u64,
) -> (PathBuf, Exported) {
    let (path, _) = import(source, &folder.join("run"), serde_json::Value::Null).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.state().step, 0);
    checkpoint.verify().unwrap();
    let stored = CheckpointSource::new(checkpoint);
    assert_eq!(stored.model(), source.model());
    let out = folder.join("out");
    let options = ExportOptions { max_shard_bytes: shard, ..options(source) };
    let exported = export_hf(&stored, &out, &options).unwrap();
    (out, exported)
}

#[track_caller]
fn assert_same_file(a: &Path, b: &Path) {
    assert!(std::fs::read(a).unwrap() == std::fs::read(b).unwrap(), "{a:?} {b:?}");
}

#[track_caller]
fn check_same_weights(a: &dyn WeightSource, b: &dyn WeightSource) {
    assert_eq!(a.names(), b.names());
    for name in a.names() {
        let (shape, dtype) = a.info(&name).unwrap();
        assert_eq!((&shape, dtype), (&b.info(&name).unwrap().0, b.info(&name).unwrap().1));
        let read = |source: &dyn WeightSource| {
            let mut bytes = vec![0; shape.iter().product::<u64>() as usize * dtype.size()];
            source.read_rows(&name, 0, shape[0], &mut bytes).unwrap();
            bytes
        };
        assert!(read(a) == read(b), "{name}");
    }
}

#[test]
fn metas_files_become_the_very_file_that_transformers_writes() {
    for layout in ["one", "two"] {
        let folder = tempfile::tempdir().unwrap();
        let meta = MetaSource::open(&fixture(layout)).unwrap();
        let (out, exported) = through_a_checkpoint(&meta, folder.path(), u64::MAX);
        assert_eq!((exported.tensors, exported.files), (12, 1));
        assert_same_file(&out.join("model.safetensors"), &fixture("hf/model.safetensors"));
    }
}

#[test]
fn metas_names_in_safetensors_are_read_too() {
    // The same tensors as consolidated.safetensors, made of what the torch file holds.
    let folder = tempfile::tempdir().unwrap();
    let hf = HfSource::open(&fixture("hf")).unwrap();
    let bytes = std::fs::read(fixture("one/consolidated.00.pth")).unwrap();
    let pickled = String::from_utf8_lossy(&bytes[..2000]).into_owned();
    assert!(pickled.contains("tok_embeddings.weight"));
    let mut tensors = Vec::new();
    for (meta_name, hf_name) in [
        ("tok_embeddings.weight", "model.embed_tokens.weight"),
        ("norm.weight", "model.norm.weight"),
        ("output.weight", "lm_head.weight"),
        ("layers.0.attention.wv.weight", "model.layers.0.self_attn.v_proj.weight"),
        ("layers.0.attention.wo.weight", "model.layers.0.self_attn.o_proj.weight"),
        ("layers.0.feed_forward.w1.weight", "model.layers.0.mlp.gate_proj.weight"),
        ("layers.0.feed_forward.w3.weight", "model.layers.0.mlp.up_proj.weight"),
        ("layers.0.feed_forward.w2.weight", "model.layers.0.mlp.down_proj.weight"),
        ("layers.0.attention_norm.weight", "model.layers.0.input_layernorm.weight"),
        ("layers.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
        ("layers.0.attention.wq.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("layers.0.attention.wk.weight", "model.layers.0.self_attn.k_proj.weight"),
    ] {
        let (shape, dtype) = hf.info(hf_name).unwrap();
        let row = shape[1..].iter().product::<u64>() as usize * dtype.size();
        let mut bytes = vec![0; shape[0] as usize * row];
        hf.read_rows(hf_name, 0, shape[0], &mut bytes).unwrap();
        if meta_name.contains("wq") || meta_name.contains("wk") {
            // The inverse of the reordering, head by head of 4 rows: (half, pair) -> (pair, half).
            let rows: Vec<&[u8]> = bytes.chunks(row).collect();
            let order = (0..rows.len()).map(|r| rows[r / 4 * 4 + [0, 2, 1, 3][r % 4]]);
            bytes = order.collect::<Vec<_>>().concat();
        }
        let shape: Vec<usize> = shape.iter().map(|size| *size as usize).collect();
        tensors.push((meta_name, shape, bytes));
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::BF16, shape.clone(), bytes);
        (*name, view.unwrap())
    });
    let path = folder.path().join("consolidated.safetensors");
    safetensors::serialize_to_file(views, None, &path).unwrap();
    std::fs::copy(fixture("one/params.json"), folder.path().join("params.json")).unwrap();
    let meta = MetaSource::open(folder.path()).unwrap();
    check_same_weights(&meta, &hf);
}

#[test]
fn a_hugging_face_folder_comes_back_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let source = HfSource::open(&fixture("hf")).unwrap();
    let (out, _) = through_a_checkpoint(&source, folder.path(), u64::MAX);
    assert_same_file(&out.join("model.safetensors"), &fixture("hf/model.safetensors"));
    let back = HfSource::open(&out).unwrap();
    assert_eq!(back.model(), source.model());
    assert_eq!(back.extras().max_positions, 128);
}

#[test]
fn a_model_in_several_files_comes_back_whole() {
    let folder = tempfile::tempdir().unwrap();
    let source = HfSource::open(&fixture("hf")).unwrap();
    let (out, exported) = through_a_checkpoint(&source, folder.path(), 3000);
    assert_eq!(exported.files, 5);
    assert!(out.join("model-00001-of-00005.safetensors").is_file());
    assert!(!out.join("model.safetensors").exists());
    let index = std::fs::read_to_string(out.join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_str(&index).unwrap();
    assert_eq!(index["metadata"]["total_size"], 2 * 4144);
    assert_eq!(index["weight_map"]["lm_head.weight"], "model-00001-of-00005.safetensors");
    check_same_weights(&HfSource::open(&out).unwrap(), &source);
}

#[test]
fn reference_models_come_back_bit_for_bit() {
    let mut folders = vec![fixture("hf")];
    let references = std::env::var_os("PHALANX_REFERENCES");
    for entry in references.iter().flat_map(|path| std::fs::read_dir(path).unwrap()) {
        folders.push(entry.unwrap().path());
    }
    for case in folders.iter().filter(|path| path.join("model.safetensors").exists()) {
        let folder = tempfile::tempdir().unwrap();
        let source = HfSource::open(case).unwrap();
        let (out, _) = through_a_checkpoint(&source, folder.path(), u64::MAX);
        assert_same_file(&out.join("model.safetensors"), &case.join("model.safetensors"));
        assert_eq!(HfSource::open(&out).unwrap().model(), source.model());
    }
}

#[test]
fn types_are_converted_on_request() {
    let folder = tempfile::tempdir().unwrap();
    let source = HfSource::open(&fixture("hf")).unwrap();
    let wide = ExportOptions { dtype: Some(Dtype::F32), ..options(&source) };
    export_hf(&source, &folder.path().join("wide"), &wide).unwrap();
    let wide = HfSource::open(&folder.path().join("wide")).unwrap();
    assert_eq!(wide.info("model.norm.weight").unwrap(), (vec![16], Dtype::F32));
    assert_eq!(wide.extras().dtype, "float32");
    let (mut narrow, mut back) = ([0; 32], [0; 32]);
    source.read_rows("model.norm.weight", 0, 16, &mut narrow).unwrap();
    read_rows_as(&wide, "model.norm.weight", (0, 16), Dtype::Bf16, &mut back).unwrap();
    assert_eq!(narrow, back);
}

#[test]
fn transformers_is_told_which_tokenizer_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let source = HfSource::open(&fixture("hf")).unwrap();
    let tokenizer = folder.path().join("t.json");
    let export = |name: &str, added: &str| {
        std::fs::write(&tokenizer, format!("{{\"added_tokens\": [{added}]}}")).unwrap();
        let options = ExportOptions {
            tokenizer: Some(tokenizer.clone()),
            bos_token_id: Some(9),
            ..options(&source)
        };
        let out = folder.path().join(name);
        export_hf(&source, &out, &options).unwrap();
        let read = |name: &str| -> serde_json::Value {
            serde_json::from_slice(&std::fs::read(out.join(name)).unwrap()).unwrap()
        };
        assert!(out.join("tokenizer.json").is_file());
        (read("tokenizer_config.json"), read("generation_config.json"), read("config.json"))
    };
    let (config, generation, model) = export(
        "own",
        r#"{"id": 30, "content": "<|begin_of_text|>"}, {"id": 31, "content": "<|end_of_text|>"}"#,
    );
    let expected = serde_json::json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 128,
        "clean_up_tokenization_spaces": false,
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>",
    });
    assert_eq!(config, expected);
    for ids in [generation, model] {
        assert_eq!((&ids["bos_token_id"], &ids["eos_token_id"]), (&30.into(), &31.into()));
    }
    let (config, generation, _) = export("other", r#"{"id": 9, "content": "[BEGIN]"}"#);
    assert_eq!((&config["bos_token"], config.get("eos_token")), (&"[BEGIN]".into(), None));
    assert_eq!(generation["bos_token_id"], 9);
}

#[test]
fn an_export_or_import_never_overwrites() {
    let folder = tempfile::tempdir().unwrap();
    let source = HfSource::open(&fixture("hf")).unwrap();
    let out = folder.path().join("out");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("precious"), "x").unwrap();
    let error = export_hf(&source, &out, &options(&source)).unwrap_err();
    assert!(error.to_string().contains("not empty"), "{error}");
    import(&source, folder.path(), serde_json::Value::Null).unwrap();
    let error = import(&source, folder.path(), serde_json::Value::Null).unwrap_err();
    assert!(error.to_string().contains("has a checkpoint of step 0"), "{error}");
}

#[test]
fn another_model_is_named_with_both_shapes() {
    let source = HfSource::open(&fixture("hf")).unwrap();
    let mut model = source.model().unwrap().clone();
    model.ffn_dim = 64;
    let error = check_model(&source, &model).unwrap_err().to_string();
    assert!(
        error.contains("mlp.down_proj.weight has shape [16, 48], the model's has [16, 64]"),
        "{error}"
    );
    model.ffn_dim = 48;
    model.layers = 2;
    let error = check_model(&source, &model).unwrap_err().to_string();
    assert!(error.contains("model.layers.1.") && error.contains("is missing"), "{error}");
    model.layers = 1;
    model.tied_embeddings = true;
    let error = check_model(&source, &model).unwrap_err().to_string();
    assert!(error.contains("lm_head.weight is not in the model"), "{error}");
}

/// A copy of a fixture with one file's bytes changed.
fn altered(name: &str, file: &str, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = folder.path().join(file);
    let bytes = change(std::fs::read(&path).unwrap());
    std::fs::write(&path, bytes).unwrap();
    folder
}

fn replace(bytes: Vec<u8>, from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
    [&bytes[..at], to, &bytes[at + to.len()..]].concat()
}

#[test]
fn a_pickle_that_wants_to_run_something_is_refused() {
    // `torch._utils._rebuild_tensor_v2` becomes a name of the same length that would be imported
    // and called.
    let evil = altered("one", "consolidated.00.pth", |bytes| {
        replace(bytes, b"ctorch._utils\n_rebuild_tensor_v2", b"csubprocess\ncheck_output........")
    });
    let error = MetaSource::open(evil.path()).unwrap_err();
    assert!(matches!(error, FormatError::Refused { .. }));
    assert!(error.to_string().contains("refers to subprocess.check_output"), "{error}");
}

#[test]
fn paths_in_a_shard_index_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(fixture("hf/config.json"), folder.path().join("config.json")).unwrap();
    let index = r#"{"weight_map": {"lm_head.weight": "../hf/model.safetensors"}}"#;
    std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    let error = HfSource::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("\"../hf/model.safetensors\" is not a file name"), "{error}");
}

proptest! {
    #![proptest_config(common::cases(512))]
    #[test]
    fn altered_torch_files_never_panic(
        place in 0.0..1.0f64, value: u8, cut: bool, in_description: bool
    ) {
        let folder = altered("one", "consolidated.00.pth", |mut bytes| {
            let end = if in_description { 1300 } else { bytes.len() };
            let at = (end as f64 * place) as usize;
            if cut { bytes.truncate(at) } else { bytes[at] = value }
            bytes
        });
        if let Ok(source) = MetaSource::open(folder.path()) {
            for name in source.names() {
                let (shape, dtype) = source.info(&name).unwrap();
                let mut bytes = vec![0; shape.iter().product::<u64>() as usize * dtype.size()];
                source.read_rows(&name, 0, shape[0], &mut bytes).unwrap();
            }
        }
    }

    #[test]
    fn altered_safetensors_never_panic(place in 0.0..1.0f64, value: u8, cut: bool) {
        let folder = altered("hf", "model.safetensors", |mut bytes| {
            let at = (1400.0 * place) as usize;
            if cut { bytes.truncate(at) } else { bytes[at] = value }
            bytes
        });
        let _ = HfSource::open(folder.path());
    }
}
