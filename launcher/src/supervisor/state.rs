//! The supervisor's policy: a pure function of (state, event, now) to actions.
//!
//! It owns no clock, no process and no file, so that a simulation and production run the same code.
//! Every decision carries its reason in words.

use super::cause::{Cause, Signature};
pub use super::policy::{Action, Elastic, Event, Policy, RankState};
use super::stall::{ASKING, Progress, suspects};
use ending::Then;
use growth::Growth;
use rank_protocol::{FailureReport, Phase, Position, exit_code};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

mod ending;
pub mod growth;
mod verdict;

#[derive(Clone, Debug)]
struct Rank {
    state: RankState,
    phase: Phase,
    step: Option<u64>,
    report: Option<FailureReport>,
    position: Option<Position>,
    /// Whether its process ends where others may stay: it hangs, or is late.
    is_suspect: bool,
}

#[derive(Clone, Debug, PartialEq)]
enum Stage {
    /// Before the first or between two generations.
    Between,
    /// Ranks work.
    Working,
    /// Nothing has moved for long; ranks were asked where they are.
    Asking { until: Instant },
    /// A rank failed; others may fail of the same cause.
    Settling { until: Instant },
    /// Ranks were told to end or to let go.
    Ending { kill_at: Instant },
    /// Ranks were killed; those that are still there then are told of.
    Killed { since: Instant, tell_at: Instant },
    /// Over.
    Over,
}

/// Killed ranks that are not gone are told of that often: one that waits for a device or a file
/// system cannot be ended before that answers.
const LINGER: Duration = Duration::from_secs(10);

fn killed(now: Instant) -> Stage {
    Stage::Killed { since: now, tell_at: now + LINGER }
}

/// The state of one run under one launcher.
#[derive(Clone, Debug)]
pub struct State {
    policy: Policy,
    stage: Stage,
    generation: u64,
    ranks: Vec<Rank>,
    /// Ranks whose processes are gone.
    num_exited: usize,
    /// Ranks without a part in their generation: those, and the ones that have let go of it.
    num_out: usize,
    /// Whether the generation has processes of the one before.
    has_kept: bool,
    /// Whether it has done a step.
    has_stepped: bool,
    /// What follows once processes that waited are gone.
    then: Option<Then>,
    /// Ranks of this generation, or of the last one.
    num_ranks: usize,
    /// Ranks for which there is room.
    room: usize,
    growth: Option<Growth>,
    /// Whether the generation ends so that the next one has more ranks.
    is_growing: bool,
    /// Whether a node that is absent was there before.
    has_begun: bool,
    causes: Vec<Cause>,
    committed: Option<u64>,
    committed_before: Option<u64>,
    /// Newest step that a generation went on from, or the next one will.
    reached: Option<u64>,
    no_progress: u32,
    /// Restarts of the last hour.
    restarts: VecDeque<Instant>,
    /// Whether an earlier coordinator started these ranks, and may have told them to stop.
    has_adopted: bool,
    failures: Vec<Signature>,
    stop: Option<(String, Instant)>,
    is_stopped_now: bool,
    exit_by: Option<Instant>,
    progress: Option<Progress>,
    verdict: Option<(i32, String)>,
}

impl State {
    /// Before [`Event::Begin`]; the first generation will be `last_generation + 1`.
    pub fn new(policy: Policy, last_generation: u64) -> Self {
        let elastic = policy.elastic.as_ref();
        Self {
            num_ranks: policy.world_size,
            room: 0,
            growth: elastic.map(|elastic| Growth::new(elastic.pause)),
            is_growing: false,
            has_begun: elastic.is_some_and(|elastic| elastic.has_begun),
            policy,
            stage: Stage::Between,
            generation: last_generation,
            ranks: Vec::new(),
            num_exited: 0,
            num_out: 0,
            has_kept: false,
            has_stepped: false,
            then: None,
            causes: Vec::new(),
            committed: None,
            committed_before: None,
            reached: None,
            no_progress: 0,
            restarts: VecDeque::new(),
            has_adopted: false,
            failures: Vec::new(),
            stop: None,
            is_stopped_now: false,
            exit_by: None,
            progress: None,
            verdict: None,
        }
    }

    /// The current generation; the last one's number between two.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// What each rank is known to do, and its last step; empty before the first generation.
    pub fn ranks(&self) -> impl Iterator<Item = (RankState, Phase, Option<u64>)> + '_ {
        self.ranks.iter().map(|rank| (rank.state, rank.phase, rank.step))
    }

    /// Whether the ranks of a generation work, and none is known to have failed.
    pub fn is_working(&self) -> bool {
        matches!(self.stage, Stage::Working | Stage::Asking { .. })
    }

    /// Newest committed step.
    pub fn committed(&self) -> Option<u64> {
        self.committed
    }

    /// What the run does, in one word.
    pub fn name(&self) -> &'static str {
        match self.stage {
            Stage::Over => "over",
            _ if self.stop.is_some() => "stopping",
            Stage::Between => "starting",
            Stage::Working if self.ranks.iter().all(|rank| rank.state == RankState::Starting) => {
                "starting"
            }
            Stage::Working | Stage::Asking { .. } => "running",
            Stage::Settling { .. } | Stage::Ending { .. } | Stage::Killed { .. } => "restarting",
        }
    }

    /// When [`Event::Tick`] is next of use.
    pub fn next_tick(&self) -> Option<Instant> {
        match self.stage {
            Stage::Settling { until } | Stage::Asking { until } => Some(until),
            Stage::Ending { kill_at } => Some(kill_at),
            Stage::Killed { tell_at, .. } => Some(tell_at),
            Stage::Working => {
                let stalled = self.progress.as_ref().map(Progress::deadline);
                [self.late_at(), stalled].into_iter().flatten().min()
            }
            Stage::Between | Stage::Over => None,
        }
    }

    /// When ranks that work count as late in coming to their end.
    fn late_at(&self) -> Option<Instant> {
        let stop_by = self.stop.as_ref().map(|(_, since)| *since + self.policy.stop);
        [stop_by, self.exit_by].into_iter().flatten().min()
    }

    /// Takes an event in; returns what is to be done.
    pub fn handle(&mut self, event: Event, now: Instant) -> Vec<Action> {
        if self.stage == Stage::Over {
            return Vec::new();
        }
        match event {
            Event::Begin { committed } => {
                self.committed = committed;
                vec![Action::FindCheckpoint]
            }
            Event::Adopted { committed, num_ranks } => self.adopted(committed, num_ranks, now),
            Event::WasAway { time } => {
                if let Some(progress) = &mut self.progress {
                    progress.was_away(time, now);
                }
                Vec::new()
            }
            Event::Found { step, is_committed } => self.found(step, is_committed, now),
            Event::Gathered { step, num_ranks } => self.gathered(step, num_ranks, now),
            Event::Room { num_ranks } => {
                self.room = num_ranks;
                Vec::new()
            }
            Event::Broken { code, reason } => self.broken(code, reason, now),
            Event::Step { rank, step } => self.stepped(rank, step, now),
            Event::Phase { rank, phase } => self.entered(rank, phase, now),
            Event::Committed { step } => self.has_committed(step, now),
            Event::Here { rank, position } => self.is_here(rank, position, now),
            Event::Reported { rank, report } => self.reported(rank, report),
            Event::Released { rank } => self.released(rank, now),
            Event::Finished { rank } => self.finished(rank, now),
            Event::Exited { rank, exit, last_lines } => self.exited(rank, exit, last_lines, now),
            Event::Stop { by } => self.asked_to_stop(by, now),
            Event::RankAskedToStop { rank, signal } => self.rank_asked_to_stop(rank, &signal, now),
            Event::StopNow { by } => self.stopped_now(by, now),
            Event::Tick => self.tick(now),
        }
    }

    fn found(&mut self, step: Option<u64>, is_committed: bool, now: Instant) -> Vec<Action> {
        if self.stage != Stage::Between {
            return Vec::new();
        }
        let committed = step.filter(|_| is_committed);
        if let Some((by, _)) = self.stop.clone() {
            self.committed = self.committed.max(committed);
            return self.over_between(&by, now);
        }
        if let (None, Some(committed)) = (step, self.committed) {
            let reason = format!(
                "no good checkpoint is left, though step {committed} was committed; \
                 not starting from zero"
            );
            return self.over(exit_code::FAILED, reason, now);
        }
        // A rank may end after the commit and before it tells of it.
        if committed > self.committed {
            (self.committed, self.no_progress) = (committed, 0);
        }
        // What was kept in memory was done, too.
        if step > self.reached {
            (self.reached, self.no_progress) = (step, 0);
        }
        if !self.policy.has_agents {
            return self.gathered(step, self.num_ranks, now);
        }
        // Nodes that never were there are waited for as long as any.
        let elastic = self.policy.elastic.as_ref().filter(|_| self.has_begun);
        let fewer_after = elastic.map(|elastic| elastic.wait);
        vec![Action::Gather { step, num_ranks: self.num_ranks, fewer_after }]
    }

    fn gathered(&mut self, step: Option<u64>, num_ranks: usize, now: Instant) -> Vec<Action> {
        if self.stage != Stage::Between {
            return Vec::new();
        }
        if num_ranks < self.num_ranks
            && let Some(growth) = &mut self.growth
        {
            growth.shrunk(now);
        }
        self.generation += 1;
        let kept = self.kept(num_ranks);
        self.work(num_ranks, now);
        self.has_kept = !kept.is_empty();
        vec![Action::Spawn { generation: self.generation, resume_step: step, kept }]
    }

    fn adopted(&mut self, committed: Option<u64>, num_ranks: usize, now: Instant) -> Vec<Action> {
        if self.stage == Stage::Between {
            self.committed = committed;
            self.work(num_ranks, now);
            self.has_adopted = true;
        }
        Vec::new()
    }

    fn work(&mut self, num_ranks: usize, now: Instant) {
        (self.num_ranks, self.has_begun) = (num_ranks, true);
        self.committed_before = self.committed;
        self.has_adopted = false;
        self.causes.clear();
        self.exit_by = None;
        self.progress = Some(match self.progress.take() {
            Some(progress) => progress.again(now),
            None => Progress::new(self.policy.hang, now),
        });
        let rank = Rank {
            state: RankState::Starting,
            phase: Phase::Init,
            step: None,
            report: None,
            position: None,
            is_suspect: false,
        };
        self.ranks = vec![rank; num_ranks];
        (self.num_exited, self.num_out) = (0, 0);
        (self.has_kept, self.has_stepped) = (false, false);
        self.stage = Stage::Working;
    }

    /// Ranks that were not started count as gone; those that were are killed.
    fn broken(&mut self, code: i32, reason: String, now: Instant) -> Vec<Action> {
        if self.stage == Stage::Between {
            return self.over(code, reason, now);
        }
        self.verdict.get_or_insert((code, reason.clone()));
        let mut actions = self.kill(reason, now);
        actions.extend(self.if_all_gone(now));
        actions
    }

    fn stepped(&mut self, rank: usize, step: u64, now: Instant) -> Vec<Action> {
        if let Some(progress) = &mut self.progress {
            progress.stepped(step, now);
        }
        self.has_stepped = true;
        self.moves();
        if let Some(rank) = self.ranks.get_mut(rank) {
            rank.step = Some(step);
            if rank.state == RankState::Starting {
                rank.state = RankState::Running;
            }
        }
        Vec::new()
    }

    fn entered(&mut self, rank: usize, phase: Phase, now: Instant) -> Vec<Action> {
        if let Some(progress) = &mut self.progress {
            progress.entered(phase, now);
        }
        self.moves();
        if let Some(rank) = self.ranks.get_mut(rank) {
            rank.phase = phase;
        }
        Vec::new()
    }

    /// It was no hang after all.
    fn moves(&mut self) {
        if matches!(self.stage, Stage::Asking { .. }) {
            self.stage = Stage::Working;
        }
    }

    fn is_here(&mut self, rank: usize, position: Position, now: Instant) -> Vec<Action> {
        if let Some(rank) = self.ranks.get_mut(rank) {
            rank.position = Some(position);
        }
        let is_known = |rank: &Rank| rank.position.is_some() || rank.state.is_out();
        match self.stage {
            Stage::Asking { .. } if self.ranks.iter().all(is_known) => self.hung(now),
            _ => Vec::new(),
        }
    }

    fn reported(&mut self, rank: usize, report: FailureReport) -> Vec<Action> {
        if let Some(rank) = self.ranks.get_mut(rank) {
            rank.report = Some(report);
        }
        Vec::new()
    }

    fn finished(&mut self, rank: usize, now: Instant) -> Vec<Action> {
        // What a rank says is nothing once it is out.
        let alive = self.ranks.get_mut(rank).filter(|rank| !rank.state.is_out());
        if let Some(rank) = alive {
            rank.state = RankState::Finished;
            self.exit_by.get_or_insert(now + self.policy.exit);
        }
        Vec::new()
    }

    /// A rank that is told to end gets a signal, too; one whose process waits does not.
    fn rank_asked_to_stop(&mut self, rank: usize, signal: &str, now: Instant) -> Vec<Action> {
        let waits = self.ranks.get(rank).is_some_and(|rank| rank.state == RankState::Released);
        match self.stage {
            Stage::Working | Stage::Asking { .. } => {}
            Stage::Between if waits => {}
            _ => return Vec::new(),
        }
        self.asked_to_stop(format!("{signal} to rank {rank}"), now)
    }

    fn asked_to_stop(&mut self, by: String, now: Instant) -> Vec<Action> {
        if self.stop.is_some() {
            return Vec::new();
        }
        self.stop = Some((by.clone(), now));
        let mut actions = vec![Action::RecordStop { by: by.clone(), now: false }];
        match self.stage {
            Stage::Working | Stage::Asking { .. } => actions.push(Action::AskToStop),
            // The next generation does not start; see `found` and `judge`.
            _ if self.stage == Stage::Between => actions.extend(self.over_between(&by, now)),
            _ => {}
        }
        actions
    }

    fn stopped_now(&mut self, by: String, now: Instant) -> Vec<Action> {
        if self.is_stopped_now {
            return Vec::new();
        }
        self.is_stopped_now = true;
        let reason = format!("stopped at once by {by}");
        let mut actions = vec![Action::RecordStop { by, now: true }];
        self.verdict = Some((exit_code::INTERRUPTED, reason.clone()));
        if self.stage == Stage::Between {
            actions.extend(self.over(exit_code::INTERRUPTED, reason, now));
            return actions;
        }
        actions.extend(self.kill(reason, now));
        actions
    }

    fn tick(&mut self, now: Instant) -> Vec<Action> {
        if self.next_tick().is_none_or(|at| now < at) {
            return Vec::new();
        }
        match self.stage {
            Stage::Settling { .. } => {
                let reason = Cause::first(&self.causes).map(Cause::summary).unwrap_or_default();
                self.end(reason, now)
            }
            Stage::Ending { .. } => {
                let seconds = self.policy.grace.as_secs_f64();
                self.kill(format!("still there {seconds} s after they were told"), now)
            }
            Stage::Asking { .. } => self.hung(now),
            Stage::Working if self.late_at().is_none_or(|at| now < at) => self.stalled(now),
            Stage::Working => {
                let late = self.ranks.iter().position(|rank| !rank.state.is_out());
                let what = match self.exit_by.is_some_and(|by| now >= by) {
                    true => "did not exit after the last step",
                    false => "did not stop in time",
                };
                let rank = late.unwrap_or(0);
                self.causes.extend(self.ranks.get_mut(rank).map(|late| {
                    late.is_suspect = true;
                    let line = format!("rank {rank} {what}");
                    let cause = Cause::hang(rank, late.phase, late.step, line);
                    Cause { is_guess: true, ..cause }
                }));
                self.end(format!("rank {rank} {what}"), now)
            }
            Stage::Killed { since, .. } => {
                self.stage = Stage::Killed { since, tell_at: now + LINGER };
                let (ranks, time) = (self.awaited(), now.saturating_duration_since(since));
                vec![Action::RecordLingering { ranks, time }]
            }
            Stage::Between | Stage::Over => Vec::new(),
        }
    }

    fn stalled(&mut self, now: Instant) -> Vec<Action> {
        let stall = self.progress.as_ref().and_then(|progress| progress.stall(now));
        let Some(stall) = stall else { return Vec::new() };
        self.stage = Stage::Asking { until: now + ASKING };
        self.ranks.iter_mut().for_each(|rank| rank.position = None);
        vec![Action::RecordStall(stall), Action::AskWhere]
    }

    /// Ranks have said where they are, or not: those that hold the others up have failed.
    fn hung(&mut self, now: Instant) -> Vec<Action> {
        let alive: Vec<usize> =
            (0..self.ranks.len()).filter(|rank| !self.ranks[*rank].state.is_out()).collect();
        let positions: Vec<Option<Position>> =
            alive.iter().map(|rank| self.ranks[*rank].position.clone()).collect();
        let mut suspects = suspects(&positions);
        let is_guess = suspects.is_empty();
        if is_guess {
            let waits = positions.iter().flatten().find_map(|position| position.waits.first());
            let line = waits.map_or("it does not move".to_owned(), |waits| {
                format!("all ranks wait, this one in {waits}")
            });
            suspects.push((0, line));
        }
        let mut actions = Vec::new();
        for (at, line) in suspects {
            let Some(&index) = alive.get(at) else { continue };
            let rank = &mut self.ranks[index];
            rank.is_suspect = true;
            let line = format!("rank {index} hangs: {line}");
            let cause = Cause::hang(index, rank.phase, rank.step, line);
            let cause = Cause { is_guess, ..cause };
            actions.push(Action::RecordFailure(cause.clone()));
            self.causes.push(cause);
        }
        let reason = Cause::first(&self.causes).map(Cause::summary).unwrap_or_default();
        actions.extend(self.end(reason, now));
        actions
    }
}
