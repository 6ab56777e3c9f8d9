// Brings operands of matrix products into the order that the micro-kernels of oneDNN read. No torch here: compiled for
// AVX-512, and called only where the processor has it.
#pragma once

#include <cstdint>

namespace phalanx {

// to[column][row] = from[row][column]; rows of `from` lie `from_stride` elements apart, those of `to` `to_stride`.
void pack_transposed(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows, int64_t columns);

// Of BF16, with an even number of rows: to[row / 2][column] = the pair (from[row][column], from[row + 1][column]).
void pack_pairs(const uint16_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride, int64_t rows, int64_t columns);

// Of BF16, with an even number of rows: to[column][row] = from[row][column], where `to_stride` counts pairs.
void pack_transposed(const uint16_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride, int64_t rows,
                     int64_t columns);

}  // namespace phalanx
