//! Which rank holds the others up by being slow: a pure record of the time that each spends at work
//! itself, apart from its waits for data and for others.

use layout::{Axis, Mesh};
use rank_protocol::StepReport;
use run_config::RunConfig;
use serde::Serialize;
use std::collections::{BTreeMap, VecDeque};

/// Reports that are looked at: those of a rank's last steps.
const NUM_REPORTS: usize = 5;
/// A rank is slow whose time is so many times that of its peers.
const RATIO: f64 = 1.5;
/// Differences below this, in seconds, are noise whatever their ratio.
const NOISE_S: f64 = 0.02;

/// A rank that is slower than those that do the same work.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Slow {
    /// The rank.
    pub rank: usize,
    /// Its last step.
    pub step: u64,
    /// Its own time of a step, in seconds: the median of its last reports.
    pub own_s: f64,
    /// That of the ranks that do the same work, in seconds: the median of them all.
    pub usual_s: f64,
}

#[derive(Clone, Debug, Default)]
struct Rank {
    own_s: VecDeque<f64>,
    is_told: bool,
}

/// The pace of each rank of a generation.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    /// For each rank a number that it shares with those that do the same work.
    work: Vec<usize>,
    ranks: Vec<Rank>,
    /// The newest step that was reported, and by how many ranks.
    newest: (u64, usize),
}

impl Pace {
    /// Of ranks that have reported nothing; those with the same number in `work` do the same work.
    pub fn new(work: Vec<usize>) -> Self {
        Self { ranks: vec![Rank::default(); work.len()], work, newest: (0, 0) }
    }

    /// Forgets what was reported: other processes are at work from now on.
    pub fn forget(&mut self) {
        self.ranks.fill(Rank::default());
        self.newest = (0, 0);
    }

    /// A rank reports a step. Gives those that show to be slow once all have, each once until it is
    /// not slow any more.
    pub fn reported(&mut self, rank: usize, report: &StepReport) -> Vec<Slow> {
        let Some(waited_s) = report.comm_wait_s else { return Vec::new() };
        let Some(times) = self.ranks.get_mut(rank).map(|rank| &mut rank.own_s) else {
            return Vec::new();
        };
        times.push_back(report.step_time_s - report.data_wait_s - waited_s);
        if times.len() > NUM_REPORTS {
            times.pop_front();
        }
        let (step, count) = self.newest;
        self.newest = if step == report.step { (step, count + 1) } else { (report.step, 1) };
        match self.newest.1 == self.ranks.len() {
            true => self.judge(report.step),
            false => Vec::new(),
        }
    }

    fn judge(&mut self, step: u64) -> Vec<Slow> {
        let mut own: Vec<f64> = Vec::new();
        for rank in &self.ranks {
            if rank.own_s.len() < NUM_REPORTS {
                return Vec::new();
            }
            own.push(median(rank.own_s.iter().copied().collect()));
        }
        let mut groups: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
        for (work, own_s) in self.work.iter().zip(&own) {
            groups.entry(*work).or_default().push(*own_s);
        }
        let usual: BTreeMap<usize, f64> =
            groups.into_iter().map(|(work, times)| (work, median(times))).collect();
        let mut slow = Vec::new();
        for (rank, &own_s) in own.iter().enumerate() {
            let usual_s = usual.get(&self.work[rank]).copied().unwrap_or(own_s);
            let is_slow = own_s > RATIO * usual_s && own_s - usual_s > NOISE_S;
            let was_told = std::mem::replace(&mut self.ranks[rank].is_told, is_slow);
            if is_slow && !was_told {
                slow.push(Slow { rank, step, own_s, usual_s });
            }
        }
        slow
    }
}

/// The pace of a run's ranks: those of one stage of the pipeline do the same work.
pub fn pace_of(config: &RunConfig, world_size: usize) -> Pace {
    let mesh = Mesh::new(&config.parallelism, world_size).ok();
    let stage = |rank| mesh.map_or(0, |mesh| mesh.coordinate(rank, Axis::Pipeline));
    Pace::new((0..world_size).map(stage).collect())
}

/// Of an even number, the lower one in the middle.
fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    let middle = times.len().saturating_sub(1) / 2;
    times.get(middle).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(step: u64, own_s: f64) -> StepReport {
        let comm_wait_s = Some(1.0 - own_s);
        let times = StepReport { step_time_s: 1.1, data_wait_s: 0.1, ..StepReport::default() };
        StepReport { step, comm_wait_s, ..times }
    }

    /// Four ranks, of which this one takes `slow` seconds from step 21 to 40, where others take
    /// 0.2; the ranks that are named, and when.
    fn named(work: &[usize], rank: usize, slow: f64) -> Vec<(usize, u64)> {
        let mut pace = Pace::new(work.to_vec());
        let mut named = Vec::new();
        for step in 1..=60 {
            for at in 0..4 {
                let is_slow = at == rank && (21..=40).contains(&step);
                let own_s = if is_slow { slow } else { 0.2 };
                let slow = pace.reported(at, &report(step, own_s));
                named.extend(slow.into_iter().map(|slow| (slow.rank, slow.step)));
            }
        }
        named
    }

    #[test]
    fn a_rank_that_is_twice_as_slow_is_named_within_5_reports() {
        for rank in 0..4 {
            let named = named(&[0; 4], rank, 0.4);
            assert_eq!(named.len(), 1, "{named:?}");
            assert!(named[0].0 == rank && (21..=25).contains(&named[0].1), "{named:?}");
        }
        assert_eq!(named(&[0; 4], 1, 0.25), []);
    }

    #[test]
    fn only_ranks_of_the_same_work_are_compared() {
        assert_eq!(named(&[0, 1, 0, 2], 3, 0.9), [], "it has no peer");
        assert_eq!(named(&[0, 1, 0, 1], 3, 0.9).len(), 1);
    }

    #[test]
    fn one_long_step_is_no_slow_rank() {
        let mut pace = Pace::new(vec![0; 2]);
        for step in 1..=40 {
            let long = if step == 20 { 0.9 } else { 0.2 };
            assert_eq!(pace.reported(0, &report(step, 0.2)), []);
            assert_eq!(pace.reported(1, &report(step, long)), []);
        }
    }
}
