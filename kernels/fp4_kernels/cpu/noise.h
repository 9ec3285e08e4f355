// Noise: Philox4x32-7 by coordinates, see numerics/noise.py.

#pragma once

#include "common.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "noise is read as bytes, lowest first"
#endif

namespace {

inline int64_t apart(int64_t index, int64_t part, int64_t gap) {
  return part ? index + index / part * gap : index;
}

// Four 64-bit lanes. Philox's words are their low halves; what a product leaves above them is only ever carried
// along.
typedef uint64_t Lanes __attribute__((vector_size(32)));

inline Lanes product(Lanes a, uint32_t b) {
#ifdef __AVX2__
  return (Lanes)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  Lanes found;
  for (int i = 0; i < 4; i++) found[i] = static_cast<uint64_t>(static_cast<uint32_t>(a[i])) * b;
  return found;
#endif
}

// Four words for each of `calls` counters (first + ..., row, stream, 0); `out` has room for whole fours of calls.
void philox_row(const NoiseSpec& noise, int64_t row, int64_t first, int64_t calls, int per_call,
                uint32_t stream, uint32_t* out) {
  constexpr uint64_t kLow = 0xFFFFFFFF;
  int64_t part = noise.col_part / per_call, gap = noise.col_gap / per_call;
  uint64_t global = noise.row_offset + apart(row, noise.row_part, noise.row_gap);
  for (int64_t call = 0; call < calls; call += 4) {
    Lanes c0, c1 = {global, global, global, global}, c2 = {stream, stream, stream, stream}, c3 = {};
    for (int i = 0; i < 4; i++) c0[i] = first + apart(call + i, part, gap);
    uint32_t k0 = static_cast<uint32_t>(noise.key), k1 = static_cast<uint32_t>(noise.key >> 32);
    for (int round = 0; round < 7; round++) {
      Lanes p0 = product(c0, 0xD2511F53u), p1 = product(c2, 0xCD9E8D57u);
      c0 = (p1 >> 32) ^ c1 ^ k0;
      c2 = (p0 >> 32) ^ c3 ^ k1;
      c1 = p1;
      c3 = p0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    Lanes low = (c0 & kLow) | (c1 << 32), high = (c2 & kLow) | (c3 << 32);
    for (int i = 0; i < 4; i++) {
      uint32_t* to = out + 4 * (call + i);
      to[0] = static_cast<uint32_t>(low[i]), to[1] = static_cast<uint32_t>(low[i] >> 32);
      to[2] = static_cast<uint32_t>(high[i]), to[3] = static_cast<uint32_t>(high[i] >> 32);
    }
  }
}

// The draws of one row after another: bytes() or words() of `cols` elements.
class Draws {
 public:
  Draws(const NoiseSpec& noise, int64_t cols) : noise_(noise), cols_(cols) {}

  const uint8_t* bytes(int64_t row) {
    int64_t skip = draw(row, 16, 0);  // a word's lowest byte comes first, as the machine has it
    return reinterpret_cast<const uint8_t*>(words_.data()) + skip;
  }

  const uint32_t* words(int64_t row) {
    int64_t skip = draw(row, 4, 1);
    for (uint32_t& word : words_) word >>= 8;
    return words_.data() + skip;
  }

 private:
  int64_t draw(int64_t row, int per_call, uint32_t stream) {
    int64_t first = noise_.col_offset / per_call, skip = noise_.col_offset % per_call;
    int64_t calls = (skip + cols_ + per_call - 1) / per_call;
    words_.resize(16 * ((calls + 3) / 4));
    philox_row(noise_, row, first, calls, per_call, stream, words_.data());
    return skip;
  }

  NoiseSpec noise_;
  int64_t cols_;
  std::vector<uint32_t> words_;
};

}  // namespace
