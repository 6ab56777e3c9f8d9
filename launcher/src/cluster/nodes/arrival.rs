//! Agents that have shown the token: who is let in, and where the conversation with each goes on.

use super::{Conversation, Happening, NUM_KEPT, Nodes, Outcome};
use crate::cluster::members::{Joined, NodeId};
use crate::cluster::server::Arrival;
use crate::cluster::wire;
use rank_protocol::agent::{Answer, ToAgent};
use rank_protocol::session::{Numbered, Session, SessionError};
use serde_json::json;
use std::net::SocketAddr;
use std::time::Instant;
use tokio::net::TcpStream;
use tokio::task::spawn_local;
use tokio_rustls::server::TlsStream;

impl Nodes {
    /// An agent has shown the token: it joins, or goes on with its conversation.
    pub(super) fn arrived(&mut self, arrival: Arrival, now: Instant) -> Vec<Outcome> {
        let Arrival { join, from, stream } = arrival;
        let name = join.node.name.clone();
        self.is_reached(from, &stream);
        if let Some(reason) = other_build(&join.node.build) {
            tracing::error!("node {name} ({from}) was refused: {reason}");
            spawn_local(refuse(stream, reason));
            return Vec::new();
        }
        if let Some((reason, outcomes)) = self.unwell(&join) {
            spawn_local(answer(stream, Answer::Unhealthy { reason }));
            return outcomes;
        }
        let (node, is_new) = match self.members.join(join.node, now) {
            Joined::New(node) => (node, true),
            Joined::Again(node) => (node, false),
            Joined::Replaced => {
                let reason = format!("another agent named {name} has taken this one's place");
                spawn_local(refuse(stream, format!("{reason}; hint: --name")));
                return Vec::new();
            }
        };
        let (welcome, again) = match self.resume(node, (join.conversation, join.taken)) {
            Ok(first) => first,
            Err(error) => {
                // No refusal, which would be for good: it joins once more, and begins anew.
                tracing::error!("node {name} ({from}) speaks nonsense: {error}");
                self.conversations.remove(&node);
                return Vec::new();
            }
        };
        self.num_connections += 1;
        let connection = self.num_connections;
        let said = move |frame| {
            let at = Instant::now();
            Happening::Said { node, connection, at, frame: Box::new(frame) }
        };
        let ended = move |why| Happening::Ended { node, connection, why };
        let happenings = self.happenings.clone();
        let first = (Some(welcome), again);
        let outbox = wire::talk(stream, first, happenings, said, ended);
        if let Some(conversation) = self.conversations.get_mut(&node) {
            (conversation.connection, conversation.outbox) = (connection, Some(outbox));
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
    fn is_reached(&mut self, from: SocketAddr, stream: &TlsStream<TcpStream>) {
        if let (false, Ok(local)) = (from.ip().is_loopback(), stream.get_ref().0.local_addr()) {
            self.reached_at = Some(local.ip());
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

async fn refuse(stream: TlsStream<TcpStream>, reason: String) {
    answer(stream, Answer::Refused { reason }).await;
}

async fn answer(mut stream: TlsStream<TcpStream>, answer: Answer) {
    let _ = wire::write(&mut stream, &answer).await;
}
