//! How long a coordinator may be sure that it is the only one: pure, with the time as an argument.
//!
//! The store ends a lease [`ttl`](Tenure::new) after it was last renewed, by its own clock, and it
//! heard of a renewal no earlier than that was asked for. So by this process's clock the lease
//! holds at least until `asked + ttl`, less what the clocks' speeds may differ.

use std::time::{Duration, Instant};

/// Renewals within the time of a lease.
const RENEWALS: u32 = 5;
/// The share of a lease that is not counted on.
const MARGIN: u32 = 10;
/// The wait after a failed renewal.
const RETRY: Duration = Duration::from_millis(300);

/// One holder's time.
#[derive(Clone, Debug)]
pub struct Tenure {
    ttl: Duration,
    asked: Instant,
    next: Instant,
}

impl Tenure {
    /// Of a lease of `ttl` that was asked for at `asked`, and given.
    pub fn new(ttl: Duration, asked: Instant) -> Self {
        Self { ttl, asked, next: asked + ttl / RENEWALS }
    }

    /// A renewal that was asked for at `asked` was given.
    pub fn renewed(&mut self, asked: Instant) {
        self.asked = self.asked.max(asked);
        self.next = asked + self.ttl / RENEWALS;
    }

    /// A renewal got no answer.
    pub fn unanswered(&mut self, now: Instant) {
        self.next = now + RETRY;
    }

    /// When the next renewal is due.
    pub fn next_renewal(&self) -> Instant {
        self.next
    }

    /// Until when nobody else can hold the run.
    pub fn sure_until(&self) -> Instant {
        self.asked + (self.ttl - self.ttl / MARGIN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TTL: Duration = Duration::from_secs(5);

    /// A store with a clock that runs a little faster or slower, and two coordinators, each of
    /// which pauses, is cut off or gets its answers late.
    struct World {
        start: Instant,
        /// Milliseconds.
        now: u64,
        speed: f64,
        /// Who holds the lease, and until when by the store's clock.
        lease: Option<(usize, f64)>,
        sides: [Option<Tenure>; 2],
        /// Answers under way: (arrives at, side, asked at, given).
        answers: Vec<(u64, usize, Instant, bool)>,
    }

    impl World {
        fn at(&self, millis: u64) -> Instant {
            self.start + Duration::from_millis(millis)
        }

        fn store_now(&self) -> f64 {
            self.now as f64 * self.speed
        }

        fn ask(&mut self, side: usize, there: u64, back: u64) {
            let asked = self.at(self.now);
            self.now += there;
            let now = self.store_now();
            let is_free = self.lease.is_none_or(|(holder, until)| holder == side || until <= now);
            if is_free {
                self.lease = Some((side, now + TTL.as_secs_f64() * 1e3));
            }
            self.answers.push((self.now + back, side, asked, is_free));
        }

        fn hear(&mut self) {
            let now = self.now;
            let due = self.answers.extract_if(.., |(at, ..)| *at <= now).collect::<Vec<_>>();
            for (_, side, asked, given) in due {
                match (&mut self.sides[side], given) {
                    (Some(tenure), true) => tenure.renewed(asked),
                    (none, true) => *none = Some(Tenure::new(TTL, asked)),
                    (some, false) => *some = None,
                }
            }
        }

        fn num_sure(&self) -> usize {
            let now = self.at(self.now);
            self.sides.iter().flatten().filter(|tenure| now < tenure.sure_until()).count()
        }
    }

    proptest! {
        #[test]
        fn two_coordinators_are_never_sure_at_once(
            events in prop::collection::vec(
                (0_usize..2, 0_u64..4000, 0_u64..3000, 0_u64..9000), 1..60,
            ),
            speed in 0.95_f64..1.05,
        ) {
            let mut world = World {
                start: Instant::now(), now: 0, speed, lease: None, sides: [None, None],
                answers: Vec::new(),
            };
            for (side, wait, there, back) in events {
                world.now += wait;
                world.hear();
                prop_assert!(world.num_sure() <= 1);
                world.ask(side, there, back);
                world.hear();
                prop_assert!(world.num_sure() <= 1);
            }
        }
    }

    #[test]
    fn a_lease_that_is_renewed_stays_sure() {
        let start = Instant::now();
        let mut tenure = Tenure::new(TTL, start);
        assert_eq!(tenure.next_renewal(), start + Duration::from_secs(1));
        tenure.renewed(start + Duration::from_secs(1));
        tenure.unanswered(start + Duration::from_secs(3));
        assert_eq!(tenure.next_renewal(), start + Duration::from_millis(3300));
        assert_eq!(tenure.sure_until(), start + Duration::from_millis(5500));
    }
}
