//! Depots of several nodes on this machine: copies, what is refused at the door, and a checkpoint
//! put together of what several have.

use super::*;
use crate::cluster::secrets;
use crate::cluster::wire;
use checkpoint_format::bundle::NodeRanks;
use checkpoint_format::checksum::sha256_hex;
use checkpoint_format::fence::newest_generation;
use checkpoint_format::{Checkpoint, Dtype, Piece, Save, TensorBox, TrainState};
use rank_protocol::bundle::{Ask, Knock, Reply};
use rank_protocol::frame::MAX_FRAME_BYTES;
use std::path::Path;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::LocalSet;
use tokio_rustls::TlsConnector;

const PLACES: usize = 2;
const RUN: &str = "run-1";

/// A run, and what nodes have of it in memory.
struct Run(tempfile::TempDir);

struct Node {
    shelf: Rc<Shelf>,
    door: Door,
    news: mpsc::Receiver<News>,
}

impl Run {
    /// Two nodes of two ranks each.
    fn new(parallelism: &str) -> Run {
        let run = Run(tempfile::tempdir().unwrap());
        let text = format!(
            "name: test\n\
             model: {{dim: 32, layers: 2, heads: 4, kv_heads: 2, ffn_dim: 64, vocab_size: 512}}\n\
             data: {{tokenizer: t, sequence_length: 32, sources: [{{name: a, path: a}}]}}\n\
             parallelism: {parallelism}\n\
             training: {{steps: 10, global_batch: 16}}\n\
             cluster: {{nodes: 2, ranks_per_node: 2, device: cpu}}\n"
        );
        std::fs::write(run.dir().config(), text).unwrap();
        secrets::make(&run.dir()).unwrap();
        run
    }

    fn dir(&self) -> RunDir {
        RunDir::new(self.0.path())
    }

    async fn node(&self, name: &str) -> Node {
        let folder = self.0.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let (port, key) = (listener.local_addr().unwrap().port(), new_token().unwrap());
        let (news, told) = mpsc::channel(100);
        let shelf = Rc::new(Shelf::new(self.dir(), key.clone(), &folder, news));
        shelf.belong_to(RUN.into());
        drop(spawn_local(door::serve(listener, Rc::clone(&shelf))));
        Node { shelf, door: Door { host: "127.0.0.1".into(), port, key }, news: told }
    }
}

/// Bytes that a tensor has, by its name.
fn bytes_of(name: &str, count: usize) -> Vec<u8> {
    let mix = |mixed: u32, byte: u8| mixed.wrapping_mul(31).wrapping_add(byte.into());
    let mut state = name.bytes().fold(7, mix);
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..count).map(next).collect()
}

impl Node {
    /// Its ranks write their part of a step: each rank a quarter of the rows of every tensor.
    fn write(&self, run: &Run, step: u64, place: usize) -> BundleId {
        let config = RunConfig::load(&run.dir().config(), &[]).unwrap().config;
        let node = NodeRanks { place, places: PLACES, first: 2 * place, count: 2, world_size: 4 };
        let save = Save::new(&self.shelf.bundles, step, 1);
        save.begin(0).unwrap();
        let mut tensors = Vec::new();
        for prefix in ["", "m/", "v/"] {
            for tensor in model_spec::hf_tensors(&config.model) {
                let shape: Vec<u64> = tensor.shape.iter().map(|size| *size as u64).collect();
                let name = format!("{prefix}{}", tensor.name);
                let count = shape.iter().product::<u64>() as usize * 4;
                tensors.push((bytes_of(&name, count), name, shape));
            }
        }
        for rank in node.ranks() {
            let mut pieces: Vec<Piece<'_>> = Vec::new();
            for (data, name, shape) in &tensors {
                let (rows, row_bytes) = (shape[0] / 4, data.len() / shape[0] as usize);
                let first = rank as u64 * rows;
                let start = first as usize * row_bytes;
                pieces.push(Piece {
                    name: name.clone(),
                    dtype: Dtype::F32,
                    shape: shape.clone(),
                    region: TensorBox::rows(shape, first, rows),
                    data: &data[start..start + rows as usize * row_bytes],
                });
            }
            save.write_rank(rank, &pieces).unwrap();
        }
        let state = TrainState { generation: 1, ..TrainState::at(step) };
        save.commit_bundle(RUN, &node, &state).unwrap();
        let id = BundleId { generation: 1, step, place, places: PLACES };
        self.shelf.add(id);
        id
    }

    fn holds(&self) -> Vec<BundleId> {
        self.shelf.holds.borrow().iter().copied().collect()
    }
}

fn with_local(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, async {
        tokio::time::timeout(Duration::from_secs(60), test).await.expect("it hangs");
    });
}

/// Names and bytes of all files of a folder.
fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let read = |entry: std::fs::DirEntry| {
        (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
    };
    let mut files: Vec<_> = entries.map(read).collect();
    files.sort();
    files
}

#[test]
fn a_copy_is_the_same_and_is_told() {
    with_local(async {
        let run = Run::new("{tensor: 2}");
        let (a, mut b) = (run.node("a").await, run.node("b").await);
        let id = a.write(&run, 5, 0);
        assert_eq!(a.shelf.copy(id, Some(b.door.clone())).await, Copied::Done);
        assert_eq!(files(&a.shelf.path(id)), files(&b.shelf.path(id)));
        let Some(News::Holds(told)) = b.news.recv().await else { panic!("nothing is told") };
        assert_eq!(told, Holding { run: RUN.into(), bundles: vec![id] });
        // Once more is no mistake, and nothing is left on its way.
        assert_eq!(a.shelf.copy(id, Some(b.door.clone())).await, Copied::Done);
        assert_eq!(files(&b.shelf.arriving), []);
        assert_eq!(a.shelf.copy(id, None).await, Copied::NoPeer);
        let next = a.write(&run, 10, 0);
        b.shelf.retain(|generation, step| (generation, step) >= (1, 10));
        assert_eq!(b.holds(), []);
        assert!(!b.shelf.path(id).exists() && a.shelf.path(next).exists());
    });
}

#[test]
fn a_copy_that_fails_is_not_tried_again_at_once() {
    with_local(async {
        let run = Run::new("{tensor: 2}");
        let (a, b) = (run.node("a").await, run.node("b").await);
        let id = a.write(&run, 5, 0);
        let wrong = Door { key: "0".repeat(64), ..b.door.clone() };
        let Copied::Failed { reason } = a.shelf.copy(id, Some(wrong.clone())).await else {
            panic!("a wrong key opens no door");
        };
        assert!(reason.contains("the key is not that of this door"), "{reason}");
        assert!(!reason.contains(&"0".repeat(64)), "{reason}");
        assert_eq!(a.shelf.copy(id, Some(wrong)).await, Copied::NotTried);
        assert_eq!(b.holds(), []);
        // Another node is another matter.
        assert_eq!(a.shelf.copy(id, Some(b.door.clone())).await, Copied::Done);
    });
}

async fn guest(run: &Run, door: &Door) -> tokio_rustls::client::TlsStream<TcpStream> {
    let (tls, name) = secrets::doors(&run.dir()).unwrap();
    let socket = TcpStream::connect((door.host.as_str(), door.port)).await.unwrap();
    let mut stream = TlsConnector::from(tls).connect(name, socket).await.unwrap();
    wire::write(&mut stream, &Knock { key: door.key.clone() }).await.unwrap();
    assert_eq!(wire::read::<Reply>(&mut stream, MAX_FRAME_BYTES).await.unwrap(), Reply::Go);
    stream
}

async fn asked(run: &Run, door: &Door, ask: Ask) -> Reply {
    let mut stream = guest(run, door).await;
    wire::write(&mut stream, &ask).await.unwrap();
    wire::read(&mut stream, MAX_FRAME_BYTES).await.unwrap()
}

#[test]
fn hostile_guests_get_nothing_in_and_nothing_else_out() {
    with_local(async {
        let run = Run::new("{tensor: 2}");
        let node = run.node("a").await;
        let id = node.write(&run, 5, 0);
        // Without TLS, and with nothing to say that is short enough.
        for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 64]] {
            let mut socket = TcpStream::connect(("127.0.0.1", node.door.port)).await.unwrap();
            socket.write_all(bytes).await.unwrap();
            let mut answer = Vec::new();
            let _ = socket.read_to_end(&mut answer).await;
            assert!(answer.len() < 64, "{answer:?}");
        }
        let (_, manifest) = Bundle::open(&node.shelf.path(id)).unwrap().seal().unwrap();
        let manifest = String::from_utf8(manifest).unwrap();
        let names = ["../../evil", "/etc/passwd", "a/b", "holder", "rank-00009-000.safetensors"];
        for name in names {
            let manifest = manifest.replace("rank-00000-000.safetensors", name);
            let commit = format!("{}\n", sha256_hex(manifest.as_bytes()));
            let reply = asked(&run, &node.door, Ask::Take { commit, manifest }).await;
            let Reply::Refused { reason } = reply else { panic!("{name}: {reply:?}") };
            assert!(reason.contains("is no file of its ranks"), "{reason}");
        }
        let commit = "0\n".to_owned();
        let reply = asked(&run, &node.door, Ask::Take { commit, manifest }).await;
        assert!(matches!(reply, Reply::Refused { .. }), "{reply:?}");
        assert!(!node.shelf.arriving.exists(), "nothing was made");
        let give = |bundle, file: &str, ranges| Ask::Give { bundle, file: file.into(), ranges };
        let other = BundleId { place: 1, ..id };
        for ask in [
            give(id, "../bundles/.lock", Vec::new()),
            give(id, "/etc/passwd", Vec::new()),
            give(id, "MANIFEST.json", Vec::new()),
            give(id, "index.json", vec![[0, u64::MAX]]),
            give(id, "index.json", vec![[7, 3]]),
            give(other, "index.json", Vec::new()),
            Ask::Seal(other),
        ] {
            let what = format!("{ask:?}");
            let reply = asked(&run, &node.door, ask).await;
            assert!(matches!(reply, Reply::Refused { .. }), "{what}: {reply:?}");
        }
        assert_eq!(node.holds(), [id]);
    });
}

/// A bundle whose bytes change on the way is not taken in.
#[test]
fn damage_on_the_way_is_found() {
    with_local(async {
        let run = Run::new("{tensor: 2}");
        let (a, b) = (run.node("a").await, run.node("b").await);
        let id = a.write(&run, 5, 0);
        damage(&a, id);
        let copied = a.shelf.copy(id, Some(b.door.clone())).await;
        let Copied::Failed { reason } = copied else { panic!("{copied:?}") };
        assert!(reason.contains("checksum"), "{reason}");
        assert_eq!((b.holds(), files(&b.shelf.arriving)), (Vec::new(), Vec::new()));
    });
}

fn wanted(ranks: &[usize], holders: Vec<Vec<Door>>) -> Wanted {
    Wanted {
        run: RUN.into(),
        generation: 2,
        resume: Resume { step: 5, generation: 1, holders },
        ranks: ranks.to_vec(),
        world_size: 4,
        replicas: None,
    }
}

/// What ranks of a node read is there, of the right bytes; what is here is not fetched.
async fn check(parallelism: &str, ranks: &[usize]) {
    let run = Run::new(parallelism);
    let (a, b, spare) = (run.node("a").await, run.node("b").await, run.node("spare").await);
    a.write(&run, 5, 0);
    b.write(&run, 5, 1);
    let gone = Door { port: 1, ..b.door.clone() };
    // The first of the holders is gone.
    let holders = vec![vec![a.door.clone()], vec![gone, b.door.clone()]];
    let wanted = wanted(ranks, holders);
    let dir = resume::assemble(&spare.shelf, &wanted).await.unwrap();
    let checkpoint = Checkpoint::open(&dir.join("step-0000005")).unwrap();
    assert_eq!(checkpoint.state().step, 5);
    assert!(checkpoint.verify().is_err(), "what nobody reads, headers among it, is a hole");
    let config = RunConfig::load(&run.dir().config(), &[]).unwrap().config;
    let held = needs::held(&config, (ranks, 4), None).unwrap();
    for (tensor, regions) in needs::owned(&held) {
        for name in ["", "m/", "v/"].map(|prefix| format!("{prefix}{tensor}")) {
            let shape = checkpoint.tensor(&name).unwrap().shape.clone();
            let all = bytes_of(&name, shape.iter().product::<u64>() as usize * 4);
            for region in &regions {
                let mut found = vec![0; region.num_elements().unwrap() as usize * 4];
                checkpoint.read_box(&name, region, &mut found).unwrap();
                let mut expected = vec![0; found.len()];
                let whole = TensorBox::whole(&shape);
                let target = (&mut expected[..], region);
                checkpoint_format::boxes::copy_part(region, (&all[..], &whole), target, 4).unwrap();
                assert!(found == expected, "{name} {region:?}");
            }
        }
    }
    spare.shelf.forget_resume();
    assert!(!dir.exists());
    // Neither is fetched by a node that has it.
    let first = BundleId { generation: 1, step: 5, place: 0, places: PLACES };
    assert_eq!(a.shelf.copy(first, Some(b.door.clone())).await, Copied::Done);
    let resume = Resume { holders: vec![Vec::new(); 2], ..wanted.resume };
    let wanted = Wanted { resume, ..wanted };
    let dir = resume::assemble(&b.shelf, &wanted).await.unwrap();
    Checkpoint::open(&dir.join("step-0000005")).unwrap().verify().unwrap();
}

#[test]
fn ranks_find_what_they_read_wherever_it_is() {
    with_local(async {
        check("{replicate: 4}", &[0, 1]).await;
        check("{shard: {ranks: 4, level: optimizer}}", &[2, 3]).await;
        check("{pipeline: {stages: 2}, replicate: 2}", &[1]).await;
        check("{tensor: 2, replicate: 2}", &[3]).await;
    });
}

#[test]
fn what_nobody_has_is_told() {
    with_local(async {
        let run = Run::new("{replicate: 4}");
        let (a, b) = (run.node("a").await, run.node("b").await);
        a.write(&run, 5, 0);
        let wanted = wanted(&[0], vec![vec![a.door.clone()], vec![a.door.clone()]]);
        let error = resume::assemble(&b.shelf, &wanted).await.unwrap_err();
        assert!(!error.is_damaged, "it may be there at the next try");
        let error = error.why;
        assert!(error.contains("place 1 is nowhere"), "{error}");
        assert!(error.contains("step 5 of place 1 is not here"), "{error}");
    });
}

/// A byte of a tensor file is another one than was written.
fn damage(node: &Node, id: BundleId) {
    let path = node.shelf.path(id).join("rank-00001-000.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
}

#[test]
fn a_holder_whose_bundle_is_damaged_is_passed_over() {
    with_local(async {
        let run = Run::new("{replicate: 4}");
        let (a, b, spare) = (run.node("a").await, run.node("b").await, run.node("spare").await);
        let first = a.write(&run, 5, 0);
        b.write(&run, 5, 1);
        assert_eq!(a.shelf.copy(first, Some(b.door.clone())).await, Copied::Done);
        damage(&a, first);
        let both = vec![a.door.clone(), b.door.clone()];
        let found = wanted(&[0, 1], vec![both, vec![b.door.clone()]]);
        resume::assemble(&spare.shelf, &found).await.unwrap();
        let alone = wanted(&[0, 1], vec![vec![a.door.clone()], vec![b.door.clone()]]);
        let error = resume::assemble(&spare.shelf, &alone).await.unwrap_err();
        assert!(error.is_damaged && error.why.contains("another checksum"), "{error:?}");
    });
}

#[test]
fn what_is_of_another_run_is_not_gone_on_from_and_goes() {
    with_local(async {
        let run = Run::new("{replicate: 4}");
        let (a, b) = (run.node("a").await, run.node("b").await);
        let id = a.write(&run, 5, 0);
        b.write(&run, 5, 1);
        let holders = vec![vec![a.door.clone()], vec![b.door.clone()]];
        let other = Wanted { run: "run-2".into(), ..wanted(&[0], holders) };
        let error = resume::assemble(&b.shelf, &other).await.unwrap_err();
        assert!(error.why.contains("of run run-1"), "{}", error.why);
        b.shelf.belong_to("run-2".into());
        assert_eq!(b.holds(), []);
        assert_eq!(newest_generation(&b.shelf.bundles).unwrap(), 0);
        assert_eq!(files(&b.shelf.bundles), [(names::LOCK.to_owned(), Vec::new())]);
        let Copied::Failed { reason } = a.shelf.copy(id, Some(b.door.clone())).await else {
            panic!("the node is another run's");
        };
        assert!(reason.contains("it is of run run-1, not run-2"), "{reason}");
    });
}

#[test]
fn what_ranks_have_not_finished_goes() {
    with_local(async {
        let run = Run::new("{replicate: 4}");
        let node = run.node("a").await;
        for generation in [1, 2] {
            Save::new(&node.shelf.bundles, 5, generation).begin(0).unwrap();
        }
        let left = |generation: u64| {
            node.shelf.bundles.join(names::temporary_folder(5, generation)).exists()
        };
        node.shelf.sweep(2);
        while left(1) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(left(2), "its ranks are there");
    });
}

#[test]
fn a_copy_has_as_long_as_a_slow_link_needs_and_no_longer() {
    assert_eq!(time_for(0), COPY_BASE);
    assert_eq!(time_for(LEAST_RATE * 100), COPY_BASE + Duration::from_secs(100));
    assert_eq!(time_for(u64::MAX), LONGEST_COPY);
}

#[test]
fn nobody_waits_for_what_is_not_taken() {
    let bundle = BundleId { generation: 1, step: 5, place: 0, places: PLACES };
    let copied = refused(Command::Copy { bundle, peer: None }, "full".into());
    assert!(matches!(copied, Some(News::Copied { copied: Copied::Failed { .. }, .. })));
    let resume = refused(Command::Resume(Box::new(wanted(&[0], Vec::new()))), "full".into());
    assert!(matches!(resume, Some(News::Resumed { generation: 2, result: Err(_) })));
    assert!(refused(Command::HasResumed, "full".into()).is_none());
}

/// Whoever has not shown the key keeps others waiting for no longer than they stand there.
#[test]
fn few_may_stand_at_the_door() {
    with_local(async {
        let run = Run::new("{tensor: 2}");
        let (a, b) = (run.node("a").await, run.node("b").await);
        let _guest = guest(&run, &a.door).await;
        let mut silent = Vec::new();
        for _ in 0..door::MAX_AT_THE_DOOR {
            silent.push(TcpStream::connect(("127.0.0.1", a.door.port)).await.unwrap());
        }
        assert!(b.shelf.open(&a.door).await.is_err(), "there is no room at the door");
        drop(silent);
        while b.shelf.open(&a.door).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
}
