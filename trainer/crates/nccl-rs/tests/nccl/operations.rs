//! Operations: their arguments as NCCL sees them, and groups.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use nccl_rs::{Calls, Communicator, DType, DeviceBuffer, NcclError, ReduceOp, Stream};

use crate::fake::{self, Fake, buffer, says};

const IN_PROGRESS: i64 = 7;

fn at(address: usize, count: usize, dtype: DType) -> DeviceBuffer {
    buffer(address, count, dtype).unwrap()
}

fn stream() -> Stream {
    fake::stream(0x57)
}

#[test]
fn arguments_arrive_as_they_were_given() {
    use ReduceOp::{Avg, Max};
    let fake = Fake::new();
    let communicator = fake.connect();
    let check = |operation: fn(&Communicator) -> Result<(), NcclError>, expected: &str| {
        operation(&communicator).unwrap();
        let function = expected.split(' ').next().unwrap();
        assert_eq!(fake.calls_of(function), [expected]);
    };
    check(
        |c| c.all_reduce(at(0x100, 6, DType::F32), Max, stream()),
        "ncclAllReduce comm=1 depth=0 from=0x100 to=0x100 count=6 dtype=7 op=2 stream=0x57",
    );
    check(
        |c| c.all_gather(at(0x200, 12, DType::Bf16), at(0x100, 3, DType::Bf16), stream()),
        "ncclAllGather comm=1 depth=0 from=0x100 to=0x200 count=3 dtype=9 stream=0x57",
    );
    check(
        |c| c.reduce_scatter(at(0x200, 3, DType::F64), at(0x100, 12, DType::F64), Avg, stream()),
        "ncclReduceScatter comm=1 depth=0 from=0x100 to=0x200 count=3 dtype=8 op=4 stream=0x57",
    );
    check(
        |c| c.broadcast(at(0x100, 5, DType::U8), 2, stream()),
        "ncclBroadcast comm=1 depth=0 from=0x100 to=0x100 count=5 dtype=1 root=2 stream=0x57",
    );
    check(
        |c| c.send(at(0x100, 5, DType::I64), 3, stream()),
        "ncclSend comm=1 depth=0 from=0x100 count=5 dtype=4 peer=3 stream=0x57",
    );
    check(
        |c| c.recv(at(0x100, 5, DType::F16), 0, stream()),
        "ncclRecv comm=1 depth=0 to=0x100 count=5 dtype=6 peer=0 stream=0x57",
    );
}

#[test]
fn every_dtype_and_reduction_has_its_code() {
    let fake = Fake::new();
    let communicator = fake.connect();
    let dtypes = [
        (DType::U8, 1),
        (DType::I32, 2),
        (DType::I64, 4),
        (DType::F16, 6),
        (DType::F32, 7),
        (DType::F64, 8),
        (DType::Bf16, 9),
    ];
    let ops = [
        (ReduceOp::Sum, 0),
        (ReduceOp::Prod, 1),
        (ReduceOp::Max, 2),
        (ReduceOp::Min, 3),
        (ReduceOp::Avg, 4),
    ];
    let mut expected = Vec::new();
    for (dtype, dtype_code) in dtypes {
        for (op, op_code) in ops {
            communicator.all_reduce(at(0x8, 1, dtype), op, stream()).unwrap();
            expected.push(format!("dtype={dtype_code} op={op_code}"));
        }
    }
    let calls = fake.calls_of("ncclAllReduce");
    assert_eq!(calls.len(), 35);
    for (call, expected) in calls.iter().zip(&expected) {
        assert!(call.contains(expected), "{call} is not {expected}");
    }
}

#[test]
fn what_does_not_fit_never_reaches_nccl() {
    let fake = Fake::new();
    let communicator = fake.connect();
    let before = fake.calls();
    let (few, many) = (at(0x100, 3, DType::F32), at(0x200, 12, DType::F32));
    let errors = [
        communicator.all_gather(few, few, stream()),
        communicator.all_gather(many, at(0x100, 3, DType::I32), stream()),
        communicator.reduce_scatter(many, few, ReduceOp::Sum, stream()),
        communicator.broadcast(few, 4, stream()),
        communicator.send(few, usize::MAX, stream()),
        communicator.recv(few, 4, stream()),
    ];
    for error in errors {
        let error = error.unwrap_err();
        assert!(matches!(error, NcclError::Invalid(_)), "{error}");
        says(&error, &["group data: nccl"]);
    }
    assert_eq!(fake.calls(), before);
    communicator.check().unwrap();
}

#[test]
fn a_group_is_started_and_ended_once() {
    let fake = Fake::new();
    let communicator = fake.connect();
    let exchange = |calls: &Calls<'_>| {
        calls.send(at(0x100, 2, DType::F32), (calls.rank() + 1) % calls.size(), stream())?;
        calls.recv(at(0x200, 2, DType::F32), 0, stream())?;
        Ok::<_, NcclError>("through")
    };
    assert_eq!(communicator.group(exchange).unwrap(), "through");
    let expected = [
        "ncclGroupStart depth=0",
        "ncclSend comm=1 depth=1 from=0x100 count=2 dtype=7 peer=2 stream=0x57",
        "ncclRecv comm=1 depth=1 to=0x200 count=2 dtype=7 peer=0 stream=0x57",
        "ncclGroupEnd depth=1",
    ];
    assert!(fake.calls().ends_with(&expected.map(str::to_string)), "{:#?}", fake.calls());
}

#[test]
fn a_group_in_progress_is_waited_for() {
    let fake = Fake::new();
    let communicator = fake.connect();
    thread::scope(|scope| {
        let (started, is_started) = channel();
        let (told, is_told) = channel::<()>();
        let communicator = &communicator;
        let waiter = scope.spawn(move || {
            communicator.group(|calls| {
                calls.send(at(0x100, 2, DType::F32), 2, stream())?;
                started.send(()).unwrap();
                is_told.recv().unwrap();
                Ok::<_, NcclError>(())
            })
        });
        is_started.recv().unwrap();
        fake.tell(&[("return:ncclGroupEnd", IN_PROGRESS), ("state", IN_PROGRESS)]);
        told.send(()).unwrap();
        thread::sleep(Duration::from_millis(50));
        assert!(!waiter.is_finished());
        fake.tell(&[]);
        waiter.join().unwrap().unwrap();
    });
}

#[test]
fn a_group_that_is_left_early_is_ended_too() {
    // Before any call: nothing happened, and the communicator goes on.
    let fake = Fake::new();
    let communicator = fake.connect();
    let error = communicator
        .group(|calls| {
            calls.send(at(0x100, 2, DType::F32), 9, stream())?;
            calls.recv(at(0x100, 2, DType::F32), 0, stream())
        })
        .unwrap_err();
    says(&error, &["ncclSend: no rank 9 among 4"]);
    assert_eq!(fake.calls_of("ncclGroupEnd").len(), 1);
    communicator.all_reduce(at(0x100, 2, DType::F32), ReduceOp::Sum, stream()).unwrap();
    assert!(fake.calls().last().unwrap().contains("ncclAllReduce comm=1 depth=0"));

    // After a call: the others wait for what does not come.
    let error = communicator
        .group(|calls| {
            calls.send(at(0x100, 2, DType::F32), 2, stream())?;
            calls.recv(at(0x100, 2, DType::F32), 9, stream())
        })
        .unwrap_err();
    says(&error, &["ncclRecv: no rank 9 among 4"]);
    assert_eq!(fake.calls_of("ncclGroupStart").len(), 2);
    assert_eq!(fake.calls_of("ncclGroupEnd").len(), 2);
    says(&communicator.check().unwrap_err(), &["dead: a group was left after 1 of its calls"]);
}

#[test]
fn a_group_that_panics_is_ended_too() {
    let fake = Fake::new();
    let communicator = fake.connect();
    let run = || communicator.group(|_| -> Result<(), NcclError> { panic!("on purpose") });
    assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
    assert_eq!(fake.calls_of("ncclGroupStart").len(), 1);
    assert_eq!(fake.calls_of("ncclGroupEnd").len(), 1);
    says(&communicator.check().unwrap_err(), &["a group of calls was left by a panic"]);
    // The thread is free for other communicators.
    let other = fake.connect();
    other.all_reduce(at(0x100, 2, DType::F32), ReduceOp::Sum, stream()).unwrap();
}

#[test]
fn a_group_whose_end_fails_is_the_end() {
    let fake = Fake::new();
    let communicator = fake.connect();
    fake.tell(&[("return:ncclGroupEnd", 3)]);
    let send = |calls: &Calls<'_>| calls.send(at(0x100, 2, DType::F32), 2, stream());
    says(&communicator.group(send).unwrap_err(), &["ncclGroupEnd failed with code 3"]);
    fake.tell(&[("return:ncclGroupStart", 3)]);
    let other = fake.connect();
    says(&other.group(send).unwrap_err(), &["ncclGroupStart failed with code 3"]);
    assert_eq!(fake.calls_of("ncclGroupEnd").len(), 1);
    says(&communicator.check().unwrap_err(), &["dead", "ncclGroupEnd failed with code 3"]);
}

#[test]
fn no_other_call_gets_into_a_group() {
    let fake = Fake::new();
    let (communicator, other) = (fake.connect(), fake.connect());
    let nccl = fake.load();
    let id = nccl.unique_id().unwrap();
    let buffer = at(0x100, 2, DType::F32);
    communicator
        .group(|_| {
            let options = nccl_rs::Options::new("late");
            let errors = [
                other.all_reduce(buffer, ReduceOp::Sum, stream()),
                communicator.send(buffer, 0, stream()),
                communicator.group(|_| Ok(())),
                other.split(None, 0, "child").map(|_| ()),
                Communicator::begin(&nccl, id, 0, 2, options).map(|_| ()),
            ];
            for error in errors {
                says(&error.unwrap_err(), &["inside a group of calls"]);
            }
            Ok::<_, NcclError>(())
        })
        .unwrap();
    assert!(fake.calls_of("ncclAllReduce").is_empty());
    other.all_reduce(buffer, ReduceOp::Sum, stream()).unwrap();
}

#[test]
fn an_abort_waits_for_an_open_group() {
    let fake = Fake::new();
    let communicator = fake.connect();
    let aborter = communicator.aborter();
    let abort = communicator.group(|calls| {
        calls.send(at(0x100, 2, DType::F32), 2, stream())?;
        let abort = thread::spawn(move || aborter.abort("rank 2 is gone"));
        thread::sleep(Duration::from_millis(50));
        assert!(!abort.is_finished());
        Ok::<_, NcclError>(abort)
    });
    abort.unwrap().join().unwrap().unwrap();
    let calls = fake.calls_of("ncclCommAbort");
    assert_eq!(calls, ["ncclCommAbort comm=1"]);
    let place = |function: &str| fake.calls().iter().position(|call| call.starts_with(function));
    assert!(place("ncclGroupEnd") < place("ncclCommAbort"));
}

#[test]
fn all_to_all_is_one_group_of_pieces() {
    let fake = Fake::new();
    let communicator = fake.connect();
    let (output, input) = (at(0x200, 8, DType::F32), at(0x100, 8, DType::F32));
    communicator.all_to_all(output, input, stream()).unwrap();
    let ends = (fake.calls_of("ncclGroupStart").len(), fake.calls_of("ncclGroupEnd").len());
    assert_eq!(ends, (1, 1));
    let sends = (0..4).map(|peer| {
        let from = 0x100 + 8 * peer;
        format!("ncclSend comm=1 depth=1 from={from:#x} count=2 dtype=7 peer={peer} stream=0x57")
    });
    assert_eq!(fake.calls_of("ncclSend"), sends.collect::<Vec<_>>());
    let receives = (0..4).map(|peer| {
        let to = 0x200 + 8 * peer;
        format!("ncclRecv comm=1 depth=1 to={to:#x} count=2 dtype=7 peer={peer} stream=0x57")
    });
    assert_eq!(fake.calls_of("ncclRecv"), receives.collect::<Vec<_>>());

    let odd = at(0x100, 7, DType::F32);
    says(&communicator.all_to_all(odd, odd, stream()).unwrap_err(), &["7 elements have no piece"]);
    communicator.check().unwrap();
}
