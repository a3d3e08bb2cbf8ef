#include "sine_features.h"

#include "phasors.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {
namespace {

// Rows of the batch that share phasors.
constexpr std::int64_t kSharedRows = 4;

std::int64_t num_outputs(const SineFeaturesParams& p) {
  return (2 * p.num_sines + (p.constant == nullptr ? 0 : 1)) * p.in_features;
}

// A vector of the first `count` of `lanes` numbers, zero beyond.
template <class T, class Storage>
TORCH_SPE_INLINE Vec<T> load_lanes(const Storage* in, std::int64_t stride, std::int64_t count) {
  if constexpr (sizeof(Storage) == sizeof(T)) {  // the same type
    if (count == kLanes<T> && stride == 1) return load_vec<T>(in);
  }
  alignas(64) T lanes[kLanes<T>];
  if (count == kLanes<T>) {
    load_row(in, stride, kLanes<T>, lanes);
  } else {
    for (std::int64_t l = 0; l < kLanes<T>; ++l) lanes[l] = 0;
    load_row(in, stride, count, lanes);
  }
  return load_vec(lanes);
}
template <class T, class Storage>
TORCH_SPE_INLINE void store_lanes(const Vec<T>& value, Storage* out, std::int64_t count) {
  if constexpr (sizeof(Storage) == sizeof(T)) {  // the same type
    if (count == kLanes<T>) return store_vec<T>(out, value);
  }
  alignas(64) T lanes[kLanes<T>];
  store_vec(lanes, value);
  if (count == kLanes<T>) {
    store_row(lanes, 1, kLanes<T>, out);
  } else {
    store_row(lanes, 1, count, out);
  }
}

// The phasors of all heads and sines, [H K, D], three positions at a time, in lanes of features.
template <class T>
class FeaturePhasors {
  static constexpr std::int64_t kWidth = kLanes<T>;

 public:
  explicit FeaturePhasors(const SineFeaturesParams& p)
      : p_(p),
        consecutive_(p.positions == nullptr),
        rows_(p.num_heads * p.num_sines),
        width_(round_up(p.in_features, kWidth)),
        freqs_(p.ndim * rows_ * width_),
        offsets_(2 * rows_ * width_),
        amplitudes_(rows_ * width_),
        constant_(p.num_heads * width_),
        table_(consecutive_ ? rows_ : 0, width_),
        middle_(2 * rows_ * width_) {
    const T* amplitudes = static_cast<const T*>(p.amplitudes);
    const T* constant = static_cast<const T*>(p.constant);
    for (std::int64_t row = 0; row < rows_; ++row) {
      const std::int64_t head = row / p.num_sines, k = row % p.num_sines;
      for (std::int64_t d = 0; d < width_; ++d) {
        const bool inside = d < p.in_features;
        const std::int64_t from = (head * p.in_features + d) * p.num_sines + k;
        for (std::int64_t a = 0; a < p.ndim; ++a)
          freqs_[(a * rows_ + row) * width_ + d] = inside ? p.freqs[from * p.ndim + a] : 0;
        amplitudes_[row * width_ + d] = inside ? amplitudes[from] : 0;
        const double turns = inside ? p.offsets[from] / core::kTwoPi : 0;
        core::cos_sin_cycles(core::wrap_cycles(turns), offsets_ + 2 * row * width_ + d,
                             offsets_ + (2 * row + 1) * width_ + d);
        if (k == 0)
          constant_[head * width_ + d] =
              inside && constant != nullptr ? constant[head * p.in_features + d] : 0;
      }
    }
    if (consecutive_) table_.set(rows_, freqs_, offsets_, p.length);
  }

  // Goes on to the tile's first position.
  void set_tile(const Tile& tile, bool starts_segment) {
    tile_ = tile;
    if (!consecutive_) return;
    if (tile.starts_chunk()) {
      if (starts_segment) {
        table_.start(p_.start + static_cast<double>(tile.n));
      } else {
        table_.advance_chunk();
      }
    }
    for (std::int64_t row = 0; row < rows_; ++row) {
      const T* from = table_.middle(row);
      T* to = middle_ + 2 * row * width_;
      for (std::int64_t i = 0; i < 2 * width_; ++i) to[i] = from[i];
    }
  }

  // The phasors of a row at the tile's positions t, t + 1 and t + 2; for each row and vector of
  // features t goes up in steps of three.
  TORCH_SPE_INLINE void next(std::int64_t row, std::int64_t d, std::int64_t t,
                             Complex<T> out[kTrio]) {
    if (consecutive_) {
      TrioOfPhasors<T> trio;
      T* middle = middle_ + 2 * row * width_ + d;
      trio.start(table_, row, d);
      trio.middle = load_complex<T>(middle, middle + width_);
      trio.next(out);
      store_vec(middle, trio.middle.re);
      store_vec(middle + width_, trio.middle.im);
      return;
    }
    const T* offset = offsets_ + 2 * row * width_ + d;
    for (std::int64_t j = 0; j < kTrio; ++j) {
      alignas(64) T re[kWidth], im[kWidth];
      exact_phasors(p_.ndim, freqs_ + row * width_ + d, rows_ * width_, kWidth,
                    p_.positions + min_of(tile_.n + t + j, p_.length - 1) * p_.ndim, re, im);
      out[j] = multiply(load_complex<T>(re, im), load_complex<T>(offset, offset + width_));
    }
  }

  Vec<T> amplitudes(std::int64_t row, std::int64_t d) const {
    return load_vec(amplitudes_ + row * width_ + d);
  }
  Vec<T> constant(std::int64_t head, std::int64_t d) const {
    return load_vec(constant_ + head * width_ + d);
  }
  const double* freqs(std::int64_t row, std::int64_t d) const { return freqs_ + row * width_ + d; }
  std::int64_t freqs_stride() const { return rows_ * width_; }

 private:
  const SineFeaturesParams& p_;
  const bool consecutive_;
  const std::int64_t rows_, width_;  // H K, and D filled up
  Workspace<double> freqs_;
  Workspace<T> offsets_, amplitudes_, constant_;
  PhasorTable<T> table_;
  Workspace<T> middle_;
  Tile tile_;
};

// The heads, features and batch rows of three positions lie next to each other, and are gone
// through in the order of memory: the operator costs what reading x and writing the result costs.
template <class Storage>
void forward(const SineFeaturesParams& p) {
  using T = core::accumulate_t<Storage>;
  constexpr std::int64_t kWidth = kLanes<T>;
  const std::int64_t segments = (p.length + kSegment - 1) / kSegment;
  const std::int64_t outputs = num_outputs(p), features = p.in_features;
#pragma omp parallel num_threads(p.num_threads)
  {
    FeaturePhasors<T> phasors(p);
#pragma omp for schedule(static)
    for (std::int64_t segment = 0; segment < segments; ++segment) {
      const std::int64_t n0 = segment * kSegment, n1 = min_of(n0 + kSegment, p.length);
      for (Tiles tiles(1, p.batch, kSharedRows, n0, n1); !tiles.done(); tiles.advance()) {
        const Tile tile = *tiles;
        phasors.set_tile(tile, tile.n == n0);
        for (std::int64_t t = 0; t < tile.size; t += kTrio) {
          const std::int64_t count = min_of(kTrio, tile.size - t);
          for (std::int64_t head = 0; head < p.num_heads; ++head) {
            for (std::int64_t d = 0; d < features; d += kWidth) {
              const std::int64_t lanes = min_of(kWidth, features - d);
              Vec<T> x[kSharedRows][kTrio];
              Storage* out[kSharedRows][kTrio];
              for (std::int64_t b = 0; b < tile.rows; ++b) {
                for (std::int64_t j = 0; j < count; ++j) {
                  const std::int64_t n = tile.n + t + j;
                  x[b][j] = load_lanes<T>(static_cast<const Storage*>(p.x) +
                                              (tile.b + b) * p.x_strides[0] + n * p.x_strides[1] +
                                              head * p.x_strides[2] + d * p.x_strides[3],
                                          p.x_strides[3], lanes);
                  out[b][j] = static_cast<Storage*>(p.out) +
                              (((tile.b + b) * p.length + n) * p.num_heads + head) * outputs + d;
                }
              }
              for (std::int64_t k = 0; k < p.num_sines; ++k) {
                Complex<T> e[kTrio];
                phasors.next(head * p.num_sines + k, d, t, e);
                const Vec<T> amplitude = phasors.amplitudes(head * p.num_sines + k, d);
                for (std::int64_t b = 0; b < tile.rows; ++b) {
                  for (std::int64_t j = 0; j < count; ++j) {
                    const Vec<T> scaled = amplitude * x[b][j];
                    store_lanes<T>(scaled * e[j].re, out[b][j] + 2 * k * features, lanes);
                    store_lanes<T>(scaled * e[j].im, out[b][j] + (2 * k + 1) * features, lanes);
                  }
                }
              }
              if (p.constant == nullptr) continue;
              for (std::int64_t b = 0; b < tile.rows; ++b) {
                for (std::int64_t j = 0; j < count; ++j) {
                  store_lanes<T>(phasors.constant(head, d) * x[b][j],
                                 out[b][j] + 2 * p.num_sines * features, lanes);
                }
              }
            }
          }
        }
      }
    }
  }
}

// Sums over positions. With g the output's gradient for a sine as a complex number, G = sum_b x[b]
// g[b] and w = G conj(e),
//   dx = amplitude Re(g conj(e)), damplitude = Re(w), dphase = amplitude Im(w).
// For a sine and a feature: Re(w), dphase, and the gradient of the frequency for each coordinate;
// and for a feature: the gradient of the constant.
template <class Storage>
class Backward {
  using T = core::accumulate_t<Storage>;
  static constexpr std::int64_t kWidth = kLanes<T>;

 public:
  Backward(const SineFeaturesBackwardParams& p, std::int64_t width)
      : p_(p),
        width_(width),
        phasors_(p),
        chunk_sums_(p.num_heads * p.num_sines * 3 * width),
        chunk_constant_(p.num_heads * width) {}

  static std::int64_t num_sums(const SineFeaturesParams& p) { return 2 + p.ndim; }
  // Numbers that `sums` holds.
  static std::int64_t sums_size(const SineFeaturesParams& p, std::int64_t width) {
    return p.num_heads * (p.num_sines * num_sums(p) + 1) * width;
  }

  void run(std::int64_t n0, std::int64_t n1, double* sums, double* grad_positions) {
    sums_ = sums;
    grad_positions_ = grad_positions;
    for (Tiles tiles(1, p_.batch, kSharedRows, n0, n1); !tiles.done(); tiles.advance()) {
      tile_ = *tiles;
      phasors_.set_tile(tile_, (tile_.n - n0) % kSegment == 0);
      clear_chunk_sums();
      for (std::int64_t t = 0; t < tile_.size; t += kTrio) {
        for (std::int64_t head = 0; head < p_.num_heads; ++head) {
          for (std::int64_t d = 0; d < p_.in_features; d += kWidth) trio(head, d, t);
        }
      }
      add_chunk_sums();
    }
  }

 private:
  double* sums(std::int64_t row, std::int64_t which) const {
    return sums_ + (row * num_sums(p_) + which) * width_;
  }
  double* constant_sums(std::int64_t head) const {
    return sums(p_.num_heads * p_.num_sines, 0) + head * width_;
  }

  void trio(std::int64_t head, std::int64_t d, std::int64_t t) {
    const std::int64_t count = min_of(kTrio, tile_.size - t);
    const std::int64_t lanes = min_of(kWidth, p_.in_features - d);
    const std::int64_t g_stride = p_.grad_out_strides[3];
    Vec<T> x[kSharedRows][kTrio], grad_x[kSharedRows][kTrio];
    const Storage* g[kSharedRows][kTrio];
    Vec<T> grad_constant = {};
    for (std::int64_t b = 0; b < tile_.rows; ++b) {
      for (std::int64_t j = 0; j < count; ++j) {
        const std::int64_t row = tile_.b + b, n = tile_.n + t + j;
        x[b][j] =
            load_lanes<T>(static_cast<const Storage*>(p_.x) + row * p_.x_strides[0] +
                              n * p_.x_strides[1] + head * p_.x_strides[2] + d * p_.x_strides[3],
                          p_.x_strides[3], lanes);
        g[b][j] = static_cast<const Storage*>(p_.grad_out) + row * p_.grad_out_strides[0] +
                  n * p_.grad_out_strides[1] + head * p_.grad_out_strides[2] + d * g_stride;
        grad_x[b][j] = Vec<T>{};
        if (p_.constant == nullptr) continue;
        const Vec<T> last =
            load_lanes<T>(g[b][j] + 2 * p_.num_sines * p_.in_features * g_stride, g_stride, lanes);
        grad_x[b][j] = last * phasors_.constant(head, d);
        grad_constant += last * x[b][j];
      }
    }
    if (p_.constant != nullptr) accumulate(grad_constant, chunk_constant_ + head * width_ + d);
    for (std::int64_t k = 0; k < p_.num_sines; ++k) {
      const std::int64_t row = head * p_.num_sines + k;
      const Vec<T> amplitude = phasors_.amplitudes(row, d);
      Complex<T> e[kTrio];
      phasors_.next(row, d, t, e);
      Vec<T> grad_amplitude = {}, grad_offset = {}, moment = {};
      alignas(64) T grad_phase[kTrio * kWidth];
      for (std::int64_t j = 0; j < count; ++j) {
        Complex<T> product = {};  // G
        for (std::int64_t b = 0; b < tile_.rows; ++b) {
          const Storage* at = g[b][j] + 2 * k * p_.in_features * g_stride;
          const Vec<T> re = load_lanes<T>(at, g_stride, lanes);
          const Vec<T> im = load_lanes<T>(at + p_.in_features * g_stride, g_stride, lanes);
          product.re += x[b][j] * re;
          product.im += x[b][j] * im;
          grad_x[b][j] += amplitude * (re * e[j].re + im * e[j].im);
        }
        const Vec<T> phase = amplitude * (product.im * e[j].re - product.re * e[j].im);
        grad_amplitude += product.re * e[j].re + product.im * e[j].im;
        grad_offset += phase;
        moment += static_cast<T>(t + j) * phase;
        store_vec(grad_phase + j * kWidth, phase);
      }
      T* chunk_sums = chunk_sums_ + row * 3 * width_ + d;
      accumulate(grad_amplitude, chunk_sums);
      accumulate(grad_offset, chunk_sums + width_);
      accumulate(moment, chunk_sums + 2 * width_);
      if (p_.positions != nullptr) {
        add_phase_gradients<T>(
            p_.ndim, count, grad_phase, p_.positions + (tile_.n + t) * p_.ndim,
            phasors_.freqs(row, d), phasors_.freqs_stride(), sums(row, 2) + d, width_,
            grad_positions_ == nullptr ? nullptr : grad_positions_ + (tile_.n + t) * p_.ndim);
      }
    }
    if (p_.grad_x == nullptr) return;
    for (std::int64_t b = 0; b < tile_.rows; ++b) {
      for (std::int64_t j = 0; j < count; ++j) {
        const std::int64_t row = (tile_.b + b) * p_.length + tile_.n + t + j;
        store_lanes<T>(
            grad_x[b][j],
            static_cast<Storage*>(p_.grad_x) + (row * p_.num_heads + head) * p_.in_features + d,
            lanes);
      }
    }
  }

  static TORCH_SPE_INLINE void accumulate(const Vec<T>& value, T* sum) {
    store_vec(sum, load_vec(sum) + value);
  }

  void clear_chunk_sums() {
    for (std::int64_t i = 0; i < p_.num_heads * p_.num_sines * 3 * width_; ++i) chunk_sums_[i] = 0;
    for (std::int64_t i = 0; i < p_.num_heads * width_; ++i) chunk_constant_[i] = 0;
  }

  void add_chunk_sums() {
    const double position = p_.start + static_cast<double>(tile_.n);
    for (std::int64_t row = 0; row < p_.num_heads * p_.num_sines; ++row) {
      const T* chunk = chunk_sums_ + row * 3 * width_;
      double* amplitude = sums(row, 0);
      double* offset = sums(row, 1);
      for (std::int64_t d = 0; d < width_; ++d) {
        amplitude[d] += chunk[d];
        offset[d] += chunk[width_ + d];
      }
      if (p_.positions != nullptr) continue;
      // The phase is 2 pi f n, and `moment` counts positions from the chunk's start.
      double* freq = sums(row, 2);
      for (std::int64_t d = 0; d < width_; ++d)
        freq[d] += core::kTwoPi * (position * chunk[width_ + d] + chunk[2 * width_ + d]);
    }
    for (std::int64_t head = 0; head < p_.num_heads; ++head) {
      for (std::int64_t d = 0; d < width_; ++d)
        constant_sums(head)[d] += chunk_constant_[head * width_ + d];
    }
  }

  const SineFeaturesBackwardParams& p_;
  const std::int64_t width_;  // D, filled up
  FeaturePhasors<T> phasors_;
  Workspace<T> chunk_sums_;      // [H K, 3, D]: Re(w), dphase, t dphase
  Workspace<T> chunk_constant_;  // [H, D]
  double* sums_;
  double* grad_positions_;
  Tile tile_;
};

template <class Storage>
void backward(const SineFeaturesBackwardParams& p) {
  constexpr std::int64_t kEnoughTasks = 32;
  const Parts parts(p.length, kEnoughTasks);
  const std::int64_t width = round_up(p.in_features, kLanes<core::accumulate_t<Storage>>);
  const std::int64_t size = Backward<Storage>::sums_size(p, width);
  const std::int64_t num_sums = Backward<Storage>::num_sums(p);
  Workspace<double> sums(parts.count * size);
  for (std::int64_t i = 0; i < parts.count * size; ++i) sums[i] = 0;
  // Parts share no position.
  if (p.grad_positions != nullptr) {
    for (std::int64_t i = 0; i < p.length * p.ndim; ++i) p.grad_positions[i] = 0;
  }
#pragma omp parallel num_threads(p.num_threads)
  {
    Backward<Storage> worker(p, width);
#pragma omp for schedule(static)
    for (std::int64_t part = 0; part < parts.count; ++part) {
      const std::int64_t n0 = part * parts.length;
      worker.run(n0, min_of(n0 + parts.length, p.length), sums + part * size, p.grad_positions);
    }
  }
  for (std::int64_t part = 1; part < parts.count; ++part) {
    for (std::int64_t i = 0; i < size; ++i) sums[i] += sums[part * size + i];
  }
  for (std::int64_t head = 0; head < p.num_heads; ++head) {
    for (std::int64_t d = 0; d < p.in_features; ++d) {
      const std::int64_t feature = head * p.in_features + d;
      if (p.grad_constant != nullptr)
        p.grad_constant[feature] = sums[(p.num_heads * p.num_sines * num_sums + head) * width + d];
      for (std::int64_t k = 0; k < p.num_sines; ++k) {
        const double* row = sums + (head * p.num_sines + k) * num_sums * width + d;
        const std::int64_t at = feature * p.num_sines + k;
        if (p.grad_amplitudes != nullptr) p.grad_amplitudes[at] = row[0];
        if (p.grad_offsets != nullptr) p.grad_offsets[at] = row[width];
        for (std::int64_t a = 0; a < p.ndim && p.grad_freqs != nullptr; ++a)
          p.grad_freqs[at * p.ndim + a] = row[(2 + a) * width];
      }
    }
  }
}

}  // namespace

void sine_features_forward(const SineFeaturesParams& p) {
  visit_storage(p.dtype, [&](auto storage) { forward<decltype(storage)>(p); });
}

void sine_features_backward(const SineFeaturesBackwardParams& p) {
  visit_storage(p.dtype, [&](auto storage) { backward<decltype(storage)>(p); });
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
