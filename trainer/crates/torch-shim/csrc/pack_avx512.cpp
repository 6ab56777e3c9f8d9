// Transposition by blocks of 16 x 16 words of 32 bits, each in sixteen registers.
#include "pack.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace phalanx {
namespace {

constexpr int64_t kBlock = 16;

// Sixteen words of a row, and one of them.
struct Words {
  const uint32_t* from;
  int64_t stride;
  __m512i row(int64_t row, int64_t column) const { return _mm512_loadu_si512(from + row * stride + column); }
  uint32_t word(int64_t row, int64_t column) const { return from[row * stride + column]; }
};

// The same for rows of BF16, taken in pairs.
struct Pairs {
  const uint16_t* from;
  int64_t stride;
  __m512i row(int64_t row, int64_t column) const {
    auto at = from + 2 * row * stride + column;
    auto low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    auto high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + stride)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  uint32_t word(int64_t row, int64_t column) const {
    auto at = from + 2 * row * stride + column;
    return at[0] | uint32_t(at[stride]) << 16;
  }
};

// Four steps, each of which exchanges words (then pairs, fours, eights of words) between registers.
void transpose_block(__m512i* r) {
  __m512i t[kBlock];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int half = 0; half < 16; half += 8) {
    for (int i = half; i < half + 4; i++) {
      t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    }
  }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

template <typename From>
void transpose(const From& from, uint32_t* to, int64_t to_stride, int64_t rows, int64_t columns) {
  int64_t whole_rows = rows / kBlock * kBlock, whole_columns = columns / kBlock * kBlock;
  for (int64_t column = 0; column < whole_columns; column += kBlock) {
    for (int64_t row = 0; row < whole_rows; row += kBlock) {
      __m512i r[kBlock];
      for (int64_t i = 0; i < kBlock; i++) r[i] = from.row(row + i, column);
      transpose_block(r);
      for (int64_t i = 0; i < kBlock; i++) _mm512_storeu_si512(to + (column + i) * to_stride + row, r[i]);
    }
    for (int64_t row = whole_rows; row < rows; row++)
      for (int64_t i = 0; i < kBlock; i++) to[(column + i) * to_stride + row] = from.word(row, column + i);
  }
  for (int64_t column = whole_columns; column < columns; column++)
    for (int64_t row = 0; row < rows; row++) to[column * to_stride + row] = from.word(row, column);
}

}  // namespace

void pack_transposed(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows, int64_t columns) {
  Words words{reinterpret_cast<const uint32_t*>(from), from_stride};
  transpose(words, reinterpret_cast<uint32_t*>(to), to_stride, rows, columns);
}

void pack_pairs(const uint16_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride, int64_t rows, int64_t columns) {
  Pairs pairs{from, from_stride};
  for (int64_t row = 0; row < rows / 2; row++) {
    int64_t column = 0;
    for (; column + kBlock <= columns; column += kBlock)
      _mm512_storeu_si512(to + row * to_stride + column, pairs.row(row, column));
    for (; column < columns; column++) to[row * to_stride + column] = pairs.word(row, column);
  }
}

void pack_transposed(const uint16_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride, int64_t rows,
                     int64_t columns) {
  transpose(Pairs{from, from_stride}, to, to_stride, rows / 2, columns);
}

}  // namespace phalanx
