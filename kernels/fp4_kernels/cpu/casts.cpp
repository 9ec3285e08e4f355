// Casts of one operand of a GEMM on a CPU, with the bits of fp4pretrain.numerics.
//
// fp4_orient makes the matrix that is cast, in fp32: x or its transpose (a choice of strides), zeros behind its
// columns, rotated; and measures its largest magnitudes. fp4_cast then rounds it in place: element x block
// scale, and alpha for what multiplies the GEMM's result. numerics/ defines every number here; these files keep
// the order of its fp32 operations, so it must be compiled without contraction and without fast-math.
//
// A plain C interface: no header of PyTorch or Python. Blocks at the end of rows or columns may be cut short;
// what is missing counts as zeros.

#include "noise.h"
#include "orient.h"
#include "rounding.h"
#include "scales.h"

namespace {

// A band of rows that shares nothing with others.
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
  auto work = [&](int64_t begin, int64_t end, int64_t) {
    try {
      Band band(*spec, y, rows, cols, amax, noise, alpha);
      for (int64_t i = begin; i < end; i++) band.cast(i * tall, std::min(rows, (i + 1) * tall));
    } catch (...) {
      failed = 2;
    }
  };
  try {
    divided((rows + tall - 1) / tall, tall * cols, threads, work);
  } catch (...) {
    failed = 2;
  }
  return failed;
}
}
