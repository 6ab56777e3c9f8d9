//! What goes wrong in a simulation, and when: all of it from a seed.
#![cfg(test)]

use fastrand::Rng;
use std::time::Duration;

/// A kind of fault, or of something that faults lead to and that must have been met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Nothing gets through between a node and the coordinator, one way or both.
    Partition,
    /// Messages take seconds.
    Delay,
    /// A message comes twice over one connection.
    Duplicate,
    /// Two messages come in the other order.
    Reorder,
    /// A connection ends, with what was under way.
    Reset,
    /// The coordinator is killed, and started again later.
    HeadKilled,
    /// The coordinator does not run for some seconds.
    HeadPaused,
    /// An agent is killed, with its ranks.
    AgentKilled,
    /// An agent does not run for some seconds; its ranks do.
    AgentPaused,
    /// A node loses its power: nobody hears of it.
    NodeLost,
    /// A rank is killed.
    RankKilled,
    /// A rank stands still, and takes no notice of SIGTERM.
    RankFrozen,
    /// A rank cannot be started.
    CannotStart,
    /// Another agent takes the name of one that lives.
    Impostor,
    /// An agent that was given up is back, with ranks of an older generation.
    StaleAgent,
    /// Ranks of an older generation tried to commit, and were refused.
    StaleCommit,
    /// Two generations had all their ranks at one time, of which one may commit.
    StaleWorld,
    /// A new coordinator went on with the ranks of the one before.
    Adopted,
    /// A process went on in another generation.
    Kept,
    /// A rank that was told to let go of its generation does not.
    HoldsOn,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 20] = [
        Kind::Partition,
        Kind::Delay,
        Kind::Duplicate,
        Kind::Reorder,
        Kind::Reset,
        Kind::HeadKilled,
        Kind::HeadPaused,
        Kind::AgentKilled,
        Kind::AgentPaused,
        Kind::NodeLost,
        Kind::RankKilled,
        Kind::RankFrozen,
        Kind::CannotStart,
        Kind::Impostor,
        Kind::StaleAgent,
        Kind::StaleCommit,
        Kind::StaleWorld,
        Kind::Adopted,
        Kind::Kept,
        Kind::HoldsOn,
    ];
}

/// What is done to the world. `host` and `rank` are taken modulo how many there are.
#[derive(Clone, Debug)]
pub enum Fault {
    /// See [`Kind::Partition`]; `hosts` is a set of bits.
    Partition {
        hosts: u64,
        up: bool,
        down: bool,
        lasts: Duration,
    },
    Delay {
        host: usize,
        extra: Duration,
        lasts: Duration,
    },
    Duplicate {
        host: usize,
        count: u32,
    },
    Reorder {
        host: usize,
        count: u32,
    },
    Reset {
        host: usize,
    },
    KillHead {
        away: Duration,
        loses: bool,
    },
    PauseHead {
        lasts: Duration,
    },
    KillAgent {
        host: usize,
        away: Duration,
    },
    PauseAgent {
        hosts: u64,
        lasts: Duration,
    },
    LoseNode {
        host: usize,
        away: Duration,
    },
    KillRank {
        rank: usize,
    },
    FreezeRank {
        rank: usize,
        lasts: Duration,
    },
    CannotStart {
        host: usize,
    },
    Impostor {
        host: usize,
    },
}

/// Time in which faults happen.
pub const WINDOW: Duration = Duration::from_secs(90);

fn seconds(random: &mut Rng, least: f64, most: f64) -> Duration {
    // Short ones are as likely as long ones, whatever the unit.
    let scale = (most / least).ln();
    Duration::from_secs_f64(least * (scale * random.f64()).exp())
}

/// The faults of a seed, with the time of each since the start.
pub fn draw(random: &mut Rng, hosts: usize) -> Vec<(Duration, Fault)> {
    let count = random.usize(2..12);
    (0..count).map(|_| (WINDOW.mul_f64(random.f64()), one(random, hosts))).collect()
}

fn one(random: &mut Rng, num_hosts: usize) -> Fault {
    let host = random.usize(..num_hosts);
    // One host mostly, and now and then several at once.
    let several = 1_u64 << host | if random.u32(..4) == 0 { random.u64(..) } else { 0 };
    match random.u32(..20) {
        0..3 => {
            let way = random.u32(..3);
            let lasts = seconds(random, 0.3, 30.0);
            Fault::Partition { hosts: several, up: way != 1, down: way != 2, lasts }
        }
        3 => Fault::Delay {
            host,
            extra: seconds(random, 0.2, 4.0),
            lasts: seconds(random, 1.0, 20.0),
        },
        4 => Fault::Duplicate { host, count: random.u32(1..6) },
        5 => Fault::Reorder { host, count: random.u32(1..4) },
        6 => Fault::Reset { host },
        7 | 8 => Fault::KillHead { away: seconds(random, 0.2, 25.0), loses: random.bool() },
        9 => Fault::PauseHead { lasts: seconds(random, 0.5, 15.0) },
        10 | 11 => Fault::KillAgent { host, away: seconds(random, 0.3, 20.0) },
        12 | 13 => Fault::PauseAgent { hosts: several, lasts: seconds(random, 0.5, 25.0) },
        14 => Fault::LoseNode { host, away: seconds(random, 5.0, 100.0) },
        15 | 16 => Fault::KillRank { rank: random.usize(..64) },
        17 => Fault::FreezeRank { rank: random.usize(..64), lasts: seconds(random, 1.0, 60.0) },
        18 => Fault::CannotStart { host },
        _ => Fault::Impostor { host },
    }
}
