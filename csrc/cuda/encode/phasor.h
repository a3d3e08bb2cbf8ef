// Rotations e^(2 pi i f n), which filters and features with sines share.
#pragma once

#include "core/phase.h"
#include "tiles.h"

namespace torch_spe::cuda {

constexpr int kLanes = 32;
constexpr int kWarps = kThreads / kLanes;

// Coordinate i of position n of an operator with `positions` [N, ndim], or null, and `start`.
template <class Params>
TORCH_SPE_DEVICE double position_of(const Params& p, std::int64_t n, std::int64_t i) {
  return p.positions == nullptr ? p.start + static_cast<double>(n) : p.positions[n * p.ndim + i];
}

// e^(2 pi i f n).
template <class T>
struct alignas(2 * sizeof(T)) Phasor {
  T re = 1, im = 0;

  TORCH_SPE_DEVICE void set(double freq, double position) {
    set(core::reduce_cycles(freq, position));
  }
  // `freq` [ndim] at position n of an operator.
  template <class Params>
  TORCH_SPE_DEVICE void set(const Params& p, const double* freq, std::int64_t n) {
    double cycles = core::reduce_cycles(freq[0], position_of(p, n, 0));
    if (p.ndim > 1) {
      for (std::int64_t i = 1; i < p.ndim; ++i)
        cycles += core::reduce_cycles(freq[i], position_of(p, n, i));
      cycles = core::wrap_cycles(cycles);
    }
    set(cycles);
  }
  // To 20 bits, for what is rounded to 16.
  TORCH_SPE_DEVICE void set_fast(double freq, double position) {
    fast_cos_sin(core::angle_of(core::fixed_phase(core::reduce_cycles(freq, position))), &re, &im);
  }
  TORCH_SPE_DEVICE void rotate(const Phasor& step) {
    const T next = re * step.re - im * step.im;
    im = im * step.re + re * step.im;
    re = next;
  }

 private:
  TORCH_SPE_DEVICE void set(double cycles) {
    if constexpr (sizeof(T) == 4) {
      core::cos_sin_fixed(core::fixed_phase(cycles), &re, &im);
    } else {
      core::cos_sin_cycles(cycles, &re, &im);
    }
  }
};

// Gradient of the positions, summed over one head: parts[head, n, i] = 2 pi sum_j phase(head, n, j)
// freqs[head, j, i], with phase(...) the gradient of the phase in radians of the head's j-th of
// `count` frequencies. A block takes one position of one head.
template <class Params, class Phase>
TORCH_SPE_DEVICE void sum_position_gradients(const Params& p, std::int64_t count, double* warp_sums,
                                             double* parts, const Phase& phase) {
  const std::int64_t n = blockIdx.x % p.length, head = blockIdx.x / p.length;
  const int thread = static_cast<int>(threadIdx.x);
  for (std::int64_t i = 0; i < p.ndim; ++i) {
    double sum = 0;
    for (std::int64_t j = thread; j < count; j += kThreads)
      sum += static_cast<double>(phase(head, n, j)) * p.freqs[(head * count + j) * p.ndim + i];
    sum = warp_sum(sum);
    if (thread % kLanes == 0) warp_sums[thread / kLanes] = sum;
    __syncthreads();
    if (thread == 0) {
      double total = 0;
      for (int w = 0; w < kWarps; ++w) total += warp_sums[w];
      parts[(head * p.length + n) * p.ndim + i] = core::kTwoPi * total;
    }
    __syncthreads();  // before the sums are written again
  }
}

}  // namespace torch_spe::cuda
