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
use std::time::Duration;

impl World {
    pub(super) fn alive(&self, is_meant: impl Fn(&RankProcess) -> bool) -> Vec<u64> {
        let is_alive = |process: &RankProcess| process.is_alive && is_meant(process);
        let found = self.processes.iter().filter(|(_, process)| is_alive(process));
        found.map(|(id, _)| *id).collect()
    }

    /// A process, where it works for this generation.
    pub(super) fn at_work(&self, id: u64, generation: u64) -> Option<&RankProcess> {
        let process = self.processes.get(&id).filter(|process| process.is_alive)?;
        Some(process).filter(|process| process.generation == generation && !process.has_let_go)
    }

    pub(super) fn start_rank(&mut self, agent: u64, assignment: &Assignment) {
        let Assignment { generation, rank, world_size, resume_step, .. } = *assignment;
        if !self.started.insert((generation, rank)) {
            self.violate(format!("rank {rank} of generation {generation} was started twice"));
        }
        // Those that go on are assigned right after.
        let is_other = |p: &RankProcess| p.assigned != generation && !p.has_let_go;
        let of_others = self.alive(|p| p.agent == agent && is_other(p));
        if let Some(other) = of_others.first().map(|id| &self.processes[id]) {
            let what = format!("generation {generation} starts beside {other:?} of one agent");
            self.violate(what);
        }
        let id = self.new_id();
        let process = RankProcess {
            agent,
            generation,
            assigned: generation,
            rank,
            is_alive: true,
            exit: None,
            has_let_go: false,
            hears_last: self.now,
            is_ready: false,
            step: resume_step.unwrap_or(0),
            frozen_until: self.now,
            is_ending: false,
        };
        self.processes.insert(id, process);
        self.begin(id, world_size, resume_step);
    }

    /// A process begins with the generation that it was assigned to.
    fn begin(&mut self, id: u64, world_size: usize, resume_step: Option<u64>) {
        let RankProcess { generation, rank, .. } = self.processes[&id];
        let world = self.generations.entry(generation).or_default();
        world.processes.insert(rank, id);
        world.world_size = world_size;
        world.step = resume_step.unwrap_or(0);
        self.check_worlds();
        let seconds = 0.1 + self.random.f64();
        self.after(seconds, Happens::RankBegins { process: id, generation, world_size });
    }

    /// A process that waited goes on.
    fn join(&mut self, id: u64, assignment: &Assignment) {
        let Assignment { generation, rank, world_size, resume_step, .. } = *assignment;
        if !self.started.insert((generation, rank)) {
            self.violate(format!("rank {rank} of generation {generation} began twice"));
        }
        let Some(process) = self.processes.get_mut(&id) else { return };
        if !process.has_let_go || process.rank != rank {
            let what = format!("rank {rank} of {generation} is assigned to {process:?}");
            return self.violate(what);
        }
        process.generation = generation;
        (process.has_let_go, process.is_ready) = (false, false);
        process.step = resume_step.unwrap_or(0);
        self.fire(Kind::Kept);
        self.say(id, FromRank::Joined { generation });
        self.begin(id, world_size, resume_step);
    }

    /// A rank drops what it has of a generation, and says so.
    pub(super) fn lets_go(&mut self, id: u64, generation: u64) {
        let is_ending = self.processes.get(&id).is_some_and(|process| process.is_ending);
        if is_ending || self.at_work(id, generation).is_none() {
            return;
        }
        self.say(id, FromRank::Released);
        if let Some(process) = self.processes.get_mut(&id) {
            process.has_let_go = true;
        }
        self.lose_links(generation);
    }

    /// Those that work for a generation lose their links to one that is gone, unless they still
    /// set up.
    fn lose_links(&mut self, generation: u64) {
        if let Some(world) = self.generations.get_mut(&generation) {
            world.is_broken = true;
        }
        let is_linked = |p: &RankProcess| p.generation == generation && p.is_ready && !p.has_let_go;
        for process in self.alive(is_linked) {
            let seconds = 0.02 + 0.3 * self.random.f64();
            self.after(seconds, Happens::LinkLost { process, generation });
        }
    }

    fn is_whole(&self, generation: u64, world: &Generation) -> bool {
        let works = |id: &u64| self.at_work(*id, generation).is_some();
        world.processes.len() == world.world_size && world.processes.values().all(works)
    }

    /// Of all generations whose ranks are all there, one at most may commit.
    fn check_worlds(&mut self) {
        let whole = self.generations.iter().filter(|(own, world)| self.is_whole(**own, world));
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
            (process.agent, process.assigned, process.rank) == (agent, generation, rank)
        };
        if let ToAgent::Tell { message: ToRank::Assignment(assignment), .. } = &command {
            let ended = self.processes.values_mut().filter(|process| is_meant(process));
            for process in ended {
                let Some(exit) = process.exit else { continue };
                // Of an end that its agent has not heard of it hears again: it has ended in that
                // place, too.
                process.assigned = assignment.generation;
                let news = News::Exited { exit, last_lines: Vec::new() };
                let input = Box::new(Input { generation: assignment.generation, rank, news });
                return self.after(0.0, Happens::Said { agent, input });
            }
        }
        for id in self.alive(is_meant) {
            let at = self.now + Duration::from_secs_f64(0.01 * self.random.f64());
            let Some(process) = self.processes.get_mut(&id) else { continue };
            // One after the other, as over a socket; signals are faster.
            process.hears_last = process.hears_last.max(at);
            let at = match &command {
                ToAgent::Tell { message, .. } => {
                    if let ToRank::Assignment(assignment) = message {
                        process.assigned = assignment.generation;
                    }
                    process.hears_last
                }
                _ => at,
            };
            let command = Box::new(command.clone());
            self.at(at, Happens::Command { process: id, command });
        }
    }

    pub(super) fn command(&mut self, id: u64, command: ToAgent) {
        let Some(process) = self.processes.get_mut(&id).filter(|rank| rank.is_alive) else {
            return;
        };
        let failed = Exit { code: Some(exit_code::FAILED), signal: None };
        match command {
            ToAgent::Kill { .. } => {
                process.is_ending = true;
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
            ToAgent::Tell { message: ToRank::Release { generation, .. }, .. } => {
                if generation != process.generation || process.has_let_go {
                    return;
                }
                // A long kernel, a slow disk.
                if self.random.u32(..8) == 0 {
                    return self.fire(Kind::HoldsOn);
                }
                let seconds = 0.5 * self.random.f64();
                self.after(seconds, Happens::LetsGo { process: id, generation });
            }
            ToAgent::Tell { message: ToRank::Assignment(assignment), .. } => {
                self.join(id, &assignment);
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
        let Some(process) = self.processes.get_mut(&id).filter(|process| !process.has_let_go)
        else {
            return;
        };
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
        if world.is_broken || !self.is_whole(generation, &world) {
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
        self.after(seconds, Happens::Commit { process, generation, step });
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
            let found = self.processes.get_mut(&process);
            let Some(found) = found.filter(|found| found.is_alive && !found.has_let_go) else {
                continue;
            };
            found.is_ending = true;
            self.say(process, FromRank::Finished { step: STEPS });
            let exit = Exit { code: Some(exit_code::DONE), signal: None };
            let seconds = 0.3 * self.random.f64();
            self.after(seconds, Happens::RankEnds { process, exit });
        }
    }

    /// A rank says that it fails, and lets go where it has lost a link, else ends.
    pub(super) fn fail(&mut self, id: u64, class: FailureClass) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        if !process.is_alive || process.is_ending || process.has_let_go {
            return;
        }
        let stays = class == FailureClass::Transient;
        process.is_ending = !stays;
        let (step, generation) = (process.step, process.generation);
        self.say(id, failure(class, step, "simulated"));
        if stays {
            return self.after(0.02, Happens::LetsGo { process: id, generation });
        }
        let exit = Exit { code: Some(exit_code::FAILED), signal: None };
        self.after(0.02, Happens::RankEnds { process: id, exit });
    }

    pub(super) fn end_rank(&mut self, id: u64, exit: Exit) {
        let Some(process) = self.processes.get_mut(&id).filter(|rank| rank.is_alive) else {
            return;
        };
        (process.is_alive, process.exit) = (false, Some(exit));
        let RankProcess { agent, generation, assigned, rank, .. } = *process;
        let news = News::Exited { exit, last_lines: Vec::new() };
        let input = Box::new(Input { generation: assigned, rank, news });
        self.after(0.0, Happens::Said { agent, input });
        if exit.code == Some(exit_code::DONE) {
            return;
        }
        self.lose_links(generation);
    }
}
