//! The coordinator's side: who the nodes are, a conversation with each, and the ranks that they
//! run. Every change passes through the supervisor's loop.

use super::members::{Change, Limits, Members, NodeId, Seek};
use super::remote::Commands;
use super::secrets;
use super::server::{Arrival, serve};
use super::sizes::{Size, Sizes};
use super::wire;
use crate::supervisor::cause::Exit;
use crate::supervisor::rank::{Input, News};
use memory::Memories;
use rank_protocol::agent::{ALIVE_EVERY_MS, FromAgent, Running, ToAgent};
use rank_protocol::session::{Numbered, Session};
use rank_protocol::store::StoreRequest;
use rank_protocol::{FailureClass, FailureReport, FromRank, Phase, RunDir, exit_code};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::spawn_local;

mod adoption;
mod arrival;
mod health;
mod memory;
mod starting;

pub use memory::Keeping;

/// A sign of life that is given so much too late shows that this process was not running.
const PAUSE: Duration = Duration::from_secs(1);
/// Messages to an agent that are kept until it has taken them in.
const NUM_KEPT: usize = 64 << 10;
/// What happened on all connections and waits for the loop.
const NUM_HAPPENINGS: usize = 4096;

/// Longest time in which all agents are told that the run is over.
const LAST_WAIT: Duration = Duration::from_secs(2);

/// How a coordinator is reached, and by how many nodes.
#[derive(Clone, Debug)]
pub struct ClusterPlan {
    /// Where it listens.
    pub listen: SocketAddr,
    /// The host name or address that agents connect to; `None`: where it listens.
    pub host: Option<String>,
    /// The nodes, and with how many fewer it may go on.
    pub sizes: Sizes,
    /// Ranks on each node.
    pub ranks_per_node: usize,
}

/// `cluster/coordinator.json`: where agents find the coordinator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// Host name or address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// Its process id.
    pub pid: u32,
}

/// What happened on a connection.
pub enum Happening {
    /// An agent has shown the token.
    Arrived(Box<Arrival>),
    /// An agent said something, or gave a sign of life.
    Said {
        /// The member.
        node: NodeId,
        /// The connection over which it came.
        connection: u64,
        /// When it came.
        at: Instant,
        /// What.
        frame: Box<Numbered<FromAgent>>,
    },
    /// A connection ended.
    Ended {
        /// The member.
        node: NodeId,
        /// Which connection.
        connection: u64,
        /// Why.
        why: String,
    },
}

/// What the supervisor must know of a happening.
pub enum Outcome {
    /// A rank said something, or ended.
    Rank(Input),
    /// Ranks of the generation had written this into the store of an earlier coordinator.
    Store(Vec<StoreRequest>),
    /// A node was asked to stop, in these words.
    Stop(String),
    /// Something for `events.jsonl`.
    Event(&'static str, Value),
    /// A node that is not well, and why: for `events.jsonl` and the status.
    Unwell(Value),
}

struct Conversation {
    number: u64,
    session: Session<ToAgent>,
    connection: u64,
    outbox: Option<mpsc::Sender<Numbered<ToAgent>>>,
}

/// The ranks of the generation under way.
#[derive(Default)]
struct Ranks {
    generation: u64,
    /// The node of each rank.
    nodes: Vec<NodeId>,
    pids: Vec<Rc<Cell<u32>>>,
    has_exited: Vec<bool>,
}

/// All nodes of a run.
pub struct Nodes {
    members: Members,
    conversations: BTreeMap<NodeId, Conversation>,
    plan: ClusterPlan,
    happenings: mpsc::Sender<Happening>,
    commands: Rc<Commands>,
    ranks: Ranks,
    /// What is kept of checkpoints in the nodes' memories.
    memories: Memories,
    /// This machine's address, as agents on others reach it.
    reached_at: Option<IpAddr>,
    /// The generation of an earlier coordinator that shall go on, and who runs what of it.
    adopting: Option<u64>,
    running: BTreeMap<NodeId, Running>,
    /// What ranks wrote into its store.
    stored: Vec<Outcome>,
    next_conversation: u64,
    num_connections: u64,
    next_alive: Instant,
    /// When what was taken in last had come.
    taken: Instant,
    /// This coordinator's, for its agents.
    epoch: u64,
    address: Address,
}

impl Nodes {
    /// Listens, and writes into the run's folder what agents need.
    ///
    /// # Errors
    /// Where the address cannot be listened on or a file not be written.
    pub async fn listen(
        plan: ClusterPlan,
        run: &RunDir,
    ) -> std::io::Result<(Self, mpsc::Receiver<Happening>)> {
        let listener = TcpListener::bind(plan.listen).await?;
        let local = listener.local_addr()?;
        let secrets = secrets::make(run)?;
        let host = plan.host.clone().unwrap_or_else(|| match local.ip().is_unspecified() {
            true => host_name(),
            false => local.ip().to_string(),
        });
        let address = Address { host, port: local.port(), pid: std::process::id() };
        tracing::info!(
            "waiting for {} agents at {}:{}",
            plan.sizes.whole().nodes,
            address.host,
            address.port
        );
        let text = serde_json::to_vec_pretty(&address)?;
        let now = Instant::now();
        secrets::write_private(&run.coordinator(), &text)?;
        let (happenings, received) = mpsc::channel(NUM_HAPPENINGS);
        spawn_local(serve(listener, secrets, happenings.clone()));
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let conversation = u64::try_from(since.as_micros()).unwrap_or(u64::MAX / 2);
        Ok((Self::new(plan, address, happenings, (conversation, now)), received))
    }

    /// Nobody has joined. Conversations are numbered from this one on: another coordinator of the
    /// same run has others.
    pub fn new(
        plan: ClusterPlan,
        address: Address,
        happenings: mpsc::Sender<Happening>,
        (conversation, now): (u64, Instant),
    ) -> Self {
        Self {
            members: Members::new(Limits::new(plan.sizes.clone())),
            conversations: BTreeMap::new(),
            plan,
            happenings,
            commands: Rc::default(),
            ranks: Ranks::default(),
            memories: Memories::default(),
            reached_at: None,
            adopting: None,
            running: BTreeMap::new(),
            stored: Vec::new(),
            next_conversation: conversation,
            num_connections: 0,
            next_alive: now,
            taken: now,
            epoch: 0,
            address,
        }
    }

    /// Where agents reach this coordinator.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Agents hear this epoch from now on.
    pub fn set_epoch(&mut self, epoch: u64) {
        self.epoch = epoch;
    }

    /// When [`Nodes::wake`] is next of use.
    pub fn next_wake(&self, now: Instant) -> Instant {
        // What waits in the queue is taken in first: it may be a sign of life.
        let tick = self.members.next_tick().filter(|_| !self.is_behind());
        let times = [tick, self.members.next_seek(now)];
        times.into_iter().flatten().fold(self.next_alive, Instant::min)
    }

    /// Whether something has come that was not taken in yet.
    fn is_behind(&self) -> bool {
        self.happenings.capacity() < self.happenings.max_capacity()
    }

    /// Up to when all that agents said has been taken in: nobody's silence is longer.
    fn heard_until(&self, now: Instant) -> Instant {
        if self.is_behind() { self.taken.min(now) } else { now }
    }

    /// Gives signs of life, and tells of nodes whose silence has lasted.
    pub fn wake(&mut self, now: Instant) -> Vec<Outcome> {
        // Its own pause (a machine that was suspended, say) is nobody's silence.
        let late = now.saturating_duration_since(self.next_alive);
        if late > PAUSE {
            tracing::warn!("the coordinator was not running for {:.1} s", late.as_secs_f64());
            self.members.was_away(late, now);
        }
        if now >= self.next_alive {
            self.next_alive = now + Duration::from_millis(ALIVE_EVERY_MS);
            for conversation in self.conversations.values_mut() {
                let alive = conversation.session.alive();
                conversation.send(alive);
            }
        }
        let heard_until = self.heard_until(now);
        if self.members.next_tick().is_none_or(|at| heard_until < at) {
            return Vec::new();
        }
        let changes = self.members.tick(heard_until);
        changes.into_iter().flat_map(|change| self.changed(change)).collect()
    }

    /// A generation needs its nodes, as [`Members::seek`] says; ask [`Nodes::found`] from now on.
    pub fn seek(&mut self, ranks: usize, fewer_after: Option<Duration>, now: Instant) {
        self.members.seek(ranks, fewer_after, now);
    }

    /// The size of a run that lacks no node.
    pub fn whole(&self) -> Size {
        self.plan.sizes.whole()
    }

    /// The size of a generation on so many nodes.
    pub fn size(&self, nodes: usize) -> Size {
        self.members.size(nodes)
    }

    /// Ranks for which there is room now.
    pub fn room(&self) -> usize {
        self.members.room().map_or(0, |size| size.ranks)
    }

    /// Whether the nodes that are sought are there.
    pub fn found(&mut self, now: Instant) -> Seek {
        self.members.found(now)
    }

    /// A node's name.
    pub fn name(&self, node: NodeId) -> String {
        self.members.info(node).map(|info| info.name.clone()).unwrap_or_default()
    }

    /// The name of a rank's node.
    pub fn node_of(&self, rank: usize) -> Option<String> {
        self.ranks.nodes.get(rank).map(|node| self.name(*node))
    }

    /// The address of a rank's node, for the ranks of others. A node that reaches this one by
    /// loopback is this one, which others reach as they reach the coordinator.
    pub fn address_of(&self, node: NodeId) -> String {
        let own = self.members.info(node).map(|info| info.address.clone()).unwrap_or_default();
        let is_loopback = own.parse().is_ok_and(|address: IpAddr| address.is_loopback());
        match self.reached_at.filter(|_| is_loopback) {
            Some(address) => address.to_string(),
            None => own,
        }
    }

    /// Sends what the ranks' handles were asked for.
    pub fn flush(&mut self) {
        while let Some((node, command)) = self.commands.next() {
            self.send(node, command);
        }
    }

    /// Tells every agent that the run is over, and waits until they have heard it, but not for
    /// long.
    pub async fn over(&mut self, code: i32, reason: &str) {
        self.tell_over(code, reason);
        let outboxes = std::mem::take(&mut self.conversations).into_values();
        let outboxes: Vec<_> = outboxes.filter_map(|conversation| conversation.outbox).collect();
        let sent = async {
            for outbox in &outboxes {
                // Once it has room for all, it is empty.
                let _ = outbox.reserve_many(wire::NUM_QUEUED).await;
            }
        };
        let _ = tokio::time::timeout(LAST_WAIT, sent).await;
        // What has left the queue is being written.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    /// Tells every agent that the run is over.
    pub fn tell_over(&mut self, code: i32, reason: &str) {
        let nodes: Vec<NodeId> = self.conversations.keys().copied().collect();
        for node in nodes {
            self.send(node, ToAgent::Over { code, reason: reason.to_owned() });
        }
    }

    /// Takes in what happened.
    pub fn take(&mut self, happening: Happening, now: Instant) -> Vec<Outcome> {
        match happening {
            Happening::Arrived(arrival) => self.arrived(*arrival, now),
            Happening::Said { node, connection, at, frame } => {
                self.taken = at;
                self.said(node, connection, *frame, at)
            }
            Happening::Ended { node, connection, why } => {
                let Some(conversation) = self.conversations.get_mut(&node) else { return vec![] };
                if conversation.connection == connection {
                    conversation.outbox = None;
                    self.members.disconnected(node);
                    let name = self.name(node);
                    tracing::warn!("the connection to node {name} was lost: {why}");
                }
                Vec::new()
            }
        }
    }

    fn said(
        &mut self,
        node: NodeId,
        connection: u64,
        frame: Numbered<FromAgent>,
        now: Instant,
    ) -> Vec<Outcome> {
        let Some(conversation) = self.conversations.get_mut(&node) else { return Vec::new() };
        if conversation.connection != connection {
            return Vec::new();
        }
        let message = conversation.session.take(frame);
        let mut outcomes = Vec::new();
        if let Some(change) = self.members.heard(node, now) {
            outcomes.extend(self.changed(change));
        }
        match message {
            Ok(Some(message)) => outcomes.extend(self.about_a_rank(node, message)),
            Ok(None) => {}
            Err(error) => {
                tracing::error!("node {} speaks nonsense: {error}", self.name(node));
                self.begin_anew(node);
            }
        }
        outcomes
    }

    /// The agent connects once more, and is told again whatever it has not taken in for sure.
    fn begin_anew(&mut self, node: NodeId) {
        if let Some(conversation) = self.conversations.get_mut(&node) {
            (conversation.number, conversation.connection) = (0, 0);
            conversation.outbox = None;
        }
        self.members.disconnected(node);
    }

    /// What an agent says about one of its ranks.
    fn about_a_rank(&mut self, node: NodeId, message: FromAgent) -> Option<Outcome> {
        let (generation, rank, news) = match message {
            FromAgent::Store { generation, requests } => {
                let stored = Outcome::Store(requests);
                if self.adopting == Some(generation) {
                    self.stored.push(stored);
                    return None;
                }
                return Some(stored).filter(|_| generation == self.ranks.generation);
            }
            FromAgent::Holds(holding) => {
                self.memories.holds(node, holding);
                return None;
            }
            FromAgent::StopRequested { signal } => {
                let name = self.name(node);
                if self.ranks.nodes.contains(&node) {
                    return Some(Outcome::Stop(format!("{signal} to node {name}")));
                }
                let reason = format!("{signal}, and the run goes on without node {name}");
                self.send(node, ToAgent::Over { code: exit_code::PREEMPTED, reason });
                self.memories.lost(node);
                return None;
            }
            FromAgent::Started { generation, rank, pid } => {
                let cell = self.ranks.pids.get(rank);
                cell.filter(|_| generation == self.ranks.generation)?.set(pid);
                return None;
            }
            FromAgent::Said { generation, rank, message } => {
                (generation, rank, News::Message(message))
            }
            FromAgent::Garbled { generation, rank, error } => {
                (generation, rank, News::Garbled(error))
            }
            FromAgent::Exited { generation, rank, exit, last_lines } => {
                if generation == self.ranks.generation
                    && let Some(has_exited) = self.ranks.has_exited.get_mut(rank)
                {
                    *has_exited = true;
                }
                (generation, rank, News::Exited { exit, last_lines })
            }
        };
        if self.adopting == Some(generation) {
            self.stored.push(Outcome::Rank(Input { generation, rank, news }));
            return None;
        }
        if generation != self.ranks.generation || self.ranks.nodes.get(rank) != Some(&node) {
            tracing::debug!("node {} speaks of rank {rank} of {generation}", self.name(node));
            return None;
        }
        Some(Outcome::Rank(Input { generation, rank, news }))
    }

    fn changed(&mut self, change: Change) -> Vec<Outcome> {
        match change {
            Change::Suspected(node) => {
                let name = self.name(node);
                tracing::warn!("node {name} is silent");
                vec![Outcome::Event("node_suspected", json!({ "node": name }))]
            }
            Change::Recovered(node) => {
                let name = self.name(node);
                tracing::info!("node {name} is heard of again");
                vec![Outcome::Event("node_recovered", json!({ "node": name }))]
            }
            Change::Died(node, why) => self.died(node, &why),
        }
    }

    /// The ranks of a dead node count as ended: should they still run somewhere, what they save is
    /// refused by its generation.
    fn died(&mut self, node: NodeId, why: &str) -> Vec<Outcome> {
        self.conversations.remove(&node);
        self.memories.lost(node);
        let name = self.name(node);
        tracing::error!("node {name} is lost: {why}");
        let lost = Outcome::Event("node_lost", json!({ "node": name, "reason": why }));
        let ended = self.bury(node, &format!("its node {name} is lost: {why}"));
        std::iter::once(lost).chain(ended).collect()
    }

    /// The ranks of a node that is no member any more have ended, whatever becomes of them.
    fn bury(&mut self, node: NodeId, why: &str) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        let generation = self.ranks.generation;
        for rank in 0..self.ranks.nodes.len() {
            if self.ranks.nodes[rank] != node || self.ranks.has_exited[rank] {
                continue;
            }
            self.ranks.has_exited[rank] = true;
            let report = FailureReport {
                class: FailureClass::Node,
                phase: Phase::Train,
                step: None,
                collective: None,
                lines: vec![why.to_owned()],
                roll_back: None,
            };
            let report = News::Message(FromRank::Failure(Box::new(report)));
            let exited = News::Exited { exit: Exit::default(), last_lines: Vec::new() };
            for news in [report, exited] {
                outcomes.push(Outcome::Rank(Input { generation, rank, news }));
            }
        }
        outcomes
    }

    fn send(&mut self, node: NodeId, message: ToAgent) {
        let Some(conversation) = self.conversations.get_mut(&node) else { return };
        match conversation.session.push(message) {
            Ok(frame) => conversation.send(frame),
            Err(error) => {
                // It gives no more signs of life, and so is dead soon.
                tracing::error!("node {node} takes nothing in: {error}");
                conversation.outbox = None;
            }
        }
    }
}

impl Conversation {
    /// What cannot be sent now is sent over the next connection.
    fn send(&mut self, frame: Numbered<ToAgent>) {
        if self.outbox.as_ref().is_some_and(|outbox| outbox.try_send(frame).is_err()) {
            self.outbox = None;
        }
    }
}

/// This machine's name.
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
