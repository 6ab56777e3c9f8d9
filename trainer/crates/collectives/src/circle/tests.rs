//! Circles by hand, and in random programs of ranks: what is found is always a deadlock, and a
//! deadlock is always found.

use super::*;

fn position(key: &str, index: u64, of: &[usize], issued: &[(&str, u64)]) -> Position {
    let issued = issued.iter().map(|(key, count)| ((*key).to_string(), *count)).collect();
    let words = format!("operation {index} of group {key}");
    Position { is_over: false, words, key: key.to_string(), index, of: of.to_vec(), issued }
}

/// The ranks of the circle that rank 0 finds itself in.
fn check(positions: &[Option<Position>], expected: &[usize]) {
    let own = positions[0].clone().unwrap();
    let found = find(0, &own, &mut |rank| positions[rank].clone()).unwrap_or_default();
    let ranks: Vec<usize> = found.iter().map(|(rank, _)| *rank).collect();
    assert_eq!(ranks, expected);
}

#[test]
fn ranks_that_wait_for_each_other_are_found() {
    let in_a = position("a", 0, &[1], &[("a", 1)]);
    let in_b = position("b", 3, &[0], &[("a", 0), ("b", 4)]);
    check(&[Some(in_a.clone()), Some(in_b.clone())], &[0, 1]);
    // The other is late, or its wait has failed; or it does something else, or waits for a third.
    check(&[Some(in_a.clone()), None], &[]);
    check(&[Some(in_a.clone()), Some(Position { is_over: true, ..in_b.clone() })], &[]);
    let came = position("b", 3, &[0], &[("a", 1), ("b", 4)]);
    check(&[Some(in_a.clone()), Some(came)], &[]);
    let of_third = position("c", 0, &[2], &[("c", 1)]);
    check(&[Some(in_a.clone()), Some(of_third.clone()), None], &[]);
    // Through a third, which waits for this one.
    let third = position("d", 7, &[1, 0], &[("d", 8)]);
    check(&[Some(in_a.clone()), Some(of_third.clone()), Some(third)], &[0, 1, 2]);
    // What is waited for was issued here before.
    let served = position("a", 0, &[1], &[("a", 1), ("b", 4)]);
    check(&[Some(served), Some(in_b)], &[]);
    // Others wait for each other, and this one for them: they find it.
    let beside = position("d", 7, &[1], &[("d", 8)]);
    check(&[Some(in_a), Some(of_third), Some(beside)], &[]);
}

#[test]
fn a_circle_in_words_names_who_waits_where() {
    let circle = [(4, position("a", 0, &[1], &[])), (1, position("b", 3, &[4], &[]))];
    assert_eq!(
        describe(&circle),
        "rank 4 waits in operation 0 of group a, which rank 1 has not issued; rank 1 waits in \
         operation 3 of group b, which rank 4 has not issued; so none of them can go on"
    );
}

#[test]
fn who_holds_up_a_rank_is_found_through_others() {
    let check = |positions: &[Option<Position>], expected: &str| {
        let mut read = |rank: usize| positions.get(rank).cloned().flatten();
        assert_eq!(held_up(0, &mut read), expected);
    };
    let in_a = position("a", 0, &[1, 2], &[("a", 1)]);
    let came = position("a", 0, &[0, 1], &[("a", 1)]);
    let in_b = position("b", 3, &[3], &[("b", 4)]);
    check(&[None, Some(in_a.clone())], "");
    check(
        &[Some(in_a.clone()), None, Some(came.clone())],
        "; it waits in operation 0 of group a for rank 1, which waits in nothing",
    );
    check(
        &[Some(in_a.clone()), Some(in_b), Some(came.clone()), None],
        "; it waits in operation 0 of group a for rank 1; that one waits in operation 3 of group b \
         for rank 3, which waits in nothing",
    );
    check(
        &[Some(in_a.clone())],
        "; it waits in operation 0 of group a for rank 1 or 2, which \
         waits in nothing",
    );
    check(&[Some(in_a), Some(came.clone()), Some(came)], "; it waits in operation 0 of group a");
}

#[test]
fn a_position_is_read_as_written() {
    let written = position("a key with spaces", 9, &[3, 12], &[("a", 1), ("b c", u64::MAX)]);
    assert_eq!(Position::decode(&written.encode()), Some(written));
    let alone = Position { is_over: true, words: String::new(), ..position("a", 0, &[], &[]) };
    assert_eq!(Position::decode(&alone.encode()), Some(alone));
    for garbage in ["", "words", "words\n1 a\n2", "true\nw\n1 a\nb\n", "true\nw\n1 a\n2\nmany b\n"]
    {
        assert_eq!(Position::decode(garbage.as_bytes()), None, "{garbage:?}");
    }
}

#[test]
fn a_search_has_an_end() {
    let of: Vec<usize> = (1..1000).collect();
    let own = position("world", 0, &of, &[("world", 1)]);
    let mut num_read = 0;
    let found = find(0, &own, &mut |rank| {
        num_read += 1;
        Some(position("world", 0, &[(rank + 1) % 1000], &[]))
    });
    assert_eq!((found, num_read), (None, MOST_READ));
}

/// Numbers from a seed (Steele et al. 2014, SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % limit as u64) as usize
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Act {
    /// Issue the next operation of a group.
    Issue(usize),
    /// Wait for an operation of a group.
    Wait(usize, u64),
}

/// Issues operations in this order, given by their groups, and waits for some of them at once, for
/// others with one that comes later.
fn program(order: &[usize], num_groups: usize, random: &mut Random) -> Vec<Act> {
    let (mut acts, mut owed, mut counts) = (Vec::new(), Vec::new(), vec![0; num_groups]);
    for &group in order {
        acts.push(Act::Issue(group));
        owed.push(Act::Wait(group, counts[group]));
        counts[group] += 1;
        if random.below(3) > 0 {
            acts.append(&mut owed);
        }
    }
    acts.append(&mut owed);
    acts
}

/// What ranks do, and how far they have come.
struct World {
    /// Members by group.
    groups: Vec<Vec<usize>>,
    programs: Vec<Vec<Act>>,
    done: Vec<usize>,
    issued: Vec<Vec<u64>>,
    /// What each said last.
    said: Vec<Option<Position>>,
}

impl World {
    /// Programs in one order of operations, with waits some way behind; where `broken`, some ranks
    /// have some neighbours in another order.
    fn new(random: &mut Random, broken: bool) -> World {
        let num_ranks = 2 + random.below(4);
        let groups: Vec<Vec<usize>> = (0..1 + random.below(4))
            .map(|_| {
                let first = random.below(num_ranks);
                let size = 2 + random.below(num_ranks - 1);
                (0..size).map(|at| (first + at) % num_ranks).collect()
            })
            .collect();
        let all: Vec<usize> = (0..12).map(|_| random.below(groups.len())).collect();
        let is_in = |rank: usize, group: usize| groups[group].contains(&rank);
        let mut orders: Vec<Vec<usize>> = (0..num_ranks)
            .map(|rank| all.iter().copied().filter(|group| is_in(rank, *group)).collect())
            .collect();
        for _ in 0..if broken { 3 } else { 0 } {
            let order = &mut orders[random.below(num_ranks)];
            if order.len() > 1 {
                let at = random.below(order.len() - 1);
                order.swap(at, at + 1);
            }
        }
        let programs = orders.iter().map(|order| program(order, groups.len(), random)).collect();
        let issued = vec![vec![0; groups.len()]; num_ranks];
        let (done, said) = (vec![0; num_ranks], vec![None; num_ranks]);
        World { groups, programs, done, issued, said }
    }

    fn wait_of(&self, rank: usize) -> Option<(usize, u64)> {
        match self.programs[rank].get(self.done[rank]) {
            Some(Act::Wait(group, number)) => Some((*group, *number)),
            _ => None,
        }
    }

    /// Does a rank's next act, where it can.
    fn advance(&mut self, rank: usize) -> bool {
        match self.programs[rank].get(self.done[rank]) {
            None => return false,
            Some(Act::Issue(group)) => self.issued[rank][*group] += 1,
            Some(Act::Wait(group, number)) => {
                let has_issued = |member: &usize| self.issued[*member][*group] > *number;
                if !self.groups[*group].iter().all(has_issued) {
                    return false;
                }
            }
        }
        self.done[rank] += 1;
        true
    }

    /// What a rank has to say, where it waits.
    fn position(&self, rank: usize) -> Option<Position> {
        let (group, number) = self.wait_of(rank)?;
        let others = self.groups[group].iter().copied().filter(|other| *other != rank);
        let issued = self.issued[rank].iter().enumerate();
        Some(Position {
            is_over: false,
            words: String::new(),
            key: group.to_string(),
            index: number,
            of: others.collect(),
            issued: issued.map(|(group, count)| (group.to_string(), *count)).collect(),
        })
    }

    fn look(&self, rank: usize) -> Option<Vec<usize>> {
        let own = self.said[rank].as_ref()?;
        let circle = find(rank, own, &mut |other| self.said[other].clone())?;
        Some(circle.into_iter().map(|(rank, _)| rank).collect())
    }
}

/// Runs a world to its end; the ranks that were found to be in circles on the way, and in the end.
fn run(world: &mut World, random: &mut Random) -> (Vec<usize>, Vec<usize>) {
    let (mut found, mut idle) = (Vec::new(), 0);
    let num_ranks = world.programs.len();
    while idle < 200 {
        let rank = random.below(num_ranks);
        idle = if world.advance(rank) { 0 } else { idle + 1 };
        // Some say where they are, some look, whatever has become of those who said it before.
        let speaker = random.below(num_ranks);
        if random.below(3) == 0 && world.wait_of(speaker).is_some() {
            world.said[speaker] = world.position(speaker);
        }
        found.extend(world.look(random.below(num_ranks)).unwrap_or_default());
    }
    for rank in 0..num_ranks {
        world.said[rank] = world.position(rank).or(world.said[rank].take());
    }
    (found, (0..num_ranks).filter_map(|rank| world.look(rank)).flatten().collect())
}

#[test]
fn what_is_found_is_a_deadlock_and_a_deadlock_is_found() {
    let (mut num_stuck, mut num_early) = (0, 0);
    for seed in 0..3000 {
        let mut random = Random(seed);
        let mut world = World::new(&mut random, seed % 3 > 0);
        let (found, at_end) = run(&mut world, &mut random);
        let is_stuck = |rank: &usize| world.done[*rank] < world.programs[*rank].len();
        for rank in found.iter().chain(&at_end) {
            assert!(is_stuck(rank), "seed {seed}: rank {rank} goes on");
        }
        let stuck = (0..world.programs.len()).filter(is_stuck).count();
        assert_eq!(stuck > 0, !at_end.is_empty(), "seed {seed}: {stuck} ranks are stuck");
        assert!(stuck == 0 || seed % 3 > 0, "seed {seed}: sound programs are stuck");
        num_stuck += usize::from(stuck > 0);
        num_early += usize::from(!found.is_empty());
    }
    assert!(
        num_stuck > 300 && num_early > 200,
        "{num_stuck} worlds stuck, {num_early} found early"
    );
}
