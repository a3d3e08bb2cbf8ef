// Kernel of the sine features' forward pass.
#pragma once

#include "encode/sine_features/rotated_sine.h"

namespace torch_spe::cuda {

// Forward: each thread keeps one feature and some consecutive positions, for the whole batch.
constexpr int kThreadPositions = 8;
constexpr int kFeatureTilePositions = kWarps * kThreadPositions;

template <class Storage>
__global__ void __launch_bounds__(kThreads)
    sine_features_forward_kernel(const SineFeaturesParams p) {
  using T = core::accumulate_t<Storage>;
  const std::int64_t features = p.in_features, outputs = sine_features_outputs(p);
  const std::int64_t feature_tiles = ceil_div(features, kLanes);
  const std::int64_t position_tiles = ceil_div(p.length, kFeatureTilePositions);
  const std::int64_t block = blockIdx.x;
  const std::int64_t d = block % feature_tiles * kLanes + threadIdx.x % kLanes;
  const std::int64_t n0 = block / feature_tiles % position_tiles * kFeatureTilePositions +
                          threadIdx.x / kLanes * kThreadPositions;
  const std::int64_t head = block / feature_tiles / position_tiles;
  if (d >= features) return;
  const Storage* const x =
      static_cast<const Storage*>(p.x) + head * p.x_strides[2] + d * p.x_strides[3];
  Storage* const out = static_cast<Storage*>(p.out) + head * outputs + d;
  const std::int64_t out_stride = p.num_heads * outputs;
  const std::int64_t end = min_of(p.length, n0 + kThreadPositions);
  for (std::int64_t k = 0; k < p.num_sines && n0 < end; ++k) {
    RotatedSine<T> sine(p, head, d, k, n0);
    for (std::int64_t n = n0; n < end; ++n) {
      if (p.positions != nullptr) sine.move_to(p, n);
      const T re = sine.amplitude * sine.re(), im = sine.amplitude * sine.im();
      for (std::int64_t b = 0; b < p.batch; ++b) {
        const T value = read_feature(p.feature_map, x[b * p.x_strides[0] + n * p.x_strides[1]]);
        Storage* const to = out + (b * p.length + n) * out_stride + 2 * k * features;
        write(value * re, to);
        write(value * im, to + features);
      }
      if (p.positions == nullptr) sine.next();
    }
  }
  if (p.constant == nullptr) return;
  const T constant = static_cast<const T*>(p.constant)[head * features + d];
  for (std::int64_t n = n0; n < end; ++n) {
    for (std::int64_t b = 0; b < p.batch; ++b) {
      write(read_feature(p.feature_map, x[b * p.x_strides[0] + n * p.x_strides[1]]) * constant,
            out + (b * p.length + n) * out_stride + 2 * p.num_sines * features);
    }
  }
}

}  // namespace torch_spe::cuda
