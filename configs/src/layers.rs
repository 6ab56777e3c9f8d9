//! Defaults, preset, file and `--set` laid over each other.

use crate::keys::{self, KEYS, Kind};
use crate::problem::{Place, Problem, ProblemKind};
use crate::walk::{Given, Layer, Leaf, Walker};
use crate::yaml::{self, Entry, Node, Source, Value, quoted, short};

const DEFAULTS: &str = include_str!("../defaults.yaml");
/// Parts of the key of a `--set`.
const MAX_PARTS: usize = 8;
const PRESETS: &str = include_str!("../presets.yaml");

/// What is compiled in.
pub(crate) struct BuiltIn {
    /// The default of every key, null where there is none.
    pub defaults: Layer,
    /// The default inside each list item or optional mapping, by the path of the list.
    pub items: Vec<(&'static str, Layer)>,
}

impl BuiltIn {
    /// Reads `defaults.yaml`. Its faults are caught by a test, so none is reported here.
    pub fn read() -> Self {
        let root = parse_built_in(DEFAULTS);
        let mut walker = Walker::default();
        let mut defaults = walker.layer(&root, "");
        let mut items = Vec::new();
        for key in KEYS.iter().filter(|key| key.kind != Kind::Section) {
            let is_item = key.path.contains("[]");
            if !is_item {
                defaults.entry(key.path).or_insert_with(null);
            }
            if matches!(key.kind, Kind::Item | Kind::Items | Kind::IntegerOrItems { .. }) {
                items.push((key.path, item_defaults(&root, key.path)));
            }
        }
        Self { defaults, items }
    }

    /// The defaults inside an item of the list at `path`.
    pub fn item(&self, path: &str) -> Layer {
        let found = self.items.iter().find(|(list, _)| *list == path);
        found.map(|(_, layer)| layer.clone()).unwrap_or_default()
    }
}

fn null() -> Given {
    Given { leaf: Leaf::Null, place: Place::Default }
}

fn item_defaults(root: &Node, list: &'static str) -> Layer {
    let template = child(root, "items").and_then(|items| child(items, list));
    let prefix = KEYS
        .iter()
        .map(keys::Key::parent)
        .find(|parent| *parent == keys::item_path(list))
        .unwrap_or("");
    let mut layer = template.map(|node| Walker::default().layer(node, prefix)).unwrap_or_default();
    for key in keys::children(prefix) {
        layer.entry(key.path).or_insert_with(null);
    }
    layer
}

fn child<'a>(node: &'a Node, name: &str) -> Option<&'a Node> {
    match &node.value {
        Value::Map(entries) => entries.iter().find(|e| e.key == name).map(|e| &e.node),
        _ => None,
    }
}

fn parse_built_in(text: &str) -> Node {
    let parsed = yaml::parse(text, &Source::BuiltIn, &mut Vec::new()).ok().flatten();
    parsed.unwrap_or(Node { value: Value::Null, place: Place::Default })
}

/// The text of `defaults.yaml`, for the generated pages.
pub(crate) fn defaults_text() -> &'static str {
    DEFAULTS
}

/// The default of the row at `path`, also inside list items.
pub(crate) fn default_of(built_in: &BuiltIn, path: &str) -> Leaf {
    let layer = match path.split_once("[]") {
        None => built_in.defaults.clone(),
        Some((list, _)) => built_in.item(list),
    };
    layer.get(path).map_or(Leaf::Null, |given| given.leaf.clone())
}

/// The values of a preset.
pub(crate) fn preset(name: &str) -> Layer {
    let root = parse_built_in(PRESETS);
    child(&root, name).map(|node| Walker::default().layer(node, "model")).unwrap_or_default()
}

/// Lays `over` over `under`; optional mappings are merged key by key.
pub(crate) fn overlay(under: &mut Layer, over: Layer) {
    for (path, given) in over {
        let merged = match (under.remove(path).map(|g| g.leaf), given.leaf) {
            (Some(Leaf::Item(mut old)), Leaf::Item(new)) => {
                overlay(&mut old, new);
                Leaf::Item(old)
            }
            (_, leaf) => leaf,
        };
        under.insert(path, Given { leaf: merged, place: given.place });
    }
}

/// Lays one `--set a.b=c` over the tree of the file.
///
/// # Errors
/// No `=`, a value that is no YAML, or a path through something that is no mapping.
pub(crate) fn apply_set(
    root: &mut Node,
    text: &str,
    problems: &mut Vec<Problem>,
) -> Result<(), Box<Problem>> {
    let source = Source::Set(short(text));
    let fault = |key: &str, message: String, hint: &str| {
        Box::new(Problem {
            kind: ProblemKind::Syntax,
            place: source.whole(),
            key: key.to_owned(),
            message,
            limit: None,
            hint: Some(hint.to_owned()),
        })
    };
    let form = "write --set section.key=value";
    let Some((path, value)) = text.split_once('=') else {
        return Err(fault("", "there is no `=` in it".to_owned(), form));
    };
    // Messages print the items of a list as `key[0]`.
    let path = &path.trim().replace('[', ".").replace(']', "");
    if path.split('.').any(str::is_empty) || path.split('.').count() > MAX_PARTS {
        return Err(fault("", format!("{} is no key path", quoted(path)), form));
    }
    let parsed = yaml::parse(value, &source, problems)?;
    let place = source.whole();
    let new = parsed.unwrap_or(Node { value: Value::Null, place: place.clone() });
    let mut node = root;
    for part in path.split('.') {
        node = match step(node, part, &place) {
            Ok(next) => next,
            Err(reason) => {
                return Err(fault(path, reason, "name one of its keys or give it whole"));
            }
        };
    }
    *node = new;
    Ok(())
}

/// The child `part` of a mapping, made where absent, or the item of a list by its 0-based position.
fn step<'a>(node: &'a mut Node, part: &str, place: &Place) -> Result<&'a mut Node, String> {
    if let Value::Null = node.value {
        node.value = Value::Map(Vec::new());
    }
    match &mut node.value {
        Value::List(items) => {
            let length = items.len();
            part.parse::<usize>()
                .ok()
                .and_then(|index| items.get_mut(index))
                .ok_or_else(|| format!("{} is no position in a list of {length}", quoted(part)))
        }
        Value::Map(entries) => {
            let index = match entries.iter().position(|entry| entry.key == part) {
                Some(index) => index,
                None => {
                    let node = Node { value: Value::Null, place: place.clone() };
                    let key_place = place.clone();
                    entries.push(Entry { key: part.to_owned(), key_place, node });
                    entries.len() - 1
                }
            };
            Ok(&mut entries[index].node)
        }
        other => Err(format!("{} has no key {}", other.describe(), quoted(part))),
    }
}
