// Kernel of the sine filter's gradients of x and frequencies on tensor cores, see steps.h.
#pragma once

#include "encode/sine/steps.h"

namespace torch_spe::cuda {

// Gradients of x and frequencies: a block walks over tiles of tokens of one head, each warp with 32
// tokens of a tile, whose gradients of 64 realizations it keeps as the second factor of
//   weight [16, 64] times gradients [64, 8 tokens]  (four times).
// Lane 4 g + c receives the gradients of feature g's cos and sin for tokens 2 c and 2 c + 1.
constexpr int kMostSummedSines = 2048;  // of a head, whose sums lie in shared memory

template <class Storage>
struct SineStepsInputGradientShared {
  static constexpr int kBasisRow = kStageSines + 4;
  static constexpr int kWeight = kStageRows * row_of<Storage>(kSineTileRealizations);
  int basis_size;
  double* totals;        // [D, K]
  std::uint32_t* basis;  // [2, position, slot]
  Storage* weight;       // [2, row, r]
  float* sums;           // [2, warp, slot, 2]

  TORCH_SPE_INLINE SineStepsInputGradientShared(MemoryLayout& layout, const TokenTiles& tiles,
                                                const SineSteps& steps)
      : basis_size(tiles.positions * kBasisRow),
        totals(layout.take<double>(steps.features * steps.sines)),
        basis(layout.take<std::uint32_t>(2 * basis_size)),
        weight(layout.take<Storage>(2 * kWeight)),
        sums(layout.take<float>(2 * kWarps * kStageSines * 2)) {}
};

template <class Storage>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    sine_steps_input_gradient_kernel(const SineFilterBackwardParams p, std::int64_t segments,
                                     double* freqs_parts) {  // [segment, H, D, K], or null
  using Shared = SineStepsInputGradientShared<Storage>;
  constexpr int kTiles = kSineWarpTokens / 8, kDepths = kSineTileRealizations / 16;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const TokenTiles tiles(p.batch, p.length, kSineTileTokens);
  const SineSteps steps(p);
  const Shared shared(layout, tiles, steps);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  const int group = lane / 4, member = lane % 4;
  const std::int64_t realizations = p.num_realizations,
                     realization_tiles = ceil_div(realizations, kSineTileRealizations);
  const std::int64_t segment = blockIdx.x % segments, head = blockIdx.x / segments;
  const SineCoefficients<Storage> coefficients(p, head);
  const auto& strides = p.grad_out_strides;
  const bool pairs = strides[3] == 1 && strides[0] % 2 == 0 && strides[1] % 2 == 0 &&
                     strides[2] % 2 == 0 && reinterpret_cast<std::uintptr_t>(p.grad_out) % 4 == 0;
  const bool even = tiles.batch % 2 == 0;  // then two neighbouring tokens share a position
  const std::int64_t num_sines = steps.features * steps.sines;
  for (std::int64_t i = thread; i < num_sines; i += kThreads) shared.totals[i] = 0;

  // A walk over a tile has `count` steps: for each group of features and tile of realizations, the
  // steps of the group.
  const std::int64_t count = steps.count * realization_tiles;
  struct StepPlace {
    std::int64_t group, realization_tile, k;
  };
  const auto step_place_at = [&](std::int64_t step) {
    const SineStep at = steps.at(step);
    const auto number = static_cast<std::uint32_t>(at.group);
    const auto size = static_cast<std::uint32_t>(realization_tiles);
    return StepPlace{number / size, number % size, at.k};
  };
  const std::int64_t stages = ceil_div(count, kStageSteps);

  const std::int64_t per_segment = ceil_div(tiles.count(), segments);
  const std::int64_t end_tile = min_of(tiles.count(), (segment + 1) * per_segment);
  for (std::int64_t tile = segment * per_segment; tile < end_tile; ++tile) {
    const std::int64_t b0 = tiles.first_batch(tile), n0 = tiles.first_position(tile);
    const auto bring_stage = [&](std::int64_t stage) {
      const std::int64_t first = stage * kStageSteps;
      Storage* const weight = shared.weight + stage % 2 * Shared::kWeight;
      TORCH_SPE_UNROLL
      for (int i = 0; i < kStageSteps; ++i) {
        const StepPlace place = step_place_at(first + i);
        coefficients.template copy<false>(
            steps, {place.group, place.k}, place.realization_tile * kSineTileRealizations,
            weight + i * kStepRows * row_of<Storage>(kSineTileRealizations));
      }
      const StepPlace own = step_place_at(first + thread % kStageSines / kStepFeatures);
      fill_stage_basis<Storage, false, Shared::kBasisRow>(
          p, steps, {own.group, own.k}, head, n0, tiles.positions,
          shared.basis + stage % 2 * shared.basis_size);
    };
    // Adds up the four warps' sums of a stage. SineSteps of several tiles of realizations may have
    // the same sine: they take turns.
    static_assert(kStageSines == kLanes);
    const auto fold = [&](std::int64_t stage) {
      if (freqs_parts == nullptr || thread >= kStageSines) return;
      const std::int64_t step = stage * kStageSteps + thread / kStepFeatures;
      const StepPlace place = step_place_at(step);
      const std::int64_t sine =
          step < count ? steps.sine({place.group, place.k}, thread % kStepFeatures) : -1;
      const float* const sums = shared.sums + stage % 2 * (kWarps * kStageSines * 2) + 2 * thread;
      double sum = 0, slope = 0;
      for (int w = 0; w < kWarps; ++w) {
        sum += static_cast<double>(sums[w * kStageSines * 2]);
        slope += static_cast<double>(sums[w * kStageSines * 2 + 1]);
      }
      for (int turn = 0; turn < kStageSteps; ++turn) {
        if (sine >= 0 && thread / kStepFeatures == turn)
          shared.totals[sine] += slope + (p.start + static_cast<double>(n0)) * sum;
        __syncwarp();
      }
    };

    // Tokens 8 j + 2 member + e of the warp's: 16 times the position, plus the batch row, both
    // relative to the tile's first; or -1.
    int token[kTiles][2], basis_at[kTiles][2];
    TORCH_SPE_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      TORCH_SPE_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int row = warp * kSineWarpTokens + 8 * j + 2 * member + e;
        const int t = row / tiles.batch, b = row % tiles.batch;
        const bool inside = t < tiles.positions && n0 + t < p.length && b0 + b < p.batch;
        token[j][e] = inside ? t * static_cast<int>(TokenTiles::kMostBatch) + b : -1;
        basis_at[j][e] = (t < tiles.positions ? t : 0) * Shared::kBasisRow + group;
      }
    }
    const auto position_of = [](int at) { return at / static_cast<int>(TokenTiles::kMostBatch); };
    const auto batch_of = [](int at) { return at % static_cast<int>(TokenTiles::kMostBatch); };
    std::uint16_t next[kTiles][2];  // x of the next group's feature `group`
    const auto load_x = [&](std::int64_t of_group) {
      const std::int64_t d = of_group * kStepFeatures + group;
      const Storage* const x = static_cast<const Storage*>(p.x) + b0 * p.x_strides[0] +
                               n0 * p.x_strides[1] + head * p.x_strides[2] + d * p.x_strides[3];
      TORCH_SPE_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        TORCH_SPE_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int at = token[j][e];
          next[j][e] =
              at >= 0 && d < p.in_features
                  ? x[batch_of(at) * p.x_strides[0] + position_of(at) * p.x_strides[1]].bits
                  : std::uint16_t(0);
        }
      }
    };
    // Gradients [64, 8 tokens] as second factors: realizations 2 member + {0, 1, 8, 9} + 16 depth
    // of token 8 j + group.
    std::uint32_t grad[kTiles][kDepths][2];
    const auto load_grad = [&](std::int64_t realization_tile) {
      TORCH_SPE_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        const int row = warp * kSineWarpTokens + 8 * j + group;
        const int t = row / tiles.batch, b = row % tiles.batch;
        const bool inside = t < tiles.positions && n0 + t < p.length && b0 + b < p.batch;
        const Storage* const from = static_cast<const Storage*>(p.grad_out) +
                                    (b0 + b) * strides[0] + (n0 + t) * strides[1] +
                                    head * strides[2];
        TORCH_SPE_UNROLL
        for (int depth = 0; depth < kDepths; ++depth) {
          TORCH_SPE_UNROLL
          for (int half = 0; half < 2; ++half) {
            const std::int64_t r =
                realization_tile * kSineTileRealizations + 16 * depth + 8 * half + 2 * member;
            std::uint32_t pair = 0;
            if (inside && pairs && r + 1 < realizations) {
              pair = *reinterpret_cast<const std::uint32_t*>(from + r);
            } else if (inside) {
              if (r < realizations) pair = from[r * strides[3]].bits;
              if (r + 1 < realizations)
                pair |= static_cast<std::uint32_t>(from[(r + 1) * strides[3]].bits) << 16;
            }
            grad[j][depth][half] = pair;
          }
        }
      }
    };

    float x[kTiles][2], slope_x[kTiles][2], grad_x[kTiles][2];  // slope_x: x times the position
    load_x(0);
    __syncthreads();  // the tile before has used its stages
    bring_stage(0);
    StepPlace place{0, 0, 0};
    for (std::int64_t stage = 0; stage < stages; ++stage) {
      copy_async_wait();
      __syncthreads();  // this stage has arrived, and the one before has been used
      if (stage > 0) fold(stage - 1);
      if (stage + 1 < stages) bring_stage(stage + 1);
      const std::uint32_t* basis = shared.basis + stage % 2 * shared.basis_size;
      const Storage* weight = shared.weight + stage % 2 * Shared::kWeight +
                              lane % 16 * row_of<Storage>(kSineTileRealizations) + lane / 16 * 8;
      float* sums = shared.sums + (stage % 2 * kWarps + warp) * kStageSines * 2 + 2 * group;
      const int in_stage = static_cast<int>(min_of(kStageSteps, count - stage * kStageSteps));
      for (int s = 0; s < in_stage; ++s) {
        if (place.k == 0) {
          if (place.realization_tile == 0) {
            TORCH_SPE_UNROLL
            for (int j = 0; j < kTiles; ++j) {
              TORCH_SPE_UNROLL
              for (int e = 0; e < 2; ++e) {
                Storage value;
                value.bits = next[j][e];
                x[j][e] = read_feature(p.feature_map, value);
                slope_x[j][e] = x[j][e] * static_cast<float>(position_of(token[j][e]));
                grad_x[j][e] = 0;
              }
            }
            load_x(place.group + 1);
          }
          if (realization_tiles > 1 || place.group == 0) load_grad(place.realization_tile);
        }
        float products[kTiles][4] = {};
        TORCH_SPE_UNROLL
        for (int depth = 0; depth < kDepths; ++depth) {
          std::uint32_t a[4];
          ldmatrix_x4<false>(a, weight + 16 * depth);
          TORCH_SPE_UNROLL
          for (int j = 0; j < kTiles; ++j) mma_m16n8k16<Storage>(products[j], a, grad[j][depth]);
        }
        float sum = 0, slope = 0;  // of the phase's gradient
        TORCH_SPE_UNROLL
        for (int j = 0; j < kTiles; ++j) {
          float c = 0, s_of = 0;
          TORCH_SPE_UNROLL
          for (int e = 0; e < 2; ++e) {
            if (e == 0 || !even) unpack_pair<Storage>(basis[basis_at[j][e]], &c, &s_of);
            const float grad_cos = products[j][e], grad_sin = products[j][2 + e];
            grad_x[j][e] += c * grad_cos + s_of * grad_sin;
            const float rotated = c * grad_sin - s_of * grad_cos;
            sum += x[j][e] * rotated;
            slope += slope_x[j][e] * rotated;
          }
        }
        if (freqs_parts != nullptr) {
          sum = quad_sum(sum);
          slope = quad_sum(slope);
          if (member == 0) {
            sums[0] = sum;
            sums[1] = slope;
          }
        }
        basis += kStepFeatures;
        sums += 2 * kStepFeatures;
        weight += kStepRows * row_of<Storage>(kSineTileRealizations);
        if (++place.k < steps.per_group) continue;
        place.k = 0;
        if (++place.realization_tile < realization_tiles) continue;
        const std::int64_t d = place.group * kStepFeatures + group;
        TORCH_SPE_UNROLL
        for (int j = 0; j < kTiles; ++j) {
          TORCH_SPE_UNROLL
          for (int e = 0; e < 2; ++e) {
            const int at = token[j][e];
            if (p.grad_x == nullptr || at < 0 || d >= p.in_features) continue;
            const std::int64_t row = (b0 + batch_of(at)) * p.length + n0 + position_of(at);
            const float grad_value = p.feature_map == FeatureMap::kIdentity
                                         ? grad_x[j][e]
                                         : gradient_of_input(p.feature_map, grad_x[j][e], x[j][e]);
            write(grad_value,
                  static_cast<Storage*>(p.grad_x) + (row * p.num_heads + head) * p.in_features + d);
          }
        }
        place = {place.group + 1, 0, 0};
      }
    }
    __syncthreads();  // the sums of the last stage are there
    fold(stages - 1);
  }
  if (freqs_parts == nullptr) return;
  __syncthreads();
  double* const part = freqs_parts + (segment * p.num_heads + head) * num_sines;
  for (std::int64_t i = thread; i < num_sines; i += kThreads)
    part[i] = core::kTwoPi * shared.totals[i];
}

}  // namespace torch_spe::cuda
