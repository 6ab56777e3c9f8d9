//! From a tree to a flat layer of typed leaves, by the table of keys. Reports every unknown key,
//! wrong type and value out of range.

use crate::keys::{self, Key, Kind, MAX_ITEMS};
use crate::problem::{Place, Problem, ProblemKind};
use crate::yaml::{Entry, Node, Value, join, quoted, short};
use std::collections::{BTreeMap, BTreeSet};

/// A checked value.
#[derive(Clone, Debug)]
pub(crate) enum Leaf {
    Null,
    Auto,
    Bool(bool),
    Integer(u64),
    Number(f64),
    Text(String),
    Betas([f64; 2]),
    Item(Layer),
    Items(Vec<Layer>),
}

/// A checked value and its place.
#[derive(Clone, Debug)]
pub(crate) struct Given {
    pub leaf: Leaf,
    pub place: Place,
}

/// Checked values by the table's path.
pub(crate) type Layer = BTreeMap<&'static str, Given>;

/// Walks trees and gathers what is wrong with them.
#[derive(Default)]
pub(crate) struct Walker {
    pub problems: Vec<Problem>,
    /// Paths, as in messages, whose value was given and is unusable.
    pub bad: BTreeSet<String>,
}

impl Walker {
    /// The leaves of a whole document; `root` stands under the table's path `prefix`.
    pub fn layer(&mut self, root: &Node, prefix: &'static str) -> Layer {
        let mut layer = Layer::new();
        self.section(root, prefix, prefix, &mut layer);
        layer
    }

    /// `table` is the path of the rows, `path` the one in messages (with list positions).
    fn section(&mut self, node: &Node, table: &str, path: &str, layer: &mut Layer) {
        let entries = match &node.value {
            Value::Map(entries) => entries,
            Value::Null => return,
            other => {
                let limit = "a mapping of keys".to_owned();
                self.wrong_type(&node.place, path, &other.describe(), limit, None);
                self.bad.insert(path.to_owned());
                return;
            }
        };
        for entry in entries {
            let entry_path = join(path, &entry.key);
            match keys::find(&join(table, &entry.key)).filter(|key| key.parent() == table) {
                None => self.unknown(entry, table, path),
                Some(key) if key.kind == Kind::Section => {
                    self.section(&entry.node, key.path, &entry_path, layer);
                }
                Some(key) => match self.leaf(&entry.node, key, &entry_path) {
                    Some(leaf) => {
                        let place = entry.node.place.clone();
                        layer.insert(key.path, Given { leaf, place });
                    }
                    None => {
                        self.bad.insert(entry_path);
                    }
                },
            }
        }
    }

    fn leaf(&mut self, node: &Node, key: &'static Key, path: &str) -> Option<Leaf> {
        match &node.value {
            Value::Null if key.nullable => return Some(Leaf::Null),
            Value::Text(text) if key.auto && text == "auto" => return Some(Leaf::Auto),
            _ => {}
        }
        match key.kind {
            Kind::Section => None,
            Kind::Bool => match &node.value {
                Value::Bool(b) => Some(Leaf::Bool(*b)),
                other => self.refuse(node, key, path, boolean_hint(other)),
            },
            Kind::Integer { min, max } => self.integer(node, key, path, min, max),
            Kind::Number { min, above, max } => {
                let Some(number) = as_number(&node.value) else {
                    return self.refuse(node, key, path, number_hint(&node.value));
                };
                let low = if above { number > min } else { number >= min };
                if low && number <= max {
                    return Some(Leaf::Number(number));
                }
                self.out_of_range(node, key, path)
            }
            Kind::Betas => self.betas(node, key, path),
            Kind::Name | Kind::Path | Kind::InitFrom | Kind::Store | Kind::Remote => {
                self.text(node, key, path)
            }
            Kind::Choice(choices) => self.choice(node, key, path, choices),
            Kind::Item => match &node.value {
                Value::Map(_) => Some(Leaf::Item(self.item(node, key, path))),
                _ => self.refuse(node, key, path, None),
            },
            Kind::Items => self.items(node, key, path),
            Kind::IntegerOrItems { min, max } => match &node.value {
                Value::List(_) => self.items(node, key, path),
                _ => self.integer(node, key, path, min, max),
            },
        }
    }

    fn integer(
        &mut self,
        node: &Node,
        key: &'static Key,
        path: &str,
        min: u64,
        max: u64,
    ) -> Option<Leaf> {
        let integer = match &node.value {
            Value::Integer(integer, _) => *integer,
            // 1e6 is a whole number too; up to 2^53 FP64 holds each exactly.
            Value::Number(n, _) if n.fract() == 0.0 && n.abs() <= 9_007_199_254_740_992.0 => {
                *n as i128
            }
            Value::Number(n, _) if n.is_finite() && n.fract() == 0.0 => {
                return self.out_of_range(node, key, path);
            }
            other => return self.refuse(node, key, path, number_hint(other)),
        };
        match u64::try_from(integer) {
            Ok(integer) if (min..=max).contains(&integer) => Some(Leaf::Integer(integer)),
            _ => self.out_of_range(node, key, path),
        }
    }

    fn betas(&mut self, node: &Node, key: &'static Key, path: &str) -> Option<Leaf> {
        let Value::List(items) = &node.value else {
            return self.refuse(node, key, path, None);
        };
        let numbers: Vec<f64> = items.iter().filter_map(|item| as_number(&item.value)).collect();
        match numbers[..] {
            [first, second] if items.len() == 2 => {
                if [first, second].iter().all(|beta| (0.0..1.0).contains(beta)) {
                    return Some(Leaf::Betas([first, second]));
                }
                let shown = format!("[{first}, {second}] is out of range");
                self.range_problem(&node.place, path, shown, keys::limit(key), None)
            }
            _ => self.refuse(node, key, path, None),
        }
    }

    fn text(&mut self, node: &Node, key: &'static Key, path: &str) -> Option<Leaf> {
        let text = match &node.value {
            Value::Text(text) => text.clone(),
            // On a command line, quotes would be eaten by the shell: `--set name=7` is a name.
            Value::Integer(_, raw) | Value::Number(_, raw)
                if matches!(node.place, Place::Set(_)) =>
            {
                raw.clone()
            }
            Value::Integer(_, raw) | Value::Number(_, raw) => {
                return self.refuse(node, key, path, Some(format!("quote it: \"{}\"", short(raw))));
            }
            _ => return self.refuse(node, key, path, None),
        };
        let fits = match key.kind {
            Kind::Name => is_name(&text),
            _ => !text.is_empty() && text.len() <= 4096 && !text.contains(char::is_control),
        };
        if fits { Some(Leaf::Text(text)) } else { self.out_of_range(node, key, path) }
    }

    fn choice(
        &mut self,
        node: &Node,
        key: &'static Key,
        path: &str,
        choices: &'static [&'static str],
    ) -> Option<Leaf> {
        let Value::Text(text) = &node.value else {
            return self.refuse(node, key, path, None);
        };
        if choices.contains(&text.as_str()) {
            return Some(Leaf::Text(text.clone()));
        }
        let hint = nearest(text, choices.iter().copied()).map(|c| format!("did you mean `{c}`?"));
        let message = format!("{} is not a choice", quoted(text));
        self.range_problem(&node.place, path, message, keys::limit(key), hint)
    }

    fn item(&mut self, node: &Node, key: &'static Key, path: &str) -> Layer {
        let mut layer = Layer::new();
        self.section(node, &keys::item_path(key.path), path, &mut layer);
        layer
    }

    fn items(&mut self, node: &Node, key: &'static Key, path: &str) -> Option<Leaf> {
        let Value::List(items) = &node.value else {
            let hint = "write a list: `- {…}` on a line of its own, or `[{…}]`".to_owned();
            return self.refuse(node, key, path, Some(hint));
        };
        if items.is_empty() || items.len() > MAX_ITEMS {
            let message = format!("the list has {} items", items.len());
            return self.range_problem(&node.place, path, message, keys::limit(key), None);
        }
        let mut layers = Vec::new();
        for (index, item) in items.iter().enumerate() {
            let path = format!("{path}[{index}]");
            layers.push(self.item(item, key, &path));
        }
        Some(Leaf::Items(layers))
    }

    fn unknown(&mut self, entry: &Entry, table: &str, path: &str) {
        let siblings = || keys::children(table).map(Key::name);
        let elsewhere = keys::KEYS.iter().find(|key| key.name() == entry.key);
        let hint = match (nearest(&entry.key, siblings()), elsewhere) {
            (Some(near), _) => format!("did you mean `{near}`?"),
            (None, Some(key)) => format!("did you mean `{}`?", key.path.replace("[]", "")),
            (None, None) if entry.key == "<<" => {
                "merge keys are not taken: write the keys out".to_owned()
            }
            (None, None) => "see configs/REFERENCE.md for every key".to_owned(),
        };
        self.problems.push(Problem {
            kind: ProblemKind::UnknownKey,
            place: entry.key_place.clone(),
            key: join(path, &short(&entry.key)),
            message: "no such key".to_owned(),
            limit: Some(siblings().collect::<Vec<_>>().join(", ")),
            hint: Some(hint),
        });
    }

    fn refuse<T>(&mut self, node: &Node, key: &Key, path: &str, hint: Option<String>) -> Option<T> {
        self.wrong_type(&node.place, path, &node.value.describe(), keys::limit(key), hint);
        None
    }

    fn wrong_type(
        &mut self,
        place: &Place,
        path: &str,
        found: &str,
        limit: String,
        hint: Option<String>,
    ) {
        self.problems.push(Problem {
            kind: ProblemKind::WrongType,
            place: place.clone(),
            key: path.to_owned(),
            message: format!("{found} is of the wrong type"),
            limit: Some(limit),
            hint,
        });
    }

    fn out_of_range<T>(&mut self, node: &Node, key: &Key, path: &str) -> Option<T> {
        let message = format!("{} is out of range", node.value.describe());
        self.range_problem(&node.place, path, message, keys::limit(key), None)
    }

    fn range_problem<T>(
        &mut self,
        place: &Place,
        path: &str,
        message: String,
        limit: String,
        hint: Option<String>,
    ) -> Option<T> {
        self.problems.push(Problem {
            kind: ProblemKind::OutOfRange,
            place: place.clone(),
            key: path.to_owned(),
            message,
            limit: Some(limit),
            hint,
        });
        None
    }
}

fn as_number(value: &Value) -> Option<f64> {
    match value {
        Value::Integer(integer, _) => Some(*integer as f64),
        Value::Number(number, _) => Some(*number),
        _ => None,
    }
}

fn boolean_hint(value: &Value) -> Option<String> {
    match value {
        Value::Text(text) => match text.to_ascii_lowercase().as_str() {
            "yes" | "on" | "y" => Some("write true".to_owned()),
            "no" | "off" | "n" => Some("write false".to_owned()),
            "true" | "false" => Some("remove the quotes".to_owned()),
            _ => None,
        },
        _ => None,
    }
}

fn number_hint(value: &Value) -> Option<String> {
    let Value::Text(text) = value else { return None };
    let plain: String = text.chars().filter(|c| !matches!(c, '_' | ',' | ' ')).collect();
    let is_number = plain.parse::<f64>().is_ok_and(f64::is_finite);
    is_number.then(|| format!("write {}, without quotes, `_` or commas", short(&plain)))
}

/// Safe as a folder's name, and never taken for an option.
fn is_name(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    (1..=100).contains(&text.len()) && text.chars().all(allowed) && !text.starts_with(['.', '-'])
}

/// The word of `words` that `word` most likely stands for.
fn nearest<'a>(word: &str, words: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    if word.len() > 100 {
        return None;
    }
    words
        .map(|w| (strsim::jaro_winkler(&word.to_ascii_lowercase(), w), w))
        .filter(|(likeness, _)| *likeness > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, w)| w)
}
