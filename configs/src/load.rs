//! From a file, a text and `--set` overrides to a resolved config.

use crate::layers::{self, BuiltIn};
use crate::problem::{ConfigErrors, Note, Place, Problem, ProblemKind};
use crate::resolve::{Resolver, absolute};
use crate::resolved::RunConfig;
use crate::rules::Rules;
use crate::walk::{Leaf, Walker};
use crate::yaml::{self, Node, Source, Value};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

/// Bytes of a config file.
const MAX_BYTES: u64 = 1 << 20;

/// A resolved config and what is worth saying about it.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The config.
    pub config: RunConfig,
    /// Warnings and remarks.
    pub notes: Vec<Note>,
}

impl RunConfig {
    /// Reads and resolves the YAML file at `path`, with `overrides` (`a.b=c`, `c` being YAML) laid
    /// over it. Relative paths, those of the overrides too, are relative to the file's folder.
    ///
    /// # Errors
    /// Every problem of the file and of the overrides at once.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Loaded, ConfigErrors> {
        let source = Source::File(Some(path.to_owned()));
        let text = read(path).map_err(|(message, hint)| unreadable(&source, message, hint))?;
        let io = |error: std::io::Error| unreadable(&source, error.to_string(), String::new());
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let base = parent.unwrap_or(Path::new(".")).canonicalize().map_err(io)?;
        resolve(&text, &source, &base, overrides)
    }

    /// Resolves a YAML text; relative paths in it are relative to `base_dir`.
    ///
    /// # Errors
    /// Every problem of the text and of the overrides at once.
    pub fn from_yaml_str(
        text: &str,
        base_dir: &Path,
        overrides: &[String],
    ) -> Result<Loaded, ConfigErrors> {
        let source = Source::File(None);
        let io = |error: std::io::Error| unreadable(&source, error.to_string(), String::new());
        let base = std::path::absolute(base_dir).map_err(io)?;
        resolve(text, &source, &absolute(Path::new("/"), &base), overrides)
    }

    /// The same config with what the launcher found out: ranks per node and threads per rank.
    ///
    /// # Errors
    /// Where the degrees or the batch do not go with the ranks.
    pub fn with_cluster(
        &self,
        ranks_per_node: usize,
        threads_per_rank: usize,
    ) -> Result<Loaded, ConfigErrors> {
        let overrides = [
            format!("cluster.ranks_per_node={ranks_per_node}"),
            format!("cluster.threads_per_rank={threads_per_rank}"),
        ];
        Self::from_yaml_str(&self.to_yaml(), Path::new("/"), &overrides)
    }
}

/// The text of a config file. Looks before it reads: a pipe would hang, a device never ends.
fn read(path: &Path) -> Result<String, (String, String)> {
    let io = |error: std::io::Error| (error.to_string(), "check the path".to_owned());
    let metadata = std::fs::metadata(path).map_err(io)?;
    if metadata.is_dir() {
        let hint = "name the YAML file; a run's own is RUN/config.yaml".to_owned();
        return Err(("this is a folder".to_owned(), hint));
    }
    if !metadata.is_file() {
        return Err(("this is no regular file".to_owned(), "name a YAML file".to_owned()));
    }
    let mut bytes = Vec::new();
    if metadata.len() <= MAX_BYTES {
        let file = std::fs::File::open(path).map_err(io)?;
        file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
    }
    let length = metadata.len().max(bytes.len() as u64);
    if length > MAX_BYTES {
        let message = format!("the file has {length} bytes; a config has at most {MAX_BYTES}");
        return Err((message, "is this a run config?".to_owned()));
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        (format!("this is no text: byte {at} is not UTF-8"), "is this a run config?".to_owned())
    })
}

fn unreadable(source: &Source, message: String, hint: String) -> ConfigErrors {
    let problem = Problem {
        kind: ProblemKind::Unreadable,
        place: source.whole(),
        key: String::new(),
        message,
        limit: None,
        hint: Some(hint).filter(|hint| !hint.is_empty()),
    };
    ConfigErrors { problems: vec![problem] }
}

fn resolve(
    text: &str,
    source: &Source,
    base_dir: &Path,
    overrides: &[String],
) -> Result<Loaded, ConfigErrors> {
    if base_dir.to_str().is_none() {
        let message = "the folder's path is not UTF-8".to_owned();
        return Err(unreadable(source, message, "move the file".to_owned()));
    }
    let mut problems = Vec::new();
    let root = tree(text, source, overrides, &mut problems)?;
    let mut walker = Walker { problems, ..Walker::default() };
    let user = walker.layer(&root, "");

    let built_in = BuiltIn::read();
    let mut merged = built_in.defaults.clone();
    if let Some(Leaf::Text(name)) = user.get("model.preset").map(|given| &given.leaf) {
        layers::overlay(&mut merged, layers::preset(name));
    }
    layers::overlay(&mut merged, user);

    let mut resolver = Resolver {
        built_in: &built_in,
        base_dir,
        whole: source.whole(),
        problems: walker.problems,
        bad: walker.bad,
        places: BTreeMap::new(),
    };
    let config = resolver.config(&merged);
    let mut notes = Vec::new();
    if let Some(config) = &config {
        let mut rules = Rules { config, resolver: &mut resolver, notes: Vec::new() };
        rules.check();
        notes = rules.notes;
    }
    let mut problems = resolver.problems;
    problems.sort_by_key(|problem| position(&problem.place));
    match config {
        Some(config) if problems.is_empty() => Ok(Loaded { config, notes }),
        _ if problems.is_empty() => {
            let message = "internal: the table of keys and the types disagree".to_owned();
            Err(unreadable(source, message, "report this".to_owned()))
        }
        _ => Err(ConfigErrors { problems }),
    }
}

/// The file first, from top to bottom, then the overrides.
fn position(place: &Place) -> (usize, usize, usize) {
    match place {
        Place::WholeFile(_) | Place::Default => (0, 0, 0),
        Place::File { line, column, .. } => (1, *line, *column),
        Place::Set(_) => (2, 0, 0),
    }
}

/// The parsed text with the overrides laid over it.
fn tree(
    text: &str,
    source: &Source,
    overrides: &[String],
    problems: &mut Vec<Problem>,
) -> Result<Node, ConfigErrors> {
    let refuse =
        |message: &str, hint: &str| Err(unreadable(source, message.to_owned(), hint.to_owned()));
    if text.len() as u64 > MAX_BYTES {
        return refuse(&format!("over {MAX_BYTES} bytes of text"), "is this a run config?");
    }
    let control = |c: char| c.is_control() && !matches!(c, '\n' | '\r' | '\t');
    if let Some(at) = text.find(control) {
        return refuse(&format!("this is no text: control character at byte {at}"), "");
    }
    if text.trim().is_empty() {
        return refuse("the file is empty", "start from a config in configs/runs/");
    }
    let parsed = yaml::parse(text, source, problems);
    let mut root = match parsed {
        Ok(Some(Node { value: Value::Null, .. }) | None) => {
            return refuse("the file holds no keys", "start from a config in configs/runs/");
        }
        Ok(Some(root)) => root,
        Err(problem) => {
            problems.push(*problem);
            return Err(ConfigErrors { problems: std::mem::take(problems) });
        }
    };
    if !matches!(root.value, Value::Map(_)) {
        let problem = Problem {
            kind: ProblemKind::WrongType,
            place: root.place,
            key: String::new(),
            message: format!("{} is no run config", root.value.describe()),
            limit: Some("a mapping of keys".to_owned()),
            hint: Some("start from a config in configs/runs/".to_owned()),
        };
        return Err(ConfigErrors { problems: vec![problem] });
    }
    for set in overrides {
        if let Err(problem) = layers::apply_set(&mut root, set, problems) {
            problems.push(*problem);
        }
    }
    Ok(root)
}
