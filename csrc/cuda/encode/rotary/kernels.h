// Kernels of rotary positions, forward and backward.
#pragma once

#include "encode/rotary/rotation.h"

namespace torch_spe::cuda {

// Forward: a thread keeps one pair of features, a run of positions and a few batch rows.
constexpr int kRotaryBatch = 4;
constexpr int kRotaryTilePositions = kWarps * kRotaryRun;

template <class Storage>
__global__ void __launch_bounds__(kThreads) rotary_forward_kernel(const RotaryParams p) {
  using T = core::accumulate_t<Storage>;
  const std::int64_t of_head = p.in_features / 2, pairs = p.num_heads * of_head;
  const std::int64_t pair_tiles = ceil_div(pairs, kLanes);
  const std::int64_t position_tiles = ceil_div(p.length, kRotaryTilePositions);
  const std::int64_t block = blockIdx.x;
  const std::int64_t pair = block % pair_tiles * kLanes + threadIdx.x % kLanes;
  const std::int64_t n0 = block / pair_tiles % position_tiles * kRotaryTilePositions +
                          threadIdx.x / kLanes * kRotaryRun;
  const std::int64_t b0 = block / pair_tiles / position_tiles * kRotaryBatch;
  if (pair >= pairs || n0 >= p.length) return;
  const PairColumn<Storage> x(p.x, p.x_strides, pair, of_head);
  const RotaryRun<T> rotations(p, pair, n0);
  const std::int64_t end = min_of(p.batch, b0 + kRotaryBatch);
  for (std::int64_t b = b0; b < end; ++b) {
    // All loads come before the first store.
    FeaturePair<T> features[kRotaryRun];
    TORCH_SPE_UNROLL
    for (int t = 0; t < kRotaryRun; ++t)
      features[t] = n0 + t < p.length ? x.load(b, n0 + t) : FeaturePair<T>{0, 0};
    TORCH_SPE_UNROLL
    for (int t = 0; t < kRotaryRun; ++t) {
      if (n0 + t >= p.length) continue;
      const FeaturePair<T> mapped = map_pair<Storage>(p.feature_map, features[t]);
      store_pair<Storage>(p, p.out, b, n0 + t, pair, mapped.rotated(rotations.at[t]));
    }
  }
}

// Gradients of x and frequencies: each warp takes a segment of the positions, in runs, and each
// lane a pair of features, for the whole batch; they share nothing. Sums over a run's batch rows
// are in T, those over positions in double: the terms of a frequency's gradient grow with the
// position.
template <class Storage>
__global__ void __launch_bounds__(kThreads)
    rotary_backward_kernel(const RotaryBackwardParams p, std::int64_t segments,
                           double* freqs_parts) {  // [segment, H, D/2], or null
  using T = core::accumulate_t<Storage>;
  const std::int64_t of_head = p.in_features / 2, pairs = p.num_heads * of_head;
  const std::int64_t pair_tiles = ceil_div(pairs, kLanes);
  const std::int64_t block = blockIdx.x;
  const std::int64_t pair = block % pair_tiles * kLanes + threadIdx.x % kLanes;
  const std::int64_t segment = block / pair_tiles * kWarps + threadIdx.x / kLanes;
  if (pair >= pairs || segment >= segments) return;
  const PairColumn<Storage> x(p.x, p.x_strides, pair, of_head);
  const PairColumn<Storage> grad(p.grad_out, p.grad_out_strides, pair, of_head);
  const bool needs_x = freqs_parts != nullptr || p.feature_map != FeatureMap::kIdentity;
  const std::int64_t per_segment = ceil_div(ceil_div(p.length, kRotaryRun), segments) * kRotaryRun;
  const std::int64_t end = min_of(p.length, (segment + 1) * per_segment);
  double freq_sum = 0;
  for (std::int64_t n0 = segment * per_segment; n0 < end; n0 += kRotaryRun) {
    const RotaryRun<T> rotations(p, pair, n0);
    T angles[kRotaryRun] = {};  // their gradients
    for (std::int64_t b = 0; b < p.batch; ++b) {
      FeaturePair<T> gradients[kRotaryRun], features[kRotaryRun];
      TORCH_SPE_UNROLL
      for (int t = 0; t < kRotaryRun; ++t) {
        const bool inside = n0 + t < end;
        gradients[t] = inside ? grad.load(b, n0 + t) : FeaturePair<T>{0, 0};
        features[t] = inside && needs_x ? x.load(b, n0 + t) : FeaturePair<T>{0, 0};
      }
      TORCH_SPE_UNROLL
      for (int t = 0; t < kRotaryRun; ++t) {
        FeaturePair<T> gradient = gradients[t].rotated_back(rotations.at[t]);
        const FeaturePair<T> mapped = map_pair<Storage>(p.feature_map, features[t]);
        angles[t] += angle_gradient(mapped, gradient);
        if (p.grad_x == nullptr || n0 + t >= end) continue;
        if (p.feature_map != FeatureMap::kIdentity) {
          gradient = {gradient_of_input(p.feature_map, gradient.even, mapped.even),
                      gradient_of_input(p.feature_map, gradient.odd, mapped.odd)};
        }
        store_pair<Storage>(p, p.grad_x, b, n0 + t, pair, gradient);
      }
    }
    TORCH_SPE_UNROLL
    for (int t = 0; t < kRotaryRun; ++t) {
      if (n0 + t < end) freq_sum += static_cast<double>(angles[t]) * rotary_position(p, n0 + t);
    }
  }
  if (freqs_parts != nullptr) freqs_parts[segment * pairs + pair] = core::kTwoPi * freq_sum;
}

// Gradient of the positions: a block adds up all pairs and batch rows of one position.
template <class Storage>
__global__ void __launch_bounds__(kThreads)
    rotary_positions_gradient_kernel(const RotaryBackwardParams p) {
  using T = core::accumulate_t<Storage>;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  double* const warp_sums = layout.take<double>(kWarps);
  const std::int64_t n = blockIdx.x, of_head = p.in_features / 2, pairs = p.num_heads * of_head;
  const int thread = static_cast<int>(threadIdx.x);
  double sum = 0;
  for (std::int64_t pair = thread; pair < pairs; pair += kThreads) {
    const PairColumn<Storage> x(p.x, p.x_strides, pair, of_head);
    const PairColumn<Storage> grad(p.grad_out, p.grad_out_strides, pair, of_head);
    Phasor<T> rotation;
    rotation.set(p.freqs[pair], rotary_position(p, n));
    T angle = 0;
    for (std::int64_t b = 0; b < p.batch; ++b)
      angle += angle_gradient(map_pair<Storage>(p.feature_map, x.load(b, n)),
                              grad.load(b, n).rotated_back(rotation));
    sum += static_cast<double>(angle) * p.freqs[pair];
  }
  sum = warp_sum(sum);
  if (thread % kLanes == 0) warp_sums[thread / kLanes] = sum;
  __syncthreads();
  if (thread > 0) return;
  double total = 0;
  for (int warp = 0; warp < kWarps; ++warp) total += warp_sums[warp];
  p.grad_positions[n] = core::kTwoPi * total;
}

}  // namespace torch_spe::cuda
