//! YAML text to a tree in which every value knows its place. Bounded in depth and in size, also
//! where aliases repeat a part, so that no text can exhaust the memory or the stack.

use crate::problem::{Place, Problem, ProblemKind};
use saphyr_parser::{Event, Marker, Parser, ScalarStyle, ScanError, Span, StrInput};
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

/// Levels of nesting; the deepest config has 5.
const MAX_DEPTH: usize = 32;
/// Values in one text, aliases counted as often as they are used.
const MAX_NODES: usize = 20_000;

/// A value and its place.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub value: Value,
    pub place: Place,
}

/// A value by YAML 1.2's core schema; scalars keep their source text.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Integer(i128, String),
    Number(f64, String),
    Text(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// A key with its value.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub key: String,
    pub key_place: Place,
    pub node: Node,
}

impl Node {
    fn count(&self) -> usize {
        1 + match &self.value {
            Value::List(items) => items.iter().map(Node::count).sum(),
            Value::Map(entries) => entries.iter().map(|e| e.node.count()).sum(),
            _ => 0,
        }
    }
}

impl Value {
    /// What the value is, for messages: `text "ten"`, `a list`.
    pub fn describe(&self) -> String {
        match self {
            Self::Null => "null".to_owned(),
            Self::Bool(b) => format!("the boolean {b}"),
            Self::Integer(_, raw) | Self::Number(_, raw) => format!("the number {}", short(raw)),
            Self::Text(text) => format!("the text {}", quoted(text)),
            Self::List(items) => format!("a list of {}", items.len()),
            Self::Map(entries) => format!("a mapping of {} keys", entries.len()),
        }
    }
}

/// At most 60 characters of `text`, control characters escaped.
pub(crate) fn short(text: &str) -> String {
    let mut out: String = text.chars().take(60).flat_map(char::escape_debug).collect();
    if text.chars().nth(60).is_some() {
        out.push('…');
    }
    out
}

/// `text` shortened and in quotes.
pub(crate) fn quoted(text: &str) -> String {
    format!("\"{}\"", short(text))
}

/// Which text is parsed, so that places can name it.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    /// A file, or a text without one.
    File(Option<PathBuf>),
    /// A `--set`, as typed.
    Set(String),
    /// Compiled in.
    BuiltIn,
}

impl Source {
    pub fn place(&self, line: usize, column: usize) -> Place {
        match self {
            Self::File(path) => Place::File { path: path.clone(), line, column },
            Self::Set(text) => Place::Set(text.clone()),
            Self::BuiltIn => Place::Default,
        }
    }

    pub fn whole(&self) -> Place {
        match self {
            Self::File(path) => Place::WholeFile(path.clone()),
            _ => self.place(0, 0),
        }
    }

    fn at(&self, marker: Marker) -> Place {
        self.place(marker.line(), marker.col() + 1)
    }
}

/// Parses one YAML document. `None` where it is empty. Duplicate keys are added to `problems` and
/// the first of them is kept.
///
/// # Errors
/// The first fault in the syntax.
pub(crate) fn parse(
    text: &str,
    source: &Source,
    problems: &mut Vec<Problem>,
) -> Result<Option<Node>, Box<Problem>> {
    let mut builder = Builder {
        parser: Parser::new_from_str(text.strip_prefix('\u{feff}').unwrap_or(text)),
        source,
        anchors: HashMap::new(),
        num_nodes: 0,
        problems,
    };
    loop {
        let (event, span) = builder.next()?;
        match event {
            Event::StreamEnd => return Ok(None),
            Event::StreamStart | Event::DocumentStart(_) | Event::Nothing => {}
            Event::DocumentEnd => return Ok(None),
            event => {
                let root = builder.node(event, span, 0, "")?;
                builder.finish()?;
                return Ok(Some(root));
            }
        }
    }
}

struct Builder<'a> {
    parser: Parser<'a, StrInput<'a>>,
    source: &'a Source,
    anchors: HashMap<usize, Node>,
    num_nodes: usize,
    problems: &'a mut Vec<Problem>,
}

impl<'a> Builder<'a> {
    fn next(&mut self) -> Result<(Event<'a>, Span), Box<Problem>> {
        match self.parser.next_event() {
            Some(Ok(pair)) => Ok(pair),
            Some(Err(error)) => Err(self.scan_error(&error)),
            None => Ok((Event::StreamEnd, Span::default())),
        }
    }

    /// Nothing but the end may follow the first document.
    fn finish(&mut self) -> Result<(), Box<Problem>> {
        loop {
            let (event, span) = self.next()?;
            match event {
                Event::StreamEnd => return Ok(()),
                Event::DocumentEnd | Event::Nothing => {}
                _ => {
                    let message = "a second YAML document begins here";
                    return Err(self.fault(span, "", message, "one file holds one run"));
                }
            }
        }
    }

    fn node(
        &mut self,
        event: Event<'a>,
        span: Span,
        depth: usize,
        path: &str,
    ) -> Result<Node, Box<Problem>> {
        self.take_nodes(1, span, path)?;
        if depth > MAX_DEPTH {
            let message = format!("nested over {MAX_DEPTH} levels deep");
            return Err(self.fault(span, path, &message, "a run config has at most 5 levels"));
        }
        let place = self.source.at(span.start);
        let (value, anchor) = match event {
            Event::Alias(id) => return self.alias(id, span, path),
            Event::Scalar(text, style, anchor, tag) => {
                let is_text = tag.as_ref().is_some_and(|tag| tag.suffix == "str");
                if let Some(tag) = tag.filter(|tag| !tag.is_yaml_core_schema()) {
                    let message = format!("the tag {} is not taken", short(&tag.to_string()));
                    return Err(self.fault(span, path, &message, "remove it"));
                }
                let plain = style == ScalarStyle::Plain && !is_text;
                (if plain { plain_value(&text) } else { Value::Text(text.into_owned()) }, anchor)
            }
            Event::SequenceStart(anchor, _) => (self.list(depth, path)?, anchor),
            Event::MappingStart(anchor, _) => (self.map(depth, path)?, anchor),
            other => {
                let message = format!("unexpected {other:?}");
                return Err(self.fault(span, path, &short(&message), "check the YAML"));
            }
        };
        let node = Node { value, place };
        if anchor > 0 {
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    fn alias(&mut self, id: usize, span: Span, path: &str) -> Result<Node, Box<Problem>> {
        let Some(node) = self.anchors.get(&id).cloned() else {
            let message = "an alias inside its own anchor";
            return Err(self.fault(span, path, message, "write the value out"));
        };
        self.take_nodes(node.count(), span, path)?;
        Ok(Node { place: self.source.at(span.start), ..node })
    }

    fn list(&mut self, depth: usize, path: &str) -> Result<Value, Box<Problem>> {
        let mut items = Vec::new();
        loop {
            let (event, span) = self.next()?;
            if event == Event::SequenceEnd {
                return Ok(Value::List(items));
            }
            let path = format!("{path}[{}]", items.len());
            items.push(self.node(event, span, depth + 1, &path)?);
        }
    }

    fn map(&mut self, depth: usize, path: &str) -> Result<Value, Box<Problem>> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut first_places: HashMap<String, Place> = HashMap::new();
        let mut seen = HashSet::new();
        loop {
            let (event, span) = self.next()?;
            if event == Event::MappingEnd {
                return Ok(Value::Map(entries));
            }
            let key_place = self.source.at(span.start);
            let Event::Scalar(key, ..) = event else {
                let message = "a key that is no plain name";
                return Err(self.fault(span, path, message, "keys are names, as in `steps: 100`"));
            };
            let key = key.into_owned();
            let key_path = join(path, &short(&key));
            let (event, span) = self.next()?;
            let node = self.node(event, span, depth + 1, &key_path)?;
            if seen.insert(key.clone()) {
                first_places.insert(key.clone(), key_place.clone());
                entries.push(Entry { key, key_place, node });
            } else {
                let first = first_places.get(&key).map(Place::to_string).unwrap_or_default();
                self.problems.push(Problem {
                    kind: ProblemKind::DuplicateKey,
                    place: key_place,
                    key: key_path,
                    message: format!("the key is given twice, first at {first}"),
                    limit: None,
                    hint: Some("remove one of them".to_owned()),
                });
            }
        }
    }

    fn take_nodes(&mut self, count: usize, span: Span, path: &str) -> Result<(), Box<Problem>> {
        self.num_nodes += count;
        if self.num_nodes > MAX_NODES {
            let message = format!("over {MAX_NODES} values, aliases expanded");
            return Err(self.fault(span, path, &message, "is this a run config?"));
        }
        Ok(())
    }

    fn fault(&self, span: Span, path: &str, message: &str, hint: &str) -> Box<Problem> {
        Box::new(Problem {
            kind: ProblemKind::Syntax,
            place: self.source.at(span.start),
            key: path.to_owned(),
            message: message.to_owned(),
            limit: None,
            hint: Some(hint.to_owned()),
        })
    }

    fn scan_error(&self, error: &ScanError) -> Box<Problem> {
        Box::new(Problem {
            kind: ProblemKind::Syntax,
            place: self.source.at(*error.marker()),
            key: String::new(),
            message: format!("not valid YAML: {}", short(error.info())),
            limit: None,
            hint: Some("check indentation, colons and quotes here and just above".to_owned()),
        })
    }
}

/// `prefix.key`, or `key` at the top.
pub(crate) fn join(prefix: &str, key: &str) -> String {
    if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") }
}

/// A plain scalar by the core schema of YAML 1.2.
fn plain_value(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" => return Value::Bool(true),
        "false" | "False" | "FALSE" => return Value::Bool(false),
        _ => {}
    }
    let raw = text.to_owned();
    if let Some(integer) = plain_integer(text) {
        return Value::Integer(integer, raw);
    }
    let (negative, unsigned) = match text.strip_prefix(['-', '+']) {
        Some(rest) => (text.starts_with('-'), rest),
        None => (false, text),
    };
    match unsigned {
        ".inf" | ".Inf" | ".INF" => {
            let inf = if negative { f64::NEG_INFINITY } else { f64::INFINITY };
            return Value::Number(inf, raw);
        }
        ".nan" | ".NaN" | ".NAN" => return Value::Number(f64::NAN, raw),
        _ => {}
    }
    let numeric = |c: char| c.is_ascii_digit() || matches!(c, '.' | 'e' | 'E' | '+' | '-');
    let digit_first = unsigned.trim_start_matches('.').starts_with(|c: char| c.is_ascii_digit());
    match text.parse::<f64>() {
        Ok(number) if digit_first && text.chars().all(numeric) => Value::Number(number, raw),
        _ => Value::Text(raw),
    }
}

fn plain_integer(text: &str) -> Option<i128> {
    if let Some(hex) = text.strip_prefix("0x") {
        return i128::from_str_radix(hex, 16).ok().filter(|_| !hex.starts_with(['+', '-']));
    }
    if let Some(octal) = text.strip_prefix("0o") {
        return i128::from_str_radix(octal, 8).ok().filter(|_| !octal.starts_with(['+', '-']));
    }
    text.parse().ok()
}
