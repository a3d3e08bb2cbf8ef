// Kernel of the sine features' forward pass for 16-bit values, see feature_pairs.h.
#pragma once

#include "encode/sine_features/feature_pairs.h"

namespace torch_spe::cuda {

constexpr std::int64_t kPairForwardBlocks = 7;  // of a multiprocessor, by their registers
constexpr std::int64_t kLeastPairRun = 8, kLongestPairRun = 1024;

template <int kBatch>
constexpr int kPairForwardTile = 8 / kBatch;  // positions

// A warp takes 64 features and a run of positions for the whole batch, in tiles of 8 tokens whose
// x stays in registers for all sines. Runs are so long that all blocks work at once.
template <int kBatch>
struct PairRuns {
  std::int64_t feature_tiles, length, groups;  // of a run, and of the runs of a block's warps

  TORCH_SPE_INLINE explicit PairRuns(const SineFeaturesParams& p)
      : feature_tiles(ceil_div(p.in_features, 2 * kLanes)) {
    constexpr std::int64_t kWarpsAtOnce = kWalkingBlocks / 2 * kPairForwardBlocks * kWarps;
    const std::int64_t wanted = ceil_div(p.length * p.num_heads * feature_tiles, kWarpsAtOnce);
    length =
        ceil_div(max_of(kLeastPairRun, min_of(wanted, kLongestPairRun)), kPairForwardTile<kBatch>) *
        kPairForwardTile<kBatch>;
    groups = ceil_div(p.length, length * kWarps);
  }
};

template <class Storage, int kBatch>
__global__ void __launch_bounds__(kThreads)
    sine_features_pairs_forward_kernel(const SineFeaturesParams p, const PairRuns<kBatch> runs) {
  constexpr int kTile = kPairForwardTile<kBatch>;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  SinePairTable table(layout, p);
  table.keep_own(p);
  const auto features = static_cast<std::uint32_t>(p.in_features);
  BlockIndices block(blockIdx.x);
  const int d =
      static_cast<int>((block.next(runs.feature_tiles) * kLanes + threadIdx.x % kLanes) * 2);
  const std::int64_t first =
      (std::int64_t{block.next(runs.groups)} * kWarps + threadIdx.x / kLanes) * runs.length;
  const int head = static_cast<int>(block.rest());
  if (d >= p.in_features || first >= p.length) return;
  table.fill(p, head, d, first);

  const int length = static_cast<int>(min_of(p.length - first, runs.length));
  const int batch = static_cast<int>(p.batch);
  for (int since = 0; since < length; since += kTile) {
    for (int b0 = 0; b0 < batch; b0 += kBatch) {
      const PairTile<kTile, kBatch> tile(length - since, batch - b0);
      const std::int64_t n0 = first + since;
      // Computed for every tile: registers are short.
      const std::int64_t own_head = read_again(head);
      const std::int64_t outputs = read_again(sine_features_outputs(p));
      const std::int64_t out_strides[2] = {p.length * p.num_heads * outputs, p.num_heads * outputs};
      const Storage* const x_tile = static_cast<const Storage*>(p.x) + own_head * p.x_strides[2] +
                                    d + b0 * p.x_strides[0] + n0 * p.x_strides[1];
      std::uint32_t values[kTile][kBatch];  // phi(x)
      TORCH_SPE_UNROLL
      for (int t = 0; t < kTile; ++t) {
        TORCH_SPE_UNROLL
        for (int b = 0; b < kBatch; ++b)
          values[t][b] = load_pair(x_tile + tile.offset(p.x_strides, t, b));
      }
      if (p.feature_map != FeatureMap::kIdentity) {
        TORCH_SPE_UNROLL
        for (int t = 0; t < kTile; ++t) {
          TORCH_SPE_UNROLL
          for (std::uint32_t& pair : values[t])
            pair = map_feature_pair<Storage>(p.feature_map, pair);
        }
      }
      Storage* const tile_out = static_cast<Storage*>(p.out) + own_head * outputs + d +
                                b0 * out_strides[0] + n0 * out_strides[1];
      // Writes values times factors of position t, to `column` of their rows.
      const auto store = [&](std::uint32_t column, int t, const float (&factor)[2]) {
        Storage* to = tile_out + t * out_strides[1] + column;
        TORCH_SPE_UNROLL
        for (int b = 0; b < kBatch; ++b, to += out_strides[0]) {
          float value[2];
          unpack_pair<Storage>(values[t][b], &value[0], &value[1]);
          const std::uint32_t pair = pack_pair<Storage>(value[0] * factor[0], value[1] * factor[1]);
          if (tile.inside(t, b)) *reinterpret_cast<std::uint32_t*>(to) = pair;
        }
      };
      for (int k = 0; k < p.num_sines; ++k) {
        const SinePairTable::Phases phases = table.phases[k * kLanes];
        const SinePairTable::Two amplitudes = table.amplitudes[k * kLanes];
        TORCH_SPE_UNROLL
        for (int t = 0; t < kTile; ++t) {
          float re[2], im[2];
          TORCH_SPE_UNROLL
          for (int f = 0; f < 2; ++f) {
            fast_cos_sin_of(
                phases.first[f] + static_cast<std::uint32_t>(since + t) * phases.step[f], &re[f],
                &im[f]);
            re[f] *= amplitudes.of[f];
            im[f] *= amplitudes.of[f];
          }
          store(2 * static_cast<std::uint32_t>(k) * features, t, re);
          store((2 * static_cast<std::uint32_t>(k) + 1) * features, t, im);
        }
      }
      if (p.constant == nullptr) continue;
      const float* const constants =
          static_cast<const float*>(p.constant) + own_head * p.in_features + d;
      const float constant[2] = {constants[0], constants[1]};
      TORCH_SPE_UNROLL
      for (int t = 0; t < kTile; ++t)
        store(2 * static_cast<std::uint32_t>(p.num_sines) * features, t, constant);
    }
  }
}

}  // namespace torch_spe::cuda
