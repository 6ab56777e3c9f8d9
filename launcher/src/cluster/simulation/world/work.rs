//! What ranks do, and the rules that they must keep.
#![cfg(test)]

use super::{Happens, SAVE_EVERY, STEPS, World};
use crate::cluster::simulation::faults::Kind;
use crate::cluster::simulation::ranks::{
    Generation, MEETING_ID, RankProcess, failure, have_met, stepped,
};
use crate::supervisor::cause::Exit;
use crate::supervisor::rank::{Input, News};
use rank_protocol::agent::ToAgent;
use rank_protocol::{Assignment, FailureClass, FromRank, Phase, Position, ToRank, exit_code};

impl World {
    pub(super) fn alive(&self, is_meant: impl Fn(&RankProcess) -> bool) -> Vec<u64> {
        let is_alive = |process: &RankProcess| process.is_alive && is_meant(process);
        let found = self.processes.iter().filter(|(_, process)| is_alive(process));
        found.map(|(id, _)| *id).collect()
    }

    pub(super) fn start_rank(&mut self, agent: u64, assignment: &Assignment) {
        let Assignment { generation, rank, world_size, resume_step, .. } = *assignment;
        if !self.started.insert((generation, rank)) {
            self.violate(format!("rank {rank} of generation {generation} was started twice"));
        }
        let of_others = self.alive(|p| p.agent == agent && p.generation != generation);
        if let Some(other) = of_others.first().map(|id| &self.processes[id]) {
            let what = format!("generation {generation} starts beside {other:?} of one agent");
            self.violate(what);
        }
        let id = self.new_id();
        let process = RankProcess {
            agent,
            generation,
            rank,
            is_alive: true,
            is_ready: false,
            step: resume_step.unwrap_or(0),
            frozen_until: self.now,
            is_ending: false,
        };
        self.processes.insert(id, process);
        let world = self.generations.entry(generation).or_default();
        world.processes.insert(rank, id);
        world.world_size = world_size;
        world.step = resume_step.unwrap_or(0);
        self.check_worlds();
        let seconds = 0.1 + self.random.f64();
        self.after(seconds, Happens::RankBegins { process: id, world_size });
    }

    fn is_whole(&self, world: &Generation) -> bool {
        world.processes.len() == world.world_size
            && world.processes.values().all(|id| self.processes[id].is_alive)
    }

    /// Of all generations whose ranks are all there, one at most may commit.
    fn check_worlds(&mut self) {
        let whole = self.generations.iter().filter(|(_, world)| self.is_whole(world));
        let whole: Vec<u64> = whole.map(|(generation, _)| *generation).collect();
        let active: Vec<u64> =
            whole.iter().copied().filter(|generation| self.disk.admits(*generation)).collect();
        if active.len() > 1 {
            self.violate(format!("two active worlds: generations {active:?}"));
        }
        if whole.len() > 1 {
            self.fire(Kind::StaleWorld);
        }
    }

    pub(super) fn say(&mut self, process: u64, message: FromRank) {
        let Some(rank) = self.processes.get(&process).filter(|rank| rank.is_alive) else { return };
        let (agent, generation, rank) = (rank.agent, rank.generation, rank.rank);
        let input = Box::new(Input { generation, rank, news: News::Message(message) });
        self.after(0.0, Happens::Said { agent, input });
    }

    /// What an agent tells one of its ranks.
    pub(super) fn queue_command(&mut self, agent: u64, command: ToAgent) {
        let (ToAgent::Tell { generation, rank, .. }
        | ToAgent::Terminate { generation, rank }
        | ToAgent::Kill { generation, rank }) = command
        else {
            return;
        };
        let is_meant = |process: &RankProcess| {
            (process.agent, process.generation, process.rank) == (agent, generation, rank)
        };
        for process in self.alive(is_meant) {
            let seconds = 0.01 * self.random.f64();
            let command = Box::new(command.clone());
            self.after(seconds, Happens::Command { process, command });
        }
    }

    pub(super) fn command(&mut self, id: u64, command: ToAgent) {
        let Some(process) = self.processes.get_mut(&id).filter(|rank| rank.is_alive) else {
            return;
        };
        let failed = Exit { code: Some(exit_code::FAILED), signal: None };
        match command {
            ToAgent::Kill { .. } => {
                let exit = Exit { code: None, signal: Some(9) };
                self.after(0.01, Happens::RankEnds { process: id, exit });
            }
            ToAgent::Terminate { .. } => {
                process.is_ending = true;
                self.after(0.2, Happens::RankEnds { process: id, exit: failed });
            }
            ToAgent::Tell { message: ToRank::Abort { .. }, .. } => {
                process.is_ending = true;
                let seconds = 0.5 * self.random.f64();
                self.after(seconds, Happens::RankEnds { process: id, exit: failed });
            }
            ToAgent::Tell { message: ToRank::Where, .. } => {
                let (phase, step) = (Phase::Train, Some(process.step));
                let waits = vec!["operation 1 of group data".to_owned()];
                self.say(id, FromRank::Here(Position { phase, step, waits }));
            }
            ToAgent::Tell { message: ToRank::Store { id: MEETING_ID, reply }, .. } => {
                match have_met(&reply) {
                    true => self.met(id),
                    false => self.fail(id, FailureClass::Transient),
                }
            }
            _ => {}
        }
    }

    fn met(&mut self, id: u64) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        process.is_ready = true;
        let generation = process.generation;
        self.say(id, FromRank::Phase(Phase::Train));
        let is_ready = |id: &u64| self.processes[id].is_ready;
        let Some(world) = self.generations.get(&generation) else { return };
        let are_all = world.processes.len() == world.world_size
            && world.processes.values().all(is_ready)
            && !world.is_stepping;
        if are_all {
            if let Some(world) = self.generations.get_mut(&generation) {
                world.is_stepping = true;
            }
            self.next_step(generation);
        }
    }

    /// After the last step there is no other.
    fn next_step(&mut self, generation: u64) {
        let world = self.generations.get(&generation).filter(|world| world.step == STEPS);
        if let Some(world) = world.cloned() {
            return self.finish(world);
        }
        let seconds = 0.4 + 1.6 * self.random.f64();
        self.after(seconds, Happens::Step { generation });
    }

    pub(super) fn step(&mut self, generation: u64) {
        let Some(world) = self.generations.get(&generation).cloned() else { return };
        if world.is_broken || !self.is_whole(&world) {
            return;
        }
        let processes = || world.processes.values().map(|id| &self.processes[id]);
        let thaw = processes().map(|process| process.frozen_until).max().unwrap_or(self.now);
        if thaw > self.now {
            return self.at(thaw, Happens::Step { generation });
        }
        let step = world.step + 1;
        if let Some(world) = self.generations.get_mut(&generation) {
            world.step = step;
        }
        for id in world.processes.values() {
            if let Some(process) = self.processes.get_mut(id) {
                process.step = step;
            }
            self.say(*id, stepped(generation, step));
        }
        if !step.is_multiple_of(SAVE_EVERY) {
            return self.next_step(generation);
        }
        // Disks are slow now and then.
        let seconds = if self.random.u32(..6) == 0 { 15.0 } else { 0.3 } * self.random.f64();
        let process = world.processes[&0];
        self.say(process, FromRank::Phase(Phase::Save));
        self.after(seconds, Happens::Commit { process, step });
    }

    /// Rank 0 commits what all have written.
    pub(super) fn commit(&mut self, id: u64, step: u64) {
        let Some(process) = self.processes.get(&id).filter(|rank| rank.is_alive) else { return };
        let (generation, is_ending) = (process.generation, process.is_ending);
        if is_ending && self.random.bool() {
            return;
        }
        if !self.disk.admits(generation) {
            self.fire(Kind::StaleCommit);
            return self.fail(id, FailureClass::Storage);
        }
        if let Some((last, newest)) = self.disk.commits.last().copied()
            && (last > generation || newest >= step)
        {
            let after = format!("after step {newest} of generation {last}");
            self.violate(format!("step {step} of generation {generation} is committed {after}"));
        }
        self.disk.commits.push((generation, step));
        self.say(id, FromRank::CheckpointCommitted { step });
        self.say(id, FromRank::Phase(Phase::Train));
        self.next_step(generation);
    }

    fn finish(&mut self, world: Generation) {
        for process in world.processes.into_values() {
            if !self.processes[&process].is_alive {
                continue;
            }
            self.say(process, FromRank::Finished { step: STEPS });
            let exit = Exit { code: Some(exit_code::DONE), signal: None };
            let seconds = 0.3 * self.random.f64();
            self.after(seconds, Happens::RankEnds { process, exit });
        }
    }

    /// A rank says that it fails, and ends.
    pub(super) fn fail(&mut self, id: u64, class: FailureClass) {
        let Some(process) = self.processes.get_mut(&id).filter(|rank| rank.is_alive) else {
            return;
        };
        process.is_ending = true;
        let step = process.step;
        self.say(id, failure(class, step, "simulated"));
        let exit = Exit { code: Some(exit_code::FAILED), signal: None };
        self.after(0.02, Happens::RankEnds { process: id, exit });
    }

    pub(super) fn end_rank(&mut self, id: u64, exit: Exit) {
        let Some(process) = self.processes.get_mut(&id).filter(|rank| rank.is_alive) else {
            return;
        };
        process.is_alive = false;
        let (agent, generation, rank) = (process.agent, process.generation, process.rank);
        let news = News::Exited { exit, last_lines: Vec::new() };
        let input = Box::new(Input { generation, rank, news });
        self.after(0.0, Happens::Said { agent, input });
        if exit.code == Some(exit_code::DONE) {
            return;
        }
        if let Some(world) = self.generations.get_mut(&generation) {
            world.is_broken = true;
        }
        // The others lose their links to it, unless they still set up.
        for peer in self.alive(|peer| peer.generation == generation && peer.is_ready) {
            let seconds = 0.02 + 0.3 * self.random.f64();
            self.after(seconds, Happens::LinkLost { process: peer });
        }
    }
}
