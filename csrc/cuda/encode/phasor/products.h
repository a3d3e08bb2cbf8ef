// Kernel of the phasor filter and of its gradient by x for 16-bit storage at consecutive positions,
// on tensor cores: at every position a product of codes, which each lane makes in registers, with
// the rows of the batch. For whole rows see row_products.h.
#pragma once

#include "encode/phasor/code_tile.h"

namespace torch_spe::cuda {

// 16 values of any row in pairs, zero from `count` on.
template <class Storage>
TORCH_SPE_DEVICE void load_pairs(const Storage* row, std::int64_t count, std::int64_t stride,
                                 bool aligned, std::uint32_t (&out)[kLaneInputs / 2]) {
  if (aligned && count >= kLaneInputs) return load_whole_pairs(row, out);
  TORCH_SPE_UNROLL
  for (int i = 0; i < kLaneInputs / 2; ++i) {
    const std::uint32_t low = 2 * i < count ? row[2 * i * stride].bits : 0u;
    const std::uint32_t high = 2 * i + 1 < count ? row[(2 * i + 1) * stride].bits : 0u;
    out[i] = low | high << 16;
  }
}

template <int kTiles>
struct PhasorProductShared {
  // Where inputs come in several parts, runs are shorter and sums are kept from part to part.
  static constexpr int kShortRun = 16;
  float* sums;  // [warp, position, sum, lane]

  TORCH_SPE_INLINE PhasorProductShared(MemoryLayout& layout, std::int64_t inputs)
      : sums(inputs <= kProductInputs
                 ? nullptr
                 : layout.take<float>(kWarps * kShortRun * kTiles * 4 * kLanes)) {}
};

// Warps, each with 16 outputs of one head, a run of positions and 8 kTiles batch rows.
template <bool kGradient, int kTiles>
struct PhasorProductUnits {
  std::int64_t inputs, outputs, run, output_tiles, runs, batch_tiles, count;

  TORCH_SPE_INLINE explicit PhasorProductUnits(const PhasorFilterParams& p)
      : inputs(kGradient ? 2 * p.num_pairs : p.in_features),
        outputs(kGradient ? p.in_features : 2 * p.num_pairs),
        run(inputs <= kProductInputs ? kPhasorRun : PhasorProductShared<kTiles>::kShortRun),
        output_tiles(ceil_div(outputs, kProductOutputs)),
        runs(ceil_div(p.length, run)),
        batch_tiles(ceil_div(p.batch, kProductBatch * kTiles)),
        count(output_tiles * runs * batch_tiles * p.num_heads) {}
};

template <class Storage, bool kGradient, int kTiles>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    phasor_product_kernel(const PhasorFilterBackwardParams p) {
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const PhasorProductUnits<kGradient, kTiles> units(p);
  const PhasorProductShared<kTiles> shared(layout, units.inputs);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  const int group = lane / 4, member = lane % 4;
  const std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * kWarps + warp;
  if (unit >= units.count) return;
  const std::int64_t out0 = unit % units.output_tiles * kProductOutputs + 2 * group;
  const std::int64_t n0 = unit / units.output_tiles % units.runs * units.run;
  const std::int64_t b0 =
      unit / units.output_tiles / units.runs % units.batch_tiles * (kProductBatch * kTiles);
  const std::int64_t head = unit / units.output_tiles / units.runs / units.batch_tiles;
  const int count = static_cast<int>(min_of(units.run, p.length - n0));

  const Storage* const input = static_cast<const Storage*>(kGradient ? p.grad_out : p.x);
  const std::int64_t* const strides = kGradient ? p.grad_out_strides : p.x_strides;
  const bool aligned = strides[3] == 1 && rows_are_aligned<Storage>(input, strides[0]) &&
                       rows_are_aligned<Storage>(input, strides[1]) &&
                       rows_are_aligned<Storage>(input, strides[2]);
  float* const own_sums = shared.sums == nullptr
                              ? nullptr
                              : shared.sums + warp * units.run * kTiles * 4 * kLanes + lane;

  for (std::int64_t in0 = 0; in0 < units.inputs; in0 += kProductInputs) {
    const std::int64_t own_inputs = in0 + member * kLaneInputs;
    PhasorCodeTile<Storage, kGradient, true> codes(
        p, LaneCodes<kGradient, false>{head, own_inputs, out0}, n0);
    const auto map = [&](std::uint32_t (&inputs)[kTiles][kLaneInputs / 2]) {
      if constexpr (!kGradient) {
        if (p.feature_map == FeatureMap::kIdentity) return;
        TORCH_SPE_UNROLL
        for (int i = 0; i < kTiles * kLaneInputs / 2; ++i) {
          std::uint32_t& pair = inputs[i / (kLaneInputs / 2)][i % (kLaneInputs / 2)];
          pair = map_feature_pair<Storage>(p.feature_map, pair);
        }
      }
    };

    const Storage* row[kTiles];
    std::int64_t inside[kTiles];  // values of the row that belong to this lane
    TORCH_SPE_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      const std::int64_t b = b0 + tile * kProductBatch + group;
      row[tile] =
          input + b * strides[0] + n0 * strides[1] + head * strides[2] + own_inputs * strides[3];
      inside[tile] = b < p.batch ? units.inputs - own_inputs : 0;
    }
    std::uint32_t next[kTiles][kLaneInputs / 2];
    TORCH_SPE_UNROLL
    for (int tile = 0; tile < kTiles; ++tile)
      load_pairs(row[tile], inside[tile], strides[3], aligned, next[tile]);
    for (int t = 0; t < count; ++t) {
      std::uint32_t inputs[kTiles][kLaneInputs / 2];
      TORCH_SPE_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        TORCH_SPE_UNROLL
        for (int i = 0; i < kLaneInputs / 2; ++i) inputs[tile][i] = next[tile][i];
        row[tile] += strides[1];
        load_pairs(row[tile], t + 1 < count ? inside[tile] : 0, strides[3], aligned, next[tile]);
      }
      map(inputs);
      float sums[kTiles][4];
      TORCH_SPE_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        TORCH_SPE_UNROLL
        for (int e = 0; e < 4; ++e)
          sums[tile][e] = in0 == 0 ? 0.0f : own_sums[((t * kTiles + tile) * 4 + e) * kLanes];
      }
      codes.multiply(inputs, sums);
      if (in0 + kProductInputs < units.inputs) {
        TORCH_SPE_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
          TORCH_SPE_UNROLL
          for (int e = 0; e < 4; ++e)
            own_sums[((t * kTiles + tile) * 4 + e) * kLanes] = sums[tile][e];
        }
        continue;
      }
      TORCH_SPE_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        TORCH_SPE_UNROLL
        for (int e = 0; e < 2; ++e) {
          const std::int64_t b = b0 + tile * kProductBatch + 2 * member + e;
          if (b >= p.batch) continue;
          Storage* const to = static_cast<Storage*>(kGradient ? p.grad_x : p.out) +
                              ((b * p.length + n0 + t) * p.num_heads + head) * units.outputs + out0;
          float first = sums[tile][e], second = sums[tile][2 + e];
          if constexpr (kGradient) {
            if (p.feature_map != FeatureMap::kIdentity) {
              const Storage* const x = static_cast<const Storage*>(p.x) + b * p.x_strides[0] +
                                       (n0 + t) * p.x_strides[1] + head * p.x_strides[2] +
                                       out0 * p.x_strides[3];
              if (out0 < units.outputs) first = gradient_of_input_at(p.feature_map, first, x);
              if (out0 + 1 < units.outputs)
                second = gradient_of_input_at(p.feature_map, second, x + p.x_strides[3]);
            }
          }
          if (units.outputs % 2 == 0) {
            if (out0 < units.outputs)
              *reinterpret_cast<std::uint32_t*>(to) = pack_pair<Storage>(first, second);
          } else {
            if (out0 < units.outputs) write(first, to);
            if (out0 + 1 < units.outputs) write(second, to + 1);
          }
        }
      }
    }
  }
}

}  // namespace torch_spe::cuda
