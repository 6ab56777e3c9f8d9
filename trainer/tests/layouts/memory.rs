//! The memory that a rank really takes is what the plan says: that of weights, master weights,
//! gradients and optimizer state, and what the blocks keep for the backward pass, with the masks of
//! context parallelism, byte for byte; and that of the copy of what is written of a checkpoint.

use crate::harness::{FUSED, Member, batch_stage, config, num_ranks, on_ranks, step};
use crate::reshard::requested;
use checkpoint::Snapshot;
use collectives::{CommError, Communicator, ReduceOp, Work};
use layout::memory::memory_of_rank;
use layout::{Memory, Mesh};
use model::{Inputs, targets};
use parallel::Pass;
use run_config::RunConfig;
use std::path::Path;
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

/// The documents of a row, by their lengths; of a micro-batch and a row of it.
type RowDocuments = fn(usize, usize) -> Vec<usize>;

/// Micro-batches whose documents, where the config asks for them, are those given.
fn passes(config: &RunConfig, documents: RowDocuments) -> Vec<Pass> {
    let (rows, length) = (config.training.micro_batch, batch_stage(config).sequence_length);
    let pass = |micro_batch| {
        let tokens: Vec<i32> =
            (0..rows * length).map(|at| (at * 7 + micro_batch) as i32 % 64).collect();
        let positions: Vec<i32> = (0..rows * length).map(|at| (at % length) as i32).collect();
        let ids = |row| {
            let lengths = documents(micro_batch, row).into_iter();
            lengths.zip(0..).flat_map(|(length, id)| std::iter::repeat_n(id, length))
        };
        let ids: Vec<i32> = (0..rows).flat_map(ids).collect();
        let ids = config.data.document_mask.then_some(ids.as_slice());
        let inputs = Inputs::new(&tokens, &positions, ids, rows, Device::Cpu).unwrap();
        Pass { inputs, targets_BS: targets(&tokens, rows, Device::Cpu).unwrap() }
    };
    (0..MICRO_BATCHES).map(pass).collect()
}

/// Documents as they come, and begin within chunks.
const MIXED: RowDocuments = |micro_batch, row| {
    let first = 5 + (3 * micro_batch + row) % 11;
    vec![first, 20, 44 - first]
};

/// What a rank took in the forward and backward passes of a step.
struct Taken {
    /// Whenever it sent to another stage.
    at_sends: Vec<u64>,
    peak: u64,
}

/// Runs the forward and backward passes of `passes`, and counts what they make.
fn metered(member: &mut Member, passes: &[Pass]) -> Taken {
    let (readings, meter) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Meter::new().unwrap()));
    let group = member.worker.groups.pipeline.clone().unwrap();
    let (own, read) = (group.clone(), readings.clone());
    let reading = Reading { group, meter: meter.clone(), readings: read };
    member.worker.groups.pipeline = Some(Arc::new(reading));
    let _ = meter.count(|| member.worker.forward_backward(passes, 1.0).unwrap());
    member.worker.groups.pipeline = Some(own);
    let at_sends = std::mem::take(&mut *readings.lock().unwrap());
    Taken { at_sends, peak: meter.peak() }
}

/// What each rank takes in a step that is not its first.
fn taken(config: &RunConfig, documents: RowDocuments) -> Vec<Taken> {
    on_ranks(config, |member| {
        let passes = passes(config, documents);
        metered(member, &passes);
        metered(member, &passes)
    })
}

/// What the first stage of two keeps after the forward pass of each micro-batch, by rank. With
/// gpipe all forward passes come first; with the last, room is made for the first gradient.
fn kept_after_forward(config: &RunConfig) -> Vec<Vec<u64>> {
    let kept = |taken: Taken| taken.at_sends[..MICRO_BATCHES - 1].to_vec();
    taken(config, MIXED).into_iter().map(kept).collect()
}

/// Bytes of a micro-batch that two blocks keep: measured and planned, on the first rank.
fn of_two_blocks(sets: &[&str]) -> (u64, u64) {
    let with = |layers: &'static str| {
        let pipeline = "parallelism.pipeline={stages: 2, schedule: gpipe}";
        config(&[&FUSED, sets, &[pipeline, layers]].concat())
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

/// Bytes of a block of the model in FP32: for each of 64 tokens 4 dim, 3 ffn_dim, 2 (heads +
/// kv_heads) head_dim, and a statistic of each norm and head.
const FP32_BLOCK: u64 = 64 * 4 * (4 * 32 + 3 * 80 + 2 * (8 + 2) * 16 + 2 + 8);

/// Two blocks more on each stage add to its peak what the plan says that they do, byte for byte.
/// And the peak is the planned one and what the plan does not count, which is less than a block;
/// with BF16 that depends on what the machine computes in FP32.
fn check_peaks(stages: usize, layouts: &[&[&str]]) {
    let mut wrong = Vec::new();
    for sets in layouts {
        let with = |blocks: usize| {
            let layers = format!("model.layers={}", blocks * stages);
            config(&[&FUSED, *sets, &[&layers]].concat())
        };
        let (fewer, more) = (with(4), with(6));
        let peaks = |config| taken(config, MIXED).into_iter().map(|taken| taken.peak);
        for (rank, (more_peak, peak)) in peaks(&more).zip(peaks(&fewer)).enumerate() {
            let activations = |config| planned(config, rank).activations;
            let expected = activations(&fewer);
            let (added, expected_added) = (more_peak - peak, activations(&more) - expected);
            let is_near = (expected..expected + FP32_BLOCK).contains(&peak);
            if added != expected_added || sets.contains(&FP32) && !is_near {
                let added = format!("{added} for two blocks, planned {expected_added}");
                wrong.push(format!("{sets:?}, {rank}: {added}; {peak}, planned {expected}"));
            }
        }
    }
    assert!(wrong.is_empty(), "peaks in bytes\n{}", wrong.join("\n"));
}

#[test]
fn peaks_of_schedules() {
    for (schedule, virtual_stages) in
        [("gpipe", 1), ("1f1b", 1), ("interleaved-1f1b", 2), ("zero-bubble", 1), ("zero-bubble", 2)]
    {
        for recompute in ["none", "selective", "full"] {
            let recompute = format!("parallelism.recompute={recompute}");
            let pipeline = |stages| {
                format!(
                    "parallelism.pipeline={{stages: {stages}, schedule: {schedule}, \
                     virtual_stages: {virtual_stages}}}"
                )
            };
            check_peaks(2, &[&[BF16, &recompute, &pipeline(2)]]);
            check_peaks(3, &[&[FP32, &recompute, &pipeline(3)]]);
        }
    }
}

#[test]
fn peaks_of_deferred_weight_gradients_in_parallel_forms() {
    let pipeline = "parallelism.pipeline={stages: 2, schedule: zero-bubble}";
    for recompute in ["none", "selective", "full"] {
        let recompute = format!("parallelism.recompute={recompute}");
        check_peaks(
            2,
            &[
                &[pipeline, &recompute, "parallelism.tensor=2", BF16],
                &["parallelism={tensor: 2, sequence: false}", pipeline, &recompute, BF16],
                &[pipeline, &recompute, "parallelism.context=2", BF16],
            ],
        );
    }
}

/// In FP8 weight gradients that wait keep what they read as rounded.
#[test]
fn peaks_of_deferred_weight_gradients_in_fp8() {
    let pipeline = "parallelism.pipeline={stages: 2, schedule: zero-bubble}";
    let fp8 = ["precision={compute: bf16, matmul: fp8}", "model.ffn_dim=96", pipeline];
    for recompute in ["none", "selective", "full"] {
        let recompute = format!("parallelism.recompute={recompute}");
        let with = |set| [&fp8[..], &[recompute.as_str(), set]].concat();
        let layouts = [with("parallelism.tensor=1"), with("parallelism.tensor=2")];
        check_peaks(2, &layouts.each_ref().map(Vec::as_slice));
    }
}

/// The first document of each row, of another length in each; the second is all the rest.
const LONG: RowDocuments = |micro_batch, row| {
    let first = first_document(micro_batch, row);
    vec![first, 64 - first]
};

fn first_document(micro_batch: usize, row: usize) -> usize {
    1 + 2 * micro_batch + row
}

/// Bytes of the masks of one row on a rank of two, where the last document begins at `start`. The
/// chunks are 16 tokens long; that at the begin of the sequence needs none.
fn row_masks(rank: usize, start: usize) -> u64 {
    let ends: &[usize] = if rank == 0 { &[64] } else { &[32, 48] };
    ends.iter().map(|end| (16 * (end - start) * 2) as u64).sum()
}

/// The masks that are there after each micro-batch's forward pass on each rank of the first stage,
/// where documents are long, over what is there without masks.
fn masks_after_forward(sets: &[&str]) -> Vec<Vec<u64>> {
    let causal = taken(&config(&[sets, &[CAUSAL]].concat()), LONG);
    let of_rank = |(long, causal): (Taken, Taken)| -> Vec<u64> {
        // Without documents the masks are those of the first step, which was not counted.
        let pairs = long.at_sends.into_iter().zip(causal.at_sends);
        pairs.take(MICRO_BATCHES).map(|(long, causal)| long - causal).collect()
    };
    taken(&config(sets), LONG).into_iter().zip(causal).take(2).map(of_rank).collect()
}

#[test]
fn masks_of_documents() {
    let pipeline = "parallelism.pipeline={stages: 2, schedule: gpipe}";
    let batch = ["training.micro_batch=2", "training.global_batch=8"];
    for recompute in ["none", "selective", "full"] {
        let recompute = format!("parallelism.recompute={recompute}");
        let own = [pipeline, "parallelism.context=2", BF16, &recompute];
        let sets = [&FUSED[..], &own, &batch].concat();
        for (rank, found) in masks_after_forward(&sets).into_iter().enumerate() {
            let of_pass = |micro_batch| -> u64 {
                (0..2).map(|row| row_masks(rank, first_document(micro_batch, row))).sum()
            };
            // A graph keeps its micro-batch's masks; where attention is computed again, only those
            // of the last are at hand.
            let is_kept = recompute.ends_with("none");
            let first = |last| if is_kept { 0 } else { last };
            let expected: Vec<u64> =
                (0..MICRO_BATCHES).map(|last| (first(last)..=last).map(of_pass).sum()).collect();
            assert_eq!(found, expected, "rank {rank}, {recompute}");
            // The plan has the most that there can be, of documents that begin in the first token.
            let most = |micro_batches| 2 * micro_batches * row_masks(rank, 0);
            let activations = |sets: &[&str]| planned(&config(sets), rank).activations;
            let causal = [&sets[..], &[CAUSAL]].concat();
            let expected = most(if is_kept { MICRO_BATCHES as u64 } else { 1 });
            let added = activations(&sets) - activations(&causal);
            assert_eq!(added + row_masks(rank, 0), expected, "rank {rank}, {recompute}");
        }
    }
}

/// Without documents all micro-batches and both rows of each read the same masks.
#[test]
fn masks_of_whole_sequences() {
    let pipeline = "parallelism.pipeline={stages: 2, schedule: gpipe}";
    let batch = ["training.micro_batch=2", "training.global_batch=8"];
    for recompute in ["none", "selective", "full"] {
        let recompute = format!("parallelism.recompute={recompute}");
        let own = [pipeline, "parallelism.context=2", BF16, CAUSAL, &recompute];
        let config = config(&[&FUSED[..], &own, &batch].concat());
        // Those of the first step stay for the second.
        let made = on_ranks(&config, |member| {
            let passes = passes(&config, LONG);
            let [first, second] = [metered(member, &passes), metered(member, &passes)];
            let pairs = first.at_sends.into_iter().zip(second.at_sends);
            pairs.map(|(first, second)| first - second).collect::<Vec<u64>>()
        });
        for (rank, found) in made.iter().take(2).enumerate() {
            let expected = vec![row_masks(rank, 0); MICRO_BATCHES];
            assert_eq!(found[..MICRO_BATCHES], expected, "rank {rank}, {recompute}");
        }
    }
}

/// The copies that ranks take of what they write of a checkpoint: each rank's byte for byte where
/// no other owns the same, and otherwise those of all together.
#[test]
fn copies_of_checkpoints() {
    let interleaved =
        "parallelism.pipeline={stages: 2, schedule: interleaved-1f1b, virtual_stages: 2}";
    let shard = "parallelism.shard={ranks: 4, level: parameters}";
    let odd = ["model.ffn_dim=42", "model.dim=33", "model.vocab_size=65"];
    let layouts: [(&[&str], usize); 9] = [
        (&[], 1),
        (&odd, 1),
        (&["parallelism.tensor=4"], 1),
        (&[interleaved, "model.tied_embeddings=true"], 1),
        (&[shard], 1),
        (&["parallelism={tensor: 2, shard: {ranks: 2, level: gradients}}"], 1),
        (&["parallelism.replicate=2"], 2),
        (&["parallelism={context: 2, shard: {ranks: 2, level: optimizer}}"], 2),
        (&["parallelism={replicate: 2, context: 2, tensor: 2}"], 4),
    ];
    let precisions = [BF16, FP32, "precision.compute=fp64"];
    for (sets, copies) in layouts {
        for precision in precisions {
            let saves = ["checkpoint.every_steps=5", precision];
            let config = config(&[sets, &saves].concat());
            let found = on_ranks(&config, |member| {
                let meter = Meter::new().unwrap();
                let dir = Path::new("/nonexistent");
                let take = || requested(&config, member, dir, Snapshot::take);
                let snapshot = meter.count(take);
                let bytes = meter.now();
                drop(snapshot);
                bytes
            });
            let of = |rank| planned(&config, rank).checkpoint;
            let planned: Vec<u64> = (0..found.len()).map(of).collect();
            let words = format!("{sets:?}, {precision}");
            if copies == 1 {
                assert_eq!(found, planned, "{words}");
            } else {
                // A share is rounded up to whole bytes.
                let sums = [&found, &planned].map(|bytes| bytes.iter().sum::<u64>());
                assert!(sums[0] <= sums[1] && sums[1] < sums[0] + 8, "{words}: {sums:?}");
            }
        }
    }
}
