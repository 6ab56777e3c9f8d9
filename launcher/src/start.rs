//! `phalanx run` and `phalanx resume`: from what a user typed to a supervised run.

use crate::cluster::nodes::ClusterPlan;
use crate::error::UserError;
use crate::machine::{self, Resolved, Starter};
use crate::print::err;
use crate::remote::{self, Place};
use crate::runs::{self, History, RunLock};
use crate::supervisor::ledger::{Ledger, Sums};
use crate::supervisor::record::write_whole;
use crate::supervisor::restore::{Branch, is_current};
use crate::supervisor::run::{Plan, supervise};
use crate::verify::verify;
use crate::view::View;
use checkpoint_format::scan::scan;
use rank_protocol::jsonl::{Appender, read_metrics};
use rank_protocol::{RunDir, exit_code};
use run_config::{ClusterKind, RunConfig};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// What `run` and `resume` share.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Options {
    /// Override a key of the config; the value is YAML. Repeatable.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Print each step's report as a JSON line on standard output, and nothing else there.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `phalanx run`.
#[derive(Clone, Debug, clap::Args)]
pub struct RunArgs {
    /// The run config, a YAML file.
    pub config: PathBuf,
    /// Shared options.
    #[command(flatten)]
    pub options: Options,
}

/// Arguments of `phalanx resume`.
#[derive(Clone, Debug, clap::Args)]
pub struct ResumeArgs {
    /// The run's directory or name.
    pub run: String,
    /// Continue from this step's checkpoint instead of the newest.
    #[arg(long)]
    pub step: Option<u64>,
    /// Begin again from the initial weights, where the run has no good checkpoint.
    #[arg(long, conflicts_with = "step")]
    pub from_start: bool,
    /// Continue nothing: do so many steps again, from an earlier checkpoint, and compare them with
    /// what they were, bit by bit.
    #[arg(long, value_name = "STEPS", conflicts_with = "from_start",
          value_parser = clap::value_parser!(u64).range(1..))]
    pub verify: Option<u64>,
    /// Shared options.
    #[command(flatten)]
    pub options: Options,
}

/// Arguments of `phalanx coordinator`.
#[derive(Clone, Debug, clap::Args)]
pub struct CoordinatorArgs {
    /// The run config of a new run, a YAML file; or the directory or name of a run to go on with.
    pub run: String,
    /// Where to listen for agents; port 0: any that is free.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:0")]
    pub listen: SocketAddr,
    /// Continue from this step's checkpoint instead of the newest.
    #[arg(long)]
    pub step: Option<u64>,
    /// Begin again from the initial weights, where the run has no good checkpoint.
    #[arg(long, conflicts_with = "step")]
    pub from_start: bool,
    /// Host name or address at which agents reach this machine; by default its name, or the address
    /// that it listens on.
    #[arg(long)]
    pub host: Option<String>,
    /// Shared options.
    #[command(flatten)]
    pub options: Options,
}

/// Where a coordinator listens.
type Listen = (SocketAddr, Option<String>);

/// Begins a run, or goes on with one, whose ranks agents start; returns the exit code.
pub fn coordinator(args: CoordinatorArgs) -> Result<i32, UserError> {
    let listen = Some((args.listen, args.host.clone()));
    let path = PathBuf::from(&args.run);
    let is_config = path.is_file() || path.extension().is_some_and(|e| e == "yaml" || e == "yml");
    match is_config {
        true => begin(RunArgs { config: path, options: args.options }, listen),
        false => {
            let CoordinatorArgs { run, step, from_start, options, .. } = args;
            go_on(ResumeArgs { run, step, from_start, verify: None, options }, listen)
        }
    }
}

/// Begins a new run; returns the exit code.
pub fn run(args: RunArgs) -> Result<i32, UserError> {
    begin(args, None)
}

/// Continues a run; returns the exit code.
pub fn resume(args: ResumeArgs) -> Result<i32, UserError> {
    go_on(args, None)
}

fn starter_of(listen: &Option<Listen>) -> Starter {
    if listen.is_some() { Starter::Agents } else { Starter::Launcher }
}

fn begin(args: RunArgs, listen: Option<Listen>) -> Result<i32, UserError> {
    let starter = starter_of(&listen);
    let resolved = machine::resolve(&args.config, &args.options.set, starter)?;
    let prepared = prepare(&resolved, starter)?;
    let config = &resolved.loaded.config;
    crate::init_from::check(&config.model, &runs::runs_dir())?;
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
            "config_hash": config.hash(),
        }),
    )];
    let history = History { run_id: Some(run_id), ..History::default() };
    let start = Start { listen, may_begin: true, ..Start::default() };
    go(lock, run, resolved, prepared, history, start, &args.options, begun)
}

fn go_on(args: ResumeArgs, listen: Option<Listen>) -> Result<i32, UserError> {
    let starter = starter_of(&listen);
    let run = runs::find(&args.run)?;
    let lock = RunLock::take(&run)?;
    let history = runs::history(&run)?;
    let set = &args.options.set;
    let before = RunConfig::load(&run.config(), &[])?.config;
    let resolved = resolve_again(&run, &before, &history, set, starter)?;
    let config = &resolved.loaded.config;
    if config.name != before.name {
        let message = format!("a run keeps its name: {:?}, not {:?}", before.name, config.name);
        return Err(UserError::usage(message));
    }
    let may_run_elsewhere = history.end.is_none() && !history.nodes.is_empty();
    if may_run_elsewhere && listen.is_none() {
        let name = runs::name_of(&run);
        let error = UserError::usage(format!("the ranks of run {name} may still run on its nodes"));
        return Err(error.hint(format!("`phalanx coordinator {name}` goes on with them")));
    }
    let changes = differences(&before, config);
    if let Some(steps) = args.verify {
        let Prepared { trainer, library_path } = prepare(&resolved, starter)?;
        let result = verify(&run, resolved, (trainer, library_path), (steps, args.step));
        drop(lock);
        return result;
    }
    // Ranks that run know nothing of a change.
    let may_adopt = may_run_elsewhere && changes.is_empty() && args.step.is_none();
    let start = match choose_start(&run, config, &history, &args) {
        // Only the ranks themselves can save it.
        Err(_) if may_adopt && history.committed.is_none() => Start::default(),
        chosen => chosen?,
    };
    let start = Start { listen, may_adopt, ..start };
    if has_finished(config, &start, &args, !changes.is_empty())? {
        if may_run_elsewhere {
            tell_finished(&run, &history)?;
        }
        return Ok(exit_code::DONE);
    }
    let prepared = prepare(&resolved, starter)?;
    let mut begun = vec![(
        "run_resumed",
        json!({
            "step": start.committed,
            "pid": std::process::id(),
            "steps": config.training.steps,
            "world_size": resolved.world_size,
            "has_auto_threads": resolved.has_auto_threads,
            "config_hash": config.hash(),
        }),
    )];
    if let Some(branch) = start.branch {
        let fields = json!({ "step": branch.step, "first_generation": branch.generation });
        begun.push(("went_back", fields));
    }
    if !changes.is_empty() {
        write_config(&run, config)?;
        begun.push(("config_changed", json!({ "changes": changes })));
    }
    let generation = history.last_generation;
    let code = go(lock, run.clone(), resolved, prepared, history, start, &args.options, begun)?;
    if code == exit_code::CONFIG && !changes.is_empty() && !has_stepped_since(&run, generation) {
        // What was refused must not stand in the way of the next resume.
        write_config(&run, &before)?;
        err!("run {}: its config is as it was before this resume", before.name);
    }
    Ok(code)
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
    let event = json!({
        "time": crate::time::now(),
        "kind": "run_finished",
        "generation": history.last_generation,
        "exit_code": exit_code::DONE,
        "reason": "the last step is done and saved",
    });
    let mut events = Appender::open(&run.events())?;
    Ok(events.append(&event)?)
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
    /// Whether ranks of the last generation may still run.
    may_adopt: bool,
    /// Whether the run may begin from its initial weights.
    may_begin: bool,
}

fn choose_start(
    run: &RunDir,
    config: &RunConfig,
    history: &History,
    args: &ResumeArgs,
) -> Result<Start, UserError> {
    let scan = scan(&run.checkpoints()).map_err(|error| UserError::failed(error.to_string()))?;
    let here = scan.committed.iter().map(|found| (found.step, found.generation)).collect();
    let steps = with_remote(here, config, history, args);
    let is_current = |(step, generation): &&(u64, u64)| {
        is_current(*step, *generation, &history.branches)
    };
    let newest = steps.iter().rev().find(is_current).map(|(step, _)| *step);
    let name = runs::name_of(run);
    if let Some(step) = args.step {
        if !steps.iter().any(|(found, _)| *found == step) {
            let steps: Vec<String> = steps.iter().map(|(step, _)| step.to_string()).collect();
            let error =
                UserError::usage(format!("run {name} has no good checkpoint of step {step}"));
            return Err(error.hint(format!("it has: {}", steps.join(", "))));
        }
        let generation = history.last_generation + 1;
        let branch = (Some(step) != newest).then_some(Branch { step, generation });
        let (committed, first_step) = (Some(step), Some(step));
        return Ok(Start { committed, first_step, branch, ..Start::default() });
    }
    match (newest, args.from_start) {
        (Some(step), true) => {
            let error = UserError::usage(format!(
                "run {name} has a good checkpoint of step {step}: --from-start is for runs without"
            ));
            Err(error.hint("start a new run with --set name=…"))
        }
        (Some(step), false) => Ok(Start { committed: Some(step), ..Start::default() }),
        (None, true) => Ok(Start { may_begin: true, ..Start::default() }),
        (None, false) => Err(without_a_checkpoint(&name, history, scan.damaged.len())),
    }
}

/// The (step, generation) of the good checkpoints that are `here`, rising; with those of the object
/// store, where what is wanted is not here.
fn with_remote(
    here: Vec<(u64, u64)>,
    config: &RunConfig,
    history: &History,
    args: &ResumeArgs,
) -> Vec<(u64, u64)> {
    let is_here = match args.step {
        Some(step) => here.iter().any(|(found, _)| *found == step),
        None => here.last().map(|(step, _)| *step) >= history.committed,
    };
    let place = remote_of(config, history.run_id.clone()).filter(|_| !is_here);
    let Some(place) = place else { return here };
    let stored = remote::list(&place).unwrap_or_else(|reason| {
        err!("note: nothing is read from the object store: {reason}");
        Vec::new()
    });
    let stored = stored.iter().map(|stored| (stored.target.step, stored.target.generation));
    let mut all: Vec<(u64, u64)> = here.into_iter().chain(stored).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Where the run's checkpoints are in an object store.
fn remote_of(config: &RunConfig, run_id: Option<String>) -> Option<Place> {
    let url = config.checkpoint.remote.clone()?;
    Some(Place { url, name: config.name.clone(), run_id })
}

fn without_a_checkpoint(name: &str, history: &History, num_damaged: usize) -> UserError {
    let again = "--from-start begins again from the initial weights";
    match history.committed {
        Some(step) => UserError::usage(format!(
            "run {name} committed step {step}, and no good checkpoint is left \
             ({num_damaged} damaged)"
        ))
        .hint(format!("`phalanx checkpoint verify {name}` says what is wrong; {again}")),
        None => {
            UserError::usage(format!("run {name} ended before its first checkpoint")).hint(again)
        }
    }
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
    if starter == Starter::Launcher {
        machine::check_gpus(config.cluster.device, resolved.world_size, machine::num_gpus())?;
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
    let trainer = machine::trainer()?;
    let library_path = machine::library_path(config.cluster.device)?;
    if config.cluster.kind == ClusterKind::Mpi {
        machine::check_mpi(&trainer, library_path.as_deref())?;
    }
    Ok(Prepared { trainer, library_path })
}

#[expect(clippy::too_many_arguments, reason = "each is made by the caller, once, and moved in")]
fn go(
    lock: RunLock,
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
    let run_id = history.run_id.unwrap_or_else(|| new_run_id(&config.name));
    let mut branches = history.branches;
    branches.extend(start.branch);
    let cluster = start.listen.map(|(listen, host)| ClusterPlan {
        listen,
        host,
        num_nodes: config.cluster.nodes,
        ranks_per_node: config.cluster.ranks_per_node.unwrap_or(1),
    });
    let plan = Plan {
        run,
        run_id: run_id.clone(),
        world_size: resolved.world_size,
        threads: resolved.threads,
        trainer: prepared.trainer,
        library_path: prepared.library_path,
        last_generation: history.last_generation,
        committed: start.committed,
        branches,
        first_step: start.first_step,
        restarts: history.restarts,
        ledger,
        cluster,
        adopt: start.may_adopt.then_some(history.nodes),
        stop_after: None,
        remote: remote_of(&config, Some(run_id.clone())),
        may_begin: start.may_begin,
        config,
    };
    let code = supervise(plan, View::start(options.json), begun)
        .map_err(|error| UserError::failed(format!("the supervisor failed: {error}")))?;
    drop(lock);
    Ok(code)
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

/// The keys in which two configs differ, with both values.
fn differences(before: &RunConfig, after: &RunConfig) -> Vec<Value> {
    let flat = |config: &RunConfig| {
        let mut out = Vec::new();
        flatten("", &serde_json::to_value(config).unwrap_or_default(), &mut out);
        out
    };
    let (before, after) = (flat(before), flat(after));
    let value_in = |list: &[(String, Value)], key: &str| {
        list.iter().find(|(k, _)| k == key).map_or(Value::Null, |(_, value)| value.clone())
    };
    let mut keys: Vec<&String> = before.iter().chain(&after).map(|(key, _)| key).collect();
    keys.sort();
    keys.dedup();
    keys.into_iter()
        .map(|key| (key, value_in(&before, key), value_in(&after, key)))
        .filter(|(_, old, new)| old != new)
        .map(|(key, old, new)| json!({ "key": key, "old": old, "new": new }))
        .collect()
}

fn flatten(prefix: &str, value: &Value, out: &mut Vec<(String, Value)>) {
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                let dot = if prefix.is_empty() { "" } else { "." };
                flatten(&format!("{prefix}{dot}{key}"), value, out);
            }
        }
        other => out.push((prefix.to_owned(), other.clone())),
    }
}
