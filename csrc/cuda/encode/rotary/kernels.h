// Kernels of rotary positions, forward and backward.
#pragma once

#include "encode/rotary/rotation.h"

namespace torch_spe::cuda {

// Blocks of 8 warps, each lane with neighbouring pairs of features. A warp takes units, a run of
// positions for some batch rows, of which it loads all of a row before it computes anything: what
// is under way together keeps the memory busy.
constexpr int kRotaryWarps = 8, kRotaryThreads = 32 * kRotaryWarps;
constexpr int kRotaryBatch = 8;  // of a unit

template <class Storage, bool kJoined>
struct RotaryUnits {
  static constexpr int kPairs = StoredPairs<Storage, kJoined>::kCount;  // of a lane
  std::int64_t of_head, pairs, pair_tiles, runs, count;

  TORCH_SPE_INLINE explicit RotaryUnits(const RotaryParams& p)
      : of_head(p.in_features / 2),
        pairs(p.num_heads * of_head),
        pair_tiles(ceil_div(pairs, kLanes * kPairs)),
        runs(ceil_div(p.length, kRotaryRun)),
        count(runs * ceil_div(p.batch, kRotaryBatch)) {}

  // Where a unit begins.
  TORCH_SPE_DEVICE std::int64_t position(std::int64_t unit) const {
    return unit % runs * kRotaryRun;
  }
  TORCH_SPE_DEVICE std::int64_t batch(std::int64_t unit) const {
    return unit / runs * kRotaryBatch;
  }
};

template <class Storage, bool kJoined>
__global__ void __launch_bounds__(kRotaryThreads, sizeof(Storage) == 2 ? 4 : 2)
    rotary_forward_kernel(const RotaryParams p) {
  using T = core::accumulate_t<Storage>;
  const RotaryUnits<Storage, kJoined> units(p);
  constexpr int kPairs = units.kPairs;
  const std::int64_t block = blockIdx.x;
  const std::int64_t pair = (block % units.pair_tiles * kLanes + threadIdx.x % kLanes) * kPairs;
  const std::int64_t unit = block / units.pair_tiles * kRotaryWarps + threadIdx.x / kLanes;
  if (pair >= units.pairs || unit >= units.count) return;
  const std::int64_t n0 = units.position(unit), b0 = units.batch(unit);
  const std::int64_t end = min_of(p.batch, b0 + kRotaryBatch);
  const PairColumn<Storage, kJoined> x(p.x, p.x_strides, pair, units.of_head);
  RotaryRun<T> rotations[kPairs];
  Storage* out = static_cast<Storage*>(p.out) + ((b0 * p.length + n0) * units.pairs + pair) * 2;
  for (std::int64_t b = b0; b < end; ++b, out += p.length * units.pairs * 2) {
    PairRun<Storage, kJoined> features;
    features.load(x, b, n0, p.length);
    if (b == b0) {
      TORCH_SPE_UNROLL
      for (int i = 0; i < kPairs; ++i) rotations[i].set(p, pair + i, n0);
    }
    features.map(p.feature_map);
    TORCH_SPE_UNROLL
    for (int t = 0; t < kRotaryRun; ++t) {
      StoredPairs<Storage, kJoined> stored;
      TORCH_SPE_UNROLL
      for (int i = 0; i < kPairs; ++i)
        stored.set_pair(i, features.at[t].pair(i).rotated(rotations[i].at[t]));
      if (n0 + t < p.length) stored.store(out + t * units.pairs * 2);
    }
  }
}

// Gradients of x and frequencies: a block takes a segment of the units. Sums over a unit's batch
// rows are in T, those over positions in double: the terms of a frequency's gradient grow with the
// position.
template <class Storage, bool kJoined>
__global__ void __launch_bounds__(kRotaryThreads, sizeof(Storage) == 2 ? 2 : 1)
    rotary_backward_kernel(const RotaryBackwardParams p, std::int64_t segments,
                           double* freqs_parts) {  // [segment, H, D/2], or null
  using T = core::accumulate_t<Storage>;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const RotaryUnits<Storage, kJoined> units(p);
  constexpr int kPairs = units.kPairs;
  double* const warp_sums = layout.take<double>(kRotaryThreads * kPairs);  // [pair, thread]
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t pair = (blockIdx.x % units.pair_tiles * kLanes + thread % kLanes) * kPairs;
  const std::int64_t segment = blockIdx.x / units.pair_tiles;
  const std::int64_t per_segment = ceil_div(units.count, segments);
  const std::int64_t last = min_of(units.count, (segment + 1) * per_segment);
  const bool needs_x = freqs_parts != nullptr || p.feature_map != FeatureMap::kIdentity;
  const bool inside = pair < units.pairs;
  const PairColumn<Storage, kJoined> x(p.x, p.x_strides, inside ? pair : 0, units.of_head);
  const PairColumn<Storage, kJoined> grad(p.grad_out, p.grad_out_strides, inside ? pair : 0,
                                          units.of_head);
  double freq_sums[kPairs] = {};
  for (std::int64_t unit = segment * per_segment + thread / kLanes; inside && unit < last;
       unit += kRotaryWarps) {
    const std::int64_t n0 = units.position(unit), b0 = units.batch(unit);
    const std::int64_t end = min_of(p.batch, b0 + kRotaryBatch);
    RotaryRun<T> rotations[kPairs];
    T angles[kPairs][kRotaryRun] = {};  // their gradients
    Storage* out =
        static_cast<Storage*>(p.grad_x) + ((b0 * p.length + n0) * units.pairs + pair) * 2;
    PairRun<Storage, kJoined> next_gradients, next_features = {};
    const auto load = [&](std::int64_t b) {
      next_gradients.load(grad, b, n0, p.length);
      if (needs_x) next_features.load(x, b, n0, p.length);
    };
    load(b0);
    TORCH_SPE_UNROLL
    for (int i = 0; i < kPairs; ++i) rotations[i].set(p, pair + i, n0);
    for (std::int64_t b = b0; b < end; ++b, out += p.length * units.pairs * 2) {
      const PairRun<Storage, kJoined> gradients = next_gradients;
      PairRun<Storage, kJoined> features = next_features;
      if (b + 1 < end) load(b + 1);
      features.map(p.feature_map);
      TORCH_SPE_UNROLL
      for (int t = 0; t < kRotaryRun; ++t) {
        StoredPairs<Storage, kJoined> stored;
        TORCH_SPE_UNROLL
        for (int i = 0; i < kPairs; ++i) {
          FeaturePair<T> gradient = gradients.at[t].pair(i).rotated_back(rotations[i].at[t]);
          const FeaturePair<T> mapped = features.at[t].pair(i);
          angles[i][t] += angle_gradient(mapped, gradient);
          if (p.feature_map != FeatureMap::kIdentity) {
            gradient = {gradient_of_input(p.feature_map, gradient.even, mapped.even),
                        gradient_of_input(p.feature_map, gradient.odd, mapped.odd)};
          }
          stored.set_pair(i, gradient);
        }
        if (p.grad_x != nullptr && n0 + t < p.length) stored.store(out + t * units.pairs * 2);
      }
    }
    TORCH_SPE_UNROLL
    for (int t = 0; t < kRotaryRun; ++t) {
      if (n0 + t >= p.length) break;
      const double position = rotary_position(p, n0 + t);
      TORCH_SPE_UNROLL
      for (int i = 0; i < kPairs; ++i) freq_sums[i] += static_cast<double>(angles[i][t]) * position;
    }
  }
  if (freqs_parts == nullptr) return;
  TORCH_SPE_UNROLL
  for (int i = 0; i < kPairs; ++i) warp_sums[i * kRotaryThreads + thread] = freq_sums[i];
  __syncthreads();
  if (thread >= kLanes || !inside) return;
  TORCH_SPE_UNROLL
  for (int i = 0; i < kPairs; ++i) {
    double sum = 0;
    for (int warp = 0; warp < kRotaryWarps; ++warp)
      sum += warp_sums[i * kRotaryThreads + warp * kLanes + thread];
    freqs_parts[segment * units.pairs + pair + i] = core::kTwoPi * sum;
  }
}

// Gradient of the positions: a block adds up all pairs and batch rows of one position.
template <class Storage, bool kJoined>
__global__ void __launch_bounds__(kThreads)
    rotary_positions_gradient_kernel(const RotaryBackwardParams p) {
  using T = core::accumulate_t<Storage>;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  double* const warp_sums = layout.take<double>(kWarps);
  const RotaryUnits<Storage, kJoined> units(p);
  constexpr int kPairs = units.kPairs;
  const std::int64_t n = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  double sum = 0;
  for (std::int64_t pair = thread * kPairs; pair < units.pairs; pair += kThreads * kPairs) {
    const PairColumn<Storage, kJoined> x(p.x, p.x_strides, pair, units.of_head);
    const PairColumn<Storage, kJoined> grad(p.grad_out, p.grad_out_strides, pair, units.of_head);
    Phasor<T> rotations[kPairs];
    T angles[kPairs] = {};
    TORCH_SPE_UNROLL
    for (int i = 0; i < kPairs; ++i) rotations[i].set(p.freqs[pair + i], rotary_position(p, n));
    TORCH_SPE_UNROLL_TWICE
    for (std::int64_t b = 0; b < p.batch; ++b) {
      StoredPairs<Storage, kJoined> features, gradients;
      x.load(b, n, &features);
      grad.load(b, n, &gradients);
      features.map(p.feature_map);
      TORCH_SPE_UNROLL
      for (int i = 0; i < kPairs; ++i)
        angles[i] += angle_gradient(features.pair(i), gradients.pair(i).rotated_back(rotations[i]));
    }
    TORCH_SPE_UNROLL
    for (int i = 0; i < kPairs; ++i) sum += static_cast<double>(angles[i]) * p.freqs[pair + i];
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
