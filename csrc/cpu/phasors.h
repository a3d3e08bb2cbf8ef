// Phasors e^(2 pi i f n) of many sines at consecutive positions. Included by kernels only, like
// simd.h.
#pragma once

#include "core/phase.h"
#include "simd.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

// A phasor goes from one position to the next by a multiplication, whose rounding adds up. It is
// renewed every kChunk positions from phasors that themselves advance by kChunk positions at a
// time, and these are exact every kSegment positions. The error in float32 stays below 2e-6 and
// does not depend on how far away the positions lie.
constexpr std::int64_t kChunk = 32;
constexpr std::int64_t kSegment = 512;

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

// The phasors of a table of sines, [rows, width], at the first position of a chunk. Each row is a
// pair of planes, real and imaginary part, of `width` numbers.
template <class T>
class PhasorTable {
 public:
  PhasorTable(std::int64_t rows, std::int64_t width)
      : rows_(rows),
        width_(width),
        phasors_(2 * rows * width),
        steps_(2 * rows * width),
        chunk_steps_(2 * rows * width) {}

  // `freqs` is [rows, width], and must live as long as its phasors are asked for.
  void set_frequencies(const double* freqs) {
    freqs_ = freqs;
    fill(1, steps_);
    fill(static_cast<double>(kChunk), chunk_steps_);
  }

  void start(double position) { fill(position, phasors_); }

  void advance_chunk() {
    for (std::int64_t row = 0; row < rows_; ++row) {
      T* re = phasors_ + 2 * row * width_;
      T* im = re + width_;
      const T* c = chunk_steps_ + 2 * row * width_;
      const T* s = c + width_;
      for (std::int64_t i = 0; i < width_; ++i) {
        const T next = re[i] * c[i] - im[i] * s[i];
        im[i] = im[i] * c[i] + re[i] * s[i];
        re[i] = next;
      }
    }
  }

  const T* phasors(std::int64_t row) const { return phasors_ + 2 * row * width_; }
  const T* steps(std::int64_t row) const { return steps_ + 2 * row * width_; }  // of one position

 private:
  void fill(double position, T* out) const {
    for (std::int64_t row = 0; row < rows_; ++row) {
      T* plane = out + 2 * row * width_;
      exact_phasors(1, freqs_ + row * width_, 0, width_, &position, plane, plane + width_);
    }
  }

  const std::int64_t rows_, width_;
  const double* freqs_ = nullptr;
  Workspace<T> phasors_, steps_, chunk_steps_;  // [rows, 2, width]
};

// The phasors of kCount rows at one vector of lanes, in registers.
template <int kCount, class T>
struct Rotation {
  Vec<T> re[kCount], im[kCount], c[kCount], s[kCount];

  TORCH_SPE_INLINE void next() {
    for (int g = 0; g < kCount; ++g) {
      const Vec<T> turned = re[g] * c[g] - im[g] * s[g];
      im[g] = im[g] * c[g] + re[g] * s[g];
      re[g] = turned;
    }
  }
};

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
