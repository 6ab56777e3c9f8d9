//! What `phalanx run` and `phalanx resume` do on one node of several: on the first the coordinator
//! with an agent of its own, on the others an agent.
//!
//! Under Slurm's `srun` the same command runs on every node, and each finds its part by itself;
//! typed by hand, it is on the first node.

use super::agent::AgentArgs;
use crate::error::UserError;
use rank_protocol::env;

/// How this node is known to the run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Its name; `None`: the host's.
    pub name: Option<String>,
    /// Its place in the infrastructure's order.
    pub index: Option<u64>,
}

/// The part of this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// Coordinator, and an agent beside it.
    First(Node),
    /// Agent.
    Other(Node),
}

impl Node {
    /// The arguments of its agent.
    pub fn agent(self, run: String) -> AgentArgs {
        AgentArgs { run, name: self.name, index: self.index, ..AgentArgs::default() }
    }
}

impl Role {
    /// On this node, of a run on `num_nodes`; a `name` that was given counts.
    ///
    /// # Errors
    /// Where Slurm's tasks do not go with the run's nodes.
    pub fn here(num_nodes: usize, name: Option<String>) -> Result<Self, UserError> {
        Self::of(num_nodes, name, |variable| std::env::var(variable).ok())
    }

    fn of(
        num_nodes: usize,
        name: Option<String>,
        get: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, UserError> {
        let number = |variable: &str| -> Result<Option<u64>, UserError> {
            let Some(text) = get(variable) else { return Ok(None) };
            let wrong = |_| UserError::usage(format!("{variable} is {text:?}, which is no number"));
            text.parse().map(Some).map_err(wrong)
        };
        let Some(task) = number(env::SLURM_TASK)? else {
            return Ok(Role::First(Node { name, index: Some(0) }));
        };
        if let Some(local) = number(env::SLURM_LOCAL_TASK)?.filter(|local| *local > 0) {
            let message = format!(
                "{} is {local}: a node has one task, which starts all its ranks",
                env::SLURM_LOCAL_TASK
            );
            return Err(UserError::usage(message).hint("srun --ntasks-per-node=1"));
        }
        let tasks = number(env::SLURM_NUM_TASKS)?;
        if let Some(tasks) = tasks.filter(|tasks| *tasks < num_nodes as u64) {
            let message = format!("cluster.nodes: {num_nodes}, and srun started {tasks} task(s)");
            let hint = format!("srun --nodes={num_nodes} --ntasks-per-node=1; more are spares");
            return Err(UserError::usage(message).hint(hint));
        }
        let node = Node {
            name: name.or_else(|| get(env::SLURM_NODE_NAME)),
            index: number(env::SLURM_NODE)?.or(Some(task)),
        };
        Ok(if task == 0 { Role::First(node) } else { Role::Other(node) })
    }

    /// Whether a scheduler starts the other nodes too.
    pub fn is_scheduled() -> bool {
        std::env::var_os(env::SLURM_NUM_TASKS).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn role(variables: &[(&str, &str)]) -> Result<Role, UserError> {
        let get = |name: &str| {
            let found = variables.iter().find(|(variable, _)| *variable == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        Role::of(2, None, get)
    }

    fn node(name: Option<&str>, index: u64) -> Node {
        Node { name: name.map(str::to_owned), index: Some(index) }
    }

    #[test]
    fn by_hand_it_is_the_first_node() {
        assert_eq!(role(&[]), Ok(Role::First(node(None, 0))));
    }

    #[test]
    fn slurm_says_which_node_it_is() {
        let variables = |task, node, name| {
            let local = (env::SLURM_LOCAL_TASK, "0");
            [(env::SLURM_TASK, task), (env::SLURM_NODE, node), (env::SLURM_NODE_NAME, name), local]
        };
        assert_eq!(role(&variables("0", "0", "n7")), Ok(Role::First(node(Some("n7"), 0))));
        assert_eq!(role(&variables("3", "2", "n9")), Ok(Role::Other(node(Some("n9"), 2))));
        let spare = [&variables("3", "2", "n9")[..], &[(env::SLURM_NUM_TASKS, "4")]].concat();
        assert_eq!(role(&spare), Ok(Role::Other(node(Some("n9"), 2))));
    }

    #[test]
    fn tasks_that_do_not_go_with_the_nodes_are_refused() {
        let refused = |variables: &[(&str, &str)]| role(variables).unwrap_err().to_string();
        let second = refused(&[(env::SLURM_TASK, "1"), (env::SLURM_LOCAL_TASK, "1")]);
        assert!(second.contains("--ntasks-per-node=1"), "{second}");
        let few = refused(&[(env::SLURM_TASK, "0"), (env::SLURM_NUM_TASKS, "1")]);
        assert!(few.contains("cluster.nodes: 2, and srun started 1 task(s)"), "{few}");
        assert!(refused(&[(env::SLURM_TASK, "x")]).contains("is no number"));
    }
}
