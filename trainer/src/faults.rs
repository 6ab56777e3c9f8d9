//! Faults on purpose, for tests: a rank that ends in the middle of its work.
//!
//! `PHALANX_STEP_FAULTS` is a list, separated by `;`, of `kill:RANK:STEP:GENERATION:MICROSECONDS`:
//! that rank of that generation tells of it by an event `fault_injected`, and kills itself with
//! SIGKILL so many microseconds after it has begun the step, whatever it does by then. When the
//! variable is unset, a step costs one load of a constant.

use crate::error::Result;
use crate::state::Rank;
use rank_protocol::message::Event;
use rustix::process::{Signal, getpid, kill_process};
use std::sync::OnceLock;
use std::time::Duration;

/// Name of the variable.
pub const VARIABLE: &str = "PHALANX_STEP_FAULTS";

/// One of the list.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Fault {
    rank: usize,
    step: u64,
    generation: u64,
    after: Duration,
}

static ARMED: OnceLock<Vec<Fault>> = OnceLock::new();

fn parse(text: &str) -> Vec<Fault> {
    let one = |text: &str| {
        let parts: Vec<u64> =
            text.strip_prefix("kill:")?.split(':').map_while(|part| part.parse().ok()).collect();
        let [rank, step, generation, micros] = parts[..] else { return None };
        let after = Duration::from_micros(micros);
        Some(Fault { rank: usize::try_from(rank).ok()?, step, generation, after })
    };
    text.split(';').filter_map(one).collect()
}

/// A rank begins its next step: brings about the fault that is due.
///
/// # Errors
/// Where the agent is gone.
pub fn at_step(rank: &Rank) -> Result<()> {
    let armed = ARMED.get_or_init(|| parse(&std::env::var(VARIABLE).unwrap_or_default()));
    if armed.is_empty() {
        return Ok(());
    }
    let place = rank.client.assignment();
    let here = (place.rank, rank.step + 1, place.generation);
    let is_due = |fault: &&Fault| (fault.rank, fault.step, fault.generation) == here;
    let Some(fault) = armed.iter().find(is_due) else { return Ok(()) };
    let fields = [("step".to_owned(), fault.step.into())].into_iter().collect();
    rank.client.event(Event { kind: "fault_injected".into(), fields })?;
    let after = fault.after;
    std::thread::spawn(move || {
        std::thread::sleep(after);
        let _ = kill_process(getpid(), Signal::KILL);
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_is_read_as_documented() {
        let after = Duration::from_micros(700);
        let one = Fault { rank: 3, step: 17, generation: 2, after };
        let other = Fault { rank: 0, step: 1, generation: 1, after: Duration::ZERO };
        assert_eq!(parse("kill:3:17:2:700;kill:0:1:1:0"), [one, other]);
        assert_eq!(parse("kill:3:17;stop:1:1:1:1;"), []);
    }
}
