//! The stream of samples: complete, without repeats, and the same however it is read.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed test may panic")]

mod common;

use common::{Corpus, Row, config, corpus, corpus_from, options, read, read_all, rows};
use data_pipeline::order::{EpochOrder, GroupSize, OrderParams, SampleUnit};
use data_pipeline::packing::NO_TARGET;
use data_pipeline::{DataCursor, Loader, LoaderOptions, Split};
use run_config::{BatchStage, SampleRange};
use std::collections::HashSet;
use std::time::Instant;

/// Several windows of 1 MiB, each of many row groups.
fn several_windows() -> Corpus {
    corpus(3, 6000, 60, 0.1)
}

fn samples_per_epoch(corpus: &Corpus) -> u64 {
    (corpus.tokens(Split::Train) as u64 - 1) / 64
}

#[test]
fn any_number_of_ranks_reads_the_same_samples() {
    let corpus = corpus(2, 400, 60, 0.1);
    let config = corpus.config(&["training.micro_batch=1"]);
    let whole = rows(&read(&config, options(3, 5)));
    assert_eq!(whole.len(), 40);
    for dp_size in [2, 4, 8] {
        let shares: Vec<Vec<_>> = (0..dp_size)
            .map(|dp_rank| {
                rows(&read(&config, LoaderOptions { dp_rank, dp_size, ..options(3, 5) }))
            })
            .collect();
        let per_rank = 8 / dp_size;
        for (at, expected) in whole.iter().enumerate() {
            let (step, row) = (at / 8, at % 8);
            let got = &shares[row / per_rank][step * per_rank + row % per_rank];
            assert_eq!((got.sample, &got.tokens), (expected.sample, &expected.tokens));
            assert_eq!(got.targets, expected.targets);
        }
    }
}

#[test]
fn an_epoch_reads_every_token_once_and_nothing_held_out() {
    let corpus = several_windows();
    let config = corpus.config(&[]);
    let per_epoch = samples_per_epoch(&corpus);
    // Two epochs, and a step that belongs to both.
    let steps = (2 * per_epoch).div_ceil(8);
    let rows = rows(&read(&config, options(1, steps)));
    let epochs: Vec<Vec<i32>> = (0..2)
        .map(|epoch| {
            let samples = epoch * per_epoch..(epoch + 1) * per_epoch;
            rows.iter()
                .filter(|r| samples.contains(&r.sample))
                .flat_map(|r| r.tokens.clone())
                .collect()
        })
        .collect();
    for tokens in &epochs {
        let seen: HashSet<i32> = tokens.iter().copied().collect();
        assert_eq!(seen.len() as u64, per_epoch * 64, "no token twice");
        let left_over = corpus.tokens(Split::Train) - seen.len();
        assert!((1..=64).contains(&left_over), "{left_over} tokens left over");
        let split = |id: &i32| corpus.documents[corpus.document_of[id]].1;
        assert!(seen.iter().all(|id| split(id) == Split::Train));
    }
    assert_ne!(epochs[0], epochs[1]);
}

#[test]
fn targets_positions_and_documents_follow_the_documents() {
    let corpus = several_windows();
    let per_epoch = samples_per_epoch(&corpus);
    for mask in [true, false] {
        let config = corpus.config(&[&format!("data.document_mask={mask}")]);
        let batches = read(&config, options(1, per_epoch / 8));
        let targets: u64 = batches.iter().map(|batch| batch.num_target_tokens).sum();
        let mut counted = 0;
        for row in rows(&batches) {
            let (mut position, mut document) = (0, 0);
            for at in 0..64 {
                let id = row.tokens[at];
                let goes_on = at > 0 && corpus.follows(row.tokens[at - 1]) == Some(id);
                if mask && at > 0 && !goes_on {
                    (position, document) = (0, document + 1);
                }
                assert_eq!((row.positions[at], row.documents[at]), (position, document));
                position += 1;
                let following = row.tokens.get(at + 1).copied();
                match corpus.follows(id) {
                    Some(next) => assert_eq!(row.targets[at], next),
                    None if mask => assert_eq!(row.targets[at], NO_TARGET),
                    None => assert!(following.is_none_or(|next| row.targets[at] == next)),
                }
                counted += u64::from(row.targets[at] != NO_TARGET);
            }
        }
        assert_eq!(targets, counted);
    }
}

#[test]
fn neighbouring_samples_come_from_far_apart() {
    let corpus = corpus(1, 3000, 60, 0.1);
    let rows = rows(&read(&corpus.config(&[]), options(1, 40)));
    let documents: Vec<usize> = rows.iter().map(|row| corpus.document_of[&row.tokens[0]]).collect();
    let near = documents.windows(2).filter(|pair| pair[0].abs_diff(pair[1]) < 30).count();
    assert!(near < 20, "{near} of {} neighbours are near, about 6 expected", rows.len());
    let plain = common::rows(&read(&corpus.config(&["data.shuffle=false"]), options(1, 40)));
    let tokens: Vec<i32> = plain.into_iter().flat_map(|row| row.tokens).collect();
    assert!(tokens.is_sorted(), "without a shuffle, the order of the files");
}

#[test]
fn resuming_twice_equals_not_stopping() {
    let corpus = several_windows();
    let config = corpus.config(&[]);
    let whole = read(&config, options(1, 900));
    let mut cursor: Option<DataCursor> = None;
    let mut resumed = Vec::new();
    for (first, steps) in [(1, 251), (252, 400), (652, 249)] {
        let loader = Loader::open(&config, options(first, steps)).unwrap();
        if let Some(saved) = cursor {
            saved.verify_resumes(&loader.cursor_after(first - 1)).unwrap();
        }
        let saved = serde_json::to_string(&loader.cursor_after(first + steps - 1)).unwrap();
        assert!(saved.len() < 1024, "{} bytes", saved.len());
        cursor = Some(serde_json::from_str(&saved).unwrap());
        resumed.extend(read(&config, options(first, steps)));
    }
    assert!(whole == resumed);
}

#[test]
fn a_resume_in_another_order_is_refused() {
    let corpus = corpus(1, 400, 60, 0.1);
    let cursor = |overrides: &[&str]| {
        Loader::open(&corpus.config(overrides), options(1, 1)).unwrap().cursor_after(4)
    };
    let saved = cursor(&[]);
    let check = |overrides: &[&str], expected: &str| {
        let error = saved.verify_resumes(&cursor(overrides)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check(&["seed=2"], "`seed` was 1 when the checkpoint was saved and is 2 now");
    check(&["data.sequence_length=32"], "longest `data.sequence_length` was 64");
    check(&["data.packing=best_fit"], "`data.packing` was concatenate");
    check(&["data.buffer_mib=2"], "it fixes the windows");
    check(&["training.global_batch=16"], "tokens read was 2048");
    let more = corpus_from(1, 401, 60, 0.1, 0, 500);
    let other = Loader::open(&more.config(&[]), options(1, 1)).unwrap().cursor_after(4);
    let error = saved.verify_resumes(&other).unwrap_err().to_string();
    assert!(error.contains("the hash of the shards"), "{error}");
}

#[test]
fn samples_that_are_left_out_are_read_by_nobody_and_those_behind_move_up() {
    let corpus = corpus(2, 400, 60, 0.1);
    let config = corpus.config(&["data.skip_samples=[{first: 4, last: 5}]"]);
    let later = [SampleRange { first: 24, last: 31 }];
    let all = rows(&read(&corpus.config(&[]), options(1, 8)));
    let left: Vec<&Row> = all.iter().filter(|r| !matches!(r.sample, 4 | 5 | 24..=31)).collect();
    for dp_size in [1, 2, 4] {
        let shares: Vec<Vec<Row>> = (0..dp_size)
            .map(|dp_rank| {
                let options = LoaderOptions { dp_rank, dp_size, ..options(1, 6) };
                let mut loader = Loader::open_without(&config, options, &later).unwrap();
                let step_3 = loader.samples_of(3);
                assert_eq!(step_3, SampleRange { first: 18, last: 33 }, "across those left out");
                rows(&read_all(&mut loader))
            })
            .collect();
        let per_rank = 8 / dp_size;
        for (at, expected) in left.iter().take(48).enumerate() {
            let (step, row) = (at / 8, at % 8);
            let got = &shares[row / per_rank][step * per_rank + row % per_rank];
            assert_eq!((got.sample, &got.tokens), (expected.sample, &expected.tokens));
        }
    }
    // Held-out documents have an order of their own.
    let validation = LoaderOptions { split: Split::Validation, ..options(1, 4) };
    assert!(read(&config, validation) == read(&corpus.config(&[]), validation));
}

#[test]
fn only_samples_still_to_come_can_be_left_out() {
    let corpus = corpus(1, 400, 60, 0.1);
    let without = |pairs: &[(u64, u64)], step| {
        let ranges: Vec<SampleRange> =
            pairs.iter().map(|&(first, last)| SampleRange { first, last }).collect();
        let loader = Loader::open_without(&corpus.config(&[]), options(1, 1), &ranges).unwrap();
        loader.cursor_after(step)
    };
    // After four steps of eight, samples 0 to 33 but for two are read.
    let saved = without(&[(4, 5)], 4);
    let saved: DataCursor = serde_json::from_str(&serde_json::to_string(&saved).unwrap()).unwrap();
    assert_eq!((saved.consumed_tokens, saved.consumed_samples), (4 * 8 * 64, 32));
    saved.verify_resumes(&without(&[(4, 5)], 4)).unwrap();
    saved.verify_resumes(&without(&[(34, 40), (4, 5)], 4)).unwrap();
    let check = |pairs: &[(u64, u64)], expected: &str| {
        let error = saved.verify_resumes(&without(pairs, 4)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(error.contains("`data.skip_samples`"), "{error}");
    };
    check(&[], "the samples left out so far was 4-5 when the checkpoint was saved and is none");
    check(&[(4, 5), (33, 40)], "is 4-5, 33-40");
}

#[test]
fn a_ramp_of_lengths_reads_the_same_stream() {
    let corpus = several_windows();
    let mut config = corpus.config(&[]);
    let tokens = |config: &_, steps| -> Vec<i32> {
        rows(&read(config, options(1, steps))).into_iter().flat_map(|row| row.tokens).collect()
    };
    let stream = tokens(&config, 20);
    let stage = |from_tokens, global_batch, sequence_length| BatchStage {
        from_tokens,
        global_batch,
        sequence_length,
    };
    config.training.batch_stages = vec![stage(0, 8, 16), stage(1000, 8, 32), stage(3000, 8, 64)];
    let ramp = tokens(&config, 30);
    let common = stream.len().min(ramp.len());
    assert!(common > 8000);
    assert!(ramp[..common] == stream[..common]);
}

#[test]
fn best_fit_keeps_documents_whole_and_loses_none() {
    let corpus = corpus_from(2, 2000, 150, 0.1, 0, 20_000);
    let config = corpus.config(&["data.packing=best_fit"]);
    let expected = corpus.tokens(Split::Train);
    // The padding's id, 7, is in a held-out document or is left out of the count.
    let rows = rows(&read(&config, options(1, 700)));
    let mut seen = HashSet::new();
    let (mut padding, mut epoch_rows) = (0, 0);
    for row in &rows {
        if seen.contains(&row.tokens[0]) {
            break;
        }
        epoch_rows += 1;
        for at in 0..64 {
            let (id, target) = (row.tokens[at], row.targets[at]);
            if id == 7 && target == NO_TARGET {
                padding += 1;
            } else {
                assert!(seen.insert(id), "{id} twice in an epoch");
                let expected = corpus.follows(id).unwrap_or(NO_TARGET);
                assert_eq!(target, expected, "a target is missing only at a document's end");
            }
        }
    }
    assert!(corpus.follows(7).is_some(), "so that 7 without a target is padding");
    assert_eq!(seen.len(), expected);
    assert!(padding < expected / 20, "{padding} of {expected} tokens are padding");
    let next_epoch = &rows[epoch_rows];
    assert!(seen.contains(&next_epoch.tokens[0]));
}

#[test]
fn sources_are_mixed_by_weight_and_each_is_read_in_full() {
    let (a, b) = (corpus(1, 3000, 60, 0.1), corpus_from(1, 1500, 60, 0.1, 200_000, 500));
    let config = config(&[(a.folder.path(), 3.0), (b.folder.path(), 1.0)], &["data.buffer_mib=2"]);
    let rows = rows(&read(&config, options(1, 128)));
    let from_a = rows.iter().filter(|row| row.tokens[0] < 200_000).count();
    assert_eq!((rows.len(), from_a), (1024, 768), "exact in a block of 1024");
    let tokens: Vec<i32> =
        rows.iter().filter(|r| r.tokens[0] < 200_000).flat_map(|r| r.tokens.clone()).collect();
    assert_eq!(tokens.iter().collect::<HashSet<_>>().len(), tokens.len());
}

#[test]
fn validation_reads_held_out_documents_and_the_same_ones_each_time() {
    let corpus = corpus(2, 3000, 60, 0.1);
    let config = corpus.config(&[]);
    let options = LoaderOptions { split: Split::Validation, ..options(1, 4) };
    let first = read(&config, options);
    assert!(first == read(&config, options));
    for row in rows(&first) {
        let held_out = |id: &i32| corpus.documents[corpus.document_of[id]].1 == Split::Validation;
        assert!(row.tokens.iter().all(held_out));
    }
}

#[test]
fn starts_at_any_sample_at_once() {
    // 1.3 million row groups of 8 million tokens, in windows of eight.
    let groups: Vec<GroupSize> = (0..1_300_000u64)
        .map(|i| GroupSize { tokens: 8_000_000 + i % 999, units: 7_900_000 + i % 999 })
        .collect();
    let unit = SampleUnit::Tokens(8192);
    let params = OrderParams { unit, key: Some(3), window_tokens: 64_000_000 };
    let started = Instant::now();
    let place = EpochOrder::new(&groups, params, 0).locate(1_000_000_000).unwrap();
    let elapsed = started.elapsed();
    assert!(place.unit > 0 && elapsed.as_secs_f64() < 1.0, "{elapsed:?}");

    // And for real, thousands of epochs into a small source.
    let corpus = corpus(2, 2000, 60, 0.1);
    let config = corpus.config(&[]);
    Loader::open(&config, options(1, 1)).unwrap();
    let started = Instant::now();
    let batches = read(&config, options(1_000_000_000 / 8 + 1, 1));
    let elapsed = started.elapsed();
    assert_eq!(rows(&batches)[0].sample, 1_000_000_000);
    assert!(elapsed.as_secs_f64() < 1.0, "{elapsed:?}");
}
