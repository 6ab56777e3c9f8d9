//! `--profile`: timelines of some steps, in which sums of gradients overlap the backward pass.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use end_to_end::sandbox::Sandbox;
use serde_json::Value;

fn sandbox() -> Sandbox {
    Sandbox::real(env!("CARGO_BIN_EXE_phalanx-under-test"))
}

/// Something on a timeline, in microseconds.
struct Span {
    name: String,
    category: String,
    start: f64,
    end: f64,
    args: Value,
}

impl Span {
    fn overlaps(&self, other: &Span) -> bool {
        self.start < other.end && other.start < self.end
    }
}

fn spans(sandbox: &Sandbox, rank: usize) -> Vec<Span> {
    let path = sandbox.run_dir().profile(1, rank);
    let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let trace: Value = serde_json::from_slice(&text).unwrap();
    assert_eq!(trace["distributedInfo"]["rank"], rank);
    let number = |value: &Value| value.as_f64().unwrap_or_default();
    let span = |event: &Value| Span {
        name: event["name"].as_str().unwrap_or_default().to_owned(),
        category: event["cat"].as_str().unwrap_or_default().to_owned(),
        start: number(&event["ts"]),
        end: number(&event["ts"]) + number(&event["dur"]),
        args: event["args"].clone(),
    };
    let events = trace["traceEvents"].as_array().unwrap().iter();
    events.filter(|event| event["ph"] == "X").map(span).collect()
}

fn run(sandbox: &Sandbox, sets: &[&str]) {
    let sets = ["training.steps=6", "model.layers=6"].iter().chain(sets);
    let sets = sets.flat_map(|set| ["--set", set]);
    let args: Vec<&str> =
        ["run", "config.yaml", "--profile", "steps=3..5"].into_iter().chain(sets).collect();
    sandbox.expect(0, &args);
}

fn of<'a>(spans: &'a [Span], name: &str) -> Vec<&'a Span> {
    spans.iter().filter(|span| span.name == name).collect()
}

/// A rank waits for its third sum before the last but two: some sums end, and so have begun, within
/// the backward pass, however slow the machine is.
#[test]
fn sums_of_gradients_overlap_the_backward_pass() {
    let sandbox = sandbox();
    run(&sandbox, &["parallelism.shard={ranks: 2, level: gradients}"]);
    let mut num_beside = 0;
    for rank in 0..2 {
        let spans = spans(&sandbox, rank);
        let steps: Vec<&str> = spans
            .iter()
            .filter(|span| span.name.starts_with("ProfilerStep#"))
            .map(|span| span.name.as_str())
            .collect();
        assert_eq!(steps, ["ProfilerStep#3", "ProfilerStep#4", "ProfilerStep#5"]);
        // Four micro-batches each, of a batch of eight over two ranks.
        let (forward, backward) = (of(&spans, "forward"), of(&spans, "backward"));
        assert_eq!((forward.len(), backward.len()), (12, 12));
        assert_eq!(of(&spans, "optimizer").len(), 3);
        assert!(of(&spans, "data").len() >= 3 && !of(&spans, "phalanx::linear").is_empty());
        let sums = of(&spans, "reduce_scatter");
        // Of each of eight units (six blocks, embedding and head), in each micro-batch.
        assert_eq!(sums.len(), 3 * 4 * 8);
        for sum in &sums {
            assert_eq!(sum.category, "communication");
            assert!(sum.args["bytes"].as_u64() > Some(0) && sum.end >= sum.start);
            assert!(sum.args["group"].as_str().is_some_and(|group| group.starts_with("shard")));
        }
        for pass in &backward {
            assert!(sums.iter().any(|sum| sum.overlaps(pass)), "a backward pass beside no sum");
        }
        let operators = spans.iter().filter(|span| span.category == "cpu_op");
        let in_backward = |span: &&Span| backward.iter().any(|pass| span.overlaps(pass));
        let beside = |span: &&Span| sums.iter().any(|sum| sum.overlaps(span));
        num_beside += operators.filter(in_backward).filter(beside).count();
    }
    assert!(num_beside > 0, "no operator ran while gradients were summed");
    let written = sandbox.events_of("profile_written");
    assert_eq!((written.len(), &written[0]["step"]), (1, &5.into()));
}

#[test]
fn messages_between_stages_are_on_the_timeline() {
    let sandbox = sandbox();
    run(&sandbox, &["parallelism.pipeline.stages=2"]);
    for rank in 0..2 {
        let spans = spans(&sandbox, rank);
        for name in ["send", "receive"] {
            let messages = of(&spans, name);
            // Eight micro-batches a step: activations one way, gradients the other.
            assert_eq!(messages.len(), 3 * 8, "{name}");
            let other = format!("rank {}", 1 - rank);
            let operation = messages[0].args["operation"].as_str().unwrap();
            assert!(operation.ends_with(&other), "{operation}");
        }
    }
}

#[test]
fn steps_that_are_none_are_refused() {
    let sandbox = sandbox();
    let check = |profile: &str, part: &str| {
        let (_, told) = sandbox.expect(64, &["run", "config.yaml", "--profile", profile]);
        assert!(told.contains(part), "{told}");
    };
    check("10..12", "steps=10..12");
    check("steps=12..10", "10 comes before 12");
    check("steps=19..21", "the run has 20 steps");
    assert!(!sandbox.run_dir().root().exists());
}
