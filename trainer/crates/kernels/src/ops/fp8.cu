// Quantisation to FP8 (e4m3: 4 bits of exponent, 3 of mantissa, largest number 448) with one scale for each row, or for each
// column of a matrix that is transposed on the way. x = value * scale, where scale = max |x| / 448: the largest is hit exactly.

constexpr Wide kLargest = 448;
// Rows whose numbers are all smaller than this (2^-100) are scaled as if one were as large: the scale's reciprocal stays finite.
constexpr Wide kSmallest = (Wide)7.888609052210118e-31;

// A row with an infinity: its scale stays finite, 448 / infinity makes zeros of its numbers, and a NaN of the infinity. A NaN
// counts for no maximum and stays one.
__device__ __forceinline__ float scale_of(Wide most) {
  constexpr Wide kGreatest = (Wide)3.402823466385288598e38;
  return (float)((most > kGreatest ? kGreatest : most) / kLargest);
}

// To nearest, ties to even; what is beyond the largest number becomes it, a NaN stays one.
__device__ __forceinline__ u8 to_e4m3(float x) {
#if !defined(EMULATED) && __CUDA_ARCH__ >= 890
  u16 both;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(0.0f), "f"(x));
  return (u8)both;
#else
  u32 word = __float_as_uint(x), sign = word >> 24 & 0x80u, size = word & 0x7fffffffu;
  if (size > 0x7f800000u) return (u8)(sign | 0x7f);
  if (size >= 0x43e00000u) return (u8)(sign | 0x7e);
  // Below 2^-6 there are only multiples of 2^-9: the addition rounds to them.
  if (size < 0x3c800000u) return (u8)(sign | (__float_as_uint(__uint_as_float(size) + 16384.0f) - 0x46800000u));
  u32 rounded = (size + 0x7ffffu + (size >> 20 & 1u)) >> 20;
  return (u8)(sign | (rounded - (120u << 3)));
#endif
}

struct alignas(kLanes) Quantised {
  u8 lane[kLanes];
};

template <bool kVector>
__device__ __forceinline__ void rows_of(const T* __restrict__ x, u8* __restrict__ out, float* __restrict__ scales, i64 rows,
                                        int width, Wide* scratch) {
  constexpr int kStep = kVector ? kLanes : 1;
  for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* from = x + row * width;
    u8* to = out + row * width;
    Wide most = kSmallest;
    for (int at = (int)threadIdx.x * kStep; at < width; at += (int)blockDim.x * kStep) {
      Wide values[kStep];
      load<kVector>(from + at, values);
#pragma unroll
      for (int lane = 0; lane < kStep; lane++) most = larger(most, magnitude(values[lane]));
    }
    most = block_max(most, scratch);
    if (threadIdx.x == 0) scales[row] = scale_of(most);
    Wide inverse = kLargest / most;
    for (int at = (int)threadIdx.x * kStep; at < width; at += (int)blockDim.x * kStep) {
      Wide values[kStep];
      load<kVector>(from + at, values);
      if constexpr (kVector) {
        Quantised pack;
#pragma unroll
        for (int lane = 0; lane < kStep; lane++) pack.lane[lane] = to_e4m3((float)(values[lane] * inverse));
        *(Quantised*)(to + at) = pack;
      } else {
        to[at] = to_e4m3((float)(values[0] * inverse));
      }
    }
  }
}

// out = x / scale, a scale a row; x is [rows, width].
extern "C" __global__ void __launch_bounds__(512)
    quantise_rows(const T* x, u8* out, float* scales, i64 rows, int width) {
  __shared__ Wide scratch[kWarp];
  bool vector = width % kLanes == 0 && aligned(x) && ((unsigned long long)out & (kLanes - 1)) == 0;
  if (vector)
    rows_of<true>(x, out, scales, rows, width, scratch);
  else
    rows_of<false>(x, out, scales, rows, width, scratch);
}

constexpr int kBlock = 256;
// A block of `column_maxima` takes 32 vectors (or elements) across, and so many rows.
constexpr int kBand = 256;

template <bool kVector>
__device__ __forceinline__ void maxima(const T* __restrict__ x, Wide* __restrict__ partial, i64 rows, int width,
                                       Wide (*shared)[kWarp * kLanes]) {
  constexpr int kStep = kVector ? kLanes : 1;
  constexpr int kWarps = kBlock / kWarp;
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  i64 first = (i64)blockIdx.y * kBand, last = first + kBand < rows ? first + kBand : rows;
  for (int base = (int)blockIdx.x * kWarp * kStep; base < width; base += (int)gridDim.x * kWarp * kStep) {
    int column = base + lane * kStep;
    Wide most[kStep];
#pragma unroll
    for (int i = 0; i < kStep; i++) most[i] = 0;
    if (column < width) {
#pragma unroll 4
      for (i64 row = first + warp; row < last; row += kWarps) {
        Wide values[kStep];
        load<kVector>(x + row * width + column, values);
#pragma unroll
        for (int i = 0; i < kStep; i++) most[i] = larger(most[i], magnitude(values[i]));
      }
    }
    __syncthreads();  // the maxima before may still be read
#pragma unroll
    for (int i = 0; i < kStep; i++) shared[warp][i * kWarp + lane] = most[i];
    __syncthreads();
    if (warp != 0 || column >= width) continue;
#pragma unroll
    for (int i = 0; i < kStep; i++) {
      for (int other = 1; other < kWarps; other++) most[i] = larger(most[i], shared[other][i * kWarp + lane]);
      partial[(i64)blockIdx.y * width + column + i] = most[i];
    }
  }
}

// Row b of `partial`, [bands, width], gets the largest |x| of each column within band b of 256 rows.
extern "C" __global__ void __launch_bounds__(256) column_maxima(const T* x, Wide* partial, i64 rows, int width) {
  __shared__ Wide shared[kBlock / kWarp][kWarp * kLanes];
  if (width % kLanes == 0 && aligned(x))
    maxima<true>(x, partial, rows, width, shared);
  else
    maxima<false>(x, partial, rows, width, shared);
}

// The scale of each column, and what its elements are multiplied by.
extern "C" __global__ void __launch_bounds__(256)
    column_scales(const Wide* partial, float* scales, Wide* inverses, i64 bands, int width) {
  int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= width) return;
  Wide most = kSmallest;
#pragma unroll 4
  for (i64 band = 0; band < bands; band++) most = larger(most, partial[band * width + column]);
  scales[column] = scale_of(most);
  inverses[column] = kLargest / most;
}

// A tile of `quantise_columns`, and the bytes between two of its columns in shared memory, chosen so that the lanes of a warp
// meet in no bank more than twice.
constexpr int kTileRows = 128, kTileColumns = 64, kTileStride = kTileRows + 4;

template <bool kVector>
__device__ __forceinline__ void fill_tile(const T* __restrict__ x, const Wide* __restrict__ inverses, i64 first_row, i64 rows,
                                          int first_column, int width, u8* tile) {
  constexpr int kStep = kVector ? kLanes : 1;
  constexpr int kAcross = kTileColumns / kStep;
#pragma unroll 4
  for (int work = threadIdx.x; work < kTileRows * kAcross; work += kBlock) {
    int row = work / kAcross, column = work % kAcross * kStep;
    if (first_row + row >= rows || first_column + column >= width) continue;
    Wide values[kStep], factors[kStep];
    load<kVector>(x + (first_row + row) * width + first_column + column, values);
    load_wide<kVector>(inverses + first_column + column, factors);
#pragma unroll
    for (int i = 0; i < kStep; i++) tile[(column + i) * kTileStride + row] = to_e4m3((float)(values[i] * factors[i]));
  }
}

struct alignas(16) Words {
  u32 word[4];
};

// out = (x / scale)^T, a scale a column of x, [rows, width]; out is [width, rows]. A block takes a tile.
extern "C" __global__ void __launch_bounds__(256)
    quantise_columns(const T* x, const Wide* inverses, u8* out, i64 rows, int width) {
  __shared__ u32 words[kTileColumns * kTileStride / 4];
  u8* tile = (u8*)words;
  int first_column = blockIdx.x * kTileColumns;
  i64 first_row = (i64)blockIdx.y * kTileRows;
  if (width % kLanes == 0 && aligned(x) && aligned(inverses))
    fill_tile<true>(x, inverses, first_row, rows, first_column, width, tile);
  else
    fill_tile<false>(x, inverses, first_row, rows, first_column, width, tile);
  __syncthreads();
  if (rows % 16 == 0 && aligned(out)) {
    for (int work = threadIdx.x; work < kTileColumns * (kTileRows / 16); work += kBlock) {
      int column = work / (kTileRows / 16), row = work % (kTileRows / 16) * 16;
      if (first_column + column >= width || first_row + row >= rows) continue;
      Words pack;
#pragma unroll
      for (int i = 0; i < 4; i++) pack.word[i] = words[(column * kTileStride + row) / 4 + i];
      *(Words*)(out + (i64)(first_column + column) * rows + first_row + row) = pack;
    }
  } else {
    for (int work = threadIdx.x; work < kTileColumns * kTileRows; work += kBlock) {
      int column = work / kTileRows, row = work % kTileRows;
      if (first_column + column >= width || first_row + row >= rows) continue;
      out[(i64)(first_column + column) * rows + first_row + row] = tile[column * kTileStride + row];
    }
  }
}
