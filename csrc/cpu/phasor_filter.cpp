#include "phasor_filter.h"

#include "phasors.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {
namespace {

// Rows of the batch that share phasors: few enough that a tile stays in the level 1 cache, more
// where the exact phases of given positions cost more than that.
std::int64_t num_shared_rows(const PhasorFilterParams& p) {
  return min_of(p.batch, p.positions == nullptr ? 4 : 16);
}

// Features that are summed up in registers: as many as leave room for one row's three positions,
// and for many rows more, as every row's sums are loaded and stored for a group.
constexpr int group_size(bool one_row) { return one_row || kVectorBytes < 64 ? 2 : 4; }
constexpr int kGroup = group_size(false);

// What a tile of positions and batch rows goes through, by parts that are compiled once for a type
// of computation. The lanes of a vector are pairs, so that an output is a sum over features in one
// lane, and the features of x are read as scalars.
template <class T>
class ForwardTile {
  static constexpr std::int64_t kWidth = kLanes<T>;

 public:
  explicit ForwardTile(const PhasorFilterParams& p)
      : p_(p),
        consecutive_(p.positions == nullptr),
        features_(round_up(p.in_features, kGroup)),
        width_(round_up(p.num_pairs, kWidth)),
        freqs_(p.ndim * features_ * width_),
        coefficients_(2 * features_ * width_),
        constant_(2 * features_ * width_),
        table_(consecutive_ ? features_ : 0, width_),
        phasors_(consecutive_ ? 0 : kChunk * kGroup * 2 * kWidth),
        x_stride_(odd_lines<T>(features_)),
        x_(kChunk * num_shared_rows(p) * x_stride_),
        y_(kChunk * num_shared_rows(p) * 2 * width_) {}

  // Copies a head's parameters with pairs along the lanes: freqs [ndim, D, R/2], coefficients and
  // constant [D, 2, R/2], zero where features and pairs are filled up.
  void set_head(std::int64_t head) {
    const double* freqs = p_.freqs + head * p_.in_features * p_.num_pairs * p_.ndim;
    const std::int64_t offset = head * p_.in_features * p_.num_pairs * 2;
    const T* coefficients = static_cast<const T*>(p_.coefficients) + offset;
    const T* constant =
        p_.constant == nullptr ? nullptr : static_cast<const T*>(p_.constant) + offset;
    for (std::int64_t d = 0; d < features_; ++d) {
      for (std::int64_t i = 0; i < width_; ++i) {
        const bool inside = d < p_.in_features && i < p_.num_pairs;
        const std::int64_t from = d * p_.num_pairs + i;
        for (std::int64_t a = 0; a < p_.ndim; ++a)
          freqs_[(a * features_ + d) * width_ + i] = inside ? freqs[from * p_.ndim + a] : 0;
        for (std::int64_t part = 0; part < 2; ++part) {
          const std::int64_t to = (2 * d + part) * width_ + i;
          coefficients_[to] = inside ? coefficients[2 * from + part] : 0;
          constant_[to] = inside && constant != nullptr ? constant[2 * from + part] : 0;
        }
      }
    }
    if (consecutive_) table_.set(freqs_, coefficients_, p_.length);
  }

  // Goes on to the chunk at n, which starts a segment or follows the last chunk.
  void set_chunk(std::int64_t n, std::int64_t size, bool starts_segment) {
    n_ = n;
    size_ = size;
    if (!consecutive_) return;
    if (starts_segment) {
      table_.start(p_.start + static_cast<double>(n));
    } else {
      table_.advance_chunk();
    }
  }

  void set_rows(std::int64_t rows) { rows_ = rows; }

  T* x(std::int64_t t, std::int64_t b) const {  // [t, b, D]
    return x_ + (t * rows_ + b) * x_stride_;
  }
  const T* y(std::int64_t i, std::int64_t t,
             std::int64_t b) const {  // [R/2 / lanes, t, b, 2, lanes]
    return y_ + ((i / kWidth * kChunk + t) * rows_ + b) * 2 * kWidth;
  }

  // Makes y from x. Meanwhile other(step, steps) is called for steps 0 .. steps - 1.
  template <class Other>
  void compute(const Other& other) {
    clear_missing_x();
    for (std::int64_t k = 0; k < kChunk * rows_ * 2 * width_; ++k) y_[k] = 0;
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

 private:
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
        exact_phasors(p_.ndim, freqs_ + (d + g) * width_ + i, features_ * width_, kWidth, position,
                      out, out + kWidth);
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
      const std::int64_t at = 2 * (d + g) * width_ + i;
      coefficient[g] = load_complex<T>(coefficients_ + at, coefficients_ + at + width_);
      constant[g] = load_complex<T>(constant_ + at, constant_ + at + width_);
      if constexpr (kConsecutive) trio[g].start(table_, d + g, i);
    }
    const T* x_row = x_ + d;
    T* y_row = y_ + i / kWidth * kChunk * rows * 2 * kWidth;
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

  const PhasorFilterParams& p_;
  const bool consecutive_;
  const std::int64_t features_, width_;  // D and R/2, filled up
  Workspace<double> freqs_;
  Workspace<T> coefficients_, constant_;
  PhasorTable<T> table_;
  Workspace<T> phasors_;
  const std::int64_t x_stride_;
  Workspace<T> x_, y_;
  std::int64_t n_, size_, rows_;  // of the tile at hand
};

template <class Storage>
class Forward {
  using T = core::accumulate_t<Storage>;

 public:
  explicit Forward(const PhasorFilterParams& p) : p_(p), tile_(p) {}

  // The positions [n0, n1) of a head, a segment.
  void run(std::int64_t head, std::int64_t n0, std::int64_t n1) {
    if (head != head_) tile_.set_head(head);
    head_ = head;
    for (Tiles tiles(p_.batch, num_shared_rows(p_), n0, n1); !tiles.done(); tiles.advance()) {
      const Tile tile = *tiles, next = tiles.next();
      if (tile.b == 0) tile_.set_chunk(tile.n, tile.size, tile.n == n0);
      tile_.set_rows(tile.rows);
      for (std::int64_t t = 0; t < tile.size; ++t) {
        for (std::int64_t b = 0; b < tile.rows; ++b)
          load_row(x(tile, t, b), p_.x_strides[3], p_.in_features, tile_.x(t, b));
      }
      tile_.compute([&](std::int64_t step, std::int64_t steps) {
        for_part(next, step, steps, [&](std::int64_t t, std::int64_t b) {
          prefetch_row(x(next, t, b), p_.x_strides[3], p_.in_features);
        });
        for_part(tile, step, steps, [&](std::int64_t t, std::int64_t b) {
          prefetch_row(out(tile, t, b), 1, 2 * p_.num_pairs);
        });
      });
      store_y(tile);
    }
  }

 private:
  const Storage* x(const Tile& tile, std::int64_t t, std::int64_t b) const {
    return static_cast<const Storage*>(p_.x) + (tile.b + b) * p_.x_strides[0] +
           (tile.n + t) * p_.x_strides[1] + head_ * p_.x_strides[2];
  }

  Storage* out(const Tile& tile, std::int64_t t, std::int64_t b) const {
    return static_cast<Storage*>(p_.out) +
           (((tile.b + b) * p_.length + tile.n + t) * p_.num_heads + head_) * 2 * p_.num_pairs;
  }

  void store_y(const Tile& tile) const {
    for (std::int64_t b = 0; b < tile.rows; ++b) {
      for (std::int64_t t = 0; t < tile.size; ++t) {
        Storage* row = out(tile, t, b);
        for (std::int64_t i = 0; i < p_.num_pairs; i += kLanes<T>) {
          const T* re = tile_.y(i, t, b);
          const T* im = re + kLanes<T>;
          const std::int64_t count = min_of(kLanes<T>, p_.num_pairs - i);
          for (std::int64_t l = 0; l < count; ++l) {
            core::store(re[l], row + 2 * (i + l));
            core::store(im[l], row + 2 * (i + l) + 1);
          }
        }
      }
    }
  }

  const PhasorFilterParams& p_;
  ForwardTile<T> tile_;
  std::int64_t head_ = -1;
};

template <class Storage>
void forward(const PhasorFilterParams& p) {
  const std::int64_t segments = (p.length + kSegment - 1) / kSegment;
#pragma omp parallel num_threads(p.num_threads)
  {
    Forward<Storage> worker(p);
#pragma omp for schedule(static)
    for (std::int64_t task = 0; task < p.num_heads * segments; ++task) {
      const std::int64_t n0 = task % segments * kSegment;
      worker.run(task / segments, n0, min_of(n0 + kSegment, p.length));
    }
  }
}

// Sums over positions for a pair and a feature: the gradient of the coefficient (real, imaginary),
// of the constant (the same), and of the frequency for each coordinate of the positions.
std::int64_t num_sums(const PhasorFilterParams& p) { return 4 + p.ndim; }

template <class T>
std::int64_t filled_features(const PhasorFilterParams& p) {
  return round_up(p.in_features, kLanes<T>);
}

// The gradient of a coefficient c is a sum over positions divided by conj(c), which spares carrying
// both e and c e. Coefficients smaller than this count as this: small enough to vanish beside
// anything, large enough to be squared.
template <class T>
constexpr T kTinyCoefficient = sizeof(T) == 4 ? T(1e-18) : T(1e-150);

// The same for the backward pass. The lanes of a vector are features, so that the gradient of x is
// a sum over pairs in one lane, the gradients of the parameters are sums over positions in one
// lane, and the output's gradient is read as scalars.
//
// With the code z = c e, e = e^(2 pi i f n), and g = g_2i + i g_2i+1,
//   dx[b] = Re(conj(g[b]) (z + constant)), summed over pairs;
//   G = sum_b x[b] g[b], w = G conj(z): dconstant = G, dc = w / conj(c), dphase = Im(w),
// the last three summed over positions. For consecutive positions, df needs the sums of w and of
// t w in a chunk.
template <class T>
class BackwardTile {
  static constexpr std::int64_t kWidth = kLanes<T>;

 public:
  explicit BackwardTile(const PhasorFilterBackwardParams& p)
      : p_(p),
        consecutive_(p.positions == nullptr),
        width_(filled_features<T>(p)),
        freqs_(p.ndim * p.num_pairs * width_),
        coefficients_(2 * p.num_pairs * width_),
        constant_(2 * p.num_pairs * width_),
        table_(consecutive_ ? p.num_pairs : 0, width_),
        phasors_(consecutive_ ? 0 : kChunk * 2 * kWidth),
        grad_phase_(consecutive_ ? 0 : kChunk * kWidth),
        x_(kChunk * num_shared_rows(p) * width_),
        grad_x_(kChunk * num_shared_rows(p) * width_),
        g_stride_(odd_lines<T>(2 * p.num_pairs)),
        g_(kChunk * num_shared_rows(p) * g_stride_) {}

  // Copies a head's parameters with features along the lanes: freqs [ndim, R/2, D], coefficients
  // and constant [R/2, 2, D], zero where features are filled up.
  void set_head(std::int64_t head) {
    const std::int64_t first = head * p_.in_features * p_.num_pairs;
    const T* coefficients = static_cast<const T*>(p_.coefficients);
    const T* constant = static_cast<const T*>(p_.constant);
    for (std::int64_t i = 0; i < p_.num_pairs; ++i) {
      for (std::int64_t d = 0; d < width_; ++d) {
        const bool inside = d < p_.in_features;
        const std::int64_t from = first + d * p_.num_pairs + i;
        for (std::int64_t a = 0; a < p_.ndim; ++a)
          freqs_[(a * p_.num_pairs + i) * width_ + d] = inside ? p_.freqs[from * p_.ndim + a] : 0;
        T* c = coefficients_ + 2 * i * width_ + d;
        T* k = constant_ + 2 * i * width_ + d;
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
    if (consecutive_) table_.set(freqs_, coefficients_, p_.length);
  }

  // Where sums [R/2, num_sums, D filled up] and grad_positions [N, ndim] (or null) are added up.
  void set_sums(double* sums, double* grad_positions) {
    sums_ = sums;
    grad_positions_ = grad_positions;
  }

  void set_chunk(std::int64_t n, std::int64_t size, bool starts_segment) {
    n_ = n;
    size_ = size;
    if (!consecutive_) return;
    if (starts_segment) {
      table_.start(p_.start + static_cast<double>(n));
    } else {
      table_.advance_chunk();
    }
  }

  void set_rows(std::int64_t rows) { rows_ = rows; }

  T* x(std::int64_t d, std::int64_t t, std::int64_t b) const { return x_ + offset(d, t, b); }
  const T* grad_x(std::int64_t d, std::int64_t t, std::int64_t b) const {
    return grad_x_ + offset(d, t, b);
  }
  T* g(std::int64_t t, std::int64_t b) const {  // [t, b, R]
    return g_ + (t * rows_ + b) * g_stride_;
  }

  // Makes grad_x and adds to the sums. Meanwhile other(step, steps) is called for steps 0 .. steps
  // - 1.
  template <class Other>
  void compute(const Other& other) {
    clear_missing();
    for (std::int64_t k = 0; k < kChunk * rows_ * width_; ++k) grad_x_[k] = 0;
    const std::int64_t steps = width_ / kWidth * p_.num_pairs;
    std::int64_t step = 0;
    for (std::int64_t d = 0; d < width_; d += kWidth) {
      for (std::int64_t i = 0; i < p_.num_pairs; ++i) {
        other(step++, steps);
        if (!consecutive_) {
          fill_phasors(i, d);
          add_pair<false, true, false>(i, d);
          add_phase_gradients<T>(p_.ndim, size_, grad_phase_, p_.positions + n_ * p_.ndim,
                                 freqs_ + i * width_ + d, p_.num_pairs * width_, sums(i, 4) + d,
                                 width_,
                                 grad_positions_ ? grad_positions_ + n_ * p_.ndim : nullptr);
        } else if (p_.constant == nullptr) {
          rows_ == 1 ? add_pair<true, false, true>(i, d) : add_pair<true, false, false>(i, d);
        } else {
          rows_ == 1 ? add_pair<true, true, true>(i, d) : add_pair<true, true, false>(i, d);
        }
      }
    }
  }

  void finish_sums() {
    for (std::int64_t i = 0; i < p_.num_pairs; ++i) {
      double* re = sums(i, 0);
      double* im = sums(i, 1);
      for (std::int64_t d = 0; d < width_; ++d) {
        // w / conj(c) = w c / |c|^2
        const double cr = coefficients_[2 * i * width_ + d];
        const double ci = coefficients_[(2 * i + 1) * width_ + d];
        const double square = cr * cr + ci * ci;
        const double wr = re[d], wi = im[d];
        re[d] = (wr * cr - wi * ci) / square;
        im[d] = (wi * cr + wr * ci) / square;
      }
    }
  }

 private:
  std::int64_t offset(std::int64_t d, std::int64_t t, std::int64_t b) const {
    // [D / lanes, t, b, lanes]
    return ((d / kWidth * kChunk + t) * rows_ + b) * kWidth + d % kWidth;
  }
  double* sums(std::int64_t i, std::int64_t which) const {
    return sums_ + (i * num_sums(p_) + which) * width_;
  }

  // Beyond the last feature and the last position.
  void clear_missing() {
    for (std::int64_t d = p_.in_features; d < width_; ++d) {
      for (std::int64_t t = 0; t < size_; ++t) {
        for (std::int64_t b = 0; b < rows_; ++b) *x(d, t, b) = 0;
      }
    }
    const std::int64_t missing = (round_up(size_, kTrio) - size_) * rows_;
    for (std::int64_t d = 0; d < width_; d += kWidth) {
      for (std::int64_t k = 0; k < missing * kWidth; ++k) x(d, size_, 0)[k] = 0;
    }
    for (std::int64_t k = 0; k < missing * g_stride_; ++k) g(size_, 0)[k] = 0;
  }

  // The exact phasors of a pair at given positions: [t, 2, lanes].
  void fill_phasors(std::int64_t i, std::int64_t d) {
    for (std::int64_t t = 0; t < round_up(size_, kTrio); ++t) {
      T* out = phasors_ + t * 2 * kWidth;
      exact_phasors(p_.ndim, freqs_ + i * width_ + d, p_.num_pairs * width_, kWidth,
                    p_.positions + min_of(n_ + t, p_.length - 1) * p_.ndim, out, out + kWidth);
    }
  }

  // Adds the part of a pair to the gradient of x, and to the sums what the tile contributes to
  // them; leaves the gradients of the phases in grad_phase_ when positions are given.
  template <bool kConsecutive, bool kConstant, bool kOneRow>
  void add_pair(std::int64_t i, std::int64_t d) {
    const std::int64_t rows = kOneRow ? 1 : rows_;
    const auto at = [&](const T* planes) {
      return load_complex<T>(planes + 2 * i * width_ + d, planes + (2 * i + 1) * width_ + d);
    };
    const Complex<T> coefficient = at(coefficients_), constant = at(constant_);
    TrioOfPhasors<T> trio;
    if constexpr (kConsecutive) trio.start(table_, i, d);
    Complex<T> sum = {}, sum_of_products = {};  // of w and of G
    Vec<T> moment = {};                         // of t Im(w)
    const T* x_row = x(d, 0, 0);
    T* grad_x_row = grad_x_ + offset(d, 0, 0);
    const T* g_row = g_ + 2 * i;
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
        Complex<T> code = z[j];
        if constexpr (kConstant) {
          code.re += constant.re;
          code.im += constant.im;
        }
        Complex<T> product = {};  // G
        for (std::int64_t b = 0; b < rows;
             ++b, x_row += kWidth, grad_x_row += kWidth, g_row += g_stride_) {
          const T re = g_row[0], im = g_row[1];
          const Vec<T> row = load_vec(x_row);
          product.re += row * re;
          product.im += row * im;
          store_vec(grad_x_row, load_vec(grad_x_row) + code.re * re + code.im * im);
        }
        const Vec<T> re = product.re * z[j].re + product.im * z[j].im;
        const Vec<T> im = product.im * z[j].re - product.re * z[j].im;
        sum.re += re;
        sum.im += im;
        if constexpr (kConsecutive) {
          moment += static_cast<T>(t + j) * im;
        } else {
          store_vec(grad_phase_ + (t + j) * kWidth, im);
        }
        if constexpr (kConstant) {
          sum_of_products.re += product.re;
          sum_of_products.im += product.im;
        }
      }
    }
    add_lanes<T>(sum.re, sums(i, 0) + d);
    add_lanes<T>(sum.im, sums(i, 1) + d);
    if constexpr (kConstant) {
      add_lanes<T>(sum_of_products.re, sums(i, 2) + d);
      add_lanes<T>(sum_of_products.im, sums(i, 3) + d);
    }
    if constexpr (kConsecutive) {
      // The phase is 2 pi f n.
      const T position = static_cast<T>(p_.start + static_cast<double>(n_));
      add_lanes<T>(static_cast<T>(core::kTwoPi) * (position * sum.im + moment), sums(i, 4) + d);
    }
  }

  const PhasorFilterBackwardParams& p_;
  const bool consecutive_;
  const std::int64_t width_;  // D, filled up
  Workspace<double> freqs_;
  Workspace<T> coefficients_, constant_;
  PhasorTable<T> table_;
  Workspace<T> phasors_, grad_phase_;
  Workspace<T> x_, grad_x_;
  const std::int64_t g_stride_;
  Workspace<T> g_;
  double* sums_;
  double* grad_positions_;
  std::int64_t n_, size_, rows_;  // of the tile at hand
};

template <class Storage>
class Backward {
  using T = core::accumulate_t<Storage>;

 public:
  explicit Backward(const PhasorFilterBackwardParams& p) : p_(p), tile_(p) {}

  // The positions [n0, n1) of a head, of which n0 starts a segment.
  void run(std::int64_t head, std::int64_t n0, std::int64_t n1, double* sums,
           double* grad_positions) {
    if (head != head_) tile_.set_head(head);
    head_ = head;
    tile_.set_sums(sums, grad_positions);
    for (Tiles tiles(p_.batch, num_shared_rows(p_), n0, n1); !tiles.done(); tiles.advance()) {
      const Tile tile = *tiles, next = tiles.next();
      if (tile.b == 0) tile_.set_chunk(tile.n, tile.size, (tile.n - n0) % kSegment == 0);
      tile_.set_rows(tile.rows);
      load_tile(tile);
      tile_.compute([&](std::int64_t step, std::int64_t steps) {
        for_part(next, step, steps, [&](std::int64_t t, std::int64_t b) {
          prefetch_row(x(next, t, b), p_.x_strides[3], p_.in_features);
          prefetch_row(g(next, t, b), p_.grad_out_strides[3], 2 * p_.num_pairs);
        });
      });
      if (p_.grad_x != nullptr) store_grad_x(tile);
    }
    tile_.finish_sums();
  }

 private:
  const Storage* x(const Tile& tile, std::int64_t t, std::int64_t b) const {
    return static_cast<const Storage*>(p_.x) + (tile.b + b) * p_.x_strides[0] +
           (tile.n + t) * p_.x_strides[1] + head_ * p_.x_strides[2];
  }
  const Storage* g(const Tile& tile, std::int64_t t, std::int64_t b) const {
    return static_cast<const Storage*>(p_.grad_out) + (tile.b + b) * p_.grad_out_strides[0] +
           (tile.n + t) * p_.grad_out_strides[1] + head_ * p_.grad_out_strides[2];
  }

  void load_tile(const Tile& tile) const {
    const std::int64_t stride = p_.x_strides[3];
    for (std::int64_t t = 0; t < tile.size; ++t) {
      for (std::int64_t b = 0; b < tile.rows; ++b) {
        for (std::int64_t d = 0; d < p_.in_features; d += kLanes<T>) {
          load_row(x(tile, t, b) + d * stride, stride, min_of(kLanes<T>, p_.in_features - d),
                   tile_.x(d, t, b));
        }
        load_row(g(tile, t, b), p_.grad_out_strides[3], 2 * p_.num_pairs, tile_.g(t, b));
      }
    }
  }

  void store_grad_x(const Tile& tile) const {
    for (std::int64_t t = 0; t < tile.size; ++t) {
      for (std::int64_t b = 0; b < tile.rows; ++b) {
        Storage* out =
            static_cast<Storage*>(p_.grad_x) +
            (((tile.b + b) * p_.length + tile.n + t) * p_.num_heads + head_) * p_.in_features;
        for (std::int64_t d = 0; d < p_.in_features; d += kLanes<T>)
          store_row(tile_.grad_x(d, t, b), 1, min_of(kLanes<T>, p_.in_features - d), out + d);
      }
    }
  }

  const PhasorFilterBackwardParams& p_;
  BackwardTile<T> tile_;
  std::int64_t head_ = -1;
};

// Writes the gradients of a head's parameters from the sums of the parts.
void store_sums(const PhasorFilterBackwardParams& p, std::int64_t width, std::int64_t parts,
                const double* sums, std::int64_t head_size, std::int64_t head) {
  for (std::int64_t d = 0; d < p.in_features; ++d) {
    for (std::int64_t i = 0; i < p.num_pairs; ++i) {
      const auto total = [&](std::int64_t which) {
        double sum = 0;
        for (std::int64_t part = 0; part < parts; ++part) {
          sum += sums[(head * parts + part) * head_size + (i * num_sums(p) + which) * width + d];
        }
        return sum;
      };
      const std::int64_t at = (head * p.in_features + d) * p.num_pairs + i;
      for (std::int64_t k = 0; k < 2; ++k) {
        if (p.grad_coefficients != nullptr) p.grad_coefficients[2 * at + k] = total(k);
        if (p.grad_constant != nullptr) p.grad_constant[2 * at + k] = total(2 + k);
      }
      for (std::int64_t a = 0; a < p.ndim && p.grad_freqs != nullptr; ++a)
        p.grad_freqs[at * p.ndim + a] = total(4 + a);
    }
  }
}

template <class Storage>
void backward(const PhasorFilterBackwardParams& p) {
  constexpr std::int64_t kEnoughTasks = 32;
  const Parts parts(p.length, max_of(1, kEnoughTasks / p.num_heads));
  const std::int64_t width = filled_features<core::accumulate_t<Storage>>(p);
  const std::int64_t head_size = p.num_pairs * num_sums(p) * width;
  const std::int64_t positions = p.grad_positions == nullptr ? 0 : p.length * p.ndim;
  Workspace<double> sums(p.num_heads * parts.count * head_size);
  Workspace<double> grad_positions(p.num_heads * positions);
  for (std::int64_t k = 0; k < p.num_heads * positions; ++k) grad_positions[k] = 0;

#pragma omp parallel num_threads(p.num_threads)
  {
    Backward<Storage> worker(p);
#pragma omp for schedule(static)
    for (std::int64_t task = 0; task < p.num_heads * parts.count; ++task) {
      const std::int64_t head = task / parts.count;
      const std::int64_t n0 = task % parts.count * parts.length;
      double* task_sums = sums + task * head_size;
      for (std::int64_t k = 0; k < head_size; ++k) task_sums[k] = 0;
      worker.run(head, n0, min_of(n0 + parts.length, p.length), task_sums,
                 positions > 0 ? grad_positions + head * positions : nullptr);
    }
#pragma omp for schedule(static)
    for (std::int64_t head = 0; head < p.num_heads; ++head)
      store_sums(p, width, parts.count, sums, head_size, head);
  }
  for (std::int64_t k = 0; k < positions; ++k) {
    double sum = 0;
    for (std::int64_t head = 0; head < p.num_heads; ++head)
      sum += grad_positions[head * positions + k];
    p.grad_positions[k] = sum;
  }
}

}  // namespace

void phasor_filter_forward(const PhasorFilterParams& p) {
  visit_storage(p.dtype, [&](auto storage) { forward<decltype(storage)>(p); });
}

void phasor_filter_backward(const PhasorFilterBackwardParams& p) {
  visit_storage(p.dtype, [&](auto storage) { backward<decltype(storage)>(p); });
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
