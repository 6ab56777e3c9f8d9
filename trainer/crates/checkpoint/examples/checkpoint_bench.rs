//! How fast a model's and an optimizer's state goes to disk and comes back, and how long training
//! waits for its copy: our side of `ops/benches/checkpoint`. Prints a line of JSON.
//!
//! usage: checkpoint_bench FOLDER ROUNDS MATRICES ROWS COLUMNS
//!
//! The state is MATRICES weights of ROWS x COLUMNS and as many norms of COLUMNS, with two moments
//! each, in FP32, on one rank. The first round warms up.

use checkpoint::{SaveRequest, Snapshot, Target, TrainState, load, save};
use model_spec::{Axis, HfTensor, Init, LocalParameter, Part, Place};
use std::path::Path;
use std::process::Command;
use std::time::Instant;
use torch_shim::params::{ParameterSet, ParameterSpec};
use torch_shim::tch::{Device, Kind, Tensor, no_grad};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn local(name: String, shape: &[usize]) -> LocalParameter {
    let parts = vec![Part {
        hf_name: format!("{name}.weight"),
        row_start: 0,
        row_count: shape[0],
        axis: Axis::Embed,
    }];
    LocalParameter::whole(&model_spec::ParameterSpec {
        name,
        parts,
        shape: shape.to_vec(),
        axes: vec![Axis::Embed; shape.len()],
        place: Place::Head,
        init: Init::Ones,
        norm: shape.len() == 1,
    })
}

/// Weights and moments of random values.
struct State {
    params: ParameterSet,
    m: Tensor,
    v: Tensor,
}

impl State {
    fn new(held: &[LocalParameter]) -> Outcome<State> {
        let spec = |local: &LocalParameter| ParameterSpec {
            name: local.spec.name.clone(),
            shape: local.shape.iter().map(|&size| size as i64).collect(),
            decay: true,
        };
        let specs = held.iter().map(spec).collect();
        let params = ParameterSet::new(specs, Kind::Float, Kind::Float, Device::Cpu)?;
        let size = params.flat_master().size();
        let random = || Tensor::f_randn(&size, (Kind::Float, Device::Cpu));
        let values = random()?;
        no_grad(|| params.flat_master().shallow_clone().f_copy_(&values))?;
        Ok(State { params, m: random()?, v: random()? })
    }

    fn clear(&self) -> Outcome<()> {
        for tensor in [self.params.flat_master(), &self.m, &self.v] {
            let _ = no_grad(|| tensor.shallow_clone().f_zero_())?;
        }
        Ok(())
    }

    /// Whether all tensors are equal; the padding between them may differ.
    fn is_equal(&self, other: &State) -> bool {
        let flats = |state: &State| {
            [&state.m, &state.v, state.params.flat_master()].map(Tensor::shallow_clone)
        };
        flats(self).iter().zip(flats(other)).all(|(a, b)| {
            self.params.iter().all(|parameter| {
                let (start, length) = (parameter.range.start, parameter.num_elements());
                a.narrow(0, start, length).equal(&b.narrow(0, start, length))
            })
        })
    }
}

/// Seconds that the work takes. What is not on disk yet must not slow it.
fn timed<T>(work: impl FnOnce() -> T) -> Outcome<(T, f64)> {
    if !Command::new("sync").status()?.success() {
        return Err("sync failed".into());
    }
    let began = Instant::now();
    let result = work();
    Ok((result, began.elapsed().as_secs_f64()))
}

/// The median of all but the first.
fn median(times: &[f64]) -> f64 {
    let mut warm = times[1..].to_vec();
    warm.sort_by(f64::total_cmp);
    let middle = warm.len() / 2;
    match warm.len().is_multiple_of(2) {
        true => (warm[middle - 1] + warm[middle]) / 2.0,
        false => warm[middle],
    }
}

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [folder, rest @ ..] = &args[..] else { return Err("see the file's first lines".into()) };
    let numbers: Vec<usize> = rest.iter().map(|arg| arg.parse()).collect::<Result<_, _>>()?;
    let [rounds, matrices, rows, columns] = numbers[..] else {
        return Err("see the file's first lines".into());
    };
    if rounds == 0 {
        return Err("no rounds are nothing to measure".into());
    }
    // As ranks do.
    torch_shim::memory::keep_cpu_memory(1 << 30)?;
    let layers = (0..matrices).flat_map(|layer| {
        let linear = local(format!("layers.{layer}.linear"), &[rows, columns]);
        [linear, local(format!("layers.{layer}.norm"), &[columns])]
    });
    let held: Vec<LocalParameter> = layers.collect();
    let result = measure(Path::new(folder), rounds, &held)?;
    println!("{result}");
    Ok(())
}

fn measure(folder: &Path, rounds: usize, held: &[LocalParameter]) -> Outcome<serde_json::Value> {
    let tensor = |local: &LocalParameter| HfTensor {
        name: local.parts[0].hf_name.clone(),
        shape: local.parts[0].shape.clone(),
        parameter: local.spec.name.clone(),
        row_start: 0,
    };
    let whole: Vec<HfTensor> = held.iter().map(tensor).collect();
    let (state, other) = (State::new(held)?, State::new(held)?);
    let (mut save_s, mut load_s, mut stall_s) = (Vec::new(), Vec::new(), Vec::new());
    let mut bytes = 0;
    for step in 0..=rounds as u64 {
        let request = SaveRequest {
            checkpoints_dir: folder,
            step,
            generation: 1,
            rank: 0,
            world_size: 1,
            replica: 0,
            replicas: 1,
            num_elements: held.iter().map(LocalParameter::num_elements).sum(),
            held,
            params: &state.params,
            moments: &[("m", &state.m), ("v", &state.v)],
            state: TrainState::at(step),
            keep_last: usize::MAX,
            keep_every_steps: 0,
        };
        let (saved, seconds) = timed(|| save(&request, &mut || Ok(())))?;
        bytes = saved?.bytes;
        save_s.push(seconds);
        let (snapshot, seconds) = timed(|| Snapshot::take(&request))?;
        drop(snapshot);
        stall_s.push(seconds);
        other.clear()?;
        let target = Target { whole: &whole, held, params: &other.params };
        let step_dir = folder.join(format!("step-{step:07}"));
        let moments = [("m", &other.m), ("v", &other.v)];
        let (loaded, seconds) = timed(|| load(&step_dir, target, &moments))?;
        loaded?;
        load_s.push(seconds);
        if !other.is_equal(&state) {
            return Err("what was loaded is not what was saved".into());
        }
        std::fs::remove_dir_all(step_dir)?;
    }
    Ok(serde_json::json!({
        "bytes": bytes,
        "save_s": median(&save_s),
        "load_s": median(&load_s),
        "stall_s": median(&stall_s),
    }))
}
