//! One reference case: reading it, running our model on it, measuring deviations.
//!
//! Shapes: `B` sequences, `S` tokens each, `V` vocabulary.

use model::llama::rope::RopeTables;
use model::{Dense, Inputs, Llama, Stage, allocate, targets};
use model_spec::{LocalParameter, ParameterSpec, hf_config, parameters};
use optim::{AdamW, clip_coefficient, gradient_norm};
use run_config::{ComputeDtype, ModelConfig, Optimizer, OptimizerKind};
use serde_json::Value;
use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use torch_shim::params::{Parameter, ParameterSet};
use torch_shim::tch::{Device, Kind, Tensor, no_grad, set_num_threads};

/// Bounds that a format must keep.
pub struct Precise {
    /// The format.
    pub compute: ComputeDtype,
    /// Its section of `ref.json` and the name of its tensor file.
    pub section: &'static str,
    /// Largest absolute deviation of logits and hidden states.
    pub forward: f64,
    /// Largest deviation of a tensor's gradient norm, relative; of gradients, to the largest.
    pub gradient: f64,
    /// Largest relative deviation of a loss.
    pub loss: f64,
}

/// A deviation and its bound.
pub struct Measured {
    what: String,
    deviation: f64,
    bound: f64,
}

impl Measured {
    fn new(what: impl Into<String>, deviation: f64, bound: f64) -> Self {
        Self { what: what.into(), deviation, bound }
    }

    /// Whether the bound is kept; NaN does not.
    pub fn holds(&self) -> bool {
        self.deviation <= self.bound
    }
}

impl fmt::Display for Measured {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        write!(out, "{:<34} {:9.2e} of {:7.0e}", self.what, self.deviation, self.bound)
    }
}

/// A case folder, read.
pub struct Case {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub folder: PathBuf,
    config: ModelConfig,
    reference: Value,
    weights: HashMap<String, Tensor>,
    inputs: HashMap<String, Tensor>,
}

/// All cases; panics where there is none, in the repository or in a `$PHALANX_REFERENCES` that is
/// set.
pub fn all_cases() -> Vec<Case> {
    set_num_threads(1);
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/references");
    let mut folders = case_folders(&own);
    if let Some(more) = std::env::var_os("PHALANX_REFERENCES") {
        folders.extend(case_folders(Path::new(&more)));
    }
    folders.iter().map(|folder| Case::read(folder)).collect()
}

fn case_folders(root: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root)
        .unwrap_or_else(|error| panic!("reference cases in {}: {error}", root.display()));
    let mut folders: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("ref.json").is_file())
        .collect();
    folders.sort();
    assert!(!folders.is_empty(), "no reference case found in {}", root.display());
    folders
}

fn tensors(path: &Path) -> HashMap<String, Tensor> {
    let read = Tensor::read_safetensors(path);
    read.unwrap_or_else(|error| panic!("{}: {error}", path.display())).into_iter().collect()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("not a number: {value}"))
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list of numbers").iter().map(number).collect()
}

fn largest_difference(ours: &Tensor, theirs: &Tensor) -> f64 {
    assert_eq!(ours.size(), theirs.size());
    let difference = ours.to_kind(Kind::Double) - theirs.to_kind(Kind::Double);
    difference.abs().max().double_value(&[])
}

/// The largest relative deviation of two curves.
fn curve_deviation(ours: &[f64], theirs: &[f64]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let relative = |(ours, theirs): (&f64, &f64)| (ours - theirs).abs() / theirs.abs();
    // Not f64::max, which would drop a NaN.
    ours.iter().zip(theirs).map(relative).fold(0.0, |a, b| if b <= a { a } else { b })
}

/// A model ready to run, with its weights.
struct Loaded {
    model: Llama,
    set: ParameterSet,
    specs: Vec<ParameterSpec>,
}

impl Loaded {
    fn loss(&self, inputs: &Inputs, goal: &Tensor, scale: f64) -> f64 {
        let loss = self.model.forward_loss(inputs, goal, scale).unwrap();
        loss.backward();
        loss.double_value(&[])
    }

    /// The gradient of each tensor under its Hugging Face name.
    fn gradients(&self) -> Vec<(String, Tensor)> {
        let unfuse = |(spec, parameter): (&ParameterSpec, &Parameter)| -> Vec<(String, Tensor)> {
            let rows = |start, count| parameter.grad.narrow(0, start as i64, count as i64);
            let parts = spec.parts.iter();
            parts.map(|part| (part.hf_name.clone(), rows(part.row_start, part.row_count))).collect()
        };
        self.specs.iter().zip(self.set.iter()).flat_map(unfuse).collect()
    }
}

impl Case {
    fn read(folder: &Path) -> Self {
        let text = |name| std::fs::read_to_string(folder.join(name)).expect(name);
        let (config, _) = hf_config::from_json(&text("config.json")).expect("config.json");
        Self {
            name: folder.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            folder: folder.to_owned(),
            config,
            reference: serde_json::from_str(&text("ref.json")).expect("ref.json"),
            weights: tensors(&folder.join("model.safetensors")),
            inputs: tensors(&folder.join("inputs.safetensors")),
        }
    }

    fn load(&self, compute: ComputeDtype) -> Loaded {
        let specs = parameters(&self.config);
        // The references decay every tensor.
        let held: Vec<_> = specs.iter().map(LocalParameter::whole).collect();
        let set = allocate(&held, true, compute, Device::Cpu).unwrap();
        let mut num_loaded = 0;
        for (spec, parameter) in specs.iter().zip(set.iter()) {
            for part in &spec.parts {
                let weight = self.weights.get(&part.hf_name).expect(&part.hf_name);
                let (start, count) = (part.row_start as i64, part.row_count as i64);
                no_grad(|| parameter.master.narrow(0, start, count).copy_(weight));
                num_loaded += 1;
            }
        }
        assert_eq!(num_loaded, self.weights.len(), "tensors that the model does not have");
        set.refresh_compute().unwrap();
        let positions = self.sequence();
        let stage = Stage::whole(&self.config);
        let model =
            Llama::new(&self.config, stage, &set, Arc::new(Dense::default()), positions).unwrap();
        Loaded { model, set, specs }
    }

    fn sequence(&self) -> usize {
        self.inputs["tokens"].size()[2] as usize - 1
    }

    fn num_steps(&self) -> usize {
        self.inputs["tokens"].size()[0] as usize
    }

    /// Inputs and targets of step `step`, and the number of targets.
    fn batch(&self, step: usize) -> (Inputs, Vec<i32>, usize) {
        let tokens_BT = self.inputs["tokens"].get(step as i64).to_kind(Kind::Int);
        let (batch, sequence) = (tokens_BT.size()[0] as usize, self.sequence() as i64);
        let slice = |start| {
            let part = tokens_BT.narrow(1, start, sequence).contiguous().view([-1]);
            Vec::<i32>::try_from(part).unwrap()
        };
        let inputs = Inputs::consecutive(&slice(0), batch, 0, Device::Cpu).unwrap();
        (inputs, slice(1), batch)
    }

    /// Logits, hidden states, loss, masked loss and gradients of batch 0.
    pub fn forward_and_gradients(&self, bounds: &Precise) -> Vec<Measured> {
        let loaded = self.load(bounds.compute);
        let file = format!("ref_{}.safetensors", bounds.section);
        let expected = tensors(&self.folder.join(file));
        let section = &self.reference[bounds.section];
        let (inputs, goal, batch) = self.batch(0);
        let mut measured = self.hidden_and_logits(&loaded, &inputs, &expected, bounds);
        measured.extend(self.rotary_tables(&expected, bounds));

        let (masked_goal, num_unmasked) = self.masked(&goal);
        let masked_goal = targets(&masked_goal, batch, Device::Cpu).unwrap();
        let loss_masked = loaded.loss(&inputs, &masked_goal, 1.0 / num_unmasked as f64);
        loaded.set.zero_grad().unwrap();
        let scale = 1.0 / goal.len() as f64;
        let loss = loaded.loss(&inputs, &targets(&goal, batch, Device::Cpu).unwrap(), scale);
        for (name, ours) in [("loss", loss), ("loss_masked", loss_masked)] {
            let deviation = curve_deviation(&[ours], &[number(&section[name])]);
            measured.push(Measured::new(name, deviation, bounds.loss));
        }
        measured.extend(self.gradients(&loaded, &expected, section, bounds));
        measured
    }

    fn rotary_tables(&self, expected: &HashMap<String, Tensor>, bounds: &Precise) -> Vec<Measured> {
        let (rope, head_dim) = (&self.config.rope, self.config.head_dim);
        let kind = expected["logits"].kind();
        let tables = RopeTables::new(rope, head_dim, self.sequence(), kind, Device::Cpu).unwrap();
        let measure = |name: &str, ours: &Tensor| {
            let deviation = largest_difference(ours, expected.get(name)?);
            Some(Measured::new(name, deviation, bounds.forward))
        };
        let measured = [measure("cos", &tables.cos_SE), measure("sin", &tables.sin_SE)];
        measured.into_iter().flatten().collect()
    }

    fn masked(&self, goal: &[i32]) -> (Vec<i32>, usize) {
        let mask = Vec::<f32>::try_from(self.inputs["loss_mask"].view([-1])).unwrap();
        let masked: Vec<i32> =
            goal.iter().zip(&mask).map(|(&id, &kept)| if kept > 0.5 { id } else { -100 }).collect();
        let num_unmasked = masked.iter().filter(|&&id| id != -100).count();
        assert!(num_unmasked < goal.len(), "the mask hides nothing");
        (masked, num_unmasked)
    }

    fn hidden_and_logits(
        &self,
        loaded: &Loaded,
        inputs: &Inputs,
        expected: &HashMap<String, Tensor>,
        bounds: &Precise,
    ) -> Vec<Measured> {
        let model = &loaded.model;
        let mut measured = Vec::new();
        let mut compare = |name: &str, ours: &Tensor| {
            if let Some(theirs) = expected.get(name) {
                let deviation = largest_difference(ours, theirs);
                measured.push(Measured::new(name, deviation, bounds.forward));
            }
        };
        no_grad(|| {
            let mut stream = model.embed(inputs).unwrap();
            for layer in 0..self.config.layers {
                compare(&format!("hidden.{layer}"), &stream.sum().unwrap());
                stream = model.blocks(layer..layer + 1, stream, inputs, None).unwrap();
            }
            let normed = model.final_norm(stream, inputs).unwrap();
            compare("hidden.last", &normed);
            assert!(expected.contains_key("logits"));
            compare("logits", &model.logits(&normed).unwrap());
            let whole = model.forward_logits(inputs, None).unwrap();
            compare("logits", &whole);
        });
        measured
    }

    fn gradients(
        &self,
        loaded: &Loaded,
        expected: &HashMap<String, Tensor>,
        section: &Value,
        bounds: &Precise,
    ) -> Vec<Measured> {
        let gradients = loaded.gradients();
        let norms = section["grad_norms"].as_object().expect("grad_norms");
        assert_eq!(norms.len(), gradients.len());
        let worst_norm = gradients.iter().map(|(name, ours)| {
            let ours = ours.to_kind(Kind::Double).norm().double_value(&[]);
            (curve_deviation(&[ours], &[number(&norms[name])]), name)
        });
        let worst_element = gradients.iter().filter_map(|(name, ours)| {
            let theirs = expected.get(&format!("grad.{name}"))?;
            let largest = theirs.abs().max().to_kind(Kind::Double).double_value(&[]);
            Some((largest_difference(ours, theirs) / largest, name))
        });
        let worst = |deviations: Vec<(f64, &String)>, what: &str| {
            let worst = deviations.into_iter().max_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
            let short = worst.1.trim_start_matches("model.").trim_end_matches(".weight");
            Measured::new(format!("{what} {short}"), worst.0, bounds.gradient)
        };
        let norm = gradient_norm(&loaded.set).unwrap();
        let total = curve_deviation(&[norm], &[number(&section["grad_norm"])]);
        vec![
            worst(worst_norm.collect(), "norm"),
            worst(worst_element.collect(), "grad"),
            Measured::new("gradient norm", total, bounds.gradient),
        ]
    }

    /// Losses of AdamW steps from the case's weights.
    fn train(&self, compute: ComputeDtype, clip_norm: Option<f64>) -> (Vec<f64>, Vec<f64>) {
        let loaded = self.load(compute);
        let meta = &self.reference["meta"]["optimizer"];
        let betas = numbers(&meta["betas"]);
        let config = Optimizer {
            kind: OptimizerKind::Adamw,
            learning_rate: number(&meta["lr"]),
            betas: [betas[0], betas[1]],
            eps: number(&meta["eps"]),
            weight_decay: number(&meta["weight_decay"]),
            decay_norms: true,
        };
        let mut optimizer = AdamW::new(&config, &loaded.set).unwrap();
        let (mut losses, mut norms) = (Vec::new(), Vec::new());
        for step in 0..self.num_steps() {
            loaded.set.zero_grad().unwrap();
            let (inputs, goal, batch) = self.batch(step);
            let goal_BS = targets(&goal, batch, Device::Cpu).unwrap();
            losses.push(loaded.loss(&inputs, &goal_BS, 1.0 / goal.len() as f64));
            let norm = gradient_norm(&loaded.set).unwrap();
            norms.push(norm);
            let coefficient = clip_coefficient(norm, clip_norm);
            optimizer.step(&loaded.set, config.learning_rate, coefficient).unwrap();
        }
        (losses, norms)
    }

    /// The losses with and without clipping, and the norms before clipping.
    pub fn training(&self, bounds: &Precise) -> Vec<Measured> {
        let section = &self.reference[bounds.section];
        let (plain, _) = self.train(bounds.compute, None);
        let (clipped, norms) = self.train(bounds.compute, Some(1.0));
        let measured = |what: &str, ours: &[f64], bound| {
            Measured::new(what, curve_deviation(ours, &numbers(&section[what])), bound)
        };
        let mut all = vec![
            measured("losses", &plain, bounds.loss),
            measured("losses_clip1", &clipped, bounds.loss),
        ];
        if section.get("grad_norms_clip1").is_some() {
            // Adam's first steps go by the sign of tiny gradients: rounding grows with the steps.
            all.push(measured("grad_norms_clip1", &norms, 10.0 * bounds.gradient));
        }
        all
    }

    /// BF16 compute over FP32 masters, against autocast.
    pub fn bf16_training(&self, bound: f64) -> Vec<Measured> {
        let Some(expected) = self.reference.get("bf16_autocast_losses") else { return Vec::new() };
        let (losses, _) = self.train(ComputeDtype::Bf16, None);
        vec![Measured::new("losses", curve_deviation(&losses, &numbers(expected)), bound)]
    }
}
