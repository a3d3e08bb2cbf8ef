// What the rows of the output are divided by: the denominator plus eps, the root of the mean square
// plus eps, or nothing; and the gradients of the rows before the division.
#pragma once

#include "tiles.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

TORCH_SPE_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
TORCH_SPE_INLINE double square_root(double x) { return __builtin_sqrt(x); }

TORCH_SPE_INLINE bool divides_rows(const LinearAttentionParams& p) {
  return p.normalize || p.rms_norm;
}

// The divisor of a row of sums [E], padded with zeros to `width`, given its denominator.
template <class T>
TORCH_SPE_INLINE T row_divisor(const LinearAttentionParams& p, const T* row, std::int64_t width,
                               T denominator) {
  if (!p.rms_norm) return p.normalize ? denominator : T(1);
  const T mean = dot<T>(row, row, width) / static_cast<T>(p.value_features);
  return square_root(mean + static_cast<T>(p.eps));
}

// Writes row t of a chunk of outputs, and its divisor where that is wanted.
template <class T, class Storage>
TORCH_SPE_INLINE void store_divided(const LinearAttentionParams& p, const Chunk& chunk,
                                    std::int64_t t, const T* row, T divisor, Storage* out) {
  divide_row(row, divisor, p.value_features,
             contiguous_row(p, out, p.query_length, p.value_features, chunk, t));
  if (p.row_divisor != nullptr && divides_rows(p))
    *contiguous_row(p, static_cast<T*>(p.row_divisor), p.query_length, 1, chunk, t) = divisor;
}

// The quotient grad_out / divisor may overflow for tiny divisors where the gradients do not.
// Queries of such rows are taken this much larger in the backward pass, and so are their
// denominators, which leaves the outputs as they are; the gradients of the queries are multiplied
// once more in the end.
template <class T>
TORCH_SPE_INLINE T query_scale_of(T divisor) {
  constexpr T kScale = sizeof(T) == 8 ? T(0x1p512) : T(0x1p64f);
  const T magnitude = divisor < 0 ? -divisor : divisor;
  return magnitude < kSmallDivisor<T> ? kScale : T(1);
}

// A row of grad_out [E] becomes the gradient of the row of sums before the division, apart from the
// factor 1 / scale, scale = query_scale_of(divisor); `result` is the row of the output. Both are
// padded with zeros to `width`. Returns the gradient of the denominator, with the same factor.
template <class T>
TORCH_SPE_INLINE T divide_gradient(const LinearAttentionParams& p, const T* result, T divisor,
                                   T scale, std::int64_t width, T* grad) {
  if (p.rms_norm) {
    const T mean = dot<T>(grad, result, width) / static_cast<T>(p.value_features);
    for (std::int64_t e = 0; e < width; ++e) grad[e] -= result[e] * mean;
  }
  divide_row(grad, divisor * scale, width, grad);
  return p.normalize ? -dot<T>(grad, result, width) : T(0);
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
