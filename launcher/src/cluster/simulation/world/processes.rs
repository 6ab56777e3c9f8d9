//! The processes of the coordinator and of agents: starting them, waking them up, and carrying out
//! what they want.
#![cfg(test)]

use super::{Happens, STEPS, World};
use crate::cluster::agent::outside::ATTEMPT_TIMEOUT;
use crate::cluster::simulation::faults::Kind;
use crate::cluster::simulation::head::{Claim, Found, Head, Log};
use crate::cluster::simulation::network::{Dial, Side};
use crate::cluster::simulation::node::AgentProcess;
use crate::cluster::simulation::ranks::RankProcess;
use crate::supervisor::cause::Exit;
use rank_protocol::exit_code;
use std::rc::Rc;
use std::time::{Duration, Instant};

impl World {
    pub(super) fn start_head(&mut self) {
        if self.head.is_some() || self.log.end.is_some() {
            return;
        }
        let committed = self.disk.newest();
        if committed == Some(STEPS) {
            self.log.end = Some((exit_code::DONE, "it has finished".into()));
            self.over_at = Some(self.now);
            return self.tell_desks();
        }
        let last_generation = self.log.generations.last().copied().unwrap_or(0);
        let found = Found {
            last_generation: last_generation.max(self.disk.fence),
            committed,
            adopt: (!self.log.nodes.is_empty()).then(|| self.log.nodes.clone()),
        };
        self.num_heads += 1;
        let shape = (self.num_nodes, self.ranks_per_node);
        let head = Head::new(self.num_heads, shape, found, self.now, &mut self.log);
        self.head_paused_until = self.now;
        self.head = Some(head);
        self.tell_desks();
        self.after_head();
    }

    pub(super) fn with_head(
        &mut self,
        epoch: u64,
        body: impl FnOnce(&mut Head, Instant, &mut Log),
    ) {
        let Some(head) = self.head.as_mut().filter(|head| head.epoch == epoch) else { return };
        if head.finish.is_some() {
            return;
        }
        let (before, num_before) = (head.generation(), self.log.generations.len());
        let num_adopted = self.log.num_adopted;
        body(head, self.now, &mut self.log);
        let after = head.generation();
        if after < before {
            self.violate(format!("generation {after} after {before}"));
        }
        for at in num_before.max(1)..self.log.generations.len() {
            let [last, next] = [self.log.generations[at - 1], self.log.generations[at]];
            if next <= last {
                self.violate(format!("generation {next} started after {last}"));
            }
        }
        if self.log.num_adopted > num_adopted {
            self.fire(Kind::Adopted);
        }
        self.after_head();
    }

    /// Carries out what the coordinator wants.
    fn after_head(&mut self) {
        let Some(head) = &mut self.head else { return };
        let epoch = head.epoch;
        if std::mem::take(&mut head.wants_search) {
            let next = head.generation() + 1;
            let seconds = self.random.f64();
            self.after(seconds * 0.2, Happens::FenceRaised { epoch, next });
            self.after(seconds, Happens::Searched { epoch });
        }
        let Some(head) = &mut self.head else { return };
        if head.finish.is_some() && self.over_at.is_none() {
            self.over_at = Some(self.now);
            self.tell_desks();
            return self.after(1.0, Happens::HeadGone { epoch });
        }
        let at = head.next_wake(self.now).max(self.now + Duration::from_millis(1));
        if head.wake_at.is_none_or(|wake| at < wake) {
            head.wake_at = Some(at);
            self.at(at, Happens::HeadWakes { epoch });
        }
    }

    /// What a coordinator was told of a rank is true.
    pub(super) fn check_claims(&mut self) {
        let Some(head) = &mut self.head else { return };
        for (generation, rank, claim) in std::mem::take(&mut head.claims) {
            let is_it =
                |process: &&RankProcess| (process.generation, process.rank) == (generation, rank);
            let process = self.processes.values().find(is_it);
            let is_true = match claim {
                Claim::Step(step) => process.is_some_and(|process| process.step >= step),
                Claim::Exited => process.is_none_or(|process| !process.is_alive),
            };
            if !is_true {
                let what = format!("{claim:?} of rank {rank} of generation {generation} is untrue");
                return self.violate(format!("{what}: {process:?}"));
            }
        }
    }

    // Agents.

    pub(super) fn start_agent(&mut self, host: usize) {
        if self.hosts[host].is_some() || self.log.end.is_some() {
            return;
        }
        let id = self.new_id();
        self.hosts[host] = Some(id);
        self.agents.insert(id, AgentProcess::new(id, host, self.now));
        self.tell_desks();
        self.after_agent(id);
    }

    /// What agents see in the run's folder.
    pub(super) fn tell_desks(&mut self) {
        for agent in self.agents.values() {
            let mut desk = agent.place.desk.borrow_mut();
            desk.has_coordinator = self.head.is_some();
            desk.end = self.log.end.clone();
        }
    }

    pub(super) fn with_agent(&mut self, id: u64, body: impl FnOnce(&mut AgentProcess, Instant)) {
        if let Some(agent) = self.agents.get_mut(&id) {
            body(agent, self.now);
            self.after_agent(id);
        }
    }

    /// Carries out what an agent wants.
    pub(super) fn after_agent(&mut self, id: u64) {
        let Some(process) = self.agents.get_mut(&id) else { return };
        let host = process.host;
        let (joins, starts, failed) = {
            let mut desk = process.place.desk.borrow_mut();
            let failed = std::mem::take(&mut desk.has_failed_to_start);
            (std::mem::take(&mut desk.joins), std::mem::take(&mut desk.starts), failed)
        };
        let commands = Rc::clone(&process.place.commands);
        let at = process.agent.next_wake().max(self.now + Duration::from_millis(1));
        let wakes = process.wake_at.is_none_or(|wake| at < wake);
        if wakes {
            process.wake_at = Some(at);
        }
        let end = process.agent.end().cloned();
        if wakes {
            self.at(at, Happens::AgentWakes { agent: id });
        }
        if failed {
            self.fire(Kind::CannotStart);
        }
        for join in joins {
            let dial = self.new_id();
            self.dials.insert(dial, Dial { agent: id, host, join: Some(join) });
            if self.ways[host].is_cut(Side::Head, self.now) {
                self.fire(Kind::Partition);
            }
            let arrival = self.ways[host].arrival(Side::Head, self.now, &mut self.random);
            self.at(arrival, Happens::Dialed { dial });
            self.at(self.now + ATTEMPT_TIMEOUT, Happens::DialExpires { dial });
        }
        for assignment in starts {
            self.start_rank(id, &assignment);
        }
        while let Some((_, command)) = commands.next() {
            self.queue_command(id, command);
        }
        if end.is_some() {
            self.end_agent(id, true);
            let seconds = 0.5 + 5.0 * self.random.f64();
            self.after(seconds, Happens::AgentStarts { host });
        }
    }

    /// An agent's process ends; its ranks do with it.
    pub(super) fn end_agent(&mut self, id: u64, is_heard: bool) {
        let Some(agent) = self.agents.remove(&id) else { return };
        if self.hosts[agent.host] == Some(id) {
            self.hosts[agent.host] = None;
        }
        for wire in self.wires.values_mut().filter(|wire| wire.agent == id) {
            wire.is_told[Side::Agent as usize] = true;
            if !is_heard {
                // The coordinator's end stays open.
                wire.up = None;
            }
        }
        drop(agent);
        let ranks: Vec<u64> = self.alive(|process| process.agent == id);
        for process in ranks {
            let seconds = 0.4 * self.random.f64();
            let exit = Exit { code: None, signal: Some(9) };
            self.after(seconds, Happens::RankEnds { process, exit });
        }
    }
}
