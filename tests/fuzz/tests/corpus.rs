//! Every input of the corpus, and every one that once brought a target down, is taken without a
//! panic: with any compiler, in a second. `ops/fuzz` looks for more.

use fuzz_targets::TARGETS;
use std::path::Path;

#[test]
fn no_input_of_the_corpus_brings_a_target_down() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for target in TARGETS {
        let folder = corpus.join(target.name);
        let entries = std::fs::read_dir(&folder);
        let entries = entries.unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let mut count = 0;
        for entry in entries {
            let path = entry.unwrap().path();
            eprintln!("{}", path.display());
            (target.run)(&std::fs::read(&path).unwrap());
            count += 1;
        }
        assert!(count >= (target.seeds)().len(), "{}: {count} inputs", target.name);
    }
}

/// A valid input is taken as one: else the targets would test nothing but their own first refusal.
#[test]
fn first_inputs_are_valid() {
    for target in TARGETS {
        let is_taken = |bytes: &Vec<u8>| (target.run)(bytes);
        assert!((target.seeds)().iter().any(is_taken), "{}: no first input is valid", target.name);
    }
}

/// Each target with inputs that differ from valid ones in some bytes: few, for every day.
#[test]
fn altered_inputs_are_taken_or_refused() {
    for target in TARGETS {
        for seed in (target.seeds)() {
            let mut state = 0x9e37_79b9_7f4a_7c15_u64;
            let mut next = |limit: usize| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state % limit.max(1) as u64) as usize
            };
            for _ in 0..40 {
                let mut bytes = seed.clone();
                for _ in 0..=next(4) {
                    let at = next(bytes.len());
                    match (next(4), bytes.is_empty()) {
                        (_, true) => bytes.push(next(256) as u8),
                        (0, _) => bytes.truncate(at),
                        (1, _) => bytes.insert(at, next(256) as u8),
                        (2, _) => bytes[at] = b"0129-/.{[\"\n\xff"[next(12)],
                        _ => bytes[at] ^= 1 << next(8),
                    }
                }
                (target.run)(&bytes);
            }
        }
    }
}
