// Kernel of the convolution filter's gradient of given noise.
#pragma once

#include "encode/conv/code_gradients.h"
#include "encode/conv/code_tile.h"

namespace torch_spe::cuda {

// Gradient of given noise, grad_z[j, r] = sum_p kernel[p] gradient of code[j - p, r]: a block takes
// a tile of its positions.
template <class Storage, class Operand>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    conv_noise_gradient_kernel(const ConvFilterBackwardParams p) {
  using T = core::accumulate_t<Storage>;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  using Tile = ConvTileShape<true>;
  constexpr int kTokens = Tile::kTokens, kRealizations = Tile::kRealizations,
                kWindow = Tile::kWindow;
  const ConvCodeWindows<Storage, Operand, Tile> shared(layout, 1);
  const std::int64_t size0 = p.size[0] + p.kernel_size[0] - 1;
  const std::int64_t size1 = p.size[1] + p.kernel_size[1] - 1;
  const std::int64_t size2 = p.size[2] + p.kernel_size[2] - 1;
  const LineTiles<kTokens> tiles(size0, size1, size2);
  const std::int64_t realizations = p.num_realizations,
                     realization_tiles = ceil_div(realizations, kRealizations);
  const std::int64_t block = blockIdx.x;
  const std::int64_t r0 = block % realization_tiles * kRealizations;
  const std::int64_t tile = block / realization_tiles % tiles.count;
  const std::int64_t feature = block / realization_tiles / tiles.count;
  const LineTile noise = tiles.place(tile, feature / p.in_features, feature % p.in_features);

  TileProduct<Operand, kTokens, kRealizations> product;
  product.clear();
  for (std::int64_t tap0 = 0; tap0 < p.kernel_size[0]; ++tap0) {
    for (std::int64_t tap1 = 0; tap1 < p.kernel_size[1]; ++tap1) {
      LineTile place = noise;
      place.i0 -= tap0;
      place.i1 -= tap1;
      place.n0 = 0;
      if (place.i0 < 0 || place.i0 >= p.size[0] || place.i1 < 0 || place.i1 >= p.size[1]) continue;
      const T* const taps = taps_of<T>(p, place, tap0, tap1);
      const std::int64_t begin = max_of(0, noise.n0 - p.kernel_size[2] + 1);
      const std::int64_t end = min_of(p.size[2], noise.n0 + kTokens);
      for (std::int64_t n = begin; n < end; n += kWindow) {
        __syncthreads();  // the tiles before have been used
        fill_toeplitz<Tile, true>(taps, p.kernel_size[2], n - noise.n0, shared.toeplitz);
        fill_code_gradients<kWindow, kRealizations, Storage>(p, place, n, r0, shared.noise);
        __syncthreads();
        product.template multiply<kWindow, Major::kToeplitz, Major::kOuter>(shared.toeplitz,
                                                                            shared.noise);
      }
    }
  }
  product.for_each([&](int token, int r, T value) {
    if (noise.n0 + token >= size2 || r0 + r >= realizations) return;
    const std::int64_t position = ((feature * size0 + noise.i0) * size1 + noise.i1) * size2;
    write_as(p.noise_dtype, value, p.grad_noise,
             (position + noise.n0 + token) * realizations + r0 + r);
  });
}

}  // namespace torch_spe::cuda
