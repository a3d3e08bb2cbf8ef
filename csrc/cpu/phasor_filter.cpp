#include "phasor_filter.h"

#include "phasors.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {
namespace {

// Rows of the batch that share phasors: few enough that a tile stays in the level 1 cache, more
// where the exact phases of given positions cost more than that.
std::int64_t num_shared_rows(const PhasorFilterParams& p) {
  return min_of(p.batch, p.positions == nullptr ? 4 : 16);
}

// Heads that a thread goes through side by side, as their data lie in memory: no more than leaves
// work for all threads, and than have their parameters and phasors in the level 2 cache.
std::int64_t group_heads(const PhasorFilterParams& p) {
  constexpr std::int64_t kCacheBytes = 1 << 19;
  const std::int64_t bytes =
      p.in_features * p.num_pairs * (12 * static_cast<std::int64_t>(sizeof(float)) + 8 * p.ndim);
  return max_of(1, min_of(p.num_heads / p.num_threads, kCacheBytes / max_of(bytes, 1)));
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
        rows_of_heads_(group_heads(p) * features_),
        freqs_(p.ndim * rows_of_heads_ * width_),
        coefficients_(2 * rows_of_heads_ * width_),
        constant_(2 * rows_of_heads_ * width_),
        table_(consecutive_ ? rows_of_heads_ : 0, width_),
        phasors_(consecutive_ ? 0 : kChunk * kGroup * 2 * kWidth),
        x_stride_(odd_lines<T>(features_)),
        x_(kChunk * num_shared_rows(p) * x_stride_),
        y_(kChunk * num_shared_rows(p) * 2 * width_) {}

  // Copies the parameters of heads with pairs along the lanes: freqs [ndim, heads, D, R/2],
  // coefficients and constant [heads, D, 2, R/2], zero where features and pairs are filled up.
  void set_heads(std::int64_t first, std::int64_t count) {
    const T* coefficients = static_cast<const T*>(p_.coefficients);
    const T* constant = static_cast<const T*>(p_.constant);
    for (std::int64_t row = 0; row < count * features_; ++row) {
      const std::int64_t d = row % features_;
      for (std::int64_t i = 0; i < width_; ++i) {
        const bool inside = d < p_.in_features && i < p_.num_pairs;
        const std::int64_t from =
            ((first + row / features_) * p_.in_features + d) * p_.num_pairs + i;
        for (std::int64_t a = 0; a < p_.ndim; ++a)
          freqs_[(a * rows_of_heads_ + row) * width_ + i] =
              inside ? p_.freqs[from * p_.ndim + a] : 0;
        for (std::int64_t part = 0; part < 2; ++part) {
          const std::int64_t to = (2 * row + part) * width_ + i;
          coefficients_[to] = inside ? coefficients[2 * from + part] : 0;
          constant_[to] = inside && constant != nullptr ? constant[2 * from + part] : 0;
        }
      }
    }
    if (consecutive_) table_.set(count * features_, freqs_, coefficients_, p_.length);
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

  // Makes y from x for one of the heads. Meanwhile other(step, steps) is called for steps 0 ..
  // steps - 1.
  template <class Other>
  void compute(std::int64_t head, const Other& other) {
    first_row_ = head * features_;
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
  const std::int64_t rows_of_heads_;     // of the parameters: heads times features
  Workspace<double> freqs_;
  Workspace<T> coefficients_, constant_;
  PhasorTable<T> table_;
  Workspace<T> phasors_;
  const std::int64_t x_stride_;
  Workspace<T> x_, y_;
  std::int64_t first_row_, n_, size_, rows_;  // of the tile at hand
};

template <class Storage>
class Forward {
  using T = core::accumulate_t<Storage>;

 public:
  explicit Forward(const PhasorFilterParams& p) : p_(p), tile_(p) {}

  // The positions [n0, n1), a segment, of some heads.
  void run(std::int64_t first_head, std::int64_t heads, std::int64_t n0, std::int64_t n1) {
    if (first_head != first_head_) tile_.set_heads(first_head, heads);
    first_head_ = first_head;
    for (Tiles tiles(heads, p_.batch, num_shared_rows(p_), n0, n1); !tiles.done();
         tiles.advance()) {
      const Tile tile = *tiles, next = tiles.next();
      if (tile.starts_chunk()) tile_.set_chunk(tile.n, tile.size, tile.n == n0);
      tile_.set_rows(tile.rows);
      for (std::int64_t t = 0; t < tile.size; ++t) {
        for (std::int64_t b = 0; b < tile.rows; ++b)
          load_row(x(tile, t, b), p_.x_strides[3], p_.in_features, tile_.x(t, b));
      }
      tile_.compute(tile.head, [&](std::int64_t step, std::int64_t steps) {
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
           (tile.n + t) * p_.x_strides[1] + (first_head_ + tile.head) * p_.x_strides[2];
  }

  Storage* out(const Tile& tile, std::int64_t t, std::int64_t b) const {
    return static_cast<Storage*>(p_.out) +
           (((tile.b + b) * p_.length + tile.n + t) * p_.num_heads + first_head_ + tile.head) * 2 *
               p_.num_pairs;
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
  std::int64_t first_head_ = -1;
};

template <class Storage>
void forward(const PhasorFilterParams& p) {
  const std::int64_t segments = (p.length + kSegment - 1) / kSegment;
  const std::int64_t heads = group_heads(p), groups = (p.num_heads + heads - 1) / heads;
#pragma omp parallel num_threads(p.num_threads)
  {
    Forward<Storage> worker(p);
#pragma omp for schedule(static)
    for (std::int64_t task = 0; task < groups * segments; ++task) {
      const std::int64_t n0 = task % segments * kSegment, head = task / segments * heads;
      worker.run(head, min_of(heads, p.num_heads - head), n0, min_of(n0 + kSegment, p.length));
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
        rows_of_heads_(group_heads(p) * p.num_pairs),
        freqs_(p.ndim * rows_of_heads_ * width_),
        coefficients_(2 * rows_of_heads_ * width_),
        constant_(2 * rows_of_heads_ * width_),
        table_(consecutive_ ? rows_of_heads_ : 0, width_),
        phasors_(consecutive_ ? 0 : kChunk * 2 * kWidth),
        grad_phase_(consecutive_ ? 0 : kChunk * kWidth),
        x_and_grad_x_(kChunk * num_shared_rows(p) * 2 * width_),
        g_stride_(odd_lines<T>(2 * kChunk * num_shared_rows(p))),
        g_(p.num_pairs * g_stride_) {}

  // Copies the parameters of heads with features along the lanes: freqs [ndim, heads, R/2, D],
  // coefficients and constant [heads, R/2, 2, D], zero where features are filled up.
  void set_heads(std::int64_t first, std::int64_t count) {
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
    if (consecutive_) table_.set(count * p_.num_pairs, freqs_, coefficients_, p_.length);
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

  // [D / lanes, t, b, 2, lanes]: a vector of x beside that of its gradient.
  T* x(std::int64_t d, std::int64_t t, std::int64_t b) const {
    return x_and_grad_x_ + ((d / kWidth * kChunk + t) * rows_ + b) * 2 * kWidth + d % kWidth;
  }
  T* grad_x(std::int64_t d, std::int64_t t, std::int64_t b) const { return x(d, t, b) + kWidth; }
  T* g(std::int64_t i, std::int64_t t, std::int64_t b) const {  // [R/2, t, b, 2]
    return g_ + i * g_stride_ + (t * rows_ + b) * 2;
  }

  // Where sums [R/2, num_sums, D filled up] and grad_positions [N, ndim] (or null) of a head are
  // added up.
  void set_sums(double* sums, double* grad_positions) {
    sums_ = sums;
    grad_positions_ = grad_positions;
  }

  // Makes grad_x for one of the heads and adds to its sums. Meanwhile other(step, steps) is called
  // for steps 0 .. steps - 1.
  template <class Other>
  void compute(std::int64_t head, const Other& other) {
    first_row_ = head * p_.num_pairs;
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
              width_, p_.grad_positions == nullptr ? nullptr : grad_positions_ + n_ * p_.ndim);
        } else if (p_.constant == nullptr) {
          add_pair_of_rows<false>(i, d);
        } else {
          add_pair_of_rows<true>(i, d);
        }
      }
    }
  }

  // Turns a head's sums into gradients.
  void finish_sums(std::int64_t head) {
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
  double* sums(std::int64_t i, std::int64_t which) const {
    return sums_ + (i * num_sums(p_) + which) * width_;
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
          const Complex<T> turned = {z[j].re * re + z[j].im * im, z[j].re * im - z[j].im * re};
          Vec<T> grad_x = load_vec(x_row + kWidth) + turned.re;
          if constexpr (kConstant) {
            grad_x += constant.re * re + constant.im * im;
            sum_of_products.re += row * re;
            sum_of_products.im += row * im;
          }
          store_vec(x_row + kWidth, grad_x);
          sum.re += row * turned.re;
          grad_phase = row * turned.im;
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

  const PhasorFilterBackwardParams& p_;
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
  double* sums_;
  double* grad_positions_;
  std::int64_t first_row_, n_, size_, rows_;  // of the tile at hand
};

template <class Storage>
class Backward {
  using T = core::accumulate_t<Storage>;

 public:
  explicit Backward(const PhasorFilterBackwardParams& p) : p_(p), tile_(p) {}

  // The positions [n0, n1) of some heads, of which n0 starts a segment. The heads' sums and
  // gradients of positions stand at the given distances.
  void run(std::int64_t first_head, std::int64_t heads, std::int64_t n0, std::int64_t n1,
           double* sums, std::int64_t sums_stride, double* grad_positions,
           std::int64_t positions_stride) {
    if (first_head != first_head_) tile_.set_heads(first_head, heads);
    first_head_ = first_head;
    for (Tiles tiles(heads, p_.batch, num_shared_rows(p_), n0, n1); !tiles.done();
         tiles.advance()) {
      const Tile tile = *tiles, next = tiles.next();
      if (tile.starts_chunk()) tile_.set_chunk(tile.n, tile.size, (tile.n - n0) % kSegment == 0);
      tile_.set_sums(sums + tile.head * sums_stride, grad_positions + tile.head * positions_stride);
      tile_.set_rows(tile.rows);
      load_tile(tile);
      tile_.compute(tile.head, [&](std::int64_t step, std::int64_t steps) {
        for_part(next, step, steps, [&](std::int64_t t, std::int64_t b) {
          prefetch_row(x(next, t, b), p_.x_strides[3], p_.in_features);
          prefetch_row(g(next, t, b), p_.grad_out_strides[3], 2 * p_.num_pairs);
        });
      });
      if (p_.grad_x != nullptr) store_grad_x(tile);
    }
    for (std::int64_t head = 0; head < heads; ++head) {
      tile_.set_sums(sums + head * sums_stride, nullptr);
      tile_.finish_sums(head);
    }
  }

 private:
  const Storage* x(const Tile& tile, std::int64_t t, std::int64_t b) const {
    return static_cast<const Storage*>(p_.x) + (tile.b + b) * p_.x_strides[0] +
           (tile.n + t) * p_.x_strides[1] + (first_head_ + tile.head) * p_.x_strides[2];
  }
  const Storage* g(const Tile& tile, std::int64_t t, std::int64_t b) const {
    return static_cast<const Storage*>(p_.grad_out) + (tile.b + b) * p_.grad_out_strides[0] +
           (tile.n + t) * p_.grad_out_strides[1] +
           (first_head_ + tile.head) * p_.grad_out_strides[2];
  }

  void load_tile(const Tile& tile) const {
    const std::int64_t stride = p_.x_strides[3], g_stride = p_.grad_out_strides[3];
    for (std::int64_t t = 0; t < tile.size; ++t) {
      for (std::int64_t b = 0; b < tile.rows; ++b) {
        for (std::int64_t d = 0; d < p_.in_features; d += kLanes<T>) {
          load_row(x(tile, t, b) + d * stride, stride, min_of(kLanes<T>, p_.in_features - d),
                   tile_.x(d, t, b));
        }
        const Storage* in = g(tile, t, b);
        for (std::int64_t i = 0; i < p_.num_pairs; ++i) {
          T* out = tile_.g(i, t, b);
          out[0] = core::load(in[2 * i * g_stride]);
          out[1] = core::load(in[(2 * i + 1) * g_stride]);
        }
      }
    }
  }

  void store_grad_x(const Tile& tile) const {
    for (std::int64_t t = 0; t < tile.size; ++t) {
      for (std::int64_t b = 0; b < tile.rows; ++b) {
        Storage* out =
            static_cast<Storage*>(p_.grad_x) +
            (((tile.b + b) * p_.length + tile.n + t) * p_.num_heads + first_head_ + tile.head) *
                p_.in_features;
        for (std::int64_t d = 0; d < p_.in_features; d += kLanes<T>)
          store_row(tile_.grad_x(d, t, b), 1, min_of(kLanes<T>, p_.in_features - d), out + d);
      }
    }
  }

  const PhasorFilterBackwardParams& p_;
  BackwardTile<T> tile_;
  std::int64_t first_head_ = -1;
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
  const std::int64_t heads = group_heads(p), groups = (p.num_heads + heads - 1) / heads;
  const std::int64_t positions = p.grad_positions == nullptr ? 0 : p.length * p.ndim;
  Workspace<double> sums(p.num_heads * parts.count * head_size);
  Workspace<double> grad_positions(p.num_heads * positions);
  for (std::int64_t k = 0; k < p.num_heads * positions; ++k) grad_positions[k] = 0;

#pragma omp parallel num_threads(p.num_threads)
  {
    Backward<Storage> worker(p);
#pragma omp for schedule(static)
    for (std::int64_t task = 0; task < groups * parts.count; ++task) {
      const std::int64_t first = task / parts.count * heads, part = task % parts.count;
      const std::int64_t count = min_of(heads, p.num_heads - first), n0 = part * parts.length;
      // Sums are [H, parts, head_size].
      double* task_sums = sums + (first * parts.count + part) * head_size;
      for (std::int64_t head = 0; head < count; ++head) {
        for (std::int64_t k = 0; k < head_size; ++k)
          task_sums[head * parts.count * head_size + k] = 0;
      }
      worker.run(first, count, n0, min_of(n0 + parts.length, p.length), task_sums,
                 parts.count * head_size, grad_positions + first * positions, positions);
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
