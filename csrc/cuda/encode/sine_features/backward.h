// Kernels of the sine features' gradients.
#pragma once

#include "encode/sine_features/tile_gradients.h"

namespace torch_spe::cuda {

// Sums over positions, of the segments that they are cut into.
struct SineFeaturesParts {
  double* freqs;       // [segment, H, D, K, ndim]
  double* amplitudes;  // [segment, H, D, K]
  double* offsets;     // [segment, H, D, K]
  double* constant;    // [segment, H, D]
};

// Backward: each warp takes a segment of the positions and each lane a feature; they share nothing.
// Sums of a tile of positions and batch rows are in T, all others in double: the terms of a
// frequency's gradient grow with the position.
template <class Storage, int kBatch>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    sine_features_backward_kernel(const SineFeaturesBackwardParams p, std::int64_t segments,
                                  const SineFeaturesParts parts) {
  using T = core::accumulate_t<Storage>;
  constexpr int kTile = 16 / kBatch;  // positions
  const std::int64_t features = p.in_features;
  const std::int64_t feature_tiles = ceil_div(features, kLanes);
  const std::int64_t block = blockIdx.x;
  const std::int64_t d = block % feature_tiles * kLanes + threadIdx.x % kLanes;
  const std::int64_t head = block / feature_tiles % p.num_heads;
  const std::int64_t segment = block / feature_tiles / p.num_heads * kWarps + threadIdx.x / kLanes;
  if (d >= features || segment >= segments) return;
  const Storage* const x =
      static_cast<const Storage*>(p.x) + head * p.x_strides[2] + d * p.x_strides[3];
  const auto& strides = p.grad_out_strides;
  const Storage* const grad =
      static_cast<const Storage*>(p.grad_out) + head * strides[2] + d * strides[3];
  const T constant =
      p.constant == nullptr ? T(0) : static_cast<const T*>(p.constant)[head * features + d];
  const std::int64_t feature = (segment * p.num_heads + head) * features + d;
  const auto clear = [&](double* sums, std::int64_t count) {
    for (std::int64_t i = 0; sums != nullptr && i < count; ++i) sums[feature * count + i] = 0;
  };
  clear(parts.freqs, p.num_sines * p.ndim);
  clear(parts.amplitudes, p.num_sines);
  clear(parts.offsets, p.num_sines);
  double constant_sum = 0;

  const std::int64_t per_segment = ceil_div(ceil_div(p.length, kTile), segments) * kTile;
  const std::int64_t end = min_of(p.length, (segment + 1) * per_segment);
  for (std::int64_t n0 = segment * per_segment; n0 < end; n0 += kTile) {
    for (std::int64_t b0 = 0; b0 < p.batch; b0 += kBatch) {
      const auto inside = [&](int t, int b) { return n0 + t < end && b0 + b < p.batch; };
      const auto grad_at = [&](int t, int b, std::int64_t output) {
        return inside(t, b) ? read(grad[(b0 + b) * strides[0] + (n0 + t) * strides[1] +
                                        output * features * strides[3]])
                            : T(0);
      };
      T values[kTile][kBatch], grad_x[kTile][kBatch], tile_constant = 0;
      TORCH_SPE_UNROLL
      for (int t = 0; t < kTile; ++t) {
        TORCH_SPE_UNROLL
        for (int b = 0; b < kBatch; ++b) {
          values[t][b] =
              inside(t, b) ? read_feature(p.feature_map,
                                          x[(b0 + b) * p.x_strides[0] + (n0 + t) * p.x_strides[1]])
                           : T(0);
          const T last = p.constant == nullptr ? T(0) : grad_at(t, b, 2 * p.num_sines);
          grad_x[t][b] = last * constant;
          tile_constant += last * values[t][b];
        }
      }
      constant_sum += static_cast<double>(tile_constant);
      for (std::int64_t k = 0; k < p.num_sines; ++k) {
        const std::int64_t part = feature * p.num_sines + k;
        const SineGradients<T> sine = differentiate_sine(
            p, head, d, k, n0, end, values, grad_at, grad_x, [&](int t, T phase) {
              if (p.positions == nullptr || parts.freqs == nullptr || n0 + t >= end) return;
              for (std::int64_t i = 0; i < p.ndim; ++i)
                parts.freqs[part * p.ndim + i] += core::kTwoPi * phase * position_of(p, n0 + t, i);
            });
        if (parts.amplitudes != nullptr) parts.amplitudes[part] += sine.amplitude;
        if (parts.offsets != nullptr) parts.offsets[part] += sine.phase;
        if (parts.freqs != nullptr && p.positions == nullptr) {
          parts.freqs[part] +=
              core::kTwoPi * (static_cast<double>(sine.slope) +
                              static_cast<double>(sine.phase) * position_of(p, n0, 0));
        }
      }
      if (p.grad_x == nullptr) continue;
      TORCH_SPE_UNROLL
      for (int t = 0; t < kTile; ++t) {
        TORCH_SPE_UNROLL
        for (int b = 0; b < kBatch; ++b) {
          if (!inside(t, b)) continue;
          const T grad_value = p.feature_map == FeatureMap::kIdentity
                                   ? grad_x[t][b]
                                   : gradient_of_input(p.feature_map, grad_x[t][b], values[t][b]);
          write(grad_value, static_cast<Storage*>(p.grad_x) +
                                (((b0 + b) * p.length + n0 + t) * p.num_heads + head) * features +
                                d);
        }
      }
    }
  }
  if (parts.constant != nullptr) parts.constant[feature] = constant_sum;
}

template <class Storage>
__global__ void __launch_bounds__(kThreads)
    sine_features_positions_kernel(const SineFeaturesBackwardParams p,
                                   double* parts) {  // [H, N, ndim]
  using T = core::accumulate_t<Storage>;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  double* const warp_sums = layout.take<double>(kWarps);
  const auto& strides = p.grad_out_strides;
  sum_position_gradients(
      p, p.in_features * p.num_sines, warp_sums, parts,
      [&](std::int64_t head, std::int64_t n, std::int64_t j) {
        const std::int64_t d = j / p.num_sines, k = j % p.num_sines;
        const Storage* const x = static_cast<const Storage*>(p.x) + n * p.x_strides[1] +
                                 head * p.x_strides[2] + d * p.x_strides[3];
        const Storage* const grad = static_cast<const Storage*>(p.grad_out) + n * strides[1] +
                                    head * strides[2] + (2 * k * p.in_features + d) * strides[3];
        T re = 0, im = 0;
        for (std::int64_t b = 0; b < p.batch; ++b) {
          const T value = read_feature(p.feature_map, x[b * p.x_strides[0]]);
          re += value * read(grad[b * strides[0]]);
          im += value * read(grad[b * strides[0] + p.in_features * strides[3]]);
        }
        return RotatedSine<T>(p, head, d, k, n).phase_gradient(re, im);
      });
}

}  // namespace torch_spe::cuda
