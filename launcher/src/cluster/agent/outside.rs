//! What an agent has others do: reaching the coordinator, starting ranks, looking at the run.

use super::connect::{self, Attempt, Connected, Whereabouts};
use super::trainer::Trainer;
use super::{Happening, Talk};
use crate::cluster::depot::{Command, Depot, News};
use crate::cluster::wire;
use crate::runs;
use crate::supervisor::rank::{Input, RankHandle};
use rank_protocol::agent::{FromAgent, Join};
use rank_protocol::bundle::Door;
use rank_protocol::session::Numbered;
use rank_protocol::{Assignment, RunDir};
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::spawn_local;

/// Longest time that an attempt to connect may take.
pub const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);

/// All that an agent does beside deciding.
pub trait Outside {
    /// Tries once to reach a coordinator of this epoch or a later one, and says what came of it by
    /// a [`Happening`].
    fn connect(&self, join: Join, least_epoch: u64);

    /// Whether a store knows who the coordinator is.
    fn asks_a_store(&self) -> bool;

    /// Asks it, and says what it answers by a [`Happening`].
    fn look_for_another(&self);

    /// Starts a rank.
    ///
    /// # Errors
    /// Why it cannot be started.
    fn start(&self, assignment: Assignment) -> Result<RankHandle, String>;

    /// Ranks for which trainers may be started before they have a place; 0: none.
    fn num_spares(&self) -> usize;

    /// Starts such a trainer, for the `local_rank`-th place of this node; it counts as the rank of
    /// that number, of generation 0.
    ///
    /// # Errors
    /// Why it cannot be started.
    fn warm_up(&self, local_rank: usize) -> Result<RankHandle, String>;

    /// Where other agents reach this node's memory, where checkpoints are kept in it.
    fn door(&self) -> Option<Door>;

    /// The folder there into which its ranks write.
    fn memory_dir(&self) -> Option<PathBuf>;

    /// Has whoever cares for it do something; where that is not taken in, what it comes to.
    fn order(&self, command: Command) -> Option<News>;

    /// Whether a coordinator works on the run.
    fn has_coordinator(&self) -> bool;

    /// How the run ended, where it has.
    fn end_of_run(&self) -> Option<(i32, String)>;
}

/// This machine, and the run's folder on it.
pub struct Machine {
    /// The run.
    pub run: RunDir,
    /// Where the coordinator is found.
    pub whereabouts: Whereabouts,
    /// As in [`super::AgentArgs`].
    pub after: Option<String>,
    /// What ranks are started from.
    pub trainer: Trainer,
    /// What keeps checkpoints in memory.
    pub depot: Option<Depot>,
    /// Whether trainers are started before they have a place.
    pub warms_up: bool,
    /// Takes what ranks say.
    pub inputs: mpsc::Sender<Input>,
    /// Takes what happens on the connection.
    pub happenings: mpsc::Sender<Happening>,
}

impl Outside for Machine {
    fn connect(&self, join: Join, least_epoch: u64) {
        let (run, whereabouts) = (self.run.clone(), self.whereabouts.clone());
        let attempt = connect::attempt(run, whereabouts, least_epoch, join);
        let happenings = self.happenings.clone();
        spawn_local(async move {
            let attempt = tokio::time::timeout(ATTEMPT_TIMEOUT, attempt).await;
            let happening = match attempt {
                Ok(Ok(Attempt::Connected(connected))) => begun(*connected, happenings.clone()),
                Ok(Ok(Attempt::Refused(code, why))) => Happening::Refused { code, why },
                Ok(Err(error)) => Happening::Failed { why: error.to_string() },
                Err(_) => Happening::Failed { why: "no answer".into() },
            };
            let _ = happenings.send(happening).await;
        });
    }

    fn asks_a_store(&self) -> bool {
        matches!(self.whereabouts, Whereabouts::Store(_))
    }

    fn look_for_another(&self) {
        let (whereabouts, happenings) = (self.whereabouts.clone(), self.happenings.clone());
        spawn_local(async move {
            // A store that does not answer says nothing.
            if let Ok(Some((epoch, _))) = whereabouts.holder().await {
                let _ = happenings.send(Happening::Seen { epoch }).await;
            }
        });
    }

    fn start(&self, assignment: Assignment) -> Result<RankHandle, String> {
        self.trainer.start(assignment, self.inputs.clone())
    }

    fn num_spares(&self) -> usize {
        if self.warms_up { self.trainer.ranks() } else { 0 }
    }

    fn warm_up(&self, local_rank: usize) -> Result<RankHandle, String> {
        self.trainer.warm_up(&self.run, local_rank, self.inputs.clone())
    }

    fn door(&self) -> Option<Door> {
        self.depot.as_ref().map(|depot| depot.door().clone())
    }

    fn memory_dir(&self) -> Option<PathBuf> {
        self.depot.as_ref().map(|depot| depot.bundles().to_path_buf())
    }

    fn order(&self, command: Command) -> Option<News> {
        self.depot.as_ref()?.order(command)
    }

    fn has_coordinator(&self) -> bool {
        runs::holder(&self.run).is_some()
    }

    fn end_of_run(&self) -> Option<(i32, String)> {
        let history = runs::history(&self.run).ok()?;
        history.end.filter(|_| self.after.as_ref() != Some(&history.started))
    }
}

fn begun(connected: Connected, happenings: mpsc::Sender<Happening>) -> Happening {
    let Connected { conversation, taken, epoch, stream } = connected;
    let talk: Talk = Box::new(move |connection, again: Vec<Numbered<FromAgent>>| {
        let first: (Option<()>, _) = (None, again);
        let said = move |frame| Happening::Said { connection, frame: Box::new(frame) };
        let ended = move |why| Happening::Ended { connection, why };
        wire::talk(stream, first, happenings, said, ended)
    });
    Happening::Connected { conversation, taken, epoch, talk }
}
