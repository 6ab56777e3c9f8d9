//! Nodes that are not well: those that say so themselves, and those on which ranks fail.

use super::{Nodes, Outcome};
use rank_protocol::agent::{Join, ToAgent};
use rank_protocol::exit_code;
use serde_json::json;

impl Nodes {
    /// Why a node that wants to join gets no place, and what is to be told of it.
    pub(super) fn unwell(&mut self, join: &Join) -> Option<(String, Vec<Outcome>)> {
        let name = &join.node.name;
        if self.members.is_quarantined(name) {
            let reason = format!("node {name} is quarantined: it has failed in this run");
            return Some((reason, Vec::new()));
        }
        let problems = join.node.health.as_ref().map(|health| &health.problems);
        let problems = problems.filter(|problems| !problems.is_empty())?;
        let reason = problems.join("; ");
        tracing::error!("node {name} is not well: {reason}");
        let is_quarantined = self.members.is_unwell(name);
        let fields = json!({ "node": name, "reason": reason, "is_quarantined": is_quarantined });
        Some((reason, vec![Outcome::Unwell(fields)]))
    }

    /// A rank failed, of its process or its node. The second time, the node gives its place to
    /// another, where one waits; the first time, where `is_certain` that it is the node. Processes
    /// that wait there end with it.
    pub fn failed(&mut self, rank: usize, why: &str, is_certain: bool) -> Vec<Outcome> {
        let Some(&node) = self.ranks.nodes.get(rank) else { return Vec::new() };
        if !self.members.failed(node, is_certain) {
            return Vec::new();
        }
        let name = self.name(node);
        tracing::error!("node {name} is quarantined: {why}");
        let reason = format!("quarantined: {why}");
        self.memories.lost(node);
        let code = exit_code::NODE_UNHEALTHY;
        self.send(node, ToAgent::Over { code, reason: reason.clone() });
        let fields = json!({ "node": name, "reason": reason, "is_quarantined": true });
        let ended = self.bury(node, &format!("its node {name} is {reason}"));
        std::iter::once(Outcome::Unwell(fields)).chain(ended).collect()
    }
}
