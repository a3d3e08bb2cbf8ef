// Kernel of the sine filter's forward pass on tensor cores, see steps.h.
#pragma once

#include "encode/sine/steps.h"

namespace torch_spe::cuda {

// Forward: a block takes a tile of tokens and 64 realizations, each warp 32 tokens.
constexpr int kSineForwardBlocks =
    3;  // of a multiprocessor, as many as fit without spilling registers

template <class Storage>
struct SineStepsForwardShared {
  static constexpr int kBasisRow = kStageSines + 8;
  static constexpr int kWeight = kStageRows * row_of<Storage>(kSineTileRealizations);
  int basis_size;
  std::uint32_t* basis;  // [2, position, slot]
  Storage* weight;       // [2, row, r]

  TORCH_SPE_INLINE SineStepsForwardShared(MemoryLayout& layout, const TokenTiles& tiles)
      : basis_size(tiles.positions * kBasisRow),
        basis(layout.take<std::uint32_t>(2 * basis_size)),
        weight(layout.take<Storage>(2 * kWeight)) {}
};

template <class Storage>
__global__ void __launch_bounds__(kThreads, kSineForwardBlocks)
    sine_steps_forward_kernel(const SineFilterParams p) {
  using Shared = SineStepsForwardShared<Storage>;
  constexpr int kRows = kSineWarpTokens / 8;  // of tokens, for a lane
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const TokenTiles tiles(p.batch, p.length, kSineTileTokens);
  const Shared shared(layout, tiles);
  const SineSteps steps(p);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  const int group = lane / 4, member = lane % 4;
  const std::int64_t realizations = p.num_realizations,
                     realization_tiles = ceil_div(realizations, kSineTileRealizations);
  const std::int64_t block = blockIdx.x;
  const std::int64_t r0 = block % realization_tiles * kSineTileRealizations;
  const std::int64_t tile = block / realization_tiles % tiles.count();
  const std::int64_t head = block / realization_tiles / tiles.count();
  const std::int64_t b0 = tiles.first_batch(tile), n0 = tiles.first_position(tile);
  const SineCoefficients<Storage> coefficients(p, head);

  // Rows group + 8 i of the warp's tokens, and where their basis lies.
  const Storage* x[kRows];  // from feature `member` on
  bool inside[kRows];
  int basis_at[kRows];
  TORCH_SPE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    const int row = warp * kSineWarpTokens + 8 * i + group;
    const int t = row / tiles.batch, b = row % tiles.batch;
    inside[i] = t < tiles.positions && n0 + t < p.length && b0 + b < p.batch;
    x[i] = static_cast<const Storage*>(p.x) + (b0 + b) * p.x_strides[0] +
           (n0 + t) * p.x_strides[1] + head * p.x_strides[2] + member * p.x_strides[3];
    basis_at[i] = (t < tiles.positions ? t : 0) * Shared::kBasisRow + 2 * member;
  }
  std::uint32_t values[kRows][2], next[kRows][2];  // x twice, of features member and member + 4
  // Loads x of the next features, of which `left` are left.
  int left = static_cast<int>(p.in_features) - member;
  const auto load_x = [&] {
    TORCH_SPE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      TORCH_SPE_UNROLL
      for (int e = 0; e < 2; ++e)
        next[i][e] = inside[i] && left > 4 * e ? x[i][4 * e * p.x_strides[3]].bits : 0u;
      x[i] += kStepFeatures * p.x_strides[3];
    }
    left -= kStepFeatures;
  };
  const auto bring_stage = [&](std::int64_t stage) {
    const std::int64_t first = stage * kStageSteps;
    SineStep step = steps.at(first);
    Storage* const weight = shared.weight + stage % 2 * Shared::kWeight;
    TORCH_SPE_UNROLL
    for (int i = 0; i < kStageSteps; ++i) {
      coefficients.template copy<true>(
          steps, step, r0, weight + i * kStepRows * row_of<Storage>(kSineTileRealizations));
      if (++step.k == steps.per_group) step = {step.group + 1, 0};
    }
    fill_stage_basis<Storage, true, Shared::kBasisRow>(
        p, steps, steps.at(first + thread % kStageSines / kStepFeatures), head, n0, tiles.positions,
        shared.basis + stage % 2 * shared.basis_size);
  };

  float sums[kRows / 2][kSineTileRealizations / 8][4] = {};
  load_x();
  const std::int64_t stages = ceil_div(steps.count, kStageSteps);
  bring_stage(0);
  SineStep step{0, 0};
  for (std::int64_t stage = 0; stage < stages; ++stage) {
    copy_async_wait();
    __syncthreads();  // this stage has arrived, and the one before has been used
    if (stage + 1 < stages) bring_stage(stage + 1);
    const std::uint32_t* basis = shared.basis + stage % 2 * shared.basis_size;
    const Storage* weight = shared.weight + stage % 2 * Shared::kWeight +
                            lane % 16 * row_of<Storage>(kSineTileRealizations) + lane / 16 * 8;
    const int count = static_cast<int>(min_of(kStageSteps, steps.count - stage * kStageSteps));
    for (int s = 0; s < count; ++s) {
      if (step.k == 0) {
        if (p.feature_map != FeatureMap::kIdentity) {
          TORCH_SPE_UNROLL
          for (int i = 0; i < kRows; ++i) {
            const std::uint32_t pair =
                map_feature_pair<Storage>(p.feature_map, next[i][0] | next[i][1] << 16);
            next[i][0] = pair & 0xffffu;
            next[i][1] = pair >> 16;
          }
        }
        TORCH_SPE_UNROLL
        for (int i = 0; i < kRows; ++i) {
          TORCH_SPE_UNROLL
          for (int e = 0; e < 2; ++e) values[i][e] = next[i][e] | next[i][e] << 16;
        }
        load_x();
      }
      std::uint32_t a[kRows / 2][4];
      TORCH_SPE_UNROLL
      for (int i = 0; i < kRows; ++i) {
        TORCH_SPE_UNROLL
        for (int e = 0; e < 2; ++e) {
          a[i / 2][i % 2 + 2 * e] =
              multiply_pairs<Storage>(values[i][e], basis[basis_at[i] + s * kStepFeatures + e]);
        }
      }
      TORCH_SPE_UNROLL
      for (int j = 0; j < kSineTileRealizations / 16; ++j) {
        std::uint32_t b[4];
        ldmatrix_x4<true>(b, weight + 16 * j);
        TORCH_SPE_UNROLL
        for (int e = 0; e < 2; ++e) {
          const std::uint32_t pair[2] = {b[2 * e], b[2 * e + 1]};
          TORCH_SPE_UNROLL
          for (int i = 0; i < kRows / 2; ++i) mma_m16n8k16<Storage>(sums[i][2 * j + e], a[i], pair);
        }
      }
      weight += kStepRows * row_of<Storage>(kSineTileRealizations);
      if (++step.k == steps.per_group) step = {step.group + 1, 0};
    }
  }

  TORCH_SPE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    if (!inside[i]) continue;
    const int row = warp * kSineWarpTokens + 8 * i + group;
    const std::int64_t n = n0 + row / tiles.batch, b = b0 + row % tiles.batch;
    Storage* const out =
        static_cast<Storage*>(p.out) + ((b * p.length + n) * p.num_heads + head) * realizations;
    TORCH_SPE_UNROLL
    for (int j = 0; j < kSineTileRealizations / 8; ++j) {
      const std::int64_t r = r0 + 8 * j + 2 * member;
      const float first = sums[i / 2][j][i % 2 * 2], second = sums[i / 2][j][i % 2 * 2 + 1];
      if (realizations % 2 == 0) {
        if (r < realizations)
          *reinterpret_cast<std::uint32_t*>(out + r) = pack_pair<Storage>(first, second);
      } else {
        if (r < realizations) write(first, out + r);
        if (r + 1 < realizations) write(second, out + r + 1);
      }
    }
  }
}

}  // namespace torch_spe::cuda
