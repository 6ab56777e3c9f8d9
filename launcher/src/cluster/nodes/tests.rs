//! What a coordinator believes of its nodes, and what it tells them, step by step.

use super::*;
use crate::cluster::server::Door;
use crate::supervisor::rank::RankHandle;
use crate::supervisor::run::Adopt;
use rank_protocol::agent::{Answer, Join, NodeInfo};
use rank_protocol::bundle::Holding;
use std::cell::RefCell;

/// What a coordinator sends an agent.
type Inbox = mpsc::Receiver<Numbered<ToAgent>>;

/// A connection whose other side is the test.
struct TestDoor {
    answer: Rc<RefCell<Option<(Answer, Inbox)>>>,
}

impl Door for TestDoor {
    fn open(
        self: Box<Self>,
        (answer, again): (Answer, Vec<Numbered<ToAgent>>),
        _: (NodeId, u64),
        _: mpsc::Sender<Happening>,
    ) -> mpsc::Sender<Numbered<ToAgent>> {
        let (sender, inbox) = mpsc::channel(99);
        again.into_iter().for_each(|frame| sender.try_send(frame).unwrap());
        *self.answer.borrow_mut() = Some((answer, inbox));
        sender
    }

    fn local_address(&self) -> Option<IpAddr> {
        None
    }

    fn close(self: Box<Self>, answer: Answer) {
        *self.answer.borrow_mut() = Some((answer, mpsc::channel(1).1));
    }
}

/// A node, as the test plays it.
struct Agent {
    node: NodeId,
    connection: u64,
    said: u64,
    inbox: Inbox,
}

/// Nodes under test, and their clock.
struct Cluster {
    nodes: Nodes,
    now: Instant,
}

impl Cluster {
    /// Of two ranks, one a node.
    fn new() -> Self {
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let sizes = Sizes::fixed(2, 1);
        let quarantined = BTreeSet::from(["bad".to_owned()]);
        let plan = ClusterPlan { listen, host: None, sizes, ranks_per_node: 1, quarantined };
        let address = Address { host: "test".into(), port: 0, pid: 1 };
        let now = Instant::now();
        Self { nodes: Nodes::new(plan, address, mpsc::channel(1).0, (1, now)), now }
    }

    fn join(&mut self, name: &str, running: Option<Running>) -> Agent {
        self.try_to_join(name, running).unwrap()
    }

    /// Why it is not let in, where it is not.
    fn try_to_join(&mut self, name: &str, running: Option<Running>) -> Result<Agent, String> {
        let info = NodeInfo {
            name: name.to_owned(),
            agent: name.to_owned(),
            build: env!("CARGO_PKG_VERSION").to_owned(),
            ..NodeInfo::default()
        };
        let join = Join {
            token: String::new(),
            node: info,
            conversation: 0,
            taken: 0,
            running,
            door: None,
            bundles: Holding::default(),
        };
        let answer = Rc::default();
        let door = Box::new(TestDoor { answer: Rc::clone(&answer) });
        let from = SocketAddr::from(([127, 0, 0, 1], 1));
        let arrival = Happening::Arrived(Box::new(Arrival { join, from, door }));
        self.nodes.take(arrival, self.now);
        let (answer, inbox) = answer.take().unwrap();
        if let Answer::Unhealthy { reason } = answer {
            return Err(reason);
        }
        let node = self.nodes.members.alive_named(name).unwrap();
        Ok(Agent { node, connection: self.nodes.num_connections, said: 0, inbox })
    }

    fn say(&mut self, agent: &mut Agent, message: FromAgent) -> Vec<Outcome> {
        agent.said += 1;
        let frame = Box::new(Numbered { seq: agent.said, ack: 0, m: Some(message) });
        let Agent { node, connection, .. } = *agent;
        self.nodes.take(Happening::Said { node, connection, at: self.now, frame }, self.now)
    }

    /// Signs of life of these alone, for so long that the others are dead.
    fn outlive(&mut self, agents: &[&Agent]) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        for _ in 0..6 {
            self.now += Duration::from_secs(1);
            for Agent { node, connection, .. } in agents {
                let frame = Box::new(Numbered { seq: 0, ack: 0, m: None });
                let (node, connection, at) = (*node, *connection, self.now);
                let said = Happening::Said { node, connection, at, frame };
                outcomes.extend(self.nodes.take(said, self.now));
            }
            outcomes.extend(self.nodes.wake(self.now));
        }
        outcomes
    }

    /// Generation 3: rank 0 on the first of these nodes, rank 1 on the second.
    fn start(&mut self, agents: [&Agent; 2]) -> Vec<RankHandle> {
        self.nodes.handles(3, &agents.map(|agent| agent.node), 0..2)
    }
}

/// The generation and rank of each kill that an agent was told of.
fn kills(agent: &mut Agent) -> Vec<(u64, usize)> {
    let told = std::iter::from_fn(|| agent.inbox.try_recv().ok()).filter_map(|frame| frame.m);
    let killed = |message| match message {
        ToAgent::Kill { generation, rank } => Some((generation, rank)),
        _ => None,
    };
    told.filter_map(killed).collect()
}

/// Ranks that an outcome says have ended.
fn ended(outcomes: &[Outcome]) -> Vec<usize> {
    let rank = |outcome: &Outcome| match outcome {
        Outcome::Rank(Input { rank, news: News::Exited { .. }, .. }) => Some(*rank),
        _ => None,
    };
    outcomes.iter().filter_map(rank).collect()
}

fn exited(generation: u64, rank: usize) -> FromAgent {
    FromAgent::Exited { generation, rank, exit: Exit::default(), last_lines: Vec::new() }
}

fn running(ranks: &[(usize, u32)], exited: &[usize]) -> Option<Running> {
    Some(Running { generation: 3, ranks: ranks.to_vec(), exited: exited.to_vec() })
}

#[test]
fn a_node_that_was_given_up_is_told_to_kill_its_ranks() {
    let mut cluster = Cluster::new();
    let (first, second) = (cluster.join("a", None), cluster.join("b", None));
    cluster.start([&first, &second]);
    assert_eq!(ended(&cluster.outlive(&[&first])), [1], "the node is lost");
    let mut again = cluster.join("b", running(&[(1, 77)], &[]));
    assert_ne!(again.node, second.node);
    assert_eq!(kills(&mut again), [(3, 1)]);
}

#[test]
fn ranks_that_are_to_go_on_are_let_alone_and_killed_where_not_all_are_there() {
    let mut cluster = Cluster::new();
    cluster.nodes.await_ranks(3);
    let mut first = cluster.join("a", running(&[(0, 5)], &[]));
    assert_eq!(kills(&mut first), []);
    cluster.nodes.abandon();
    assert_eq!(kills(&mut first), [(3, 0)]);
}

#[test]
fn what_another_node_says_of_a_rank_is_not_believed() {
    let mut cluster = Cluster::new();
    let (mut first, mut second) = (cluster.join("a", None), cluster.join("b", None));
    let ranks = cluster.start([&first, &second]);
    let started = FromAgent::Started { generation: 3, rank: 0, pid: 9 };
    cluster.say(&mut second, started.clone());
    assert_eq!(ranks[0].pid(), 0);
    cluster.say(&mut first, started);
    assert_eq!(ranks[0].pid(), 9);
    for (agent, generation) in [(&mut second, 3), (&mut first, 2)] {
        let outcomes = cluster.say(agent, exited(generation, 0));
        assert!(ended(&outcomes).is_empty());
    }
    assert_eq!(ended(&cluster.outlive(&[&second])), [0], "until its node is lost, it runs");
    assert_eq!(ended(&cluster.say(&mut second, exited(3, 1))), [1]);
    assert!(ended(&cluster.outlive(&[])).is_empty(), "a rank ends once");
}

#[test]
fn a_rank_that_ended_under_an_earlier_coordinator_ends_once() {
    let mut cluster = Cluster::new();
    cluster.nodes.await_ranks(3);
    let first = cluster.join("a", running(&[(0, 5)], &[]));
    let mut second = cluster.join("b", running(&[], &[1]));
    let told = ended(&cluster.say(&mut second, exited(3, 1)));
    assert!(told.is_empty(), "it is told of later");
    let expected = Adopt { nodes: vec!["a".into(), "b".into()], num_ranks: 2 };
    let (_, handles, outcomes) = cluster.nodes.adopt(&expected).unwrap();
    assert_eq!((handles[0].pid(), ended(&outcomes)), (5, vec![1]));
    assert!(ended(&cluster.outlive(&[&first])).is_empty());
}

#[test]
fn a_node_that_an_earlier_coordinator_quarantined_is_not_let_in() {
    let mut cluster = Cluster::new();
    let why = cluster.try_to_join("bad", None).err().unwrap();
    assert_eq!(why, "node bad is quarantined: it has failed in this run");
    assert!(cluster.try_to_join("good", None).is_ok());
}
