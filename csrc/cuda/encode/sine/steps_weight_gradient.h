// Kernel of the sine filter's gradients of weight and constant on tensor cores, see steps.h.
#pragma once

#include "encode/sine/steps.h"

namespace torch_spe::cuda {

// Gradients of weight and constant: a block takes 16 steps and 64 realizations of one head, four
// steps a warp, and walks over the tokens of a segment.
constexpr int kWarpSteps = 4;
constexpr int kBlockSteps = kWarps * kWarpSteps;
constexpr int kWeightGradientTokens = 64;
static_assert(kBlockSteps * kStepFeatures == kThreads);  // a thread makes the basis of one sine

template <class Storage>
struct SineStepsWeightGradientShared {
  static constexpr int kBasisRow = kThreads + 4;
  static constexpr int kGrad = kWeightGradientTokens * row_of<Storage>(kSineTileRealizations);
  int groups;  // whose features a block needs
  int x_row, x_size;
  Storage* x;     // [2, token, feature]
  Storage* grad;  // [2, token, r]
  // Of two neighbouring tokens the cosines, then the sines; [pair or position, sine].
  struct alignas(8) Pairs {
    std::uint32_t cos, sin;
  };
  Pairs* basis;
  int* basis_at;  // [pair], where its basis begins

  TORCH_SPE_INLINE SineStepsWeightGradientShared(MemoryLayout& layout, const TokenTiles& tiles,
                                                 const SineSteps& steps)
      : groups(static_cast<int>(
            min_of(steps.groups, (kBlockSteps - 1 + steps.per_group - 1) / steps.per_group + 1))),
        x_row(kStepFeatures * (groups | 1)),  // an odd multiple: rows lie in different banks
        x_size(kWeightGradientTokens * x_row),
        x(layout.take<Storage>(2 * x_size)),
        grad(layout.take<Storage>(2 * kGrad)),
        basis(layout.take<Pairs>(
            (tiles.batch % 2 == 0 ? tiles.positions : kWeightGradientTokens / 2) * kBasisRow)),
        basis_at(layout.take<int>(kWeightGradientTokens / 2)) {}
};

template <class Storage>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    sine_steps_weight_gradient_kernel(const SineFilterBackwardParams p, std::int64_t segments,
                                      float* weight_parts,      // [segment, H, D, 2K, R]
                                      float* constant_parts) {  // [segment, H, D, R]
  using Shared = SineStepsWeightGradientShared<Storage>;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const TokenTiles tiles(p.batch, p.length, kWeightGradientTokens);
  const SineSteps steps(p);
  const Shared shared(layout, tiles, steps);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  const int group = lane / 4, member = lane % 4;
  const std::int64_t realizations = p.num_realizations,
                     realization_tiles = ceil_div(realizations, kSineTileRealizations);
  const std::int64_t step_tiles = ceil_div(steps.count, kBlockSteps);
  const std::int64_t block = blockIdx.x;
  const std::int64_t segment = block % segments;
  const std::int64_t r0 = block / segments % realization_tiles * kSineTileRealizations;
  const std::int64_t first_step = block / segments / realization_tiles % step_tiles * kBlockSteps;
  const std::int64_t head = block / segments / realization_tiles / step_tiles;
  const std::int64_t first_group = steps.at(first_step).group;
  const auto &x_strides = p.x_strides, &strides = p.grad_out_strides;
  const std::int64_t d0 = first_group * kStepFeatures;
  const Storage* const x =
      static_cast<const Storage*>(p.x) + head * x_strides[2] + d0 * x_strides[3];
  const Storage* const grad =
      static_cast<const Storage*>(p.grad_out) + head * strides[2] + r0 * strides[3];
  const auto is_aligned = [](const void* data, const std::int64_t* its) {
    return rows_are_aligned<Storage>(data, its[0]) && rows_are_aligned<Storage>(data, its[1]) &&
           rows_are_aligned<Storage>(data, its[2]);
  };
  const bool x_aligned = x_strides[3] == 1 && is_aligned(p.x, x_strides);
  const bool grad_aligned = is_aligned(p.grad_out, strides);

  const auto copy = [&](std::int64_t tile, int buffer) {
    const std::int64_t b0 = tiles.first_batch(tile), n0 = tiles.first_position(tile);
    const auto row = [&](const Storage* from, const std::int64_t* its, int token) {
      const int t = token / tiles.batch, b = token % tiles.batch;
      return t < tiles.positions && n0 + t < p.length && b0 + b < p.batch
                 ? from + (b0 + b) * its[0] + (n0 + t) * its[1]
                 : nullptr;
    };
    copy_tile<kWeightGradientTokens, kSineTileRealizations, Storage>(
        shared.grad + buffer * Shared::kGrad, realizations - r0, strides[3], grad_aligned,
        [&](int token) { return row(grad, strides, token); });
    Storage* const out = shared.x + buffer * shared.x_size;
    for (int i = thread; i < kWeightGradientTokens * shared.groups; i += kThreads) {
      const int token = i / shared.groups, column = i % shared.groups * kStepFeatures;
      const Storage* const from = row(x, x_strides, token);
      Storage* const to = out + token * shared.x_row + column;
      const std::int64_t left = p.in_features - d0 - column;
      if (x_aligned && from != nullptr && left >= kStepFeatures) {
        copy_async16(to, from + column);
      } else {
        for (int e = 0; e < kStepFeatures; ++e)
          to[e].bits = from != nullptr && e < left ? from[(column + e) * x_strides[3]].bits
                                                   : std::uint16_t(0);
      }
    }
  };

  // The sine whose basis this thread makes.
  core::FixedPhases fixed;
  const std::int64_t sine =
      steps.sine(steps.at(first_step + thread / kStepFeatures), thread % kStepFeatures);
  if (sine >= 0) fixed.set(p.freqs[head * steps.features * steps.sines + sine], p.start);
  const bool even = tiles.batch % 2 == 0;  // then two neighbouring tokens share a position
  const auto fill_basis = [&](std::int64_t tile) {
    const std::uint32_t phase = fixed.at(tiles.first_position(tile));
    const auto at = [&](int t, float* c, float* s) {
      fast_cos_sin_of(phase + static_cast<std::uint32_t>(t) * fixed.short_step(), c, s);
    };
    const int count = even ? tiles.positions : kWeightGradientTokens / 2;
    for (int i = 0; i < count; ++i) {
      float c0, s0, c1, s1;
      if (even) {
        at(i, &c0, &s0);
        c1 = c0;
        s1 = s0;
      } else {
        at(2 * i / tiles.batch, &c0, &s0);
        at((2 * i + 1) / tiles.batch, &c1, &s1);
      }
      shared.basis[i * Shared::kBasisRow + thread] = {pack_pair<Storage>(c0, c1),
                                                      pack_pair<Storage>(s0, s1)};
    }
  };

  for (int pair = thread; pair < kWeightGradientTokens / 2; pair += kThreads) {
    const int t = 2 * pair / tiles.batch;
    shared.basis_at[pair] = (!even ? pair : t < tiles.positions ? t : 0) * Shared::kBasisRow;
  }

  // Columns of this warp's features in the tile of x.
  int column[kWarpSteps];
  TORCH_SPE_UNROLL
  for (int m = 0; m < kWarpSteps; ++m) {
    const std::int64_t step = min_of(first_step + warp * kWarpSteps + m, steps.count - 1);
    column[m] = static_cast<int>(steps.at(step).group - first_group) * kStepFeatures;
  }
  float sums[kWarpSteps][kSineTileRealizations / 8][4] = {};
  const std::int64_t per_segment = ceil_div(tiles.count(), segments);
  const std::int64_t first_tile = segment * per_segment;
  const std::int64_t end_tile = min_of(tiles.count(), first_tile + per_segment);
  if (first_tile < end_tile) copy(first_tile, 0);
  for (std::int64_t tile = first_tile; tile < end_tile; ++tile) {
    const int buffer = static_cast<int>((tile - first_tile) % 2);
    copy_async_wait();
    if (p.feature_map != FeatureMap::kIdentity) {  // whoever copied features maps them
      Storage* const own = shared.x + buffer * shared.x_size;
      TORCH_SPE_KEEP_LOOP
      for (int i = thread; i < kWeightGradientTokens * shared.groups; i += kThreads)
        map_eight_features(p.feature_map, own + i / shared.groups * shared.x_row +
                                              i % shared.groups * kStepFeatures);
    }
    __syncthreads();  // this tile has arrived, and the one before has been used
    fill_basis(tile);
    if (tile + 1 < end_tile) copy(tile + 1, 1 - buffer);
    __syncwarp();  // the basis is there: a warp makes that of its own steps
    const Storage* const x_tile = shared.x + buffer * shared.x_size + lane * shared.x_row;
    const Storage* const grad_tile = shared.grad + buffer * Shared::kGrad +
                                     lane % 16 * row_of<Storage>(kSineTileRealizations) +
                                     lane / 16 * 8;
    const typename Shared::Pairs* const basis =
        shared.basis + warp * kWarpSteps * kStepFeatures + group;
    for (int half = 0; half < kWeightGradientTokens / kLanes; ++half) {
      // x of tokens 8 i + 2 member + {0, 1} of feature `group` of each step.
      std::uint32_t values[kWarpSteps][4];
      TORCH_SPE_UNROLL
      for (int m = 0; m < kWarpSteps; ++m)
        ldmatrix_x4<true>(values[m], x_tile + half * kLanes * shared.x_row + column[m]);
      TORCH_SPE_UNROLL
      for (int quarter = 0; quarter < 2; ++quarter) {
        const int depth = 2 * half + quarter;  // 16 tokens
        std::uint32_t b[kSineTileRealizations / 16][4];
        TORCH_SPE_UNROLL
        for (int j = 0; j < kSineTileRealizations / 16; ++j)
          ldmatrix_x4<true>(
              b[j], grad_tile + depth * 16 * row_of<Storage>(kSineTileRealizations) + 16 * j);
        const int at[2] = {shared.basis_at[depth * 8 + member],
                           shared.basis_at[depth * 8 + 4 + member]};
        TORCH_SPE_UNROLL
        for (int m = 0; m < kWarpSteps; ++m) {
          std::uint32_t a[4];
          TORCH_SPE_UNROLL
          for (int e = 0; e < 2; ++e) {
            const auto pairs = basis[at[e] + m * kStepFeatures];
            a[2 * e] = multiply_pairs<Storage>(values[m][2 * quarter + e], pairs.cos);
            a[2 * e + 1] = multiply_pairs<Storage>(values[m][2 * quarter + e], pairs.sin);
          }
          TORCH_SPE_UNROLL
          for (int j = 0; j < kSineTileRealizations / 8; ++j) {
            const std::uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
            mma_m16n8k16<Storage>(sums[m][j], a, pair);
          }
        }
      }
    }
  }

  const std::int64_t rows = (segment * p.num_heads + head) * p.in_features;
  TORCH_SPE_UNROLL
  for (int m = 0; m < kWarpSteps; ++m) {
    const std::int64_t number = first_step + warp * kWarpSteps + m;
    if (number >= steps.count) continue;
    TORCH_SPE_UNROLL
    for (int part = 0; part < 2; ++part) {
      float* const row =
          steps.row(steps.at(number), group, part, realizations,
                    weight_parts + rows * 2 * p.num_sines * realizations,
                    constant_parts == nullptr ? nullptr : constant_parts + rows * realizations);
      if (row == nullptr) continue;
      TORCH_SPE_UNROLL
      for (int j = 0; j < kSineTileRealizations / 8; ++j) {
        TORCH_SPE_UNROLL
        for (int e = 0; e < 2; ++e) {
          const std::int64_t r = r0 + 8 * j + 2 * member + e;
          if (r < realizations) row[r] = sums[m][j][2 * part + e];
        }
      }
    }
  }
}

}  // namespace torch_spe::cuda
