// Phase noise, tile by tile, wherever the tile stands: the whole forward kernel of encoded rows.
// Included by kernels only, like simd.h.
#pragma once

#include "cpu/encode/phasor_tiles.h"
#include "cpu/rows.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

// Features that are summed up in registers: as many as fit beside one row's three positions,
// and for many rows more, as every row's sums are loaded and stored for a group.
constexpr int group_size(bool one_row) { return one_row || kVectorBytes < 64 ? 2 : 4; }
constexpr int kGroup = group_size(false);

// Makes the encoded rows of tiles. The lanes of a vector are pairs, so that an output is a sum over
// features in one lane, and the features of x are read as scalars.
template <class T>
class PhasorEncoder {
  static constexpr std::int64_t kWidth = kLanes<T>;

 public:
  explicit PhasorEncoder(const core::PhasorFilterParams& p)
      : p_(p),
        consecutive_(p.positions == nullptr),
        features_(round_up(p.in_features, kGroup)),
        width_(round_up(p.num_pairs, kWidth)),
        rows_of_heads_(group_heads(p) * features_),
        freqs_(p.ndim * rows_of_heads_ * width_),
        coefficients_(2 * rows_of_heads_ * width_),
        constant_(2 * rows_of_heads_ * width_),
        table_(consecutive_ ? rows_of_heads_ : 0, width_),
        phasors_(consecutive_ ? 0 : kPhasorChunk * kGroup * 2 * kWidth),
        x_stride_(odd_lines<T>(features_)),
        x_(kPhasorChunk * num_shared_rows(p) * x_stride_),
        y_(kPhasorChunk * num_shared_rows(p) * 2 * width_) {}

  // Encodes the rows of a tile of one of the heads of a group. Meanwhile other(step, steps) is
  // called for steps 0 .. steps - 1.
  template <class Storage, class Out, class Other>
  void encode(const HeadGroup& heads, const Tile& tile,
              const TileView<const Storage>& x,  // [rows, size, 1, D]
              const TileView<Out>& out,          // [rows, size, 1, R]
              const Other& other) {
    load_heads(heads.first, heads.count);
    if (consecutive_) table_.go_to(tile.n);
    first_row_ = tile.head * features_;
    n_ = tile.n;
    size_ = tile.size;
    rows_ = tile.rows;
    with_feature_map(p_.feature_map, [&](auto map) { load_tile<map.value>(x); });
    compute(other);
    store_tile(out);
  }

 private:
  T* x(std::int64_t t, std::int64_t b) const {  // [t, b, D]
    return x_ + (t * rows_ + b) * x_stride_;
  }
  const T* y(std::int64_t i, std::int64_t t,
             std::int64_t b) const {  // [R/2 / lanes, t, b, 2, lanes]
    return y_ + ((i / kWidth * kPhasorChunk + t) * rows_ + b) * 2 * kWidth;
  }

  // Copies the parameters of heads with pairs along the lanes: freqs [ndim, heads, D, R/2],
  // coefficients and constant [heads, D, 2, R/2], zero where features and pairs are filled up.
  void load_heads(std::int64_t first, std::int64_t count) {
    if (first == first_head_) return;
    first_head_ = first;
    const T* coefficients = static_cast<const T*>(p_.coefficients);
    const T* constant = static_cast<const T*>(p_.constant);
    for (std::int64_t row = 0; row < count * features_; ++row) {
      const std::int64_t d = row % features_;
      const std::int64_t pairs = d < p_.in_features ? p_.num_pairs : 0;
      const std::int64_t from =
          ((first + row / features_) * p_.in_features + d) * p_.num_pairs;  // where there are pairs
      for (std::int64_t a = 0; a < p_.ndim; ++a) {
        double* to = freqs_ + (a * rows_of_heads_ + row) * width_;
        for (std::int64_t i = 0; i < pairs; ++i) to[i] = p_.freqs[(from + i) * p_.ndim + a];
        for (std::int64_t i = pairs; i < width_; ++i) to[i] = 0;
      }
      for (std::int64_t part = 0; part < 2; ++part) {
        T* to = coefficients_ + (2 * row + part) * width_;
        for (std::int64_t i = 0; i < pairs; ++i) to[i] = coefficients[2 * (from + i) + part];
        for (std::int64_t i = pairs; i < width_; ++i) to[i] = 0;
        to = constant_ + (2 * row + part) * width_;
        const std::int64_t constants = constant == nullptr ? 0 : pairs;
        for (std::int64_t i = 0; i < constants; ++i) to[i] = constant[2 * (from + i) + part];
        for (std::int64_t i = constants; i < width_; ++i) to[i] = 0;
      }
    }
    if (consecutive_)
      table_.load_sines(count * features_, freqs_, coefficients_, p_.start, p_.length);
  }

  template <core::FeatureMap kMap, class Storage>
  void load_tile(const TileView<const Storage>& from) const {
    for (std::int64_t t = 0; t < size_; ++t) {
      for (std::int64_t b = 0; b < rows_; ++b)
        load_mapped_row<kMap>(from.row(b, t, 0), from.column_stride, p_.in_features, x(t, b));
    }
  }

  template <class Out>
  void store_tile(const TileView<Out>& to) const {
    for (std::int64_t b = 0; b < rows_; ++b) {
      for (std::int64_t t = 0; t < size_; ++t) {
        Out* row = to.row(b, t, 0);
        for (std::int64_t i = 0; i < p_.num_pairs; i += kWidth) {
          const T* re = y(i, t, b);
          const T* im = re + kWidth;
          const std::int64_t count = min_of(kWidth, p_.num_pairs - i);
          for (std::int64_t l = 0; l < count; ++l) {
            core::store(re[l], row + 2 * (i + l));
            core::store(im[l], row + 2 * (i + l) + 1);
          }
        }
      }
    }
  }

  // Makes y from x.
  template <class Other>
  void compute(const Other& other) {
    clear_missing_x();
    for (std::int64_t k = 0; k < kPhasorChunk * rows_ * 2 * width_; ++k) y_[k] = 0;
    const int group = group_size(rows_ == 1 && consecutive_);
    const std::int64_t steps = features_ / group * (width_ / kWidth);
    std::int64_t step = 0;
    for (std::int64_t i = 0; i < width_; i += kWidth) {
      for (std::int64_t d = 0; d < features_; d += group) {
        other(step++, steps);
        if (!consecutive_) {
          fill_phasors(d, i);
          accumulate<false, true, false>(d, i);
        } else if (p_.constant == nullptr) {
          rows_ == 1 ? accumulate<true, false, true>(d, i) : accumulate<true, false, false>(d, i);
        } else {
          rows_ == 1 ? accumulate<true, true, true>(d, i) : accumulate<true, true, false>(d, i);
        }
      }
    }
  }

  // Beyond the last feature, and beyond the last position: what is made there is not stored, but it
  // must be made from something.
  void clear_missing_x() {
    for (std::int64_t t = 0; t < round_up(size_, kTrio); ++t) {
      for (std::int64_t b = 0; b < rows_; ++b) {
        T* row = x(t, b);
        for (std::int64_t d = t < size_ ? p_.in_features : 0; d < features_; ++d) row[d] = 0;
      }
    }
  }

  // The exact phasors of a group of features at given positions: [t, d, 2, lanes].
  void fill_phasors(std::int64_t d, std::int64_t i) {
    for (std::int64_t t = 0; t < round_up(size_, kTrio); ++t) {
      const double* position = p_.positions + min_of(n_ + t, p_.length - 1) * p_.ndim;
      for (std::int64_t g = 0; g < kGroup; ++g) {
        T* out = phasors_ + (t * kGroup + g) * 2 * kWidth;
        exact_phasors(p_.ndim, freqs_ + (first_row_ + d + g) * width_ + i, rows_of_heads_ * width_,
                      kWidth, position, out, out + kWidth);
      }
    }
  }

  // y += x (c e + constant) for a group of features from d on and the pairs [i, i + lanes).
  template <bool kConsecutive, bool kConstant, bool kOneRow>
  void accumulate(std::int64_t d, std::int64_t i) {
    constexpr int kSize = group_size(kOneRow);
    const std::int64_t rows = kOneRow ? 1 : rows_;
    Complex<T> coefficient[kSize], constant[kSize];
    TrioOfPhasors<T> trio[kSize];
    for (int g = 0; g < kSize; ++g) {
      const std::int64_t at = 2 * (first_row_ + d + g) * width_ + i;
      coefficient[g] = load_complex<T>(coefficients_ + at, coefficients_ + at + width_);
      constant[g] = load_complex<T>(constant_ + at, constant_ + at + width_);
      if constexpr (kConsecutive) trio[g].start(table_, first_row_ + d + g, i);
    }
    const T* x_row = x_ + d;
    T* y_row = y_ + i / kWidth * kPhasorChunk * rows * 2 * kWidth;
    for (std::int64_t t = 0; t < size_; t += kTrio) {
      Complex<T> code[kSize][kTrio];
      for (int g = 0; g < kSize; ++g) {
        if constexpr (kConsecutive) {
          trio[g].next(code[g]);
        } else {
          for (int j = 0; j < kTrio; ++j) {
            const T* phasor = phasors_ + ((t + j) * kSize + g) * 2 * kWidth;
            code[g][j] = multiply(load_complex<T>(phasor, phasor + kWidth), coefficient[g]);
          }
        }
        if constexpr (kConstant) {
          for (int j = 0; j < kTrio; ++j) {
            code[g][j].re += constant[g].re;
            code[g][j].im += constant[g].im;
          }
        }
      }
      for (int j = 0; j < kTrio; ++j) {
        for (std::int64_t b = 0; b < rows; ++b, x_row += x_stride_, y_row += 2 * kWidth) {
          Vec<T> re = load_vec(y_row), im = load_vec(y_row + kWidth);
          for (int g = 0; g < kSize; ++g) {
            re += x_row[g] * code[g][j].re;
            im += x_row[g] * code[g][j].im;
          }
          store_vec(y_row, re);
          store_vec(y_row + kWidth, im);
        }
      }
    }
  }

  const core::PhasorFilterParams& p_;
  const bool consecutive_;
  const std::int64_t features_, width_;  // D and R/2, filled up
  const std::int64_t rows_of_heads_;     // of the parameters: heads times features
  Workspace<double> freqs_;
  Workspace<T> coefficients_, constant_;
  PhasorTable<T> table_;
  Workspace<T> phasors_;
  const std::int64_t x_stride_;
  Workspace<T> x_, y_;
  std::int64_t first_head_ = -1;
  std::int64_t first_row_, n_, size_, rows_;  // of the tile that is being made
};

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
