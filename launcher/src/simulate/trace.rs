//! When nodes fail in a simulation, and of what.

use fastrand::Rng;

/// How a failure shows itself; the cost of finding it depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A process ends; its node stays.
    Process,
    /// A node and all its processes are gone, or it must be replaced.
    Node,
    /// A link fails; its node stays.
    Link,
    /// Nothing moves any more; the ranks are started again.
    Hang,
}

impl Kind {
    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Process => "process",
            Kind::Node => "node",
            Kind::Link => "link",
            Kind::Hang => "hang",
        }
    }

    /// Whether the node goes.
    pub fn takes_the_node(self) -> bool {
        self == Kind::Node
    }
}

/// Interruptions of Llama 3 405B's pre-training by cause, of 419 (Llama team, "The Llama 3 Herd of
/// Models", 2024, table 5). How each shows itself is a reading of ours.
const LLAMA_3: &[(&str, u32, Kind)] = &[
    ("faulty GPU", 148, Kind::Node),
    ("HBM3 memory", 72, Kind::Node),
    ("software", 54, Kind::Process),
    ("switch or cable", 35, Kind::Link),
    ("host maintenance", 32, Kind::Node),
    ("GPU SRAM", 19, Kind::Node),
    ("GPU system processor", 17, Kind::Node),
    ("NIC", 7, Kind::Node),
    ("NCCL watchdog", 7, Kind::Hang),
    ("silent data corruption", 6, Kind::Node),
    ("thermal", 6, Kind::Node),
    ("SSD", 3, Kind::Node),
    ("power", 3, Kind::Node),
    ("chassis", 2, Kind::Node),
    ("IO board", 2, Kind::Node),
    ("dependency", 2, Kind::Process),
    ("CPU", 2, Kind::Node),
    ("system memory", 2, Kind::Node),
];

/// What fails, where a failure is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Trace {
    /// Every failure takes a node.
    Poisson,
    /// As in Llama 3's table of causes.
    Llama3,
}

impl Trace {
    /// Draws how a failure shows itself.
    pub fn draw(self, random: &mut Rng) -> Kind {
        if self == Trace::Poisson {
            return Kind::Node;
        }
        let mut left = random.u32(..LLAMA_3.iter().map(|(_, count, _)| count).sum::<u32>());
        for (_, count, kind) in LLAMA_3 {
            if left < *count {
                return *kind;
            }
            left -= count;
        }
        Kind::Node
    }
}

/// Time to the next failure of any of several nodes, in seconds; failures of a node are a Poisson
/// process.
pub fn time_to_failure(random: &mut Rng, rate_per_s: f64) -> f64 {
    // In (0, 1], so that its logarithm is finite.
    -(1.0 - random.f64()).ln() / rate_per_s.max(f64::MIN_POSITIVE)
}

/// The number of nodes that at most 1 % of the times have failed of `nodes`, each with probability
/// `p`: the 99th percentile of the binomial distribution.
pub fn binomial_p99(nodes: usize, p: f64) -> usize {
    let (n, p) = (nodes as f64, p.clamp(0.0, 1.0));
    if p >= 1.0 {
        return nodes;
    }
    // Logarithms, because (1 - p)^n is no number a float holds for large n.
    let mut log_term = n * (-p).ln_1p();
    let mut sum = log_term.exp();
    let mut count = 0;
    while sum < 0.99 && count < nodes {
        count += 1;
        let k = count as f64;
        log_term += ((n - k + 1.0) / k).ln() + p.ln() - (-p).ln_1p();
        sum += log_term.exp();
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_come_at_their_rate() {
        let mut random = Rng::with_seed(1);
        let n = 100_000;
        let sum: f64 = (0..n).map(|_| time_to_failure(&mut random, 0.5)).sum();
        // Standard error 2 / sqrt(n) = 0.0063.
        assert!((sum / f64::from(n) - 2.0).abs() < 0.026, "{}", sum / f64::from(n));
    }

    #[test]
    fn causes_come_in_their_proportion() {
        let mut random = Rng::with_seed(2);
        assert_eq!(LLAMA_3.iter().map(|(_, count, _)| count).sum::<u32>(), 419);
        let n = 100_000;
        let links = (0..n).filter(|_| Trace::Llama3.draw(&mut random) == Kind::Link).count();
        let expected = 35.0 / 419.0;
        assert!((links as f64 / f64::from(n) - expected).abs() < 4.0 * 0.000_88);
    }

    #[test]
    fn spares_are_the_99th_percentile() {
        // By hand: P(0) = 0.904, P(<= 1) = 0.9957.
        assert_eq!(binomial_p99(10, 0.01), 1);
        assert_eq!(binomial_p99(10, 0.0), 0);
        assert_eq!(binomial_p99(10, 1.0), 10);
        // Nearly normal: 19.5 + 2.33 sqrt(19.4) = 29.8.
        assert!((29..=31).contains(&binomial_p99(3000, 0.0065)));
    }
}
