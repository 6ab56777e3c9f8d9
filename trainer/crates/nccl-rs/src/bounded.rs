//! Waits that end: for a lock, for a state, for a call that may hang.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

/// Polls that come at once, before the first sleep: most work is on its stream by then.
const EAGER_POLLS: u32 = 64;
const SHORTEST_SLEEP: Duration = Duration::from_micros(20);
const LONGEST_SLEEP: Duration = Duration::from_millis(1);

/// The rhythm of a poll: soon at first, then once a millisecond, up to a limit.
pub(crate) struct Pace {
    end: Instant,
    num_polls: u32,
    sleep: Duration,
}

impl Pace {
    pub(crate) fn new(limit: Duration) -> Pace {
        Pace { end: Instant::now() + limit, num_polls: 0, sleep: SHORTEST_SLEEP }
    }

    /// Waits before the next poll; false when the time is over.
    pub(crate) fn pause(&mut self) -> bool {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        self.num_polls = self.num_polls.saturating_add(1);
        if self.num_polls <= EAGER_POLLS {
            thread::yield_now();
        } else {
            thread::sleep(self.sleep.min(left));
            self.sleep = (self.sleep * 2).min(LONGEST_SLEEP);
        }
        true
    }
}

/// Takes a lock within the limit. A holder that panicked leaves nothing half done here.
pub(crate) fn lock_within<T>(mutex: &Mutex<T>, limit: Duration) -> Option<MutexGuard<'_, T>> {
    let mut pace = Pace::new(limit);
    loop {
        match mutex.try_lock() {
            Ok(guard) => return Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) if pace.pause() => {}
            Err(TryLockError::WouldBlock) => return None,
        }
    }
}

/// Runs `work` on a thread of its own and waits for it within the limit. What comes too late is
/// left to itself.
pub(crate) fn run_within<T: Send + 'static>(
    limit: Duration,
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, String> {
    let (sender, receiver) = channel();
    let run = move || {
        // The waiter may have left.
        let _ = sender.send(work());
    };
    let thread = thread::Builder::new().name(name.to_string()).spawn(run);
    thread.map_err(|error| format!("no thread for {name}: {error}"))?;
    receiver.recv_timeout(limit).map_err(|error| match error {
        RecvTimeoutError::Timeout => format!("{name} has not returned in {} ms", limit.as_millis()),
        RecvTimeoutError::Disconnected => format!("{name} panicked"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(20);

    #[test]
    fn a_lock_that_is_held_is_given_up() {
        let mutex = Mutex::new(1);
        let guard = lock_within(&mutex, SHORT).unwrap();
        let start = Instant::now();
        assert!(lock_within(&mutex, SHORT).is_none());
        assert!(start.elapsed() >= SHORT);
        drop(guard);
        assert_eq!(*lock_within(&mutex, SHORT).unwrap(), 1);
    }

    #[test]
    fn work_is_waited_for_within_its_limit() {
        assert_eq!(run_within(Duration::from_secs(5), "add", || 1 + 1), Ok(2));
        let late = run_within(SHORT, "sleep", || thread::sleep(SHORT * 10));
        assert_eq!(late.unwrap_err(), "sleep has not returned in 20 ms");
    }
}
