// Blocking around oneDNN's micro-kernels, which multiply small matrices at the speed of the processor.
#include "matmul.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <vector>

#include "pack.h"

namespace phalanx {
namespace {

using at::Tensor;
using at::native::cpublas::brgemm;

// Rows and columns of the result that one call of a micro-kernel makes, and the terms that it sums.
constexpr int64_t kRows = 64, kColumns = 64, kTerms = 256;
// Rows that share a packed operand, and its terms: of kColumns columns it fits in the cache of a core.
constexpr int64_t kRowsOfTask = 256, kPackedTerms = 2048;
// Tokens of a weight's gradient that are summed at a time.
constexpr int64_t kTokens = 512;
// Below it a product is over before a kernel is found.
constexpr int64_t kMinOperations = int64_t(1) << 21;

bool has_avx512() {
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return has;
}

// On a processor with AMX a micro-kernel of BF16 leaves its tiles set up on the thread; whoever comes next must not find them.
struct Released {
  ~Released() { at::native::cpublas::brgemm_release(); }
};

// oneDNN may have been told to do with less than the processor has.
bool has_bf16() {
  static const bool has = [] {
    if (!has_avx512() || !__builtin_cpu_supports("avx512bf16")) return false;
    const at::BFloat16 zeros[32] = {};
    float sum[1] = {};
    try {
      Released released;
      brgemm(1, 1, 2, 2, 1, 1, false, zeros, zeros, sum);
    } catch (const c10::Error&) {
      return false;
    }
    return true;
  }();
  return has;
}

// Whether rows lie one after another, each without gaps.
bool is_plain(const Tensor& x) { return x.is_cpu() && x.dim() == 2 && x.stride(1) == 1 && x.stride(0) >= x.size(1); }

// libtorch says what is wrong with others.
bool has_sizes(const Tensor& x, int64_t rows, int64_t columns) { return x.size(0) == rows && x.size(1) == columns; }

bool is_wide(int64_t tokens, int64_t rows, int64_t columns) { return tokens >= 32 && rows >= 16 && columns >= 16; }

bool is_worth_it(int64_t tokens, int64_t rows, int64_t columns) {
  return is_wide(tokens, rows, columns) && tokens * rows * columns >= kMinOperations;
}

bool is_fp32(const Tensor& a, const Tensor& b) {
  for (auto* x : {&a, &b})
    if (x->scalar_type() != at::kFloat || !is_plain(*x)) return false;
  return has_avx512();
}

// Room of this thread, kept for the next product; begins where a cache line does, as the vectors that are loaded from it.
template <typename T>
T* scratch(size_t count) {
  constexpr size_t line = 64;
  static thread_local std::vector<T> room;
  if (room.size() < count + line / sizeof(T)) room.resize(count + line / sizeof(T));
  auto start = reinterpret_cast<uintptr_t>(room.data());
  return room.data() + (line - start % line) % line / sizeof(T);
}

// Calls `body(first, end)` for the pieces of a range, of `size` and a shorter last one.
template <typename Body>
void pieces(int64_t begin, int64_t end, int64_t size, Body&& body) {
  for (int64_t first = begin; first < end; first += size) body(first, std::min(first + size, end));
}

int64_t count_of(int64_t all, int64_t size) { return (all + size - 1) / size; }

}  // namespace

namespace {

// out[tokens, columns] = a[tokens, terms] b[terms, columns], where `pack(first, width, term, terms, to)` lays out columns and
// terms of b, each row of them kColumns after the last.
template <typename Pack>
void multiply(const Tensor& a, int64_t columns, const Tensor& out, Pack&& pack) {
  int64_t tokens = a.size(0), terms = a.size(1), a_stride = a.stride(0), stride = out.stride(0);
  auto* left = a.const_data_ptr<float>();
  auto* result = out.mutable_data_ptr<float>();
  int64_t tasks = count_of(tokens, kRowsOfTask);
  at::parallel_for(0, tasks * count_of(columns, kColumns), 1, [&](int64_t begin, int64_t end) {
    auto* right = scratch<float>(std::min(terms, kPackedTerms) * kColumns);
    pieces(0, terms, kPackedTerms, [&](int64_t packed, int64_t packed_end) {
      for (int64_t task = begin; task < end; task++) {
        int64_t first = task / tasks * kColumns, width = std::min(kColumns, columns - first);
        if (task == begin || task % tasks == 0) pack(first, width, packed, packed_end - packed, right);
        int64_t from = task % tasks * kRowsOfTask, to = std::min(from + kRowsOfTask, tokens);
        pieces(packed, packed_end, kTerms, [&](int64_t term, int64_t term_end) {
          pieces(from, to, kRows, [&](int64_t row, int64_t row_end) {
            brgemm(row_end - row, width, term_end - term, a_stride, kColumns, stride, term > 0, left + row * a_stride + term,
                   right + (term - packed) * kColumns, result + row * stride + first);
          });
        });
      }
    });
  });
}

}  // namespace

Tensor fast_project(const Tensor& x, const Tensor& weight) {
  int64_t tokens = x.size(0), terms = x.size(1), columns = weight.size(0);
  if (!is_fp32(x, weight) || !is_worth_it(tokens, columns, terms) || weight.size(1) != terms) return Tensor();
  auto out = at::empty({tokens, columns}, x.options());
  auto* rows = weight.const_data_ptr<float>();
  int64_t stride = weight.stride(0);
  multiply(x, columns, out, [=](int64_t first, int64_t width, int64_t term, int64_t count, float* to) {
    pack_transposed(rows + first * stride + term, stride, to, kColumns, width, count);
  });
  return out;
}

bool fast_product(const Tensor& dy, const Tensor& weight, const Tensor& out) {
  int64_t tokens = dy.size(0), columns = weight.size(1);
  if (!is_fp32(dy, weight) || !is_fp32(out, out) || !is_worth_it(tokens, columns, dy.size(1))) return false;
  if (dy.size(1) != weight.size(0) || !has_sizes(out, tokens, columns)) return false;
  auto* rows = weight.const_data_ptr<float>();
  int64_t stride = weight.stride(0);
  multiply(dy, columns, out, [=](int64_t first, int64_t width, int64_t term, int64_t count, float* to) {
    for (int64_t row = 0; row < count; row++)
      std::copy_n(rows + (term + row) * stride + first, width, to + row * kColumns);
  });
  return true;
}

namespace {

void accumulate_fp32(const Tensor& sum, const Tensor& dy, const Tensor& x) {
  int64_t tokens = dy.size(0), rows = dy.size(1), columns = x.size(1);
  auto *a = dy.const_data_ptr<float>(), *b = x.const_data_ptr<float>();
  auto* c = sum.mutable_data_ptr<float>();
  int64_t a_stride = dy.stride(0), b_stride = x.stride(0), c_stride = sum.stride(0);
  at::parallel_for(0, count_of(rows, kRows), 1, [&](int64_t begin, int64_t end) {
    auto* packed = scratch<float>(kRows * kTokens);
    pieces(0, tokens, kTokens, [&](int64_t token, int64_t token_end) {
      int64_t terms = token_end - token;
      for (int64_t task = begin; task < end; task++) {
        int64_t first = task * kRows, height = std::min(kRows, rows - first);
        pack_transposed(a + token * a_stride + first, a_stride, packed, kTokens, terms, height);
        pieces(0, columns, kColumns, [&](int64_t column, int64_t column_end) {
          brgemm(height, column_end - column, terms, kTokens, b_stride, c_stride, true, packed,
                 b + token * b_stride + column, c + first * c_stride + column);
        });
      }
    });
  });
}

// The right operand is packed once for all rows.
void accumulate_bf16(const Tensor& sum, const Tensor& dy, const Tensor& x) {
  int64_t tokens = dy.size(0), rows = dy.size(1), columns = x.size(1);
  auto *a = static_cast<const uint16_t*>(dy.const_data_ptr()), *b = static_cast<const uint16_t*>(x.const_data_ptr());
  auto* c = sum.mutable_data_ptr<float>();
  int64_t a_stride = dy.stride(0), b_stride = x.stride(0), c_stride = sum.stride(0);
  auto pairs = at::empty({tokens / 2, columns}, x.options().dtype(at::kInt));
  auto* right = static_cast<uint32_t*>(pairs.data_ptr());
  at::parallel_for(0, count_of(tokens, kRows), 1, [&](int64_t begin, int64_t end) {
    int64_t from = begin * kRows, to = std::min(end * kRows, tokens);
    pack_pairs(b + from * b_stride, b_stride, right + from / 2 * columns, columns, to - from, columns);
  });
  at::parallel_for(0, count_of(rows, kRows), 1, [&](int64_t begin, int64_t end) {
    Released released;
    auto* left = scratch<uint32_t>(kRows * kTokens / 2);
    pieces(0, tokens, kTokens, [&](int64_t token, int64_t token_end) {
      int64_t terms = token_end - token;
      for (int64_t task = begin; task < end; task++) {
        int64_t first = task * kRows, height = std::min(kRows, rows - first);
        pack_transposed(a + token * a_stride + first, a_stride, left, kTokens / 2, terms, height);
        pieces(0, columns, kColumns, [&](int64_t column, int64_t column_end) {
          brgemm(height, column_end - column, terms, kTokens, columns, c_stride, true,
                 reinterpret_cast<const at::BFloat16*>(left),
                 reinterpret_cast<const at::BFloat16*>(right + token / 2 * columns + column), c + first * c_stride + column);
        });
      }
    });
  });
}

}  // namespace

bool fast_accumulate(const Tensor& sum, const Tensor& dy, const Tensor& x) {
  if (!is_plain(sum) || !is_plain(dy) || !is_plain(x) || sum.scalar_type() != at::kFloat) return false;
  if (dy.scalar_type() != x.scalar_type() || !is_wide(dy.size(0), dy.size(1), x.size(1))) return false;
  if (dy.size(0) != x.size(0) || !has_sizes(sum, dy.size(1), x.size(1))) return false;
  if (dy.scalar_type() == at::kFloat && has_avx512() && is_worth_it(dy.size(0), dy.size(1), x.size(1))) {
    accumulate_fp32(sum, dy, x);
    return true;
  }
  // Small ones too: libtorch would first copy both operands to FP32.
  if (dy.scalar_type() == at::kBFloat16 && has_bf16() && dy.size(0) % 2 == 0) {
    accumulate_bf16(sum, dy, x);
    return true;
  }
  return false;
}

}  // namespace phalanx
