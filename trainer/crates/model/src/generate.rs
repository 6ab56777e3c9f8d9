//! Sampling text: token ids in, token ids out.

use crate::cache::KvCache;
use crate::error::{Result, bad_input};
use crate::inputs::Inputs;
use crate::llama::Llama;
use crate::random::RandomStream;
use torch_shim::tch::{Device, Kind, Tensor};

/// How the next token is chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// At most so many new tokens.
    pub max_new_tokens: usize,
    /// Divides the logits; 0 always takes the likeliest token.
    pub temperature: f64,
    /// Only the smallest set of likeliest tokens whose probability reaches this is kept; 1: all.
    pub top_p: f64,
    /// Seed of the choices.
    pub seed: u64,
    /// Tokens that end the text; the one that did is the last returned.
    pub stop_tokens: Vec<i32>,
    /// Whether keys and values are kept between tokens (fast) or all is computed again.
    pub use_cache: bool,
}

impl Sampling {
    /// Refuses values out of range.
    fn check(&self) -> Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(bad_input("temperature", self.temperature, "a number from 0"));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(bad_input("top_p", self.top_p, "above 0, at most 1"));
        }
        Ok(())
    }
}

/// Continues `prompt`; returns the new tokens only. `on_token` sees each as it is chosen. Ends
/// early where the model's positions do.
///
/// # Errors
/// Where the prompt is empty or too long, sampling values are out of range, logits are not finite,
/// or libtorch fails.
pub fn generate(
    model: &Llama,
    prompt: &[i32],
    sampling: &Sampling,
    device: Device,
    mut on_token: impl FnMut(i32),
) -> Result<Vec<i32>> {
    sampling.check()?;
    let room = model.num_positions();
    if prompt.is_empty() || prompt.len() > room {
        return Err(bad_input("prompt length", prompt.len(), format!("1 to {room} tokens")));
    }
    let choices = RandomStream::new(sampling.seed, "generate");
    let blocks = &model.stage().blocks;
    let capacity = room.min(prompt.len().saturating_add(sampling.max_new_tokens));
    let mut cache = sampling.use_cache.then(|| KvCache::new(blocks.start, blocks.len(), capacity));
    let mut tokens = prompt.to_vec();
    let mut num_cached = 0;
    for index in 0..sampling.max_new_tokens.min(room - prompt.len() + 1) {
        let unseen = &tokens[num_cached..];
        let inputs = Inputs::consecutive(unseen, 1, num_cached, device)?;
        let logits_BV = model.next_logits(&inputs, cache.as_mut())?;
        if cache.is_some() {
            num_cached = tokens.len();
        }
        let logits = to_vec(&logits_BV.f_select(0, 0)?)?;
        let token = choose(&logits, sampling, choices.uniform(index as u64))?;
        tokens.push(token);
        on_token(token);
        if sampling.stop_tokens.contains(&token) {
            break;
        }
    }
    Ok(tokens.split_off(prompt.len()))
}

fn to_vec(logits_V: &Tensor) -> Result<Vec<f64>> {
    let host = logits_V.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
    Ok(Vec::<f64>::try_from(host)?)
}

/// The token chosen from its logits by `uniform`, a number in [0, 1).
fn choose(logits: &[f64], sampling: &Sampling, uniform: f64) -> Result<i32> {
    if let Some(wrong) = logits.iter().find(|logit| !logit.is_finite()) {
        return Err(bad_input("logit", wrong, "a finite number; the weights may be damaged"));
    }
    if sampling.temperature == 0.0 {
        let likeliest = |best, (token, &logit): (usize, &f64)| match best {
            Some((_, most)) if logit <= most => best,
            _ => Some((token, logit)),
        };
        let best = logits.iter().enumerate().fold(None, likeliest);
        return Ok(best.map_or(0, |(token, _)| token as i32));
    }
    let kept = kept_tokens(logits, sampling);
    let total: f64 = kept.iter().map(|(_, probability)| probability).sum();
    let mut left = uniform * total;
    for &(token, probability) in &kept {
        left -= probability;
        if left < 0.0 {
            return Ok(token as i32);
        }
    }
    Ok(kept.last().map_or(0, |&(token, _)| token as i32))
}

/// The smallest set of likeliest tokens whose probability reaches `top_p`, likeliest first; equal
/// ones by id.
fn kept_tokens(logits: &[f64], sampling: &Sampling) -> Vec<(usize, f64)> {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weight = |logit: f64| ((logit - largest) / sampling.temperature).exp();
    let total: f64 = logits.iter().map(|&logit| weight(logit)).sum();
    let mut tokens: Vec<(usize, f64)> =
        logits.iter().map(|&logit| weight(logit) / total).enumerate().collect();
    tokens.sort_by(|a, b| b.1.total_cmp(&a.1));
    if sampling.top_p < 1.0 {
        let mut reached = 0.0;
        let count = tokens.iter().position(|&(_, probability)| {
            reached += probability;
            reached >= sampling.top_p
        });
        tokens.truncate(count.map_or(tokens.len(), |last| last + 1));
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f64, top_p: f64) -> Sampling {
        Sampling {
            max_new_tokens: 8,
            temperature,
            top_p,
            seed: 0,
            stop_tokens: Vec::new(),
            use_cache: true,
        }
    }

    /// Probabilities 0.1, 0.5, 0.15, 0.25 of tokens 0 to 3.
    fn logits() -> Vec<f64> {
        [0.1_f64, 0.5, 0.15, 0.25].iter().map(|p| p.ln() + 7.0).collect()
    }

    fn check_kept(top_p: f64, expected: &[usize]) {
        let kept = kept_tokens(&logits(), &sampling(1.0, top_p));
        let tokens: Vec<usize> = kept.iter().map(|&(token, _)| token).collect();
        assert_eq!(tokens, expected, "top_p {top_p}");
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_it() {
        check_kept(0.01, &[1]);
        check_kept(0.49, &[1]);
        check_kept(0.51, &[1, 3]);
        check_kept(0.74, &[1, 3]);
        check_kept(0.76, &[1, 3, 2]);
        check_kept(0.95, &[1, 3, 2, 0]);
        check_kept(1.0, &[1, 3, 2, 0]);
    }

    #[test]
    fn choices_follow_the_probabilities() {
        let count = |sampling: &Sampling| {
            let mut counts = [0; 4];
            for i in 0..1000 {
                let uniform = (f64::from(i) + 0.5) / 1000.0;
                counts[choose(&logits(), sampling, uniform).unwrap() as usize] += 1;
            }
            counts
        };
        assert_eq!(count(&sampling(1.0, 1.0)), [100, 500, 150, 250]);
        // 0.5 and 0.25, renormalized.
        let [none, most, none_either, rest] = count(&sampling(1.0, 0.7));
        assert_eq!((none, none_either, most + rest), (0, 0, 1000));
        assert!((666..=667).contains(&most));
        // At temperature 1/2 probabilities go with their squares: 0.25 of 0.345.
        assert_eq!(count(&sampling(0.5, 1.0))[1], 725);
        assert_eq!(count(&sampling(0.0, 1.0)), [0, 1000, 0, 0]);
    }

    #[test]
    fn nonsense_is_refused() {
        for (temperature, top_p) in [(-1.0, 1.0), (f64::NAN, 1.0), (1.0, 0.0), (1.0, 1.1)] {
            assert!(sampling(temperature, top_p).check().is_err());
        }
        assert!(choose(&[0.0, f64::NAN], &sampling(1.0, 1.0), 0.5).is_err());
    }
}
