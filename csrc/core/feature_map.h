// Feature maps of linear attention: the map and its derivative, for a scalar. Without branches, so
// that loops over them vectorize.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "platform.h"

namespace torch_spe::core {

enum class FeatureMap { kIdentity, kElu, kRelu };

// 2^n for n down to the exponents of the smallest normal numbers.
TORCH_SPE_INLINE float power_of_two(std::int32_t n, float) {
  return bits_to_float(static_cast<std::uint32_t>(n + 127) << 23);
}
TORCH_SPE_INLINE double power_of_two(std::int32_t n, double) {
  const std::uint64_t bits = static_cast<std::uint64_t>(n + 1023) << 52;
  double value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

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

// exp(x) for x <= 0, subnormal results included; NaN stays NaN.
TORCH_SPE_INLINE float exp_nonpositive(float x) {
  const float y = x < -104.0f ? -104.0f : x;
  const float n = static_cast<float>(__builtin_rintf(y * 1.44269504088896341f));
  const float r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
  const std::int32_t whole = static_cast<std::int32_t>(n), half = whole >> 1;
  return exp_reduced(r) * power_of_two(half, 0.0f) * power_of_two(whole - half, 0.0f);
}
TORCH_SPE_INLINE double exp_nonpositive(double x) {
  const double y = x < -746.0 ? -746.0 : x;
  const double n = __builtin_rint(y * 1.4426950408889634073599);
  const double r = (y - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  const std::int32_t whole = static_cast<std::int32_t>(n), half = whole >> 1;
  return exp_reduced(r) * power_of_two(half, 0.0) * power_of_two(whole - half, 0.0);
}

// phi(x): x, elu(x) + 1 or max(x, 0).
template <FeatureMap kMap, class T>
TORCH_SPE_INLINE T apply_feature_map(T x) {
  if constexpr (kMap == FeatureMap::kElu) {
    const T e = exp_nonpositive(x > T(0) ? T(0) : x);
    return x >= T(0) ? x + T(1) : e;
  } else if constexpr (kMap == FeatureMap::kRelu) {
    return x < T(0) ? T(0) : x;
  } else {
    return x;
  }
}

// phi'(x), given phi(x).
template <FeatureMap kMap, class T>
TORCH_SPE_INLINE T feature_map_derivative(T phi) {
  if constexpr (kMap == FeatureMap::kElu) {
    return phi >= T(1) ? T(1) : phi;
  } else if constexpr (kMap == FeatureMap::kRelu) {
    return phi > T(0) ? T(1) : T(0);
  } else {
    return T(1);
  }
}

}  // namespace torch_spe::core
