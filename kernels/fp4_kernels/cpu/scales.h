// Scale rules, from the largest magnitude of a block to its factors, see numerics/scaling.py.

#pragma once

#include "rounding.h"

namespace {

float outer_encode(float amax, float largest_value) {
  if (!finite(amax)) return kNaN;
  return amax == 0.0f ? 1.0f : at_most(largest_value / amax, kLargest);
}

inline float stored_scale(float scale, int type) {
  if (type == kE4M3) return on_grid<kEven>(scale, kE4M3Grid, 0);
  float rounded = on_grid<kEven>(scale, kUE5M3Grid, 0);
  return rounded == 0.0f ? 1.0f : rounded;
}

inline float capped_encode(float decode, float encode_outer) {
  return at_most(1.0f / (decode * (1.0f / encode_outer)), kLargest);
}

int32_t round_up_byte(float value) {
  if (!finite(value)) return 255;
  int32_t field = bits_of(value) >> 23, mantissa = bits_of(value) & 0x7FFFFF;
  return field + (field == 0 ? mantissa > 0x400000 : mantissa > 0);
}

float mx_scale(float amax, const CastSpec& spec) {
  if (!finite(amax)) return kNaN;
  int32_t byte;
  auto value = [](int32_t b) { return b ? float_of(b << 23) : float_of(0x400000); };
  if (spec.rule == kRoundUp) {
    byte = round_up_byte(amax * spec.inverse_max);
  } else if (spec.rule == kFullGrid || spec.rule == kAdaptive) {
    byte = round_up_byte(amax);
    if (spec.rule == kAdaptive && byte > 0)
      byte -= amax / value(std::min(byte, 254)) < kAdaptiveBelow;
  } else {
    int32_t bits = bits_of(amax);
    if (spec.rule == kCeil) bits += 0x7FFFFF;
    if (spec.rule == kEvenExponent) bits += 1 << (22 - spec.mantissa);
    byte = std::max(0, std::min(254, (bits >> 23) - spec.emax));
  }
  return byte == 255 ? kNaN : value(byte);
}

// One row-block's worth of a matrix: rows from y on, `ld` apart.
struct Tile {
  const float* y;
  int64_t rows, cols, ld;
};

float squared_error(const Tile& x, float decode, float encode_outer, const Grid& grid, bool away) {
  float encode = capped_encode(decode, encode_outer);
  float rows[16] = {0};
  for (int64_t r = 0; r < x.rows; r++) {
    float e[16] = {0};
    const float* v = x.y + r * x.ld;
    for (int64_t k = 0; k < x.cols; k++) {
      float q = away ? on_grid<kAway>(v[k] * encode, grid, 0) : on_grid<kEven>(v[k] * encode, grid, 0);
      float off = q * decode - v[k] * encode_outer;
      e[k] = off * off;
    }
    for (int n = 8; n; n /= 2)
      for (int i = 0; i < n; i++) e[i] = e[2 * i] + e[2 * i + 1];
    rows[r] = e[0];
  }
  for (int n = 8; x.rows > 1 && n; n /= 2)
    for (int i = 0; i < n; i++) rows[i] = rows[2 * i] + rows[2 * i + 1];
  return rows[0];
}

float four_over_six(const Tile& x, float amax, float encode_outer, const Grid& grid, bool away) {
  float scale = amax / 6.0f * encode_outer;
  float six = stored_scale(scale, kE4M3), four = stored_scale(scale * 1.5f, kE4M3);
  float error_6 = squared_error(x, six, encode_outer, grid, away);
  float error_4 = squared_error(x, four, encode_outer, grid, away);
  return error_4 < error_6 ? four : six;
}

}  // namespace
