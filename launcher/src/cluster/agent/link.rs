//! The agent's part for its connection: found, lost, found again, with the same coordinator or with
//! another.

use super::connect::{self, Attempt, Connected, Whereabouts};
use super::{ATTEMPT_TIMEOUT, Agent, Happening, LOOK, RETRY, SILENCE, STORE_RETRY};
use crate::cluster::wire;
use crate::runs;
use rank_protocol::FromRank;
use rank_protocol::agent::{FromAgent, Join, Running};
use std::time::{Duration, Instant};
use tokio::task::spawn_local;

impl Agent {
    pub(super) fn lost(&mut self, why: &str) {
        self.outbox = None;
        self.next_attempt = Instant::now() + self.retry();
        if !self.has_told_loss {
            self.has_told_loss = true;
            tracing::warn!("the coordinator is away ({why}); the ranks go on");
        }
    }

    pub(super) fn connect(&mut self) {
        self.is_connecting = true;
        let running = Running {
            generation: self.generation,
            ranks: self.ranks.iter().map(|(rank, handle)| (*rank, handle.pid())).collect(),
            exited: self.exited.clone(),
        };
        let join = Join {
            token: String::new(),
            node: self.info.clone(),
            conversation: self.conversation,
            taken: self.session.taken(),
            running: (self.generation > 0).then_some(running),
        };
        let attempt =
            connect::attempt(self.run.clone(), self.whereabouts.clone(), self.epoch, join);
        let happenings = self.happenings.clone();
        spawn_local(async move {
            let attempt = tokio::time::timeout(ATTEMPT_TIMEOUT, attempt).await;
            let happening = match attempt {
                Ok(Ok(Attempt::Connected(connected))) => Happening::Connected(connected),
                Ok(Ok(Attempt::Refused(code, why))) => Happening::Refused { code, why },
                Ok(Err(error)) => Happening::Failed { why: error.to_string() },
                Err(_) => Happening::Failed { why: "no answer".into() },
            };
            let _ = happenings.send(happening).await;
        });
    }

    pub(super) fn retry(&self) -> Duration {
        if matches!(self.whereabouts, Whereabouts::Store(_)) { STORE_RETRY } else { RETRY }
    }

    /// Whether another coordinator has taken over from one that is still connected.
    pub(super) fn look_for_another(&mut self) {
        self.next_look = Instant::now() + LOOK;
        if !matches!(self.whereabouts, Whereabouts::Store(_)) {
            return;
        }
        let (whereabouts, happenings) = (self.whereabouts.clone(), self.happenings.clone());
        spawn_local(async move {
            // A store that does not answer says nothing.
            if let Ok(Some((epoch, _))) = whereabouts.holder().await {
                let _ = happenings.send(Happening::Seen { epoch }).await;
            }
        });
    }

    /// Whether the run was over before this node heard of it: then nobody comes any more.
    pub(super) fn look_for_the_end(&mut self) {
        if self.looked.elapsed() < SILENCE || runs::holder(&self.run).is_some() {
            return;
        }
        self.looked = Instant::now();
        if let Ok(history) = runs::history(&self.run)
            && let Some((code, reason)) = history.end
            && self.after.as_ref() != Some(&history.started)
        {
            self.end = Some((code, reason));
        }
    }

    pub(super) fn connected(&mut self, connected: Connected) {
        let Connected { conversation, taken, epoch, stream } = connected;
        self.is_connecting = false;
        self.epoch = self.epoch.max(epoch);
        self.heard = Instant::now();
        self.has_told_loss = false;
        if conversation != self.conversation {
            self.begin_anew(conversation);
        }
        let again = match self.session.resume(taken) {
            Ok(again) => again,
            Err(error) => return self.lost(&error.to_string()),
        };
        self.connection += 1;
        tracing::info!("node {} belongs to the run", self.info.name);
        let connection = self.connection;
        let first: (Option<()>, _) = (None, again);
        let said = move |frame| Happening::Said { connection, frame: Box::new(frame) };
        let ended = move |why| Happening::Ended { connection, why };
        self.outbox = Some(wire::talk(stream, first, self.happenings.clone(), said, ended));
        for message in std::mem::take(&mut self.unsaid).into_values() {
            self.tell(message);
        }
    }

    /// Another coordinator, or one that had given this node up: it knows nothing of what the ranks
    /// wrote into the store or wait for.
    fn begin_anew(&mut self, conversation: u64) {
        self.conversation = conversation;
        // What is told again below.
        let is_again = |message: &FromAgent| match message {
            FromAgent::Said { message, .. } => matches!(
                message,
                FromRank::Store { .. } | FromRank::Failure(_) | FromRank::Finished { .. }
            ),
            FromAgent::Exited { .. } | FromAgent::Store { .. } => true,
            _ => false,
        };
        self.session.other_side_is_new(|message| !is_again(message));
        let generation = self.generation;
        for requests in self.journal.done() {
            self.tell(FromAgent::Store { generation, requests });
        }
        for (rank, message) in self.journal.asked() {
            self.tell(FromAgent::Said { generation, rank, message });
        }
        let last_words: Vec<FromAgent> = self.last_words.values().flatten().cloned().collect();
        last_words.into_iter().for_each(|message| self.tell(message));
    }
}
