#include "phasor_filter.h"

#include "blas.h"
#include "phasors.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {
namespace {

// Rows of the batch that are handled together, and share the phasors.
constexpr std::int64_t kRows = 16;
// Features, or pairs, whose phasors turn side by side in registers: enough to hide the latency of a
// turn.
constexpr int kFeatureGroup = kVectorBytes == 64 ? 4 : 2;
constexpr int kPairGroup = kVectorBytes == 64 ? 2 : 1;

// Forward: the lanes of a vector are pairs, so that an output is a sum over features in one lane,
// and the features of x are read as scalars.
template <class Storage>
class Forward {
  using T = core::accumulate_t<Storage>;

 public:
  explicit Forward(const PhasorFilterParams& p)
      : p_(p),
        consecutive_(p.positions == nullptr),
        features_(round_up(p.in_features, kFeatureGroup)),
        width_(round_up(p.num_pairs, kLanes<T>)),
        freqs_(p.ndim * features_ * width_),
        coefficients_(2 * features_ * width_),
        constant_(p.constant == nullptr ? 0 : 2 * features_ * width_),
        table_(consecutive_ ? features_ : 0, width_),
        phasors_(consecutive_ ? 0 : kChunk * kFeatureGroup * 2 * kLanes<T>),
        x_(kChunk * min_of(p.batch, kRows) * features_),
        y_(kChunk * min_of(p.batch, kRows) * 2 * width_) {}

  // The positions [n0, n1) of a head, of which n0 starts a segment.
  void run(std::int64_t head, std::int64_t n0, std::int64_t n1) {
    set_head(head);
    for (std::int64_t n = n0; n < n1; n += kChunk) {
      const std::int64_t size = min_of(kChunk, n1 - n);
      if (consecutive_) {
        if (n == n0) {
          table_.start(p_.start + static_cast<double>(n));
        } else {
          table_.advance_chunk();
        }
      }
      for (std::int64_t b = 0; b < p_.batch; b += kRows) {
        const std::int64_t rows = min_of(kRows, p_.batch - b);
        load_x(n, size, b, rows);
        clear_y(size * rows);
        for (std::int64_t v = 0; v < width_; v += kLanes<T>) {
          for (std::int64_t d = 0; d < features_; d += kFeatureGroup) {
            if (consecutive_) {
              accumulate<true>(size, rows, d, v);
            } else {
              fill_phasors(n, size, d, v);
              accumulate<false>(size, rows, d, v);
            }
          }
        }
        store_y(n, size, b, rows);
      }
    }
  }

 private:
  // Copies the head's parameters with pairs along the lanes: freqs [ndim, D, R/2], coefficients and
  // constant [D, 2, R/2], zero where features and pairs are filled up.
  void set_head(std::int64_t head) {
    if (head == head_) return;
    head_ = head;
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
          if (constant != nullptr) constant_[to] = inside ? constant[2 * from + part] : 0;
        }
      }
    }
    if (consecutive_) table_.set_frequencies(freqs_);
  }

  // x as [t, b, d], zero beyond D.
  void load_x(std::int64_t n, std::int64_t size, std::int64_t b0, std::int64_t rows) {
    const auto& strides = p_.x_strides;
    const Storage* x =
        static_cast<const Storage*>(p_.x) + b0 * strides[0] + n * strides[1] + head_ * strides[2];
    for (std::int64_t t = 0; t < size; ++t) {
      for (std::int64_t b = 0; b < rows; ++b) {
        T* row = x_ + (t * rows + b) * features_;
        load_row(x + b * strides[0] + t * strides[1], strides[3], p_.in_features, row);
        for (std::int64_t d = p_.in_features; d < features_; ++d) row[d] = 0;
      }
    }
  }

  // y, [t, b, 2, R/2], begins as the constant's part.
  void clear_y(std::int64_t count) {
    if (p_.constant == nullptr) {
      for (std::int64_t i = 0; i < count * 2 * width_; ++i) y_[i] = 0;
    } else {
      gemm(Op::kPlain, Op::kPlain, count, 2 * width_, features_, x_, features_, constant_,
           2 * width_, T(0), y_, 2 * width_);
    }
  }

  void store_y(std::int64_t n, std::int64_t size, std::int64_t b0, std::int64_t rows) {
    Storage* out = static_cast<Storage*>(p_.out);
    for (std::int64_t b = 0; b < rows; ++b) {
      for (std::int64_t t = 0; t < size; ++t) {
        const T* re = y_ + (t * rows + b) * 2 * width_;
        const T* im = re + width_;
        Storage* pair =
            out + (((b0 + b) * p_.length + n + t) * p_.num_heads + head_) * 2 * p_.num_pairs;
        for (std::int64_t i = 0; i < p_.num_pairs; ++i) {
          core::store(re[i], pair + 2 * i);
          core::store(im[i], pair + 2 * i + 1);
        }
      }
    }
  }

  // The exact phasors of a group of features at given positions: [t, d, 2, lanes].
  void fill_phasors(std::int64_t n, std::int64_t size, std::int64_t d, std::int64_t v) {
    constexpr std::int64_t lanes = kLanes<T>;
    for (std::int64_t t = 0; t < size; ++t) {
      for (std::int64_t g = 0; g < kFeatureGroup; ++g) {
        T* out = phasors_ + (t * kFeatureGroup + g) * 2 * lanes;
        exact_phasors(p_.ndim, freqs_ + (d + g) * width_ + v, features_ * width_, lanes,
                      p_.positions + (n + t) * p_.ndim, out, out + lanes);
      }
    }
  }

  // y += x z for the features [d, d + kFeatureGroup) and a vector of pairs at v.
  template <bool kConsecutive>
  void accumulate(std::int64_t size, std::int64_t rows, std::int64_t d, std::int64_t v) {
    constexpr int kCount = kFeatureGroup;
    Rotation<kCount, T> z;
    Vec<T> cr[kCount], ci[kCount];
    for (int g = 0; g < kCount; ++g) {
      cr[g] = load_vec(coefficients_ + 2 * (d + g) * width_ + v);
      ci[g] = load_vec(coefficients_ + (2 * (d + g) + 1) * width_ + v);
    }
    const auto scale = [&](int g, const T* re, const T* im) {
      const Vec<T> r = load_vec(re), i = load_vec(im);
      z.re[g] = r * cr[g] - i * ci[g];
      z.im[g] = i * cr[g] + r * ci[g];
    };
    if constexpr (kConsecutive) {
      for (int g = 0; g < kCount; ++g) {
        scale(g, table_.phasors(d + g) + v, table_.phasors(d + g) + width_ + v);
        z.c[g] = load_vec(table_.steps(d + g) + v);
        z.s[g] = load_vec(table_.steps(d + g) + width_ + v);
      }
    }
    for (std::int64_t t = 0; t < size; ++t) {
      if constexpr (!kConsecutive) {
        for (int g = 0; g < kCount; ++g) {
          const T* phasor = phasors_ + (t * kCount + g) * 2 * kLanes<T>;
          scale(g, phasor, phasor + kLanes<T>);
        }
      }
      for (std::int64_t b = 0; b < rows; ++b) {
        const T* x = x_ + (t * rows + b) * features_ + d;
        T* y = y_ + (t * rows + b) * 2 * width_ + v;
        Vec<T> re = load_vec(y), im = load_vec(y + width_);
        for (int g = 0; g < kCount; ++g) {
          re += x[g] * z.re[g];
          im += x[g] * z.im[g];
        }
        store_vec(y, re);
        store_vec(y + width_, im);
      }
      if constexpr (kConsecutive) z.next();
    }
  }

  const PhasorFilterParams& p_;
  const bool consecutive_;
  const std::int64_t features_, width_;  // D and R/2, filled up
  std::int64_t head_ = -1;
  Workspace<double> freqs_;
  Workspace<T> coefficients_, constant_;
  PhasorTable<T> table_;
  Workspace<T> phasors_;
  Workspace<T> x_, y_;
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

// How the backward pass is divided: into heads, vectors of features, and, when these are few, parts
// of the sequence. It depends on sizes alone, so that results do not depend on the threads.
template <class T>
struct Division {
  std::int64_t vectors;  // of features, in a head
  std::int64_t parts;    // of the sequence
  std::int64_t length;   // of a part

  explicit Division(const PhasorFilterParams& p)
      : vectors((p.in_features + kLanes<T> - 1) / kLanes<T>) {
    constexpr std::int64_t kEnoughTasks = 16;
    const std::int64_t wanted = max_of(1, kEnoughTasks / (p.num_heads * vectors));
    length = round_up((p.length + wanted - 1) / wanted, kSegment);
    parts = (p.length + length - 1) / length;
  }
};

// Sums over positions for one pair and a vector of features: the gradient of the coefficient (real,
// imaginary), of the constant (the same), and of the frequency for each dimension of the positions.
std::int64_t num_sums(const PhasorFilterParams& p) { return 4 + p.ndim; }

// Backward: the lanes of a vector are features, so that the gradient of x is a sum over pairs in
// one lane, the gradients of the parameters are sums over positions in one lane, and the output's
// gradient is read as scalars.
//
// With u = g conj(e), e = e^(2 pi i f n) and g = g_2i + i g_2i+1, and c the coefficient,
//   dx = Re(conj(c) u), summed over pairs; dc = x u; dphase = Im(conj(c) x u),
// the last two summed over positions. For consecutive positions, df needs the sum of x u and that
// of t x u in a chunk.
template <class Storage>
class Backward {
  using T = core::accumulate_t<Storage>;
  static constexpr std::int64_t kWidth = kLanes<T>;

 public:
  explicit Backward(const PhasorFilterBackwardParams& p)
      : p_(p),
        consecutive_(p.positions == nullptr),
        pairs_(round_up(p.num_pairs, kPairGroup)),
        freqs_(p.ndim * pairs_ * kWidth),
        coefficients_(2 * pairs_ * kWidth),
        constant_(p.constant == nullptr ? 0 : 2 * pairs_ * kWidth),
        table_(consecutive_ ? pairs_ : 0, kWidth),
        phasors_(consecutive_ ? 0 : kChunk * kPairGroup * 2 * kWidth),
        grad_phase_(consecutive_ ? 0 : kChunk * kPairGroup * kWidth),
        x_(kChunk * min_of(p.batch, kRows) * kWidth),
        grad_x_(kChunk * min_of(p.batch, kRows) * kWidth),
        g_(kChunk * min_of(p.batch, kRows) * 2 * pairs_) {}

  // Adds to sums [pairs, num_sums, lanes] and grad_positions [N, ndim] (or null) over the positions
  // [n0, n1), of which n0 starts a segment, and writes the gradient of x there.
  void run(std::int64_t head, std::int64_t d0, std::int64_t n0, std::int64_t n1, double* sums,
           double* grad_positions) {
    sums_ = sums;
    grad_positions_ = grad_positions;
    set_features(head, d0);
    for (std::int64_t n = n0; n < n1; n += kChunk) {
      const std::int64_t size = min_of(kChunk, n1 - n);
      if (consecutive_) {
        if ((n - n0) % kSegment == 0) {
          table_.start(p_.start + static_cast<double>(n));
        } else {
          table_.advance_chunk();
        }
      }
      for (std::int64_t b = 0; b < p_.batch; b += kRows) {
        const std::int64_t rows = min_of(kRows, p_.batch - b);
        load_tile(n, size, b, rows);
        for (std::int64_t i = 0; i < pairs_; i += kPairGroup) {
          if (!consecutive_) fill_phasors(n, size, i);
          if (p_.constant == nullptr) {
            consecutive_ ? pair_group<true, false>(n, size, rows, i)
                         : pair_group<false, false>(n, size, rows, i);
          } else {
            consecutive_ ? pair_group<true, true>(n, size, rows, i)
                         : pair_group<false, true>(n, size, rows, i);
          }
          if (!consecutive_) add_phase_gradients(n, size, i);
        }
        if (p_.grad_x != nullptr) store_grad_x(n, size, b, rows);
      }
    }
  }

 private:
  // Copies the parameters of a vector of features with these along the lanes: freqs [ndim, R/2,
  // lanes], coefficients and constant [R/2, 2, lanes], zero where features and pairs are filled up.
  void set_features(std::int64_t head, std::int64_t d0) {
    head_ = head;
    d0_ = d0;
    count_ = min_of(kWidth, p_.in_features - d0);
    const std::int64_t first = (head * p_.in_features + d0) * p_.num_pairs;
    const T* coefficients = static_cast<const T*>(p_.coefficients);
    const T* constant = static_cast<const T*>(p_.constant);
    for (std::int64_t i = 0; i < pairs_; ++i) {
      for (std::int64_t d = 0; d < kWidth; ++d) {
        const bool inside = d < count_ && i < p_.num_pairs;
        const std::int64_t from = first + d * p_.num_pairs + i;
        for (std::int64_t a = 0; a < p_.ndim; ++a)
          freqs_[(a * pairs_ + i) * kWidth + d] = inside ? p_.freqs[from * p_.ndim + a] : 0;
        for (std::int64_t part = 0; part < 2; ++part) {
          const std::int64_t to = (2 * i + part) * kWidth + d;
          coefficients_[to] = inside ? coefficients[2 * from + part] : 0;
          if (constant != nullptr) constant_[to] = inside ? constant[2 * from + part] : 0;
        }
      }
    }
    if (consecutive_) table_.set_frequencies(freqs_);
  }

  // x as [t, b, d] and the gradient as [t, b, r], zero beyond D and R; the gradient of x is
  // cleared.
  void load_tile(std::int64_t n, std::int64_t size, std::int64_t b0, std::int64_t rows) {
    const auto& xs = p_.x_strides;
    const auto& gs = p_.grad_out_strides;
    const Storage* x =
        static_cast<const Storage*>(p_.x) + b0 * xs[0] + n * xs[1] + head_ * xs[2] + d0_ * xs[3];
    const Storage* g =
        static_cast<const Storage*>(p_.grad_out) + b0 * gs[0] + n * gs[1] + head_ * gs[2];
    for (std::int64_t t = 0; t < size; ++t) {
      for (std::int64_t b = 0; b < rows; ++b) {
        const std::int64_t row = t * rows + b;
        T* x_row = x_ + row * kWidth;
        load_row(x + b * xs[0] + t * xs[1], xs[3], count_, x_row);
        for (std::int64_t d = count_; d < kWidth; ++d) x_row[d] = 0;
        T* g_row = g_ + row * 2 * pairs_;
        load_row(g + b * gs[0] + t * gs[1], gs[3], 2 * p_.num_pairs, g_row);
        for (std::int64_t r = 2 * p_.num_pairs; r < 2 * pairs_; ++r) g_row[r] = 0;
      }
    }
    for (std::int64_t i = 0; i < size * rows * kWidth; ++i) grad_x_[i] = 0;
  }

  void store_grad_x(std::int64_t n, std::int64_t size, std::int64_t b0, std::int64_t rows) {
    Storage* grad_x = static_cast<Storage*>(p_.grad_x);
    for (std::int64_t t = 0; t < size; ++t) {
      for (std::int64_t b = 0; b < rows; ++b) {
        store_row(grad_x_ + (t * rows + b) * kWidth, 1, count_,
                  grad_x +
                      (((b0 + b) * p_.length + n + t) * p_.num_heads + head_) * p_.in_features +
                      d0_);
      }
    }
  }

  // The exact phasors of a group of pairs at given positions: [t, i, 2, lanes].
  void fill_phasors(std::int64_t n, std::int64_t size, std::int64_t i) {
    for (std::int64_t t = 0; t < size; ++t) {
      for (std::int64_t g = 0; g < kPairGroup; ++g) {
        T* out = phasors_ + (t * kPairGroup + g) * 2 * kWidth;
        exact_phasors(p_.ndim, freqs_ + (i + g) * kWidth, pairs_ * kWidth, kWidth,
                      p_.positions + (n + t) * p_.ndim, out, out + kWidth);
      }
    }
  }

  // Adds the part of the pairs [i, i + kPairGroup) to the gradient of x, and to the sums what the
  // chunk contributes to them; leaves the gradients of the phases in grad_phase_ when positions are
  // given.
  template <bool kConsecutive, bool kConstant>
  void pair_group(std::int64_t n, std::int64_t size, std::int64_t rows, std::int64_t i) {
    constexpr int kCount = kPairGroup;
    Rotation<kCount, T> e;
    Vec<T> cr[kCount], ci[kCount], constant_re[kCount], constant_im[kCount];
    Vec<T> sum_re[kCount] = {}, sum_im[kCount] = {};                // of x u
    Vec<T> moment_re[kCount] = {}, moment_im[kCount] = {};          // of t x u
    Vec<T> grad_const_re[kCount] = {}, grad_const_im[kCount] = {};  // of x g
    for (int k = 0; k < kCount; ++k) {
      cr[k] = load_vec(coefficients_ + 2 * (i + k) * kWidth);
      ci[k] = load_vec(coefficients_ + (2 * (i + k) + 1) * kWidth);
      if constexpr (kConstant) {
        constant_re[k] = load_vec(constant_ + 2 * (i + k) * kWidth);
        constant_im[k] = load_vec(constant_ + (2 * (i + k) + 1) * kWidth);
      }
      if constexpr (kConsecutive) {
        e.re[k] = load_vec(table_.phasors(i + k));
        e.im[k] = load_vec(table_.phasors(i + k) + kWidth);
        e.c[k] = load_vec(table_.steps(i + k));
        e.s[k] = load_vec(table_.steps(i + k) + kWidth);
      }
    }
    for (std::int64_t t = 0; t < size; ++t) {
      Vec<T> grad_phase[kCount] = {};
      if constexpr (!kConsecutive) {
        for (int k = 0; k < kCount; ++k) {
          e.re[k] = load_vec(phasors_ + (t * kCount + k) * 2 * kWidth);
          e.im[k] = load_vec(phasors_ + ((t * kCount + k) * 2 + 1) * kWidth);
        }
      }
      for (std::int64_t b = 0; b < rows; ++b) {
        const std::int64_t row = t * rows + b;
        const T* g = g_ + row * 2 * pairs_ + 2 * i;
        const Vec<T> x = load_vec(x_ + row * kWidth);
        const Vec<T> tx = static_cast<T>(t) * x;
        Vec<T> grad_x = load_vec(grad_x_ + row * kWidth);
        for (int k = 0; k < kCount; ++k) {
          const T gr = g[2 * k], gi = g[2 * k + 1];
          const Vec<T> ur = gr * e.re[k] + gi * e.im[k];
          const Vec<T> ui = gi * e.re[k] - gr * e.im[k];
          grad_x += cr[k] * ur + ci[k] * ui;
          sum_re[k] += x * ur;
          sum_im[k] += x * ui;
          if constexpr (kConsecutive) {
            moment_re[k] += tx * ur;
            moment_im[k] += tx * ui;
          } else {
            grad_phase[k] += x * (cr[k] * ui - ci[k] * ur);
          }
          if constexpr (kConstant) {
            grad_x += constant_re[k] * gr + constant_im[k] * gi;
            grad_const_re[k] += x * gr;
            grad_const_im[k] += x * gi;
          }
        }
        store_vec(grad_x_ + row * kWidth, grad_x);
      }
      if constexpr (kConsecutive) {
        e.next();
      } else {
        for (int k = 0; k < kCount; ++k)
          store_vec(grad_phase_ + (t * kCount + k) * kWidth, grad_phase[k]);
      }
    }
    for (int k = 0; k < kCount; ++k) {
      double* sums = sums_ + (i + k) * num_sums(p_) * kWidth;
      add(sum_re[k], sums);
      add(sum_im[k], sums + kWidth);
      if constexpr (kConstant) {
        add(grad_const_re[k], sums + 2 * kWidth);
        add(grad_const_im[k], sums + 3 * kWidth);
      }
      if constexpr (kConsecutive) {
        // d phase / d f is 2 pi times the position.
        const T position = static_cast<T>(p_.start + static_cast<double>(n));
        add(static_cast<T>(core::kTwoPi) * (cr[k] * (position * sum_im[k] + moment_im[k]) -
                                            ci[k] * (position * sum_re[k] + moment_re[k])),
            sums + 4 * kWidth);
      }
    }
  }

  static TORCH_SPE_INLINE void add(Vec<T> value, double* sum) {
    for (std::int64_t l = 0; l < kWidth; ++l) sum[l] += value[l];
  }

  // For given positions: from the gradients of the phases those of frequencies and positions.
  void add_phase_gradients(std::int64_t n, std::int64_t size, std::int64_t i) {
    for (std::int64_t k = 0; k < kPairGroup; ++k) {
      for (std::int64_t a = 0; a < p_.ndim; ++a) {
        double* sums = sums_ + ((i + k) * num_sums(p_) + 4 + a) * kWidth;
        const double* freqs = freqs_ + (a * pairs_ + i + k) * kWidth;
        for (std::int64_t t = 0; t < size; ++t) {
          const T* grad_phase = grad_phase_ + (t * kPairGroup + k) * kWidth;
          const double position = core::kTwoPi * p_.positions[(n + t) * p_.ndim + a];
          for (std::int64_t l = 0; l < kWidth; ++l) sums[l] += position * grad_phase[l];
          if (grad_positions_ != nullptr) {
            double sum = 0;
            for (std::int64_t l = 0; l < kWidth; ++l) sum += freqs[l] * grad_phase[l];
            grad_positions_[(n + t) * p_.ndim + a] += core::kTwoPi * sum;
          }
        }
      }
    }
  }

  const PhasorFilterBackwardParams& p_;
  const bool consecutive_;
  const std::int64_t pairs_;  // R/2, filled up
  Workspace<double> freqs_;
  Workspace<T> coefficients_, constant_;
  PhasorTable<T> table_;
  Workspace<T> phasors_, grad_phase_;
  Workspace<T> x_, grad_x_, g_;
  // The task at hand.
  std::int64_t head_, d0_, count_;
  double* sums_;
  double* grad_positions_;
};

// Writes the gradients of a vector of features from the sums of the parts.
template <class T>
void store_sums(const PhasorFilterBackwardParams& p, const Division<T>& division,
                const double* sums, std::int64_t block_size, std::int64_t block) {
  const std::int64_t d0 = block % division.vectors * kLanes<T>;
  const std::int64_t count = min_of(kLanes<T>, p.in_features - d0);
  const std::int64_t first = (block / division.vectors * p.in_features + d0) * p.num_pairs;
  const auto total = [&](std::int64_t i, std::int64_t which, std::int64_t d) {
    double sum = 0;
    for (std::int64_t part = 0; part < division.parts; ++part) {
      sum += sums[(part * p.num_heads * division.vectors + block) * block_size +
                  (i * num_sums(p) + which) * kLanes<T> + d];
    }
    return sum;
  };
  for (std::int64_t d = 0; d < count; ++d) {
    for (std::int64_t i = 0; i < p.num_pairs; ++i) {
      const std::int64_t at = first + d * p.num_pairs + i;
      for (std::int64_t part = 0; part < 2; ++part) {
        if (p.grad_coefficients != nullptr) p.grad_coefficients[2 * at + part] = total(i, part, d);
        if (p.grad_constant != nullptr) p.grad_constant[2 * at + part] = total(i, 2 + part, d);
      }
      for (std::int64_t a = 0; a < p.ndim && p.grad_freqs != nullptr; ++a)
        p.grad_freqs[at * p.ndim + a] = total(i, 4 + a, d);
    }
  }
}

template <class Storage>
void backward(const PhasorFilterBackwardParams& p) {
  using T = core::accumulate_t<Storage>;
  const Division<T> division(p);
  const std::int64_t blocks = p.num_heads * division.vectors;
  const std::int64_t block_size = round_up(p.num_pairs, kPairGroup) * num_sums(p) * kLanes<T>;
  const std::int64_t positions = p.grad_positions == nullptr ? 0 : p.length * p.ndim;
  Workspace<double> sums(division.parts * blocks * block_size);
  Workspace<double> grad_positions(blocks * positions);
  for (std::int64_t i = 0; i < blocks * positions; ++i) grad_positions[i] = 0;

#pragma omp parallel num_threads(p.num_threads)
  {
    Backward<Storage> worker(p);
#pragma omp for schedule(static)
    for (std::int64_t task = 0; task < division.parts * blocks; ++task) {
      const std::int64_t block = task % blocks;
      const std::int64_t n0 = task / blocks * division.length;
      double* task_sums = sums + task * block_size;
      for (std::int64_t i = 0; i < block_size; ++i) task_sums[i] = 0;
      worker.run(block / division.vectors, block % division.vectors * kLanes<T>, n0,
                 min_of(n0 + division.length, p.length), task_sums,
                 positions > 0 ? grad_positions + block * positions : nullptr);
    }
#pragma omp for schedule(static)
    for (std::int64_t block = 0; block < blocks; ++block)
      store_sums<T>(p, division, sums, block_size, block);
  }
  for (std::int64_t i = 0; i < positions; ++i) {
    double sum = 0;
    for (std::int64_t block = 0; block < blocks; ++block)
      sum += grad_positions[block * positions + i];
    p.grad_positions[i] = sum;
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
