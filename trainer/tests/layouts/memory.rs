//! The memory that a rank really takes is what the plan says: that of weights, master weights,
//! gradients and optimizer state, and what the blocks keep for the backward pass, byte for byte.

use crate::harness::{config, num_ranks, on_ranks, step};
use collectives::{CommError, Communicator, ReduceOp, Work};
use layout::memory::memory_of_rank;
use layout::{Memory, Mesh};
use run_config::RunConfig;
use std::sync::{Arc, Mutex};
use torch_shim::memory::Meter;
use torch_shim::tch::{Device, Tensor};

fn mesh(config: &RunConfig) -> Mesh {
    Mesh::new(&config.parallelism, num_ranks(config)).unwrap()
}

fn planned(config: &RunConfig, rank: usize) -> Memory {
    memory_of_rank(config, &mesh(config), rank).unwrap()
}

fn bytes(tensor: &Tensor) -> u64 {
    (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64
}

/// The most of weights, master weights, gradients and moments on each rank, from its start to the
/// end of its second step.
fn check_state(layouts: &[&[&str]]) {
    for sets in layouts {
        let config = config(sets);
        let measured = on_ranks(&config, |member| {
            for at in 0..2 {
                step(&config, member, at);
            }
            let peak = member.worker.params.peak_bytes();
            let moments = bytes(member.optimizer.flat_m()) + bytes(member.optimizer.flat_v());
            [peak.weights, peak.master, peak.gradients, moments]
        });
        for (rank, found) in measured.iter().enumerate() {
            let Memory { weights, master, gradients, optimizer, .. } = planned(&config, rank);
            let expected = [weights, master, gradients, optimizer];
            assert_eq!(found, &expected, "rank {rank} of {}", sets.join(" "));
        }
    }
}

#[test]
fn state_without_shards() {
    check_state(&[
        &[],
        &["precision.compute=fp32"],
        &["precision.compute=bf16"],
        &["parallelism.replicate=2", "precision.compute=bf16"],
        &["parallelism.tensor=4"],
        &["parallelism.tensor=2", "precision.compute=bf16", "model.tied_embeddings=true"],
        &["parallelism.pipeline={stages: 2, schedule: zero-bubble}", "precision.compute=bf16"],
        &["parallelism.pipeline.stages=2", "model.tied_embeddings=true"],
        &["parallelism.context=2"],
        // Sizes that need padding.
        &["model.ffn_dim=42", "model.dim=33", "model.vocab_size=65"],
    ]);
}

#[test]
fn state_in_shards() {
    for level in ["optimizer", "gradients", "parameters", "parameters, reshard_after_forward: true"]
    {
        let shard = |ranks: usize| format!("parallelism.shard={{ranks: {ranks}, level: {level}}}");
        let (two, four) = (shard(2), shard(4));
        let interleaved = "parallelism.pipeline={stages: 2, schedule: interleaved-1f1b, \
                           virtual_stages: 2}";
        check_state(&[
            &[&two],
            &[&two, "precision.compute=fp32"],
            &[&two, "precision.compute=bf16"],
            &[&four, "precision.compute=bf16", "model.ffn_dim=42", "model.vocab_size=65"],
            &[&two, "model.tied_embeddings=true"],
            &[&two, "parallelism.recompute=full"],
            &[&two, "parallelism.recompute=selective", "training.micro_batch=2"],
            &[&two, "parallelism.replicate=2", "precision.compute=bf16"],
            &[&two, "parallelism.tensor=2", "parallelism.context=2"],
            &[&two, "parallelism.pipeline={stages: 2, schedule: gpipe}"],
            &[&two, "parallelism.pipeline={stages: 2, schedule: 1f1b}"],
            &[&two, "parallelism.pipeline={stages: 2, schedule: zero-bubble}"],
            &[&two, interleaved, "model.tied_embeddings=true"],
        ]);
    }
}

/// A pipeline group that reads a meter whenever its rank sends.
struct Reading {
    group: Arc<dyn Communicator>,
    meter: Arc<Meter>,
    readings: Arc<Mutex<Vec<u64>>>,
}

impl Communicator for Reading {
    fn send(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Work, CommError> {
        self.readings.lock().unwrap().push(self.meter.now());
        // The message is a copy that lives until its receiver comes: on this thread it would count.
        let message = tensor.shallow_clone();
        let send = move || self.group.send(&message, peer, tag);
        std::thread::scope(|scope| scope.spawn(send).join().unwrap())
    }

    fn rank(&self) -> usize {
        self.group.rank()
    }

    fn size(&self) -> usize {
        self.group.size()
    }

    fn device(&self) -> Device {
        self.group.device()
    }

    fn alive(&self) -> Result<(), CommError> {
        self.group.alive()
    }

    fn all_reduce(&self, tensor: &Tensor, op: ReduceOp) -> Result<Work, CommError> {
        self.group.all_reduce(tensor, op)
    }

    fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work, CommError> {
        self.group.all_gather(output, input)
    }

    fn reduce_scatter(
        &self,
        output: &Tensor,
        input: &Tensor,
        op: ReduceOp,
    ) -> Result<Work, CommError> {
        self.group.reduce_scatter(output, input, op)
    }

    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work, CommError> {
        self.group.broadcast(tensor, root)
    }

    fn recv(&self, tensor: &Tensor, peer: usize, tag: u32) -> Result<Work, CommError> {
        self.group.recv(tensor, peer, tag)
    }

    fn all_to_all(&self, output: &Tensor, input: &Tensor) -> Result<Work, CommError> {
        self.group.all_to_all(output, input)
    }

    fn barrier(&self) -> Result<Work, CommError> {
        self.group.barrier()
    }

    fn abort(&self) {
        self.group.abort();
    }

    fn bytes_sent(&self) -> u64 {
        self.group.bytes_sent()
    }
}

/// Micro-batches of a step below.
const MICRO_BATCHES: usize = 4;

/// What the first stage of two keeps after the forward pass of each micro-batch, by rank. With
/// gpipe all forward passes come first; with the last, room is made for the first gradient.
fn kept_after_forward(config: &RunConfig) -> Vec<Vec<u64>> {
    on_ranks(config, |member| {
        let readings = Arc::new(Mutex::new(Vec::new()));
        let meter = Arc::new(Meter::new().unwrap());
        step(config, member, 0);
        let groups = &mut member.worker.groups;
        let group = groups.pipeline.clone().unwrap();
        let reading = Reading { group, meter: meter.clone(), readings: readings.clone() };
        groups.pipeline = Some(Arc::new(reading));
        meter.count(|| step(config, member, 1));
        let readings = std::mem::take(&mut *readings.lock().unwrap());
        readings[..MICRO_BATCHES - 1].to_vec()
    })
}

/// The model of the measurements below, as wide as the fused attention wants it.
const MODEL: [&str; 4] =
    ["model.head_dim=16", "model.ffn_dim=80", "data.sequence_length=64", "training.global_batch=4"];

/// Bytes of a micro-batch that two blocks keep: measured and planned, on the first rank.
fn of_two_blocks(sets: &[&str]) -> (u64, u64) {
    let with = |layers: &'static str| {
        let pipeline = "parallelism.pipeline={stages: 2, schedule: gpipe}";
        config(&[&MODEL, sets, &[pipeline, layers]].concat())
    };
    let (fewer, more) = (with("model.layers=8"), with("model.layers=12"));
    // What each micro-batch adds, and of that what two blocks more add.
    let added = |config: &RunConfig| -> Vec<u64> {
        let readings = kept_after_forward(config).swap_remove(0);
        readings.windows(2).map(|pair| pair[1] - pair[0]).collect()
    };
    let pairs = added(&more).into_iter().zip(added(&fewer));
    let measured: Vec<u64> = pairs.map(|(more, fewer)| more - fewer).collect();
    assert!(measured.iter().all(|bytes| *bytes == measured[0]), "{measured:?}");
    let activations = |config: &RunConfig| planned(config, 0).activations;
    (measured[0], (activations(&more) - activations(&fewer)) / MICRO_BATCHES as u64)
}

fn check_activations(layouts: &[&[&str]]) {
    let mut wrong = Vec::new();
    for sets in layouts {
        let (measured, planned) = of_two_blocks(sets);
        if measured != planned {
            wrong.push(format!("{}: {measured}, planned {planned}", sets.join(" ")));
        }
    }
    assert!(wrong.is_empty(), "bytes that two blocks keep\n{}", wrong.join("\n"));
}

const BF16: &str = "precision.compute=bf16";
const FP32: &str = "precision.compute=fp32";
const CAUSAL: &str = "data.document_mask=false";

#[test]
fn activations_of_blocks() {
    for recompute in ["none", "selective", "full"] {
        let recompute = format!("parallelism.recompute={recompute}");
        check_activations(&[
            &[BF16, &recompute],
            &["parallelism.tensor=2", BF16, &recompute],
            &["parallelism.context=2", BF16, &recompute],
        ]);
    }
    check_activations(&[&[FP32, CAUSAL], &[FP32, "parallelism.recompute=full"]]);
}

#[test]
fn activations_of_tensor_and_context_parallel_blocks() {
    check_activations(&[
        &["parallelism={tensor: 2, sequence: false}", BF16],
        &["parallelism.tensor=4", BF16],
        &["parallelism.tensor=2", FP32, CAUSAL],
        &["parallelism.context=2", BF16, CAUSAL],
        &["parallelism={tensor: 2, context: 2}", FP32],
    ]);
}
