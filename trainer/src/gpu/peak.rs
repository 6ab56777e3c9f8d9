//! How fast a GPU could multiply at best.

/// Peaks in TFLOP/s of dense BF16 matrix products, by the beginning of the name that the driver
/// gives; the first that fits counts. A GPU at a lower power limit, or with a part of it only
/// (MIG), has less.
///
/// Sources: NVIDIA's data sheets of each product. Where they state a rate with sparsity, it is
/// halved.
const PEAKS: [(&str, f64); 24] = [
    ("NVIDIA GB300", 2500.0),
    ("NVIDIA GB200", 2500.0),
    ("NVIDIA B300", 2250.0),
    ("NVIDIA B200", 2250.0),
    ("NVIDIA B100", 1750.0),
    // On a PCIe card, two of which share a bridge, at 600 W.
    ("NVIDIA H200 NVL", 835.5),
    ("NVIDIA H200", 989.4),
    ("NVIDIA GH200", 989.4),
    ("NVIDIA H100 PCIe", 756.5),
    ("NVIDIA H100 NVL", 835.5),
    // `NVIDIA H100 80GB HBM3`: SXM.
    ("NVIDIA H100", 989.4),
    ("NVIDIA H800 PCIe", 756.5),
    ("NVIDIA H800", 989.4),
    ("NVIDIA H20", 148.0),
    // `NVIDIA A100-SXM4-80GB`, `NVIDIA A100 80GB PCIe`.
    ("NVIDIA A100", 311.9),
    ("NVIDIA A800", 311.9),
    ("NVIDIA A30", 165.0),
    ("NVIDIA A40", 149.7),
    ("NVIDIA A10G", 70.0),
    ("NVIDIA A10", 125.0),
    ("NVIDIA RTX A6000", 154.8),
    ("NVIDIA L40S", 362.1),
    ("NVIDIA L40", 181.1),
    ("NVIDIA L4", 121.0),
];

/// That of a GPU, by its name; `None` where it is not known.
pub fn peak_tflops(name: &str) -> Option<f64> {
    let is_of = |begin: &str| {
        let rest = name.strip_prefix(begin);
        // `NVIDIA A1000` is no A100.
        rest.is_some_and(|rest| !rest.starts_with(|next: char| next.is_ascii_alphanumeric()))
    };
    PEAKS.iter().find(|(begin, _)| is_of(begin)).map(|(_, peak)| *peak)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_that_of_the_card_and_not_of_one_with_a_like_name() {
        let check = |name, expected| assert_eq!(peak_tflops(name), expected, "{name}");
        check("NVIDIA A100-SXM4-80GB", Some(311.9));
        check("NVIDIA A100 80GB PCIe", Some(311.9));
        check("NVIDIA H100 80GB HBM3", Some(989.4));
        check("NVIDIA H100 PCIe", Some(756.5));
        check("NVIDIA H200", Some(989.4));
        check("NVIDIA H200 NVL", Some(835.5));
        check("NVIDIA GH200 480GB", Some(989.4));
        check("NVIDIA H20", Some(148.0));
        check("NVIDIA B200", Some(2250.0));
        check("NVIDIA A10G", Some(70.0));
        check("NVIDIA A10", Some(125.0));
        check("NVIDIA A1000", None);
        check("NVIDIA L40S", Some(362.1));
        check("NVIDIA L4", Some(121.0));
        check("Tesla V100-SXM2-32GB", None);
        check("", None);
    }
}
