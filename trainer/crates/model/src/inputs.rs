//! What a forward pass reads: tokens, positions and document boundaries.
//!
//! Shapes: `B` sequences, `S` tokens each.

use crate::error::{Result, bad_input};
use std::ops::Range;
use torch_shim::cuda::upload;
use torch_shim::flash::{Kernel, Packed};
use torch_shim::fused::Documents;
use torch_shim::tch::{Device, Tensor};

/// Stands for no target.
const NO_TARGET: i32 = -100;

/// Which kernels compute attention.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttentionKernels {
    /// Where each row is one document.
    pub whole: Kernel,
    /// Where rows hold several.
    pub packed: Kernel,
}

/// Attention by a kernel that never makes the scores.
#[derive(Debug)]
pub struct Flash {
    /// The kernel.
    pub kernel: Kernel,
    /// Where documents lie; none: each row is one.
    pub packed: Option<Packed>,
}

impl Flash {
    /// Another owner of the same.
    fn share(&self) -> Self {
        Self { kernel: self.kernel, packed: self.packed.as_ref().map(Packed::share) }
    }
}

/// One micro-batch on the device.
#[derive(Debug)]
pub struct Inputs {
    /// Token ids, int64 `[B, S]`.
    pub tokens_BS: Tensor,
    /// Position of each token in its document, int64 `[B, S]`.
    pub positions_BS: Tensor,
    /// Where documents lie in the whole rows; attention stays within them.
    pub documents: Documents,
    /// How attention is computed on a GPU; none: as on a CPU.
    pub flash: Option<Flash>,
    consecutive_from: Option<i64>,
    largest_token: i32,
    largest_position: i32,
}

impl Inputs {
    /// `batch` rows from row-major slices of equal length. `document_ids`, one per token, change
    /// where a document begins; without them every row is one document.
    ///
    /// # Errors
    /// Where lengths do not agree or an id is negative.
    pub fn new(
        tokens: &[i32],
        positions: &[i32],
        document_ids: Option<&[i32]>,
        batch: usize,
        device: Device,
    ) -> Result<Self> {
        if batch == 0 || tokens.is_empty() || !tokens.len().is_multiple_of(batch) {
            let expected = format!("a multiple of the {batch} rows, above 0");
            return Err(bad_input("number of tokens", tokens.len(), expected));
        }
        let same_length = |what, length: usize| {
            let expected = format!("{} as there are tokens", tokens.len());
            if length == tokens.len() { Ok(()) } else { Err(bad_input(what, length, expected)) }
        };
        same_length("number of position ids", positions.len())?;
        let sequence = tokens.len() / batch;
        let documents = match document_ids {
            None => Documents::causal(),
            Some(ids) => Documents::from_ids(ids, batch, sequence)?,
        };
        let shape = [batch as i64, sequence as i64];
        Ok(Self {
            tokens_BS: to_int64(tokens, &shape, device)?,
            positions_BS: to_int64(positions, &shape, device)?,
            documents,
            flash: None,
            consecutive_from: consecutive_from(positions, sequence),
            largest_token: checked_largest("token id", tokens)?,
            largest_position: checked_largest("position id", positions)?,
        })
    }

    /// `batch` rows of one document each, at positions from `first_position`.
    ///
    /// # Errors
    /// As [`Inputs::new`].
    pub fn consecutive(
        tokens: &[i32],
        batch: usize,
        first_position: usize,
        device: Device,
    ) -> Result<Self> {
        let sequence = tokens.len() / batch.max(1);
        let positions: Vec<i32> = (0..tokens.len())
            .map(|index| (first_position + index % sequence.max(1)) as i32)
            .collect();
        Self::new(tokens, &positions, None, batch, device)
    }

    /// With attention by these kernels, where they take its kind and width.
    ///
    /// # Errors
    /// Where memory is short.
    pub fn with_kernels(self, kernels: AttentionKernels) -> Result<Self> {
        let (batch, sequence, device) = (self.batch(), self.sequence(), self.tokens_BS.device());
        let packed = Packed::new(&self.documents, batch, sequence, device)?;
        let kernel = if packed.is_some() { kernels.packed } else { kernels.whole };
        Ok(Self { flash: Some(Flash { kernel, packed }), ..self })
    }

    /// Another owner of the same tensors.
    pub fn share(&self) -> Self {
        Self {
            tokens_BS: self.tokens_BS.shallow_clone(),
            positions_BS: self.positions_BS.shallow_clone(),
            documents: self.documents.clone(),
            flash: self.flash.as_ref().map(Flash::share),
            ..*self
        }
    }

    /// Only the tokens of `pieces` of each row, in that order (context parallelism). The documents
    /// stay those of the whole rows.
    ///
    /// # Errors
    /// Where a piece is not in the rows.
    pub fn take(&self, pieces: &[Range<usize>]) -> Result<Self> {
        Ok(Self {
            tokens_BS: take(&self.tokens_BS, pieces)?,
            positions_BS: take(&self.positions_BS, pieces)?,
            documents: self.documents.clone(),
            flash: None,
            consecutive_from: None,
            ..*self
        })
    }

    /// Number of rows.
    pub fn batch(&self) -> i64 {
        self.tokens_BS.size()[0]
    }

    /// Tokens per row.
    pub fn sequence(&self) -> i64 {
        self.tokens_BS.size()[1]
    }

    /// The position of every row's first token, where all rows are at the same consecutive ones.
    pub fn consecutive_from(&self) -> Option<i64> {
        self.consecutive_from
    }

    /// Refuses ids that a look-up would read past the end of a table with.
    pub(crate) fn check(&self, vocab_size: usize, num_positions: usize) -> Result<()> {
        if self.largest_token as usize >= vocab_size {
            let expected = format!("below the vocabulary's {vocab_size}");
            return Err(bad_input("token id", self.largest_token, expected));
        }
        if self.largest_position as usize >= num_positions {
            let expected = format!("below the {num_positions} positions the model was built for");
            return Err(bad_input("position id", self.largest_position, expected));
        }
        Ok(())
    }
}

/// Refuses targets outside a vocabulary. On a CPU the loss looks at them too; on a GPU the host
/// would have to wait for it.
///
/// # Errors
/// The first that is outside.
pub fn check_targets(targets: &[i32], vocab_size: usize) -> Result<()> {
    let is_one = |target: &i32| {
        *target == NO_TARGET || usize::try_from(*target).is_ok_and(|target| target < vocab_size)
    };
    match targets.iter().find(|target| !is_one(target)) {
        None => Ok(()),
        Some(target) => {
            let expected = format!("{NO_TARGET}, or from 0 to below the vocabulary's {vocab_size}");
            Err(bad_input("target id", target, expected))
        }
    }
}

/// The targets of a micro-batch, int64 `[B, S]`; -100 is no target.
///
/// # Errors
/// Where the number of targets is not a multiple of `batch`.
pub fn targets(targets: &[i32], batch: usize, device: Device) -> Result<Tensor> {
    if batch == 0 || !targets.len().is_multiple_of(batch) {
        return Err(bad_input("number of targets", targets.len(), format!("{batch} equal rows")));
    }
    to_int64(targets, &[batch as i64, (targets.len() / batch) as i64], device)
}

/// Columns `pieces` of a tensor `[B, S]`, side by side.
///
/// # Errors
/// Where a piece is not in the rows.
pub fn take(x_BS: &Tensor, pieces: &[Range<usize>]) -> Result<Tensor> {
    let piece = |range: &Range<usize>| x_BS.f_narrow(1, range.start as i64, range.len() as i64);
    let pieces = pieces.iter().map(piece).collect::<std::result::Result<Vec<_>, _>>()?;
    Ok(Tensor::f_cat(&pieces, 1)?)
}

fn consecutive_from(positions: &[i32], sequence: usize) -> Option<i64> {
    let first = *positions.first()?;
    let expected = |index: usize| i64::from(first) + (index % sequence) as i64;
    let mut pairs = positions.iter().enumerate();
    pairs.all(|(index, &position)| i64::from(position) == expected(index)).then_some(first.into())
}

fn to_int64(ids: &[i32], shape: &[i64], device: Device) -> Result<Tensor> {
    let wide: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
    Ok(upload(&Tensor::f_from_slice(&wide)?.f_view(shape)?, device)?)
}

fn checked_largest(what: &'static str, ids: &[i32]) -> Result<i32> {
    match (ids.iter().min(), ids.iter().max()) {
        (Some(&smallest), _) if smallest < 0 => Err(bad_input(what, smallest, "0 or more")),
        (_, Some(&largest)) => Ok(largest),
        _ => Ok(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(positions: &[i32], batch: usize, expected: Option<i64>) {
        let tokens = vec![0; positions.len()];
        let inputs = Inputs::new(&tokens, positions, None, batch, Device::Cpu).unwrap();
        assert_eq!(inputs.consecutive_from(), expected, "{positions:?}");
    }

    #[test]
    fn consecutive_positions_are_seen() {
        check(&[0, 1, 2, 3], 1, Some(0));
        check(&[5, 6, 5, 6], 2, Some(5));
        check(&[0, 1, 2, 3], 2, None);
        check(&[0, 1, 0, 1], 1, None);
        check(&[7], 1, Some(7));
    }

    #[test]
    fn targets_outside_the_vocabulary_are_refused() {
        assert!(check_targets(&[0, 9, -100, 3], 10).is_ok());
        for wrong in [10, -1, -101, i32::MAX] {
            let error = check_targets(&[0, wrong], 10).unwrap_err().to_string();
            assert!(error.contains(&format!("target id is {wrong}, expected -100, or")), "{error}");
        }
    }

    #[test]
    fn bad_inputs_are_refused() {
        let new = |tokens: &[i32], positions: &[i32], ids: Option<&[i32]>, batch| {
            Inputs::new(tokens, positions, ids, batch, Device::Cpu).map(|_| ())
        };
        assert!(new(&[1, 2, 3], &[0, 1, 2], None, 2).is_err());
        assert!(new(&[], &[], None, 1).is_err());
        assert!(new(&[1], &[0], None, 0).is_err());
        assert!(new(&[1, 2], &[0], None, 1).is_err());
        assert!(new(&[1, 2], &[0, 1], Some(&[0]), 1).is_err());
        let message = new(&[1, -2], &[0, 1], None, 1).unwrap_err().to_string();
        assert_eq!(message, "token id is -2, expected 0 or more");
        let inputs = Inputs::consecutive(&[5, 9], 1, 3, Device::Cpu).unwrap();
        assert!(inputs.check(10, 5).is_ok());
        assert!(inputs.check(9, 5).is_err());
        assert!(inputs.check(10, 4).is_err());
    }
}
