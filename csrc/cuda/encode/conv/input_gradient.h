// Kernel of the convolution filter's gradient of x for every noise and type; 16-bit storage and
// dense noise have one of their own in dense_input_gradient.h.
#pragma once

#include "encode/conv/code_tile.h"

namespace torch_spe::cuda {

// Gradient of x: a block takes a tile of one feature and some batch rows, and goes through the
// realizations.
constexpr int kInputGradientBatch = 8;

template <class Storage, class Operand, bool kDense>
struct ConvInputGradientShared : ConvCodeWindows<Storage, Operand, LongConvTile<Operand, kDense>> {
  using Tile = LongConvTile<Operand, kDense>;
  static constexpr int kRow = Tile::kRealizations + 1;
  core::accumulate_t<Storage>* codes;  // [token, r]

  TORCH_SPE_INLINE explicit ConvInputGradientShared(MemoryLayout& layout)
      : ConvCodeWindows<Storage, Operand, Tile>(layout, 2),
        codes(layout.take<core::accumulate_t<Storage>>(Tile::kTokens * kRow)) {}
};

template <class Storage, class Operand, bool kDense>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    conv_input_gradient_kernel(const ConvFilterBackwardParams p) {
  using T = core::accumulate_t<Storage>;
  using Shared = ConvInputGradientShared<Storage, Operand, kDense>;
  using Tile = typename Shared::Tile;
  constexpr int kTokens = Tile::kTokens, kRealizations = Tile::kRealizations;
  constexpr int kParts = kThreads / kTokens;  // of the batch rows
  constexpr int kVector = Vector<Storage>::kSize;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const Shared shared(layout);
  const LineTiles<kTokens> tiles(p);
  const std::int64_t realizations = p.num_realizations,
                     batch_tiles = ceil_div(p.batch, kInputGradientBatch);
  const std::int64_t block = blockIdx.x;
  const std::int64_t d = block % p.in_features;
  const std::int64_t b0 = block / p.in_features % batch_tiles * kInputGradientBatch;
  const std::int64_t tile = block / p.in_features / batch_tiles % tiles.count;
  const LineTile place = tiles.place(tile, block / p.in_features / batch_tiles / tiles.count, d);
  const auto& strides = p.grad_out_strides;
  const int token = static_cast<int>(threadIdx.x) % kTokens;
  const int part = static_cast<int>(threadIdx.x) / kTokens;
  const bool inside = place.n0 + token < p.size[2];
  const bool aligned = is_aligned<Storage>(p.grad_out, strides);
  const Storage* const grad =
      static_cast<const Storage*>(p.grad_out) + place.offset(strides) + token * strides[3];

  ConvCodeTile<Storage, Operand, Tile> codes(p);
  T sums[kInputGradientBatch / kParts] = {};
  for (std::int64_t r0 = 0; r0 < realizations; r0 += kRealizations) {
    codes.make(shared, place, r0,
               [&](int t, int r, T code) { shared.codes[t * Shared::kRow + r] = code; });
    __syncthreads();
    const int count = static_cast<int>(min_of(kRealizations, realizations - r0));
    TORCH_SPE_KEEP_LOOP
    for (int r = 0; r < count; r += kVector) {
      T code[kVector];
      TORCH_SPE_UNROLL
      for (int e = 0; e < kVector; ++e) code[e] = shared.codes[token * Shared::kRow + r + e];
      TORCH_SPE_UNROLL
      for (int i = 0; i < kInputGradientBatch / kParts; ++i) {
        const std::int64_t b = b0 + i * kParts + part;
        if (!inside || b >= p.batch) continue;
        const Storage* const from = grad + b * strides[0] + (r0 + r) * strides[5];
        Vector<Storage> numbers{};
        if (aligned && r + kVector <= count) {
          numbers = *reinterpret_cast<const Vector<Storage>*>(from);
        } else {
          TORCH_SPE_UNROLL
          for (int e = 0; e < kVector; ++e) {
            if (r + e < count) numbers.values[e] = from[e * strides[5]];
          }
        }
        TORCH_SPE_UNROLL
        for (int e = 0; e < kVector; ++e) sums[i] += read(numbers.values[e]) * code[e];
      }
    }
  }
  TORCH_SPE_UNROLL
  for (int i = 0; i < kInputGradientBatch / kParts; ++i) {
    const std::int64_t b = b0 + i * kParts + part;
    if (!inside || b >= p.batch) continue;
    const std::int64_t n =
        ((b * p.size[0] + place.i0) * p.size[1] + place.i1) * p.size[2] + place.n0 + token;
    const Storage* const x = static_cast<const Storage*>(p.x) + place.offset(p.x_strides) +
                             b * p.x_strides[0] + token * p.x_strides[3] + d * p.x_strides[5];
    write(gradient_of_input_at(p.feature_map, sums[i], x),
          static_cast<Storage*>(p.grad_x) + (n * p.num_heads + place.head) * p.in_features + d);
  }
}

}  // namespace torch_spe::cuda
