// Kernel of the convolution filter's gradient of its kernel for every noise and type; 16-bit
// storage and dense noise have one of their own in dense_tap_gradient.h.
#pragma once

#include "encode/conv/code_gradients.h"
#include "encode/conv/noise_line.h"

namespace torch_spe::cuda {

// Gradient of the kernel: a block takes a segment of the tiles of one feature, and adds up its part
// of the sums in global memory, which is its own.
template <class Storage, class Operand, bool kDense>
struct ConvTapGradientShared {
  using T = core::accumulate_t<Storage>;
  using Tile = ConvTileShape<kDense>;
  using Number = std::conditional_t<kDense, Operand, T>;
  static constexpr int kRow = Tile::kWindow + 1;
  Number* noise;  // [period, r]
  Number* grad;   // [token, r], gradients of codes
  T* products;    // [token, period], of dense noise: sums over r of gradient and noise

  TORCH_SPE_INLINE explicit ConvTapGradientShared(MemoryLayout& layout)
      : noise(layout.take<Number>(Tile::kWindow * row_of<Number>(Tile::kRealizations))),
        grad(layout.take<Number>(Tile::kTokens * row_of<Number>(Tile::kRealizations))),
        products(kDense ? layout.take<T>(Tile::kTokens * kRow) : nullptr) {}
};

inline std::int64_t tap_gradient_segments(const ConvFilterParams& p) {
  return num_segments(p.num_heads * p.in_features,
                      LineTiles<ConvTileShape<true>::kTokens>(p).count);
}

template <class Storage, class Operand, bool kDense>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    conv_tap_gradient_kernel(const ConvFilterBackwardParams p, std::int64_t segments,
                             double* parts) {  // [segment, H, D, *P]
  using T = core::accumulate_t<Storage>;
  using Shared = ConvTapGradientShared<Storage, Operand, kDense>;
  using Tile = typename Shared::Tile;
  using Number = typename Shared::Number;
  constexpr int kTokens = Tile::kTokens, kRealizations = Tile::kRealizations,
                kWindow = Tile::kWindow;
  constexpr int kRow = row_of<Number>(kRealizations);
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const Shared shared(layout);
  const LineTiles<kTokens> tiles(p);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t block = blockIdx.x;
  const std::int64_t segment = block % segments;
  const std::int64_t d = block / segments % p.in_features, head = block / segments / p.in_features;
  const std::int64_t taps = p.kernel_size[0] * p.kernel_size[1] * p.kernel_size[2];
  double* const part = parts + ((segment * p.num_heads + head) * p.in_features + d) * taps;
  for (std::int64_t i = thread; i < taps; i += kThreads) part[i] = 0;
  const double factor = __builtin_sqrt(static_cast<double>(noise_periods(p.generated)));
  const std::uint64_t seed = noise_seed_of(p);
  const std::int64_t per_segment = ceil_div(tiles.count, segments);
  const std::int64_t end_tile = min_of(tiles.count, (segment + 1) * per_segment);

  for (std::int64_t r0 = 0; r0 < p.num_realizations; r0 += kRealizations) {
    for (std::int64_t tile = segment * per_segment; tile < end_tile; ++tile) {
      const LineTile place = tiles.place(tile, head, d);
      __syncthreads();  // the gradients before have been used
      fill_code_gradients<kTokens, kRealizations, Storage>(p, place, 0, r0, shared.grad);
      const NoiseTile<Tile> noise(p, place, seed);
      for (std::int64_t tap0 = 0; tap0 < p.kernel_size[0]; ++tap0) {
        for (std::int64_t tap1 = 0; tap1 < p.kernel_size[1]; ++tap1) {
          const NoiseLine<Tile> line(noise, tap0, tap1);
          if (!kDense && !line.has_any(r0)) continue;
          double* const sums = part + (tap0 * p.kernel_size[1] + tap1) * p.kernel_size[2];
          for (int first = 0; first < line.count; first += kWindow) {
            line.fill(first, r0, shared.noise);
            __syncthreads();
            if constexpr (kDense) {
              TileProduct<Operand, kTokens, kWindow> product;
              product.clear();
              product.template multiply<kRealizations, Major::kDepth, Major::kDepth>(shared.grad,
                                                                                     shared.noise);
              product.for_each([&](int token, int period, T value) {
                shared.products[token * Shared::kRow + period] = value;
              });
              __syncthreads();
              // A tap is a diagonal.
              const int least = thread < kTokens ? kTokens - 1 - thread : 0;  // token
              const std::int64_t tap = first + thread - (kTokens - 1);
              if (tap >= 0 && tap < p.kernel_size[2]) {
                T sum = 0;
                for (int token = least; token < kTokens; ++token) {
                  const int period = token + thread - (kTokens - 1);
                  if (period < kWindow) sum += shared.products[token * Shared::kRow + period];
                }
                sums[tap] += static_cast<double>(sum);
              }
            } else {
              for (std::int64_t tap = thread; tap < p.kernel_size[2]; tap += kThreads) {
                std::int64_t period = (line.origin + tap) / line.stride;
                std::int64_t phase = (line.origin + tap) % line.stride;
                T sum = 0;
                for (int token = 0; token < kTokens; ++token) {
                  if (period >= first && period < first + kWindow) {
                    // The realizations of the class, which are the stride apart.
                    std::int64_t r = core::floor_modulo(phase - r0, line.stride);
                    for (; r < kRealizations; r += line.stride)
                      sum +=
                          shared.grad[token * kRow + r] * shared.noise[(period - first) * kRow + r];
                  }
                  if (++phase == line.stride) {
                    phase = 0;
                    ++period;
                  }
                }
                sums[tap] += factor * static_cast<double>(sum);
              }
            }
            // Dense noise was last used before the barrier above, products are before the next one.
            if (!kDense) __syncthreads();  // the window has been used
          }
        }
      }
    }
  }
}

}  // namespace torch_spe::cuda
