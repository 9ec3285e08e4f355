// What every part of the C++ casts shares: the words of a spec, bits of floats, threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int kLanes = 16;            // rows that are rotated or transposed together
constexpr int kLongest = 128;         // of a rotation
constexpr int64_t kShare = 1 << 17;   // elements that are worth a thread
constexpr int32_t kInfinity = 0x7F800000;
constexpr float kLargest = 3.4028234663852886e38f;
constexpr float kAlmostHalf = 0.49999997f;  // the largest float below a half, as in rounding.py
constexpr float kAdaptiveBelow = 0.87f;

enum Scales { kE4M3, kUE5M3, kE8M0, kFP32 };
enum Rounding { kEven, kAway, kBytes, kWords };
enum Span { kBlock, kRow, kTensor };
enum CappedRule { kPlain, kFourOverSix };
enum MxRule { kFloor, kCeil, kEvenExponent, kRoundUp, kFullGrid, kAdaptive };
enum Fp32Rule { kAmax, kPow2 };

}  // namespace

extern "C" {

// How an operand is cast; field by field the Structure of library.py.
struct CastSpec {
  int32_t scales, rule, rounding, span, eden, coded, emin, emax, mantissa;
  float max, outer_max, inverse_max, stretch, alpha;
  int64_t block_rows, block_cols, outer_rows, outer_cols, group;  // 0: the whole axis
};

// Philox key and place of the operand in the whole tensor, as numerics.Noise.
struct NoiseSpec {
  uint64_t key;
  int64_t row_offset, col_offset, row_part, row_gap, col_part, col_gap;
};
}

namespace {

inline int32_t bits_of(float v) {
  int32_t b;
  std::memcpy(&b, &v, 4);
  return b;
}

inline float float_of(int32_t b) {
  float v;
  std::memcpy(&v, &b, 4);
  return v;
}

const float kNaN = float_of(0x7FC00000);

inline bool finite(float magnitude) { return bits_of(magnitude) < kInfinity; }

inline float at_most(float v, float most) { return v > most ? most : v; }  // NaN stays

// Runs work(begin, end, number) over parts of `units`, each on a thread of its own.
template <class Work>
void divided(int64_t units, int64_t unit_elements, int threads, Work work) {
  int64_t parts = std::min<int64_t>(threads, units * unit_elements / kShare);
  parts = std::max<int64_t>(1, std::min(parts, units));
  std::vector<std::thread> started;
  int64_t begin = 0;
  for (int64_t part = 0; part + 1 < parts; part++) {
    int64_t end = units * (part + 1) / parts;
    try {
      started.emplace_back(work, begin, end, part);
    } catch (...) {  // no thread to be had: the caller does the rest
      break;
    }
    begin = end;
  }
  work(begin, units, parts - 1);
  for (auto& thread : started) thread.join();
}

}  // namespace
