// Phases of the sines: exact range reduction at any position, and sine and cosine of a fraction of
// a cycle.
#pragma once

#include <cstdint>

#include "platform.h"

namespace torch_spe::core {

constexpr double kTwoPi = 6.283185307179586476925286766559;

// Fraction of a cycle, in [-1/2, 1/2], of frequency * position. The fused multiply-add makes the
// difference to the nearest whole number exact but for one rounding, so that a phase at position
// 10^6 is as good as one at 10.
TORCH_SPE_INLINE double reduce_cycles(double freq, double position) {
  return __builtin_fma(freq, position, -__builtin_rint(freq * position));
}

// For a sum of terms that are reduced already (positions on a grid with several dimensions).
TORCH_SPE_INLINE double wrap_cycles(double cycles) { return cycles - __builtin_rint(cycles); }

// Polynomials for |angle| <= pi/4 from the Cephes library (S. Moshier), sinf/cosf and sin/cos.
TORCH_SPE_INLINE float sin_polynomial(float angle, float square) {
  float p = -1.9515295891e-4f;
  p = p * square + 8.3321608736e-3f;
  p = p * square - 1.6666654611e-1f;
  return p * square * angle + angle;
}
TORCH_SPE_INLINE float cos_polynomial(float square) {
  float p = 2.443315711809948e-5f;
  p = p * square - 1.388731625493765e-3f;
  p = p * square + 4.166664568298827e-2f;
  return p * square * square - 0.5f * square + 1.0f;
}
TORCH_SPE_INLINE double sin_polynomial(double angle, double square) {
  double p = 1.58962301576546568060e-10;
  p = p * square - 2.50507477628578072866e-8;
  p = p * square + 2.75573136213857245213e-6;
  p = p * square - 1.98412698295895385996e-4;
  p = p * square + 8.33333333332211858878e-3;
  p = p * square - 1.66666666666666307295e-1;
  return p * square * angle + angle;
}
TORCH_SPE_INLINE double cos_polynomial(double square) {
  double p = -1.13585365213876817300e-11;
  p = p * square + 2.08757008419747316778e-9;
  p = p * square - 2.75573141792967388112e-7;
  p = p * square + 2.48015872888517045348e-5;
  p = p * square - 1.38888888888730564116e-3;
  p = p * square + 4.16666666666665929218e-2;
  return p * square * square - 0.5 * square + 1.0;
}

// cos and sin of `turns` quarter turns and an angle of at most an eighth. Without branches, so that
// loops over it vectorize.
template <class T>
TORCH_SPE_INLINE void cos_sin_turned(T angle, int turns, T* cos_out, T* sin_out) {
  const T square = angle * angle;
  const T s = sin_polynomial(angle, square);
  const T c = cos_polynomial(square);
  const bool swap = (turns & 1) != 0;
  const T cos_value = swap ? s : c;
  const T sin_value = swap ? c : s;
  *cos_out = ((turns + 1) & 2) != 0 ? -cos_value : cos_value;
  *sin_out = (turns & 2) != 0 ? -sin_value : sin_value;
}

// cos(2 pi cycles) and sin(2 pi cycles) for |cycles| <= 1/2.
template <class T>
TORCH_SPE_INLINE void cos_sin_cycles(double cycles, T* cos_out, T* sin_out) {
  const double quarter =
      __builtin_rint(4.0 * cycles);  // nearest multiple of a quarter turn: -2 .. 2
  cos_sin_turned(static_cast<T>((cycles - 0.25 * quarter) * kTwoPi), static_cast<int>(quarter),
                 cos_out, sin_out);
}

// A phase in units of 2^-32 cycles, whose overflow is the period: GPUs are slow in double.
TORCH_SPE_INLINE std::uint32_t fixed_phase(double cycles) {
  // The sum's last bit is worth 2^-32.
  const double shifted = cycles + 0x1.8p20;
  std::uint64_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  return static_cast<std::uint32_t>(bits);
}
// In radians, from -pi.
TORCH_SPE_INLINE float angle_of(std::uint32_t phase) {
  return static_cast<float>(static_cast<std::int32_t>(phase)) *
         static_cast<float>(kTwoPi * 0x1p-32);
}
TORCH_SPE_INLINE void cos_sin_fixed(std::uint32_t phase, float* cos_out, float* sin_out) {
  const std::uint32_t turns = (phase + 0x20000000u) >> 30;
  cos_sin_turned(angle_of(phase - (turns << 30)), static_cast<int>(turns), cos_out, sin_out);
}

// The phases of a frequency at start, start + 1, ... in units of 2^-64 cycles: without rounding
// from one to the next.
struct FixedPhases {
  std::uint64_t origin = 0, step = 0;

  TORCH_SPE_INLINE void set(double freq, double start) {
    origin = fixed(reduce_cycles(freq, start));
    step = fixed(reduce_cycles(freq, 1.0));
  }
  // In units of 2^-32 cycles: the n-th, and the difference of neighbours.
  TORCH_SPE_INLINE std::uint32_t at(std::int64_t n) const {
    return static_cast<std::uint32_t>((origin + static_cast<std::uint64_t>(n) * step) >> 32);
  }
  TORCH_SPE_INLINE std::uint32_t short_step() const {
    return static_cast<std::uint32_t>(step >> 32);
  }

 private:
  TORCH_SPE_INLINE static std::uint64_t fixed(double cycles) {
    return static_cast<std::uint64_t>(static_cast<std::int64_t>(cycles * 0x1p63)) << 1;
  }
};

}  // namespace torch_spe::core
