//! Thousands of agents in one process: they join a real coordinator over TLS, say what agents say,
//! and start no rank. For measuring what a coordinator can bear (`ops/benches/rendezvous`).
//!
//! usage: mock-agents RUN-DIRECTORY NODES STEPS STEP-MILLISECONDS

use launcher::cluster::agent::connect::{Attempt, Connected, Whereabouts, attempt};
use launcher::cluster::wire;
use rank_protocol::agent::{ALIVE_EVERY_MS, FromAgent, Join, NodeInfo, ToAgent};
use rank_protocol::exit::Exit;
use rank_protocol::frame::MAX_FRAME_BYTES;
use rank_protocol::session::{Numbered, Session};
use rank_protocol::{Assignment, FromRank, Phase, RunDir, StepReport, exit_code};
use std::error::Error;
use std::io::Write;
use std::rc::Rc;
use std::time::Duration;
use tokio::task::LocalSet;

/// Handshakes that are under way at once.
const AT_ONCE: usize = 64;
/// Messages that may wait for the coordinator.
const NUM_KEPT: usize = 64 << 10;

/// What every agent does.
struct Plan {
    run: RunDir,
    steps: u64,
    step_time: Duration,
    door: tokio::sync::Semaphore,
}

fn main() {
    let result = parse().and_then(|(plan, nodes)| {
        raise_limit()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        LocalSet::new().block_on(&runtime, all(Rc::new(plan), nodes));
        Ok(())
    });
    if let Err(error) = result {
        let _ = writeln!(std::io::stderr(), "mock-agents: {error}");
        std::process::exit(exit_code::CONFIG);
    }
}

fn parse() -> Result<(Plan, usize), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [run, nodes, steps, millis] = &args[..] else {
        return Err("usage: mock-agents RUN-DIRECTORY NODES STEPS STEP-MILLISECONDS".into());
    };
    let plan = Plan {
        run: RunDir::new(run),
        steps: steps.parse()?,
        step_time: Duration::from_millis(millis.parse()?),
        door: tokio::sync::Semaphore::new(AT_ONCE),
    };
    Ok((plan, nodes.parse()?))
}

/// One descriptor an agent.
fn raise_limit() -> std::io::Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?)
}

async fn all(plan: Rc<Plan>, nodes: usize) {
    let agent = |node| {
        let plan = plan.clone();
        tokio::task::spawn_local(async move {
            if let Err(error) = live(&plan, node).await {
                let _ = writeln!(std::io::stderr(), "mock agent {node}: {error}");
            }
        })
    };
    for agent in (0..nodes).map(agent).collect::<Vec<_>>() {
        let _ = agent.await;
    }
}

async fn join(plan: &Plan, node: usize) -> Result<Connected, Box<dyn Error>> {
    let permit = plan.door.acquire().await?;
    let join = Join {
        token: String::new(),
        node: NodeInfo {
            name: format!("mock-{node:05}"),
            index: Some(node as u64),
            agent: format!("mock-{node}"),
            build: env!("CARGO_PKG_VERSION").to_owned(),
            ..NodeInfo::default()
        },
        conversation: 0,
        taken: 0,
        running: None,
        door: None,
        bundles: Default::default(),
    };
    let attempt = attempt(plan.run.clone(), Whereabouts::Folder, 0, join).await?;
    drop(permit);
    match attempt {
        Attempt::Connected(connected) => Ok(*connected),
        Attempt::Refused(_, reason) => Err(reason.into()),
    }
}

async fn live(plan: &Plan, node: usize) -> Result<(), Box<dyn Error>> {
    let stream = join(plan, node).await?.stream;
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (sender, mut frames) = tokio::sync::mpsc::channel::<Numbered<ToAgent>>(64);
    tokio::task::spawn_local(async move {
        while let Ok(frame) = wire::read(&mut reader, MAX_FRAME_BYTES).await {
            if sender.send(frame).await.is_err() {
                return;
            }
        }
    });
    let mut session = Session::<FromAgent>::new(NUM_KEPT);
    let mut alive = tokio::time::interval(Duration::from_millis(ALIVE_EVERY_MS));
    let mut step = tokio::time::interval(plan.step_time);
    let (mut ranks, mut done): (Vec<Assignment>, u64) = (Vec::new(), 0);
    loop {
        let mut said: Vec<FromAgent> = Vec::new();
        tokio::select! {
            frame = frames.recv() => {
                let frame = frame.ok_or("the coordinator is gone")?;
                match session.take(frame)? {
                    Some(ToAgent::Start(start)) => {
                        ranks = start.ranks;
                        step.reset();
                        said.extend(ranks.iter().flat_map(begun));
                    }
                    Some(ToAgent::Over { .. }) => return Ok(()),
                    _ => {}
                }
            }
            _ = alive.tick() => wire::write(&mut writer, &session.alive()).await?,
            _ = step.tick(), if !ranks.is_empty() && done < plan.steps => {
                done += 1;
                said.extend(ranks.iter().map(|rank| reported(rank, done)));
                if done == plan.steps {
                    said.extend(ranks.iter().flat_map(|rank| ended(rank, done)));
                }
            }
        }
        for message in said {
            let frame = session.push(message)?;
            wire::write(&mut writer, &frame).await?;
        }
    }
}

fn said(rank: &Assignment, message: FromRank) -> FromAgent {
    FromAgent::Said { generation: rank.generation, rank: rank.rank, message }
}

fn begun(assignment: &Assignment) -> Vec<FromAgent> {
    let (generation, rank) = (assignment.generation, assignment.rank);
    vec![
        FromAgent::Started { generation, rank, pid: 1 },
        said(assignment, FromRank::Phase(Phase::Train)),
    ]
}

fn reported(assignment: &Assignment, step: u64) -> FromAgent {
    let generation = assignment.generation;
    let report = StepReport { step, generation, loss: 1.0, ..StepReport::default() };
    said(assignment, FromRank::Step(Box::new(report)))
}

fn ended(assignment: &Assignment, step: u64) -> Vec<FromAgent> {
    let (generation, rank) = (assignment.generation, assignment.rank);
    let exit = Exit { code: Some(exit_code::DONE), signal: None };
    vec![
        said(assignment, FromRank::Finished { step }),
        FromAgent::Exited { generation, rank, exit, last_lines: Vec::new() },
    ]
}
