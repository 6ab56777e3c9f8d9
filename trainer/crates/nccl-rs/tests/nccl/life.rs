//! A communicator's life: connecting, splitting, failing, being aborted, ending.

use std::thread;
use std::time::{Duration, Instant};

use nccl_rs::{Aborter, Communicator, DType, DeviceBuffer, NcclError, ReduceOp};

use crate::fake::{Fake, buffer, options, says, stream};

const IN_PROGRESS: i64 = 7;
const REMOTE_ERROR: i64 = 6;

fn reduce(communicator: &Communicator) -> Result<(), NcclError> {
    communicator.all_reduce(buffer(0x1000, 8, DType::F32)?, ReduceOp::Sum, stream(0))
}

/// That nothing reaches NCCL any more, and every call fails with the first cause.
#[track_caller]
fn is_dead(fake: &Fake, communicator: &Communicator, cause: &str) {
    let before = fake.calls();
    let start = Instant::now();
    let errors = [
        reduce(communicator).unwrap_err(),
        communicator.check().unwrap_err(),
        communicator.split(Some(0), 0, "child").map(|_| ()).unwrap_err(),
        communicator.group(|_| Ok::<_, NcclError>(())).unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, NcclError::Dead { .. }), "{error}");
        says(&error, &["group data is dead", cause]);
    }
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(fake.calls(), before);
}

#[test]
fn a_communicator_is_asked_for_as_the_header_wants_it() {
    let fake = Fake::new();
    let communicator = fake.connect();
    assert_eq!((communicator.rank(), communicator.size()), (1, 4));
    let expected = "ncclCommInitRankConfig rank=1 size=4 id=whole bytes=80/80 magic=cafebeef \
                    version=22809 blocking=0 default=1";
    assert_eq!(fake.calls_of("ncclCommInitRankConfig"), [expected]);
}

#[test]
fn connecting_waits_for_what_is_in_progress() {
    let fake = Fake::new();
    fake.tell(&[("return:ncclCommInitRankConfig", IN_PROGRESS), ("state", IN_PROGRESS)]);
    let nccl = fake.load();
    let id = nccl.unique_id().unwrap();
    let connecting = Communicator::begin(&nccl, id, 1, 4, options(10_000)).unwrap();
    let waiter = thread::spawn(move || connecting.wait());
    thread::sleep(Duration::from_millis(50));
    assert!(!waiter.is_finished());
    fake.tell(&[]);
    reduce(&waiter.join().unwrap().unwrap()).unwrap();
}

#[test]
fn a_rank_that_does_not_come_is_waited_for_until_the_deadline() {
    let fake = Fake::new();
    fake.tell(&[("state", IN_PROGRESS)]);
    let nccl = fake.load();
    let start = Instant::now();
    let error = Communicator::connect(&nccl, nccl.unique_id().unwrap(), 0, 2, options(200))
        .map(|_| ())
        .unwrap_err();
    let waited = start.elapsed();
    assert!(waited >= Duration::from_millis(200) && waited < Duration::from_secs(5), "{waited:?}");
    let parts = ["group data", "ncclCommInitRankConfig was still in progress after 200 ms"];
    says(&error, &parts);
    assert_eq!(fake.calls_of("ncclCommAbort"), ["ncclCommAbort comm=1"]);
}

#[test]
fn an_abort_from_another_thread_ends_a_waiting_connect() {
    let fake = Fake::new();
    fake.tell(&[("state", IN_PROGRESS)]);
    let nccl = fake.load();
    let id = nccl.unique_id().unwrap();
    let connecting = Communicator::begin(&nccl, id, 0, 2, options(60_000)).unwrap();
    let aborter = connecting.aborter();
    let waiter = thread::spawn(move || connecting.wait().map(|_| ()));
    thread::sleep(Duration::from_millis(50));
    let start = Instant::now();
    aborter.abort("rank 3 is gone").unwrap();
    says(&waiter.join().unwrap().unwrap_err(), &["group data is dead: rank 3 is gone"]);
    assert!(start.elapsed() < Duration::from_secs(5));
    aborter.abort("again").unwrap();
    assert_eq!(fake.calls_of("ncclCommAbort"), ["ncclCommAbort comm=1"]);
}

#[test]
fn a_refused_connect_is_an_error_and_leaves_nothing() {
    let check = |orders: &[(&str, i64)], parts: &[&str], num_aborts: usize| {
        let fake = Fake::new();
        let nccl = fake.load();
        let id = nccl.unique_id().unwrap();
        fake.tell(orders);
        let connected = Communicator::connect(&nccl, id, 1, 4, options(10_000));
        says(&connected.map(|_| ()).unwrap_err(), parts);
        assert_eq!(fake.calls_of("ncclCommAbort").len(), num_aborts, "{orders:?}");
    };
    let refused = ("return:ncclCommInitRankConfig", 1);
    let cuda = ["ncclCommInitRankConfig failed with code 1", "hint: a CUDA call failed"];
    check(&[refused], &cuda, 1);
    check(&[refused, ("null:ncclCommInitRankConfig", 1)], &cuda, 0);
    check(&[("null:ncclCommInitRankConfig", 1)], &["left no communicator"], 0);
    check(&[("state", 5)], &["ncclCommInitRankConfig failed with code 5"], 1);
    check(&[("rank", 2)], &["rank 1 of 4 became rank 2 of 4"], 1);
}

#[test]
fn a_rank_outside_of_the_group_is_refused() {
    let fake = Fake::new();
    let nccl = fake.load();
    let id = nccl.unique_id().unwrap();
    for (rank, size) in [(4, 4), (0, 0), (0, usize::MAX)] {
        let connected = Communicator::connect(&nccl, id, rank, size, options(1_000));
        says(&connected.map(|_| ()).unwrap_err(), &["group data: there is no rank"]);
    }
    assert!(fake.calls_of("ncclCommInitRankConfig").is_empty());
}

#[test]
fn an_asynchronous_error_is_the_end_of_the_group() {
    let fake = Fake::new();
    let communicator = fake.connect();
    communicator.check().unwrap();
    fake.tell(&[("state", IN_PROGRESS)]);
    communicator.check().unwrap();
    fake.tell(&[("state", REMOTE_ERROR)]);
    let error = communicator.check().unwrap_err();
    says(&error, &["work on a stream failed with code 6", "meaning of 6", "hint: a peer ended"]);
    fake.tell(&[]);
    is_dead(&fake, &communicator, "work on a stream failed with code 6");
    communicator.abort("later").unwrap();
    is_dead(&fake, &communicator, "work on a stream failed with code 6");
    drop(communicator);
    assert_eq!(fake.calls_of("ncclCommAbort"), ["ncclCommAbort comm=1"]);
}

#[test]
fn a_refused_call_is_the_end_but_an_invalid_argument_is_not() {
    let fake = Fake::new();
    let communicator = fake.connect();
    fake.tell(&[("return:ncclAllReduce", 4)]);
    says(&reduce(&communicator).unwrap_err(), &["code 4", "the call had no effect"]);
    fake.tell(&[]);
    reduce(&communicator).unwrap();

    fake.tell(&[("return:ncclAllReduce", 5)]);
    let parts = ["ncclAllReduce failed with code 5", "fake ncclAllReduce was told to fail"];
    says(&reduce(&communicator).unwrap_err(), &parts);
    fake.tell(&[]);
    is_dead(&fake, &communicator, "ncclAllReduce failed with code 5");
}

#[test]
fn an_operation_that_does_not_reach_its_stream_meets_the_deadline() {
    let fake = Fake::new();
    let nccl = fake.load();
    let id = nccl.unique_id().unwrap();
    let communicator = Communicator::connect(&nccl, id, 0, 2, options(100)).unwrap();
    fake.tell(&[("return:ncclAllReduce", IN_PROGRESS), ("state:1", IN_PROGRESS)]);
    let buffer = buffer(8, 1, DType::F64).unwrap();
    let stream = stream(0);
    let error = communicator.all_reduce(buffer, ReduceOp::Sum, stream).unwrap_err();
    says(&error, &["ncclAllReduce was still in progress after 100 ms"]);
    assert!(matches!(communicator.check().unwrap_err(), NcclError::Dead { .. }));
    assert_eq!(fake.calls_of("ncclAllReduce").len(), 1);
}

#[test]
fn a_call_that_hangs_is_named_and_not_aborted_under_its_feet() {
    let fake = Fake::new();
    let nccl = fake.load();
    let id = nccl.unique_id().unwrap();
    let mut short = options(10_000);
    short.abort_timeout = Duration::from_millis(100);
    let communicator = Communicator::connect(&nccl, id, 0, 2, short).unwrap();
    let aborter: Aborter = communicator.aborter();
    fake.tell(&[("hang:ncclAllReduce", 1_000)]);
    let caller = thread::spawn(move || (reduce(&communicator), communicator));
    fake.wait_for("ncclAllReduce");
    let error = aborter.abort("rank 1 is gone").unwrap_err();
    says(&error, &["ncclCommAbort cannot begin, ncclAllReduce has not returned for 100 ms"]);
    assert!(fake.calls_of("ncclCommAbort").is_empty());
    // It came back after all; then the communicator is dead, and can be aborted.
    let (_, communicator) = caller.join().unwrap();
    is_dead(&fake, &communicator, "rank 1 is gone");
    aborter.abort("now").unwrap();
    assert_eq!(fake.calls_of("ncclCommAbort").len(), 1);
}

#[test]
fn an_abort_that_hangs_is_left_to_itself() {
    let fake = Fake::new();
    let nccl = fake.load();
    let id = nccl.unique_id().unwrap();
    let mut short = options(10_000);
    short.abort_timeout = Duration::from_millis(100);
    let communicator = Communicator::connect(&nccl, id, 0, 2, short).unwrap();
    fake.tell(&[("hang:ncclCommAbort", 10_000)]);
    let start = Instant::now();
    let error = communicator.abort("rank 1 is gone").unwrap_err();
    says(&error, &["ncclCommAbort was still in progress after 100 ms"]);
    is_dead(&fake, &communicator, "rank 1 is gone");
    drop(communicator);
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_split_makes_a_child() {
    let fake = Fake::new();
    let parent = fake.connect();
    let child = parent.split(Some(3), 1, "tensor-3").unwrap().unwrap();
    assert_eq!((child.rank(), child.size()), (1, 2));
    assert!(parent.split(None, 0, "none").unwrap().is_none());
    let expected = [
        "ncclCommSplit comm=1 color=3 key=1 config=inherited",
        "ncclCommSplit comm=1 color=-1 key=0 config=inherited",
    ];
    assert_eq!(fake.calls_of("ncclCommSplit"), expected);
    reduce(&child).unwrap();
    // One lives without the other.
    parent.abort("rank 3 is gone").unwrap();
    reduce(&child).unwrap();
    fake.tell(&[("state:2", REMOTE_ERROR)]);
    says(&child.check().unwrap_err(), &["group tensor-3"]);
    assert!(parent.split(Some(u32::MAX), 0, "far").is_err());
}

#[test]
fn a_split_waits_for_parent_and_child_until_the_deadline() {
    let check = |id: &str, num_aborts: usize| {
        let fake = Fake::new();
        let nccl = fake.load();
        let own = nccl.unique_id().unwrap();
        let parent = Communicator::connect(&nccl, own, 0, 2, options(100)).unwrap();
        fake.tell(&[("return:ncclCommSplit", IN_PROGRESS), (id, IN_PROGRESS)]);
        let error = parent.split(Some(0), 0, "child").map(|_| ()).unwrap_err();
        says(&error, &["ncclCommSplit was still in progress after 100 ms"]);
        fake.tell(&[]);
        drop(parent);
        assert_eq!(fake.calls_of("ncclCommAbort").len(), num_aborts, "{id}");
    };
    // The parent's deadline: an abort of the parent ends the child too, which only NCCL knows.
    check("state:1", 2);
    // The child's deadline: the child is dropped and the parent lives on, until it is dropped.
    check("state:2", 2);
}

#[test]
fn an_abort_from_another_thread_ends_a_waiting_split_and_its_child() {
    let fake = Fake::new();
    let parent = fake.connect();
    let aborter = parent.aborter();
    fake.tell(&[("state:1", IN_PROGRESS)]);
    let waiter = thread::spawn(move || parent.split(Some(0), 0, "child").map(|_| ()));
    fake.wait_for("ncclCommSplit");
    aborter.abort("rank 2 is gone").unwrap();
    says(&waiter.join().unwrap().unwrap_err(), &["group data is dead: rank 2 is gone"]);
    let expected = ["ncclCommAbort comm=1", "ncclCommAbort comm=2"];
    assert_eq!(fake.calls_of("ncclCommAbort"), expected);
}

#[test]
fn what_is_finished_is_destroyed_and_not_aborted() {
    let fake = Fake::new();
    let communicator = fake.connect();
    let aborter = communicator.aborter();
    communicator.finish().unwrap();
    aborter.abort("too late").unwrap();
    assert_eq!(fake.calls_of("ncclCommFinalize").len(), 1);
    assert_eq!(fake.calls_of("ncclCommDestroy").len(), 1);
    assert!(fake.calls_of("ncclCommAbort").is_empty());
}

#[test]
fn a_finish_that_fails_becomes_an_abort() {
    let fake = Fake::new();
    let communicator = fake.connect();
    fake.tell(&[("state", REMOTE_ERROR)]);
    says(&communicator.finish().unwrap_err(), &["ncclCommFinalize failed with code 6"]);
    assert!(fake.calls_of("ncclCommDestroy").is_empty());
    assert_eq!(fake.calls_of("ncclCommAbort").len(), 1);
}

#[test]
fn communicators_go_from_thread_to_thread() {
    fn is_shared<T: Send + Sync>() {}
    is_shared::<Communicator>();
    is_shared::<Aborter>();
    is_shared::<nccl_rs::Nccl>();
    is_shared::<DeviceBuffer>();
    let fake = Fake::new();
    let communicator = fake.connect();
    // The fake minds two calls at once on a communicator.
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..25).for_each(|_| reduce(&communicator).unwrap()));
        }
    });
    assert_eq!(fake.calls_of("ncclAllReduce").len(), 100);
}
