// Feature maps of linear attention: the map and its derivative, for a scalar. Without branches, so
// that loops over them vectorize.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "platform.h"

namespace torch_spe::core {

enum class FeatureMap { kIdentity, kElu, kRelu };

// exp(r) for |r| <= ln(2)/2, from the Cephes library (S. Moshier), expf and exp.
TORCH_SPE_INLINE float exp_reduced(float r) {
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r + 1.0f;
}
TORCH_SPE_INLINE double exp_reduced(double r) {
  const double square = r * r;
  double p = 1.26177193074810590878e-4;
  p = p * square + 3.02994407707441961300e-2;
  p = p * square + 9.99999999999999999910e-1;
  double q = 3.00198505138664455042e-6;
  q = q * square + 2.52448340349684104192e-3;
  q = q * square + 2.27265548208155028766e-1;
  q = q * square + 2.00000000000000000005e0;
  return 1.0 + 2.0 * (r * p) / (q - r * p);
}

// exp(x) for x <= 0; NaN stays NaN, and what would be subnormal is 0. Adding 1.5 * 2^23 (2^52 in
// double) rounds to a whole number n and leaves it in the last bits, from where it becomes the
// exponent of 2^n.
TORCH_SPE_INLINE float exp_nonpositive(float x) {
  const float shifted = x * 1.44269504088896341f + 0x1.8p23f;
  const float n = shifted - 0x1.8p23f;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  const float scale = bits_to_float((float_to_bits(shifted) + 127u) << 23);
  return x < -87.3365f ? 0.0f : exp_reduced(r) * scale;
}
TORCH_SPE_INLINE double exp_nonpositive(double x) {
  const double shifted = x * 1.4426950408889634073599 + 0x1.8p52;
  const double n = shifted - 0x1.8p52;
  const double r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  std::uint64_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 1023u) << 52;
  double scale;
  __builtin_memcpy(&scale, &bits, sizeof(scale));
  return x < -708.396 ? 0.0 : exp_reduced(r) * scale;
}

// phi(x): x, elu(x) + 1 or max(x, 0).
template <FeatureMap kMap, class T>
TORCH_SPE_INLINE T apply_feature_map(T x) {
  if constexpr (kMap == FeatureMap::kElu) {
    // exp(0) is 1 exactly.
    return (x < T(0) ? T(0) : x) + exp_nonpositive(x > T(0) ? T(0) : x);
  } else if constexpr (kMap == FeatureMap::kRelu) {
    return x < T(0) ? T(0) : x;
  } else {
    return x;
  }
}

// phi'(x), given phi(x), for a scalar or a vector of the compiler's: of a loop over the lanes of
// one vector GCC makes scalar code.
template <FeatureMap kMap, class T>
TORCH_SPE_INLINE T feature_map_derivative(T phi) {
  const T zero = {}, one = zero + 1;
  if constexpr (kMap == FeatureMap::kElu) {
    return phi >= one ? one : phi;
  } else if constexpr (kMap == FeatureMap::kRelu) {
    return phi > zero ? one : zero;
  } else {
    return one;
  }
}

}  // namespace torch_spe::core
