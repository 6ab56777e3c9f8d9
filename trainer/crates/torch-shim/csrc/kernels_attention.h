// Causal attention, forward and backward, in blocks that stay in the cache: the scores of a block of queries and a block of
// keys are made, used and dropped. (Dao et al., FlashAttention, 2022, and its second version, 2023.) Included by
// kernels_body.h, once for each instruction set.

namespace phalanx {
namespace PHALANX_ISA {

constexpr int64_t kBlock = kAttentionBlock;
constexpr int64_t kTileRows = 6;

// A tile of `R` rows and `C` vectors of c (+)= a b. a(m, k) lies at a[m * a_row + k * a_column].
template <int R, int C, bool kAdd>
static inline void multiply_tile(int64_t depth, const float* a, int64_t a_row, int64_t a_column, const float* b,
                                 int64_t b_row, float* c, int64_t c_row) {
  Floats sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int j = 0; j < C; j++) sum[r][j] = kAdd ? load(c + r * c_row + j * kLanes) : Floats{};
  for (int64_t k = 0; k < depth; k++) {
    Floats right[C];
#pragma GCC unroll 2
    for (int j = 0; j < C; j++) right[j] = load(b + k * b_row + j * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      Floats left = all(a[r * a_row + k * a_column]);
#pragma GCC unroll 2
      for (int j = 0; j < C; j++) sum[r][j] += left * right[j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int j = 0; j < C; j++) store(c + r * c_row + j * kLanes, sum[r][j]);
}

template <int C, bool kAdd>
static void multiply_panel(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_column, const float* b,
                           int64_t b_row, float* c, int64_t c_row) {
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows)
    multiply_tile<kTileRows, C, kAdd>(depth, a + m * a_row, a_row, a_column, b, b_row, c + m * c_row, c_row);
  const float* rest = a + m * a_row;
  float* out = c + m * c_row;
  switch (rows - m) {
    case 1: return multiply_tile<1, C, kAdd>(depth, rest, a_row, a_column, b, b_row, out, c_row);
    case 2: return multiply_tile<2, C, kAdd>(depth, rest, a_row, a_column, b, b_row, out, c_row);
    case 3: return multiply_tile<3, C, kAdd>(depth, rest, a_row, a_column, b, b_row, out, c_row);
    case 4: return multiply_tile<4, C, kAdd>(depth, rest, a_row, a_column, b, b_row, out, c_row);
    case 5: return multiply_tile<5, C, kAdd>(depth, rest, a_row, a_column, b, b_row, out, c_row);
    default: return;
  }
}

// c (+)= a b for `columns` that are a multiple of the lanes.
template <bool kAdd>
static void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_column,
                     const float* b, int64_t b_row, float* c, int64_t c_row) {
  int64_t n = 0;
  for (; n + 2 * kLanes <= columns; n += 2 * kLanes)
    multiply_panel<2, kAdd>(rows, depth, a, a_row, a_column, b + n, b_row, c + n, c_row);
  if (n < columns) multiply_panel<1, kAdd>(rows, depth, a, a_row, a_column, b + n, b_row, c + n, c_row);
}

// Rows of `width` elements, `stride` apart, widened and put side by side.
template <typename T>
static void gather(const T* x, int64_t stride, int64_t rows, int64_t width, float* out) {
  for (int64_t row = 0; row < rows; row++)
    for (int64_t i = 0; i < width; i += kLanes) store(out + row * width + i, load(x + row * stride + i));
}

template <typename T>
static void scatter(const float* x, int64_t stride, int64_t rows, int64_t width, T* out) {
  for (int64_t row = 0; row < rows; row++)
    for (int64_t i = 0; i < width; i += kLanes) store(out + row * stride + i, load(x + row * width + i));
}

// Blocks of rows turned on their sides: [blocks, width, kBlock], the last one filled up with zeros.
static void turn_blocks(const float* x, int64_t rows, int64_t width, float* out) {
  for (int64_t start = 0; start < rows; start += kBlock) {
    int64_t count = rows - start < kBlock ? rows - start : kBlock;
    float* block = out + start * width;
    if (count < kBlock) std::memset(block, 0, kBlock * width * sizeof(float));
    for (int64_t row = 0; row < count; row++)
      for (int64_t i = 0; i < width; i++) block[i * kBlock + row] = x[(start + row) * width + i];
  }
}

static inline float largest_lane(Floats v) {
  float largest = v[0];
  for (int64_t i = 1; i < kLanes; i++) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

// The columns of a row of scores that are looked at: none after the query itself, in the block on the diagonal.
static inline int64_t visible(bool diagonal, int64_t row, int64_t keys) { return diagonal ? row + 1 : keys; }

template <typename T>
void attention(const AttentionSpan<T>& span, T* out, float* logsumexp, float* scratch) {
  int64_t width = span.head_dim, length = span.length, padded = (length + kBlock - 1) / kBlock * kBlock;
  float *values = scratch, *turned_keys = values + padded * width, *queries = turned_keys + padded * width;
  float *sums = queries + padded * width, *scores = sums + kBlock * width;
  float *maxima = scores + kBlock * kBlock, *totals = maxima + kBlock;
  gather(span.k, span.kv_stride, length, width, values);
  turn_blocks(values, length, width, turned_keys);
  gather(span.v, span.kv_stride, length, width, values);
  gather(span.q, span.q_stride, length, width, queries);
  for (int64_t from = 0; from < length; from += kBlock) {
    int64_t rows = length - from < kBlock ? length - from : kBlock;
    for (int64_t row = 0; row < rows; row++) maxima[row] = -INFINITY, totals[row] = 0;
    std::memset(sums, 0, rows * width * sizeof(float));
    for (int64_t start = 0; start <= from; start += kBlock) {
      bool diagonal = start == from;
      int64_t keys = diagonal ? rows : kBlock;
      multiply<false>(rows, kBlock, width, queries + from * width, width, 1, turned_keys + start * width, kBlock, scores,
                      kBlock);
      for (int64_t row = 0; row < rows; row++) {
        float* score = scores + row * kBlock;
        int64_t seen = visible(diagonal, row, keys), covered = (seen + kLanes - 1) / kLanes * kLanes;
        for (int64_t i = seen; i < covered; i++) score[i] = -INFINITY;
        Floats largest = all(maxima[row]);
        for (int64_t i = 0; i < covered; i += kLanes) {
          Floats v = load(score + i) * span.scale;
          largest = v > largest ? v : largest;
        }
        float maximum = largest_lane(largest), shrink = exp(all(maxima[row] - maximum))[0];
        Floats total = {};
        for (int64_t i = 0; i < covered; i += kLanes) {
          Floats v = exp(load(score + i) * span.scale - maximum);
          store(score + i, v);
          if (i + kLanes <= seen) total += v;
        }
        for (int64_t i = seen; i < kBlock; i++) score[i] = 0;
        if (int64_t whole = seen / kLanes * kLanes; whole < seen) total += load(score + whole);
        totals[row] = totals[row] * shrink + sum_lanes(total);
        if (maximum > maxima[row]) {
          float* sum = sums + row * width;
          for (int64_t i = 0; i < width; i += kLanes) store(sum + i, load(sum + i) * shrink);
        }
        maxima[row] = maximum;
      }
      multiply<true>(rows, width, keys, scores, kBlock, 1, values + start * width, width, sums, width);
    }
    for (int64_t row = 0; row < rows; row++) {
      float* sum = sums + row * width;
      float share = 1.0f / totals[row];
      for (int64_t i = 0; i < width; i += kLanes) store(sum + i, load(sum + i) * share);
      logsumexp[from + row] = maxima[row] + std::log(totals[row]);
    }
    scatter(sums, span.q_stride, rows, width, out + from * span.q_stride);
  }
}

template <typename T>
void attention_backward(const AttentionSpan<T>& span, int64_t heads, const T* out, const T* d_out,
                        const float* logsumexp, int64_t logsumexp_stride, T* dq, T* dk, T* dv, float* scratch) {
  int64_t width = span.head_dim, length = span.length, padded = (length + kBlock - 1) / kBlock * kBlock;
  int64_t size = padded * width;
  float *keys = scratch, *turned_keys = keys + size, *turned_values = turned_keys + size, *queries = turned_values + size;
  float *d_outs = queries + size, *d_queries = d_outs + size, *d_keys = d_queries + size, *d_values = d_keys + size;
  float *weights = d_values + size, *d_scores = weights + kBlock * kBlock, *deltas = d_scores + kBlock * kBlock;
  gather(span.v, span.kv_stride, length, width, keys);
  turn_blocks(keys, length, width, turned_values);
  gather(span.k, span.kv_stride, length, width, keys);
  turn_blocks(keys, length, width, turned_keys);
  std::memset(d_keys, 0, 2 * size * sizeof(float));
  for (int64_t head = 0; head < heads; head++) {
    const T *own_out = out + head * width, *own_d_out = d_out + head * width;
    const float* own_logsumexp = logsumexp + head * logsumexp_stride;
    gather(own_out, span.q_stride, length, width, queries);
    gather(own_d_out, span.q_stride, length, width, d_outs);
    for (int64_t row = 0; row < length; row++) {
      Floats products = {};
      for (int64_t i = row * width; i < (row + 1) * width; i += kLanes) products += load(queries + i) * load(d_outs + i);
      deltas[row] = sum_lanes(products);
    }
    gather(span.q + head * width, span.q_stride, length, width, queries);
    std::memset(d_queries, 0, length * width * sizeof(float));
    for (int64_t start = 0; start < length; start += kBlock) {
      int64_t columns = length - start < kBlock ? length - start : kBlock;
      for (int64_t from = start; from < length; from += kBlock) {
        int64_t rows = length - from < kBlock ? length - from : kBlock;
        const float *query = queries + from * width, *gradient = d_outs + from * width;
        multiply<false>(rows, kBlock, width, query, width, 1, turned_keys + start * width, kBlock, weights, kBlock);
        multiply<false>(rows, kBlock, width, gradient, width, 1, turned_values + start * width, kBlock, d_scores, kBlock);
        for (int64_t row = 0; row < rows; row++) {
          float *weight = weights + row * kBlock, *d_score = d_scores + row * kBlock;
          float shift = own_logsumexp[from + row], delta = deltas[from + row];
          int64_t seen = visible(from == start, row, columns);
          for (int64_t i = 0; i < seen; i += kLanes) {
            Floats share = exp(load(weight + i) * span.scale - shift);
            store(weight + i, share);
            store(d_score + i, share * (load(d_score + i) - delta) * span.scale);
          }
          for (int64_t i = seen; i < kBlock; i++) weight[i] = d_score[i] = 0;
        }
        multiply<true>(columns, width, rows, weights, 1, kBlock, gradient, width, d_values + start * width, width);
        multiply<true>(columns, width, rows, d_scores, 1, kBlock, query, width, d_keys + start * width, width);
        multiply<true>(rows, width, columns, d_scores, kBlock, 1, keys + start * width, width, d_queries + from * width,
                       width);
      }
    }
    scatter(d_queries, span.q_stride, length, width, dq + head * width);
  }
  scatter(d_keys, span.kv_stride, length, width, dk);
  scatter(d_values, span.kv_stride, length, width, dv);
}

}  // namespace PHALANX_ISA
}  // namespace phalanx
