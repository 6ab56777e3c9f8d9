//! Connections, and the messages over them.
#![cfg(test)]

use super::{Happens, World};
use crate::cluster::agent::{Happening as AgentHappening, Talk};
use crate::cluster::nodes::Happening;
use crate::cluster::server::Arrival;
use crate::cluster::simulation::faults::Kind;
use crate::cluster::simulation::network::{Answered, Direction, Side, SimulatedDoor, Wire};
use rank_protocol::agent::{Answer, FromAgent, ToAgent};
use rank_protocol::session::Numbered;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::mpsc::error::TryRecvError;

impl World {
    /// An attempt to connect fails; with an exit code, for good.
    pub(super) fn dial_failed(&mut self, agent: u64, why: String, code: Option<i32>) {
        let failed = match code {
            None => AgentHappening::Failed { why },
            Some(code) => AgentHappening::Refused { code, why },
        };
        self.with_agent(agent, |process, now| process.agent.at(now).happened(failed));
    }

    pub(super) fn dialed(&mut self, id: u64) {
        // Whom nobody waits for any more finds no answer.
        let Some(dial) = self.dials.get_mut(&id) else { return };
        let (agent, host) = (dial.agent, dial.host);
        let Some(join) = dial.join.take() else { return };
        let head = self.head.as_ref().filter(|head| head.finish.is_none());
        let Some(head) = head else {
            self.dials.remove(&id);
            let why = "connection refused".to_owned();
            return self.after(0.001, Happens::DialFailed { agent, why, code: None });
        };
        let (epoch, generation) = (head.epoch, head.generation());
        let is_stale = join.running.as_ref().is_some_and(|running| running.generation < generation);
        let answer = Rc::new(RefCell::new(None));
        let door = SimulatedDoor { now: self.now, answer: Rc::clone(&answer) };
        let from = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
        let arrival = Box::new(Arrival { join, from, door: Box::new(door) });
        self.with_head(epoch, |head, now, log| {
            head.happened(Happening::Arrived(arrival), now, log);
        });
        if is_stale {
            self.fire(Kind::StaleAgent);
        }
        let arrival = self.ways[host].arrival(Side::Agent, self.now, &mut self.random);
        match answer.take() {
            Some(Answered::Open { answer, which, down }) => {
                let wire = self.new_id();
                self.answers.insert(wire, answer);
                let down = Direction { last: arrival, ..down };
                let (number, is_reset, up, is_told) = (0, false, None, [false; 2]);
                let wire_is =
                    Wire { host, agent, epoch, which, number, is_reset, up, down, is_told };
                self.wires.insert(wire, wire_is);
                self.at(arrival, Happens::Answered { dial: id, wire });
            }
            Some(Answered::Refused { code, reason: why }) => {
                self.dials.remove(&id);
                self.at(arrival, Happens::DialFailed { agent, why, code: Some(code) });
            }
            None => {}
        }
    }

    pub(super) fn answered(&mut self, id: u64, wire: u64) {
        let answer = self.answers.remove(&wire);
        let Some(dial) = self.dials.remove(&id) else { return self.close(wire, Side::Head) };
        let is_gone = self.wires.get(&wire).is_none_or(|wire| wire.is_reset);
        let Some(Answer::Welcome { conversation, taken, epoch }) = answer.filter(|_| !is_gone)
        else {
            self.close(wire, Side::Head);
            return self.dial_failed(dial.agent, "it was reset".into(), None);
        };
        let opened = Rc::new(RefCell::new(None));
        let (slot, now) = (Rc::clone(&opened), self.now);
        let talk: Talk = Box::new(move |number, again| {
            let (sender, up) = Direction::new(now);
            for frame in again {
                sender.try_send(frame).unwrap();
            }
            *slot.borrow_mut() = Some((number, up));
            sender
        });
        let connected = AgentHappening::Connected { conversation, taken, epoch, talk };
        self.with_agent(dial.agent, |process, now| process.agent.at(now).happened(connected));
        let Some((number, up)) = opened.take() else {
            return self.close(wire, Side::Head);
        };
        if let Some(wire) = self.wires.get_mut(&wire) {
            (wire.number, wire.up) = (number, Some(up));
        }
    }

    /// Takes what was queued at both ends of each connection, and sends it on its way.
    pub(super) fn pump(&mut self) {
        let ids: Vec<u64> = self.wires.keys().copied().collect();
        for id in ids {
            let Some(wire) = self.wires.get_mut(&id) else { continue };
            let host = wire.host;
            let (up, is_up_closed) = wire.up.as_mut().map_or((vec![], false), drain);
            let (down, is_down_closed) = drain(&mut wire.down);
            for frame in up {
                let frame = Box::new(frame);
                let up = || Happens::Up { wire: id, frame: frame.clone() };
                self.send((id, host), Side::Head, frame.m.is_some(), up);
            }
            for frame in down {
                let frame = Box::new(frame);
                let down = || Happens::Down { wire: id, frame: frame.clone() };
                self.send((id, host), Side::Agent, frame.m.is_some(), down);
            }
            // Who closes hears nothing any more; the other side learns of it.
            if is_up_closed {
                self.close(id, Side::Head);
            }
            if is_down_closed {
                self.close(id, Side::Agent);
            }
            let is_over = |wire: &Wire| wire.is_told == [true; 2];
            if self.wires.get(&id).is_some_and(is_over) && !self.has_answer(id) {
                // What is under way finds nobody.
                self.wires.remove(&id);
            }
        }
    }

    fn has_answer(&self, wire: u64) -> bool {
        self.answers.contains_key(&wire)
    }

    fn send(
        &mut self,
        (id, host): (u64, usize),
        side: Side,
        is_message: bool,
        happens: impl Fn() -> Happens,
    ) {
        let way = &mut self.ways[host];
        let is_cut = way.is_cut(side, self.now);
        let is_slow = self.now < way.slow.0;
        let mut at = way.arrival(side, self.now, &mut self.random);
        let is_double = is_message && way.duplicate > 0;
        let is_held = is_message && !is_double && way.reorder > 0;
        way.duplicate -= u32::from(is_double);
        way.reorder -= u32::from(is_held);
        let Some(wire) = self.wires.get_mut(&id) else { return };
        let (last, held) = match side {
            Side::Head => match &mut wire.up {
                Some(up) => (&mut up.last, &mut up.held),
                None => return,
            },
            Side::Agent => (&mut wire.down.last, &mut wire.down.held),
        };
        at = at.max(*last + Duration::from_micros(1));
        if is_held {
            at += Duration::from_millis(self.random.u64(5..500));
            *held = Some(at);
        } else {
            *last = at;
        }
        let has_overtaken = !is_held && held.take_if(|held| at < *held).is_some();
        self.at(at, happens());
        if is_double {
            self.at(at + Duration::from_micros(1), happens());
            self.fire(Kind::Duplicate);
        }
        for (is_met, kind) in
            [(is_cut, Kind::Partition), (is_slow, Kind::Delay), (has_overtaken, Kind::Reorder)]
        {
            if is_met {
                self.fire(kind);
            }
        }
    }

    /// A connection ends for this side, once what was sent to it before has come.
    fn close(&mut self, id: u64, side: Side) {
        let Some(wire) = self.wires.get_mut(&id) else { return };
        let other = if side == Side::Head { Side::Agent } else { Side::Head };
        wire.is_told[other as usize] = true;
        if wire.is_told[side as usize] {
            return;
        }
        let last = match side {
            Side::Head => wire.up.as_ref().map_or(self.now, |up| up.last),
            Side::Agent => wire.down.last,
        };
        let at = self.ways[wire.host].arrival(side, self.now, &mut self.random).max(last);
        self.at(at + Duration::from_micros(1), Happens::Ended { wire: id, side });
    }

    pub(super) fn ended(&mut self, id: u64, side: Side) {
        let Some(wire) = self.wires.get_mut(&id) else { return };
        if std::mem::replace(&mut wire.is_told[side as usize], true) {
            return;
        }
        let (agent, number, epoch) = (wire.agent, wire.number, wire.epoch);
        let ((node, connection), why) = (wire.which, "closed".to_owned());
        match side {
            Side::Head => self.with_head(epoch, |head, now, log| {
                head.happened(Happening::Ended { node, connection, why }, now, log);
            }),
            Side::Agent => {
                let ended = AgentHappening::Ended { connection: number, why };
                self.with_agent(agent, |process, now| process.agent.at(now).happened(ended));
            }
        }
        // The other side closes its end too.
        let other = if side == Side::Head { Side::Agent } else { Side::Head };
        self.close(id, other);
    }

    pub(super) fn arrived_up(&mut self, id: u64, frame: Box<Numbered<FromAgent>>) {
        let Some(wire) = self.wires.get(&id) else { return };
        if wire.is_reset || wire.is_told[Side::Head as usize] {
            return;
        }
        let ((node, connection), epoch) = (wire.which, wire.epoch);
        let said = Happening::Said { node, connection, at: self.now, frame };
        self.with_head(epoch, |head, now, log| head.happened(said, now, log));
    }

    pub(super) fn arrived_down(&mut self, id: u64, frame: Box<Numbered<ToAgent>>) {
        let Some(wire) = self.wires.get(&id) else { return };
        if wire.is_reset || wire.is_told[Side::Agent as usize] {
            return;
        }
        let (agent, connection) = (wire.agent, wire.number);
        let said = AgentHappening::Said { connection, frame };
        self.with_agent(agent, |process, now| process.agent.at(now).happened(said));
    }

    /// A connection is reset: what is under way is lost, and both sides learn of it.
    pub(super) fn reset(&mut self, id: u64) {
        if let Some(wire) = self.wires.get_mut(&id) {
            wire.is_reset = true;
            let sides = [Side::Head, Side::Agent].map(|side| (side, wire.is_told[side as usize]));
            for (side, _) in sides.into_iter().filter(|(_, is_told)| !is_told) {
                let seconds = 0.05 * self.random.f64();
                self.after(seconds, Happens::Ended { wire: id, side });
            }
        }
    }
}

/// What a sender has queued, and whether there will be no more.
fn drain<M>(direction: &mut Direction<M>) -> (Vec<Numbered<M>>, bool) {
    let Some(queue) = &mut direction.queue else { return (Vec::new(), false) };
    let mut frames = Vec::new();
    loop {
        match queue.try_recv() {
            Ok(frame) => frames.push(frame),
            Err(TryRecvError::Empty) => return (frames, false),
            Err(TryRecvError::Disconnected) => {
                direction.queue = None;
                return (frames, true);
            }
        }
    }
}
