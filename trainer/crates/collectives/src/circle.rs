//! Ranks that wait for each other in different groups, found in what each of them says of itself.
//!
//! A rank that waits for long says in a [`Position`] how much it had issued in each group, and what
//! its wait needs: that certain others issue something too. It *lacks* that other's need where by
//! its own position it had not issued it. Ranks that lack each other's needs in a circle can none
//! of them go on, and that is no guess: a rank that is merely late waits for nothing, and is in no
//! circle.
//!
//! It holds for positions of any age, read at any time, provided that each is true of one moment in
//! or after its wait, and that a rank issues nothing while it waits. Suppose that some of the waits
//! of a circle ended well, and take the one that did so first. The rank that it needed had issued,
//! by then, more than its position says; so its own wait had ended before, which was to be the
//! first. (A rank whose wait fails ends, or says that it is [over](Position::is_over).)

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;

/// Most positions that one search looks at.
pub(crate) const MOST_READ: usize = 64;

/// What a rank that waits says of itself. Ranks are numbers in the run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Position {
    /// Whether the wait has failed. Then it proves nothing, and only tells what it was.
    pub(crate) is_over: bool,
    /// What it waits in, for people: one line.
    pub(crate) words: String,
    /// What others have to issue: the `index`-th, from 0, of this.
    pub(crate) key: String,
    /// As above.
    pub(crate) index: u64,
    /// The others, all of which have to.
    pub(crate) of: Vec<usize>,
    /// How many of each it had issued.
    pub(crate) issued: BTreeMap<String, u64>,
}

impl Position {
    /// Whether this rank had not issued what another's wait needs.
    fn lacks(&self, needed_by: &Position) -> bool {
        self.issued.get(&needed_by.key).copied().unwrap_or(0) <= needed_by.index
    }

    /// As lines: whether it is over, the words, the need, and a line for each thing issued.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let of: Vec<String> = self.of.iter().map(usize::to_string).collect();
        let Position { is_over, words, key, index, .. } = self;
        let mut text = format!("{is_over}\n{words}\n{index} {key}\n{}\n", of.join(" "));
        for (key, count) in &self.issued {
            // Writing into a string cannot fail.
            let _ = writeln!(text, "{count} {key}");
        }
        text.into_bytes()
    }

    /// What [`Position::encode`] wrote; nothing for anything else.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Position> {
        let mut lines = std::str::from_utf8(bytes).ok()?.lines();
        let counted = |line: &str| {
            let (count, key) = line.split_once(' ')?;
            Some((key.to_string(), count.parse::<u64>().ok()?))
        };
        let is_over = lines.next()?.parse().ok()?;
        let words = lines.next()?.to_string();
        let (key, index) = counted(lines.next()?)?;
        let of = lines.next()?.split_whitespace().map(|rank| rank.parse().ok());
        let of = of.collect::<Option<Vec<usize>>>()?;
        let issued = lines.map(counted).collect::<Option<_>>()?;
        Some(Position { is_over, words, key, index, of, issued })
    }
}

/// A rank that waits, its position, and which of those before it in a search waits for it.
struct Step {
    rank: usize,
    position: Position,
    before: Option<usize>,
}

/// The ranks of a circle that `own`, which is at `position`, is part of, each waiting for the next
/// and the last for the first; `read` gives the position of another that has said one.
pub(crate) fn find(
    own: usize,
    position: &Position,
    read: &mut dyn FnMut(usize) -> Option<Position>,
) -> Option<Vec<(usize, Position)>> {
    let mut known: HashMap<usize, Option<Position>> = HashMap::new();
    let mut steps = vec![Step { rank: own, position: position.clone(), before: None }];
    let mut at = 0;
    while at < steps.len() {
        for rank in steps[at].position.of.clone() {
            if rank == own {
                if at > 0 && position.lacks(&steps[at].position) {
                    return Some(path(&steps, at));
                }
                continue;
            }
            if steps.iter().any(|step| step.rank == rank) {
                continue;
            }
            if known.len() >= MOST_READ && !known.contains_key(&rank) {
                return None;
            }
            let theirs = known.entry(rank).or_insert_with(|| read(rank)).clone();
            let waits = theirs.filter(|theirs| !theirs.is_over);
            let stuck = waits.filter(|theirs| theirs.lacks(&steps[at].position));
            steps.extend(stuck.map(|position| Step { rank, position, before: Some(at) }));
        }
        at += 1;
    }
    None
}

/// From the first step to this one.
fn path(steps: &[Step], last: usize) -> Vec<(usize, Position)> {
    let ends = std::iter::successors(Some(last), |&at| steps[at].before);
    let mut path: Vec<(usize, Position)> =
        ends.map(|at| (steps[at].rank, steps[at].position.clone())).collect();
    path.reverse();
    path
}

/// Why a rank does nothing, as far as ranks say what they wait for: through those that wait
/// themselves, to the first of which no wait is known. Empty where `rank` itself is such a one.
pub(crate) fn held_up(rank: usize, read: &mut dyn FnMut(usize) -> Option<Position>) -> String {
    /// Ranks that wait for each other in a row, at the most.
    const MOST: usize = 8;
    let (mut text, mut row) = (String::new(), vec![rank]);
    while let Some(position) = row.last().and_then(|&at| read(at)).filter(|_| row.len() < MOST) {
        let subject = if row.len() == 1 { "it".to_string() } else { "that one".to_string() };
        let _ = write!(text, "; {subject} waits in {}", position.words);
        let mut silent = Vec::new();
        let mut next = None;
        for &other in position.of.iter().filter(|other| !row.contains(other)) {
            match read(other) {
                None => silent.push(other.to_string()),
                Some(theirs) if theirs.lacks(&position) => next = next.or(Some(other)),
                Some(_) => {}
            }
        }
        match next {
            Some(next) => {
                let _ = write!(text, " for rank {next}");
                row.push(next);
            }
            None if silent.is_empty() => break,
            None => {
                let _ = write!(text, " for rank {}, which waits in nothing", silent.join(" or "));
                break;
            }
        }
    }
    text
}

/// A circle in words.
pub(crate) fn describe(circle: &[(usize, Position)]) -> String {
    let mut text = String::new();
    for (at, (rank, position)) in circle.iter().enumerate() {
        let (next, _) = &circle[(at + 1) % circle.len()];
        let words = &position.words;
        let _ = write!(text, "rank {rank} waits in {words}, which rank {next} has not issued; ");
    }
    text + "so none of them can go on"
}

#[cfg(test)]
mod tests;
