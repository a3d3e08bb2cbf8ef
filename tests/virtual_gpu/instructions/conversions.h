// What conversions do in one lane.
#pragma once

#include "arithmetic.h"

namespace vgpu {
namespace {

// Conversions.
template <class D>
struct Convert {
  template <class T>
  static D f(T a) {
    return static_cast<D>(a);
  }
};
template <class D>
struct ToInt {  // toward zero, saturating; NaN gives 0
  template <class T>
  static D f(T a) {
    if (a != a) return 0;
    const T x = std::trunc(a);
    if constexpr (std::is_signed_v<D>) {
      const T limit = static_cast<T>(-static_cast<double>(std::numeric_limits<D>::min()));
      if (x >= limit) return std::numeric_limits<D>::max();
      if (x < -limit) return std::numeric_limits<D>::min();
    } else {
      const T limit = static_cast<T>(sizeof(D) == 8 ? 0x1p64 : 0x1p32);
      if (x >= limit) return std::numeric_limits<D>::max();
      if (x <= 0) return 0;
    }
    return static_cast<D>(x);
  }
};
template <class D>
struct ToIntNear {
  template <class T>
  static D f(T a) {
    return ToInt<D>::f(std::nearbyint(a));
  }
};
template <class D>
struct ToIntFloor {
  template <class T>
  static D f(T a) {
    return ToInt<D>::f(std::floor(a));
  }
};
struct RoundNear {
  static float f(float a) { return std::nearbyint(a); }
  static double f(double a) { return std::nearbyint(a); }
};
struct RoundZero {
  static float f(float a) { return std::trunc(a); }
  static double f(double a) { return std::trunc(a); }
};
struct RoundDown {
  static float f(float a) { return std::floor(a); }
  static double f(double a) { return std::floor(a); }
};
struct RoundUp {
  static float f(float a) { return std::ceil(a); }
  static double f(double a) { return std::ceil(a); }
};
struct HalfToFloat {
  static float f(u16 a) { return of_f16(a); }
};
struct BfToFloat {
  static float f(u16 a) { return of_bf16(a); }
};
struct FloatToHalf {
  static u16 f(float a) { return f16_of(a); }
};
struct FloatToBf {
  static u16 f(float a) { return bf16_of(a); }
};
struct PairToHalf {  // the first number becomes the upper half
  static u32 f(float a, float b) { return static_cast<u32>(f16_of(a)) << 16 | f16_of(b); }
};
struct PairToBf {
  static u32 f(float a, float b) { return static_cast<u32>(bf16_of(a)) << 16 | bf16_of(b); }
};
struct ToTf32 {  // to nearest, ties away from zero; 10 bits of mantissa
  static u32 f(float a) {
    u32 b = bits_as<u32>(a);
    if ((b & 0x7f800000u) == 0x7f800000u) return (b & 0x7fffffu) ? 0x7fffffffu & ~0x1fffu : b;
    return (b + 0x1000u) & ~0x1fffu;
  }
};

}  // namespace
}  // namespace vgpu
