//! What things cost in a simulation: the committed file, and what a user sets over it.

use crate::error::UserError;
use std::collections::BTreeMap;

/// The committed costs, each with its source.
const DEFAULTS: &str = include_str!("costs.yaml");
/// The largest value that makes sense: a year in seconds.
const MAX: f64 = 366.0 * 86_400.0;

/// Seconds, but where a name says otherwise.
#[derive(Clone, Debug, PartialEq)]
pub struct Costs {
    values: BTreeMap<String, f64>,
}

impl Costs {
    /// The committed ones.
    ///
    /// # Errors
    /// Never, but for a damaged build.
    pub fn defaults() -> Result<Self, UserError> {
        let mut values = BTreeMap::new();
        for line in DEFAULTS.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
            let (name, value) = split(line, ": ")?;
            values.insert(name, value);
        }
        Ok(Self { values })
    }

    /// With `name=value` over it.
    ///
    /// # Errors
    /// Where there is no such name, or the value is none.
    pub fn set(&mut self, text: &str) -> Result<(), UserError> {
        let (name, value) = split(text, "=")?;
        let Some(place) = self.values.get_mut(&name) else {
            let names: Vec<&str> = self.values.keys().map(String::as_str).collect();
            let error = UserError::usage(format!("--set {text}: there is no cost {name:?}"));
            return Err(error.hint(format!("there are: {}", names.join(", "))));
        };
        let least = match name.as_str() {
            "step_s" | "save_every_s" => 1e-3,
            "spares" => -1.0,
            _ => 0.0,
        };
        if !(least..=MAX).contains(&value) {
            let message = format!("--set {text}: the limits are {least} and {MAX}");
            return Err(UserError::usage(message));
        }
        *place = value;
        Ok(())
    }

    /// One of the names of the committed file.
    pub fn get(&self, name: &str) -> f64 {
        self.values.get(name).copied().unwrap_or(0.0)
    }

    /// All of them.
    pub fn all(&self) -> &BTreeMap<String, f64> {
        &self.values
    }
}

fn split(text: &str, separator: &str) -> Result<(String, f64), UserError> {
    let wrong = || UserError::usage(format!("{text:?} is no NAME{separator}NUMBER"));
    let (name, value) = text.split_once(separator).ok_or_else(wrong)?;
    let value = value.trim().parse().map_err(|_| wrong())?;
    Ok((name.trim().to_owned(), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_costs_are_numbers_with_a_source_each() {
        let costs = Costs::defaults().unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(costs.get("detect_hang_s"), 30.0);
        let mut previous = "";
        for line in DEFAULTS.lines() {
            let is_value = !line.starts_with('#') && !line.is_empty();
            assert!(!is_value || previous.starts_with('#'), "{line} lacks its source");
            previous = line;
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let mut costs = Costs::defaults().unwrap_or_else(|error| panic!("{error}"));
        for text in ["stap_s=1", "step_s", "step_s=x", "step_s=0", "step_s=NaN", "load_s=-1"] {
            assert!(costs.set(text).is_err(), "{text}");
        }
        assert!(costs.set("step_s=2.5").is_ok());
        assert_eq!(costs.get("step_s"), 2.5);
    }
}
