//! Sources, and the choices that are made when one is compiled.

use std::fmt;

use torch_shim::tch::{Kind, Tensor};

use crate::error::{KernelError, Result};

/// What every source begins with.
const PRELUDE: &str = include_str!("ops/prelude.cuh");

/// A CUDA source, and the kernels in it.
#[derive(Debug)]
pub struct Program {
    /// Its name, unique among all: that of its file.
    pub name: &'static str,
    /// Its text, without what all share.
    pub source: &'static str,
    /// Its kernels.
    pub kernels: &'static [&'static str],
    /// The formats that its tensors may have.
    pub storages: &'static [Storage],
    /// How many elements a thread may hold (`ITEMS`); empty where the source does not ask.
    pub items: &'static [u32],
}

/// How a kernel's tensors are stored. Arithmetic is FP64 for FP64 and FP32 for all else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Storage {
    /// 32 bits.
    Fp32,
    /// BF16.
    Bf16,
    /// 64 bits: for proofs.
    Fp64,
}

impl Storage {
    /// All of them.
    pub const ALL: &'static [Storage] = &[Storage::Fp32, Storage::Bf16, Storage::Fp64];

    /// That of a tensor.
    ///
    /// # Errors
    /// Where kernels know no such format.
    pub fn of(kernel: &'static str, tensor: &Tensor) -> Result<Storage> {
        match tensor.kind() {
            Kind::Float => Ok(Storage::Fp32),
            Kind::BFloat16 => Ok(Storage::Bf16),
            Kind::Double => Ok(Storage::Fp64),
            other => Err(KernelError::Argument {
                kernel,
                what: "the dtype".into(),
                value: format!("{other:?}"),
                expected: "Float, BFloat16 or Double".into(),
            }),
        }
    }

    /// libtorch's name.
    pub fn kind(self) -> Kind {
        match self {
            Storage::Fp32 => Kind::Float,
            Storage::Bf16 => Kind::BFloat16,
            Storage::Fp64 => Kind::Double,
        }
    }

    /// What is computed in.
    pub fn wide(self) -> Kind {
        if self == Storage::Fp64 { Kind::Double } else { Kind::Float }
    }

    /// Elements in 16 bytes.
    pub fn lanes(self) -> i64 {
        match self {
            Storage::Fp32 => 4,
            Storage::Bf16 => 8,
            Storage::Fp64 => 2,
        }
    }

    fn define(self) -> &'static str {
        match self {
            Storage::Fp32 => "STORAGE_FP32",
            Storage::Bf16 => "STORAGE_BF16",
            Storage::Fp64 => "STORAGE_FP64",
        }
    }
}

/// A program with its choices made: what is compiled, and kept.
#[derive(Clone, Copy, Debug)]
pub struct Variant {
    /// The program.
    pub program: &'static Program,
    /// How its tensors are stored.
    pub storage: Storage,
    /// Elements that a thread holds; 0 where the source does not ask.
    pub items: u32,
}

impl Variant {
    /// All variants of a program.
    pub fn all(program: &'static Program) -> Vec<Variant> {
        let items = if program.items.is_empty() { &[0][..] } else { program.items };
        let of = |&storage| items.iter().map(move |&items| Variant { program, storage, items });
        program.storages.iter().flat_map(of).collect()
    }

    /// What tells it from all others.
    pub fn id(&self) -> (&'static str, Storage, u32) {
        (self.program.name, self.storage, self.items)
    }

    /// The macros that are defined for it.
    pub fn defines(&self) -> Vec<(&'static str, u32)> {
        let items = (self.items > 0).then_some(("ITEMS", self.items));
        std::iter::once((self.storage.define(), 1)).chain(items).collect()
    }

    /// The whole text, without the macros.
    pub fn text(&self) -> String {
        let Program { name, source, .. } = self.program;
        format!("#line 1 \"prelude.cuh\"\n{PRELUDE}\n#line 1 \"{name}.cu\"\n{source}")
    }

    /// The compiler's options for an architecture, as 90 for `sm_90`.
    pub fn options(&self, architecture: i32) -> Vec<String> {
        let defines = self.defines().into_iter().map(|(name, value)| format!("-D{name}={value}"));
        let fixed = [format!("--gpu-architecture=sm_{architecture}"), "--std=c++17".to_string()];
        fixed.into_iter().chain(defines).collect()
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:?}", self.program.name, self.storage)?;
        if self.items > 0 {
            write!(f, ", {} items", self.items)?;
        }
        write!(f, ")")
    }
}
