// Kernel of the convolution filter's forward pass for every noise and type; 16-bit storage and
// dense noise have one of their own in dense_forward.h.
#pragma once

#include "encode/conv/code_tile.h"

namespace torch_spe::cuda {

// Forward: a block keeps the results of a tile and some batch rows, and goes through the features.
template <class Storage>
constexpr int kConvForwardBatch = sizeof(Storage) == 8 ? 2 : 4;

// The values of a token, in some batch rows.
template <class T, int kRows>
struct alignas(16) BatchRows {
  T row[kRows];
};

template <class Storage, class Operand, bool kDense>
struct ConvForwardShared : ConvCodeWindows<Storage, Operand, LongConvTile<Operand, kDense>> {
  using Tile = LongConvTile<Operand, kDense>;
  using Rows = BatchRows<core::accumulate_t<Storage>, kConvForwardBatch<Storage>>;
  Rows* x;  // [2, token], of two features in turn

  TORCH_SPE_INLINE explicit ConvForwardShared(MemoryLayout& layout)
      : ConvCodeWindows<Storage, Operand, Tile>(layout, 2),
        x(layout.take<Rows>(2 * Tile::kTokens)) {}
};

template <class Storage, class Operand, bool kDense>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    conv_forward_kernel(const ConvFilterParams p) {
  using T = core::accumulate_t<Storage>;
  using Shared = ConvForwardShared<Storage, Operand, kDense>;
  using Tile = typename Shared::Tile;
  using Rows = typename Shared::Rows;
  constexpr int kTokens = Tile::kTokens, kRealizations = Tile::kRealizations;
  constexpr int kRows = kConvForwardBatch<Storage>, kCount = kTokens * kRealizations / kThreads;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const Shared shared(layout);
  const LineTiles<kTokens> tiles(p);
  const std::int64_t realizations = p.num_realizations,
                     realization_tiles = ceil_div(realizations, kRealizations);
  const std::int64_t batch_tiles = ceil_div(p.batch, kRows);
  const std::int64_t block = blockIdx.x;
  const std::int64_t r0 = block % realization_tiles * kRealizations;
  const std::int64_t b0 = block / realization_tiles % batch_tiles * kRows;
  const std::int64_t tile = block / realization_tiles / batch_tiles % tiles.count;
  LineTile place = tiles.place(tile, block / realization_tiles / batch_tiles / tiles.count, 0);
  const Storage* const x = static_cast<const Storage*>(p.x) + place.offset(p.x_strides);

  ConvCodeTile<Storage, Operand, Tile> codes(p);
  T sums[kRows][kCount];
  TORCH_SPE_UNROLL
  for (int b = 0; b < kRows; ++b) {
    TORCH_SPE_UNROLL
    for (int i = 0; i < kCount; ++i) sums[b][i] = 0;
  }
  for (place.d = 0; place.d < p.in_features; ++place.d) {
    Rows* const x_tile = shared.x + place.d % 2 * kTokens;
    TORCH_SPE_KEEP_LOOP
    for (int t = static_cast<int>(threadIdx.x); t < kTokens; t += kThreads) {
      Rows rows;
      TORCH_SPE_UNROLL
      for (int b = 0; b < kRows; ++b) {
        rows.row[b] =
            b0 + b < p.batch && place.n0 + t < p.size[2]
                ? read_feature(
                      p.feature_map,
                      x[(b0 + b) * p.x_strides[0] + t * p.x_strides[3] + place.d * p.x_strides[5]])
                : T(0);
      }
      x_tile[t] = rows;
    }
    int i = 0;
    codes.make(shared, place, r0, [&](int token, int, T code) {
      const Rows rows = x_tile[token];
      TORCH_SPE_UNROLL
      for (int b = 0; b < kRows; ++b) sums[b][i] += rows.row[b] * code;
      ++i;
    });
  }
  int i = 0;
  codes.for_each_place([&](int token, int r) {
    TORCH_SPE_UNROLL
    for (int b = 0; b < kRows; ++b) {
      if (b0 + b < p.batch && place.n0 + token < p.size[2] && r0 + r < realizations) {
        const std::int64_t n =
            (((b0 + b) * p.size[0] + place.i0) * p.size[1] + place.i1) * p.size[2] + place.n0 +
            token;
        write(sums[b][i], static_cast<Storage*>(p.out) +
                              (n * p.num_heads + place.head) * realizations + r0 + r);
      }
    }
    ++i;
  });
}

}  // namespace torch_spe::cuda
