// Phases of the sines: exact range reduction at any position, and sine and cosine of a fraction of
// a cycle.
#pragma once

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

// cos(2 pi cycles) and sin(2 pi cycles) for |cycles| <= 1/2. Without branches, so that loops over
// it vectorize.
template <class T>
TORCH_SPE_INLINE void cos_sin_cycles(double cycles, T* cos_out, T* sin_out) {
  const double quarter =
      __builtin_rint(4.0 * cycles);  // nearest multiple of a quarter turn: -2 .. 2
  const T angle = static_cast<T>((cycles - 0.25 * quarter) * kTwoPi);
  const T square = angle * angle;
  const T s = sin_polynomial(angle, square);
  const T c = cos_polynomial(square);
  const int turns = static_cast<int>(quarter);
  const bool swap = (turns & 1) != 0;
  const T cos_value = swap ? s : c;
  const T sin_value = swap ? c : s;
  *cos_out = ((turns + 1) & 2) != 0 ? -cos_value : cos_value;
  *sin_out = (turns & 2) != 0 ? -sin_value : sin_value;
}

}  // namespace torch_spe::core
