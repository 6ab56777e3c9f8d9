//! Carries out the faults.
#![cfg(test)]

use super::{Happens, World};
use crate::cluster::simulation::faults::{Fault, Kind};
use crate::cluster::simulation::network::Side;
use crate::cluster::simulation::node::AgentProcess;
use crate::supervisor::cause::Exit;
use std::time::Duration;

impl World {
    pub(super) fn fault(&mut self, fault: Fault) {
        match fault {
            Fault::Partition { hosts, up, down, lasts } => {
                let until = self.now + lasts;
                for host in 0..self.ways.len() {
                    for (side, is_cut) in [(Side::Head, up), (Side::Agent, down)] {
                        if is_cut && hosts >> (host % 64) & 1 == 1 {
                            self.ways[host].cut[side as usize] = until;
                        }
                    }
                }
            }
            Fault::Delay { host, extra, lasts } => {
                self.ways[host].slow = (self.now + lasts, extra);
            }
            Fault::Duplicate { host, count } => self.ways[host].duplicate += count,
            Fault::Reorder { host, count } => self.ways[host].reorder += count,
            Fault::Reset { host } => {
                let of_host = self.wires.iter().filter(|(_, wire)| wire.host == host);
                let ids: Vec<u64> = of_host.map(|(id, _)| *id).collect();
                for id in ids {
                    self.fire(Kind::Reset);
                    self.reset(id);
                }
            }
            Fault::KillHead { away, loses } => self.kill_head(away, loses),
            Fault::PauseHead { lasts } => {
                if self.head.is_some() {
                    self.fire(Kind::HeadPaused);
                    self.head_paused_until = self.head_paused_until.max(self.now + lasts);
                }
            }
            Fault::KillAgent { host, away } => {
                self.lose_agent(host, away, Kind::AgentKilled, true);
            }
            Fault::LoseNode { host, away } => self.lose_agent(host, away, Kind::NodeLost, false),
            Fault::PauseAgent { hosts, lasts } => {
                for host in (0..self.hosts.len()).filter(|host| hosts >> (host % 64) & 1 == 1) {
                    let Some(id) = self.hosts[host] else { continue };
                    self.fire(Kind::AgentPaused);
                    if let Some(agent) = self.agents.get_mut(&id) {
                        agent.paused_until = self.now + lasts;
                    }
                }
            }
            Fault::KillRank { rank } => {
                if let Some(process) = self.one_alive(rank) {
                    self.fire(Kind::RankKilled);
                    self.end_rank(process, Exit { code: None, signal: Some(9) });
                }
            }
            Fault::FreezeRank { rank, lasts } => {
                let until = self.now + lasts;
                let id = self.one_alive(rank);
                if let Some(process) = id.and_then(|id| self.processes.get_mut(&id)) {
                    process.frozen_until = until;
                    self.fire(Kind::RankFrozen);
                }
            }
            Fault::CannotStart { host } => {
                let agent = self.hosts[host].and_then(|id| self.agents.get(&id));
                if let Some(agent) = agent {
                    agent.place.desk.borrow_mut().fails_to_start = true;
                }
            }
            Fault::Impostor { host } => {
                // Beside the one that is there, under its name.
                if self.hosts[host].is_some() && self.log.end.is_none() {
                    self.fire(Kind::Impostor);
                    let id = self.new_id();
                    self.agents.insert(id, AgentProcess::new(id, host, self.now));
                    self.hosts[host] = Some(id);
                    self.tell_desks();
                    self.after_agent(id);
                }
            }
        }
    }

    fn one_alive(&self, index: usize) -> Option<u64> {
        let alive = self.alive(|process| !process.is_ending);
        alive.get(index.checked_rem(alive.len())?).copied()
    }

    fn kill_head(&mut self, away: Duration, loses: bool) {
        let Some(head) = self.head.take_if(|head| head.finish.is_none()) else { return };
        self.fire(Kind::HeadKilled);
        if loses {
            for wire in self.wires.values_mut() {
                wire.is_reset = true;
            }
        }
        drop(head);
        self.tell_desks();
        self.after(away.as_secs_f64(), Happens::HeadStarts);
    }

    fn lose_agent(&mut self, host: usize, away: Duration, kind: Kind, is_heard: bool) {
        let Some(id) = self.hosts[host] else { return };
        self.fire(kind);
        self.end_agent(id, is_heard);
        self.after(away.as_secs_f64(), Happens::AgentStarts { host });
    }
}
