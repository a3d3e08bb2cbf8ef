// Kernel of the sine filter's forward pass for every type and kind of positions.
#pragma once

#include "encode/sine/products.h"

namespace torch_spe::cuda {

// Forward: a block makes the products of some tokens, chunk by chunk in turn in two buffers, and
// multiplies them with the weight.
template <class Operand>
struct SineForwardShape {
  static constexpr int kTokens = sizeof(Operand) == 2 ? 128 : 64;
  static constexpr int kColumns = 32;
  static constexpr int kRealizations = 64;
};

template <class Operand>
struct SineForwardShared {
  using Shape = SineForwardShape<Operand>;
  static constexpr int kProducts = Shape::kTokens * row_of<Operand>(Shape::kColumns);
  static constexpr int kWeight = Shape::kColumns * row_of<Operand>(Shape::kRealizations);
  Operand* products;  // [2, token, column]
  Operand* weight;    // [2, column, r]

  TORCH_SPE_INLINE explicit SineForwardShared(MemoryLayout& layout) {
    products = layout.take<Operand>(2 * kProducts);
    weight = layout.take<Operand>(2 * kWeight);
  }
};

template <class Storage, class Operand>
__global__ void __launch_bounds__(kThreads) sine_forward_kernel(const SineFilterParams p) {
  using Shape = SineForwardShape<Operand>;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const SineForwardShared<Operand> shared(layout);
  const TokenTiles tiles(p.batch, p.length, Shape::kTokens);
  const SineColumnChunks<Shape::kColumns> chunks(p);
  const std::int64_t realizations = p.num_realizations,
                     realization_tiles = ceil_div(realizations, Shape::kRealizations);
  const std::int64_t block = blockIdx.x;
  const std::int64_t r0 = block % realization_tiles * Shape::kRealizations;
  const std::int64_t tile = block / realization_tiles % tiles.count();
  const std::int64_t head = block / realization_tiles / tiles.count();
  const Storage* const weight = sine_weight_of<Storage>(p, head);
  const Storage* const constant = sine_constant_of<Storage>(p, head);
  const bool aligned = sine_coefficients_are_aligned<Storage>(p);

  TileProduct<Operand, Shape::kTokens, Shape::kRealizations> product;
  product.clear();
  for (std::int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    Operand* const products = shared.products + chunk % 2 * shared.kProducts;
    Operand* const weight_tile = shared.weight + chunk % 2 * shared.kWeight;
    copy_tile<Shape::kColumns, Shape::kRealizations, Storage>(
        weight_tile, realizations - r0, 1, aligned, [&](int column) {
          const Storage* const row = chunks.row(p, weight, constant, chunk, column);
          return row == nullptr ? nullptr : row + r0;
        });
    fill_sine_products<Storage, Operand, Shape::kTokens, Shape::kColumns>(p, tiles, tile, head,
                                                                          chunk, products);
    copy_async_wait();
    // One barrier is enough: a buffer is filled again only after the next one, which no warp passes
    // before all have done with this product.
    __syncthreads();
    product.template multiply<Shape::kColumns, Major::kDepth, Major::kOuter>(products, weight_tile);
  }
  Storage* const out = static_cast<Storage*>(p.out);
  const std::int64_t b0 = tiles.first_batch(tile), n0 = tiles.first_position(tile);
  product.for_each([&](int row, int column, auto value) {
    const std::int64_t b = b0 + row % tiles.batch, n = n0 + row / tiles.batch;
    if (row >= tiles.batch * tiles.positions || b >= p.batch || n >= p.length ||
        r0 + column >= realizations)
      return;
    write(value, out + ((b * p.length + n) * p.num_heads + head) * realizations + r0 + column);
  });
}

}  // namespace torch_spe::cuda
