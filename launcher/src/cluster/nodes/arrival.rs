//! Agents that have shown the token: who is let in, and where the conversation with each goes on.

use super::{Conversation, NUM_KEPT, Nodes, Outcome};
use crate::cluster::members::{Joined, NodeId};
use crate::cluster::server::{Arrival, Door};
use rank_protocol::agent::{Answer, ToAgent};
use rank_protocol::session::{Numbered, Session, SessionError};
use serde_json::json;
use std::net::SocketAddr;
use std::time::Instant;

impl Nodes {
    /// An agent has shown the token: it joins, or goes on with its conversation.
    pub(super) fn arrived(&mut self, arrival: Arrival, now: Instant) -> Vec<Outcome> {
        let Arrival { join, from, door } = arrival;
        let name = join.node.name.clone();
        self.is_reached(from, &*door);
        if let Some(reason) = other_build(&join.node.build) {
            tracing::error!("node {name} ({from}) was refused: {reason}");
            door.close(Answer::Refused { reason });
            return Vec::new();
        }
        if let Some((reason, outcomes)) = self.unwell(&join) {
            door.close(Answer::Unhealthy { reason });
            return outcomes;
        }
        let (node, is_new) = match self.members.join(join.node, now) {
            Joined::New(node) => (node, true),
            Joined::Again(node) => (node, false),
            Joined::Taken => {
                let reason = format!("another machine named {name} belongs to the run");
                tracing::error!("node {name} ({from}) was refused: {reason}");
                door.close(Answer::Refused { reason: format!("{reason}; hint: --name") });
                return Vec::new();
            }
            Joined::Replaced => {
                let why = format!("another agent named {name} has taken this one's place");
                door.close(Answer::Refused { reason: format!("{why}; hint: --name") });
                return Vec::new();
            }
        };
        let (welcome, again) = match self.resume(node, (join.conversation, join.taken)) {
            Ok(first) => first,
            Err(error) => {
                // No refusal, which would be for good: it joins once more, and begins anew.
                tracing::error!("node {name} ({from}) speaks nonsense: {error}");
                self.begin_anew(node);
                return Vec::new();
            }
        };
        self.num_connections += 1;
        let connection = self.num_connections;
        let happenings = self.happenings.clone();
        let outbox = door.open((welcome, again), (node, connection), happenings);
        if let Some(conversation) = self.conversations.get_mut(&node) {
            (conversation.connection, conversation.outbox) = (connection, Some(outbox));
        }
        if let Some(but) = self.memories.joined(node, join.door, join.bundles) {
            self.send(node, ToAgent::Forget { but });
        }
        if let Some(running) = join.running.filter(|_| is_new) {
            match self.adopting == Some(running.generation) {
                true => drop(self.running.insert(node, running)),
                // Ranks of a node that was given up belong to nobody.
                false => self.kill(node, &running),
            }
        }
        if !is_new {
            tracing::info!("node {name} is connected again");
            return Vec::new();
        }
        tracing::info!("node {name} ({from}) has joined: {} in all", self.members.num_alive());
        let fields = json!({ "node": name, "address": self.address_of(node) });
        vec![Outcome::Event("node_joined", fields)]
    }

    /// Notes at which address an agent elsewhere reaches this machine.
    fn is_reached(&mut self, from: SocketAddr, door: &dyn Door) {
        if !from.ip().is_loopback() {
            self.reached_at = door.local_address().or(self.reached_at);
        }
    }

    /// The answer to an agent that has had this conversation and taken in so much, and what is sent
    /// to it again.
    fn resume(
        &mut self,
        node: NodeId,
        (number, mut taken): (u64, u64),
    ) -> Result<(Answer, Vec<Numbered<ToAgent>>), SessionError> {
        let conversation = self.conversations.entry(node).or_insert_with(|| Conversation {
            number: 0,
            session: Session::new(NUM_KEPT),
            connection: 0,
            outbox: None,
        });
        if number != conversation.number || conversation.number == 0 {
            // What was said before counts from the start again, on both sides.
            conversation.session.other_side_is_new(|_| true);
            conversation.number = self.next_conversation;
            self.next_conversation += 1;
            taken = 0;
        }
        let again = conversation.session.resume(taken)?;
        let (conversation, taken) = (conversation.number, conversation.session.taken());
        Ok((Answer::Welcome { conversation, taken, epoch: self.epoch }, again))
    }
}

/// Why an agent of this build does not fit.
fn other_build(build: &str) -> Option<String> {
    let ours = env!("CARGO_PKG_VERSION");
    (build != ours).then(|| format!("the agent is of build {build}, the coordinator of {ours}"))
}
