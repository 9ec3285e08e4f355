// The matrix that is cast: x or its transpose in fp32, padded and rotated, and its largest magnitudes.

#pragma once

#include "common.h"

namespace {

inline float load(const float* x) { return *x; }
inline float load(const uint16_t* x) { return float_of(static_cast<int32_t>(*x) << 16); }

inline float rounded_bf16(float v) {
  uint32_t b = static_cast<uint32_t>(bits_of(v));
  uint32_t up = b + 0x7FFF + ((b >> 16) & 1);
  return v != v ? kNaN : float_of(static_cast<int32_t>(up & 0xFFFF0000u));
}

// to[j][i] = from[i][j] for 8 rows of 8, `ld` and `to_ld` apart. Interleaving the halves of a list three times
// transposes it.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FP4_SHUFFLES
#endif
#endif

inline void transpose_8(const float* from, int64_t ld, float* to, int64_t to_ld) {
#ifdef FP4_SHUFFLES
  typedef float Eight __attribute__((vector_size(32)));
  Eight a[8], b[8];
  for (int i = 0; i < 8; i++) std::memcpy(&a[i], from + i * ld, 32);
  for (int round = 0; round < 3; round++) {
    for (int i = 0; i < 4; i++) {
      b[2 * i] = __builtin_shufflevector(a[i], a[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i++) a[i] = b[i];
  }
  for (int i = 0; i < 8; i++) std::memcpy(to + i * to_ld, &a[i], 32);
#else
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < 8; j++) to[j * to_ld + i] = from[i * ld + j];
#endif
}

template <class T>
struct Source {
  const T* data;
  int64_t rows, cols, row_stride, col_stride;
};

// tile[k][r] of `width` columns from k0 and up to 16 rows from r0; zeros outside.
template <class T>
void fill(const Source<T>& x, int64_t r0, int64_t k0, int width, float (*tile)[kLanes]) {
  int rows = static_cast<int>(std::min<int64_t>(kLanes, x.rows - r0));
  int cols = static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(width, x.cols - k0)));
  if (rows < kLanes || cols < width) std::memset(tile, 0, sizeof(float) * kLanes * width);
  const T* from = x.data + r0 * x.row_stride + k0 * x.col_stride;
  if (x.row_stride == 1 && rows == kLanes) {
    for (int k = 0; k < cols; k++)
      for (int r = 0; r < kLanes; r++) tile[k][r] = load(from + k * x.col_stride + r);
  } else if (x.col_stride == 1 && rows == kLanes && cols == width) {
    float part[8][8];
    for (int r = 0; r < kLanes; r += 8)
      for (int k = 0; k < width; k += 8) {
        for (int i = 0; i < 8; i++)
          for (int j = 0; j < 8; j++) part[i][j] = load(from + (r + i) * x.row_stride + k + j);
        transpose_8(part[0], 8, &tile[k][r], kLanes);
      }
  } else {
    for (int r = 0; r < rows; r++)
      for (int k = 0; k < cols; k++)
        tile[k][r] = load(from + r * x.row_stride + k * x.col_stride);
  }
}

void rotate(float (*tile)[kLanes], int size, const float* signs, float factor, bool bf16) {
  typedef float Row __attribute__((vector_size(4 * kLanes), may_alias));
  Row* rows = reinterpret_cast<Row*>(tile);
  for (int k = 0; signs && k < size; k++) rows[k] *= signs[k];
  for (int stride = 1; stride < size; stride *= 2)
    for (int first = 0; first < size; first += 2 * stride)
      for (int k = first; k < first + stride; k++) {
        Row a = rows[k], b = rows[k + stride];
        rows[k] = a + b;
        rows[k + stride] = a - b;
      }
  for (int k = 0; k < size; k++) rows[k] *= factor;
  for (int k = 0; bf16 && k < size; k++)
    for (int r = 0; r < kLanes; r++) tile[k][r] = rounded_bf16(tile[k][r]);
}

// The bits of the largest magnitude: as integers they are ordered, NaN over Inf over any number.
inline int32_t largest(const float* y, int64_t n) {
  int32_t found = 0;
  for (int64_t i = 0; i < n; i++) {
    int32_t magnitude = bits_of(y[i]) & 0x7FFFFFFF;
    found = magnitude > found ? magnitude : found;
  }
  return found;
}

struct Turn {
  int size;
  const float* signs;
  float factor;
  bool bf16;
};

template <class T>
void orient_rows(const Source<T>& x, int64_t r0, const Turn& turn, float* out, int64_t length) {
  int64_t rows = std::min<int64_t>(kLanes, x.rows - r0);
  if (!turn.size && x.col_stride == 1) {
    for (int64_t r = r0; r < r0 + rows; r++) {
      const T* from = x.data + r * x.row_stride;
      float* to = out + r * length;
      for (int64_t k = 0; k < x.cols; k++) to[k] = load(from + k);
      std::fill(to + x.cols, to + length, 0.0f);
    }
    return;
  }
  alignas(64) float tile[kLongest][kLanes];
  int step = turn.size ? turn.size : kLanes;
  for (int64_t k0 = 0; k0 < length; k0 += step) {
    fill(x, r0, k0, step, tile);
    if (turn.size) rotate(tile, step, turn.signs, turn.factor, turn.bf16);
    int width = static_cast<int>(std::min<int64_t>(step, length - k0));
    if (rows == kLanes && width == step) {
      for (int k = 0; k < step; k += 8)
        for (int r = 0; r < kLanes; r += 8)
          transpose_8(&tile[k][r], kLanes, out + (r0 + r) * length + k0 + k, length);
      continue;
    }
    for (int64_t r = 0; r < rows; r++) {
      float* to = out + (r0 + r) * length + k0;
      for (int k = 0; k < width; k++) to[k] = tile[k][r];
    }
  }
}

template <class T>
void orient(const Source<T>& x, const Turn& turn, float* out, int64_t length, int span, float* amax,
            int threads) {
  int64_t slabs = (x.rows + kLanes - 1) / kLanes;
  std::atomic<int32_t> whole{0};
  divided(slabs, kLanes * length, threads, [&](int64_t begin, int64_t end, int64_t) {
    int32_t mine = 0;
    for (int64_t slab = begin; slab < end; slab++) {
      orient_rows(x, slab * kLanes, turn, out, length);
      for (int64_t r = slab * kLanes; span != kBlock && r < std::min(x.rows, (slab + 1) * kLanes); r++) {
        int32_t found = largest(out + r * length, length);
        if (span == kRow) amax[r] = float_of(found);
        mine = std::max(mine, found);
      }
    }
    int32_t before = whole.load();
    while (before < mine && !whole.compare_exchange_weak(before, mine)) {
    }
  });
  if (span == kTensor) *amax = float_of(whole.load());
}

}  // namespace
