//! How far a number is from those of the steps before.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// The loss.
    Loss,
    /// The global gradient norm, by its logarithm: norms are skewed, and one of twice the usual
    /// size is as common as one of half.
    GradNorm,
}

impl Measure {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Measure::Loss => "loss",
            Measure::GradNorm => "gradient norm",
        }
    }

    fn scaled(self, value: f64) -> f64 {
        match self {
            Measure::Loss => value,
            Measure::GradNorm => value.max(f64::MIN_POSITIVE).ln(),
        }
    }

    fn unscaled(self, value: f64) -> f64 {
        match self {
            Measure::Loss => value,
            Measure::GradNorm => value.exp(),
        }
    }

    /// The least standard deviation, around this mean: steps that are all but equal, as when a
    /// model knows its few samples by heart, do not make a spike of every small change.
    fn least_deviation(self, mean: f64) -> f64 {
        match self {
            Measure::Loss => 0.01 * mean.abs(),
            Measure::GradNorm => 0.05,
        }
    }
}

/// A number's distance from those of the window.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Standard deviations above the mean.
    pub zscore: f64,
    /// The mean; for gradient norms the geometric one.
    pub usual: f64,
}

/// The newest numbers, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Window(VecDeque<f64>);

impl Window {
    /// Adds a number; the newest `size` stay. What is not finite is left out.
    pub fn push(&mut self, value: f64, size: usize) {
        if value.is_finite() {
            self.0.push_back(value);
        }
        self.0.drain(..self.0.len().saturating_sub(size));
    }

    /// The score of a number among the newest `size`; `None` while there are not so many, or where
    /// it is not finite. The sums are taken anew, in order: a window that was saved and read back
    /// gives the same bits.
    pub fn score(&self, measure: Measure, value: f64, size: usize) -> Option<Score> {
        let first = self.0.len().checked_sub(size.max(2))?;
        if !value.is_finite() {
            return None;
        }
        let values = || self.0.iter().skip(first).map(|value| measure.scaled(*value));
        let count = (self.0.len() - first) as f64;
        let mean = values().sum::<f64>() / count;
        let squares: f64 = values().map(|value| (value - mean) * (value - mean)).sum();
        let deviation = (squares / (count - 1.0)).sqrt().max(measure.least_deviation(mean));
        let distance = measure.scaled(value) - mean;
        // Zeros alone have neither a deviation nor a hundredth of the mean.
        let zscore = match deviation > 0.0 {
            true => distance / deviation,
            false if distance > 0.0 => f64::INFINITY,
            false => 0.0,
        };
        Some(Score { zscore, usual: measure.unscaled(mean) })
    }
}

impl Window {
    /// The highest number whose score is sound, a little less where rounding might matter; scores
    /// rise with their numbers. The highest of all while there is no score.
    pub fn highest(&self, measure: Measure, size: usize, is_sound: impl Fn(Score) -> bool) -> f64 {
        let allows = |value| self.score(measure, value, size).is_none_or(&is_sound);
        if allows(f64::MAX) {
            return f64::MAX;
        }
        // Halves the finite numbers, in their order, between one that is sound and one that is not.
        let (mut low, mut high) = (place(f64::MIN), place(f64::MAX));
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            match allows(number(middle)) {
                true => low = middle,
                false => high = middle,
            }
        }
        let highest = number(low);
        (highest - ROUNDING * highest.abs()).max(f64::MIN)
    }
}

/// Far above the rounding of a logarithm, and far below what a limit is chosen by.
const ROUNDING: f64 = 1e-12;

/// The place of a number among all, in their order.
fn place(value: f64) -> u64 {
    let bits = value.to_bits();
    if value.is_sign_negative() { !bits } else { bits | 1 << 63 }
}

/// The number of a place.
fn number(place: u64) -> f64 {
    f64::from_bits(if place >> 63 == 1 { place & !(1 << 63) } else { !place })
}

#[cfg(test)]
mod tests {
    use super::*;
    use Measure::{GradNorm, Loss};

    fn window(values: &[f64]) -> Window {
        let mut window = Window::default();
        values.iter().for_each(|value| window.push(*value, values.len()));
        window
    }

    fn check(measure: Measure, values: &[f64], value: f64, expected: f64) {
        let score = window(values).score(measure, value, values.len()).unwrap();
        assert!((score.zscore - expected).abs() < 1e-9, "{score:?}, expected {expected}");
    }

    #[test]
    fn scores_are_deviations_from_the_mean() {
        // Mean 3, variance (4 + 1 + 0 + 1 + 4) / 4 = 2.5.
        let values = [1.0, 2.0, 3.0, 4.0, 5.0];
        check(Loss, &values, 3.0, 0.0);
        check(Loss, &values, 8.0, 5.0 / 2.5f64.sqrt());
        check(Loss, &values, -2.0, -5.0 / 2.5f64.sqrt());
        // Of logarithms: 0, 1, 2; mean 1, variance 1.
        let e = 1f64.exp();
        check(GradNorm, &[1.0, e, e * e], e.powi(5), 4.0);
        let score = window(&[1.0, e, e * e]).score(GradNorm, 1.0, 3).unwrap();
        assert!((score.usual - e).abs() < 1e-12, "{score:?}");
    }

    #[test]
    fn numbers_that_are_all_but_equal_have_a_least_deviation() {
        check(Loss, &[2.0; 4], 2.0, 0.0);
        check(Loss, &[2.0; 4], 2.1, 0.1 / 0.02);
        check(Loss, &[2.0, 2.0001, 2.0, 1.9999], 2.2, 0.2 / 0.02);
        check(GradNorm, &[0.5; 4], 0.5 * 1f64.exp(), 1.0 / 0.05);
    }

    #[test]
    fn zeros_have_none_and_the_first_number_above_is_a_spike() {
        check(Loss, &[0.0; 4], 0.0, 0.0);
        let score = window(&[0.0; 4]).score(Loss, 1e-3, 4).unwrap();
        assert_eq!(score.zscore, f64::INFINITY);
        let score = window(&[0.0; 4]).score(GradNorm, 1.0, 4).unwrap();
        assert!(score.zscore > 1000.0 && score.zscore.is_finite(), "{score:?}");
    }

    #[test]
    fn numbers_and_their_places_are_in_one_order() {
        let values = [f64::MIN, -2.0, -1e-300, 0.0, f64::MIN_POSITIVE, 1.0, 1.5, f64::MAX];
        assert!(values.windows(2).all(|pair| place(pair[0]) < place(pair[1])));
        assert!(values.iter().all(|value| number(place(*value)) == *value));
    }

    #[test]
    fn the_highest_sound_number_is_where_the_score_is_at_its_limit() {
        // Mean 3, variance 2.5.
        let window = window(&[1.0, 2.0, 3.0, 4.0, 5.0]);
        let highest = window.highest(Loss, 5, |score| score.zscore <= 2.0);
        assert!((highest - (3.0 + 2.0 * 2.5f64.sqrt())).abs() < 1e-10, "{highest}");
        let highest = window.highest(Loss, 5, |score| score.zscore <= -10.0);
        assert!((highest - (3.0 - 10.0 * 2.5f64.sqrt())).abs() < 1e-10, "{highest}");
        assert_eq!(window.highest(Loss, 6, |_| false), f64::MAX, "no score yet");
    }

    #[test]
    fn the_first_steps_have_no_score() {
        let mut window = Window::default();
        for value in [1.0, 2.0, 3.0] {
            assert_eq!(window.score(Loss, 100.0, 3), None);
            window.push(value, 3);
        }
        assert!(window.score(Loss, 100.0, 3).is_some());
    }

    #[test]
    fn what_is_not_finite_neither_enters_nor_has_a_score() {
        let mut window = window(&[1.0, 2.0, 3.0]);
        let before = window.clone();
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert_eq!(window.score(Loss, value, 3), None);
            window.push(value, 3);
            assert_eq!(window, before);
        }
    }

    #[test]
    fn the_newest_count_alone_also_where_the_window_is_made_shorter() {
        let mut window = window(&[100.0, 200.0, 1.0, 2.0, 3.0]);
        let score = window.score(Loss, 5.0, 3).unwrap();
        assert_eq!((score.zscore, score.usual), (3.0, 2.0));
        window.push(4.0, 3);
        assert_eq!(window, self::window(&[2.0, 3.0, 4.0]));
    }

    #[test]
    fn a_window_read_back_gives_the_same_bits() {
        let values: Vec<f64> = (1..40).map(|n| 1.0 / f64::from(n) + 0.1).collect();
        let window = window(&values);
        let text = serde_json::to_string(&window).unwrap();
        let back: Window = serde_json::from_str(&text).unwrap();
        for measure in [Loss, GradNorm] {
            let bits = |w: &Window| w.score(measure, 0.7, 39).unwrap().zscore.to_bits();
            assert_eq!(bits(&back), bits(&window));
        }
    }
}
