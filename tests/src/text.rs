//! A text that a tiny model can learn a little of: words follow each other by a rule, with noise.

use crate::random::Random;

const WORDS: [&str; 48] = [
    "the", "of", "and", "to", "in", "that", "for", "was", "with", "his", "they", "at", "be",
    "this", "have", "from", "or", "one", "had", "by", "word", "but", "not", "what", "all", "were",
    "we", "when", "your", "can", "said", "there", "use", "each", "which", "she", "how", "their",
    "will", "other", "about", "out", "many", "then", "them", "these", "some", "people",
];

/// Documents of 1 to 80 words, parted by form feeds; always the same.
pub fn documents(count: usize) -> String {
    let mut random = Random::new(7);
    let document = |_| {
        let mut at = random.below(WORDS.len() as u64) as usize;
        let num_words = 1 + random.below(80);
        let mut words = Vec::new();
        for _ in 0..num_words {
            words.push(WORDS[at]);
            let noise = if random.below(4) == 0 { random.below(20) as usize } else { 0 };
            at = (at * 5 + 7 + noise) % WORDS.len();
        }
        words.join(" ")
    };
    (0..count).map(document).collect::<Vec<_>>().join("\u{c}")
}
