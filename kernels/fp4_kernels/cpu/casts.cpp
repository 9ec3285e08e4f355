// Casts of one operand of a GEMM on a CPU, with the bits of fp4pretrain.numerics.
//
// fp4_orient makes the matrix that is cast, in fp32: x or its transpose (a choice of strides), zeros behind its
// columns, rotated; and measures its largest magnitudes. fp4_cast then rounds it in place: element x block
// scale, and alpha for what multiplies the GEMM's result. numerics/ defines every number here; this file keeps
// the order of its fp32 operations, so it must be compiled without contraction and without fast-math.
//
// A plain C interface: no header of PyTorch or Python. Blocks at the end of rows or columns may be cut short;
// what is missing counts as zeros.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "noise is read as bytes, lowest first"
#endif

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

// ---- the matrix that is cast

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

// ---- rounding

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

// ---- noise: Philox4x32-7, see numerics/noise.py

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

// ---- scales, see numerics/scaling.py

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

// ---- a band of rows that shares nothing with others

class Band {
 public:
  Band(const CastSpec& spec, float* y, int64_t rows, int64_t cols, const float* amax,
       const NoiseSpec* noise, float* alpha)
      : spec_(spec), y_(y), rows_(rows), cols_(cols), amax_(amax), alpha_(alpha),
        draws_(noise ? *noise : NoiseSpec{}, cols),
        grid_(grid_of(spec.max, spec.emin, spec.emax, spec.mantissa, spec.coded)),
        block_rows_(spec.block_rows ? spec.block_rows : 1),
        block_cols_(spec.block_cols ? spec.block_cols : cols),
        blocks_((cols + block_cols_ - 1) / block_cols_) {}

  void cast(int64_t begin, int64_t end) {
    int64_t tall = (end - begin + block_rows_ - 1) / block_rows_;
    amaxes_.resize(tall * blocks_), encode_.resize(tall * blocks_), decode_.resize(tall * blocks_);
    for (int64_t i = 0; i < tall; i++) measure(begin + i * block_rows_, end, i * blocks_);
    if (spec_.scales == kE4M3 || spec_.scales == kUE5M3) {
      capped_scales(begin, end, tall);
    } else {
      for (int64_t i = 0; i < tall * blocks_; i++)
        spec_.scales == kE8M0 ? mx(i) : fp32(i, begin + i / blocks_);
    }
    for (int64_t row = begin; row < end; row++) round(row, (row - begin) / block_rows_ * blocks_);
  }

 private:
  int64_t band_end(int64_t row, int64_t end) const { return std::min(end, row + block_rows_); }

  void measure(int64_t row, int64_t end, int64_t at) {
    if (spec_.scales == kFP32 && spec_.span != kBlock) {
      amaxes_[at] = amax_[spec_.span == kRow ? row : 0];
      return;
    }
    for (int64_t j = 0; j < blocks_; j++) {
      int64_t k = j * block_cols_, n = std::min(block_cols_, cols_ - k);
      int32_t found = 0;
      for (int64_t r = row; r < band_end(row, end); r++)
        found = std::max(found, n == 16 ? largest(y_ + r * cols_ + k, 16)
                                        : largest(y_ + r * cols_ + k, n));
      amaxes_[at + j] = float_of(found);
    }
  }

  float outer_amax(int64_t begin, int64_t end, int64_t tall, int64_t first, int64_t last) const {
    if (spec_.span == kTensor) return *amax_;
    int32_t found = 0;
    if (spec_.span == kRow) {
      for (int64_t r = begin; r < end; r++) found = std::max(found, bits_of(amax_[r]));
      return float_of(found);
    }
    for (int64_t i = 0; i < tall; i++)
      for (int64_t j = first; j < last; j++)
        found = std::max(found, bits_of(amaxes_[i * blocks_ + j]));
    return float_of(found);
  }

  void capped_scales(int64_t begin, int64_t end, int64_t tall) {
    int64_t wide = spec_.span == kBlock ? spec_.outer_cols / block_cols_ : blocks_;
    for (int64_t first = 0; first < blocks_; first += wide) {
      int64_t last = std::min(blocks_, first + wide);
      float amax = outer_amax(begin, end, tall, first, last);
      float encode_outer = outer_encode(amax, spec_.outer_max);
      float decode_outer = amax / spec_.outer_max, factor = encode_outer * spec_.inverse_max;
      for (int64_t r = begin; spec_.span == kRow && r < end; r++) alpha_[r] = decode_outer;
      if (spec_.span == kTensor && begin == 0) *alpha_ = decode_outer;
      float beyond = spec_.span == kBlock ? decode_outer : 1.0f;
      for (int64_t i = 0; i < tall; i++) {
        int64_t at = i * blocks_ + first, row = begin + i * block_rows_;
        const float* amaxes = &amaxes_[at];
        float *encode = &encode_[at], *decode = &decode_[at];
        for (int64_t j = 0; j < last - first; j++) decode[j] = amaxes[j] * factor;
        for (int64_t j = first; spec_.rule == kFourOverSix && j < last; j++) {
          int64_t k = j * block_cols_;
          Tile x = {y_ + row * cols_ + k, band_end(row, end) - row, std::min(block_cols_, cols_ - k),
                    cols_};
          decode[j - first] =
              four_over_six(x, amaxes[j - first], encode_outer, grid_, spec_.rounding == kAway);
        }
        if (spec_.scales == kE4M3) {
          store<kE4M3>(last - first, amaxes, encode_outer, beyond, encode, decode);
        } else {
          store<kUE5M3>(last - first, amaxes, encode_outer, beyond, encode, decode);
        }
      }
    }
  }

  // decode: unrounded scales, which become what is kept; times `beyond`.
  template <int kType>
  static void store(int64_t blocks, const float* amaxes, float encode_outer, float beyond, float* encode,
                    float* decode) {
    for (int64_t j = 0; j < blocks; j++) {
      float kept = stored_scale(finite(amaxes[j]) ? decode[j] : kNaN, kType);
      encode[j] = capped_encode(kept, encode_outer);
      decode[j] = kept * beyond;
    }
  }

  void mx(int64_t at) {
    float decode = mx_scale(amaxes_[at], spec_);
    encode_[at] = at_most(1.0f / decode * spec_.stretch, kLargest);
    decode_[at] = decode;
  }

  void fp32(int64_t at, int64_t row) {
    float encode = outer_encode(amaxes_[at], spec_.max);
    if (spec_.rule == kPow2 && finite(amaxes_[at])) encode = float_of(bits_of(encode) & kInfinity);
    float stored = 1.0f / encode;
    encode_[at] = encode;
    decode_[at] = spec_.span == kBlock ? stored : 1.0f;
    if (spec_.span == kRow) alpha_[row] = stored;
    if (spec_.span == kTensor && row == 0) *alpha_ = stored;
  }

  void round(int64_t row, int64_t at) {
    float* y = y_ + row * cols_;
    const float *encode = &encode_[at], *decode = &decode_[at];
    if (spec_.eden) return eden(row, at);
    const uint8_t* none = nullptr;
    switch (spec_.rounding) {
      case kEven:
        return round_row<kEven>(y, cols_, block_cols_, encode, decode, grid_, none);
      case kAway:
        return round_row<kAway>(y, cols_, block_cols_, encode, decode, grid_, none);
      case kBytes:
        return round_row<kBytes>(y, cols_, block_cols_, encode, decode, grid_, draws_.bytes(row));
      case kWords:
        return round_row<kWords>(y, cols_, block_cols_, encode, decode, grid_, draws_.words(row));
    }
  }

  // MS-EDEN: nearest rounding, then a group's scales times <x, x> / <x, q>, rounded by noise.
  void eden(int64_t row, int64_t at) {
    float* y = y_ + row * cols_;
    const uint8_t* noise = draws_.bytes(row);
    for (int64_t g = 0; g < cols_; g += spec_.group) {
      int64_t stop = std::min(cols_, g + spec_.group);
      float norms[kLongest] = {0}, products[kLongest] = {0};
      for (int64_t k = g; k < stop; k += block_cols_) {
        int64_t block = at + k / block_cols_, n = std::min(block_cols_, stop - k);
        if (spec_.rounding == kAway) {
          weigh<kAway>(y + k, n, encode_[block], decode_[block], norms + k - g, products + k - g);
        } else {
          weigh<kEven>(y + k, n, encode_[block], decode_[block], norms + k - g, products + k - g);
        }
      }
      for (int64_t n = spec_.group / 2; n; n /= 2)
        for (int64_t i = 0; i < n; i++) {
          norms[i] = norms[2 * i] + norms[2 * i + 1];
          products[i] = products[2 * i] + products[2 * i + 1];
        }
      float factor = products[0] == 0.0f ? 1.0f : norms[0] / products[0];
      for (int64_t k = g; k < stop; k += block_cols_) {
        float scale = at_most(decode_[at + k / block_cols_] * factor, kE4M3Grid.max);
        float decode = on_grid<kBytes>(scale, kE4M3Grid, noise[k]);
        for (int64_t i = k; i < std::min(cols_, k + block_cols_); i++) y[i] *= decode;
      }
    }
  }

  // Rounds n elements, and leaves what they add to a group's <x, x> and <x, q>.
  template <int kMode>
  void weigh(float* y, int64_t n, float encode, float decode, float* norms, float* products) const {
    const Grid grid = grid_;
    float weight = decode * decode;
    for (int64_t i = 0; i < n; i++) {
      float x = y[i] * encode, q = on_grid<kMode>(x, grid, 0);
      x = weight == 0.0f ? 0.0f : x;
      norms[i] = x * x * weight;
      products[i] = x * q * weight;
      y[i] = q;
    }
  }

  const CastSpec& spec_;
  float* y_;
  int64_t rows_, cols_;
  const float* amax_;
  float* alpha_;
  Draws draws_;
  Grid grid_;
  int64_t block_rows_, block_cols_, blocks_;
  std::vector<float> amaxes_, encode_, decode_;
};

}  // namespace

extern "C" {

// out [rows, length] in fp32: x as the operand holds it [rows, cols], zeros behind, rotated by `size` (0: not).
// x is fp32, or bfloat16 where `bf16_source`. amax: [rows] for kRow, a scalar for kTensor. Status 0: done.
int fp4_orient(const void* x, int bf16_source, int64_t rows, int64_t cols, int64_t row_stride,
               int64_t col_stride, float* out, int64_t length, int size, const float* signs, float factor,
               int round_bf16, int span, float* amax, int threads) {
  if (size > kLongest || (size && length % size)) return 1;
  Turn turn = {size, signs, factor, round_bf16 != 0};
  try {
    if (bf16_source) {
      Source<uint16_t> source = {static_cast<const uint16_t*>(x), rows, cols, row_stride, col_stride};
      orient(source, turn, out, length, span, amax, threads);
    } else {
      Source<float> source = {static_cast<const float*>(x), rows, cols, row_stride, col_stride};
      orient(source, turn, out, length, span, amax, threads);
    }
  } catch (...) {
    return 2;
  }
  return 0;
}

// Rounds y [rows, cols] in place to element x block scale. alpha: [rows] for kRow, else a scalar.
int fp4_cast(float* y, int64_t rows, int64_t cols, const CastSpec* spec, const float* amax,
             const NoiseSpec* noise, float* alpha, int threads) {
  if ((spec->rounding >= kBytes || spec->eden) && !noise) return 1;
  if (spec->eden && (spec->group > kLongest || spec->group % spec->block_cols)) return 1;
  int64_t tall = std::max<int64_t>(1, std::max(spec->block_rows, spec->outer_rows));
  if (spec->span == kBlock) *alpha = spec->alpha;
  std::atomic<int> failed{0};
  divided((rows + tall - 1) / tall, tall * cols, threads, [&](int64_t begin, int64_t end, int64_t) {
    try {
      Band band(*spec, y, rows, cols, amax, noise, alpha);
      for (int64_t i = begin; i < end; i++) band.cast(i * tall, std::min(rows, (i + 1) * tall));
    } catch (...) {
      failed = 2;
    }
  });
  return failed;
}
}
