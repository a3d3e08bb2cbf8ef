// Storage types of tensors: float16 and bfloat16 as bits, converted on load and store.
#pragma once

#include <cstdint>

#include "platform.h"

namespace torch_spe::core {

enum class DType { kFloat32, kFloat64, kFloat16, kBFloat16 };

struct Half {
  std::uint16_t bits;
};

struct BFloat16 {
  std::uint16_t bits;
};

// The type in which a storage type is computed and accumulated.
template <class T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename AccumulateType<T>::type;

TORCH_SPE_INLINE float bits_to_float(std::uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

TORCH_SPE_INLINE std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

TORCH_SPE_INLINE float load(const float& value) { return value; }
TORCH_SPE_INLINE double load(const double& value) { return value; }
TORCH_SPE_INLINE float load(const BFloat16& value) {
  return bits_to_float(static_cast<std::uint32_t>(value.bits) << 16);
}
TORCH_SPE_INLINE float load(const Half& value) {
  // Shift exponent and mantissa into place; a multiplication by 2^112 then corrects the bias and
  // normalizes subnormals. Infinity and NaN, whose exponent field was all ones, get float's all
  // ones.
  const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(value.bits & 0x7fffu) << 13;
  const std::uint32_t finite = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
  const std::uint32_t special = magnitude | 0x7f800000u;
  return bits_to_float((magnitude >= 0x0f800000u ? special : finite) | sign);
}

TORCH_SPE_INLINE void store(float value, float* out) { *out = value; }
TORCH_SPE_INLINE void store(double value, double* out) { *out = value; }
TORCH_SPE_INLINE void store(float value, BFloat16* out) {
  const std::uint32_t bits = float_to_bits(value);
  const std::uint32_t rounded =
      (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<std::uint16_t>(is_nan ? ((bits >> 16) | 0x40u) : rounded);
}
TORCH_SPE_INLINE void store(float value, Half* out) {
  const std::uint32_t bits = float_to_bits(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: rebias and round to nearest even in integers. Subnormal results: adding 0.5
  // lets the float adder round at half's last place.
  const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const std::uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const std::uint32_t overflow = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  std::uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? overflow : result;
  out->bits = static_cast<std::uint16_t>(result | sign);
}

}  // namespace torch_spe::core
