// What arithmetic instructions do in one lane: exact, approximate, and in 16-bit pairs.
#pragma once

#include "lanes.h"

namespace vgpu {
namespace {

// Floating-point functions of the device.
float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// A number in [-1, 1] that depends on the bits of x only: with Options::rough the error of an
// approximate function goes anywhere within its bound, and is the same in every run.
double error_of(float x) {
  u32 h = bits_as<u32>(x) * 0x9e3779b1u;
  h ^= h >> 15;
  h *= 0x85ebca6bu;
  h ^= h >> 13;
  return static_cast<double>(h) * 0x1p-31 - 1.0;
}
bool rough = false;
double with_absolute(double y, double bound, float x) {
  return rough ? y + bound * error_of(x) : y;
}
double with_relative(double y, double bound, float x) {
  return rough ? y * (1.0 + bound * error_of(x)) : y;
}

// Bits and rounding of 16-bit types. To nearest even, NaN to the canonical one.
u16 bf16_of(float x) {
  u32 b = bits_as<u32>(x);
  if ((b & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  b += 0x7fffu + (b >> 16 & 1u);
  return static_cast<u16>(b >> 16);
}
float of_bf16(u16 x) { return bits_as<float>(static_cast<u32>(x) << 16); }
u16 f16_of(float x) {
  if (x != x) return 0x7fff;
  return bits_as<u16>(static_cast<_Float16>(x));
}
float of_f16(u16 x) { return static_cast<float>(bits_as<_Float16>(x)); }

// a + b to double, rounded to odd: a later rounding to fewer bits is then exact to nearest.
double add_to_odd(double a, double b) {
  const double s = a + b;
  if (!std::isfinite(s)) return s;
  const double bb = s - a;
  const double error = (a - (s - bb)) + (b - bb);
  if (error == 0 || (bits_as<u64>(s) & 1u)) return s;
  // The neighbour on the side of the error has an odd last bit.
  return std::nextafter(s, error > 0 ? std::numeric_limits<double>::infinity()
                                     : -std::numeric_limits<double>::infinity());
}
// double to float, rounded to odd.
float to_odd_float(double x) {
  const float f = static_cast<float>(x);
  if (!std::isfinite(f) || static_cast<double>(f) == x || (bits_as<u32>(f) & 1u)) return f;
  return std::nextafterf(f, x > static_cast<double>(f) ? std::numeric_limits<float>::infinity()
                                                       : -std::numeric_limits<float>::infinity());
}
u16 fma_bf16(u16 a, u16 b, u16 c) {
  const double product = static_cast<double>(of_bf16(a)) * static_cast<double>(of_bf16(b));
  return bf16_of(to_odd_float(add_to_odd(product, static_cast<double>(of_bf16(c)))));
}
u16 fma_f16(u16 a, u16 b, u16 c) {
  const double product = static_cast<double>(of_f16(a)) * static_cast<double>(of_f16(b));
  return f16_of(to_odd_float(add_to_odd(product, static_cast<double>(of_f16(c)))));
}

struct Add {
  template <class T>
  static T f(T a, T b) {
    return static_cast<T>(a + b);
  }
};
struct Sub {
  template <class T>
  static T f(T a, T b) {
    return static_cast<T>(a - b);
  }
};
struct Mul {
  template <class T>
  static T f(T a, T b) {
    return static_cast<T>(a * b);
  }
};
template <class W>
struct MulWide {  // W is the wide type
  template <class T>
  static W f(T a, T b) {
    return static_cast<W>(a) * static_cast<W>(b);
  }
};
struct MulHi {
  static u32 f(u32 a, u32 b) { return static_cast<u32>(static_cast<u64>(a) * b >> 32); }
  static s32 f(s32 a, s32 b) { return static_cast<s32>(static_cast<s64>(a) * b >> 32); }
  static u64 f(u64 a, u64 b) {
    return static_cast<u64>(static_cast<unsigned __int128>(a) * b >> 64);
  }
  static s64 f(s64 a, s64 b) { return static_cast<s64>(static_cast<__int128>(a) * b >> 64); }
};
struct MadLo {
  template <class T>
  static T f(T a, T b, T c) {
    return static_cast<T>(a * b + c);
  }
};
struct MadHi {
  template <class T>
  static T f(T a, T b, T c) {
    using U = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<U>(MulHi::f(a, b)) + static_cast<U>(c));
  }
};
template <class W>
struct MadWide {
  template <class T>
  static W f(T a, T b, W c) {
    using U = std::make_unsigned_t<W>;
    return static_cast<W>(static_cast<U>(static_cast<W>(a) * static_cast<W>(b)) +
                          static_cast<U>(c));
  }
};
struct Div {  // of integers; by zero it is unspecified
  template <class T>
  static T f(T a, T b) {
    if (b == 0) return static_cast<T>(~T(0));
    if constexpr (std::is_signed_v<T>) {
      if (b == -1) return static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a));
    }
    return static_cast<T>(a / b);
  }
};
struct Rem {
  template <class T>
  static T f(T a, T b) {
    if (b == 0) return a;
    if constexpr (std::is_signed_v<T>) {
      if (b == -1) return 0;
    }
    return static_cast<T>(a % b);
  }
};
struct DivReal {
  template <class T>
  static T f(T a, T b) {
    return a / b;
  }
};
struct AddRz {
  static float f(float a, float b) {
    const float s = a + b;
    if (!std::isfinite(s)) return s;
    const float bb = s - a;
    const float error = (a - (s - bb)) + (b - bb);
    return (error < 0 && s > 0) || (error > 0 && s < 0) ? std::nextafterf(s, 0.0f) : s;
  }
};
struct Fma {
  static float f(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static double f(double a, double b, double c) { return __builtin_fma(a, b, c); }
};
struct Min {
  template <class T>
  static T f(T a, T b) {
    return b < a ? b : a;
  }
  static float f(float a, float b) {
    return a != a ? b : b != b ? a : b < a || (a == b && std::signbit(b)) ? b : a;
  }
  static double f(double a, double b) {
    return a != a ? b : b != b ? a : b < a || (a == b && std::signbit(b)) ? b : a;
  }
};
struct Max {
  template <class T>
  static T f(T a, T b) {
    return a < b ? b : a;
  }
  static float f(float a, float b) {
    return a != a ? b : b != b ? a : a < b || (a == b && std::signbit(a)) ? b : a;
  }
  static double f(double a, double b) {
    return a != a ? b : b != b ? a : a < b || (a == b && std::signbit(a)) ? b : a;
  }
};
struct And {
  template <class T>
  static T f(T a, T b) {
    return a & b;
  }
};
struct Or {
  template <class T>
  static T f(T a, T b) {
    return a | b;
  }
};
struct Xor {
  template <class T>
  static T f(T a, T b) {
    return a ^ b;
  }
};
struct Not {
  template <class T>
  static T f(T a) {
    return static_cast<T>(~a);
  }
};
struct Neg {
  template <class T>
  static T f(T a) {
    return static_cast<T>(-a);
  }
};
struct Abs {
  static float f(float a) { return std::fabs(a); }
  static double f(double a) { return std::fabs(a); }
  static s32 f(s32 a) { return a < 0 ? static_cast<s32>(0u - static_cast<u32>(a)) : a; }
  static s64 f(s64 a) { return a < 0 ? static_cast<s64>(0ull - static_cast<u64>(a)) : a; }
};
struct Shl {
  template <class T>
  static T f(T a, u32 n) {
    return n >= sizeof(T) * 8 ? T(0) : static_cast<T>(a << n);
  }
};
struct Shr {
  template <class T>
  static T f(T a, u32 n) {
    constexpr u32 kMost = sizeof(T) * 8 - 1;
    if constexpr (std::is_signed_v<T>) return static_cast<T>(a >> (n > kMost ? kMost : n));
    return n > kMost ? T(0) : static_cast<T>(a >> n);
  }
};
struct Mov {
  template <class T>
  static T f(T a) {
    return a;
  }
};
struct RcpReal {
  template <class T>
  static T f(T a) {
    return T(1) / a;
  }
};
struct SqrtReal {
  static float f(float a) { return std::sqrt(a); }
  static double f(double a) { return std::sqrt(a); }
};
struct CosApprox {
  static float f(float a) {
    const float x = flush(a);
    return flush(static_cast<float>(with_absolute(
        rough ? std::cos(static_cast<double>(x)) : static_cast<double>(std::cos(x)), 0x1p-20, x)));
  }
};
struct SinApprox {
  static float f(float a) {
    const float x = flush(a);
    return flush(static_cast<float>(
        with_absolute(rough ? std::sin(static_cast<double>(x)) : static_cast<double>(std::sin(x)),
                      x == 0 ? 0.0 : 0x1p-20, x)));
  }
};
struct Lg2Approx {
  static float f(float a) {
    const float x = flush(a);
    return flush(static_cast<float>(
        with_absolute(rough ? std::log2(static_cast<double>(x)) : static_cast<double>(std::log2(x)),
                      0x1p-22, x)));
  }
};
struct Ex2Approx {
  static float f(float a) {
    const float x = flush(a);
    return flush(static_cast<float>(
        with_relative(rough ? std::exp2(static_cast<double>(x)) : static_cast<double>(std::exp2(x)),
                      0x1p-22, x)));
  }
};
struct SqrtApprox {
  static float f(float a) {
    const float x = flush(a);
    return flush(static_cast<float>(with_relative(std::sqrt(static_cast<double>(x)), 0x1p-23, x)));
  }
};
struct RsqrtApprox {
  static float f(float a) {
    const float x = flush(a);
    return flush(
        static_cast<float>(with_relative(1.0 / std::sqrt(static_cast<double>(x)), 0x1p-22, x)));
  }
};
struct RcpApprox {
  static float f(float a) {
    const float x = flush(a);
    return flush(static_cast<float>(with_relative(1.0 / static_cast<double>(x), 0x1p-23, x)));
  }
};
struct TanhApprox {
  static float f(float a) {
    return static_cast<float>(with_relative(std::tanh(static_cast<double>(a)), 0x1p-11, a));
  }
};
// A coarse reciprocal: only the upper 32 bits of the result.
struct RcpCoarse {
  static double f(double a) {
    const double x = std::fabs(a) < 0x1p-1022 ? std::copysign(0.0, a) : a;
    const double y = 1.0 / x;
    if (y != y) return y;
    const double cut = bits_as<double>(bits_as<u64>(y) & 0xffffffff00000000ull);
    return std::fabs(cut) < 0x1p-1022 ? std::copysign(0.0, cut) : cut;
  }
};
struct Popc {
  static u32 f(u32 a) { return static_cast<u32>(__builtin_popcount(a)); }
};
struct Popc64 {
  static u32 f(u64 a) { return static_cast<u32>(__builtin_popcountll(a)); }
};
struct Clz {
  static u32 f(u32 a) { return a == 0 ? 32u : static_cast<u32>(__builtin_clz(a)); }
};
struct Clz64 {
  static u32 f(u64 a) { return a == 0 ? 64u : static_cast<u32>(__builtin_clzll(a)); }
};
struct Brev {
  static u32 f(u32 a) {
    u32 r = 0;
    for (int i = 0; i < 32; ++i) r |= (a >> i & 1u) << (31 - i);
    return r;
  }
};
struct CopySign {
  static float f(float a, float b) { return std::copysign(b, a); }
  static double f(double a, double b) { return std::copysign(b, a); }
};
struct ShfL {
  static u32 f(u32 a, u32 b, u32 n) {
    const u64 both = static_cast<u64>(b) << 32 | a;
    return static_cast<u32>(both << (n & 31u) >> 32);
  }
};
struct ShfR {
  static u32 f(u32 a, u32 b, u32 n) {
    const u64 both = static_cast<u64>(b) << 32 | a;
    return static_cast<u32>(both >> (n & 31u));
  }
};
struct Prmt {
  static u32 f(u32 a, u32 b, u32 c) {
    const u64 both = static_cast<u64>(b) << 32 | a;
    u32 r = 0;
    for (int i = 0; i < 4; ++i) {
      const u32 s = c >> (4 * i) & 15u;
      u32 byte = static_cast<u32>(both >> (8 * (s & 7u))) & 255u;
      if (s & 8u) byte = byte & 128u ? 255u : 0u;
      r |= byte << (8 * i);
    }
    return r;
  }
};
struct MulF16x2 {
  static u32 f(u32 a, u32 b) {
    const u32 low = f16_of(of_f16(static_cast<u16>(a)) * of_f16(static_cast<u16>(b)));
    const u32 high = f16_of(of_f16(static_cast<u16>(a >> 16)) * of_f16(static_cast<u16>(b >> 16)));
    return high << 16 | low;
  }
};
struct MulBf16x2 {
  static u32 f(u32 a, u32 b) {
    const u32 low = bf16_of(of_bf16(static_cast<u16>(a)) * of_bf16(static_cast<u16>(b)));
    const u32 high =
        bf16_of(of_bf16(static_cast<u16>(a >> 16)) * of_bf16(static_cast<u16>(b >> 16)));
    return high << 16 | low;
  }
};
struct FmaF16x2 {
  static u32 f(u32 a, u32 b, u32 c) {
    const u32 low = fma_f16(static_cast<u16>(a), static_cast<u16>(b), static_cast<u16>(c));
    const u32 high =
        fma_f16(static_cast<u16>(a >> 16), static_cast<u16>(b >> 16), static_cast<u16>(c >> 16));
    return high << 16 | low;
  }
};
struct FmaBf16x2 {
  static u32 f(u32 a, u32 b, u32 c) {
    const u32 low = fma_bf16(static_cast<u16>(a), static_cast<u16>(b), static_cast<u16>(c));
    const u32 high =
        fma_bf16(static_cast<u16>(a >> 16), static_cast<u16>(b >> 16), static_cast<u16>(c >> 16));
    return high << 16 | low;
  }
};

}  // namespace
}  // namespace vgpu
