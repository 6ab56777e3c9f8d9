//! How often a run tries again: progress, failures that are alike, restarts within an hour.

use super::*;

#[test]
fn the_same_failure_three_times_is_not_tried_again() {
    let mut run = Run::begin(2, None);
    assert_eq!(run.crash_at(6), ["first cause: rank 1", "find"]);
    run.event(Event::Found { step: None, is_committed: true });
    assert_eq!(run.crash_at(6), ["first cause: rank 1", "find"]);
    run.event(Event::Found { step: None, is_committed: true });
    assert_eq!(run.crash_at(6), ["first cause: rank 1", "finish 93"]);
}

#[test]
fn no_progress_in_three_generations_gives_up() {
    let mut run = Run::begin(2, None);
    for step in 6..8 {
        assert_eq!(run.crash_at(step), ["first cause: rank 1", "find"]);
        run.event(Event::Found { step: None, is_committed: true });
    }
    assert_eq!(run.crash_at(8), ["first cause: rank 1", "finish 1"]);
}

#[test]
fn links_that_worked_and_were_lost_use_up_no_budget() {
    let mut run = Run::begin(2, None);
    for step in 1..20 {
        let ended = run.lose_links(Some(step), "peer closed the connection");
        assert_eq!(ended, ["rank 1 failed", "first cause: rank 0", "find"]);
        run.next(None);
    }
    // They forgive no other failure either.
    for step in [30, 31] {
        assert_eq!(run.crash_at(step), ["first cause: rank 1", "find"]);
        run.next(None);
        run.lose_links(Some(step + 10), "peer closed the connection");
        run.next(None);
    }
    assert_eq!(run.crash_at(32), ["first cause: rank 1", "finish 1"]);
}

#[test]
fn links_that_never_worked_are_not_tried_for_ever() {
    let mut run = Run::begin(2, None);
    for (line, last) in [("refused", "find"), ("reset", "find"), ("no route", "finish 1")] {
        assert_eq!(run.lose_links(None, line).last().unwrap(), last);
        run.next(None);
    }
}

#[test]
fn too_many_restarts_within_an_hour_end_the_run() {
    for (pause_s, last) in [(0.0, "finish 1"), (1300.0, "find")] {
        let mut run = Run::of(Policy { max_per_hour: 3, ..Policy::new(2, 3) }, None);
        for generation in 1..=4 {
            let committed = generation * 10;
            run.now += Duration::from_secs_f64(pause_s);
            run.event(Event::Committed { step: committed });
            let expected = if generation < 4 { "find" } else { last };
            assert_eq!(run.crash_at(committed + generation), ["first cause: rank 1", expected]);
            run.next(Some(committed));
        }
    }
}

#[test]
fn progress_resets_the_count() {
    let mut run = Run::begin(2, None);
    for generation in 1..20 {
        run.event(Event::Committed { step: generation * 10 });
        assert_eq!(run.crash_at(generation * 10 + 3), ["first cause: rank 1", "find"]);
        run.event(Event::Found { step: Some(generation * 10), is_committed: true });
    }
}

#[test]
fn what_is_kept_in_memory_is_progress_and_no_commit() {
    let mut run = Run::begin(2, Some(5));
    for generation in 1..20 {
        assert_eq!(run.crash_at(generation * 10 + 8), ["first cause: rank 1", "find"]);
        let step = generation * 10;
        let started = run.event(Event::Found { step: Some(step), is_committed: false });
        assert_eq!(started, [format!("spawn {} from {:?}", generation + 1, Some(step))]);
        assert_eq!(run.state.committed(), Some(5));
    }
    // The memory is lost: what was committed is there, and that is no progress.
    for _ in 0..2 {
        assert_eq!(run.crash_at(220), ["first cause: rank 1", "find"]);
        run.event(Event::Found { step: Some(5), is_committed: true });
    }
    assert_eq!(run.crash_at(230), ["first cause: rank 1", "finish 1"]);
}
