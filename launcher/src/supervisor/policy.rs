//! What the supervisor's policy is told and what it answers.

use super::cause::{Cause, Exit};
use super::stall::Stall;
use rank_protocol::{FailureReport, Phase, Position, RollBack, STORAGE_TIMEOUT};
use std::time::Duration;

/// The limits that the policy goes by.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Number of ranks.
    pub world_size: usize,
    /// Consecutive generations with no new committed step after which the run gives up.
    pub max_no_progress: u32,
    /// Restarts within an hour after which the run gives up, wherever it got to.
    pub max_per_hour: u32,
    /// Consecutive generations that failed alike after which trying again is of no use.
    pub max_same_failure: u32,
    /// After failures that are consequences alone (lost links), the wait for their cause.
    pub concurrent_faults: Duration,
    /// After any other, the wait for more of the same moment.
    pub same_moment: Duration,
    /// Between asking ranks to end (abort, SIGTERM) or to let go, and SIGKILL.
    pub grace: Duration,
    /// Longest time a stop may take: finish the step, write what is being saved, and save.
    pub stop: Duration,
    /// Longest time ranks may take to exit once the first has finished.
    pub exit: Duration,
    /// Least silence of all ranks that is a hang; more, where steps and phases take long.
    pub hang: Duration,
    /// Whether ranks were told a step after which to stop by themselves.
    pub has_last_step: bool,
    /// Whether there are agents: nodes are gathered before each generation, and one that is lost
    /// is replaced.
    pub has_agents: bool,
    /// How the run goes on while nodes are missing; `None`: it waits for them.
    pub elastic: Option<Elastic>,
    /// Whether ranks that are well keep their processes when another fails.
    pub keep_processes: bool,
}

/// How a run goes on while nodes are missing: with fewer ranks.
#[derive(Clone, Debug)]
pub struct Elastic {
    /// Wait for another node in place of a lost one.
    pub wait: Duration,
    /// Least time between two returns to more ranks.
    pub pause: Duration,
    /// The run's last step, after which there is nothing to return for.
    pub last_step: u64,
    /// Whether nodes that are absent from the first generation on are lost: another launcher had
    /// them.
    pub has_begun: bool,
}

impl Policy {
    /// The usual limits.
    pub fn new(world_size: usize, max_no_progress: u32) -> Self {
        Self {
            world_size,
            max_no_progress: max_no_progress.max(1),
            max_per_hour: u32::MAX,
            max_same_failure: 3,
            concurrent_faults: Duration::from_secs(1),
            same_moment: Duration::from_millis(20),
            grace: Duration::from_secs(5),
            stop: STORAGE_TIMEOUT + Duration::from_secs(10 * 60),
            exit: Duration::from_secs(60),
            hang: Duration::from_secs(30),
            has_last_step: false,
            has_agents: false,
            elastic: None,
            keep_processes: false,
        }
    }

    /// With limits that outlast a `wait` of ranks for one another: whoever waits for a peer that
    /// stalls has told of it before it counts as late itself.
    #[must_use]
    pub fn outlasting(self, wait: Duration) -> Self {
        let (stop, exit) = (self.stop.max(wait + self.exit), self.exit.max(wait + self.grace));
        Self { stop, exit, ..self }
    }
}

/// What the policy is told.
#[derive(Clone, Debug)]
pub enum Event {
    /// The run begins; `committed` is the newest step saved by earlier launchers.
    Begin {
        /// Newest committed step.
        committed: Option<u64>,
    },
    /// In place of it: the ranks of the last generation, which another launcher started, go on.
    Adopted {
        /// Newest committed step.
        committed: Option<u64>,
        /// How many there are.
        num_ranks: usize,
    },
    /// The launcher itself did not run for so long: stopped, or the machine asleep.
    WasAway {
        /// The time.
        time: Duration,
    },
    /// The search for a checkpoint ended with this step.
    Found {
        /// Step to continue from; `None`: there is no checkpoint.
        step: Option<u64>,
        /// Whether it lies where it outlives the launcher.
        is_committed: bool,
    },
    /// The nodes of the next generation are there.
    Gathered {
        /// Step to continue from, as it was found.
        step: Option<u64>,
        /// Ranks that find room on them.
        num_ranks: usize,
    },
    /// The nodes that are there now have room for so many ranks.
    Room {
        /// Ranks.
        num_ranks: usize,
    },
    /// The search or the start of a rank failed in a way that trying again does not mend.
    Broken {
        /// Exit code that follows.
        code: i32,
        /// Why.
        reason: String,
    },
    /// A rank did a step.
    Step {
        /// Rank.
        rank: usize,
        /// 1-based step.
        step: u64,
    },
    /// A rank entered a phase.
    Phase {
        /// Rank.
        rank: usize,
        /// What it does from now on.
        phase: Phase,
    },
    /// A checkpoint is durable.
    Committed {
        /// Its step.
        step: u64,
    },
    /// A rank says where it is, after [`Action::AskWhere`].
    Here {
        /// Rank.
        rank: usize,
        /// Where.
        position: Position,
    },
    /// A rank says why it is about to fail.
    Reported {
        /// Rank.
        rank: usize,
        /// Why.
        report: FailureReport,
    },
    /// A rank holds nothing of the generation any more; its process waits for the next one.
    Released {
        /// Rank.
        rank: usize,
    },
    /// A rank has done and saved the last step.
    Finished {
        /// Rank.
        rank: usize,
    },
    /// A rank's process ended.
    Exited {
        /// Rank.
        rank: usize,
        /// How.
        exit: Exit,
        /// The last lines it wrote, for a cause that it did not report.
        last_lines: Vec<String>,
    },
    /// Someone asks the run to stop: finish the step, save.
    Stop {
        /// Who, in words.
        by: String,
    },
    /// A rank got a signal that asks it to stop. So it does when its process is told to end, which
    /// counts for nothing.
    RankAskedToStop {
        /// Rank.
        rank: usize,
        /// The signal's name.
        signal: String,
    },
    /// Someone wants it stopped at once.
    StopNow {
        /// Who, in words.
        by: String,
    },
    /// Time has passed.
    Tick,
}

/// What the executor shall do, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Look for the newest good checkpoint; answer with [`Event::Found`].
    FindCheckpoint,
    /// Find nodes for a generation; answer with [`Event::Gathered`].
    Gather {
        /// Step to continue from.
        step: Option<u64>,
        /// Ranks that must find room; more, where there is room.
        num_ranks: usize,
        /// Wait after which fewer will do; `None`: as long as any node is waited for.
        fewer_after: Option<Duration>,
    },
    /// Start all ranks.
    Spawn {
        /// Generation.
        generation: u64,
        /// Step to continue from.
        resume_step: Option<u64>,
        /// Ranks that go on in their processes, which wait; the others are started.
        kept: Vec<usize>,
    },
    /// Ask every rank to finish its step, save and exit with 75.
    AskToStop,
    /// Tell ranks that the generation is over and their processes end, and send SIGTERM.
    Abort {
        /// Why.
        reason: String,
        /// Which.
        ranks: Vec<usize>,
    },
    /// Tell ranks that the generation is over, and that their processes stay; each answers with
    /// [`Event::Released`].
    Release {
        /// Why.
        reason: String,
        /// Which.
        ranks: Vec<usize>,
    },
    /// SIGKILL ranks' process groups.
    Kill {
        /// Why.
        reason: String,
        /// Which.
        ranks: Vec<usize>,
    },
    /// A rank failed: write its error file and event.
    RecordFailure(Cause),
    /// The generation ends because nodes are there again: note it.
    RecordGrowth {
        /// Ranks of the generation.
        from: usize,
        /// Ranks for which there is room.
        to: usize,
    },
    /// This was the first cause of the generation's end.
    RecordFirstCause(Cause),
    /// The run goes back behind a step, whose samples are left out from now on.
    RecordRollBack(RollBack),
    /// Someone asked to stop.
    RecordStop {
        /// Who, in words.
        by: String,
        /// Whether at once, with nothing saved.
        now: bool,
    },
    /// Nothing has moved for long.
    RecordStall(Stall),
    /// These ranks were killed so long ago and are not gone.
    RecordLingering {
        /// The ranks.
        ranks: Vec<usize>,
        /// Since when.
        time: Duration,
    },
    /// Ask every rank where it is.
    AskWhere,
    /// All is over and every process is gone.
    Finish {
        /// Exit code.
        code: i32,
        /// Why.
        reason: String,
    },
}

/// What a rank is known to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RankState {
    /// Started, no step yet.
    Starting,
    /// Training.
    Running,
    /// Has done the last step.
    Finished,
    /// Holds nothing of the generation; its process waits for the next one.
    Released,
    /// Exited with 75 after a stop.
    Stopped,
    /// Exited with 0 after the last step.
    Done,
    /// Exited otherwise.
    Failed,
}

impl RankState {
    /// The name it is shown as.
    pub fn name(self) -> &'static str {
        match self {
            RankState::Starting => "starting",
            RankState::Running => "running",
            RankState::Finished => "finished",
            RankState::Released => "released",
            RankState::Stopped => "stopped",
            RankState::Done => "done",
            RankState::Failed => "failed",
        }
    }

    /// Whether its process is gone.
    pub fn has_exited(self) -> bool {
        matches!(self, RankState::Stopped | RankState::Done | RankState::Failed)
    }

    /// Whether it has no part in its generation any more.
    pub fn is_out(self) -> bool {
        self == RankState::Released || self.has_exited()
    }
}
