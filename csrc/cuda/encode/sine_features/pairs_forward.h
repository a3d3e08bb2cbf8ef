// Kernel of the sine features' forward pass for 16-bit values, see feature_pairs.h.
#pragma once

#include "encode/sine_features/feature_pairs.h"

namespace torch_spe::cuda {

// A warp takes 64 features and a run of positions for the whole batch, in tiles of 16 tokens whose
// x stays in registers for all sines.
template <int kBatch>
constexpr int kPairRun = kBatch >= 8 ? 8 : 16;

template <class Storage, int kBatch>
__global__ void __launch_bounds__(kThreads)
    sine_features_pairs_forward_kernel(const SineFeaturesParams p) {
  constexpr int kTile = 16 / kBatch;  // positions
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  SinePairTable table(layout, p);
  table.keep_own(p);
  const auto features = static_cast<std::uint32_t>(p.in_features);
  const std::int64_t outputs = sine_features_outputs(p);
  const std::int64_t feature_tiles = ceil_div(p.in_features, 2 * kLanes);
  const std::int64_t runs = ceil_div(p.length, kPairRun<kBatch>);
  const std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  const std::int64_t d = (unit % feature_tiles * kLanes + threadIdx.x % kLanes) * 2;
  const std::int64_t first = unit / feature_tiles % runs * kPairRun<kBatch>;
  const std::int64_t head = unit / feature_tiles / runs;
  if (d >= p.in_features || head >= p.num_heads) return;
  const Storage* const x = static_cast<const Storage*>(p.x) + head * p.x_strides[2] + d;
  Storage* const out = static_cast<Storage*>(p.out) + head * outputs + d;
  const std::int64_t out_strides[4] = {p.length * p.num_heads * outputs, p.num_heads * outputs};
  float constant[2] = {};
  TORCH_SPE_UNROLL
  for (int f = 0; f < 2 && p.constant != nullptr; ++f)
    constant[f] = static_cast<const float*>(p.constant)[head * p.in_features + d + f];
  table.fill(p, head, d, first);

  const int length = static_cast<int>(min_of(p.length - first, kPairRun<kBatch>));
  const int batch = static_cast<int>(p.batch);
  for (int since = 0; since < length; since += kTile) {
    for (int b0 = 0; b0 < batch; b0 += kBatch) {
      const PairTile<kTile, kBatch> tile(length - since, batch - b0);
      const std::int64_t n0 = first + since;
      const Storage* const x_tile = x + b0 * p.x_strides[0] + n0 * p.x_strides[1];
      float values[kTile][kBatch][2];
      TORCH_SPE_UNROLL
      for (int t = 0; t < kTile; ++t) {
        TORCH_SPE_UNROLL
        for (int b = 0; b < kBatch; ++b)
          unpack_pair<Storage>(load_pair(x_tile + tile.offset(p.x_strides, t, b)), &values[t][b][0],
                               &values[t][b][1]);
      }
      if (p.feature_map != FeatureMap::kIdentity) {
        TORCH_SPE_UNROLL
        for (int i = 0; i < kTile * kBatch * 2; ++i) {
          float& value = values[i / 2 / kBatch][i / 2 % kBatch][i % 2];
          value = map_feature<Storage>(p.feature_map, value);
        }
      }
      Storage* const tile_out = out + b0 * out_strides[0] + n0 * out_strides[1];
      // Writes values times factor(t, f), to `column` of their rows.
      const auto store = [&](std::uint32_t column, int t, const float (&factor)[2]) {
        TORCH_SPE_UNROLL
        for (int b = 0; b < kBatch; ++b) {
          if (tile.inside(t, b))
            *reinterpret_cast<std::uint32_t*>(tile_out + b * out_strides[0] + t * out_strides[1] +
                                              column) =
                pack_pair<Storage>(values[t][b][0] * factor[0], values[t][b][1] * factor[1]);
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
      TORCH_SPE_UNROLL
      for (int t = 0; t < kTile; ++t)
        store(2 * static_cast<std::uint32_t>(p.num_sines) * features, t, constant);
    }
  }
}

}  // namespace torch_spe::cuda
