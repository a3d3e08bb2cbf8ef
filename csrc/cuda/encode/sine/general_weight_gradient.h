// Kernel of the sine filter's gradients of weight and constant, for every type and kind of
// positions.
#pragma once

#include "encode/sine/products.h"

namespace torch_spe::cuda {

// Gradient of the weight: a block takes a chunk of columns of one head and some realizations, and
// walks over tokens.
template <class Operand>
struct SineWeightGradientShape {
  static constexpr int kTokens = sizeof(Operand) == 8 ? 32 : 64;
  static constexpr int kColumns = 64;
  static constexpr int kRealizations = 64;
};

template <class Operand>
struct SineWeightGradientShared {
  using Shape = SineWeightGradientShape<Operand>;
  static constexpr int kProducts = Shape::kTokens * row_of<Operand>(Shape::kColumns);
  static constexpr int kGradOut = Shape::kTokens * row_of<Operand>(Shape::kRealizations);
  Operand* products;  // [2, token, column]
  Operand* grad_out;  // [2, token, r]

  TORCH_SPE_INLINE explicit SineWeightGradientShared(MemoryLayout& layout) {
    products = layout.take<Operand>(2 * kProducts);
    grad_out = layout.take<Operand>(2 * kGradOut);
  }
};

template <class Storage, class Operand>
__global__ void __launch_bounds__(kThreads) sine_weight_gradient_kernel(
    const SineFilterBackwardParams p, std::int64_t segments,
    core::accumulate_t<Storage>* weight_parts,      // [segment, H, D, 2K, R]
    core::accumulate_t<Storage>* constant_parts) {  // [segment, H, D, R]
  using T = core::accumulate_t<Storage>;
  using Shape = SineWeightGradientShape<Operand>;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const SineWeightGradientShared<Operand> shared(layout);
  const TokenTiles tiles(p.batch, p.length, Shape::kTokens);
  const SineColumnChunks<Shape::kColumns> chunks(p);
  const std::int64_t realizations = p.num_realizations,
                     realization_tiles = ceil_div(realizations, Shape::kRealizations);
  const std::int64_t block = blockIdx.x;
  const std::int64_t segment = block % segments;
  const std::int64_t r0 = block / segments % realization_tiles * Shape::kRealizations;
  const std::int64_t chunk = block / segments / realization_tiles % chunks.count;
  const std::int64_t head = block / segments / realization_tiles / chunks.count;
  const auto& strides = p.grad_out_strides;
  const Storage* const grad_out =
      static_cast<const Storage*>(p.grad_out) + head * strides[2] + r0 * strides[3];
  const bool aligned = rows_are_aligned<Storage>(p.grad_out, strides[0]) &&
                       rows_are_aligned<Storage>(p.grad_out, strides[1]) &&
                       rows_are_aligned<Storage>(p.grad_out, strides[2]);

  TileProduct<Operand, Shape::kColumns, Shape::kRealizations> product;
  product.clear();
  const std::int64_t per_segment = ceil_div(tiles.count(), segments);
  const std::int64_t end_tile = min_of(tiles.count(), (segment + 1) * per_segment);
  for (std::int64_t tile = segment * per_segment; tile < end_tile; ++tile) {
    Operand* const products = shared.products + tile % 2 * shared.kProducts;
    Operand* const grad_tile = shared.grad_out + tile % 2 * shared.kGradOut;
    const std::int64_t b0 = tiles.first_batch(tile), n0 = tiles.first_position(tile);
    copy_tile<Shape::kTokens, Shape::kRealizations, Storage>(
        grad_tile, realizations - r0, strides[3], aligned, [&](int row) {
          const std::int64_t t = n0 + row / tiles.batch, b = b0 + row % tiles.batch;
          return row / tiles.batch < tiles.positions && t < p.length && b < p.batch
                     ? grad_out + b * strides[0] + t * strides[1]
                     : nullptr;
        });
    fill_sine_products<Storage, Operand, Shape::kTokens, Shape::kColumns>(p, tiles, tile, head,
                                                                          chunk, products);
    copy_async_wait();
    __syncthreads();  // one is enough, as in the forward kernel
    product.template multiply<Shape::kTokens, Major::kOuter, Major::kOuter>(products, grad_tile);
  }
  const std::int64_t rows = (segment * p.num_heads + head) * p.in_features;
  product.for_each([&](int column, int r, T value) {
    T* const row = chunks.row(p, weight_parts + rows * 2 * p.num_sines * realizations,
                              constant_parts + rows * realizations, chunk, column);
    if (row != nullptr && r0 + r < realizations) row[r0 + r] = value;
  });
}

}  // namespace torch_spe::cuda
