// Normal random numbers as a pure function of key and index. No torch here: compiled once for each instruction set, with the
// same bits from each: plain products and sums in one order, never contracted.
#pragma once

#include <cstdint>

namespace phalanx {

// out[2 i] and out[2 i + 1]: the pair of normals `first + i` of the stream `key`, times `std`.
void normals_avx512(uint64_t key, uint64_t first, int64_t pairs, double std, float* out);
void normals_avx2(uint64_t key, uint64_t first, int64_t pairs, double std, float* out);
void normals_baseline(uint64_t key, uint64_t first, int64_t pairs, double std, float* out);

}  // namespace phalanx
