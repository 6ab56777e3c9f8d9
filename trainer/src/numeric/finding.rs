//! What comes of doing a step again: a pure comparison.
//!
//! Each rank does its share of the step's samples (`first`), then that of the next data-parallel
//! rank (`moved`), then its own once more (`again`). The same samples give the same bits on every
//! rank of a layout, so that where three results of a share agree, its samples are what they are;
//! where one does not, the rank that made it has a bad device.

/// What a rank made of a share: its part of the loss, and the sum of the squares of what it added
/// to the gradients.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Print {
    /// Loss.
    pub loss: f64,
    /// Sum of squares.
    pub squares: f64,
}

impl Print {
    /// Equal to the last bit; which NaN it is says nothing.
    fn is_same(&self, other: &Print) -> bool {
        let same = |a: f64, b: f64| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
        same(self.loss, other.loss) && same(self.squares, other.squares)
    }
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// All results agree: the samples bring it about, or the weights.
    BadData,
    /// The results of these ranks differ from those of others.
    BadDevice {
        /// One rank; or all of one replica whose ranks work on one share together.
        ranks: Vec<usize>,
        /// Whether it computes wrongly each time; else it did so once.
        is_lasting: bool,
        /// Whether `again` can be relied on.
        is_again_sound: bool,
    },
    /// Results differ so that no one rank can be named.
    Unclear,
}

impl Finding {
    /// The word for it in `events.jsonl`.
    pub fn name(&self) -> &'static str {
        match self {
            Finding::BadData => "bad_data",
            Finding::BadDevice { .. } => "bad_device",
            Finding::Unclear => "unclear",
        }
    }

    /// The ranks that are suspected.
    pub fn ranks(&self) -> &[usize] {
        match self {
            Finding::BadDevice { ranks, .. } => ranks,
            Finding::BadData | Finding::Unclear => &[],
        }
    }
}

/// The three results of all ranks, by rank. Ranks that work on one share together are numbered one
/// after another.
#[derive(Clone, Debug, Default)]
pub struct Results {
    /// Number of shares: of data-parallel ranks.
    pub num_shares: usize,
    /// Of each rank's own share.
    pub first: Vec<Print>,
    /// Of the next data-parallel rank's share; its own where there is one data-parallel rank.
    pub moved: Vec<Print>,
    /// Of its own once more.
    pub again: Vec<Print>,
}

impl Results {
    /// Compares them.
    pub fn find(&self) -> Finding {
        let shares_where = |differs: fn(&Self, usize) -> bool| -> Vec<usize> {
            let has_one = |share: &usize| self.ranks_of(*share).any(|rank| differs(self, rank));
            (0..self.num_shares).filter(has_one).collect()
        };
        let changed = shares_where(Self::is_changed);
        let disputed = shares_where(Self::is_disputed);
        match (changed.as_slice(), disputed.as_slice()) {
            ([], []) => Finding::BadData,
            // The first result stands against two others.
            ([share], []) => self.device(*share, Self::is_changed, (false, true)),
            // A share that came out otherwise each time: its own rank cannot repeat itself, which
            // others can.
            ([share], [other]) if share == other && self.can_blame(*share) => {
                self.device(*share, Self::is_changed, (false, false))
            }
            // The one that did the share in its own rank's place stands against two.
            ([], [share]) => {
                let mover = self.mover_of(*share);
                let is_wrong = |results: &Self, rank: usize| {
                    let share = results.moved_share(rank / results.per_share());
                    let own = share * results.per_share() + rank % results.per_share();
                    results.is_disputed(own)
                };
                self.device(mover, is_wrong, (false, true))
            }
            // A rank that is wrong each time is against others in its own share and in the one
            // that it did in another's place.
            (changed, [a, b]) => {
                let is_lasting = |share: &usize| {
                    let both = [*share, self.moved_share(*share)];
                    let is_alone = self.num_shares > 2 || changed == [*share];
                    changed.iter().all(|other| other == share)
                        && (both == [*a, *b] || both == [*b, *a])
                        && is_alone
                };
                match [*a, *b].iter().find(|share| is_lasting(share)) {
                    Some(share) => self.device(*share, Self::is_disputed, (true, false)),
                    None => Finding::Unclear,
                }
            }
            _ => Finding::Unclear,
        }
    }

    fn device(
        &self,
        share: usize,
        is_wrong: impl Fn(&Self, usize) -> bool,
        (is_lasting, is_again_sound): (bool, bool),
    ) -> Finding {
        let ranks = self.ranks_of(share).filter(|rank| is_wrong(self, *rank)).collect();
        Finding::BadDevice { ranks, is_lasting, is_again_sound }
    }

    /// Whether the rank came to another result when it did its share again.
    fn is_changed(&self, rank: usize) -> bool {
        !self.first[rank].is_same(&self.again[rank])
    }

    /// Whether another rank came to another result for the rank's share.
    fn is_disputed(&self, rank: usize) -> bool {
        !self.again[rank].is_same(self.by_another(rank))
    }

    /// Whether a share whose three results are not two alike shows its rank to be bad: there are
    /// others, which repeat theirs, or the last of the three alone is another.
    fn can_blame(&self, share: usize) -> bool {
        let mut ranks = self.ranks_of(share);
        self.num_shares > 1 || ranks.all(|rank| self.first[rank].is_same(self.by_another(rank)))
    }

    /// What another rank made of the rank's share.
    fn by_another(&self, rank: usize) -> &Print {
        let mover = self.mover_of(rank / self.per_share());
        &self.moved[mover * self.per_share() + rank % self.per_share()]
    }

    fn per_share(&self) -> usize {
        self.first.len() / self.num_shares
    }

    fn ranks_of(&self, share: usize) -> std::ops::Range<usize> {
        share * self.per_share()..(share + 1) * self.per_share()
    }

    /// The share that a data-parallel rank did in another's place.
    fn moved_share(&self, rank: usize) -> usize {
        (rank + 1) % self.num_shares
    }

    /// The data-parallel rank that did a share in another's place.
    fn mover_of(&self, share: usize) -> usize {
        (share + self.num_shares - 1) % self.num_shares
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Results of `num_shares` shares of `per_share` ranks each, all alike.
    fn sound(num_shares: usize, per_share: usize) -> Results {
        let count = num_shares * per_share;
        let of = |share: usize, inner: usize| Print {
            loss: 1.0 + share as f64,
            squares: 10.0 + (share * per_share + inner) as f64,
        };
        let own = |rank: usize| of(rank / per_share, rank % per_share);
        let next = |rank: usize| of((rank / per_share + 1) % num_shares, rank % per_share);
        Results {
            num_shares,
            first: (0..count).map(own).collect(),
            moved: (0..count).map(next).collect(),
            again: (0..count).map(own).collect(),
        }
    }

    /// Each use of it makes a wrong result of its own.
    fn spoil(print: &mut Print) {
        print.squares *= 1.25;
    }

    fn device(ranks: &[usize], is_lasting: bool, is_again_sound: bool) -> Finding {
        Finding::BadDevice { ranks: ranks.to_vec(), is_lasting, is_again_sound }
    }

    #[test]
    fn results_that_agree_are_the_datas() {
        for (num_shares, per_share) in [(1, 1), (1, 4), (2, 1), (4, 1), (3, 2)] {
            let mut results = sound(num_shares, per_share);
            assert_eq!(results.find(), Finding::BadData);
            // Also where they are not finite, and NaNs differ in sign.
            results.first[0].loss = f64::NAN;
            results.again[0].loss = -f64::NAN;
            let mover = (num_shares - 1) * per_share;
            results.moved[mover].loss = f64::NAN;
            assert_eq!(results.find(), Finding::BadData);
        }
    }

    #[test]
    fn a_rank_that_was_wrong_once_is_named_and_its_share_is_sound_now() {
        for num_shares in [1, 2, 4] {
            for rank in 0..num_shares {
                let mut results = sound(num_shares, 1);
                spoil(&mut results.first[rank]);
                assert_eq!(results.find(), device(&[rank], false, true), "{num_shares}");
            }
        }
    }

    #[test]
    fn a_rank_that_was_wrong_in_anothers_place_is_named() {
        let mut results = sound(3, 1);
        spoil(&mut results.moved[2]);
        assert_eq!(results.find(), device(&[2], false, true));
    }

    #[test]
    fn a_rank_that_was_wrong_at_the_end_spoils_the_result() {
        for num_shares in [1, 3] {
            let mut results = sound(num_shares, 1);
            spoil(&mut results.again[0]);
            assert_eq!(results.find(), device(&[0], false, false));
        }
    }

    #[test]
    fn a_rank_that_is_always_wrong_in_the_same_way_is_named_among_three() {
        for num_shares in [3, 4, 8] {
            for rank in 0..num_shares {
                let mut results = sound(num_shares, 1);
                for prints in [&mut results.first, &mut results.moved, &mut results.again] {
                    spoil(&mut prints[rank]);
                }
                assert_eq!(results.find(), device(&[rank], true, false));
            }
        }
    }

    #[test]
    fn of_two_that_repeat_themselves_none_can_be_named() {
        let mut results = sound(2, 1);
        for prints in [&mut results.first, &mut results.moved, &mut results.again] {
            spoil(&mut prints[1]);
        }
        assert_eq!(results.find(), Finding::Unclear);
        // One that does not repeat itself can.
        spoil(&mut results.first[1]);
        assert_eq!(results.find(), device(&[1], true, false));
    }

    #[test]
    fn ranks_of_one_replica_are_named_together_where_all_differ() {
        let mut results = sound(2, 2);
        spoil(&mut results.first[3]);
        assert_eq!(results.find(), device(&[3], false, true));
        spoil(&mut results.first[2]);
        assert_eq!(results.find(), device(&[2, 3], false, true));
        let mut results = sound(2, 2);
        spoil(&mut results.moved[1]);
        assert_eq!(results.find(), device(&[1], false, true));
    }

    #[test]
    fn ranks_that_all_differ_have_no_finding() {
        let mut results = sound(4, 1);
        results.first.iter_mut().for_each(spoil);
        assert_eq!(results.find(), Finding::Unclear, "nothing repeats here");
        let mut results = sound(4, 1);
        results.moved.iter_mut().for_each(spoil);
        assert_eq!(results.find(), Finding::Unclear, "devices of several kinds");
    }
}
