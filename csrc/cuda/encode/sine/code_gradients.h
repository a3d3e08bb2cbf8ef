// Kernel of the sine filter's gradients of weight, constant and frequencies where several batch
// rows share a position's codes, see codes.h. The gradients of the codes are a product over the
// batch,
//   grad_code[n, d, r] = sum over b of x[b, n, d] grad[b, n, r],
// rounded to 16 bits in shared memory, from where every warp takes those of its feature: times the
// basis they give the gradients of the weight, times the weight those of the basis.
#pragma once

#include "encode/sine/codes.h"

namespace torch_spe::cuda {

constexpr int kGradientFeatures = 16;  // of a block, one a warp
constexpr int kGradientThreads = 32 * kGradientFeatures;
constexpr int kGradientPositions = 16;  // of a tile
constexpr int kGradientRows = kGradientPositions * kCodeBatch;
constexpr int kCopyThreads = 128;  // four warps copy a tile, the next four the next one

template <class Storage>
struct SineCodeGradientsShared {
  static constexpr int kXRow = kGradientFeatures + 8;  // rows of 8 batch rows: different banks
  static constexpr int kX = kGradientRows * kXRow;
  static constexpr int kGrad = kGradientRows * kCodeRealizations;
  // Of codes at 8 positions. Features lie so that lanes write to different banks.
  static constexpr int kFeature = kCodeRealizations * 8 + 16;
  static constexpr int kCode = kGradientFeatures * kFeature;
  Storage* x;     // [2, position, b, d]
  Storage* grad;  // [2, position, b, r], the eights of r in the order that place() gives
  Storage* code;  // [2, d, r, position], gradients; see swaps_fours

  TORCH_SPE_INLINE explicit SineCodeGradientsShared(MemoryLayout& layout)
      : x(layout.take<Storage>(2 * kX)),
        grad(layout.take<Storage>(2 * kGrad)),
        code(layout.take<Storage>(2 * kCode)) {}

  // Where eight `r` / 8 of a row lies in it: those of 8 batch rows lie in different banks.
  TORCH_SPE_DEVICE static int place(int b, int eight) { return (eight ^ b) * 8; }
  // Whether positions 4 .. 7 of a feature's codes come before 0 .. 3, for the same reason.
  TORCH_SPE_DEVICE static int swaps_fours(int d) { return d / 4 % 2; }
};

// Whether this kernel and sine_codes_input_gradient_kernel serve. With few sines or rows those of
// steps*.h execute fewer instructions: theirs grow with the product of both.
template <class Storage>
TORCH_SPE_INLINE bool backward_runs_on_codes(const SineFilterBackwardParams& p) {
  const auto is_short = [](const std::int64_t (&strides)[4]) {  // offsets within a tile
    constexpr std::int64_t kMost = (std::int64_t{1} << 31) / (2 * kGradientPositions);
    return strides[0] < kMost && strides[1] < kMost && strides[0] > -kMost && strides[1] > -kMost;
  };
  return runs_on_codes<Storage>(p) &&
         p.batch * (p.num_sines + 1) >= 2 * kCodeBatch * SineCodesPlace::batch_tiles(p) &&
         is_aligned<Storage>(p.x, p.x_strides) &&
         is_aligned<Storage>(p.grad_out, p.grad_out_strides) && is_short(p.x_strides) &&
         is_short(p.grad_out_strides);
}

// What a block works on, and the tiles of 16 positions and 8 batch rows that it walks over. Indices
// have 32 bits, as registers are short.
struct SineCodeGradientsPlace {
  std::uint32_t segment, realization_tile, feature_tile, head, tile_count;
  int n0, b0;  // of the first tile

  TORCH_SPE_INLINE static std::int64_t tiles(const SineFilterParams& p) {
    return ceil_div(p.length, kGradientPositions) * SineCodesPlace::batch_tiles(p);
  }
  TORCH_SPE_INLINE static std::int64_t sums(const SineFilterParams& p) {
    return SineCodesPlace::realization_tiles(p) * ceil_div(p.in_features, kGradientFeatures) *
           p.num_heads;
  }
  // One block a multiprocessor, all at once.
  TORCH_SPE_INLINE static std::int64_t segments(const SineFilterParams& p) {
    return max_of(1, min_of(tiles(p), kWalkingBlocks / 2 / max_of(1, sums(p))));
  }
  TORCH_SPE_DEVICE SineCodeGradientsPlace(const SineFilterParams& p, std::int64_t segments) {
    BlockIndices block(blockIdx.x);
    segment = block.next(segments);
    realization_tile = block.next(SineCodesPlace::realization_tiles(p));
    feature_tile = block.next(ceil_div(p.in_features, kGradientFeatures));
    head = block.rest();
    const std::int64_t each = ceil_div(tiles(p), segments), first = segment * each;
    tile_count = static_cast<std::uint32_t>(max_of(0, min_of(tiles(p) - first, each)));
    const auto position_tiles = static_cast<std::uint32_t>(ceil_div(p.length, kGradientPositions));
    const std::uint32_t batch_tile = static_cast<std::uint32_t>(first) / position_tiles;
    n0 = static_cast<int>(static_cast<std::uint32_t>(first) - batch_tile * position_tiles) *
         kGradientPositions;
    b0 = static_cast<int>(batch_tile) * kCodeBatch;
  }
  TORCH_SPE_DEVICE int d0() const { return static_cast<int>(feature_tile) * kGradientFeatures; }
  TORCH_SPE_DEVICE int r0() const { return static_cast<int>(realization_tile) * kCodeRealizations; }
};

// The phase of one sine at the positions of tile after tile, in units of 2^-32 cycles; set() every
// kExactPositions keeps it right to 2^-22.
struct WalkingPhase {
  static constexpr int kExactPositions = 1024;
  std::uint32_t now = 0, step = 0;

  TORCH_SPE_DEVICE void set(double freq, double start, std::int64_t n) {
    core::FixedPhases fixed;
    fixed.set(freq, start);
    now = fixed.at(n);
    step = fixed.short_step();
  }
  TORCH_SPE_DEVICE void advance() { now += 8 * step; }
  // cos and sin at position t.
  TORCH_SPE_DEVICE void basis(std::uint32_t t, float* c, float* s) const {
    fast_cos_sin_of(now + t * step, c, s);
  }
};

// Columns of the products over the positions, in eights: the cos of 8 sines, then their sin; of an
// odd number of eights the last has the cos of 4 sines, then their sin. The constant is a sine
// whose phase is always 0.
template <int kEights>
struct SineColumns {
  static constexpr int kPairs = kEights / 2;
  static constexpr bool kOdd = kEights % 2 != 0;
  // The sine of column `column` of an eight.
  TORCH_SPE_DEVICE static int sine(int eight, int column) {
    return eight < 2 * kPairs ? eight / 2 * 8 + column : kPairs * 8 + column % 4;
  }
  TORCH_SPE_DEVICE static int part(int eight, int column) {
    return eight < 2 * kPairs ? eight % 2 : column / 4;
  }
};

// A block takes 16 features and 64 realizations of a head and walks over the tokens of a segment.
template <class Storage, int kEights>
__global__ void __launch_bounds__(kGradientThreads, 1)
    sine_code_gradients_kernel(const SineFilterBackwardParams p, std::int64_t segments,
                               double* freqs_parts,      // [segment, R / 64, H, D, K], or null
                               float* weight_parts,      // [segment, H, D, 2K, R], or null
                               float* constant_parts) {  // [segment, H, D, R], or null
  using Shared = SineCodeGradientsShared<Storage>;
  using Columns = SineColumns<kEights>;
  constexpr int kPairs = Columns::kPairs;
  constexpr bool kOdd = Columns::kOdd;
  constexpr int kSines = kPairs + (kOdd ? 1 : 0);  // of a lane
  constexpr int kProducts = kPairs + (kOdd ? 2 : 0);
  constexpr int kDepths = kCodeRealizations / 16;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const Shared shared(layout);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  const int group = lane / 4, member = lane % 4;
  const SineCodeGradientsPlace place(p, segments);
  const int d0 = place.d0(), r0 = place.r0(), sines = static_cast<int>(p.num_sines);
  const int length = static_cast<int>(p.length), features = static_cast<int>(p.in_features),
            realizations = static_cast<int>(p.num_realizations);
  // This warp's feature in [H, D], if there is one.
  const auto feature = [&] {
    return place.head * read_again(p.in_features) + d0 + thread_read_again() / kLanes;
  };
  const auto exists = [&] { return d0 + thread_read_again() / kLanes < features; };
  const bool whole = r0 + kCodeRealizations <= realizations && d0 + kGradientFeatures <= features;

  const auto own_thread = [] { return static_cast<std::uint32_t>(thread_read_again()); };
  const Storage* const grad_out =
      static_cast<const Storage*>(p.grad_out) + place.head * p.grad_out_strides[2] + r0;
  const Storage* const x = static_cast<const Storage*>(p.x) + place.head * p.x_strides[2] + d0;
  // Starts to copy a tile: 8 threads of four warps a row of gradients, 2 a row of x. Features and
  // realizations come in whole eights, or are not there.
  const auto copy = [&](std::uint32_t tile, int n0, int b0) {
    const std::uint32_t thread = own_thread();
    if (thread / kCopyThreads != tile % (kGradientThreads / kCopyThreads)) return;
    // Strides have 32 bits here, see backward_runs_on_codes, and threads no sign.
    const std::uint32_t own = thread % kCopyThreads;
    const int b = own / 8 % kCodeBatch, t = own / 64, eight = own % 8;
    const int x_b = own / 2 % kCodeBatch, x_t = own / 16, x_eight = own % 2;
    const int batch_stride = static_cast<int>(p.grad_out_strides[0]),
              stride = static_cast<int>(p.grad_out_strides[1]),
              x_batch_stride = static_cast<int>(p.x_strides[0]),
              x_stride = static_cast<int>(p.x_strides[1]);
    const Storage* from = grad_out + std::int64_t{b0} * batch_stride + std::int64_t{n0} * stride +
                          (b * batch_stride + t * stride + eight * 8);
    const Storage* const from_x = x + std::int64_t{b0} * x_batch_stride +
                                  std::int64_t{n0} * x_stride +
                                  (x_b * x_batch_stride + x_t * x_stride + x_eight * 8);
    Storage* const to = shared.grad + tile % 2 * Shared::kGrad + own / 8 * kCodeRealizations +
                        Shared::place(b, eight);
    Storage* const to_x = shared.x + tile % 2 * Shared::kX + own / 2 * Shared::kXRow + x_eight * 8;
    const auto copy_eight = [](bool inside, const Storage* source, Storage* target) {
      struct alignas(16) Zeros {
        std::uint32_t words[4];
      };
      if (inside) {
        copy_async16(target, source);
      } else {
        *reinterpret_cast<Zeros*>(target) = {};
      }
    };
    constexpr int kStep = kCopyThreads / 64, kXStep = kCopyThreads / 16;  // positions
    const bool everything =
        whole && n0 + kGradientPositions <= length && b0 + kCodeBatch <= p.batch;
    const bool exists = b0 + b < p.batch && r0 + eight * 8 < realizations;
    TORCH_SPE_UNROLL
    for (int i = 0; i < kGradientPositions / kStep; ++i, from += kStep * stride)
      copy_eight(everything || (exists && n0 + t + i * kStep < length), from,
                 to + i * kStep * kCodeBatch * kCodeRealizations);
    const bool x_exists = b0 + x_b < p.batch && d0 + x_eight * 8 < features;
    TORCH_SPE_UNROLL
    for (int i = 0; i < kGradientPositions / kXStep; ++i)
      copy_eight(everything || (x_exists && n0 + x_t + i * kXStep < length),
                 from_x + i * kXStep * x_stride, to_x + i * kXStep * kCodeBatch * Shared::kXRow);
  };

  // Every warp makes the gradients of the codes of 4 positions, 16 realizations and 8 features.
  const int four = warp % 2, real_part = warp / 2 % 4, feature_half = warp / 8;
  const Storage* const own_grad =
      shared.grad + ((4 * four + lane / 16) * kCodeBatch + lane % 8) * kCodeRealizations +
      Shared::place(lane % 8, 2 * real_part + lane / 8 % 2);
  const Storage* const own_x =
      shared.x + ((4 * four + lane / 8) * kCodeBatch + lane % 8) * Shared::kXRow + 8 * feature_half;
  Storage* const own_code = shared.code + (8 * feature_half + 2 * member) * Shared::kFeature +
                            (16 * real_part + group) * 8 +
                            4 * (four ^ Shared::swaps_fours(2 * member));
  // Those of a tile's positions 8 half .. 8 half + 7.
  const auto make_code_gradients = [&](int buffer, auto half) {
    constexpr int kHalf = decltype(half)::value;
    const Storage* const grad =
        own_grad + buffer * Shared::kGrad + kHalf * (8 * kCodeBatch * kCodeRealizations);
    const Storage* const x = own_x + buffer * Shared::kX + kHalf * (8 * kCodeBatch * Shared::kXRow);
    struct alignas(8) Four {
      std::uint32_t pairs[2];
    } out[4];  // [r = group, group + 8][d = 2 member, 2 member + 1]
    std::uint32_t inputs[4];
    ldmatrix_x4<true>(inputs, x);
    TORCH_SPE_UNROLL
    for (int j = 0; j < 2; ++j) {
      std::uint32_t a[4];  // of 2 positions
      ldmatrix_x4<true>(a, grad + 2 * j * kCodeBatch * kCodeRealizations);
      float sums[2][4] = {};
      TORCH_SPE_UNROLL
      for (int t = 0; t < 2; ++t) {
        // Of 16 summands 8 are 0, those of the other position.
        const std::uint32_t input = inputs[2 * j + t];
        const std::uint32_t pair[2] = {t == 0 ? input : 0u, t == 0 ? 0u : input};
        mma_m16n8k16<Storage>(sums[t], a, pair);
      }
      TORCH_SPE_UNROLL
      for (int e = 0; e < 4; ++e) out[e].pairs[j] = pack_pair<Storage>(sums[0][e], sums[1][e]);
    }
    Storage* const to = own_code + kHalf * Shared::kCode;
    TORCH_SPE_UNROLL
    for (int e = 0; e < 4; ++e)
      *reinterpret_cast<Four*>(to + e % 2 * Shared::kFeature + e / 2 * 64) = out[e];
  };

  // The weight of this warp's feature as first factors, rows as SineColumns has columns.
  std::uint32_t weight[kEights][kDepths][2];
  TORCH_SPE_UNROLL
  for (int i = 0; i < kEights; ++i) {
    const int sine = Columns::sine(i, group), part = Columns::part(i, group);
    TORCH_SPE_UNROLL
    for (int depth = 0; depth < kDepths; ++depth) {
      TORCH_SPE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int r = r0 + 16 * depth + 8 * half + 2 * member;
        weight[i][depth][half] =
            exists() && sine < sines && r < realizations
                ? *reinterpret_cast<const std::uint32_t*>(
                      static_cast<const Storage*>(p.weight) +
                      ((feature() * sines + sine) * 2 + part) * p.num_realizations + r)
                : 0u;
      }
    }
  }

  WalkingPhase phases[kSines];
  float sums[kEights][kDepths][4] = {};  // [r, column]
  float freq_sums[kSines] = {};
  // Of 8 positions, the first of this lane's two.
  const int own_position = 2 * (member ^ 2 * Shared::swaps_fours(warp));
  const Storage* const own_rows = shared.code + warp * Shared::kFeature + lane * 8;
  // Adds what the codes of 8 positions from n0 on give.
  const auto add_products = [&](auto half, int n0) {
    const Storage* const rows = own_rows + decltype(half)::value * Shared::kCode;
    std::uint32_t basis[kEights];
    // cos and sin at two positions; of an odd number of eights, at last, this lane's column and
    // its derivative by the phase.
    float c[kSines][2], s[kSines][2];
    TORCH_SPE_UNROLL
    for (int i = 0; i < kSines; ++i) {
      TORCH_SPE_UNROLL
      for (int t = 0; t < 2; ++t) {
        phases[i].basis(t, &c[i][t], &s[i][t]);
        if (i < kPairs) continue;
        const float cosine = c[i][t], sine = s[i][t];
        c[i][t] = group < 4 ? cosine : sine;
        s[i][t] = group < 4 ? -sine : cosine;
      }
      basis[2 * i] = pack_pair<Storage>(c[i][0], c[i][1]);
      if (i < kPairs) basis[2 * i + 1] = pack_pair<Storage>(s[i][0], s[i][1]);
    }
    if (freqs_parts != nullptr) {
      // [column, position]. The last eight of an odd number is in the upper rows for one 16 of
      // the realizations, in the lower rows for the next: half of their products is not used.
      float products[kProducts][4] = {};
      TORCH_SPE_UNROLL
      for (int j = 0; j < kDepths / 2; ++j) {
        std::uint32_t b[4];
        ldmatrix_x4<true>(b, rows + 32 * 8 * j);
        TORCH_SPE_UNROLL
        for (int l = 0; l < 2; ++l) {
          const int depth = 2 * j + l;
          const std::uint32_t pair[2] = {b[2 * l], b[2 * l + 1]};
          TORCH_SPE_UNROLL
          for (int i = 0; i < kPairs; ++i) {
            const std::uint32_t a[4] = {weight[2 * i][depth][0], weight[2 * i + 1][depth][0],
                                        weight[2 * i][depth][1], weight[2 * i + 1][depth][1]};
            mma_m16n8k16<Storage>(products[i], a, pair);
          }
          if constexpr (kOdd) {
            constexpr int kLast = kEights - 1;
            const std::uint32_t a[4] = {weight[kLast][2 * j][0], weight[kLast][2 * j + 1][0],
                                        weight[kLast][2 * j][1], weight[kLast][2 * j + 1][1]};
            mma_m16n8k16<Storage>(products[kPairs + l], a, pair);
          }
        }
      }
      const auto position = static_cast<float>(p.start + static_cast<double>(n0 + own_position));
      TORCH_SPE_UNROLL
      for (int t = 0; t < 2; ++t) {
        const float at = position + static_cast<float>(t);
        TORCH_SPE_UNROLL
        for (int i = 0; i < kPairs; ++i)
          freq_sums[i] += at * (c[i][t] * products[i][2 + t] - s[i][t] * products[i][t]);
        if constexpr (kOdd)
          freq_sums[kPairs] +=
              at * (s[kPairs][t] * (products[kPairs][t] + products[kPairs + 1][2 + t]));
      }
    }
    TORCH_SPE_UNROLL
    for (int j = 0; j < kDepths / 2; ++j) {
      std::uint32_t a[4];
      ldmatrix_x4<false>(a, rows + 32 * 8 * j);
      TORCH_SPE_UNROLL
      for (int l = 0; l < 2; ++l) {
        const std::uint32_t pair[2] = {a[2 * l], a[2 * l + 1]};
        TORCH_SPE_UNROLL
        for (int i = 0; i < kEights; ++i) mma_m16n8k8<Storage>(sums[i][2 * j + l], pair, basis[i]);
      }
    }
  };

  // Between two barriers, codes of 8 positions are made and those of the 8 before are used: each
  // of both keeps other units busy.
  const auto use_codes = [&](auto half, int n0, bool first) {
    if (n0 % WalkingPhase::kExactPositions == 0 || first) {
      TORCH_SPE_UNROLL
      for (int i = 0; i < kSines; ++i) {
        const int sine = Columns::sine(2 * i, group);
        phases[i] = {};
        if (exists() && sine < sines)
          phases[i].set(p.freqs[feature() * sines + sine], p.start, n0 + own_position);
      }
    }
    add_products(half, n0);
    TORCH_SPE_UNROLL
    for (auto& phase : phases) phase.advance();
  };
  constexpr std::integral_constant<int, 0> kFirst;
  constexpr std::integral_constant<int, 1> kSecond;
  int n0 = place.n0, last_n0 = 0, b0 = place.b0;
  if (place.tile_count > 0) copy(0, n0, b0);
  TORCH_SPE_KEEP_LOOP
  for (std::uint32_t tile = 0; tile < place.tile_count; ++tile) {
    const int buffer = tile % 2;
    copy_async_wait();
    if (p.feature_map != FeatureMap::kIdentity &&
        own_thread() / kCopyThreads == tile % (kGradientThreads / kCopyThreads)) {
      TORCH_SPE_KEEP_LOOP
      for (int i = own_thread() % kCopyThreads; i < 2 * kGradientRows; i += kCopyThreads)
        map_eight_features(p.feature_map,
                           shared.x + buffer * Shared::kX + i / 2 * Shared::kXRow + i % 2 * 8);
    }
    __syncthreads();  // this tile has arrived, codes are there, and those before have been used
    make_code_gradients(buffer, kFirst);
    const bool last = n0 + kGradientPositions >= length;  // of these batch rows
    const int next_n0 = last ? 0 : n0 + kGradientPositions;
    if (last) b0 += kCodeBatch;
    if (tile + 1 < place.tile_count) copy(tile + 1, next_n0, b0);
    if (tile > 0) use_codes(kSecond, last_n0 + 8, false);
    __syncthreads();  // codes are there, and those before have been used
    make_code_gradients(buffer, kSecond);
    use_codes(kFirst, n0, tile == 0);
    last_n0 = n0;
    n0 = next_n0;
  }
  __syncthreads();  // codes are there
  if (place.tile_count > 0) use_codes(kSecond, last_n0 + 8, false);

  if (!exists()) return;
  const std::int64_t all = place.segment * p.num_heads * p.in_features + feature();
  TORCH_SPE_UNROLL
  for (int i = 0; i < kEights; ++i) {
    TORCH_SPE_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int sine = Columns::sine(i, 2 * member + e), part = Columns::part(i, 2 * member + e);
      float* const row = sine < sines && weight_parts != nullptr
                             ? weight_parts + ((all * sines + sine) * 2 + part) * p.num_realizations
                         : sine == sines && part == 0 && constant_parts != nullptr
                             ? constant_parts + all * p.num_realizations
                             : nullptr;
      if (row == nullptr) continue;
      TORCH_SPE_UNROLL
      for (int depth = 0; depth < kDepths; ++depth) {
        TORCH_SPE_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int r = r0 + 16 * depth + 8 * half + group;
          if (r < realizations) row[r] = sums[i][depth][2 * half + e];
        }
      }
    }
  }
  if (freqs_parts == nullptr) return;
  double* const parts =
      freqs_parts +
      ((place.segment * SineCodesPlace::realization_tiles(p) + place.realization_tile) *
           p.num_heads * p.in_features +
       feature()) *
          sines;
  // Of an odd number of eights the last has two columns for a sine.
  float* const column_sums = reinterpret_cast<float*>(shared.code + warp * Shared::kFeature);
  __syncwarp();  // the warp has used its gradients
  TORCH_SPE_UNROLL
  for (int i = 0; i < kSines; ++i) {
    const float sum = quad_sum(freq_sums[i]);
    if (member == 0) column_sums[8 * i + group] = sum;
  }
  __syncwarp();
  TORCH_SPE_UNROLL
  for (int i = 0; i < kSines; ++i) {
    const int sine = Columns::sine(2 * i, group);
    float sum = column_sums[8 * i + group];
    if (i == kPairs) sum += column_sums[8 * i + (group + 4) % 8];
    if (member == 0 && sine < sines && (i < kPairs || group < 4))
      parts[sine] = core::kTwoPi * static_cast<double>(sum);
  }
}

}  // namespace torch_spe::cuda
