//! A small model's tensors and joint saves of them by threads that play ranks.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use checkpoint_format::share::{SharedTensor, rows_of_rank};
use checkpoint_format::{
    Checkpoint, Dtype, JointSave, Piece, Result, Save, SaveReport, TensorBox, TrainState,
};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Barrier;

/// Name -> shape, type, bytes.
pub type Tensors = BTreeMap<String, (Vec<u64>, Dtype, Vec<u8>)>;

/// Tensors of several types and ranks, large enough that rows are shared; `seed` changes every
/// byte.
pub fn tensors(seed: u64) -> Tensors {
    let list: [(&str, &[u64], Dtype); 8] = [
        ("model.embed_tokens.weight", &[700, 512], Dtype::Bf16),
        ("master/model.embed_tokens.weight", &[700, 512], Dtype::F32),
        ("m/model.embed_tokens.weight", &[700, 512], Dtype::F32),
        ("model.norm.weight", &[33], Dtype::Bf16),
        ("odd", &[3, 5, 7], Dtype::F64),
        ("scalar", &[], Dtype::I64),
        ("empty", &[0, 4], Dtype::F32),
        ("bytes", &[11], Dtype::U8),
    ];
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut tensors = Tensors::new();
    for (name, shape, dtype) in list {
        let size = shape.iter().product::<u64>() as usize * dtype.size();
        let mut bytes = Vec::with_capacity(size);
        while bytes.len() < size {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            bytes.push((state >> 56) as u8);
        }
        tensors.insert(name.to_string(), (shape.to_vec(), dtype, bytes));
    }
    tensors
}

/// The pieces that a rank of a group that holds everything writes.
pub fn pieces(tensors: &Tensors, rank: usize, world_size: usize) -> Vec<Piece<'_>> {
    let rows = |shape: &[u64]| shape.first().copied().unwrap_or(1);
    let shared: Vec<SharedTensor> = tensors
        .values()
        .map(|(shape, _, bytes)| SharedTensor {
            rows: rows(shape),
            row_bytes: (bytes.len() as u64).checked_div(rows(shape)).unwrap_or(0),
        })
        .collect();
    let shares = rows_of_rank(&shared, rank, world_size);
    let mut pieces = Vec::new();
    for (((name, (shape, dtype, bytes)), (first, count)), shared) in
        tensors.iter().zip(shares).zip(&shared)
    {
        if count == 0 && !bytes.is_empty() {
            continue;
        }
        let from = (first * shared.row_bytes) as usize;
        let to = ((first + count) * shared.row_bytes) as usize;
        pieces.push(Piece {
            name: name.clone(),
            dtype: *dtype,
            shape: shape.clone(),
            region: TensorBox::rows(shape, first, count),
            data: &bytes[from..to],
        });
    }
    pieces
}

/// How a test saves.
pub struct How {
    pub generation: u64,
    pub world_size: usize,
    pub keep_last: usize,
    pub max_file_bytes: u64,
}

impl Default for How {
    fn default() -> How {
        How { generation: 1, world_size: 1, keep_last: 100, max_file_bytes: 4 << 30 }
    }
}

/// All ranks save together; the results by rank.
pub fn save_all(dir: &Path, step: u64, tensors: &Tensors, how: &How) -> Vec<Result<SaveReport>> {
    let barrier = Barrier::new(how.world_size);
    let state = TrainState { generation: how.generation, ..TrainState::at(step) };
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..how.world_size)
            .map(|rank| {
                let (barrier, state) = (&barrier, &state);
                scope.spawn(move || {
                    let save = Save::new(dir, step, how.generation);
                    let joint = JointSave {
                        save: save.with_max_file_bytes(how.max_file_bytes),
                        rank,
                        world_size: how.world_size,
                        total_bytes: tensors.values().map(|t| t.2.len() as u64).sum(),
                        pieces: pieces(tensors, rank, how.world_size),
                        state,
                        keep_last: how.keep_last,
                        keep_every_steps: 0,
                    };
                    joint.run(&mut || {
                        barrier.wait();
                        Ok(())
                    })
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// A save by one rank that must succeed.
pub fn save(dir: &Path, step: u64, tensors: &Tensors) -> SaveReport {
    save_all(dir, step, tensors, &How::default()).remove(0).unwrap()
}

/// Asserts that a checkpoint holds exactly these tensors.
#[track_caller]
pub fn assert_holds(checkpoint: &Checkpoint, tensors: &Tensors) {
    let names: Vec<_> = checkpoint.tensors().keys().collect();
    assert_eq!(names, tensors.keys().collect::<Vec<_>>());
    for (name, (shape, dtype, bytes)) in tensors {
        let entry = checkpoint.tensor(name).unwrap();
        assert_eq!((&entry.shape, entry.dtype), (shape, *dtype), "{name}");
        let mut found = vec![0xee; bytes.len()];
        checkpoint.read_box(name, &TensorBox::whole(shape), &mut found).unwrap();
        assert!(found == *bytes, "{name}");
    }
}

/// Names of the entries of a folder, in order.
pub fn entries(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A property is tried so many times; failures are printed, not kept in a file.
pub fn cases(cases: u32) -> proptest::test_runner::Config {
    proptest::test_runner::Config { cases, failure_persistence: None, ..Default::default() }
}
