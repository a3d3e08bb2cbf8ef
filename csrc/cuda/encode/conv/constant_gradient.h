// Kernel of the gradient of the convolution filter's constant, grad[h,d,r] = sum_bn x[b,n,h,d]
// grad_out[b,n,h,r]: for every head a product of matrices over the tokens, positions of all rows of
// the batch.
#pragma once

#include "core/conv_filter.h"
#include "tiles.h"

namespace torch_spe::cuda {

template <class Operand>
struct ConstantGradientShape {
  static constexpr int kTokens = sizeof(Operand) == 8 ? 32 : 64;
  static constexpr int kFeatures = 64, kRealizations = 64;
};

template <class Operand>
struct ConstantGradientShared {
  using Shape = ConstantGradientShape<Operand>;
  static constexpr int kX = Shape::kTokens * row_of<Operand>(Shape::kFeatures);
  static constexpr int kGrad = Shape::kTokens * row_of<Operand>(Shape::kRealizations);
  Operand* x;                        // [2, token, feature]
  Operand* grad;                     // [2, token, r]
  std::int64_t *x_rows, *grad_rows;  // [2, token]: where a token's values begin; -1: nowhere

  TORCH_SPE_INLINE explicit ConstantGradientShared(MemoryLayout& layout)
      : x(layout.take<Operand>(2 * kX)),
        grad(layout.take<Operand>(2 * kGrad)),
        x_rows(layout.take<std::int64_t>(2 * Shape::kTokens)),
        grad_rows(layout.take<std::int64_t>(2 * Shape::kTokens)) {}
};

// The tokens are cut into segments, so that there are enough blocks.
template <class Operand>
struct ConstantGradientBlocks {
  using Shape = ConstantGradientShape<Operand>;
  std::int64_t tokens, tiles, feature_tiles, realization_tiles, segments, constants;

  TORCH_SPE_INLINE explicit ConstantGradientBlocks(const core::ConvFilterParams& p)
      : tokens(p.batch * p.size[0] * p.size[1] * p.size[2]),
        tiles(ceil_div(tokens, Shape::kTokens)),
        feature_tiles(ceil_div(p.in_features, Shape::kFeatures)),
        realization_tiles(ceil_div(p.num_realizations, Shape::kRealizations)),
        segments(num_segments(p.num_heads * feature_tiles * realization_tiles, tiles)),
        constants(p.num_heads * p.in_features * p.num_realizations) {}
  std::int64_t num_parts() const { return segments * constants; }
};

// As load_tile of phi, and where it copies asynchronously as copy_tile, without phi.
template <int kRows, int kColumns, class Storage, class Operand, class Row>
TORCH_SPE_DEVICE void load_tokens(Operand* out, std::int64_t columns, std::int64_t stride,
                                  bool aligned, FeatureMap map, const Row& row) {
  if constexpr (sizeof(Operand) == 2) {
    copy_tile<kRows, kColumns, Storage>(out, columns, stride, aligned, row);
  } else {
    load_tile<kRows, kColumns, Storage>(
        out, columns, stride, aligned, row,
        [map](int, core::accumulate_t<Storage> value) { return map_feature<Storage>(map, value); });
  }
}

// A block takes some features and realizations of a head and a segment of the tokens.
template <class Storage, class Operand>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    conv_constant_gradient_kernel(const core::ConvFilterBackwardParams p,
                                  const ConstantGradientBlocks<Operand> blocks,
                                  double* parts) {  // [segment, H, D, R]
  using T = core::accumulate_t<Storage>;
  using Shape = ConstantGradientShape<Operand>;
  constexpr int kTokens = Shape::kTokens;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const ConstantGradientShared<Operand> shared(layout);
  std::int64_t block = blockIdx.x;
  const std::int64_t r0 = block % blocks.realization_tiles * Shape::kRealizations;
  block /= blocks.realization_tiles;
  const std::int64_t d0 = block % blocks.feature_tiles * Shape::kFeatures;
  block /= blocks.feature_tiles;
  const std::int64_t head = block % p.num_heads, segment = block / p.num_heads;
  const auto &x_strides = p.x_strides, &grad_strides = p.grad_out_strides;
  const Storage* const x =
      static_cast<const Storage*>(p.x) + head * x_strides[4] + d0 * x_strides[5];
  const Storage* const grad =
      static_cast<const Storage*>(p.grad_out) + head * grad_strides[4] + r0 * grad_strides[5];
  const bool x_aligned = is_aligned<Storage>(p.x, x_strides);
  const bool grad_aligned = is_aligned<Storage>(p.grad_out, grad_strides);

  const auto find_rows = [&](std::int64_t tile) {
    const int t = static_cast<int>(threadIdx.x);
    if (t >= kTokens) return;
    const std::int64_t token = tile * kTokens + t;
    const std::int64_t n = token % p.size[2], line = token / p.size[2];
    const std::int64_t i1 = line % p.size[1], i0 = line / p.size[1] % p.size[0];
    const std::int64_t b = line / p.size[1] / p.size[0];
    const auto row = [&](const std::int64_t (&s)[6]) {
      return token < blocks.tokens ? b * s[0] + i0 * s[1] + i1 * s[2] + n * s[3] : -1;
    };
    shared.x_rows[(tile & 1) * kTokens + t] = row(x_strides);
    shared.grad_rows[(tile & 1) * kTokens + t] = row(grad_strides);
  };
  const auto load = [&](std::int64_t tile) {
    const std::int64_t* const x_rows = shared.x_rows + (tile & 1) * kTokens;
    const std::int64_t* const grad_rows = shared.grad_rows + (tile & 1) * kTokens;
    load_tokens<kTokens, Shape::kFeatures, Storage>(
        shared.x + (tile & 1) * shared.kX, p.in_features - d0, x_strides[5], x_aligned,
        p.feature_map, [&](int t) { return x_rows[t] < 0 ? nullptr : x + x_rows[t]; });
    load_tokens<kTokens, Shape::kRealizations, Storage>(
        shared.grad + (tile & 1) * shared.kGrad, p.num_realizations - r0, grad_strides[5],
        grad_aligned, FeatureMap::kIdentity,
        [&](int t) { return grad_rows[t] < 0 ? nullptr : grad + grad_rows[t]; });
  };

  TileProduct<Operand, Shape::kFeatures, Shape::kRealizations> product;
  product.clear();
  const std::int64_t per_segment = ceil_div(blocks.tiles, blocks.segments);
  const std::int64_t first_tile = segment * per_segment;
  const std::int64_t end_tile = min_of(blocks.tiles, first_tile + per_segment);
  find_rows(first_tile);
  // Each tile comes while the one before is multiplied: the first round has nothing to multiply.
  for (std::int64_t tile = first_tile - 1; tile < end_tile; ++tile) {
    copy_async_wait();
    if constexpr (sizeof(Operand) == 2) {
      if (tile >= first_tile)
        map_copied_tile<kTokens, Shape::kFeatures>(p.feature_map, shared.x + (tile & 1) * shared.kX,
                                                   x_strides[5], x_aligned);
    }
    __syncthreads();  // this tile and the next one's rows are there, the tile before has been used
    if (tile + 1 < end_tile) {
      load(tile + 1);
      find_rows(tile + 2);
    }
    if (tile < first_tile) continue;
    product.template multiply<kTokens, Major::kOuter, Major::kOuter>(
        shared.x + (tile & 1) * shared.kX, shared.grad + (tile & 1) * shared.kGrad);
  }
  double* const part = parts + (segment * p.num_heads + head) * p.in_features * p.num_realizations;
  product.for_each([&](int d, int r, T value) {
    if (d0 + d < p.in_features && r0 + r < p.num_realizations)
      part[(d0 + d) * p.num_realizations + r0 + r] = static_cast<double>(value);
  });
}

template <class Storage, class Operand>
void launch_constant_gradient(const core::ConvFilterBackwardParams& p, double* parts,
                              Stream stream) {
  const ConstantGradientBlocks<Operand> blocks(p);
  MemoryLayout size;
  ConstantGradientShared<Operand>{size};
  launch(conv_constant_gradient_kernel<Storage, Operand>,
         grid_of(blocks.realization_tiles * blocks.feature_tiles * p.num_heads * blocks.segments),
         dim3(kThreads), size.size(), stream, p, blocks, parts);
  sum_parts(parts, blocks.segments, blocks.constants,
            static_cast<core::accumulate_t<Storage>*>(p.grad_constant), stream);
}

}  // namespace torch_spe::cuda
