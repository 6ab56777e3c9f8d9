//! `phalanx run` and `phalanx resume`: from what a user typed to a supervised run.

use crate::changes::{differences, refuse_another_function};
use crate::cluster::agent::{self, AgentArgs};
use crate::cluster::companion::Companion;
use crate::cluster::nodes::ClusterPlan;
use crate::cluster::role::{Node, Role};
use crate::cluster::sizes::Sizes;
use crate::cluster::store::held::Held;
use crate::error::UserError;
use crate::health;
use crate::machine::{self, Resolved, Starter};
use crate::memory::{self, MemoryTier};
use crate::print::err;
use crate::remote::Place;
use crate::room;
use crate::runs::{self, History, RunLock};
use crate::supervisor::ledger::{Ledger, Sums};
use crate::supervisor::record::write_whole;
use crate::supervisor::restore::Branch;
use crate::supervisor::run::{Adopt, Plan, supervise};
use crate::verify::verify;
use crate::view::View;
use layout::Mesh;
use rank_protocol::jsonl::{Appender, read_metrics};
use rank_protocol::{RunDir, exit_code};
use run_config::{ClusterKind, Memory, RestartStore, RunConfig};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

mod args;
mod choice;

use choice::choose_start;

pub use args::{CoordinatorArgs, ListenArgs, NodeArgs, Options, ResumeArgs, RunArgs};

/// Where a coordinator listens, and the node of the run that it is on.
#[derive(Clone, Debug)]
struct Listen {
    at: ListenArgs,
    node: Option<Node>,
}

/// Begins a run, or goes on with one, whose ranks agents start; returns the exit code.
pub fn coordinator(args: CoordinatorArgs) -> Result<i32, UserError> {
    let CoordinatorArgs { run, listen, step, from_start, options } = args;
    let node = NodeArgs { node: None, listen: listen.clone() };
    let listen = Some(Listen { at: listen, node: None });
    let path = PathBuf::from(&run);
    let is_config = path.is_file() || path.extension().is_some_and(|e| e == "yaml" || e == "yml");
    if is_config && (step.is_some() || from_start) {
        let option = if from_start { "--from-start" } else { "--step" };
        let message = format!("{option} goes on with a run, and {run} is the config of a new one");
        return Err(UserError::usage(message).hint("name the run in place of the config"));
    }
    match is_config {
        true => begin(RunArgs { config: path, node, options }, listen),
        false => go_on(ResumeArgs { run, step, from_start, verify: None, node, options }, listen),
    }
}

/// Begins a new run, or this node's part of one; returns the exit code.
pub fn run(args: RunArgs) -> Result<i32, UserError> {
    let config = RunConfig::load(&args.config, &args.options.set)?.config;
    match role(&config, &args.node)? {
        None => begin(args, None),
        Some(Role::First(node)) => {
            let at = args.node.listen.clone();
            begin(args, Some(Listen { at, node: Some(node) }))
        }
        Some(Role::Other(node)) => agent::run(node.agent(config.name)),
    }
}

/// Continues a run, or this node's part of one; returns the exit code.
pub fn resume(args: ResumeArgs) -> Result<i32, UserError> {
    let run = runs::find(&args.run)?;
    let config = RunConfig::load(&run.config(), &args.options.set)?.config;
    match role(&config, &args.node)?.filter(|_| args.verify.is_none()) {
        None => go_on(args, None),
        Some(Role::First(node)) => {
            let at = args.node.listen.clone();
            go_on(args, Some(Listen { at, node: Some(node) }))
        }
        Some(Role::Other(node)) => {
            // The end of the launcher before says nothing of the one that goes on.
            let history = runs::history(&run)?;
            let after = history.end.map(|_| history.started);
            agent::run(AgentArgs { after, ..node.agent(args.run) })
        }
    }
}

/// The part of this machine in a run on several nodes.
fn role(config: &RunConfig, args: &NodeArgs) -> Result<Option<Role>, UserError> {
    match config.cluster.nodes {
        1 => Ok(None),
        nodes => Role::here(nodes, args.node.clone()).map(Some),
    }
}

fn host_of(listen: &Option<Listen>) -> Option<&str> {
    listen.as_ref().and_then(|listen| listen.at.host.as_deref())
}

fn starter_of(listen: &Option<Listen>) -> Starter {
    match listen {
        None => Starter::Launcher,
        Some(Listen { node: None, .. }) => Starter::Agents,
        Some(Listen { node: Some(_), .. }) => Starter::FirstNode,
    }
}

fn begin(args: RunArgs, listen: Option<Listen>) -> Result<i32, UserError> {
    let starter = starter_of(&listen);
    let mut resolved = machine::resolve(&args.config, &args.options.set, starter)?;
    args::check_profile(args.options.profile, resolved.loaded.config.training.steps)?;
    let held = Held::take(&resolved.loaded.config, host_of(&listen), starter)?;
    let held = match held {
        Some(held) if held.record.is_some() => return take_over(args, &resolved, listen, held),
        held => held,
    };
    let prepared = prepare(&resolved, starter)?;
    let model = &mut resolved.loaded.config.model;
    model.init_from = crate::init_from::check(model, &runs::runs_dir())?;
    let config = &resolved.loaded.config;
    let (run, lock) = runs::create(&config.name)?;
    // Without its config it is no run.
    write_config(&run, config).inspect_err(|_| runs::discard(&run))?;
    let run_id = new_run_id(&config.name);
    let begun = vec![(
        "run_started",
        json!({
            "run_id": run_id,
            "name": config.name,
            "pid": std::process::id(),
            "steps": config.training.steps,
            "world_size": resolved.world_size,
            "has_auto_threads": resolved.has_auto_threads,
            "is_first_node": starter == Starter::FirstNode,
            "config_hash": config.hash(),
        }),
    )];
    let history = History { run_id: Some(run_id), ..History::default() };
    let start = Start { listen, may_begin: true, ..Start::default() };
    go((Some(lock), held), run, resolved, prepared, history, start, &args.options, begun)
}

/// The command that began a run goes on with it, on whatever machine it is given again.
fn take_over(
    args: RunArgs,
    resolved: &Resolved,
    listen: Option<Listen>,
    held: Held,
) -> Result<i32, UserError> {
    let config = &resolved.loaded.config;
    let run = held.find(&config.name)?;
    let before = RunConfig::load(&run.config(), &[])?.config;
    // What `auto` came to, and which step of another run was newest, when it began holds for it.
    let is_settled = |change: &Value| {
        let key = change["key"].as_str().unwrap_or_default();
        key.starts_with("model.init_from")
            || resolved.has_auto_threads && key == "cluster.threads_per_rank"
    };
    let changes = differences(&before, config);
    if let Some(change) = changes.iter().find(|change| !is_settled(change)) {
        let (key, old, new) = (&change["key"], &change["old"], &change["new"]);
        let name = &config.name;
        let message = format!("run {name} goes on as it was begun: {key} is {old}, not {new}");
        let hint = format!("`phalanx coordinator {name} --set …` changes it");
        return Err(UserError::usage(message).hint(hint));
    }
    let options = Options { set: Vec::new(), ..args.options };
    let root = run.root().to_string_lossy().into_owned();
    let node = args.node;
    let (step, from_start, verify) = (None, false, None);
    let args = ResumeArgs { run: root, step, from_start, verify, node, options };
    go_on_with(run, args, listen, Some(held))
}

fn go_on(args: ResumeArgs, listen: Option<Listen>) -> Result<i32, UserError> {
    let run = runs::find(&args.run)?;
    let before = RunConfig::load(&run.config(), &[])?.config;
    let wanted = RunConfig::load(&run.config(), &args.options.set)?.config;
    if before.restart.store != RestartStore::File && wanted.restart.store == RestartStore::File {
        let store = &before.restart.store;
        let message = format!("restart.store: what is known of the run is in {store}");
        return Err(UserError::usage(message).hint("a run does not go back to `file`"));
    }
    let held = Held::take(&wanted, host_of(&listen), starter_of(&listen))?;
    go_on_with(run, args, listen, held)
}

/// The right to work on a run's folder. A store's lease counts for more: the lock of a machine that
/// died may stay on a shared file system.
fn lock(run: &RunDir, held: Option<&Held>) -> Result<Option<RunLock>, UserError> {
    match RunLock::take(run) {
        Err(error) if held.is_some() => {
            tracing::debug!("going on without the folder's lock: {}", error.message);
            Ok(None)
        }
        lock => lock.map(Some),
    }
}

fn go_on_with(
    run: RunDir,
    args: ResumeArgs,
    listen: Option<Listen>,
    held: Option<Held>,
) -> Result<i32, UserError> {
    let starter = starter_of(&listen);
    let lock = lock(&run, held.as_ref())?;
    let history = match &held {
        Some(held) => held.history(&run)?,
        None => runs::history(&run)?,
    };
    let set = &args.options.set;
    let before = RunConfig::load(&run.config(), &[])?.config;
    let resolved = resolve_again(&run, &before, &history, set, starter)?;
    let config = &resolved.loaded.config;
    if config.name != before.name {
        let message = format!("a run keeps its name: {:?}, not {:?}", before.name, config.name);
        return Err(UserError::usage(message));
    }
    args::check_profile(args.options.profile, config.training.steps)?;
    let may_run_elsewhere = may_run_elsewhere(&run, &history, starter)?;
    let changes = differences(&before, config);
    refuse_another_function(&changes)?;
    if let Some(steps) = args.verify {
        let Prepared { trainer, library_path } = prepare(&resolved, starter)?;
        let result = verify(&run, resolved, (trainer, library_path), (steps, args.step));
        drop(lock);
        return result;
    }
    // Ranks that run know nothing of a change.
    let is_same = changes.is_empty() && args.step.is_none();
    let may_adopt = may_run_elsewhere && is_same && starter == Starter::Agents;
    let start = match choose_start(&run, config, &history, &args) {
        // Only the ranks themselves can save it.
        Err(_) if may_adopt && history.committed.is_none() => Start::default(),
        chosen => chosen?,
    };
    let start = Start { listen, may_adopt, has_lost_coordinator: may_run_elsewhere, ..start };
    if has_finished(config, &start, &args, !changes.is_empty())? {
        if may_run_elsewhere {
            tell_finished(&run, &history)?;
        }
        return Ok(exit_code::DONE);
    }
    let prepared = prepare(&resolved, starter)?;
    let mut begun = vec![("run_resumed", resumed(&resolved, start.committed, starter))];
    begun.extend(start.branch.iter().map(|branch| ("went_back", went_back(branch))));
    if !changes.is_empty() {
        write_config(&run, config)?;
        begun.push(("config_changed", json!({ "changes": changes })));
    }
    let generation = history.last_generation;
    let status = std::fs::read(run.status());
    let rights = (lock, held);
    let code = go(rights, run.clone(), resolved, prepared, history, start, &args.options, begun)?;
    if code == exit_code::CONFIG && !changes.is_empty() && !has_stepped_since(&run, generation) {
        // What was refused must not stand in the way of the next resume.
        write_config(&run, &before)?;
        note(&run, generation, "config_restored", json!({}))?;
        if let Ok(status) = status {
            // Where it cannot be written, it says that this resume failed, which is true.
            let _ = write_whole(&run.status(), &status);
        }
        err!("run {}: its config is as it was before this resume", before.name);
    }
    Ok(code)
}

/// What `events.jsonl` says of a run that went back behind steps of its own.
fn went_back(branch: &Branch) -> Value {
    json!({ "step": branch.step, "first_generation": branch.generation })
}

/// What `events.jsonl` says of a run that goes on.
fn resumed(resolved: &Resolved, step: Option<u64>, starter: Starter) -> Value {
    let config = &resolved.loaded.config;
    json!({
        "step": step,
        "pid": std::process::id(),
        "steps": config.training.steps,
        "world_size": resolved.world_size,
        "has_auto_threads": resolved.has_auto_threads,
        "is_first_node": starter == Starter::FirstNode,
        "config_hash": config.hash(),
    })
}

/// Whether agents may not know that the last coordinator has ended. Only another goes on with ranks
/// that still run.
fn may_run_elsewhere(run: &RunDir, history: &History, starter: Starter) -> Result<bool, UserError> {
    let may_run = history.end.is_none() && !history.nodes.is_empty();
    // A first node's ranks, and its agent, go with its coordinator.
    let has_lost_ranks = starter == Starter::FirstNode && history.was_first_node;
    if may_run && starter != Starter::Agents && !has_lost_ranks {
        let name = runs::name_of(run);
        let error = UserError::usage(format!("the ranks of run {name} may still run on its nodes"));
        return Err(error.hint(format!("`phalanx coordinator {name}` goes on with them")));
    }
    Ok(may_run)
}

/// Resolves a run's config with `set`. What `threads_per_rank: auto` came to holds for as many
/// ranks as it was resolved for: for another number it is resolved again, unless `set` gives it.
fn resolve_again(
    run: &RunDir,
    before: &RunConfig,
    history: &History,
    set: &[String],
    starter: Starter,
) -> Result<Resolved, UserError> {
    let path = run.config();
    let kept = machine::resolve(&path, set, starter)?;
    let is_new_split = kept.loaded.config.cluster.ranks_per_node != before.cluster.ranks_per_node;
    if history.has_auto_threads && is_new_split {
        // The later override counts.
        let auto = ["cluster.threads_per_rank=auto".to_owned()];
        return machine::resolve(&path, &[&auto[..], set].concat(), starter);
    }
    let is_same = kept.loaded.config.cluster.threads_per_rank == before.cluster.threads_per_rank;
    Ok(Resolved { has_auto_threads: history.has_auto_threads && is_same, ..kept })
}

/// Notes the end that the last coordinator did not come to note: agents look for it.
fn tell_finished(run: &RunDir, history: &History) -> Result<(), UserError> {
    let reason = "the last step is done and saved";
    let fields = json!({ "exit_code": exit_code::DONE, "reason": reason });
    note(run, history.last_generation, "run_finished", fields)
}

/// Writes an event while nobody supervises the run.
fn note(run: &RunDir, generation: u64, kind: &str, mut fields: Value) -> Result<(), UserError> {
    fields["time"] = crate::time::now().into();
    fields["kind"] = kind.into();
    fields["generation"] = generation.into();
    let mut events = Appender::open(&run.events())?;
    Ok(events.append(&fields)?)
}

/// Whether nothing is left to do, which is said; refuses fewer steps than are done.
fn has_finished(
    config: &RunConfig,
    start: &Start,
    args: &ResumeArgs,
    has_changes: bool,
) -> Result<bool, UserError> {
    let (name, steps) = (&config.name, config.training.steps);
    let Some(step) = start.committed.filter(|step| *step >= steps) else { return Ok(false) };
    if step > steps {
        let error = UserError::usage(format!(
            "training.steps: {steps} is less than the {step} steps that run {name} has done and \
             saved"
        ));
        let hint = format!("--step N goes back to an earlier checkpoint; more than {step} go on");
        return Err(error.hint(hint));
    }
    if args.step.is_none() {
        let dropped = if has_changes { "; nothing is left for --set to change" } else { "" };
        err!("run {name} has finished: step {step} of {steps}{dropped}");
    }
    Ok(args.step.is_none())
}

/// Whether the run has done a step after this generation.
fn has_stepped_since(run: &RunDir, generation: u64) -> bool {
    let metrics = read_metrics(&run.metrics()).unwrap_or_default();
    metrics.last().is_some_and(|report| report.generation > generation)
}

/// Where a resumed run continues.
#[derive(Clone, Debug, Default)]
struct Start {
    /// Newest good step; `None`: from the initial weights.
    committed: Option<u64>,
    /// The step that was asked for.
    first_step: Option<u64>,
    /// Set where that is not the newest.
    branch: Option<Branch>,
    /// Where to listen for agents.
    listen: Option<Listen>,
    /// Whether nodes of the last generation may not know of its end.
    has_lost_coordinator: bool,
    /// Whether its ranks may still run.
    may_adopt: bool,
    /// Whether the run may begin from its initial weights.
    may_begin: bool,
}

/// What must be there before a directory is made.
#[derive(Default)]
struct Prepared {
    trainer: PathBuf,
    library_path: Option<std::ffi::OsString>,
}

fn prepare(resolved: &Resolved, starter: Starter) -> Result<Prepared, UserError> {
    for note in &resolved.loaded.notes {
        err!("{note}");
    }
    let config = &resolved.loaded.config;
    if starter.is_here() {
        let ranks = resolved.world_size / config.cluster.nodes;
        machine::check_gpus(config.cluster.device, ranks, machine::num_gpus())?;
        // A layout that cannot be is told of by the ranks.
        let mesh = Mesh::new(&config.parallelism, resolved.world_size).ok();
        let room = mesh.and_then(|mesh| room::notes(config, &mesh).ok().flatten());
        room.iter().for_each(|note| err!("{note}"));
    }
    if starter.is_here() {
        memory::check(config)?;
    }
    data_pipeline::preflight(config).map_err(|error| UserError {
        code: crate::data::exit_code_of(&error),
        message: error.to_string(),
        hint: None,
    })?;
    if starter == Starter::Agents {
        // Theirs to find.
        return Ok(Prepared::default());
    }
    if config.restart.health_check {
        health::require(&runs::runs_dir())?;
    }
    let trainer = machine::trainer()?;
    let library_path = machine::library_path(config.cluster.device)?;
    machine::check_cuda(config.cluster.device, machine::num_gpus(), library_path.as_deref())?;
    if config.cluster.kind == ClusterKind::Mpi {
        machine::check_mpi(&trainer, library_path.as_deref())?;
    }
    Ok(Prepared { trainer, library_path })
}

#[expect(clippy::too_many_arguments, reason = "each is made by the caller, once, and moved in")]
fn go(
    (lock, mut held): (Option<RunLock>, Option<Held>),
    run: RunDir,
    resolved: Resolved,
    prepared: Prepared,
    history: History,
    start: Start,
    options: &Options,
    begun: Vec<(&'static str, Value)>,
) -> Result<i32, UserError> {
    let config = resolved.loaded.config;
    let ledger = ledger(&run, &history)?;
    let run_id = history.run_id.clone().unwrap_or_else(|| new_run_id(&config.name));
    if let Some(held) = &mut held {
        held.begin(&run, &run_id, &history)?;
    }
    let mut branches = history.branches;
    branches.extend(start.branch);
    let node = start.listen.as_ref().and_then(|listen| listen.node.clone());
    let cluster = start.listen.map(|Listen { at, .. }| ClusterPlan {
        listen: at.listen,
        host: at.host,
        sizes: Sizes::of(&config),
        ranks_per_node: config.cluster.ranks_per_node.unwrap_or(1),
    });
    let adopt = start.may_adopt.then(|| Adopt {
        nodes: history.nodes,
        num_ranks: history.num_ranks.unwrap_or(resolved.world_size),
    });
    let companion = node.map(|node| first_node(&run, &config, node)).transpose()?;
    let memory = memory_tier(&config, &run_id, cluster.is_some())?;
    let plan = Plan {
        run,
        run_id: run_id.clone(),
        world_size: resolved.world_size,
        threads: resolved.threads,
        trainer: prepared.trainer,
        library_path: prepared.library_path,
        last_generation: history.last_generation,
        committed: start.committed,
        ever_committed: history.committed.filter(|_| branches.is_empty() && !start.may_begin),
        branches,
        resumes: history.resumes,
        roll_backs: history.roll_backs,
        first_step: start.first_step,
        restarts: history.restarts,
        failures: history.failures,
        ledger,
        cluster,
        has_lost_coordinator: start.has_lost_coordinator,
        adopt,
        stop_after: None,
        profile: options.profile,
        keeper: held.map(|held| held.keeper),
        remote: Place::of(&config, Some(run_id)),
        memory: memory.as_ref().map(MemoryTier::checkpoints),
        may_begin: start.may_begin,
        config,
    };
    let code = supervise(plan, View::start(options.json), begun)
        .map_err(|error| UserError::failed(format!("the supervisor failed: {error}")))?;
    drop((memory, lock));
    if let Some(companion) = companion {
        companion.end();
    }
    Ok(code)
}

/// Where the config asks for one. Where agents start the ranks, each has its own.
fn memory_tier(
    config: &RunConfig,
    run_id: &str,
    has_agents: bool,
) -> Result<Option<MemoryTier>, UserError> {
    let Memory { every_steps, folder } = &config.checkpoint.memory;
    let begin = || MemoryTier::begin(folder, run_id);
    (*every_steps > 0 && !has_agents).then(begin).transpose().map_err(|error| {
        UserError::failed(format!("checkpoint.memory.folder: {}: {error}", folder.display()))
    })
}

/// Starts the agent of this node, and says what is to be typed on the others.
fn first_node(run: &RunDir, config: &RunConfig, node: Node) -> Result<Companion, UserError> {
    let path = run.root().display();
    if !Role::is_scheduled() {
        let (name, others) = (&config.name, config.cluster.nodes - 1);
        err!("run {name}: this machine is the first node; on each of the {others} other(s), and");
        err!("on spares, type: phalanx agent {path}");
    }
    Companion::start(&node.agent(path.to_string()))
        .map_err(|error| UserError::failed(format!("the agent of this node: {error}")))
}

/// The books of earlier launchers. Where the last one ended without a word, the time since its last
/// entry is booked too: the steps that were reported since, and the rest as down.
fn ledger(run: &RunDir, history: &History) -> Result<Ledger, UserError> {
    let Some(entry) = &history.ledger else {
        return Ok(Ledger::new(&Sums::default(), Instant::now()));
    };
    let mut ledger = Ledger::new(&entry.sums, Instant::now());
    let gap = entry.time.and_then(|time| SystemTime::now().duration_since(time).ok());
    // A stop that was asked for stops the clock; a launcher that gave up does not.
    let asked_for = [exit_code::DONE, exit_code::PREEMPTED, exit_code::INTERRUPTED];
    let is_stopped = history.end.as_ref().is_some_and(|(code, _)| asked_for.contains(code));
    if let (false, Some(gap)) = (is_stopped, gap) {
        let mut steps = read_metrics(&run.metrics())?;
        steps.retain(|report| (report.generation, report.step) > (entry.generation, entry.step));
        ledger.fill(gap, &steps);
    }
    Ok(ledger)
}

fn write_config(run: &RunDir, config: &RunConfig) -> Result<(), UserError> {
    let path = run.config();
    write_whole(&path, config.to_yaml().as_bytes())
        .map_err(|error| UserError::failed(format!("cannot write {}: {error}", path.display())))
}

/// Differs for two runs of one name, also on two machines at once.
fn new_run_id(name: &str) -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{name}-{:x}-{:x}", since.as_nanos(), std::process::id())
}
