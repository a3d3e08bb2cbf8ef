// Gradients of the sine features of one feature at a tile of positions and batch rows: from and to
// registers, and what a function reads.
#pragma once

#include "encode/sine_features/rotated_sine.h"

namespace torch_spe::cuda {

// Of a tile and one sine, the gradients of its amplitude and of its offset, and the sum of t times
// the gradient of the phase at the tile's position t.
template <class T>
struct SineGradients {
  T amplitude = 0, phase = 0, slope = 0;
};

// From phi(x) of the tile and the gradients of its outputs, grad(t, b, output), both 0 beyond its
// end: adds to the gradients of phi(x), and returns those of sine k. with_phase(t, gradient) gets
// the gradient of the phase at each position.
template <class T, int kTile, int kBatch, class Grad, class WithPhase>
TORCH_SPE_DEVICE SineGradients<T> differentiate_sine(
    const SineFeaturesParams& p, std::int64_t head, std::int64_t d, std::int64_t k, std::int64_t n0,
    std::int64_t end, const T (&values)[kTile][kBatch], const Grad& grad,
    T (&grad_values)[kTile][kBatch], const WithPhase& with_phase) {
  RotatedSine<T> sine(p, head, d, k, n0);
  SineGradients<T> sums;
  TORCH_SPE_UNROLL
  for (int t = 0; t < kTile; ++t) {
    if (p.positions != nullptr && n0 + t < end) sine.move_to(p, n0 + t);
    T grad_re = 0, grad_im = 0;  // of e
    TORCH_SPE_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const T re = grad(t, b, 2 * k), im = grad(t, b, 2 * k + 1);
      grad_values[t][b] += sine.amplitude * (re * sine.re() + im * sine.im());
      grad_re += values[t][b] * re;
      grad_im += values[t][b] * im;
    }
    const T phase = sine.phase_gradient(grad_re, grad_im);
    sums.amplitude += grad_re * sine.re() + grad_im * sine.im();
    sums.phase += phase;
    sums.slope += phase * static_cast<T>(t);
    with_phase(t, phase);
    if (p.positions == nullptr) sine.next();
  }
  return sums;
}

}  // namespace torch_spe::cuda
