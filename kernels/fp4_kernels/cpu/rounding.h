// Rounding to a small floating-point grid, see numerics/rounding.py.

#pragma once

#include "common.h"

namespace {

struct Grid {
  float max, zero;     // zero is what makes +0 of -0 below 8 bits: x + 0; x + -0 leaves every x
  int32_t low, high;   // exponent fields of the smallest and the largest step's numbers
  int32_t mantissa;    // bits, shifted into the exponent field
};

Grid grid_of(float max, int emin, int emax, int mantissa, bool coded) {
  return {max, coded ? 0.0f : -0.0f, (emin + 127) << 23, (emax + 127) << 23, mantissa << 23};
}

const Grid kE4M3Grid = grid_of(448.0f, -6, 8, 3, false);
const Grid kUE5M3Grid = grid_of(61440.0f, -14, 15, 3, false);

// v on the grid; `noise` is the byte or the 24-bit word of an element.
template <int kMode>
inline float on_grid(float v, const Grid& g, uint32_t noise) {
  v = v < -g.max ? -g.max : v;
  v = v > g.max ? g.max : v;
  v += g.zero;
  int32_t field = bits_of(v) & kInfinity;
  field = std::max(std::min(field, g.high), g.low) - g.mantissa;
  float step = float_of(field);
  float q = v * float_of((254 << 23) - field);  // a power of two: exact, as v / step is
  if (kMode == kEven) q = __builtin_rintf(q);
  if (kMode == kAway) q = __builtin_truncf(q + __builtin_copysignf(kAlmostHalf, q));
  if (kMode == kBytes) {
    float u = (static_cast<float>(static_cast<int32_t>(noise)) + 0.5f) * 0.00390625f;
    q = __builtin_truncf(q + __builtin_copysignf(u, q));
  }
  if (kMode == kWords) {
    double u = static_cast<double>(static_cast<int32_t>(noise)) * (1.0 / 16777216.0);
    double wide = static_cast<double>(q);
    q = static_cast<float>(__builtin_trunc(__builtin_copysign(u, wide) + wide));
  }
  return q * step;
}

template <int kMode, class Noise>
inline void round_run(float* y, int64_t n, float encode, float decode, const Grid& grid,
                      const Noise* noise) {
  const Grid g = grid;
  for (int64_t i = 0; i < n; i++)
    y[i] = on_grid<kMode>(y[i] * encode, g, noise ? noise[i] : 0) * decode;
}

template <int kMode, class Noise>
void round_row(float* y, int64_t cols, int64_t block, const float* encode, const float* decode,
               const Grid& grid, const Noise* noise) {
  int64_t whole = block % 16 ? 0 : cols / block, k = 0;
  for (int64_t j = 0; j < whole; j++)
    for (int64_t end = k + block; k < end; k += 16)  // a length that the compiler knows
      round_run<kMode>(y + k, 16, encode[j], decode[j], grid, noise ? noise + k : nullptr);
  for (; k < cols; k += block)
    round_run<kMode>(y + k, std::min(block, cols - k), encode[k / block], decode[k / block], grid,
                     noise ? noise + k : nullptr);
}

}  // namespace
