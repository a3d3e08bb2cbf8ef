// Phasors e^(2 pi i f n) of many sines at consecutive positions. Included by kernels only, like
// simd.h.
#pragma once

#include "core/phase.h"
#include "cpu/simd.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

// Phasors are made three positions at a time. Their middle goes on to the next three by one
// multiplication, whose rounding adds up; it is recomputed every kPhasorChunk positions from
// phasors that themselves advance by kPhasorChunk positions at a time, and these are exact every
// kPhasorSegment positions. The error in float32 stays below 1e-6, wherever the positions lie.
constexpr std::int64_t kTrio = 3;
constexpr std::int64_t kPhasorChunk = 16 * kTrio;
constexpr std::int64_t kPhasorSegment = 4 * kPhasorChunk;

// cos and sin of the exact phases of `size` sines at a position with `ndim` coordinates.
// Frequencies of coordinate a start at freqs + a * stride.
template <class T>
TORCH_SPE_INLINE void exact_phasors(std::int64_t ndim, const double* freqs, std::int64_t stride,
                                    std::int64_t size, const double* position, T* cos_out,
                                    T* sin_out) {
  if (ndim == 1) {
    for (std::int64_t i = 0; i < size; ++i) {
      core::cos_sin_cycles(core::reduce_cycles(freqs[i], *position), cos_out + i, sin_out + i);
    }
    return;
  }
  for (std::int64_t i = 0; i < size; ++i) {
    double cycles = 0;
    for (std::int64_t a = 0; a < ndim; ++a)
      cycles += core::reduce_cycles(freqs[a * stride + i], position[a]);
    core::cos_sin_cycles(core::wrap_cycles(cycles), cos_out + i, sin_out + i);
  }
}

// The phasors c e^(2 pi i f n) of a table of sines, [rows, width], at consecutive positions, by
// chunks. Each row is a pair of planes, real and imaginary part, of `width` elements.
template <class T>
class PhasorTable {
 public:
  PhasorTable(std::int64_t most_rows, std::int64_t width)
      : width_(width),
        middle_(2 * most_rows * width),
        step_(2 * most_rows * width),
        trio_step_(2 * most_rows * width),
        chunk_step_(2 * most_rows * width) {}

  // `freqs` is [rows, width] and `coefficients`, c, [rows, 2, width]; both must live as long as the
  // table is used. No more than `length` positions will be asked for, the first one is `start`.
  void load_sines(std::int64_t rows, const double* freqs, const T* coefficients, double start,
                  std::int64_t length) {
    rows_ = rows;
    freqs_ = freqs;
    coefficients_ = coefficients;
    start_ = start;
    chunk_ = -kPhasorSegment;
    fill(1, step_);
    if (length > kTrio) fill(kTrio, trio_step_);
    if (length > kPhasorChunk) fill(kPhasorChunk, chunk_step_);
  }

  // Goes to the chunk that begins at the n-th position, n a multiple of kPhasorChunk. The phasors
  // are the same to the last bit in whatever order chunks are visited.
  void go_to(std::int64_t n) {
    if (n == chunk_) return;
    const std::int64_t segment = n / kPhasorSegment * kPhasorSegment;
    if (n == segment || n != chunk_ + kPhasorChunk) {
      chunk_ = segment;
      fill(start_ + static_cast<double>(segment) + 1, middle_);
      rotate(coefficients_);
    }
    for (; chunk_ < n; chunk_ += kPhasorChunk) rotate(chunk_step_);
  }

  // Of the present chunk.
  const T* middle(std::int64_t row) const { return middle_ + 2 * row * width_; }
  const T* step(std::int64_t row) const { return step_ + 2 * row * width_; }
  const T* trio_step(std::int64_t row) const { return trio_step_ + 2 * row * width_; }
  std::int64_t width() const { return width_; }

 private:
  void rotate(const T* by) {
    for (std::int64_t row = 0; row < rows_; ++row) {
      T* re = middle_ + 2 * row * width_;
      T* im = re + width_;
      const T* c = by + 2 * row * width_;
      const T* s = c + width_;
      for (std::int64_t i = 0; i < width_; ++i) {
        const T next = re[i] * c[i] - im[i] * s[i];
        im[i] = im[i] * c[i] + re[i] * s[i];
        re[i] = next;
      }
    }
  }

  void fill(double position, T* out) const {
    for (std::int64_t row = 0; row < rows_; ++row) {
      T* plane = out + 2 * row * width_;
      exact_phasors(1, freqs_ + row * width_, 0, width_, &position, plane, plane + width_);
    }
  }

  const std::int64_t width_;
  std::int64_t rows_ = 0;
  const double* freqs_ = nullptr;
  const T* coefficients_ = nullptr;
  double start_ = 0;
  std::int64_t chunk_ = -kPhasorSegment;  // where the present chunk begins
  // [rows, 2, width]: the phasors in the middle of the chunk's first three positions, and the
  // rotations of one position, of three, and of a chunk.
  Workspace<T> middle_, step_, trio_step_, chunk_step_;
};

template <class T>
struct Complex {
  Vec<T> re, im;
};

template <class T>
TORCH_SPE_INLINE Complex<T> load_complex(const T* re, const T* im) {
  return {load_vec(re), load_vec(im)};
}
template <class T>
TORCH_SPE_INLINE Complex<T> multiply(const Complex<T>& a, const Complex<T>& b) {
  return {a.re * b.re - a.im * b.im, a.im * b.re + a.re * b.im};
}

// One vector of sines of a table, from three positions to the next.
template <class T>
struct TrioOfPhasors {
  Complex<T> middle, step, trio_step;

  // At a chunk's start.
  TORCH_SPE_INLINE void start(const PhasorTable<T>& table, std::int64_t row, std::int64_t column) {
    const auto at = [&](const T* planes) {
      return load_complex(planes + column, planes + table.width() + column);
    };
    middle = at(table.middle(row));
    step = at(table.step(row));
    trio_step = at(table.trio_step(row));
  }

  // Both neighbours of the middle share its products with the cosine.
  TORCH_SPE_INLINE void next(Complex<T> out[kTrio]) {
    const Vec<T> re = middle.re * step.re, im = middle.im * step.re;
    out[0] = {re + middle.im * step.im, im - middle.re * step.im};
    out[1] = middle;
    out[2] = {re - middle.im * step.im, im + middle.re * step.im};
    middle = multiply(middle, trio_step);
  }
};

// Positions [n, n + size) and rows of the batch [b, b + rows) of a head of a group.
struct Tile {
  std::int64_t n, size, head, b, rows;
};

// The tiles of the positions [n0, n1): all rows of the batch, some at a time, of one head after the
// other, then the next chunk. The heads of a position lie side by side in memory.
class Tiles {
 public:
  Tiles(std::int64_t heads, std::int64_t batch, std::int64_t shared_rows, std::int64_t n0,
        std::int64_t n1)
      : heads_(heads), batch_(batch), shared_rows_(shared_rows), n1_(n1), tile_(at(n0, 0, 0)) {}

  bool done() const { return tile_.size <= 0; }
  const Tile& operator*() const { return tile_; }
  Tile next() const {
    const std::int64_t b = tile_.b + tile_.rows;
    if (b < batch_) return at(tile_.n, tile_.head, b);
    return tile_.head + 1 < heads_ ? at(tile_.n, tile_.head + 1, 0)
                                   : at(tile_.n + kPhasorChunk, 0, 0);
  }
  void advance() { tile_ = next(); }

 private:
  Tile at(std::int64_t n, std::int64_t head, std::int64_t b) const {
    return {n, min_of(kPhasorChunk, n1_ - n), head, b, min_of(shared_rows_, batch_ - b)};
  }

  const std::int64_t heads_, batch_, shared_rows_, n1_;
  Tile tile_;
};

// Calls function(t, b) for one of `steps` equal parts of a tile.
template <class Function>
TORCH_SPE_INLINE void for_part(const Tile& tile, std::int64_t step, std::int64_t steps,
                               const Function& function) {
  const std::int64_t count = max_of(tile.size, 0) * tile.rows;
  for (std::int64_t k = step * count / steps; k < (step + 1) * count / steps; ++k)
    function(k / tile.rows, k % tile.rows);
}

// The division of a sequence into parts for which the gradients of parameters are summed up apart,
// in parallel; each part starts a segment. It depends on sizes alone, so that results do not depend
// on the threads.
struct Parts {
  std::int64_t length;  // of a part
  std::int64_t count;

  Parts(std::int64_t sequence, std::int64_t most) {
    length = max_of(kPhasorSegment, round_up((sequence + most - 1) / most, kPhasorSegment));
    count = max_of(1, (sequence + length - 1) / length);
  }
};

// sum += value, lane by lane.
template <class T>
TORCH_SPE_INLINE void add_lanes(const Vec<T>& value, double* sum) {
  for (std::int64_t l = 0; l < kLanes<T>; ++l) sum[l] += value[l];
}

// From the gradients of the phases (in radians) of a vector of sines at `size` given positions,
// [size, lanes], those of the frequencies and of the positions, [size, ndim], unless null.
// Coordinate a of the frequencies starts at freqs + a * stride, of their gradients at grad_freqs +
// a
// * grad_stride.
template <class T>
TORCH_SPE_INLINE void add_phase_gradients(std::int64_t ndim, std::int64_t size, const T* grad_phase,
                                          const double* positions, const double* freqs,
                                          std::int64_t stride, double* grad_freqs,
                                          std::int64_t grad_stride, double* grad_positions) {
  for (std::int64_t a = 0; a < ndim; ++a) {
    for (std::int64_t t = 0; t < size; ++t) {
      const T* row = grad_phase + t * kLanes<T>;
      const double position = core::kTwoPi * positions[t * ndim + a];
      double* sums = grad_freqs + a * grad_stride;
      for (std::int64_t l = 0; l < kLanes<T>; ++l) sums[l] += position * row[l];
      if (grad_positions == nullptr) continue;
      double sum = 0;
      for (std::int64_t l = 0; l < kLanes<T>; ++l) sum += freqs[a * stride + l] * row[l];
      grad_positions[t * ndim + a] += core::kTwoPi * sum;
    }
  }
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
