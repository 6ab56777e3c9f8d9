//! What ranks, agents and the coordinator say to each other.

use rank_protocol::agent::{
    Answer, FromAgent, Join, MAX_JOIN_BYTES, NodeInfo, Running, Start, ToAgent,
};
use rank_protocol::bundle::{Ask, Knock, Reply};
use rank_protocol::frame::{Decoder, decode, encode};
use rank_protocol::message::{Position, StepReport};
use rank_protocol::session::{Numbered, Session};
use rank_protocol::store::{Requester, Store, StoreRequest};
use rank_protocol::{Assignment, FailureClass, FailureReport, FromRank, Phase, Steps, ToRank};
use std::time::Instant;

/// A stream of frames that comes in pieces: what a rank says, and what it is told.
pub fn frames(bytes: &[u8]) -> bool {
    let mut from_rank = Decoder::default();
    for piece in bytes.chunks(7) {
        from_rank.push(piece);
        while let Ok(Some(message)) = from_rank.next_message::<FromRank>() {
            drop(encode(&message));
        }
    }
    let mut to_rank = Decoder::default();
    to_rank.push(bytes);
    while let Ok(Some(message)) = to_rank.next_message::<ToRank>() {
        drop(encode(&message));
    }
    let whole = rank_protocol::frame::read::<FromRank>(&mut &bytes[..]);
    matches!(whole, Ok(Some(_)))
}

fn assignment() -> Assignment {
    Assignment {
        run_id: "run-1".into(),
        generation: 2,
        rank: 1,
        world_size: 4,
        local_rank: 1,
        local_world_size: 2,
        address: "127.0.0.1".into(),
        threads: 1,
        run_dir: "/runs/x".into(),
        resume_step: Some(5),
        replicas: Some(2),
        stop_after: None,
        roll_backs: Vec::new(),
        memory_dir: Some("/dev/shm/phalanx-run".into()),
        node: None,
        resume_dir: Some("/dev/shm/phalanx-run".into()),
        failures: 1,
        observed_s: 60,
        profile: Some(Steps { first: 10, last: 12 }),
        may_stay: true,
    }
}

fn failure() -> FailureReport {
    FailureReport {
        class: FailureClass::Transient,
        phase: Phase::Train,
        step: Some(7),
        collective: Some("all_reduce #3 of data".into()),
        lines: vec!["lost".into()],
        roll_back: None,
    }
}

fn from_rank() -> Vec<FromRank> {
    let report = StepReport { step: 3, loss: 1.5, ..StepReport::default() };
    let position = Position { phase: Phase::Save, step: Some(3), waits: vec!["x".into()] };
    vec![
        FromRank::Hello { pid: 7, build: "0.1.0".into(), rank: Some(1) },
        FromRank::Phase(Phase::Load),
        FromRank::Step(Box::new(report)),
        FromRank::CheckpointCommitted { step: 5 },
        FromRank::Here(position),
        FromRank::Failure(Box::new(failure())),
        FromRank::Finished { step: 9 },
        FromRank::Released,
        FromRank::Joined { generation: 3 },
        FromRank::Store { id: 3, request: StoreRequest::Add { key: "k".into(), amount: 1 } },
    ]
}

pub fn frame_seeds() -> Vec<Vec<u8>> {
    let said = from_rank();
    let mut seeds: Vec<Vec<u8>> = said.iter().map(|message| encode(message).unwrap()).collect();
    let release = ToRank::Release { generation: 2, reason: "a peer died".into() };
    let assigned = ToRank::Assignment(Box::new(assignment()));
    let told = [assigned, ToRank::Stop { now: true }, ToRank::Where, release];
    seeds.extend(told.iter().map(|message| encode(message).unwrap()));
    seeds.push(seeds.concat());
    seeds
}

/// Numbered messages, one a line, that a session takes in on either side.
pub fn sessions(bytes: &[u8]) -> bool {
    let mut agent = Session::<FromAgent>::new(8);
    let mut coordinator = Session::<ToAgent>::new(8);
    let mut is_valid = false;
    for line in bytes.split(|byte| *byte == b'\n') {
        if let Ok(frame) = decode::<Numbered<FromAgent>>(line) {
            is_valid |= coordinator.take(frame).is_ok();
        }
        if let Ok(frame) = decode::<Numbered<ToAgent>>(line) {
            let ack = frame.ack;
            is_valid |= agent.take(frame).is_ok();
            drop(agent.resume(ack));
        }
        drop(coordinator.push(ToAgent::Kill { generation: 1, rank: 0 }));
        drop(agent.push(FromAgent::StopRequested { signal: "SIGTERM".into() }));
    }
    is_valid
}

fn body<M: serde::Serialize>(message: &M) -> Vec<u8> {
    encode(message).unwrap().split_off(rank_protocol::frame::HEADER_BYTES)
}

pub fn session_seeds() -> Vec<Vec<u8>> {
    let (generation, rank) = (2, 1);
    let said = |(seq, message): (u64, FromRank)| {
        body(&Numbered { seq, ack: 0, m: Some(FromAgent::Said { generation, rank, message }) })
    };
    let from_agent: Vec<Vec<u8>> = (1..).zip(from_rank()).map(said).collect();
    let (ranks, kept, memory) = (vec![assignment()], vec![1], None);
    let start = Start { generation, run_dir: "/runs/x".into(), ranks, kept, memory };
    let to_agent = [
        ToAgent::Start(Box::new(start)),
        ToAgent::Tell { generation, rank, message: ToRank::Where },
        ToAgent::Terminate { generation, rank },
        ToAgent::Over { code: 0, reason: "done".into() },
    ];
    let numbered = |(seq, m): (u64, ToAgent)| body(&Numbered { seq, ack: 0, m: Some(m) });
    let to_agent: Vec<Vec<u8>> = (1..).zip(to_agent).map(numbered).collect();
    vec![from_agent.join(&b'\n'), to_agent.join(&b'\n')]
}

/// The first message of a connection, from whoever has no token yet, and the answer; and the same
/// at the door of a node's memory, with what is asked there.
pub fn joins(bytes: &[u8]) -> bool {
    if bytes.len() > MAX_JOIN_BYTES {
        return false;
    }
    let join = decode::<Join>(bytes);
    let answer = decode::<Answer>(bytes);
    drop((decode::<Knock>(bytes).is_ok(), decode::<Ask>(bytes), decode::<Reply>(bytes)));
    join.is_ok() || answer.is_ok()
}

pub fn join_seeds() -> Vec<Vec<u8>> {
    let node = NodeInfo { name: "a".into(), index: Some(1), ..NodeInfo::default() };
    let running = Running { generation: 3, ranks: vec![(0, 17)], exited: vec![1] };
    let token = "0123456789abcdef".repeat(4);
    let (running, door, bundles) = (Some(running), None, Default::default());
    let join = Join { token, node, conversation: 5, taken: 7, running, door, bundles };
    let welcome = Answer::Welcome { conversation: 6, taken: 0, epoch: 1 };
    vec![body(&join), body(&welcome), body(&Answer::Refused { reason: "no".into() })]
}

/// Requests to the rendezvous store, one a line.
pub fn store(bytes: &[u8]) -> bool {
    let (mut store, now) = (Store::default(), Instant::now());
    let mut is_valid = false;
    for (id, line) in (1..).zip(bytes.split(|byte| *byte == b'\n')) {
        let Ok(request) = decode::<StoreRequest>(line) else { continue };
        is_valid = true;
        let rank = usize::try_from(id % 4).unwrap_or(0);
        drop(store.handle(Requester { rank, id }, request, now));
        drop(store.expire(now));
    }
    is_valid
}

pub fn store_seeds() -> Vec<Vec<u8>> {
    let key = || "here".to_owned();
    let requests = [
        StoreRequest::Wait { keys: vec![key()], timeout_ms: 1000 },
        StoreRequest::Set { key: key(), value: vec![1, 2, 255] },
        StoreRequest::Get { key: key(), timeout_ms: 1000 },
        StoreRequest::Add { key: "n".into(), amount: -3 },
        StoreRequest::Check { keys: vec![key(), "n".into()] },
        StoreRequest::Delete { key: key() },
    ];
    let lines: Vec<Vec<u8>> = requests.iter().map(body).collect();
    vec![lines.join(&b'\n'), lines[1].clone(), lines[3].clone()]
}
