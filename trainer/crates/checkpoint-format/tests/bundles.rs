//! Saves into the memories of several nodes: each node has its own ranks' files alone, they can be
//! copied, and together they make the checkpoint.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use checkpoint_format::bundle::{
    Assembly, Bundle, BundleArrival, BundleManifest, BundleReport, JointBundle, NodeRanks, list,
    unwanted,
};
use checkpoint_format::checksum::Checksum;
use checkpoint_format::index::Index;
use checkpoint_format::{Checkpoint, FormatError, Result, Save, TensorBox, TrainState, names};
use common::{Tensors, assert_holds, entries, pieces, tensors};
use std::path::Path;
use std::sync::{Barrier, Mutex};

const PLACES: usize = 2;
const RANKS_PER_NODE: usize = 2;
const WORLD_SIZE: usize = PLACES * RANKS_PER_NODE;

fn node_of(rank: usize) -> NodeRanks {
    let place = rank / RANKS_PER_NODE;
    let (first, count) = (place * RANKS_PER_NODE, RANKS_PER_NODE);
    NodeRanks { place, places: PLACES, first, count, world_size: WORLD_SIZE }
}

/// A folder for each node.
struct Nodes(tempfile::TempDir);

impl Nodes {
    fn new() -> Nodes {
        Nodes(tempfile::tempdir().unwrap())
    }

    fn dir(&self, place: usize) -> std::path::PathBuf {
        self.0.path().join(place.to_string())
    }

    fn bundle(&self, place: usize, step: u64, generation: u64) -> std::path::PathBuf {
        self.dir(place).join(names::bundle_folder(step, generation, place))
    }

    /// All ranks save together; those of `blind` nodes cannot copy their bundle.
    fn save(
        &self,
        step: u64,
        generation: u64,
        all: &Tensors,
        blind: &[usize],
    ) -> Vec<Result<BundleReport>> {
        let barrier = Barrier::new(WORLD_SIZE);
        let ill = Mutex::new(0_usize);
        let state = TrainState { generation, ..TrainState::at(step) };
        std::thread::scope(|scope| {
            let ranks: Vec<_> = (0..WORLD_SIZE)
                .map(|rank| {
                    let (barrier, ill, state) = (&barrier, &ill, &state);
                    let dir = self.dir(rank / RANKS_PER_NODE);
                    scope.spawn(move || {
                        let joint = JointBundle {
                            run: "run-1",
                            save: Save::new(&dir, step, generation),
                            rank,
                            node: node_of(rank),
                            total_bytes: all.values().map(|t| t.2.len() as u64).sum(),
                            pieces: pieces(all, rank, WORLD_SIZE),
                            state,
                        };
                        let mut meet = |is_well: bool| {
                            *ill.lock().unwrap() += usize::from(!is_well);
                            barrier.wait();
                            let all_are_well = *ill.lock().unwrap() == 0;
                            if barrier.wait().is_leader() {
                                *ill.lock().unwrap() = 0;
                            }
                            barrier.wait();
                            Ok(all_are_well)
                        };
                        joint.run(&mut meet, &mut || !blind.contains(&node_of(rank).place))
                    })
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }
}

fn opened(path: &Path) -> (BundleManifest, Index) {
    let bundle = Bundle::open(path).unwrap();
    let index = serde_json::from_slice(&bundle.read(names::INDEX).unwrap()).unwrap();
    (bundle.manifest().clone(), index)
}

fn copy(from: &Path, to: &Path, change: impl Fn(&str, &mut Vec<u8>)) -> Result<()> {
    let (commit, manifest) = Bundle::open(from).unwrap().seal().unwrap();
    let arriving = to.join("arriving");
    let mut arrival = BundleArrival::begin(&arriving, &to.join("bundles"), &commit, &manifest)?;
    let files: Vec<String> = arrival.manifest().files.keys().cloned().collect();
    for name in files {
        let mut bytes = std::fs::read(from.join(&name)).unwrap();
        change(&name, &mut bytes);
        std::io::Write::write_all(&mut arrival.create(&name)?, &bytes).unwrap();
        arrival.wrote(&name, Checksum::of(&bytes))?;
    }
    arrival.finish()
}

#[test]
fn the_bundles_of_all_nodes_make_the_checkpoint() {
    let (nodes, all) = (Nodes::new(), tensors(1));
    for report in nodes.save(7, 3, &all, &[]) {
        assert!(report.unwrap().is_copied);
    }
    for place in 0..PLACES {
        assert_eq!(list(&nodes.dir(place)).len(), 1);
        let ranks = node_of(place * RANKS_PER_NODE).ranks();
        let (manifest, _) = opened(&nodes.bundle(place, 7, 3));
        let written = manifest.files.keys().filter_map(|name| names::parse_tensor_file(name));
        let written: Vec<usize> = written.map(|(rank, _)| rank).collect();
        assert_eq!(written, ranks.collect::<Vec<_>>());
    }
    // The second node's is lost, and comes from its copy.
    let copies = tempfile::tempdir().unwrap();
    copy(&nodes.bundle(1, 7, 3), copies.path(), |_, _| {}).unwrap();
    std::fs::remove_dir_all(nodes.dir(1)).unwrap();
    let folders = [nodes.bundle(0, 7, 3), copies.path().join("bundles/step-0000007.g0003.p00001")];
    let state = Bundle::open(&folders[0]).unwrap().read(names::STATE).unwrap();
    let dir = copies.path().join("resume");
    let parts = folders.iter().map(|folder| opened(folder)).collect();
    let assembly = Assembly::begin(&dir, parts, &state).unwrap();
    for folder in &folders {
        for name in opened(folder).0.files.keys().filter(|name| name.starts_with("rank-")) {
            assembly.link(name, &folder.join(name)).unwrap();
        }
    }
    let path = assembly.finish().unwrap();
    assert_eq!(path, dir.join("step-0000007"));
    let checkpoint = Checkpoint::open(&path).unwrap();
    checkpoint.verify().unwrap();
    assert_holds(&checkpoint, &all);
    assert_eq!((checkpoint.state().step, checkpoint.state().generation), (7, 3));
}

#[test]
fn what_is_a_hole_is_never_read() {
    let (nodes, all) = (Nodes::new(), tensors(1));
    nodes
        .save(7, 3, &all, &[])
        .into_iter()
        .for_each(|report| assert!(report.is_ok(), "{report:?}"));
    let dir = nodes.0.path().join("resume");
    let parts = (0..PLACES).map(|place| opened(&nodes.bundle(place, 7, 3))).collect();
    let state = Bundle::open(&nodes.bundle(0, 7, 3)).unwrap().read(names::STATE).unwrap();
    let assembly = Assembly::begin(&dir, parts, &state).unwrap();
    for rank in 0..WORLD_SIZE {
        let name = names::tensor_file(rank, 0);
        match rank {
            3 => drop(assembly.create(&name).unwrap()),
            _ => {
                let from = nodes.bundle(rank / RANKS_PER_NODE, 7, 3).join(&name);
                assembly.link(&name, &from).unwrap();
            }
        }
    }
    let checkpoint = Checkpoint::open(&assembly.finish().unwrap()).unwrap();
    let read = |name: &str| {
        let entry = checkpoint.tensor(name).unwrap();
        let mut bytes = vec![0; 700 * 512 * entry.dtype.size()];
        checkpoint.read_box(name, &TensorBox::whole(&entry.shape), &mut bytes)
    };
    // The last rank wrote all of it.
    let error = read("model.embed_tokens.weight");
    assert!(matches!(error, Err(FormatError::Damaged { .. })), "{error:?}");
    // What other ranks wrote is there.
    read("m/model.embed_tokens.weight").unwrap();
}

#[test]
fn a_node_that_fails_leaves_nothing_on_any() {
    let (nodes, all) = (Nodes::new(), tensors(1));
    nodes
        .save(6, 3, &all, &[])
        .into_iter()
        .for_each(|report| assert!(report.is_ok(), "{report:?}"));
    // A folder that is none: the second node's ranks cannot write.
    std::fs::rename(nodes.dir(1), nodes.0.path().join("kept")).unwrap();
    std::fs::write(nodes.dir(1), "").unwrap();
    let results = nodes.save(7, 3, &all, &[]);
    assert!(results.iter().all(Result::is_err));
    let is_told = |error: &FormatError| matches!(error, FormatError::NotCommitted { .. });
    assert!(results[..2].iter().all(|result| is_told(result.as_ref().unwrap_err())));
    assert_eq!(entries(&nodes.dir(0)), [".generation", ".lock", "step-0000006.g0003.p00000"]);
}

#[test]
fn a_bundle_that_is_not_copied_is_kept_all_the_same() {
    let (nodes, all) = (Nodes::new(), tensors(1));
    for report in nodes.save(7, 3, &all, &[1]) {
        assert!(!report.unwrap().is_copied, "all ranks know");
    }
    assert_eq!((list(&nodes.dir(0)).len(), list(&nodes.dir(1)).len()), (1, 1));
}

#[test]
fn damage_on_the_way_is_found_and_leaves_nothing() {
    let (nodes, all) = (Nodes::new(), tensors(1));
    nodes
        .save(7, 3, &all, &[])
        .into_iter()
        .for_each(|report| assert!(report.is_ok(), "{report:?}"));
    let from = nodes.bundle(1, 7, 3);
    for wanted in ["rank-00002-000.safetensors", "index.json", "state.json"] {
        let to = tempfile::tempdir().unwrap();
        let error = copy(&from, to.path(), |name, bytes| {
            if name == wanted {
                *bytes.last_mut().unwrap() ^= 1;
            }
        });
        assert!(error.unwrap_err().to_string().contains("checksum"), "{wanted}");
        assert!(list(&to.path().join("bundles")).is_empty());
        assert!(entries(&to.path().join("arriving")).is_empty());
    }
    // A file that never came.
    let (commit, manifest) = Bundle::open(&from).unwrap().seal().unwrap();
    let to = tempfile::tempdir().unwrap();
    let arrival = BundleArrival::begin(to.path(), to.path(), &commit, &manifest).unwrap();
    let error = arrival.finish().unwrap_err().to_string();
    assert!(error.contains("is missing"), "{error}");
    assert!(entries(to.path()).is_empty());
    let error = BundleArrival::begin(to.path(), to.path(), b"0\n", &manifest).unwrap_err();
    assert!(error.to_string().contains("COMMIT is not the SHA-256"), "{error}");
}

#[test]
fn bundles_of_several_saves_make_no_checkpoint() {
    let (nodes, all) = (Nodes::new(), tensors(1));
    for (step, generation) in [(7, 3), (7, 4), (8, 4)] {
        let reports = nodes.save(step, generation, &all, &[]);
        reports.into_iter().for_each(|report| assert!(report.is_ok(), "{report:?}"));
    }
    let first = nodes.bundle(0, 7, 4);
    let state = Bundle::open(&first).unwrap().read(names::STATE).unwrap();
    let dir = nodes.0.path().join("resume");
    let check = |others: &[&Path]| {
        let parts = std::iter::once(&*first).chain(others.iter().copied()).map(opened).collect();
        Assembly::begin(&dir, parts, &state).unwrap_err().to_string()
    };
    for other in [nodes.bundle(1, 7, 3), nodes.bundle(1, 8, 4), first.clone()] {
        assert!(check(&[&other]).contains("in place 1 is"), "{}", other.display());
    }
    assert!(check(&[]).contains("in place 0 is"));
    // The newest alone is kept.
    let old = unwanted(&nodes.dir(0), |generation, step| (generation, step) == (4, 8));
    old.iter().for_each(|path| std::fs::remove_dir_all(path).unwrap());
    let kept: Vec<String> = list(&nodes.dir(0)).iter().map(BundleManifest::folder).collect();
    assert_eq!(kept, ["step-0000008.g0004.p00000"]);
}
