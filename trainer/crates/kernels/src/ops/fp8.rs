//! Quantisation to FP8 (e4m3) with a scale a row, or a column of what is transposed on the way: the
//! operands of a product whose inner dimension is that of the rows, or of the columns.

use torch_shim::Result as ShimResult;
use torch_shim::scaled::Scaled;
use torch_shim::tch::{Kind, Tensor};

use super::expect;
use crate::error::Result;
use crate::launch::{Argument, Grid, Kernels, cover, int, pieces, plain, rows as measure, threads};
use crate::program::{Program, Storage};

const KERNEL: &str = "fp8";

/// The CUDA source.
pub static PROGRAM: Program = Program {
    name: KERNEL,
    source: include_str!("fp8.cu"),
    kernels: &["quantise_rows", "column_maxima", "column_scales", "quantise_columns"],
    storages: &[Storage::Fp32, Storage::Bf16],
    items: &[],
};

/// The largest number of e4m3.
pub const LARGEST: f64 = 448.0;
/// Rows of smaller numbers are scaled as if one were as large: 2^-100.
const SMALLEST: f64 = 1.0 / (1_u128 << 100) as f64;

const MAX_THREADS: u32 = 512;
/// Threads of a multiprocessor that there is work for, several times what can run at once.
const THREADS: u32 = 8192;
/// As in the source: threads, rows of a band, columns and rows of a tile.
const BLOCK: u32 = 256;
const BAND: i64 = 256;
const TILE_COLUMNS: i64 = 64;
const TILE_ROWS: i64 = 128;
/// A limit of CUDA's: blocks in y.
const MAX_BLOCKS_Y: i64 = 65_535;

fn storage_of(x: &Tensor) -> Result<Storage> {
    let storage = Storage::of(KERNEL, x)?;
    expect(storage != Storage::Fp64, KERNEL, "the dtype", storage, "Float or BFloat16")?;
    Ok(storage)
}

/// Quantises each row (the last dimension) of x, FP32 or BF16: values of its shape, `[rows]`
/// scales.
///
/// # Errors
/// Where the tensor does not fit, or the launch fails.
pub fn quantise_rows(kernels: &Kernels, x: &Tensor) -> Result<Scaled> {
    let storage = storage_of(x)?;
    let (count, width) = measure(KERNEL, x)?;
    kernels.check(KERNEL, "x", x, storage.kind(), &x.size())?;
    let values = kernels.empty(&x.size(), Kind::Float8e4m3fn)?;
    let scales = kernels.empty(&[count], Kind::Float)?;
    let arguments = [
        Argument::read(x),
        Argument::write(&values),
        Argument::write(&scales),
        Argument::I64(count),
        Argument::I32(int(KERNEL, "the width of a row", width)?),
    ];
    let threads = threads(pieces(width, storage.lanes()), MAX_THREADS);
    let grid = Grid::line(kernels.share(count, THREADS / threads), threads);
    // SAFETY: the parameters are those of the source; x and values have `count` rows of `width`
    // elements, and there is a scale for each row.
    unsafe { kernels.launch(plain(&PROGRAM, storage), "quantise_rows", grid, &arguments)? };
    Ok(Scaled { values, scales })
}

/// Quantises each column of x `[N, D]`, FP32 or BF16, and transposes: values `[D, N]`, scales
/// `[D]`.
///
/// # Errors
/// Where the tensor does not fit, or a launch fails.
pub fn quantise_columns(kernels: &Kernels, x: &Tensor) -> Result<Scaled> {
    let storage = storage_of(x)?;
    let shape = x.size();
    expect(shape.len() == 2, KERNEL, "the shape of x", &shape, "a matrix")?;
    let (count, width) = measure(KERNEL, x)?;
    kernels.check(KERNEL, "x", x, storage.kind(), &shape)?;
    let variant = plain(&PROGRAM, storage);
    let bands = pieces(count, BAND).max(1);
    let most = TILE_ROWS * MAX_BLOCKS_Y;
    expect(count <= most, KERNEL, "the rows of x", count, format!("at most {most}"))?;
    let partial = kernels.empty(&[bands, width], storage.wide())?;
    let inverses = kernels.empty(&[width], storage.wide())?;
    let scales = kernels.empty(&[width], Kind::Float)?;
    let values = kernels.empty(&[width, count], Kind::Float8e4m3fn)?;
    let lanes = if width % storage.lanes() == 0 { storage.lanes() } else { 1 };
    let rows = Argument::I64(count);
    let columns = Argument::I32(int(KERNEL, "the width of a row", width)?);
    let across = cover(pieces(width, 32 * lanes));
    let grid = Grid { blocks: (across, cover(bands)), threads: BLOCK };
    let arguments = [Argument::read(x), Argument::write(&partial), rows, columns];
    // SAFETY: the parameters are those of the source; there is a row of blocks for every band of
    // 256 rows.
    unsafe { kernels.launch(variant, "column_maxima", grid, &arguments)? };
    let arguments = [
        Argument::read(&partial),
        Argument::write(&scales),
        Argument::write(&inverses),
        Argument::I64(bands),
        columns,
    ];
    let grid = Grid::line(cover(pieces(width, i64::from(BLOCK))), BLOCK);
    // SAFETY: as above; a thread for each column.
    unsafe { kernels.launch(variant, "column_scales", grid, &arguments)? };
    let tiles = (cover(pieces(width, TILE_COLUMNS)), cover(pieces(count, TILE_ROWS)));
    let grid = Grid { blocks: tiles, threads: BLOCK };
    let arguments =
        [Argument::read(x), Argument::read(&inverses), Argument::write(&values), rows, columns];
    // SAFETY: as above; the blocks cover the matrix in tiles.
    unsafe { kernels.launch(variant, "quantise_columns", grid, &arguments)? };
    Ok(Scaled { values, scales })
}

/// The plain form of [`quantise_rows`] for a matrix, to the bit (but for the sign of a NaN).
///
/// The scale is `max |x| / 448` over the numbers of a row that are any, at least 2^-100 / 448 and
/// at most [`f32::MAX`] / 448. In a row with an infinity each such becomes NaN, and the rest zero.
///
/// # Errors
/// Where libtorch refuses.
pub fn reference(x: &Tensor) -> Result<Scaled> {
    let x = x.f_to_kind(Kind::Float)?;
    let sizes = x.f_abs()?.f_nan_to_num(0.0, f64::INFINITY, 0.0)?;
    let most = sizes.f_amax([-1].as_slice(), true)?.f_clamp_min(SMALLEST)?;
    let largest = Tensor::f_full([] as [i64; 0], LARGEST, (Kind::Float, x.device()))?;
    let values = x.f_mul(&largest.f_div(&most)?)?.f_to_kind(Kind::Float8e4m3fn)?;
    let scales = most.f_clamp_max(f64::from(f32::MAX))?.f_div(&largest)?.f_view([-1])?;
    Ok(Scaled { values, scales })
}

/// The rows of a matrix in FP8, by the kernels where there are any that take it.
///
/// # Errors
/// Where the tensor does not fit, or a launch fails.
pub fn rows(kernels: Option<&Kernels>, x: &Tensor) -> ShimResult<Scaled> {
    match kernels.filter(|kernels| kernels.takes(x)) {
        Some(kernels) => Ok(quantise_rows(kernels, x)?),
        None => Ok(reference(x)?),
    }
}

/// The columns of a matrix as rows in FP8, by the kernels where there are any that take it.
///
/// # Errors
/// As [`rows`].
pub fn columns(kernels: Option<&Kernels>, x: &Tensor) -> ShimResult<Scaled> {
    match kernels.filter(|kernels| kernels.takes(x)) {
        Some(kernels) => Ok(quantise_columns(kernels, x)?),
        None => Ok(reference(&x.f_tr()?.f_contiguous()?)?),
    }
}
