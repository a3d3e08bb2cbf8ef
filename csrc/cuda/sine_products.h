// The sine filter of 16-bit numbers at consecutive positions, on tensor cores. The products
// x (.) basis are made in registers, just where the tensor cores want them.
//
// Weights come in steps of 16 rows: the cos and the sin of the k-th sine of 8 features. After the K
// sines of these follows, when there is a constant, one whose phase is always 0: the constant takes
// the place of its cos, and 0 that of its sin. Four steps at a time are brought into shared memory,
// with their basis, while the tensor cores work on the four before.
#pragma once

#include "phasors.h"
#include "sine_filter.h"

namespace torch_spe::cuda {

constexpr int kGroup = 8;  // features of a step
constexpr int kStepRows = 2 * kGroup;
constexpr int kStageSteps = 4;
constexpr int kStageSines = kStageSteps * kGroup;
constexpr int kStageRows = kStageSteps * kStepRows;
constexpr int kRealTile = 64;
constexpr int kTileTokens = 128;
constexpr int kWarpTokens = kTileTokens / kWarps;

TORCH_SPE_DEVICE void cos_sin_of(std::uint32_t phase, float* cos_out, float* sin_out) {
  fast_cos_sin(core::angle_of(phase), cos_out, sin_out);
}

// Step k of a group of 8 features.
struct Step {
  std::int64_t group, k;
};

struct Steps {
  std::int64_t features, sines, per_group, groups, count;

  TORCH_SPE_INLINE explicit Steps(const SineFilterParams& p)
      : features(p.in_features),
        sines(p.num_sines),
        per_group(p.num_sines + (p.constant != nullptr ? 1 : 0)),
        groups(ceil_div(p.in_features, kGroup)),
        count(groups * per_group) {}
  TORCH_SPE_DEVICE Step at(std::int64_t step) const {
    // 32 bits: divisions of 64 take ten times as long.
    const auto size = static_cast<std::uint32_t>(per_group);
    const auto group = static_cast<std::uint32_t>(step) / size;
    return {group, static_cast<std::uint32_t>(step) - group * size};
  }
  // The index of feature f's sine of a step among those of a head, or -1 if there is none.
  TORCH_SPE_DEVICE std::int64_t sine(const Step& step, int f) const {
    const std::int64_t d = step.group * kGroup + f;
    return d < features && step.k < sines ? d * sines + step.k : -1;
  }
  // The row of a head's weight [D, 2K, R] or constant [D, R] for feature f's cos (part 0) or sin
  // (part 1), or null.
  template <class Number>
  TORCH_SPE_DEVICE Number* row(const Step& step, int f, int part, std::int64_t real, Number* weight,
                               Number* constant) const {
    const std::int64_t d = step.group * kGroup + f;
    if (d >= features) return nullptr;
    if (step.k < sines) return weight + ((d * sines + step.k) * 2 + part) * real;
    return part == 0 && constant != nullptr ? constant + d * real : nullptr;
  }
};

// A head's weight and constant.
template <class Storage>
struct Coefficients {
  const Storage *weight, *constant;
  std::int64_t real;
  bool aligned;

  TORCH_SPE_DEVICE Coefficients(const SineFilterParams& p, std::int64_t head)
      : weight(static_cast<const Storage*>(p.weight) +
               head * p.in_features * 2 * p.num_sines * p.num_realizations),
        constant(p.constant == nullptr ? nullptr
                                       : static_cast<const Storage*>(p.constant) +
                                             head * p.in_features * p.num_realizations),
        real(p.num_realizations),
        aligned(rows_are_aligned<Storage>(p.weight, real) &&
                rows_are_aligned<Storage>(p.constant, real)) {}

  // Starts to copy row `kk` of 16 of a step, realizations [r0, r0 + kRealTile), into the tile
  // `out`: 8 threads take a row. cos and sin of a feature are neighbours, or 8 rows apart.
  template <bool kNeighbours>
  TORCH_SPE_DEVICE void copy(const Steps& steps, const Step& step, std::int64_t r0,
                             Storage* out) const {
    const int kk = static_cast<int>(threadIdx.x) / 8,
              column = static_cast<int>(threadIdx.x) % 8 * 8;
    const int f = kNeighbours ? kk / 2 : kk % kGroup, part = kNeighbours ? kk % 2 : kk / kGroup;
    const Storage* const row = steps.row(step, f, part, real, weight, constant);
    Storage* const to = out + kk * row_of<Storage>(kRealTile) + column;
    const std::int64_t left = real - r0 - column;
    if (aligned && row != nullptr && left >= 8) {
      copy_async16(to, row + r0 + column);
    } else {
      for (int e = 0; e < 8; ++e) {
        to[e].bits = row != nullptr && e < left ? row[r0 + column + e].bits : std::uint16_t(0);
      }
    }
  }
};

// (cos, sin) of the sines of a stage as pairs of 16 bits, out[position][slot]: four threads make
// one sine, each a quarter of the positions. In kInterleaved order features f and f + 4 of a step
// are neighbours.
template <class Storage, bool kInterleaved, int kRow>
TORCH_SPE_DEVICE void fill_stage_basis(const SineFilterParams& p, const Steps& steps,
                                       const Step& step, std::int64_t head, std::int64_t n0,
                                       int positions, std::uint32_t* out) {
  const int slot = static_cast<int>(threadIdx.x) % kStageSines, in_step = slot % kGroup;
  const int f = kInterleaved ? in_step / 2 + in_step % 2 * (kGroup / 2) : in_step;
  const int quarter = (positions + 3) / 4;
  const int begin = static_cast<int>(threadIdx.x) / kStageSines * quarter;
  const int end = begin + quarter < positions ? begin + quarter : positions;
  const std::int64_t sine = steps.sine(step, f);
  core::FixedPhases fixed;
  if (sine >= 0) fixed.set(p.freqs[head * steps.features * steps.sines + sine], p.start);
  std::uint32_t phase = fixed.at(n0 + begin);
  for (int t = begin; t < end; ++t, phase += fixed.short_step()) {
    float c, s;
    cos_sin_of(phase, &c, &s);
    out[t * kRow + slot] = pack_pair<Storage>(c, s);
  }
}

// Forward: a block takes a tile of tokens and 64 realizations, each warp 32 tokens.
constexpr int kForwardBlocks = 3;  // of a multiprocessor, as many as fit without spilling registers

template <class Storage>
struct SineProductShared {
  static constexpr int kBasisRow = kStageSines + 8;
  static constexpr int kWeight = kStageRows * row_of<Storage>(kRealTile);
  int basis_size;
  std::uint32_t* basis;  // [2, position, slot]
  Storage* weight;       // [2, row, r]

  TORCH_SPE_INLINE SineProductShared(Carver& carver, const TokenTiles& tiles)
      : basis_size(tiles.positions * kBasisRow),
        basis(carver.take<std::uint32_t>(2 * basis_size)),
        weight(carver.take<Storage>(2 * kWeight)) {}
};

template <class Storage>
__global__ void __launch_bounds__(kThreads, kForwardBlocks)
    sine_product_kernel(const SineFilterParams p) {
  using Shared = SineProductShared<Storage>;
  constexpr int kRows = kWarpTokens / 8;  // of tokens, for a lane
  TORCH_SPE_SHARED_MEMORY(memory);
  Carver carver(memory);
  const TokenTiles tiles(p.batch, p.length, kTileTokens);
  const Shared shared(carver, tiles);
  const Steps steps(p);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  const int group = lane / 4, member = lane % 4;
  const std::int64_t real = p.num_realizations, real_tiles = ceil_div(real, kRealTile);
  const std::int64_t block = blockIdx.x;
  const std::int64_t r0 = block % real_tiles * kRealTile;
  const std::int64_t tile = block / real_tiles % tiles.count();
  const std::int64_t head = block / real_tiles / tiles.count();
  const std::int64_t b0 = tiles.first_batch(tile), n0 = tiles.first_position(tile);
  const Coefficients<Storage> coefficients(p, head);

  // Rows group + 8 i of the warp's tokens, and where their basis lies.
  const Storage* x[kRows];  // from feature `member` on
  bool inside[kRows];
  int basis_at[kRows];
  TORCH_SPE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    const int row = warp * kWarpTokens + 8 * i + group;
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
      x[i] += kGroup * p.x_strides[3];
    }
    left -= kGroup;
  };
  const auto bring_stage = [&](std::int64_t stage) {
    const std::int64_t first = stage * kStageSteps;
    Step step = steps.at(first);
    Storage* const weight = shared.weight + stage % 2 * Shared::kWeight;
    TORCH_SPE_UNROLL
    for (int i = 0; i < kStageSteps; ++i) {
      coefficients.template copy<true>(steps, step, r0,
                                       weight + i * kStepRows * row_of<Storage>(kRealTile));
      if (++step.k == steps.per_group) step = {step.group + 1, 0};
    }
    fill_stage_basis<Storage, true, Shared::kBasisRow>(
        p, steps, steps.at(first + thread % kStageSines / kGroup), head, n0, tiles.positions,
        shared.basis + stage % 2 * shared.basis_size);
  };

  float sums[kRows / 2][kRealTile / 8][4] = {};
  load_x();
  const std::int64_t stages = ceil_div(steps.count, kStageSteps);
  bring_stage(0);
  Step step{0, 0};
  for (std::int64_t stage = 0; stage < stages; ++stage) {
    copy_async_wait();
    __syncthreads();  // this stage has arrived, and the one before has been used
    if (stage + 1 < stages) bring_stage(stage + 1);
    const std::uint32_t* basis = shared.basis + stage % 2 * shared.basis_size;
    const Storage* weight = shared.weight + stage % 2 * Shared::kWeight +
                            lane % 16 * row_of<Storage>(kRealTile) + lane / 16 * 8;
    const int count = static_cast<int>(min_of(kStageSteps, steps.count - stage * kStageSteps));
    for (int s = 0; s < count; ++s) {
      if (step.k == 0) {
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
              multiply_pairs<Storage>(values[i][e], basis[basis_at[i] + s * kGroup + e]);
        }
      }
      TORCH_SPE_UNROLL
      for (int j = 0; j < kRealTile / 16; ++j) {
        std::uint32_t b[4];
        ldmatrix_x4<true>(b, weight + 16 * j);
        TORCH_SPE_UNROLL
        for (int e = 0; e < 2; ++e) {
          const std::uint32_t pair[2] = {b[2 * e], b[2 * e + 1]};
          TORCH_SPE_UNROLL
          for (int i = 0; i < kRows / 2; ++i) mma_m16n8k16<Storage>(sums[i][2 * j + e], a[i], pair);
        }
      }
      weight += kStepRows * row_of<Storage>(kRealTile);
      if (++step.k == steps.per_group) step = {step.group + 1, 0};
    }
  }

  TORCH_SPE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    if (!inside[i]) continue;
    const int row = warp * kWarpTokens + 8 * i + group;
    const std::int64_t n = n0 + row / tiles.batch, b = b0 + row % tiles.batch;
    Storage* const out =
        static_cast<Storage*>(p.out) + ((b * p.length + n) * p.num_heads + head) * real;
    TORCH_SPE_UNROLL
    for (int j = 0; j < kRealTile / 8; ++j) {
      const std::int64_t r = r0 + 8 * j + 2 * member;
      const float first = sums[i / 2][j][i % 2 * 2], second = sums[i / 2][j][i % 2 * 2 + 1];
      if (real % 2 == 0) {
        if (r < real)
          *reinterpret_cast<std::uint32_t*>(out + r) = pack_pair<Storage>(first, second);
      } else {
        if (r < real) write(first, out + r);
        if (r + 1 < real) write(second, out + r + 1);
      }
    }
  }
}

// Gradients of x and frequencies: a block walks over tiles of tokens of one head, each warp with 32
// tokens of a tile, whose gradients of 64 realizations it keeps as the second factor of
//   weight [16, 64] times gradients [64, 8 tokens]  (four times).
// Lane 4 g + c receives the gradients of feature g's cos and sin for tokens 2 c and 2 c + 1.
constexpr int kMostTurningSines = 2048;  // of a head, whose sums lie in shared memory

template <class Storage>
struct SineDataShared {
  static constexpr int kBasisRow = kStageSines + 4;
  static constexpr int kWeight = kStageRows * row_of<Storage>(kRealTile);
  int basis_size;
  double* totals;        // [D, K]
  std::uint32_t* basis;  // [2, position, slot]
  Storage* weight;       // [2, row, r]
  float* sums;           // [2, warp, slot, 2]

  TORCH_SPE_INLINE SineDataShared(Carver& carver, const TokenTiles& tiles, const Steps& steps)
      : basis_size(tiles.positions * kBasisRow),
        totals(carver.take<double>(steps.features * steps.sines)),
        basis(carver.take<std::uint32_t>(2 * basis_size)),
        weight(carver.take<Storage>(2 * kWeight)),
        sums(carver.take<float>(2 * kWarps * kStageSines * 2)) {}
};

template <class Storage>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    sine_data_kernel(const SineFilterBackwardParams p, std::int64_t segments,
                     double* freqs_parts) {  // [segment, H, D, K], or null
  using Shared = SineDataShared<Storage>;
  constexpr int kTiles = kWarpTokens / 8, kDepths = kRealTile / 16;
  TORCH_SPE_SHARED_MEMORY(memory);
  Carver carver(memory);
  const TokenTiles tiles(p.batch, p.length, kTileTokens);
  const Steps steps(p);
  const Shared shared(carver, tiles, steps);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  const int group = lane / 4, member = lane % 4;
  const std::int64_t real = p.num_realizations, real_tiles = ceil_div(real, kRealTile);
  const std::int64_t segment = blockIdx.x % segments, head = blockIdx.x / segments;
  const Coefficients<Storage> coefficients(p, head);
  const auto& strides = p.grad_out_strides;
  const bool pairs = strides[3] == 1 && strides[0] % 2 == 0 && strides[1] % 2 == 0 &&
                     strides[2] % 2 == 0 && reinterpret_cast<std::uintptr_t>(p.grad_out) % 4 == 0;
  const bool even = tiles.batch % 2 == 0;  // then two neighbouring tokens share a position
  const std::int64_t num_sines = steps.features * steps.sines;
  for (std::int64_t i = thread; i < num_sines; i += kThreads) shared.totals[i] = 0;

  // A walk over a tile has `count` steps: for each group of features and tile of realizations, the
  // steps of the group.
  const std::int64_t count = steps.count * real_tiles;
  struct Place {
    std::int64_t group, real_tile, k;
  };
  const auto place_at = [&](std::int64_t step) {
    const Step at = steps.at(step);
    const auto number = static_cast<std::uint32_t>(at.group);
    const auto size = static_cast<std::uint32_t>(real_tiles);
    return Place{number / size, number % size, at.k};
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
        const Place place = place_at(first + i);
        coefficients.template copy<false>(steps, {place.group, place.k},
                                          place.real_tile * kRealTile,
                                          weight + i * kStepRows * row_of<Storage>(kRealTile));
      }
      const Place own = place_at(first + thread % kStageSines / kGroup);
      fill_stage_basis<Storage, false, Shared::kBasisRow>(
          p, steps, {own.group, own.k}, head, n0, tiles.positions,
          shared.basis + stage % 2 * shared.basis_size);
    };
    // Adds up the four warps' sums of a stage. Steps of several tiles of realizations may have the
    // same sine: they take turns.
    static_assert(kStageSines == kLanes);
    const auto fold = [&](std::int64_t stage) {
      if (freqs_parts == nullptr || thread >= kStageSines) return;
      const std::int64_t step = stage * kStageSteps + thread / kGroup;
      const Place place = place_at(step);
      const std::int64_t sine =
          step < count ? steps.sine({place.group, place.k}, thread % kGroup) : -1;
      const float* const sums = shared.sums + stage % 2 * (kWarps * kStageSines * 2) + 2 * thread;
      double sum = 0, slope = 0;
      for (int w = 0; w < kWarps; ++w) {
        sum += static_cast<double>(sums[w * kStageSines * 2]);
        slope += static_cast<double>(sums[w * kStageSines * 2 + 1]);
      }
      for (int turn = 0; turn < kStageSteps; ++turn) {
        if (sine >= 0 && thread / kGroup == turn)
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
        const int row = warp * kWarpTokens + 8 * j + 2 * member + e;
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
      const std::int64_t d = of_group * kGroup + group;
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
    const auto load_grad = [&](std::int64_t real_tile) {
      TORCH_SPE_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        const int row = warp * kWarpTokens + 8 * j + group;
        const int t = row / tiles.batch, b = row % tiles.batch;
        const bool inside = t < tiles.positions && n0 + t < p.length && b0 + b < p.batch;
        const Storage* const from = static_cast<const Storage*>(p.grad_out) +
                                    (b0 + b) * strides[0] + (n0 + t) * strides[1] +
                                    head * strides[2];
        TORCH_SPE_UNROLL
        for (int depth = 0; depth < kDepths; ++depth) {
          TORCH_SPE_UNROLL
          for (int half = 0; half < 2; ++half) {
            const std::int64_t r = real_tile * kRealTile + 16 * depth + 8 * half + 2 * member;
            std::uint32_t pair = 0;
            if (inside && pairs && r + 1 < real) {
              pair = *reinterpret_cast<const std::uint32_t*>(from + r);
            } else if (inside) {
              if (r < real) pair = from[r * strides[3]].bits;
              if (r + 1 < real)
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
    Place place{0, 0, 0};
    for (std::int64_t stage = 0; stage < stages; ++stage) {
      copy_async_wait();
      __syncthreads();  // this stage has arrived, and the one before has been used
      if (stage > 0) fold(stage - 1);
      if (stage + 1 < stages) bring_stage(stage + 1);
      const std::uint32_t* basis = shared.basis + stage % 2 * shared.basis_size;
      const Storage* weight = shared.weight + stage % 2 * Shared::kWeight +
                              lane % 16 * row_of<Storage>(kRealTile) + lane / 16 * 8;
      float* sums = shared.sums + (stage % 2 * kWarps + warp) * kStageSines * 2 + 2 * group;
      const int in_stage = static_cast<int>(min_of(kStageSteps, count - stage * kStageSteps));
      for (int s = 0; s < in_stage; ++s) {
        if (place.k == 0) {
          if (place.real_tile == 0) {
            TORCH_SPE_UNROLL
            for (int j = 0; j < kTiles; ++j) {
              TORCH_SPE_UNROLL
              for (int e = 0; e < 2; ++e) {
                Storage value;
                value.bits = next[j][e];
                x[j][e] = read(value);
                slope_x[j][e] = x[j][e] * static_cast<float>(position_of(token[j][e]));
                grad_x[j][e] = 0;
              }
            }
            load_x(place.group + 1);
          }
          if (real_tiles > 1 || place.group == 0) load_grad(place.real_tile);
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
            const float turned = c * grad_sin - s_of * grad_cos;
            sum += x[j][e] * turned;
            slope += slope_x[j][e] * turned;
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
        basis += kGroup;
        sums += 2 * kGroup;
        weight += kStepRows * row_of<Storage>(kRealTile);
        if (++place.k < steps.per_group) continue;
        place.k = 0;
        if (++place.real_tile < real_tiles) continue;
        const std::int64_t d = place.group * kGroup + group;
        TORCH_SPE_UNROLL
        for (int j = 0; j < kTiles; ++j) {
          TORCH_SPE_UNROLL
          for (int e = 0; e < 2; ++e) {
            const int at = token[j][e];
            if (p.grad_x == nullptr || at < 0 || d >= p.in_features) continue;
            const std::int64_t row = (b0 + batch_of(at)) * p.length + n0 + position_of(at);
            write(grad_x[j][e],
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

// Gradients of weight and constant: a block takes 16 steps and 64 realizations of one head, four
// steps a warp, and walks over the tokens of a segment.
constexpr int kWarpSteps = 4;
constexpr int kBlockSteps = kWarps * kWarpSteps;
constexpr int kWeightTokens = 64;
static_assert(kBlockSteps * kGroup == kThreads);  // a thread makes the basis of one sine

template <class Storage>
struct SineWeightShared {
  static constexpr int kBasisRow = kThreads + 4;
  static constexpr int kGrad = kWeightTokens * row_of<Storage>(kRealTile);
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

  TORCH_SPE_INLINE SineWeightShared(Carver& carver, const TokenTiles& tiles, const Steps& steps)
      : groups(static_cast<int>(
            min_of(steps.groups, (kBlockSteps - 1 + steps.per_group - 1) / steps.per_group + 1))),
        x_row(kGroup * (groups | 1)),  // an odd multiple: rows lie in different banks
        x_size(kWeightTokens * x_row),
        x(carver.take<Storage>(2 * x_size)),
        grad(carver.take<Storage>(2 * kGrad)),
        basis(carver.take<Pairs>((tiles.batch % 2 == 0 ? tiles.positions : kWeightTokens / 2) *
                                 kBasisRow)),
        basis_at(carver.take<int>(kWeightTokens / 2)) {}
};

template <class Storage>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    sine_weight_kernel(const SineFilterBackwardParams p, std::int64_t segments,
                       float* weight_parts,      // [segment, H, D, 2K, R]
                       float* constant_parts) {  // [segment, H, D, R]
  using Shared = SineWeightShared<Storage>;
  TORCH_SPE_SHARED_MEMORY(memory);
  Carver carver(memory);
  const TokenTiles tiles(p.batch, p.length, kWeightTokens);
  const Steps steps(p);
  const Shared shared(carver, tiles, steps);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  const int group = lane / 4, member = lane % 4;
  const std::int64_t real = p.num_realizations, real_tiles = ceil_div(real, kRealTile);
  const std::int64_t step_tiles = ceil_div(steps.count, kBlockSteps);
  const std::int64_t block = blockIdx.x;
  const std::int64_t segment = block % segments;
  const std::int64_t r0 = block / segments % real_tiles * kRealTile;
  const std::int64_t first_step = block / segments / real_tiles % step_tiles * kBlockSteps;
  const std::int64_t head = block / segments / real_tiles / step_tiles;
  const std::int64_t first_group = steps.at(first_step).group;
  const auto &x_strides = p.x_strides, &strides = p.grad_out_strides;
  const std::int64_t d0 = first_group * kGroup;
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
    copy_tile<kWeightTokens, kRealTile, Storage>(
        shared.grad + buffer * Shared::kGrad, real - r0, strides[3], grad_aligned,
        [&](int token) { return row(grad, strides, token); });
    Storage* const out = shared.x + buffer * shared.x_size;
    for (int i = thread; i < kWeightTokens * shared.groups; i += kThreads) {
      const int token = i / shared.groups, column = i % shared.groups * kGroup;
      const Storage* const from = row(x, x_strides, token);
      Storage* const to = out + token * shared.x_row + column;
      const std::int64_t left = p.in_features - d0 - column;
      if (x_aligned && from != nullptr && left >= kGroup) {
        copy_async16(to, from + column);
      } else {
        for (int e = 0; e < kGroup; ++e)
          to[e].bits = from != nullptr && e < left ? from[(column + e) * x_strides[3]].bits
                                                   : std::uint16_t(0);
      }
    }
  };

  // The sine whose basis this thread makes.
  core::FixedPhases fixed;
  const std::int64_t sine = steps.sine(steps.at(first_step + thread / kGroup), thread % kGroup);
  if (sine >= 0) fixed.set(p.freqs[head * steps.features * steps.sines + sine], p.start);
  const bool even = tiles.batch % 2 == 0;  // then two neighbouring tokens share a position
  const auto fill_basis = [&](std::int64_t tile) {
    const std::uint32_t phase = fixed.at(tiles.first_position(tile));
    const auto at = [&](int t, float* c, float* s) {
      cos_sin_of(phase + static_cast<std::uint32_t>(t) * fixed.short_step(), c, s);
    };
    const int count = even ? tiles.positions : kWeightTokens / 2;
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

  for (int pair = thread; pair < kWeightTokens / 2; pair += kThreads) {
    const int t = 2 * pair / tiles.batch;
    shared.basis_at[pair] = (!even ? pair : t < tiles.positions ? t : 0) * Shared::kBasisRow;
  }

  // Columns of this warp's features in the tile of x.
  int column[kWarpSteps];
  TORCH_SPE_UNROLL
  for (int m = 0; m < kWarpSteps; ++m) {
    const std::int64_t step = min_of(first_step + warp * kWarpSteps + m, steps.count - 1);
    column[m] = static_cast<int>(steps.at(step).group - first_group) * kGroup;
  }
  float sums[kWarpSteps][kRealTile / 8][4] = {};
  const std::int64_t per_segment = ceil_div(tiles.count(), segments);
  const std::int64_t first_tile = segment * per_segment;
  const std::int64_t end_tile = min_of(tiles.count(), first_tile + per_segment);
  if (first_tile < end_tile) copy(first_tile, 0);
  for (std::int64_t tile = first_tile; tile < end_tile; ++tile) {
    const int buffer = static_cast<int>((tile - first_tile) % 2);
    copy_async_wait();
    __syncthreads();  // this tile has arrived, and the one before has been used
    fill_basis(tile);
    if (tile + 1 < end_tile) copy(tile + 1, 1 - buffer);
    __syncwarp();  // the basis is there: a warp makes that of its own steps
    const Storage* const x_tile = shared.x + buffer * shared.x_size + lane * shared.x_row;
    const Storage* const grad_tile = shared.grad + buffer * Shared::kGrad +
                                     lane % 16 * row_of<Storage>(kRealTile) + lane / 16 * 8;
    const typename Shared::Pairs* const basis = shared.basis + warp * kWarpSteps * kGroup + group;
    for (int half = 0; half < kWeightTokens / kLanes; ++half) {
      // x of tokens 8 i + 2 member + {0, 1} of feature `group` of each step.
      std::uint32_t values[kWarpSteps][4];
      TORCH_SPE_UNROLL
      for (int m = 0; m < kWarpSteps; ++m)
        ldmatrix_x4<true>(values[m], x_tile + half * kLanes * shared.x_row + column[m]);
      TORCH_SPE_UNROLL
      for (int quarter = 0; quarter < 2; ++quarter) {
        const int depth = 2 * half + quarter;  // 16 tokens
        std::uint32_t b[kRealTile / 16][4];
        TORCH_SPE_UNROLL
        for (int j = 0; j < kRealTile / 16; ++j)
          ldmatrix_x4<true>(b[j], grad_tile + depth * 16 * row_of<Storage>(kRealTile) + 16 * j);
        const int at[2] = {shared.basis_at[depth * 8 + member],
                           shared.basis_at[depth * 8 + 4 + member]};
        TORCH_SPE_UNROLL
        for (int m = 0; m < kWarpSteps; ++m) {
          std::uint32_t a[4];
          TORCH_SPE_UNROLL
          for (int e = 0; e < 2; ++e) {
            const auto pairs = basis[at[e] + m * kGroup];
            a[2 * e] = multiply_pairs<Storage>(values[m][2 * quarter + e], pairs.cos);
            a[2 * e + 1] = multiply_pairs<Storage>(values[m][2 * quarter + e], pairs.sin);
          }
          TORCH_SPE_UNROLL
          for (int j = 0; j < kRealTile / 8; ++j) {
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
      float* const row = steps.row(
          steps.at(number), group, part, real, weight_parts + rows * 2 * p.num_sines * real,
          constant_parts == nullptr ? nullptr : constant_parts + rows * real);
      if (row == nullptr) continue;
      TORCH_SPE_UNROLL
      for (int j = 0; j < kRealTile / 8; ++j) {
        TORCH_SPE_UNROLL
        for (int e = 0; e < 2; ++e) {
          const std::int64_t r = r0 + 8 * j + 2 * member + e;
          if (r < real) row[r] = sums[m][j][2 * part + e];
        }
      }
    }
  }
}

}  // namespace torch_spe::cuda
