//! `phalanx simulate`: what a cluster's failures would cost a run, by the policy's own code on a
//! simulated clock. Everything here is simulated, and says so.

mod costs;
mod trace;
mod world;

use crate::error::UserError;
use crate::print::out;
use costs::Costs;
use rank_protocol::exit_code;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use trace::{Trace, binomial_p99};
use world::{Outcome, Scenario, simulate};

const DAY_S: f64 = 86_400.0;
/// Simulated failures, at most: a seed takes a time in proportion to them and to the nodes.
const MAX_FAILURES: f64 = 1e6;

/// Arguments of `phalanx simulate`.
#[derive(Clone, Debug, clap::Args)]
pub struct SimulateArgs {
    /// Nodes of the run.
    #[arg(long, default_value_t = 3000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    nodes: u32,
    /// Nodes with which the run goes on at least where no spare is left; all, where it is not
    /// given. Each is taken for a data-parallel replica.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    min_nodes: Option<u32>,
    /// GPUs of a node; only for what is printed.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    gpus_per_node: u32,
    /// Failures per 1000 node-days.
    #[arg(long, default_value_t = 6.5)]
    failures_per_1000_node_days: f64,
    /// What fails.
    #[arg(long, value_enum, default_value_t = Trace::Llama3)]
    trace: Trace,
    /// Simulated days.
    #[arg(long, default_value_t = 30.0)]
    days: f64,
    /// Seeds; each gives one ratio.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    seeds: u32,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A cost in place of the committed one, as in `start_s=20`. Repeatable.
    #[arg(long = "set", value_name = "NAME=VALUE")]
    set: Vec<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Simulates; returns the exit code.
pub fn run(args: SimulateArgs) -> Result<i32, UserError> {
    let scenario = scenario(&args)?;
    let seeds = (0..u64::from(args.seeds)).map(|index| args.seed.wrapping_add(index));
    let outcomes: Vec<(u64, Outcome)> =
        seeds.map(|seed| (seed, simulate(&scenario, seed))).collect();
    let report = Report::new(&scenario, &outcomes);
    match args.json {
        true => out!("{}", report.json(&args, &scenario, &outcomes)),
        false => report.print(&args, &scenario, &outcomes),
    }
    Ok(exit_code::DONE)
}

fn scenario(args: &SimulateArgs) -> Result<Scenario, UserError> {
    let mut costs = Costs::defaults()?;
    for set in &args.set {
        costs.set(set)?;
    }
    let rate = args.failures_per_1000_node_days;
    let failures = rate / 1000.0 * f64::from(args.nodes) * args.days;
    for (name, value, limit) in [
        ("--failures-per-1000-node-days", rate, 1e6),
        ("--days", args.days, 3660.0),
        ("failures in all", failures, MAX_FAILURES),
    ] {
        if !(0.0..=limit).contains(&value) {
            let message = format!("{name}: {value}, the limits are 0 and {limit}");
            return Err(UserError::usage(message));
        }
    }
    let rate_per_s = rate / 1000.0 / DAY_S;
    let nodes = args.nodes as usize;
    let in_repair = -(-rate_per_s * costs.get("repair_h") * 3600.0).exp_m1();
    let spares = match costs.get("spares") {
        given if given >= 0.0 => given as usize,
        _ => binomial_p99(nodes, in_repair),
    };
    let duration = Duration::try_from_secs_f64(args.days * DAY_S).unwrap_or_default();
    let min_nodes = args.min_nodes.map_or(nodes, |least| least as usize);
    if min_nodes > nodes {
        let message = format!("--min-nodes: {min_nodes} is more than the {nodes} nodes");
        return Err(UserError::usage(message));
    }
    Ok(Scenario { nodes, spares, min_nodes, rate_per_s, duration, trace: args.trace, costs })
}

/// What all seeds say together.
struct Report {
    /// Ratios, sorted.
    ratios: Vec<f64>,
    mean: f64,
    /// Share of the wall time by cause, in the mean of the seeds.
    shares: BTreeMap<&'static str, f64>,
    failures: f64,
    whole_speed: f64,
    formula: f64,
    gave_up: usize,
}

impl Report {
    fn new(scenario: &Scenario, outcomes: &[(u64, Outcome)]) -> Self {
        let count = outcomes.len().max(1) as f64;
        let mut ratios: Vec<f64> =
            outcomes.iter().map(|(_, outcome)| outcome.sums.ettr.unwrap_or(0.0)).collect();
        ratios.sort_by(f64::total_cmp);
        let mut shares: BTreeMap<&'static str, f64> = BTreeMap::new();
        for (_, Outcome { sums, .. }) in outcomes {
            for (spent, seconds) in &sums.seconds {
                *shares.entry(spent.name()).or_default() += seconds / sums.wall_s / count;
            }
        }
        let failures = outcomes.iter().flat_map(|(_, outcome)| outcome.failures.values());
        Self {
            mean: ratios.iter().sum::<f64>() / count,
            ratios,
            shares,
            failures: failures.sum::<u64>() as f64 / count,
            whole_speed: outcomes.iter().map(|(_, o)| o.whole_speed).sum::<f64>() / count,
            formula: formula(scenario),
            gave_up: outcomes.iter().filter(|(_, outcome)| outcome.gave_up.is_some()).count(),
        }
    }

    fn quantile(&self, share: f64) -> f64 {
        let last = self.ratios.len().saturating_sub(1);
        let at = (share * last as f64).round() as usize;
        self.ratios.get(at.min(last)).copied().unwrap_or(0.0)
    }

    fn json(
        &self,
        args: &SimulateArgs,
        scenario: &Scenario,
        outcomes: &[(u64, Outcome)],
    ) -> serde_json::Value {
        let seeds = outcomes.iter().map(|(seed, outcome)| {
            let failures: BTreeMap<&str, u64> =
                outcome.failures.iter().map(|(kind, count)| (kind.name(), *count)).collect();
            json!({
                "seed": seed,
                "books": outcome.sums,
                "failures": failures,
                "generations": outcome.generations,
                "gave_up": outcome.gave_up,
            })
        });
        json!({
            "simulated": true,
            "nodes": args.nodes,
            "gpus_per_node": args.gpus_per_node,
            "failures_per_1000_node_days": args.failures_per_1000_node_days,
            "days": args.days,
            "spares": scenario.spares,
            "costs": scenario.costs.all(),
            "ettr": { "mean": self.mean, "least": self.quantile(0.0), "p5": self.quantile(0.05),
                "median": self.quantile(0.5), "most": self.quantile(1.0) },
            "min_nodes": scenario.min_nodes,
            "whole_speed": self.whole_speed,
            "formula": self.formula,
            "shares": self.shares,
            "failures": self.failures,
            "seeds": seeds.collect::<Vec<_>>(),
        })
    }

    fn print(&self, args: &SimulateArgs, scenario: &Scenario, outcomes: &[(u64, Outcome)]) {
        let percent = |ratio: f64| format!("{:.2} %", 100.0 * ratio);
        let SimulateArgs { nodes, gpus_per_node, days, .. } = args;
        let gpus = u64::from(*nodes) * u64::from(*gpus_per_node);
        out!("SIMULATED: {nodes} nodes ({gpus} GPUs) and {} spares, {days} days", scenario.spares);
        let rate = args.failures_per_1000_node_days;
        let hours = 24.0 * 1000.0 / (rate * f64::from(*nodes));
        out!(
            "failures      {rate} per 1000 node-days, one in {hours:.2} h; {:.0} in the mean of {} \
             seeds",
            self.failures,
            outcomes.len()
        );
        out!("ETTR          {} in the mean (first-time steps / wall time)", percent(self.mean));
        out!(
            "              least {}, 5th percentile {}, median {}, most {}",
            percent(self.quantile(0.0)),
            percent(self.quantile(0.05)),
            percent(self.quantile(0.5)),
            percent(self.quantile(1.0))
        );
        if scenario.min_nodes < scenario.nodes {
            out!(
                "whole speed   {} in the mean (steps done x a step on all nodes / wall time), with \
                 {} nodes or more",
                percent(self.whole_speed),
                scenario.min_nodes
            );
        }
        out!(
            "by formula    {}: (1 - N r (u0 + dt/2)) / (1 + w/dt) (Kokolis et al., HPCA 2025)",
            percent(self.formula)
        );
        let mut shares: Vec<(&str, f64)> = self.shares.iter().map(|(n, s)| (*n, *s)).collect();
        shares.sort_by(|a, b| b.1.total_cmp(&a.1));
        out!("where the time goes, in the mean");
        for (name, share) in shares {
            out!("  {name:<20}{:>9}", percent(share));
        }
        let reasons: BTreeSet<&str> =
            outcomes.iter().filter_map(|(_, outcome)| outcome.gave_up.as_deref()).collect();
        for reason in reasons.iter().take(3) {
            out!("gave up       {} of {} seeds, as in: {reason}", self.gave_up, outcomes.len());
        }
        out!("Costs are those of costs.yaml, some of them assumed; `--json` prints them. Assumed");
        out!("too: a faulty node falls silent, and a hang comes of no fault of a node.");
    }
}

/// Kokolis et al.'s expected ratio for a failure that takes a node.
fn formula(scenario: &Scenario) -> f64 {
    let cost = |name: &str| scenario.costs.get(name);
    // A silence of 5 s, and a second for other failures of the moment.
    let restart = 5.0
        + 1.0
        + cost("teardown_s")
        + cost("search_s")
        + cost("start_s")
        + cost("load_s")
        + cost("first_step_extra_s");
    let interval = cost("save_every_s").max(cost("step_s"));
    let rate = scenario.rate_per_s * scenario.nodes as f64;
    (1.0 - rate * (restart + interval / 2.0)) / (1.0 + cost("save_stall_s") / interval)
}
