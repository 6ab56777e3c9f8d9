//! Whether driver, libtorch and GPU fit each other: a function of what each of them says.

use rank_protocol::libtorch;
use std::fmt;
use torch_shim::cuda::driver::{Card, Driver, LIBRARY};

/// Where a rank stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// GPUs that the driver's files show, and CUDA is let see.
    pub listed: usize,
    /// Which process on this machine it is.
    pub local_rank: usize,
    /// Whether ranks share GPUs.
    pub is_shared: bool,
}

/// What was found, in the order in which it is looked at; `None`: not looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    place: Place,
    /// What the driver says; an error: it cannot be asked.
    pub driver: Result<Driver, String>,
    /// The CUDA that libtorch's CUDA part was built with; an error: it does not load.
    pub library: Option<Result<(u32, u32), String>>,
    /// GPUs that libtorch can use; an error: why there is none.
    pub devices: Option<Result<usize, String>>,
    /// Whether this rank's computes.
    pub probed: Option<Result<(), String>>,
}

/// What does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misfit {
    found: String,
    needed: String,
    hint: String,
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Misfit { found, needed, hint } = self;
        write!(f, "{found}; needed: {needed}; hint: {hint}, or `--set cluster.device=cpu`")
    }
}

fn misfit(found: String, needed: impl Into<String>, hint: impl Into<String>) -> Option<Misfit> {
    Some(Misfit { found, needed: needed.into(), hint: hint.into() })
}

impl Found {
    /// The beginning.
    pub fn new(place: Place, driver: Result<Driver, String>) -> Self {
        Self { place, driver, library: None, devices: None, probed: None }
    }

    /// Which GPU is this rank's.
    pub fn index(&self) -> usize {
        let devices = self.devices.as_ref().and_then(|devices| devices.as_ref().ok());
        self.place.local_rank % devices.copied().unwrap_or(1).max(1)
    }

    /// The first thing that does not fit, of what was looked at.
    pub fn misfit(&self) -> Option<Misfit> {
        let driver = match &self.driver {
            Ok(driver) => driver,
            Err(text) => return self.no_driver(text),
        };
        if let Some(code) = driver.error {
            return driver_fails(code, driver.version);
        }
        match self.library.as_ref()? {
            Err(text) => return library_fails(text),
            Ok(built_with) if built_with.0 > driver.version.0 && driver.version.0 > 0 => {
                return too_old(driver.version, *built_with);
            }
            Ok(_) => {}
        }
        match self.devices.as_ref()? {
            Err(text) => {
                let found = format!("libtorch finds no GPU that it can use ({text})");
                return misfit(found, "one that `nvidia-smi` lists", "look at what that says");
            }
            Ok(devices) if self.place.local_rank >= *devices && !self.place.is_shared => {
                let ranks = self.place.local_rank + 1;
                let found = format!("{ranks} ranks or more on a machine with {devices} GPUs");
                let hint = format!("`--set cluster.ranks_per_node={devices}`");
                return misfit(found, "a GPU for each rank", hint);
            }
            Ok(_) => {}
        }
        match self.probed.as_ref()? {
            Ok(()) => None,
            Err(text) => self.does_not_compute(driver, text),
        }
    }

    fn no_driver(&self, text: &str) -> Option<Misfit> {
        let needed = format!("{LIBRARY}, which comes with NVIDIA's driver");
        if self.place.listed == 0 {
            let found = "this machine has no GPU that NVIDIA's driver knows".to_owned();
            return misfit(found, "a GPU, and its driver", "another machine");
        }
        let found = format!(
            "this machine shows {} GPU(s), and the driver's library does not load ({text})",
            self.place.listed
        );
        let hint = "install the libraries of the driver's version; a container is started with its \
                    GPUs (`--gpus all`)";
        misfit(found, needed, hint)
    }

    fn does_not_compute(&self, driver: &Driver, text: &str) -> Option<Misfit> {
        let index = self.index();
        let card = driver.cards.get(index).cloned().unwrap_or_default();
        let (major, minor) = card.capability;
        if !text.contains("no kernel image") {
            let found = format!("GPU {index} ({}) does not compute ({text})", card.name);
            return misfit(found, "a sound GPU that is free", "look at `nvidia-smi`");
        }
        let found = format!(
            "GPU {index} ({}) is of architecture sm_{major}{minor}, and this libtorch holds no \
             code for it",
            card.name
        );
        let needed = "a libtorch that was compiled for it (the wheels for CUDA 13 hold nothing for \
                      GPUs before sm_75)";
        let release = libtorch::RELEASE;
        misfit(found, needed, format!("set PHALANX_LIBTORCH to such a libtorch {release}"))
    }
}

/// Whether a GPU multiplies FP8 numbers, which libtorch asks of it too: from compute capability 8.9
/// on. What is not known is left to libtorch.
pub fn without_fp8(index: usize, card: &Card) -> Option<Misfit> {
    let (major, minor) = card.capability;
    if card.capability >= (8, 9) || major == 0 {
        return None;
    }
    let found = format!("GPU {index} ({}) is of compute capability {major}.{minor}", card.name);
    let needed = "8.9 or more for precision.matmul fp8";
    misfit(found, needed, "`--set precision.matmul=same`")
}

/// Source of the numbers: `CUresult` in the public header cuda.h.
fn driver_fails(code: i32, (major, minor): (u32, u32)) -> Option<Misfit> {
    let version = match major {
        0 => String::new(),
        _ => format!(", which serves CUDA {major}.{minor},"),
    };
    let found = format!("NVIDIA's driver{version} does not start: CUDA error {code}");
    let smi = "look at `nvidia-smi`";
    match code {
        100 => {
            let allowed = std::env::var(rank_protocol::env::CUDA_VISIBLE).ok();
            let allowed = allowed.map_or("not set".to_owned(), |allowed| format!("{allowed:?}"));
            let needed = "a GPU that CUDA may use";
            let hint = format!("{smi}; CUDA_VISIBLE_DEVICES is {allowed}");
            misfit(format!("{found} (no GPU)"), needed, hint)
        }
        802 => misfit(
            format!("{found} (the GPUs' fabric is not ready)"),
            "NVIDIA's fabric manager, of the driver's version, at work",
            "`systemctl start nvidia-fabricmanager`",
        ),
        803 => misfit(
            format!("{found} (the driver's library is not of its kernel module's version)"),
            "both of one version",
            "reboot after an update of the driver",
        ),
        804 => misfit(
            format!("{found} (this GPU takes no newer library than its kernel module)"),
            "a driver's library of the kernel module's version",
            "take CUDA's compatibility libraries out of LD_LIBRARY_PATH",
        ),
        _ => misfit(found, "a driver that starts", smi),
    }
}

fn library_fails(text: &str) -> Option<Misfit> {
    let release = libtorch::RELEASE;
    let hint = format!(
        "`pip install 'torch=={release}.*'` for the python3 on the PATH, or set PHALANX_LIBTORCH \
         to a libtorch {release} with CUDA"
    );
    if text.starts_with("libtorch_cuda.so: cannot open shared object file") || text.is_empty() {
        let found = "this machine has GPUs, and no libtorch_cuda.so is found".to_owned();
        return misfit(found, format!("a libtorch {release} with CUDA"), hint);
    }
    let found = format!("libtorch's CUDA part does not load ({text})");
    misfit(found, "all libraries that it was built with, which its wheel brings", hint)
}

/// The least driver of a CUDA, by its major number: "CUDA Toolkit and Minimum Required Driver
/// Version for CUDA Minor Version Compatibility" in NVIDIA's release notes of CUDA 13.
const LEAST_DRIVER: [(u32, u32); 3] = [(13, 580), (12, 525), (11, 450)];

fn too_old((major, minor): (u32, u32), built_with: (u32, u32)) -> Option<Misfit> {
    let (cuda, cuda_minor) = built_with;
    let found = format!(
        "NVIDIA's driver serves CUDA {major}.{minor} at the most, and this libtorch was built with \
         CUDA {cuda}.{cuda_minor}"
    );
    let least = LEAST_DRIVER.iter().find(|(of, _)| *of == cuda);
    let needed = match least {
        Some((_, driver)) => format!("a driver of version {driver} or later"),
        None => format!("a driver for CUDA {cuda}"),
    };
    let release = libtorch::RELEASE;
    let hint = format!(
        "update the driver, or set PHALANX_LIBTORCH to a libtorch {release} that was built with \
         CUDA {major}"
    );
    misfit(found, needed, hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place = Place { listed: 2, local_rank: 1, is_shared: false };

    fn driver() -> Driver {
        let card = |name: &str, capability| Card { name: name.into(), capability, bytes: 80 << 30 };
        let cards = vec![card("NVIDIA H200", (9, 0)), card("NVIDIA P40", (6, 1))];
        Driver { version: (13, 0), error: None, cards }
    }

    fn well() -> Found {
        Found {
            library: Some(Ok((13, 0))),
            devices: Some(Ok(2)),
            probed: Some(Ok(())),
            ..Found::new(PLACE, Ok(driver()))
        }
    }

    fn check(found: &Found, parts: &[&str]) {
        let text = found.misfit().unwrap().to_string();
        for part in [&["; needed: ", "; hint: ", "cluster.device=cpu"], parts].concat() {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
    }

    #[test]
    fn what_fits_is_told_of_by_nothing() {
        assert_eq!(well().misfit(), None);
        assert_eq!(well().index(), 1);
        // What has not been looked at does not count.
        assert_eq!(Found::new(PLACE, Ok(driver())).misfit(), None);
        let newer = Driver { version: (13, 2), ..driver() };
        assert_eq!(Found { driver: Ok(newer), ..well() }.misfit(), None);
        // A driver of one major number serves its later minor ones.
        let older = Driver { version: (13, 0), ..driver() };
        let found = Found { driver: Ok(older), library: Some(Ok((13, 2))), ..well() };
        assert_eq!(found.misfit(), None);
    }

    #[test]
    fn a_machine_without_a_driver() {
        let absent = "libcuda.so.1: cannot open shared object file: No such file or directory";
        let found = Found { driver: Err(absent.into()), ..well() };
        check(&found, &["shows 2 GPU(s)", absent, "libcuda.so.1, which comes", "--gpus all"]);
        let place = Place { listed: 0, ..PLACE };
        check(&Found { place, ..found }, &["no GPU that NVIDIA's driver knows"]);
    }

    #[test]
    fn a_driver_that_does_not_start() {
        let fails = |code| {
            let driver = Driver { error: Some(code), cards: Vec::new(), ..driver() };
            Found { driver: Ok(driver), ..well() }
        };
        check(&fails(100), &["CUDA error 100 (no GPU)", "nvidia-smi", "CUDA_VISIBLE_DEVICES is"]);
        check(&fails(802), &["serves CUDA 13.0", "error 802", "nvidia-fabricmanager"]);
        check(&fails(803), &["kernel module's version", "reboot"]);
        check(&fails(804), &["LD_LIBRARY_PATH"]);
        check(&fails(999), &["CUDA error 999"]);
    }

    #[test]
    fn a_libtorch_that_is_absent_or_incomplete() {
        let library = |text: &str| Found { library: Some(Err(text.into())), ..well() };
        let absent = "libtorch_cuda.so: cannot open shared object file: No such file or directory";
        check(&library(absent), &["no libtorch_cuda.so is found", "torch==2.11.*"]);
        let part = "libcudnn.so.9: cannot open shared object file: No such file or directory";
        check(&library(part), &["does not load", part, "its wheel brings"]);
    }

    #[test]
    fn a_driver_that_is_too_old_for_libtorch() {
        let old = Driver { version: (12, 8), ..driver() };
        let parts = ["serves CUDA 12.8 at the most", "built with CUDA 13.0", "580 or later"];
        check(&Found { driver: Ok(old), ..well() }, &parts);
        let silent = Driver { version: (0, 0), ..driver() };
        assert_eq!(Found { driver: Ok(silent), ..well() }.misfit(), None, "libtorch will say");
        let text = "The NVIDIA driver on your system is too old (found version 12080).";
        check(&Found { devices: Some(Err(text.into())), ..well() }, &[text]);
    }

    #[test]
    fn more_ranks_than_gpus() {
        let one = Found { devices: Some(Ok(1)), ..well() };
        check(&one, &["2 ranks or more on a machine with 1 GPUs", "cluster.ranks_per_node=1"]);
        let shared = Found { place: Place { is_shared: true, ..PLACE }, ..one };
        assert_eq!((shared.misfit(), shared.index()), (None, 0));
    }

    #[test]
    fn a_gpu_that_multiplies_no_fp8() {
        let card = |capability| Card { name: "NVIDIA A100".into(), capability, bytes: 80 << 30 };
        let text = without_fp8(3, &card((8, 0))).unwrap().to_string();
        for part in ["GPU 3 (NVIDIA A100)", "capability 8.0", "8.9 or more", "matmul=same"] {
            assert!(text.contains(part), "{part:?} is not in {text}");
        }
        for capability in [(8, 9), (9, 0), (10, 3), (0, 0)] {
            assert_eq!(without_fp8(0, &card(capability)), None);
        }
    }

    #[test]
    fn an_architecture_that_libtorch_has_no_code_for() {
        let text = "CUDA error: no kernel image is available for execution on the device";
        let found = Found { probed: Some(Err(text.into())), ..well() };
        check(&found, &["GPU 1 (NVIDIA P40) is of architecture sm_61", "before sm_75"]);
        let text = "CUDA error: uncorrectable ECC error encountered";
        check(&Found { probed: Some(Err(text.into())), ..well() }, &["does not compute", text]);
    }
}
