// Kernel of the phasor filter's gradients of frequencies, coefficients and constant for 16-bit
// storage at consecutive positions, on tensor cores.
#pragma once

#include "encode/phasor/code_gradient_tile.h"
#include "encode/phasor/gradient_parts.h"
#include "encode/phasor/products.h"
#include "encode/token_copy.h"

namespace torch_spe::cuda {

// Gradients of frequencies, coefficients and constant: a block takes 32 features and 32 pairs of
// one head, and walks over the positions of a segment. At each one the gradients of the codes are a
// product over the batch.
constexpr int kGradientTokens = 128;
constexpr int kGradientFeatures = 32;
constexpr int kGradientRealizations = 64;
constexpr int kGradientBlocks = 3;              // of a multiprocessor
constexpr std::int64_t kLongestSegment = 4096;  // positions whose sums are in float32

struct PhasorGradientTiles {
  TokenTiles tokens;
  std::int64_t feature_tiles, realization_tiles, segments, per_segment;

  TORCH_SPE_INLINE explicit PhasorGradientTiles(const PhasorFilterParams& p)
      : tokens(max_of(1, p.batch), p.length, kGradientTokens),
        feature_tiles(ceil_div(p.in_features, kGradientFeatures)),
        realization_tiles(ceil_div(2 * p.num_pairs, kGradientRealizations)) {
    const std::int64_t blocks = max_of(1, p.num_heads * feature_tiles * realization_tiles);
    // At most three blocks of a multiprocessor, all at once: more segments are more sums to add.
    const std::int64_t wanted =
        max_of(kWalkingBlocks * 3 / 2 / blocks, ceil_div(p.length, kLongestSegment));
    segments = max_of(1, min_of(tokens.position_tiles, wanted));
    per_segment = ceil_div(tokens.position_tiles, segments);
  }
};

template <class Storage>
struct PhasorGradientShared {
  static constexpr int kRowX = row_of<Storage>(kGradientFeatures);
  static constexpr int kRowGrad = row_of<Storage>(kGradientRealizations);
  Storage* x;     // [2, token, feature]
  Storage* grad;  // [2, token, r]
  Storage* zero;  // a row, of batch rows that there are not
  // [i, half, thread]: of w = conj(e) G, and of (n - n_segment) w
  Phasor<float>*sums, *slopes;

  TORCH_SPE_INLINE explicit PhasorGradientShared(MemoryLayout& layout)
      : x(layout.take<Storage>(2 * kGradientTokens * kRowX)),
        grad(layout.take<Storage>(2 * kGradientTokens * kRowGrad)),
        zero(layout.take<Storage>(kRowGrad)),
        sums(layout.take<Phasor<float>>(kGradientPairs * 2 * kThreads)),
        slopes(layout.take<Phasor<float>>(kGradientPairs * 2 * kThreads)) {}
};

template <class Storage, bool kConstant>
__global__ void __launch_bounds__(kThreads, kGradientBlocks)
    phasor_product_gradient_kernel(const PhasorFilterBackwardParams p,
                                   const PhasorGradientTiles tiles,
                                   const PhasorGradientParts parts) {
  using Shared = PhasorGradientShared<Storage>;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const Shared shared(layout);
  const TokenTiles& tokens = tiles.tokens;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  const std::int64_t features = p.in_features, pairs = p.num_pairs;
  const std::int64_t block = blockIdx.x;
  const std::int64_t segment = block % tiles.segments;
  const std::int64_t r0 = block / tiles.segments % tiles.realization_tiles * kGradientRealizations;
  const std::int64_t d0 =
      block / tiles.segments / tiles.realization_tiles % tiles.feature_tiles * kGradientFeatures;
  const std::int64_t head = block / tiles.segments / tiles.realization_tiles / tiles.feature_tiles;
  const std::int64_t first_tile = segment * tiles.per_segment;
  const int count =
      static_cast<int>(max_of(0, min_of(tokens.position_tiles - first_tile, tiles.per_segment)));
  const std::int64_t n_segment = first_tile * tokens.positions;
  const int length = static_cast<int>(min_of(p.length - n_segment, count * tokens.positions));

  const auto &x_strides = p.x_strides, &grad_strides = p.grad_out_strides;
  const Storage* const x =
      static_cast<const Storage*>(p.x) + head * x_strides[2] + d0 * x_strides[3];
  const Storage* const grad =
      static_cast<const Storage*>(p.grad_out) + head * grad_strides[2] + r0 * grad_strides[3];
  const auto is_aligned = [](const void* data, const std::int64_t* strides) {
    return rows_are_aligned<Storage>(data, strides[0]) &&
           rows_are_aligned<Storage>(data, strides[1]) &&
           rows_are_aligned<Storage>(data, strides[2]);
  };
  const bool x_aligned = is_aligned(p.x, x_strides);
  const bool grad_aligned = is_aligned(p.grad_out, grad_strides);
  const TokenCopy<kGradientTokens, kGradientFeatures, Storage> copy_x(
      tokens, x, x_strides, features - d0, x_aligned, p.batch, p.length);
  const TokenCopy<kGradientTokens, kGradientRealizations, Storage> copy_grad(
      tokens, grad, grad_strides, 2 * pairs - r0, grad_aligned, p.batch, p.length);
  const auto copy = [&](int batch_tile, int tile, int buffer) {
    const std::int64_t b0 = static_cast<std::int64_t>(batch_tile) * tokens.batch;
    const std::int64_t n0 = n_segment + static_cast<std::int64_t>(tile) * tokens.positions;
    copy_x.copy(b0, n0, shared.x + buffer * kGradientTokens * Shared::kRowX);
    copy_grad.copy(b0, n0, shared.grad + buffer * kGradientTokens * Shared::kRowGrad);
  };

  // The feature and pair of this lane's code (i, half).
  const int feature0 = warp / 2 * 16, pair0 = warp % 2 * 16;
  const int own_feature = feature0 + lane / 4, own_pair = pair0 + lane % 4;
  const int features_left = static_cast<int>(min_of(features - d0, kGradientFeatures));
  const int pairs_left = static_cast<int>(min_of(pairs - r0 / 2, kGradientRealizations / 2));
  const std::int64_t first_code = (head * features + d0 + own_feature) * pairs + r0 / 2 + own_pair;
  const LaneCodeGradients own{first_code, pairs, features_left - own_feature,
                              pairs_left - own_pair};
  for (int i = thread; i < Shared::kRowGrad; i += kThreads) shared.zero[i].bits = 0;
  const int tiles_of_segment = static_cast<int>(tokens.batch_tiles) * count;
  if (tiles_of_segment > 0) copy(0, 0, 0);
  PhasorCodeGradients<Storage, kConstant> gradients(p, own, n_segment, shared.sums + thread,
                                                    shared.slopes + thread);

  int run = 0;  // positions
  for (int k = 0; k < tiles_of_segment; ++k) {
    const int tile = k % count;
    copy_async_wait();
    map_copied_tile<kGradientTokens, kGradientFeatures>(
        p.feature_map, shared.x + k % 2 * kGradientTokens * Shared::kRowX, x_strides[3], x_aligned);
    __syncthreads();  // this tile has arrived, and the one before has been used
    if (k + 1 < tiles_of_segment) copy((k + 1) / count, (k + 1) % count, (k + 1) % 2);
    const Storage* const x_tile = shared.x + k % 2 * kGradientTokens * Shared::kRowX;
    const Storage* const grad_tile = shared.grad + k % 2 * kGradientTokens * Shared::kRowGrad;
    // This lane's rows and columns within the 16 x 16 values that one ldmatrix brings; they
    // advance from position to position, but not in the row of zeros.
    const int low = lane % 16, high = lane / 16 * 8, x_row = lane % 8 + high;
    const bool has_x = x_row < tokens.batch, has_grad = low < tokens.batch;
    const Storage* x_from =
        has_x ? x_tile + x_row * Shared::kRowX + feature0 + low - lane % 8 : shared.zero;
    const Storage* grad_from =
        has_grad ? grad_tile + low * Shared::kRowGrad + 2 * pair0 + high : shared.zero;
    const int x_step = has_x ? tokens.batch * Shared::kRowX : 0;
    const int grad_step = has_grad ? tokens.batch * Shared::kRowGrad : 0;
    const int first = tile * tokens.positions;  // of the segment
    const int positions = first + tokens.positions < length ? tokens.positions : length - first;
    // Factors are loaded a position ahead, but for those of the last pairs: registers are short.
    static_assert(kGradientPairs == 4);
    std::uint32_t next_features[4], next_pairs[4];
    ldmatrix_x4<true>(next_features, x_from);
    ldmatrix_x4<true>(next_pairs, grad_from);
    TORCH_SPE_UNROLL_TWICE
    for (int t = 0; t < positions; ++t) {
      std::uint32_t features[4], pairs_of[kGradientPairs][2], last_pairs[4];
      ldmatrix_x4<true>(last_pairs, grad_from + 16);
      TORCH_SPE_UNROLL
      for (int e = 0; e < 4; ++e) {
        features[e] = next_features[e];
        pairs_of[e / 2][e % 2] = next_pairs[e];
        pairs_of[2 + e / 2][e % 2] = last_pairs[e];
      }
      if (t + 1 < positions) {
        x_from += x_step;
        grad_from += grad_step;
        ldmatrix_x4<true>(next_features, x_from);
        ldmatrix_x4<true>(next_pairs, grad_from);
      }
      TORCH_SPE_UNROLL
      for (int i = 0; i < kGradientPairs; ++i) gradients.add(i, features, pairs_of[i]);
    }
    run += positions;
    if (run >= kPhasorRun || tile + 1 == count) {
      run = 0;
      gradients.close_run(first + positions);
    }
  }

  gradients.write(parts, segment);
}

}  // namespace torch_spe::cuda
