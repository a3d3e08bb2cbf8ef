// A sine at one position after the other, in registers: what both passes of the sine features are
// made of, wherever features are stored.
#pragma once

#include "encode/phasor.h"
#include "sine_features.h"

namespace torch_spe::cuda {

// One sine of a head and feature, from position to position: lanes are features, and a rotation
// leads to the next position.
template <class T>
class RotatedSine {
 public:
  std::int64_t index;  // in [H, D, K]
  T amplitude;

  // At position n.
  TORCH_SPE_DEVICE RotatedSine(const SineFeaturesParams& p, std::int64_t head, std::int64_t d,
                               std::int64_t k, std::int64_t n)
      : index((head * p.in_features + d) * p.num_sines + k),
        amplitude(static_cast<const T*>(p.amplitudes)[index]) {
    offset_.set(p.offsets[index] * (1 / core::kTwoPi), 1.0);
    move_to(p, n);
    if (p.positions == nullptr) step_.set(p.freqs[index], 1.0);
  }

  TORCH_SPE_DEVICE void move_to(const SineFeaturesParams& p, std::int64_t n) {
    e_.set(p, p.freqs + index * p.ndim, n);
    e_.rotate(offset_);
  }
  // Only where positions are consecutive.
  TORCH_SPE_DEVICE void next() { e_.rotate(step_); }

  TORCH_SPE_DEVICE T re() const { return e_.re; }
  TORCH_SPE_DEVICE T im() const { return e_.im; }
  // Gradient of the phase, in radians, from that of e.
  TORCH_SPE_DEVICE T phase_gradient(T grad_re, T grad_im) const {
    return amplitude * (grad_im * e_.re - grad_re * e_.im);
  }

 private:
  Phasor<T> e_, offset_, step_;
};

TORCH_SPE_INLINE std::int64_t sine_features_outputs(const SineFeaturesParams& p) {
  return (2 * p.num_sines + (p.constant != nullptr ? 1 : 0)) * p.in_features;
}

}  // namespace torch_spe::cuda
