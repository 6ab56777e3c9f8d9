//! `--profile`: a timeline of some steps, as chrome://tracing and Perfetto show it. libtorch's
//! profiler writes operators, kernels and our phases; the operations between ranks are added.

use rank_protocol::Steps;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::io::{BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use torch_shim::cuda;
use torch_shim::profiler::{self, Phase, Span};
use torch_shim::tch::Device;

/// The category of operations between ranks.
const COMMUNICATION: &str = "communication";

/// The timeline of a rank. Where it cannot be made, that is said, and training goes on.
pub struct Profile {
    steps: Option<Steps>,
    path: PathBuf,
    device: Device,
    /// Rank, and number of ranks.
    place: (usize, usize),
    step: Option<Phase>,
}

impl Profile {
    /// Of these steps, to be written to `path`.
    pub fn new(steps: Option<Steps>, path: PathBuf, device: Device, place: (usize, usize)) -> Self {
        Self { steps, path, device, place, step: None }
    }

    /// A step begins. A run that goes on within the steps has those that are left.
    pub fn before(&mut self, step: u64) {
        let Some(steps) = self.steps.filter(|steps| (steps.first..=steps.last).contains(&step))
        else {
            return;
        };
        if !profiler::is_on()
            && let Err(error) = profiler::start(self.device)
        {
            tracing::warn!("no timeline of steps {} to {}: {error}", steps.first, steps.last);
            self.steps = None;
        }
        // The name that PyTorch's tools look for.
        self.step = Some(profiler::phase(&format!("ProfilerStep#{step}")));
    }

    /// A step is done, and what belongs to it. Whether the timeline was written with it.
    pub fn after(&mut self, step: u64) -> bool {
        self.step = None;
        match self.steps.is_some_and(|steps| step >= steps.last) {
            true => self.finish(),
            false => false,
        }
    }

    /// Writes what there is, where it has not been written; whether that is so.
    pub fn finish(&mut self) -> bool {
        self.step = None;
        self.steps = None;
        if !profiler::is_on() {
            return false;
        }
        match self.write() {
            Ok(()) => {
                tracing::info!("the timeline is in {}", self.path.display());
                true
            }
            Err(error) => {
                tracing::warn!("no timeline in {}: {error}", self.path.display());
                false
            }
        }
    }

    fn write(&self) -> Result<(), Box<dyn std::error::Error>> {
        if let Device::Cuda(index) = self.device {
            cuda::synchronize(index)?;
        }
        let folder = self.path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder)?;
        let unfinished = self.path.with_extension("unfinished");
        let spans = profiler::stop(&unfinished)?;
        let reader = BufReader::new(std::fs::File::open(&unfinished)?);
        let mut trace: Value = serde_json::from_reader(reader)?;
        let (rank, world_size) = self.place;
        trace["distributedInfo"] = json!({ "rank": rank, "world_size": world_size });
        add(&mut trace, &spans, std::process::id());
        let mut writer = BufWriter::new(std::fs::File::create(&unfinished)?);
        serde_json::to_writer(&mut writer, &trace)?;
        writer.flush()?;
        std::fs::rename(&unfinished, &self.path)?;
        Ok(())
    }

    /// Where it is, or will be.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Adds spans to a trace of libtorch's, whose times are microseconds after its base.
fn add(trace: &mut Value, spans: &[Span], pid: u32) {
    let base = trace["baseTimeNanoseconds"].as_u64().unwrap_or(0);
    let microseconds = |ns: u64| ns as f64 / 1e3;
    let lanes: BTreeSet<&str> = spans.iter().map(|span| span.lane.as_str()).collect();
    let lane = |lane: &&str| {
        json!({
            "ph": "M", "name": "thread_name", "pid": pid, "tid": lane, "ts": 0,
            "args": { "name": format!("{COMMUNICATION}: {lane}") },
        })
    };
    let mut events: Vec<Value> = lanes.iter().map(lane).collect();
    events.extend(spans.iter().map(|span| {
        let mut args = json!({ "bytes": span.bytes });
        for (name, value) in &span.details {
            args[*name] = value.as_str().into();
        }
        json!({
            "ph": "X",
            "cat": COMMUNICATION,
            "name": span.name,
            "pid": pid,
            "tid": span.lane,
            "ts": microseconds(span.start_ns.saturating_sub(base)),
            "dur": microseconds(span.end_ns.saturating_sub(span.start_ns)),
            "args": args,
        })
    }));
    match trace["traceEvents"].as_array_mut() {
        Some(all) => all.append(&mut events),
        None => trace["traceEvents"] = events.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_put_on_the_traces_own_clock() {
        let mut trace = json!({
            "traceEvents": [{ "ph": "X", "name": "aten::mm", "ts": 1.5, "dur": 2 }],
            "baseTimeNanoseconds": 1_000_000_000_000_u64,
        });
        let span = |start_ns, end_ns| Span {
            name: "all_reduce".into(),
            lane: "group data".into(),
            start_ns,
            end_ns,
            bytes: 4096,
            details: vec![("group", "data".into())],
        };
        let spans = [span(1_000_000_002_500, 1_000_000_004_000), span(1_000_000_005_000, 0)];
        add(&mut trace, &spans, 7);
        let events = trace["traceEvents"].as_array().unwrap();
        assert_eq!(events.len(), 4);
        assert_eq!(events[1]["args"]["name"], "communication: group data");
        let first = &events[2];
        assert_eq!((first["ts"].as_f64(), first["dur"].as_f64()), (Some(2.5), Some(1.5)));
        assert_eq!(
            (&first["args"]["bytes"], &first["args"]["group"]),
            (&4096.into(), &"data".into())
        );
        assert_eq!(
            (&first["pid"], &first["tid"], &first["cat"]),
            (&7.into(), &"group data".into(), &COMMUNICATION.into())
        );
        assert_eq!(events[3]["dur"].as_f64(), Some(0.0), "one without an end has no length");
        let mut empty = json!({});
        add(&mut empty, &spans[..1], 7);
        assert_eq!(empty["traceEvents"].as_array().map(Vec::len), Some(2));
    }

    #[test]
    fn the_steps_that_were_asked_for_are_written_and_no_others() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("profiles/rank-00000.json");
        let steps = Some(Steps { first: 2, last: 3 });
        let mut profile = Profile::new(steps, path.clone(), Device::Cpu, (0, 1));
        let mut written = Vec::new();
        for step in 1..=5 {
            profile.before(step);
            assert_eq!(profiler::is_on(), step == 2 || step == 3);
            written.push(profile.after(step));
        }
        assert_eq!(written, [false, false, true, false, false]);
        let trace: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let names: Vec<&str> = trace["traceEvents"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|event| event["name"].as_str())
            .filter(|name| name.starts_with("ProfilerStep#"))
            .collect();
        assert_eq!(names, ["ProfilerStep#2", "ProfilerStep#3"]);
        assert_eq!(trace["distributedInfo"]["world_size"], 1);
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        // A run that ends before the last of them.
        let mut profile = Profile::new(steps, path.clone(), Device::Cpu, (0, 1));
        std::fs::remove_file(&path).unwrap();
        profile.before(2);
        profile.after(2);
        assert!(!path.exists());
        drop(profile);
        assert!(path.exists() && !profiler::is_on());
    }
}
