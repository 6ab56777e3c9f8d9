//! What `phalanx check` says about a pipeline: which blocks are where, the order of the passes, its
//! bubble, and the activations that each stage holds.

use crate::check::gibibytes;
use crate::error::UserError;
use layout::communication::LayoutError;
use layout::memory::memory_of_stage;
use layout::schedule::{Costs, Schedule, ScheduleError, Timeline, draw, simulate};
use layout::{ChunkSpan, Mesh, chunks};
use run_config::{Pipeline, RunConfig};
use serde_json::{Value, json};
use std::fmt::Display;
use std::path::Path;

/// Longer schedules are neither run against the clock nor drawn.
const MAX_ACTIONS: usize = 1_000_000;
/// Columns of the drawing.
const WIDTH: usize = 100;
/// Most values of a list in the table.
const MAX_VALUES: usize = 24;

/// A pipeline of two stages or more, and what follows from it.
pub struct PipelinePlan {
    pipeline: Pipeline,
    chunks: Vec<ChunkSpan>,
    /// Bytes of the fullest rank of each stage.
    memory: Vec<u64>,
    /// One per batch stage.
    steps: Vec<StepPlan>,
}

/// The schedule of the steps of one batch stage.
struct StepPlan {
    first_step: u64,
    schedule: Schedule,
    /// `None` where it is over [`MAX_ACTIONS`].
    timeline: Option<Timeline>,
}

impl PipelinePlan {
    /// The pipeline of `config`, or `None` where there is one stage. `first_steps` holds the first
    /// step of each batch stage.
    ///
    /// # Errors
    /// Where the schedule cannot be.
    pub fn new(
        config: &RunConfig,
        mesh: &Mesh,
        first_steps: &[u64],
    ) -> Result<Option<Self>, LayoutError> {
        let pipeline = &config.parallelism.pipeline;
        if pipeline.stages < 2 {
            return Ok(None);
        }
        let per_pass = mesh.data_size().max(1) * config.training.micro_batch.max(1);
        let batches = config.training.batch_stages.iter().zip(first_steps);
        let steps = batches.map(|(batch, first_step)| {
            let micro_batches = (batch.global_batch / per_pass).max(1);
            let schedule = Schedule::of(pipeline, micro_batches)?;
            Ok(StepPlan::new(*first_step, schedule))
        });
        let memory = |stage| Ok(memory_of_stage(config, mesh, stage)?.total());
        Ok(Some(Self {
            memory: (0..pipeline.stages).map(memory).collect::<Result<_, LayoutError>>()?,
            chunks: chunks(config.model.layers, pipeline.stages, pipeline.virtual_stages),
            steps: steps.collect::<Result<_, ScheduleError>>()?,
            pipeline: pipeline.clone(),
        }))
    }

    /// Adds the rows of the table.
    pub fn rows(&self, row: &mut impl FnMut(&str, String)) {
        let p = &self.pipeline;
        let stages = match p.virtual_stages {
            1 => format!("{} stages", p.stages),
            several => format!("{} stages x {several} virtual stages", p.stages),
        };
        row("pipeline", format!("{}, {stages}", self.name()));
        let blocks = runs(self.chunks.iter().map(|chunk| chunk.blocks.len()));
        row("blocks per chunk", format!("{blocks}; embedding on the first, head on the last"));
        let memory = runs(self.memory.iter().map(|bytes| gibibytes(*bytes)));
        row("memory by stage", format!("{memory} (total ~)"));
        for (index, step) in self.steps.iter().enumerate() {
            let name = |name| if index == 0 { name } else { "" };
            let bubble = step.bubble_fraction().map_or_else(
                || "not computed".to_owned(),
                |fraction| format!("{:.1} % of a step", 100.0 * fraction),
            );
            let micro_batches = step.schedule.micro_batches();
            row(
                name("bubble"),
                format!(
                    "{bubble} of {micro_batches} micro-batch(es), from step {}",
                    step.first_step
                ),
            );
            if p.virtual_stages > 1 {
                let (least, most) = step.schedule.row_lengths();
                let rows =
                    if least == most { format!("{least}") } else { format!("{least} or {most}") };
                row("", format!("{rows} micro-batch(es) through a chunk before the next one"));
            }
            let peaks = runs(step.peaks());
            row("", format!("activations held, by stage: {peaks} (micro-batches x chunks)"));
        }
    }

    /// The schedule of the first step of each batch stage, drawn as text.
    pub fn drawing(&self) -> String {
        let draw = |(index, step): (usize, &StepPlan)| {
            let number = step.first_step;
            let is_alike = |other: &&StepPlan| other.schedule == step.schedule;
            if let Some(same) = self.steps[..index].iter().find(is_alike) {
                return format!("schedule of step {number}: that of step {}\n", same.first_step);
            }
            match &step.timeline {
                Some(timeline) => format!(
                    "schedule of step {number}; a column is the forward pass of one chunk\n{}",
                    draw::text(timeline, WIDTH)
                ),
                None => format!("schedule of step {number}: {}\n", step.too_long()),
            }
        };
        self.steps.iter().enumerate().map(draw).collect()
    }

    /// Writes the first step's schedule as SVG to `path`.
    ///
    /// # Errors
    /// Where it is too long to be drawn, and where `path` cannot be written.
    pub fn write_svg(&self, path: &Path) -> Result<(), UserError> {
        let Some(step) = self.steps.first() else { return Ok(()) };
        let Some(timeline) = &step.timeline else {
            return Err(UserError::failed(format!("no SVG: {}", step.too_long())));
        };
        std::fs::write(path, draw::svg(timeline)).map_err(|error| {
            UserError::failed(format!("cannot write {}: {error}", path.display()))
                .hint("--schedule-svg takes the path of a file in a folder that exists")
        })
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let chunk = |chunk: &ChunkSpan| {
            json!({
                "stage": chunk.stage,
                "virtual_stage": chunk.virtual_stage,
                "embedding": chunk.embedding,
                "first_block": chunk.blocks.start,
                "num_blocks": chunk.blocks.len(),
                "head": chunk.head,
            })
        };
        let step = |step: &StepPlan| {
            json!({
                "first_step": step.first_step,
                "micro_batches": step.schedule.micro_batches(),
                "contiguous_micro_batches": [
                    step.schedule.row_lengths().0,
                    step.schedule.row_lengths().1,
                ],
                "bubble_fraction": step.bubble_fraction(),
                "peak_activations": step.peaks().collect::<Vec<_>>(),
            })
        };
        json!({
            "schedule": self.pipeline.schedule,
            "stages": self.pipeline.stages,
            "virtual_stages": self.pipeline.virtual_stages,
            "contiguous_micro_batches": self.pipeline.contiguous_micro_batches,
            "chunks": self.chunks.iter().map(chunk).collect::<Vec<_>>(),
            "memory_per_stage": self.memory,
            "steps": self.steps.iter().map(step).collect::<Vec<_>>(),
            "drawing": self.drawing(),
        })
    }

    fn name(&self) -> String {
        json!(self.pipeline.schedule).as_str().unwrap_or_default().to_owned()
    }
}

impl StepPlan {
    fn new(first_step: u64, schedule: Schedule) -> Self {
        let is_long = schedule.num_actions().saturating_mul(schedule.stages()) > MAX_ACTIONS;
        let timeline = if is_long { None } else { simulate(&schedule, Costs::UNIT).ok() };
        Self { first_step, schedule, timeline }
    }

    /// Share of the step in which a stage has nothing to do.
    fn bubble_fraction(&self) -> Option<f64> {
        let simulated = self.timeline.as_ref().map(Timeline::bubble_fraction);
        simulated.or_else(|| self.schedule.bubble_fraction(Costs::UNIT))
    }

    fn peaks(&self) -> impl Iterator<Item = usize> {
        (0..self.schedule.stages()).map(|stage| self.schedule.peak_activations(stage))
    }

    fn too_long(&self) -> String {
        let actions = self.schedule.num_actions().saturating_mul(self.schedule.stages());
        format!("{actions} passes are too many to draw (limit {MAX_ACTIONS})")
    }
}

/// `7, 8, 8, 8, 7` as `7, 3 times 8, 7`.
fn runs<T: PartialEq + Display>(values: impl Iterator<Item = T>) -> String {
    let mut runs: Vec<(T, usize)> = Vec::new();
    for value in values {
        match runs.last_mut() {
            Some((last, times)) if *last == value => *times += 1,
            _ => runs.push((value, 1)),
        }
    }
    let one = |(value, times): &(T, usize)| match times {
        1 => value.to_string(),
        _ => format!("{times} times {value}"),
    };
    let mut parts: Vec<String> = runs.iter().take(MAX_VALUES).map(one).collect();
    if runs.len() > MAX_VALUES {
        parts.push("…".to_owned());
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use run_config::PipelineSchedule;

    fn planned(preset: &str, pipeline: Pipeline, global_batch: usize) -> PipelinePlan {
        ramp(preset, pipeline, &global_batch.to_string(), &[1])
    }

    fn ramp(
        preset: &str,
        pipeline: Pipeline,
        global_batch: &str,
        first_steps: &[u64],
    ) -> PipelinePlan {
        let text = format!(
            "name: x\nmodel: {{preset: {preset}}}\n\
             data: {{tokenizer: t, sources: [{{name: a, path: b}}]}}\n\
             training: {{steps: 10, global_batch: {global_batch}}}\n"
        );
        let mut config = RunConfig::from_yaml_str(&text, Path::new("/"), &[]).unwrap().config;
        let mesh_ranks = 2 * pipeline.stages;
        config.parallelism.pipeline = pipeline;
        let mesh = Mesh::new(&config.parallelism, mesh_ranks).unwrap();
        PipelinePlan::new(&config, &mesh, first_steps).unwrap().unwrap()
    }

    fn pipeline(schedule: PipelineSchedule, stages: usize, virtual_stages: usize) -> Pipeline {
        Pipeline { stages, schedule, virtual_stages, contiguous_micro_batches: None }
    }

    fn table(plan: &PipelinePlan) -> String {
        let mut out = String::new();
        plan.rows(&mut |name, value| out.push_str(&format!("{name}: {value}\n")));
        out
    }

    #[test]
    fn llama_405b_on_16_stages() {
        let plan =
            planned("llama3-405b", pipeline(PipelineSchedule::OneForwardOneBackward, 16, 1), 64);
        let expected = "\
pipeline: 1f1b, 16 stages
blocks per chunk: 7, 14 times 8, 7; embedding on the first, head on the last
bubble: 31.9 % of a step of 32 micro-batch(es), from step 1
: activations held, by stage: 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1 \
(micro-batches x chunks)
";
        let table = table(&plan);
        let (memory, others): (Vec<&str>, Vec<&str>) =
            table.split_inclusive('\n').partition(|line| line.starts_with("memory by stage"));
        assert_eq!(others.concat(), expected);
        assert_eq!(memory[0].matches(" GiB").count(), 16, "{memory:?}");
        let drawing = plan.drawing();
        assert!(drawing.starts_with("schedule of step 1; a column is the forward pass"));
        assert!(drawing.contains("\nstage 0   F0  F1  F2"), "{drawing}");
        assert!(drawing.contains("of 141 units of time)"), "{drawing}");
        assert!(drawing.lines().all(|line| line.len() <= WIDTH), "{drawing}");
    }

    #[test]
    fn virtual_stages() {
        let plan = planned("llama3-8b", pipeline(PipelineSchedule::Interleaved, 4, 2), 16);
        let table = table(&plan);
        for part in [
            "interleaved-1f1b, 4 stages x 2 virtual stages",
            "blocks per chunk: 8 times 4;",
            // (P - 1) / (V M) of the work: 3 / 16.
            "bubble: 15.8 % of a step of 8 micro-batch(es), from step 1",
            "by stage: 11, 9, 7, 5 (micro-batches x chunks)",
            ": 4 micro-batch(es) through a chunk before the next one",
        ] {
            assert!(table.contains(part), "{part} is not in\n{table}");
        }
        let json = plan.json();
        assert_eq!(json["schedule"], "interleaved-1f1b");
        assert_eq!(json["chunks"][5]["stage"], 1);
        assert_eq!(json["chunks"][5]["virtual_stage"], 1);
        assert_eq!(json["chunks"][5]["first_block"], 20);
        assert_eq!(json["chunks"][7]["head"], true);
        assert_eq!(json["memory_per_stage"].as_array().unwrap().len(), 4);
        assert_eq!(json["steps"][0]["micro_batches"], 8);
        assert_eq!(json["steps"][0]["peak_activations"], json!([11, 9, 7, 5]));
        let fraction = json["steps"][0]["bubble_fraction"].as_f64().unwrap();
        assert!((fraction - 3.0 / 19.0).abs() < 1e-12);
        assert!(json["drawing"].as_str().unwrap().contains("stage 3  .   .   .   F0a"));
        assert_eq!(json["contiguous_micro_batches"], Value::Null);
        assert_eq!(json["steps"][0]["contiguous_micro_batches"], json!([4, 4]));
    }

    /// Each batch stage has its drawing, but for those whose schedule was drawn.
    #[test]
    fn batch_stages_are_drawn() {
        let batch = "[{from_tokens: 0, global_batch: 8}, {from_tokens: 100000, global_batch: 16}, \
                     {from_tokens: 300000, global_batch: 8, sequence_length: 4096}]";
        let pipeline = pipeline(PipelineSchedule::OneForwardOneBackward, 2, 1);
        let drawing = ramp("llama3-8b", pipeline, batch, &[1, 3, 5]).drawing();
        let heads: Vec<&str> =
            drawing.lines().filter(|line| line.starts_with("schedule")).collect();
        let columns = "a column is the forward pass of one chunk";
        let of = |step| format!("schedule of step {step}; {columns}");
        assert_eq!(heads, [of(1).as_str(), &of(3), "schedule of step 5: that of step 1"]);
        assert_eq!(drawing.matches("\nstage 1  ").count(), 2, "{drawing}");
        assert!(drawing.contains(" F7 "), "{drawing}");
    }

    /// Breadth first a stage holds the activations of all micro-batches, and shows it.
    #[test]
    fn contiguous_micro_batches() {
        let asked = |number| Pipeline {
            contiguous_micro_batches: Some(number),
            ..pipeline(PipelineSchedule::Interleaved, 4, 2)
        };
        let check = |number, parts: [&str; 3]| {
            let plan = planned("llama3-8b", asked(number), 18);
            let table = table(&plan);
            for part in parts {
                assert!(table.contains(part), "{part} is not in\n{table}");
            }
            assert_eq!(plan.json()["contiguous_micro_batches"], number);
        };
        let rows = |rows| format!(": {rows} micro-batch(es) through a chunk before the next one");
        let depth_first = ["14.3 % of a step of 9 micro-batch(es)", "by stage: 12, 10, 8, 6 ("];
        let breadth_first = ["14.3 % of a step of 9 micro-batch(es)", "by stage: 16, 14, 12, 10 ("];
        check(4, [&rows("4 or 5"), depth_first[0], depth_first[1]]);
        check(9, [&rows("9"), breadth_first[0], breadth_first[1]]);
    }

    /// The formula where the clock would take too long.
    #[test]
    fn long_schedules_are_not_drawn() {
        let gpipe = pipeline(PipelineSchedule::Gpipe, 4, 1);
        let plan = planned("llama3-8b", gpipe, 1 << 19);
        assert!(table(&plan).contains("0.0 % of a step of 262144 micro-batch(es)"));
        assert!(plan.drawing().contains("2097152 passes are too many to draw (limit 1000000)"));
        let error = plan.write_svg(Path::new("/nonexistent/a.svg")).unwrap_err();
        assert!(error.to_string().contains("no SVG: 2097152 passes are too many"), "{error}");
    }

    #[test]
    fn the_svg_is_written_or_says_why_not() {
        let plan = planned("llama3-8b", pipeline(PipelineSchedule::ZeroBubble, 2, 1), 8);
        let path = std::env::temp_dir().join(format!("phalanx-{}.svg", std::process::id()));
        plan.write_svg(&path).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        assert!(svg.starts_with("<svg ") && svg.contains("2 stages, 4 micro-batches"));
        std::fs::remove_file(&path).unwrap();
        let error = plan.write_svg(Path::new("/nonexistent/a.svg")).unwrap_err();
        assert!(error.to_string().starts_with("error: cannot write /nonexistent/a.svg: "));
        assert!(error.hint.is_some());
    }

    #[test]
    fn values_in_runs() {
        let check = |values: &[usize], expected| assert_eq!(runs(values.iter().copied()), expected);
        check(&[7, 8, 8, 8, 7], "7, 3 times 8, 7");
        check(&[4], "4");
        check(&[], "");
        assert!(runs(0..100).ends_with("22, 23, …"));
    }
}
