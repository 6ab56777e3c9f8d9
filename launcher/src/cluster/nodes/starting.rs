//! The coordinator's part for the start of a generation: which agent starts which ranks.

use super::memory::Keeping;
use super::{NodeId, Nodes, Ranks};
use crate::cluster::remote::RemoteRank;
use crate::supervisor::rank::RankHandle;
use rank_protocol::agent::{Start, ToAgent};
use rank_protocol::{Assignment, RunDir};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;

impl Nodes {
    /// Has the agents start the ranks of a generation on these nodes, in order of rank; those that
    /// are `kept` (in their order) go on in their processes, where these are still there on the
    /// same node. Where checkpoints are kept in memory, agents are told of that before.
    pub fn start(
        &mut self,
        generation: u64,
        run: &RunDir,
        nodes: &[NodeId],
        assignments: Vec<Assignment>,
        kept: &[usize],
        keeping: Option<&Keeping>,
    ) -> Vec<RankHandle> {
        let numbers = assignments.iter().map(|assignment| assignment.rank);
        let before = std::mem::take(&mut self.ranks);
        let handles = self.handles(generation, nodes, numbers);
        self.end_left_over(&before, kept);
        let plans = keeping.and_then(|keeping| self.memory_plans(nodes, keeping));
        if let Some(keeping) = keeping {
            self.forget(keeping.resume);
            self.memories.started(generation, keeping.resume);
        }
        let mut by_node: BTreeMap<NodeId, Vec<Assignment>> = BTreeMap::new();
        for assignment in assignments {
            if let Some(&node) = self.ranks.nodes.get(assignment.rank) {
                by_node.entry(node).or_default().push(assignment);
            }
        }
        for (node, ranks) in by_node {
            let numbers = ranks.iter().map(|assignment| assignment.rank);
            let kept = numbers.filter(|rank| kept.binary_search(rank).is_ok()).collect();
            let place = nodes.iter().position(|placed| *placed == node);
            let memory = plans.as_ref().zip(place).and_then(|(plans, at)| plans.get(at).cloned());
            let run_dir = run.root().to_owned();
            let start = Start { generation, run_dir, ranks, kept, memory };
            self.send(node, ToAgent::Start(Box::new(start)));
        }
        handles
    }

    /// Processes that wait on nodes where nobody goes on in them, because others have their places.
    fn end_left_over(&mut self, before: &Ranks, kept: &[usize]) {
        for (rank, node) in before.nodes.iter().copied().enumerate() {
            let is_kept = kept.binary_search(&rank).is_ok();
            let stays = is_kept && self.ranks.nodes.get(rank) == Some(&node);
            if !stays && !before.has_exited[rank] {
                self.send(node, ToAgent::Kill { generation: before.generation, rank });
            }
        }
    }

    /// Notes where the ranks of a generation are, which are numbered from 0.
    pub(super) fn handles(
        &mut self,
        generation: u64,
        nodes: &[NodeId],
        numbers: impl Iterator<Item = usize>,
    ) -> Vec<RankHandle> {
        self.ranks = Ranks { generation, ..Ranks::default() };
        let mut handles = Vec::new();
        for rank in numbers {
            let Some(&node) = nodes.get(rank / self.plan.ranks_per_node.max(1)) else { continue };
            let pid = Rc::new(Cell::new(0));
            let commands = Rc::clone(&self.commands);
            let handle = RemoteRank::new(commands, node, (generation, rank), Rc::clone(&pid));
            handles.push(RankHandle::Remote(handle));
            self.ranks.nodes.push(node);
            self.ranks.pids.push(pid);
            self.ranks.has_exited.push(false);
        }
        handles
    }
}
