#pragma once

#include "encode/conv/line_tiles.h"

namespace torch_spe::cuda {

// The gradients of codes, sums over the batch of x times the gradient of the output:
// out[row][r - r0] for kRows positions from place.n0 + first on, which may lie outside, and
// kRealizations realizations.
template <int kRows, int kRealizations, class Storage, class Number>
TORCH_SPE_DEVICE void fill_code_gradients(const ConvFilterBackwardParams& p, const LineTile& place,
                                          std::int64_t first, std::int64_t r0, Number* out) {
  using T = core::accumulate_t<Storage>;
  constexpr int kVector = Vector<Storage>::kSize, kVectors = kRealizations / kVector;
  const auto &x_strides = p.x_strides, &strides = p.grad_out_strides;
  const bool aligned = is_aligned<Storage>(p.grad_out, strides);
  TORCH_SPE_KEEP_LOOP
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kVectors; i += kThreads) {
    const int column = i % kVectors * kVector;
    const std::int64_t token = first + i / kVectors, r = r0 + column;
    const bool inside = place.n0 + token >= 0 && place.n0 + token < p.size[2];
    const int count = inside ? static_cast<int>(min_of(kVector, p.num_realizations - r)) : 0;
    const Storage* x = static_cast<const Storage*>(p.x) + place.offset(x_strides) +
                       token * x_strides[3] + place.d * x_strides[5];
    const Storage* grad = static_cast<const Storage*>(p.grad_out) + place.offset(strides) +
                          token * strides[3] + r * strides[5];
    T sums[kVector] = {};
    if (aligned && count == kVector) {
      for (std::int64_t b = 0; b < p.batch; ++b) {
        const T value = read_feature(p.feature_map, *x);
        const auto numbers = *reinterpret_cast<const Vector<Storage>*>(grad);
        TORCH_SPE_UNROLL
        for (int e = 0; e < kVector; ++e) sums[e] += value * read(numbers.values[e]);
        x += x_strides[0];
        grad += strides[0];
      }
    } else if (count > 0) {
      for (std::int64_t b = 0; b < p.batch; ++b) {
        const T value = read_feature(p.feature_map, *x);
        TORCH_SPE_UNROLL
        for (int e = 0; e < kVector; ++e) {
          if (e < count) sums[e] += value * read(grad[e * strides[5]]);
        }
        x += x_strides[0];
        grad += strides[0];
      }
    }
    write_operands(sums, out + i / kVectors * row_of<Number>(kRealizations) + column);
  }
}

}  // namespace torch_spe::cuda
