//! What `phalanx check` says about the plan: the table of parameters, and the communication of a
//! step.

use crate::check::gibibytes;
use layout::communication::{Call, LayoutError, Step};
use layout::mesh::Axis;
use layout::plan_table::{PlanRow, plan_table};
use layout::{Communication, Mesh, communication};
use run_config::RunConfig;
use serde_json::{Value, json};
use std::fmt::Write as _;

/// The plan of a valid config.
pub struct LayoutPlan {
    rows: Vec<PlanRow>,
    /// One per batch stage.
    steps: Vec<StepCommunication>,
}

/// The communication of the steps of one batch stage.
struct StepCommunication {
    first_step: u64,
    /// Of the first rank of each pipeline stage.
    stages: Vec<Communication>,
}

impl LayoutPlan {
    /// The plan of `config`. `first_steps` holds the first step of each batch stage.
    ///
    /// # Errors
    /// Where the layout cannot be.
    pub fn new(config: &RunConfig, mesh: &Mesh, first_steps: &[u64]) -> Result<Self, LayoutError> {
        let inner = mesh.degree(Axis::Tensor) * mesh.degree(Axis::Context);
        let batches = config.training.batch_stages.iter().zip(first_steps);
        let steps = batches.map(|(batch, first_step)| {
            let step = Step::of(batch);
            let of = |stage| communication(config, mesh, stage * inner, &step);
            let stages = (0..mesh.degree(Axis::Pipeline)).map(of).collect::<Result<_, _>>()?;
            Ok(StepCommunication { first_step: *first_step, stages })
        });
        Ok(Self {
            rows: plan_table(config, mesh)?,
            steps: steps.collect::<Result<_, LayoutError>>()?,
        })
    }

    /// Both tables as text: the communication of the first step, and where that of later batch
    /// stages differs from those before them.
    pub fn tables(&self) -> String {
        let mut out = self.parameter_table();
        if self.steps.iter().all(StepCommunication::sends_nothing) {
            out.push_str("communication: none, there is one rank\n");
            return out;
        }
        if let Some(first) = self.steps.first() {
            for (stages, communication) in folded(first.stages.iter()) {
                out.push_str(&communication_table(first.first_step, &stages, communication));
            }
        }
        for pair in self.steps.windows(2) {
            for (stages, both) in folded(pair[0].stages.iter().zip(&pair[1].stages)) {
                let steps = (pair[0].first_step, pair[1].first_step);
                out.push_str(&differing_table(steps, &stages, both));
            }
        }
        out
    }

    fn parameter_table(&self) -> String {
        let head = [
            "parameter",
            "axes",
            "split",
            "stage",
            "state",
            "shape on a rank",
            "weights",
            "master",
            "gradients",
            "optimizer",
        ];
        let mut lines = vec![head.map(str::to_owned)];
        let shape = |row: &PlanRow| {
            let sizes: Vec<String> = row.local_shape.iter().map(ToString::to_string).collect();
            sizes.join(" x ")
        };
        lines.extend(self.rows.iter().map(|row| {
            [
                row.name.clone(),
                axes(row),
                row.split.clone(),
                span(&row.stages),
                row.state.clone(),
                shape(row),
                sized(row.bytes.weights),
                sized(row.bytes.master),
                sized(row.bytes.gradients),
                sized(row.bytes.optimizer),
            ]
        }));
        aligned(&lines)
    }

    /// The table of parameters, for programs.
    pub fn parameters_json(&self) -> Value {
        json!(self.rows)
    }

    /// The communication of a step, for programs.
    pub fn communication_json(&self) -> Value {
        let stage = |(stage, communication): (usize, &Communication)| {
            let groups = communication.sent_by_group();
            let sums = groups.iter().map(|(group, sent)| json!({"group": group, "sent": sent}));
            json!({
                "stage": stage,
                "calls": communication.calls,
                "sent_by_group": sums.collect::<Vec<_>>(),
                "sent": communication.sent(),
            })
        };
        let step = |step: &StepCommunication| {
            let stages = step.stages.iter().enumerate().map(stage).collect::<Vec<_>>();
            json!({"first_step": step.first_step, "stages": stages})
        };
        json!(self.steps.iter().map(step).collect::<Vec<_>>())
    }
}

impl StepCommunication {
    fn sends_nothing(&self) -> bool {
        self.stages.iter().all(|communication| communication.calls.is_empty())
    }
}

/// Pipeline stages that are alike together, by their first.
fn folded<T: PartialEq>(of_stages: impl Iterator<Item = T>) -> Vec<(Vec<usize>, T)> {
    let mut folded: Vec<(Vec<usize>, T)> = Vec::new();
    for (stage, own) in of_stages.enumerate() {
        match folded.iter_mut().find(|(_, other)| *other == own) {
            Some((stages, _)) => stages.push(stage),
            None => folded.push((vec![stage], own)),
        }
    }
    folded
}

const HEAD: [&str; 7] = ["group", "operation", "why", "dtype", "bytes of a call", "times", "sent"];

/// The calls of one rank.
fn communication_table(first_step: u64, stages: &[usize], communication: &Communication) -> String {
    let mut out =
        format!("communication of step {first_step}, first rank of stage {}\n", span(stages));
    let mut lines = vec![HEAD.map(str::to_owned)];
    lines.extend(call_lines(communication));
    out.push_str(&aligned(&lines));
    out.push_str(&totals(communication));
    out
}

/// The calls of one rank from a later step on that are not as they were.
fn differing_table(
    (before, from): (u64, u64),
    stages: &[usize],
    (old, new): (&Communication, &Communication),
) -> String {
    let known: Vec<[String; 7]> = call_lines(old).collect();
    let differing: Vec<[String; 7]> =
        call_lines(new).filter(|line| !known.contains(line)).collect();
    let title = format!("communication of step {from}, first rank of stage {}", span(stages));
    if differing.is_empty() {
        return format!("{title}: that of step {before}\n");
    }
    let mut out = format!("{title}: where it is not that of step {before}\n");
    let mut lines = vec![HEAD.map(str::to_owned)];
    lines.extend(differing);
    out.push_str(&aligned(&lines));
    out.push_str(&totals(new));
    out
}

/// The calls of one rank, those with the same purpose in one line.
fn call_lines(communication: &Communication) -> impl Iterator<Item = [String; 7]> {
    by_purpose(&communication.calls).into_iter().map(|calls| {
        let first = calls[0];
        let times: u64 = calls.iter().map(|call| call.times).sum();
        let sent: u64 = calls.iter().map(|call| call.sent_per_step()).sum();
        [
            format!("{} / {}", first.group.name(), first.ranks),
            first.operation.name().to_owned(),
            first.why.to_owned(),
            first.dtype.name().to_owned(),
            sizes(&calls),
            times.to_string(),
            sized(sent),
        ]
    })
}

fn totals(communication: &Communication) -> String {
    let groups = communication.sent_by_group();
    let sums = groups.iter().map(|(group, sent)| format!("{} {}", group.name(), sized(*sent)));
    let (all, sums) = (sized(communication.sent()), sums.collect::<Vec<_>>().join(", "));
    format!("sent per rank and step: {all} ({sums})\n")
}

fn by_purpose(calls: &[Call]) -> Vec<Vec<&Call>> {
    let mut folded: Vec<Vec<&Call>> = Vec::new();
    for call in calls {
        let purpose = |call: &Call| (call.operation, call.group, call.why, call.dtype);
        match folded.iter_mut().find(|other| purpose(other[0]) == purpose(call)) {
            Some(other) => other.push(call),
            None => folded.push(vec![call]),
        }
    }
    folded
}

/// The sizes of calls, or the smallest and the largest.
fn sizes(calls: &[&Call]) -> String {
    let all = || calls.iter().map(|call| call.bytes);
    let (least, most) = (all().min().unwrap_or(0), all().max().unwrap_or(0));
    if least == most { sized(least) } else { format!("{} to {}", sized(least), sized(most)) }
}

/// What the dimensions mean: `heads+kv_heads x embed`.
fn axes(row: &PlanRow) -> String {
    let name = |axis: &model_spec::Axis| json!(axis).as_str().unwrap_or_default().to_owned();
    let dimension = |axes: &Vec<model_spec::Axis>| {
        let mut names: Vec<String> = axes.iter().map(name).collect();
        names.dedup();
        names.join("+")
    };
    row.axes.iter().map(dimension).collect::<Vec<_>>().join(" x ")
}

/// Stages in few words: `0`, `0-15`, `0, 2`.
fn span(stages: &[usize]) -> String {
    match stages {
        [first, .., last] if last - first + 1 == stages.len() => format!("{first}-{last}"),
        _ => stages.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    }
}

/// Bytes in the unit that suits them; few of them one by one.
fn sized(bytes: u64) -> String {
    match bytes {
        0..10_240 => format!("{bytes} B"),
        10_240..1_048_576 => format!("{:.2} KiB", bytes as f64 / 1024.0),
        _ => gibibytes(bytes),
    }
}

/// Columns side by side, each as wide as its widest cell.
fn aligned<const N: usize>(lines: &[[String; N]]) -> String {
    let width =
        |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let mut out = String::new();
    for line in lines {
        let mut text = String::new();
        for (cell, width) in line.iter().zip(widths) {
            let _ = write!(text, "{cell:<width$}  ");
        }
        let _ = writeln!(out, "{}", text.trim_end());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn planned(preset: &str, ranks: usize, sets: &[&str]) -> LayoutPlan {
        planned_from(&[1], preset, ranks, sets)
    }

    fn planned_from(first_steps: &[u64], preset: &str, ranks: usize, sets: &[&str]) -> LayoutPlan {
        let text = format!(
            "name: x\nmodel: {{preset: {preset}}}\n\
             data: {{tokenizer: t, sources: [{{name: a, path: b}}]}}\n\
             training: {{steps: 10, global_batch: 64}}\ncluster: {{ranks_per_node: {ranks}}}\n"
        );
        let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        let config = RunConfig::from_yaml_str(&text, Path::new("/"), &sets).unwrap().config;
        let mesh = Mesh::new(&config.parallelism, ranks).unwrap();
        LayoutPlan::new(&config, &mesh, first_steps).unwrap()
    }

    #[track_caller]
    fn assert_holds(text: &str, parts: &[&str]) {
        for part in parts {
            let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
            let found = text.lines().any(|line| words(line).contains(part));
            assert!(found, "{part} is not in\n{text}");
        }
    }

    #[test]
    fn one_rank_communicates_nothing() {
        let plan = planned("llama3.2-1b", 1, &[]);
        let text = plan.tables();
        assert!(text.ends_with("\ncommunication: none, there is one rank\n"), "{text}");
        assert_holds(&text, &["layers.0..15.attention_norm.weight embed whole 0 whole 2048"]);
        assert_eq!(plan.communication_json()[0]["stages"][0]["sent"], 0);
    }

    #[test]
    fn both_tables_of_a_mixed_layout() {
        let shard = "parallelism.shard={ranks: 2, level: gradients}";
        let sets = ["parallelism.tensor=2", "parallelism.pipeline.stages=4", shard];
        let plan = planned("llama3-8b", 16, &sets);
        let text = plan.tables();
        assert_holds(
            &text,
            &[
                "layers.0..31.attention.qkv.weight heads+kv_heads x embed rows / 2 0-3 \
                 optimizer, gradients / 2 3072 x 4096 24.00 MiB 24.00 MiB 24.00 MiB 48.00 MiB",
                "communication of step 1, first rank of stage 0",
                "tensor / 2 all-gather gather the sequence before QKV bf16 64.00 MiB 256 8.00 GiB",
                "pipeline / 4 send activations to the next stage bf16 32.00 MiB 32 1.00 GiB",
                "world / 16 all-reduce number of targets fp64 8 B 1 120 B",
            ],
        );
        let qkv = &plan.parameters_json()[2];
        assert_eq!(qkv["axes"], json!([["heads", "kv_heads", "kv_heads"], ["embed"]]));
        assert_eq!(qkv["stages"], json!([0, 1, 2, 3]));
        assert_eq!(qkv["bytes"]["optimizer"], 48 << 20);
        let stage = &plan.communication_json()[0]["stages"][3];
        let sent = |group: &Value| group["sent"].as_u64().unwrap();
        let groups: u64 = stage["sent_by_group"].as_array().unwrap().iter().map(sent).sum();
        assert_eq!(stage["sent"], groups);
        let calls = stage["calls"].as_array().unwrap();
        let send = calls.iter().find(|call| call["operation"] == "send").unwrap();
        assert_eq!(send["why"], "gradients to the stage before");
        assert_eq!((&send["bytes"], &send["times"]), (&json!(32 << 20), &json!(32)));
    }

    #[test]
    fn stages_alike_are_one_table() {
        let text = planned("llama3-8b", 8, &["parallelism.pipeline.stages=8"]).tables();
        let heads: Vec<&str> =
            text.lines().filter(|line| line.starts_with("communication")).collect();
        let of = |stages| format!("communication of step 1, first rank of stage {stages}");
        assert_eq!(heads, [of("0"), of("1-6"), of("7")]);
    }

    /// Later batch stages are told of by what they change.
    #[test]
    fn batch_stages_differ_in_some_lines() {
        let batch = "training.global_batch=[{from_tokens: 0, global_batch: 64}, \
                     {from_tokens: 1000000, global_batch: 128}, \
                     {from_tokens: 3000000, global_batch: 128}]";
        let sets = ["parallelism.pipeline.stages=2", batch];
        let text = planned_from(&[1, 3, 5], "llama3-8b", 4, &sets).tables();
        let (first, later) = text.split_once("communication of step 3").unwrap();
        assert!(!later.contains("sum a bucket of gradients"), "the same with any batch: {later}");
        let stage = "communication of step 3, first rank of stage";
        assert_holds(
            &text,
            &[
                "communication of step 1, first rank of stage 0",
                &format!("{stage} 0: where it is not that of step 1"),
                &format!("{stage} 1: where it is not that of step 1"),
                "communication of step 5, first rank of stage 0: that of step 3",
            ],
        );
        let sends = "pipeline / 2 send activations to the next stage bf16 64.00 MiB";
        assert_holds(first, &[&format!("{sends} 32 2.00 GiB"), "sum a bucket of gradients"]);
        assert_holds(later, &[&format!("{sends} 64 4.00 GiB")]);
        assert_eq!(text.matches("sent per rank and step: ").count(), 4, "{text}");
    }

    #[test]
    fn stages_in_few_words() {
        assert_eq!(span(&[3]), "3");
        assert_eq!(span(&[1, 2, 3]), "1-3");
        assert_eq!(span(&[0, 2]), "0, 2");
    }
}
