// Gradients of phase noise, tile by tile, wherever the tile stands: the whole backward kernel.
// Included by kernels only, like simd.h.
#pragma once

#include "cpu/encode/phasor_tiles.h"
#include "cpu/rows.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

// Sums over positions for a pair and a feature: the gradient of the coefficient (real, imaginary),
// of the constant (the same), and of the frequency for each coordinate of the positions.
TORCH_SPE_INLINE std::int64_t num_phasor_sums(const core::PhasorFilterParams& p) {
  return 4 + p.ndim;
}

// The gradient of a coefficient c is a sum over positions divided by conj(c), which saves carrying
// both e and c e. Coefficients smaller than this count as this: small enough to vanish beside
// anything, large enough to be squared.
template <class T>
constexpr T kTinyCoefficient = sizeof(T) == 4 ? T(1e-18) : T(1e-150);

// The gradients of tiles. The lanes of a vector are features, so that the gradient of x is
// a sum over pairs in one lane, the gradients of the parameters are sums over positions in one
// lane, and the output's gradient is read as scalars.
//
// With the code z = c e, e = e^(2 pi i f n), and g = g_2i + i g_2i+1,
//   dx[b] = Re(conj(g[b]) (z + constant)), summed over pairs;
//   G = sum_b x[b] g[b], w = G conj(z): dconstant = G, dc = w / conj(c), dphase = Im(w),
// the last three summed over positions. For consecutive positions, df needs the sums of w and of
// t w in a chunk.
template <class T>
class PhasorGradient {
  static constexpr std::int64_t kWidth = kLanes<T>;

 public:
  explicit PhasorGradient(const core::PhasorFilterBackwardParams& p)
      : p_(p),
        consecutive_(p.positions == nullptr),
        width_(round_up(p.in_features, kWidth)),
        rows_of_heads_(group_heads(p) * p.num_pairs),
        freqs_(p.ndim * rows_of_heads_ * width_),
        coefficients_(2 * rows_of_heads_ * width_),
        constant_(2 * rows_of_heads_ * width_),
        table_(consecutive_ ? rows_of_heads_ : 0, width_),
        phasors_(consecutive_ ? 0 : kPhasorChunk * 2 * kWidth),
        grad_phase_(consecutive_ ? 0 : kPhasorChunk * kWidth),
        x_and_grad_x_(kPhasorChunk * num_shared_rows(p) * 2 * width_),
        g_stride_(odd_lines<T>(2 * kPhasorChunk * num_shared_rows(p))),
        g_(p.num_pairs * g_stride_) {}

  // From the gradient of the encoded rows of a tile of one of the heads of a group, that of x
  // (unless grad_x.first is null). Adds to the head's sums, [R/2, num_phasor_sums, D filled up],
  // and to grad_positions, [N, ndim] or null. Meanwhile other(step, steps) is called for steps 0 ..
  // steps - 1.
  template <class Storage, class In, class Out, class Other>
  void add_tile(const HeadGroup& heads, const Tile& tile,
                const TileView<const Storage>& x_rows,  // [rows, size, 1, D]
                const TileView<const In>& grad_out,     // [rows, size, 1, R]
                const TileView<Out>& grad_x_rows,       // [rows, size, 1, D]
                double* sums_of_head, double* grad_positions, const Other& other) {
    load_heads(heads.first, heads.count);
    if (consecutive_) table_.go_to(tile.n);
    first_row_ = tile.head * p_.num_pairs;
    n_ = tile.n;
    size_ = tile.size;
    rows_ = tile.rows;
    sums_ = sums_of_head;
    grad_positions_ = grad_positions;
    with_feature_map(p_.feature_map, [&](auto map) { load_tile<map.value>(x_rows, grad_out); });
    compute(other);
    if (grad_x_rows.first == nullptr) return;
    with_feature_map(p_.feature_map, [&](auto map) { store_grad_x<map.value>(grad_x_rows); });
  }

  // Turns the sums of one of the heads of a group, added up by add_tile, into gradients.
  void finish_sums(const HeadGroup& heads, std::int64_t head, double* sums_of_head) {
    load_heads(heads.first, heads.count);
    sums_ = sums_of_head;
    for (std::int64_t i = 0; i < p_.num_pairs; ++i) {
      const T* coefficient = coefficients_ + 2 * (head * p_.num_pairs + i) * width_;
      double* re = sums(i, 0);
      double* im = sums(i, 1);
      for (std::int64_t d = 0; d < width_; ++d) {
        // w / conj(c) = w c / |c|^2
        const double cr = coefficient[d], ci = coefficient[width_ + d];
        const double square = cr * cr + ci * ci;
        const double wr = re[d], wi = im[d];
        re[d] = (wr * cr - wi * ci) / square;
        im[d] = (wi * cr + wr * ci) / square;
      }
    }
  }

 private:
  // [D / lanes, t, b, 2, lanes]: a vector of x beside that of its gradient.
  T* x(std::int64_t d, std::int64_t t, std::int64_t b) const {
    return x_and_grad_x_ + ((d / kWidth * kPhasorChunk + t) * rows_ + b) * 2 * kWidth + d % kWidth;
  }
  T* grad_x(std::int64_t d, std::int64_t t, std::int64_t b) const { return x(d, t, b) + kWidth; }
  T* g(std::int64_t i, std::int64_t t, std::int64_t b) const {  // [R/2, t, b, 2]
    return g_ + i * g_stride_ + (t * rows_ + b) * 2;
  }

  // Copies the parameters of heads with features along the lanes: freqs [ndim, heads, R/2, D],
  // coefficients and constant [heads, R/2, 2, D], zero where features are filled up.
  void load_heads(std::int64_t first, std::int64_t count) {
    if (first == first_head_) return;
    first_head_ = first;
    const T* coefficients = static_cast<const T*>(p_.coefficients);
    const T* constant = static_cast<const T*>(p_.constant);
    for (std::int64_t row = 0; row < count * p_.num_pairs; ++row) {
      const std::int64_t head = first + row / p_.num_pairs, i = row % p_.num_pairs;
      for (std::int64_t d = 0; d < width_; ++d) {
        const bool inside = d < p_.in_features;
        const std::int64_t from = (head * p_.in_features + d) * p_.num_pairs + i;
        for (std::int64_t a = 0; a < p_.ndim; ++a)
          freqs_[(a * rows_of_heads_ + row) * width_ + d] =
              inside ? p_.freqs[from * p_.ndim + a] : 0;
        T* c = coefficients_ + 2 * row * width_ + d;
        T* k = constant_ + 2 * row * width_ + d;
        for (std::int64_t part = 0; part < 2; ++part) {
          c[part * width_] = inside ? coefficients[2 * from + part] : 0;
          k[part * width_] = inside && constant != nullptr ? constant[2 * from + part] : 0;
        }
        if (__builtin_fabs(c[0]) + __builtin_fabs(c[width_]) < kTinyCoefficient<T>) {
          c[0] = kTinyCoefficient<T>;
          c[width_] = 0;
        }
      }
    }
    if (consecutive_)
      table_.load_sines(count * p_.num_pairs, freqs_, coefficients_, p_.start, p_.length);
  }

  template <core::FeatureMap kMap, class Storage, class In>
  void load_tile(const TileView<const Storage>& x_rows, const TileView<const In>& g_rows) const {
    const std::int64_t stride = x_rows.column_stride, g_stride = g_rows.column_stride;
    for (std::int64_t t = 0; t < size_; ++t) {
      for (std::int64_t b = 0; b < rows_; ++b) {
        const Storage* from = x_rows.row(b, t, 0);
        for (std::int64_t d = 0; d < p_.in_features; d += kWidth) {
          load_mapped_row<kMap>(from + d * stride, stride, min_of(kWidth, p_.in_features - d),
                                x(d, t, b));
        }
        const In* in = g_rows.row(b, t, 0);
        for (std::int64_t i = 0; i < p_.num_pairs; ++i) {
          T* out = g(i, t, b);
          out[0] = core::load(in[2 * i * g_stride]);
          out[1] = core::load(in[(2 * i + 1) * g_stride]);
        }
      }
    }
  }

  template <core::FeatureMap kMap, class Out>
  void store_grad_x(const TileView<Out>& to) const {
    for (std::int64_t t = 0; t < size_; ++t) {
      for (std::int64_t b = 0; b < rows_; ++b) {
        Out* out = to.row(b, t, 0);
        for (std::int64_t d = 0; d < p_.in_features; d += kWidth) {
          // What lies beyond the last feature is zero.
          const Vec<T> gradient =
              scale_lanes_by_derivative<kMap, T>(load_vec(x(d, t, b)), load_vec(grad_x(d, t, b)));
          store_lanes<T>(gradient, out + d, min_of(kWidth, p_.in_features - d));
        }
      }
    }
  }

  // Makes grad_x from x and g, and adds to the sums.
  template <class Other>
  void compute(const Other& other) {
    clear();
    const std::int64_t steps = width_ / kWidth * p_.num_pairs;
    std::int64_t step = 0;
    for (std::int64_t d = 0; d < width_; d += kWidth) {
      for (std::int64_t i = 0; i < p_.num_pairs; ++i) {
        other(step++, steps);
        if (!consecutive_) {
          fill_phasors(i, d);
          add_pair<false, true, 0>(i, d);
          add_phase_gradients<T>(
              p_.ndim, size_, grad_phase_, p_.positions + n_ * p_.ndim,
              freqs_ + (first_row_ + i) * width_ + d, rows_of_heads_ * width_, sums(i, 4) + d,
              width_, grad_positions_ == nullptr ? nullptr : grad_positions_ + n_ * p_.ndim);
        } else if (p_.constant == nullptr) {
          add_pair_of_rows<false>(i, d);
        } else {
          add_pair_of_rows<true>(i, d);
        }
      }
    }
  }

  double* sums(std::int64_t i, std::int64_t which) const {
    return sums_ + (i * num_phasor_sums(p_) + which) * width_;
  }

  // The gradient of x, and what lies beyond the last feature and the last position.
  void clear() {
    for (std::int64_t d = 0; d < width_; d += kWidth) {
      const std::int64_t count = min_of(kWidth, p_.in_features - d);
      for (std::int64_t k = 0; k < size_ * rows_; ++k) {
        T* row = x(d, 0, 0) + k * 2 * kWidth;
        for (std::int64_t l = count; l < kWidth; ++l) row[l] = 0;
        store_vec(row + kWidth, Vec<T>{});
      }
    }
    const std::int64_t missing = (round_up(size_, kTrio) - size_) * rows_;
    for (std::int64_t d = 0; d < width_; d += kWidth) {
      for (std::int64_t k = 0; k < missing * 2 * kWidth; ++k) x(d, size_, 0)[k] = 0;
    }
    for (std::int64_t i = 0; i < p_.num_pairs; ++i) {
      for (std::int64_t k = 0; k < missing * 2; ++k) g(i, size_, 0)[k] = 0;
    }
  }

  // The exact phasors of a pair at given positions: [t, 2, lanes].
  void fill_phasors(std::int64_t i, std::int64_t d) {
    for (std::int64_t t = 0; t < round_up(size_, kTrio); ++t) {
      T* out = phasors_ + t * 2 * kWidth;
      exact_phasors(p_.ndim, freqs_ + (first_row_ + i) * width_ + d, rows_of_heads_ * width_,
                    kWidth, p_.positions + min_of(n_ + t, p_.length - 1) * p_.ndim, out,
                    out + kWidth);
    }
  }

  template <bool kConstant>
  void add_pair_of_rows(std::int64_t i, std::int64_t d) {
    switch (rows_) {
      case 1:
        return add_pair<true, kConstant, 1>(i, d);
      case 4:
        return add_pair<true, kConstant, 4>(i, d);
      default:
        return add_pair<true, kConstant, 0>(i, d);
    }
  }

  // Adds the part of a pair to the gradient of x, and to the sums what the tile contributes to
  // them; leaves the gradients of the phases in grad_phase_ when positions are given. The number of
  // rows may be known when this is compiled.
  template <bool kConsecutive, bool kConstant, int kRows>
  void add_pair(std::int64_t i, std::int64_t d) {
    const std::int64_t rows = kRows > 0 ? kRows : rows_, parameters = first_row_ + i;
    const auto at = [&](const T* planes) {
      const T* re = planes + 2 * parameters * width_ + d;
      return load_complex<T>(re, re + width_);
    };
    const Complex<T> coefficient = at(coefficients_), constant = at(constant_);
    TrioOfPhasors<T> trio;
    if constexpr (kConsecutive) trio.start(table_, parameters, d);
    Complex<T> sum = {}, sum_of_products = {};  // of w and of G
    Vec<T> sum_of_sums = {};                    // of Im(w) before each position
    T* x_row = x(d, 0, 0);
    const T* g_row = g(i, 0, 0);
    for (std::int64_t t = 0; t < size_; t += kTrio) {
      Complex<T> z[kTrio];
      if constexpr (kConsecutive) {
        trio.next(z);
      } else {
        for (int j = 0; j < kTrio; ++j) {
          const T* phasor = phasors_ + (t + j) * 2 * kWidth;
          z[j] = multiply(load_complex<T>(phasor, phasor + kWidth), coefficient);
        }
      }
      for (int j = 0; j < kTrio; ++j) {
        Vec<T> grad_phase;
        if constexpr (kRows == 1) {
          // Of a single row, g conj(z) serves both the gradient of x and w.
          const T re = g_row[0], im = g_row[1];
          const Vec<T> row = load_vec(x_row);
          const Complex<T> rotated = {z[j].re * re + z[j].im * im, z[j].re * im - z[j].im * re};
          Vec<T> grad_x = load_vec(x_row + kWidth) + rotated.re;
          if constexpr (kConstant) {
            grad_x += constant.re * re + constant.im * im;
            sum_of_products.re += row * re;
            sum_of_products.im += row * im;
          }
          store_vec(x_row + kWidth, grad_x);
          sum.re += row * rotated.re;
          grad_phase = row * rotated.im;
          x_row += 2 * kWidth;
          g_row += 2;
        } else {
          Complex<T> code = z[j], product = {};  // product is G
          if constexpr (kConstant) {
            code.re += constant.re;
            code.im += constant.im;
          }
          for (std::int64_t b = 0; b < rows; ++b, x_row += 2 * kWidth, g_row += 2) {
            const T re = g_row[0], im = g_row[1];
            const Vec<T> row = load_vec(x_row);
            product.re += row * re;
            product.im += row * im;
            store_vec(x_row + kWidth, load_vec(x_row + kWidth) + code.re * re + code.im * im);
          }
          if constexpr (kConstant) {
            sum_of_products.re += product.re;
            sum_of_products.im += product.im;
          }
          sum.re += product.re * z[j].re + product.im * z[j].im;
          grad_phase = product.im * z[j].re - product.re * z[j].im;
        }
        if constexpr (kConsecutive) {
          sum_of_sums += sum.im;
        } else {
          store_vec(grad_phase_ + (t + j) * kWidth, grad_phase);
        }
        sum.im += grad_phase;
      }
    }
    add_lanes<T>(sum.re, sums(i, 0) + d);
    add_lanes<T>(sum.im, sums(i, 1) + d);
    if constexpr (kConstant) {
      add_lanes<T>(sum_of_products.re, sums(i, 2) + d);
      add_lanes<T>(sum_of_products.im, sums(i, 3) + d);
    }
    if constexpr (kConsecutive) {
      // The phase is 2 pi f n. Position n0 + t of T takes part in T - 1 - t of the sums of sums.
      const double last = p_.start + static_cast<double>(n_ + round_up(size_, kTrio) - 1);
      add_lanes<T>(static_cast<T>(core::kTwoPi) * (static_cast<T>(last) * sum.im - sum_of_sums),
                   sums(i, 4) + d);
    }
  }

  const core::PhasorFilterBackwardParams& p_;
  const bool consecutive_;
  const std::int64_t width_;          // D, filled up
  const std::int64_t rows_of_heads_;  // of the parameters: heads times pairs
  Workspace<double> freqs_;
  Workspace<T> coefficients_, constant_;
  PhasorTable<T> table_;
  Workspace<T> phasors_, grad_phase_;
  Workspace<T> x_and_grad_x_;
  const std::int64_t g_stride_;
  Workspace<T> g_;
  std::int64_t first_head_ = -1;
  // Of the tile that is being handled.
  double* sums_;
  double* grad_positions_;
  std::int64_t first_row_, n_, size_, rows_;
};

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
