//! What is saved is read back, by any number of ranks, in any boxes; old checkpoints go, the right
//! ones stay.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use checkpoint_format::diff::diff;
use checkpoint_format::scan::{newest_committed, newest_verified, scan};
use checkpoint_format::{Checkpoint, Dtype, FormatError, JointSave, Save, TensorBox, TrainState};
use common::{How, assert_holds, entries, pieces, save, save_all, tensors};
use proptest::prelude::*;

#[test]
fn any_number_of_ranks_writes_the_same_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = tensors(1);
    for (step, world_size) in [(1, 1), (2, 2), (3, 4), (4, 7)] {
        // Files of 300 kB, so that tensors are cut over files too.
        let how = How { world_size, max_file_bytes: 300_000, ..How::default() };
        for report in save_all(folder.path(), step, &tensors, &how) {
            assert!(report.unwrap().bytes > 3_500_000);
        }
        let path = folder.path().join(format!("step-{step:07}"));
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_holds(&checkpoint, &tensors);
        let verified = checkpoint.verify().unwrap();
        assert_eq!(verified.tensors, 8);
        let biggest = checkpoint.manifest().files.iter().filter(|f| f.0.starts_with("rank"));
        assert!(biggest.map(|file| file.1.size).max().unwrap() < 305_000);
        let first = Checkpoint::open(&folder.path().join("step-0000001")).unwrap();
        let same = diff(&first, &checkpoint).unwrap();
        assert!(same.is_equal(), "{same:?}");
        assert_eq!(same.compared, 8);
    }
}

#[test]
fn the_layout_on_disk_is_the_contract() {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), 1200, &tensors(1));
    assert_eq!(entries(folder.path()), [".generation", ".lock", "step-0001200"]);
    let expected =
        ["COMMIT", "MANIFEST.json", "index.json", "rank-00000-000.safetensors", "state.json"];
    assert_eq!(entries(&folder.path().join("step-0001200")), expected);
}

#[test]
fn the_tensor_files_are_safetensors() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = tensors(1);
    save(folder.path(), 1, &tensors);
    let bytes =
        std::fs::read(folder.path().join("step-0000001/rank-00000-000.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for (name, (shape, _, bytes)) in tensors.iter().filter(|(_, tensor)| !tensor.2.is_empty()) {
        let view = file.tensor(name).unwrap();
        assert_eq!(view.data(), bytes, "{name}");
        assert!(view.shape().iter().map(|size| *size as u64).eq(shape.iter().copied()));
    }
}

#[test]
fn old_checkpoints_go_and_a_reader_keeps_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = tensors(1);
    let how = How { keep_last: 2, ..How::default() };
    let save = |step: u64| save_all(folder.path(), step, &tensors, &how).remove(0).unwrap().removed;
    assert!(save(10).is_empty() && save(20).is_empty());
    let reader = Checkpoint::open(&folder.path().join("step-0000010")).unwrap();
    assert!(save(30).is_empty(), "a checkpoint was removed under its reader");
    assert_holds(&reader, &tensors);
    drop(reader);
    assert_eq!(save(40), [10, 20]);
    let steps: Vec<u64> =
        scan(folder.path()).unwrap().committed.iter().map(|found| found.step).collect();
    assert_eq!(steps, [30, 40]);
}

#[test]
fn a_run_that_went_back_keeps_what_it_saves_next() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = tensors(1);
    for (step, generation) in [(10, 1), (20, 1), (30, 1), (15, 2)] {
        let how = How { keep_last: 2, generation, ..How::default() };
        save_all(folder.path(), step, &tensors, &how).remove(0).unwrap();
    }
    let left = entries(folder.path());
    assert_eq!(left, [".generation", ".lock", "step-0000015", "step-0000030"]);
}

#[test]
fn a_step_that_is_saved_again_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), 5, &tensors(1));
    let again = How { generation: 2, ..How::default() };
    save_all(folder.path(), 5, &tensors(2), &again).remove(0).unwrap();
    let newest = newest_verified(folder.path()).unwrap().found.unwrap();
    assert_eq!((newest.step, newest.generation), (5, 2));
    assert_holds(&Checkpoint::open(&newest.path).unwrap(), &tensors(2));
    assert_eq!(entries(folder.path()), [".generation", ".lock", "step-0000005"]);
}

#[test]
fn an_older_generation_never_commits() {
    let folder = tempfile::tempdir().unwrap();
    let how = |generation| How { generation, world_size: 2, ..How::default() };
    save_all(folder.path(), 5, &tensors(1), &how(3)).remove(0).unwrap();
    let results = save_all(folder.path(), 6, &tensors(2), &how(2));
    assert!(matches!(
        results[0].as_ref().unwrap_err(),
        FormatError::StaleGeneration { ours: 2, newest: 3, .. }
    ));
    assert!(matches!(results[1].as_ref().unwrap_err(), FormatError::NotCommitted { step: 6, .. }));
    assert_eq!(newest_committed(folder.path()).unwrap().found.unwrap().step, 5);
}

#[test]
fn ranks_that_do_not_meet_to_commit_leave_the_checkpoint_before() {
    let folder = tempfile::tempdir().unwrap();
    save(folder.path(), 5, &tensors(1));
    let (tensors, state) = (tensors(2), TrainState::at(6));
    for meetings in 0..3 {
        let joint = JointSave {
            save: Save::new(folder.path(), 6, 1),
            rank: 0,
            world_size: 1,
            total_bytes: 0,
            pieces: pieces(&tensors, 0, 1),
            state: &state,
            keep_last: 100,
            keep_every_steps: 0,
        };
        let mut left = meetings;
        let error = joint.run(&mut || {
            let met = left > 0;
            left -= i32::from(met);
            met.then_some(()).ok_or_else(|| "rank 1 is gone".to_owned())
        });
        let error = error.unwrap_err();
        assert!(matches!(&error, FormatError::DidNotMeet { step: 6, .. }), "{error}");
        assert!(error.to_string().contains("rank 1 is gone"), "{error}");
        // Before the last meeting it is committed; that one only tells the others.
        let newest = newest_verified(folder.path()).unwrap().found.unwrap().step;
        assert_eq!(newest, if meetings < 2 { 5 } else { 6 });
    }
}

#[test]
fn a_difference_is_found_and_measured() {
    let folder = tempfile::tempdir().unwrap();
    let (one, mut two) = (tensors(1), tensors(1));
    two.get_mut("odd").unwrap().2[8 * 8..9 * 8].copy_from_slice(&1.5f64.to_le_bytes());
    let mut zero = one.clone();
    for set in [&mut zero, &mut two] {
        set.get_mut("odd").unwrap().2[9 * 8..].fill(0);
    }
    zero.get_mut("odd").unwrap().2[8 * 8..9 * 8].copy_from_slice(&1.0f64.to_le_bytes());
    two.remove("scalar");
    save(folder.path(), 1, &zero);
    save(folder.path(), 2, &two);
    let open = |name: &str| Checkpoint::open(&folder.path().join(name)).unwrap();
    let found = diff(&open("step-0000001"), &open("step-0000002")).unwrap();
    assert!(!found.is_equal());
    assert_eq!(found.only_in_a, ["scalar"]);
    assert_eq!(found.different.len(), 1);
    let different = &found.different[0];
    assert_eq!((different.name.as_str(), different.elements), ("odd", 1));
    assert_eq!((different.first_element, different.max_abs_difference), (Some(8), Some(0.5)));
    let mut narrow = zero.clone();
    let (shape, bytes) = (vec![1], vec![0; 4]);
    narrow.insert("scalar".into(), (shape, Dtype::F32, bytes));
    save(folder.path(), 3, &narrow);
    let found = diff(&open("step-0000001"), &open("step-0000003")).unwrap();
    assert!(found.different[0].what.contains("F32"), "{}", found.different[0].what);
    assert_eq!(found.different[0].max_abs_difference, None);
}

proptest! {
    #![proptest_config(common::cases(16))]
    #[test]
    fn any_box_reads_from_any_boxes(
        world_size in 1usize..6, max_file_bytes in 1_000u64..2_000_000,
        row in 0u64..700, rows in 0u64..700, column in 0u64..512, columns in 0u64..512
    ) {
        let folder = tempfile::tempdir().unwrap();
        let tensors = tensors(3);
        let how = How { world_size, max_file_bytes, ..How::default() };
        for report in save_all(folder.path(), 1, &tensors, &how) {
            report.unwrap();
        }
        let checkpoint = Checkpoint::open(&folder.path().join("step-0000001")).unwrap();
        let (rows, columns) = (rows.min(700 - row), columns.min(512 - column));
        let region = TensorBox { offsets: vec![row, column], lengths: vec![rows, columns] };
        let mut found = vec![0; (rows * columns * 4) as usize];
        checkpoint.read_box("master/model.embed_tokens.weight", &region, &mut found).unwrap();
        let whole = &tensors["master/model.embed_tokens.weight"].2;
        let expected: Vec<u8> = (row..row + rows)
            .flat_map(|row| {
                let start = ((row * 512 + column) * 4) as usize;
                whole[start..start + (columns * 4) as usize].to_vec()
            })
            .collect();
        prop_assert!(found == expected);
    }
}
