//! The agent's part for its connection: found, lost, found again, with the same coordinator or with
//! another.

use super::{Agent, LOOK, RETRY, SILENCE, STORE_RETRY, Talk};
use rank_protocol::FromRank;
use rank_protocol::agent::{FromAgent, Join, Running};
use std::time::Duration;

impl Agent {
    pub(super) fn lost(&mut self, why: &str) {
        self.outbox = None;
        self.next_attempt = self.now + self.retry();
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
            door: self.outside.door(),
            bundles: self.kept.holding.clone(),
        };
        self.outside.connect(join, self.epoch);
    }

    pub(super) fn retry(&self) -> Duration {
        if self.outside.asks_a_store() { STORE_RETRY } else { RETRY }
    }

    /// Whether another coordinator has taken over from one that is still connected.
    pub(super) fn look_for_another(&mut self) {
        self.next_look = self.now + LOOK;
        if self.outside.asks_a_store() {
            self.outside.look_for_another();
        }
    }

    /// Whether the run was over before this node heard of it: then nobody comes any more.
    pub(super) fn look_for_the_end(&mut self) {
        let since = self.now.saturating_duration_since(self.looked);
        if since < SILENCE || self.outside.has_coordinator() {
            return;
        }
        self.looked = self.now;
        if let Some(end) = self.outside.end_of_run() {
            self.end = Some(end);
        }
    }

    pub(super) fn connected(&mut self, (conversation, taken): (u64, u64), epoch: u64, talk: Talk) {
        self.is_connecting = false;
        self.epoch = self.epoch.max(epoch);
        self.heard = self.now;
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
        self.outbox = Some(talk(self.connection, again));
        for message in std::mem::take(&mut self.unsaid).into_values() {
            self.tell(message);
        }
        self.tell_holds();
    }

    /// Another coordinator, or one that had given this node up: it knows nothing of what the ranks
    /// wrote into the store or wait for.
    fn begin_anew(&mut self, conversation: u64) {
        self.conversation = conversation;
        // What is told again below.
        let is_again = |message: &FromAgent| match message {
            FromAgent::Said { message, .. } => matches!(
                message,
                FromRank::Store { .. }
                    | FromRank::Failure(_)
                    | FromRank::Released
                    | FromRank::Finished { .. }
            ),
            FromAgent::Exited { .. } | FromAgent::Store { .. } => true,
            // What counts is what it has now.
            FromAgent::Holds { .. } => true,
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
