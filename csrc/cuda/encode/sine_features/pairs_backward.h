// Kernel of the sine features' gradients for 16-bit values, see feature_pairs.h.
#pragma once

#include "encode/sine_features/backward.h"
#include "encode/sine_features/feature_pairs.h"

namespace torch_spe::cuda {

constexpr int kPairBackwardBlocks = 3;              // of a multiprocessor
constexpr std::int64_t kLongestPairSegment = 4096;  // positions whose sums are in float32

template <int kBatch>
constexpr int kPairBackwardTile = 8 / kBatch;  // positions; larger tiles spill registers

struct SinePairsBackwardShared {
  using Two = SinePairTable::Two;
  SinePairTable table;
  Two* sums;  // [warp, K, 3, lane]: amplitude, phase, phase times position

  TORCH_SPE_INLINE SinePairsBackwardShared(MemoryLayout& layout, const SineFeaturesParams& p)
      : table(layout, p), sums(layout.take<Two>(kWarps * p.num_sines * 3 * kLanes)) {}
};

// Each warp takes a segment of the positions and 64 features, for the whole batch; lanes share
// nothing. A tile of some positions and batch rows has its x and gradients of x in registers, for
// all sines.
template <class Storage, int kBatch>
__global__ void __launch_bounds__(kThreads, kPairBackwardBlocks)
    sine_features_pairs_backward_kernel(const SineFeaturesBackwardParams p, std::int64_t segments,
                                        const SineFeaturesParts parts) {
  using Two = SinePairTable::Two;
  constexpr int kTile = kPairBackwardTile<kBatch>;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  SinePairsBackwardShared shared(layout, p);
  SinePairTable& table = shared.table;
  table.keep_own(p);
  Two* const sums =
      shared.sums + threadIdx.x / kLanes * p.num_sines * 3 * kLanes + threadIdx.x % kLanes;
  const auto features = static_cast<std::uint32_t>(p.in_features);
  const std::int64_t feature_tiles = ceil_div(p.in_features, 2 * kLanes);
  const std::int64_t block = blockIdx.x;
  const std::int64_t d = (block % feature_tiles * kLanes + threadIdx.x % kLanes) * 2;
  const std::int64_t head = block / feature_tiles % p.num_heads;
  const std::int64_t segment = block / feature_tiles / p.num_heads * kWarps + threadIdx.x / kLanes;
  if (d >= p.in_features || segment >= segments) return;
  const Storage* const x = static_cast<const Storage*>(p.x) + head * p.x_strides[2] + d;
  const Storage* const grad =
      static_cast<const Storage*>(p.grad_out) + head * p.grad_out_strides[2] + d;
  const std::int64_t per_segment = ceil_div(ceil_div(p.length, kTile), segments) * kTile;
  const std::int64_t first = segment * per_segment;
  const int length = static_cast<int>(min_of(p.length - first, per_segment));
  const int batch = static_cast<int>(p.batch);
  const std::int64_t feature = (segment * p.num_heads + head) * p.in_features + d;
  float constant[2] = {};
  double constant_sums[2] = {};
  TORCH_SPE_UNROLL
  for (int f = 0; f < 2 && p.constant != nullptr; ++f)
    constant[f] = static_cast<const float*>(p.constant)[head * p.in_features + d + f];
  table.fill(p, head, d, first);
  for (int i = 0; i < 3 * p.num_sines; ++i) sums[i * kLanes] = {};

  for (int since = 0; since < length; since += kTile) {
    for (int b0 = 0; b0 < batch; b0 += kBatch) {
      const PairTile<kTile, kBatch> tile(length - since, batch - b0);
      const std::int64_t n0 = first + since;
      const Storage* const x_tile = x + b0 * p.x_strides[0] + n0 * p.x_strides[1];
      const Storage* const grad_tile =
          grad + b0 * p.grad_out_strides[0] + n0 * p.grad_out_strides[1];
      std::uint32_t values[kTile][kBatch];  // phi(x)
      float grad_x[kTile][kBatch][2] = {};
      TORCH_SPE_UNROLL
      for (int t = 0; t < kTile; ++t) {
        TORCH_SPE_UNROLL
        for (int b = 0; b < kBatch; ++b)
          values[t][b] = load_pair(x_tile + tile.offset(p.x_strides, t, b));
      }
      // The gradients of a sine's outputs are loaded while those of the one before are used.
      std::uint32_t next_pairs[kTile][kBatch][2];
      const auto load_next = [&](int k) {
        const Storage* const sine_tile = grad_tile + 2 * static_cast<std::uint32_t>(k) * features;
        TORCH_SPE_UNROLL
        for (int t = 0; t < kTile; ++t) {
          TORCH_SPE_UNROLL
          for (int b = 0; b < kBatch; ++b) {
            const std::uint32_t offset = tile.offset(p.grad_out_strides, t, b);
            next_pairs[t][b][0] = load_pair(sine_tile + offset);
            next_pairs[t][b][1] = load_pair(sine_tile + (offset + features));
          }
        }
      };
      if (p.num_sines > 0) load_next(0);
      std::uint32_t last_pairs[kTile][kBatch];
      if (p.constant != nullptr) {
        const Storage* const last_tile =
            grad_tile + 2 * static_cast<std::uint32_t>(p.num_sines) * features;
        TORCH_SPE_UNROLL
        for (int t = 0; t < kTile; ++t) {
          TORCH_SPE_UNROLL
          for (int b = 0; b < kBatch; ++b)
            last_pairs[t][b] = load_pair(last_tile + tile.offset(p.grad_out_strides, t, b));
        }
      }
      TORCH_SPE_UNROLL
      for (int t = 0; t < kTile; ++t) {
        TORCH_SPE_UNROLL
        for (int b = 0; b < kBatch; ++b)
          values[t][b] =
              tile.inside(t, b) ? map_feature_pair<Storage>(p.feature_map, values[t][b]) : 0u;
      }
      if (p.constant != nullptr) {
        float tile_sums[2] = {};
        TORCH_SPE_UNROLL
        for (int t = 0; t < kTile; ++t) {
          TORCH_SPE_UNROLL
          for (int b = 0; b < kBatch; ++b) {
            float value[2], last[2];
            unpack_pair<Storage>(values[t][b], &value[0], &value[1]);
            unpack_pair<Storage>(last_pairs[t][b], &last[0], &last[1]);
            TORCH_SPE_UNROLL
            for (int f = 0; f < 2; ++f) {
              grad_x[t][b][f] = last[f] * constant[f];
              tile_sums[f] += last[f] * value[f];
            }
          }
        }
        TORCH_SPE_UNROLL
        for (int f = 0; f < 2; ++f) constant_sums[f] += static_cast<double>(tile_sums[f]);
      }
      const auto use = [&](int k, const std::uint32_t (&pairs)[kTile][kBatch][2]) {
        const SinePairTable::Phases phases = table.phases[k * kLanes];
        const Two amplitude = table.amplitudes[k * kLanes];
        float tile_amplitude[2] = {}, tile_phase[2] = {}, tile_slope[2] = {};
        TORCH_SPE_UNROLL
        for (int t = 0; t < kTile; ++t) {
          float re[2], im[2], grad_re[2] = {}, grad_im[2] = {};  // of e
          TORCH_SPE_UNROLL
          for (int f = 0; f < 2; ++f)
            fast_cos_sin_of(
                phases.first[f] + static_cast<std::uint32_t>(since + t) * phases.step[f], &re[f],
                &im[f]);
          const float scaled_re[2] = {re[0] * amplitude.of[0], re[1] * amplitude.of[1]};
          const float scaled_im[2] = {im[0] * amplitude.of[0], im[1] * amplitude.of[1]};
          TORCH_SPE_UNROLL
          for (int b = 0; b < kBatch; ++b) {
            float value[2], out_re[2], out_im[2];
            unpack_pair<Storage>(values[t][b], &value[0], &value[1]);
            unpack_pair<Storage>(pairs[t][b][0], &out_re[0], &out_re[1]);
            unpack_pair<Storage>(pairs[t][b][1], &out_im[0], &out_im[1]);
            TORCH_SPE_UNROLL
            for (int f = 0; f < 2; ++f) {
              grad_x[t][b][f] += scaled_re[f] * out_re[f];
              grad_x[t][b][f] += scaled_im[f] * out_im[f];
              grad_re[f] += value[f] * out_re[f];
              grad_im[f] += value[f] * out_im[f];
            }
          }
          TORCH_SPE_UNROLL
          for (int f = 0; f < 2; ++f) {
            const float phase = grad_im[f] * re[f] - grad_re[f] * im[f];
            tile_amplitude[f] += grad_re[f] * re[f] + grad_im[f] * im[f];
            tile_phase[f] += phase;
            tile_slope[f] += phase * static_cast<float>(t);
          }
        }
        const auto n = static_cast<float>(since);
        Two* const own = sums + 3 * k * kLanes;
        Two amplitudes = own[0], sum = own[kLanes], slopes = own[2 * kLanes];
        TORCH_SPE_UNROLL
        for (int f = 0; f < 2; ++f) {
          amplitudes.of[f] += tile_amplitude[f];
          sum.of[f] += tile_phase[f];
          slopes.of[f] += tile_slope[f] + n * tile_phase[f];
        }
        own[0] = amplitudes;
        own[kLanes] = sum;
        own[2 * kLanes] = slopes;
      };
      // The last sine is apart: ptxas would move loads under a condition behind all that follows.
      for (int k = 0; k + 1 < p.num_sines; ++k) {
        std::uint32_t pairs[kTile][kBatch][2];
        TORCH_SPE_UNROLL
        for (int i = 0; i < kTile * kBatch * 2; ++i)
          pairs[i / 2 / kBatch][i / 2 % kBatch][i % 2] =
              next_pairs[i / 2 / kBatch][i / 2 % kBatch][i % 2];
        load_next(k + 1);
        use(k, pairs);
      }
      if (p.num_sines > 0) use(static_cast<int>(p.num_sines) - 1, next_pairs);
      if (p.grad_x == nullptr) continue;
      Storage* const to = static_cast<Storage*>(p.grad_x) +
                          ((b0 * p.length + n0) * p.num_heads + head) * p.in_features + d;
      const std::int64_t row = p.num_heads * p.in_features;
      TORCH_SPE_UNROLL
      for (int t = 0; t < kTile; ++t) {
        TORCH_SPE_UNROLL
        for (int b = 0; b < kBatch; ++b) {
          if (!tile.inside(t, b)) continue;
          float (&gradient)[2] = grad_x[t][b];
          if (p.feature_map != FeatureMap::kIdentity) {
            float value[2];
            unpack_pair<Storage>(values[t][b], &value[0], &value[1]);
            TORCH_SPE_UNROLL
            for (int f = 0; f < 2; ++f)
              gradient[f] = gradient_of_input(p.feature_map, gradient[f], value[f]);
          }
          *reinterpret_cast<std::uint32_t*>(to + (b * p.length + t) * row) =
              pack_pair<Storage>(gradient[0], gradient[1]);
        }
      }
    }
  }

  const double n = p.start + static_cast<double>(first);
  TORCH_SPE_UNROLL
  for (int f = 0; f < 2; ++f) {
    if (parts.constant != nullptr) parts.constant[feature + f] = constant_sums[f];
    for (int k = 0; k < p.num_sines; ++k) {
      const std::int64_t part = (feature + f) * p.num_sines + k;
      const Two* const own = sums + 3 * k * kLanes;
      const double phase = own[kLanes].of[f], slope = own[2 * kLanes].of[f];
      const double amplitude = table.amplitudes[k * kLanes].of[f];
      if (parts.amplitudes != nullptr) parts.amplitudes[part] = own[0].of[f];
      if (parts.offsets != nullptr) parts.offsets[part] = amplitude * phase;
      if (parts.freqs != nullptr)
        parts.freqs[part] = core::kTwoPi * amplitude * (slope + n * phase);
    }
  }
}

}  // namespace torch_spe::cuda
