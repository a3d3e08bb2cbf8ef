// Kernels of the phasor filter's gradients of frequencies, coefficients, constant and positions,
// for every type and kind of positions.
#pragma once

#include "encode/phasor.h"
#include "encode/phasor/gradient_parts.h"

namespace torch_spe::cuda {

// The gradient of the code of (feature, pair) at a position: sum over the batch of x times the
// gradient of the output.
template <class Storage, class T>
TORCH_SPE_DEVICE void phasor_code_gradient(const PhasorFilterBackwardParams& p, std::int64_t head,
                                           std::int64_t n, std::int64_t d, std::int64_t pair, T* re,
                                           T* im) {
  const Storage* const x = static_cast<const Storage*>(p.x) + n * p.x_strides[1] +
                           head * p.x_strides[2] + d * p.x_strides[3];
  const Storage* const grad = static_cast<const Storage*>(p.grad_out) + n * p.grad_out_strides[1] +
                              head * p.grad_out_strides[2] + 2 * pair * p.grad_out_strides[3];
  *re = *im = 0;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const T value = read_feature(p.feature_map, x[b * p.x_strides[0]]);
    *re += value * read(grad[b * p.grad_out_strides[0]]);
    *im += value * read(grad[b * p.grad_out_strides[0] + p.grad_out_strides[3]]);
  }
}

// Gradients of frequencies, coefficients and constant: a thread keeps one pair and one feature, and
// walks over the positions of a segment. Sums of a tile of positions are in T, all others in
// double: the terms of a frequency's gradient grow with the position.
constexpr int kPhasorGradientTile = 32;

template <class Storage>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    phasor_parameters_gradient_kernel(const PhasorFilterBackwardParams p, std::int64_t segments,
                                      const PhasorGradientParts parts) {
  using T = core::accumulate_t<Storage>;
  const std::int64_t features = p.in_features, pairs = p.num_pairs;
  const std::int64_t pair_tiles = ceil_div(pairs, kLanes);
  const std::int64_t feature_tiles = ceil_div(features, kWarps);
  const std::int64_t block = blockIdx.x;
  const std::int64_t segment = block % segments;
  const std::int64_t pair = block / segments % pair_tiles * kLanes + threadIdx.x % kLanes;
  const std::int64_t d =
      block / segments / pair_tiles % feature_tiles * kWarps + threadIdx.x / kLanes;
  const std::int64_t head = block / segments / pair_tiles / feature_tiles;
  if (pair >= pairs || d >= features) return;
  const std::int64_t index = (head * features + d) * pairs + pair;
  const std::int64_t part = segment * p.num_heads * features * pairs + index;
  const double* const freq = p.freqs + index * p.ndim;
  const T cr = static_cast<const T*>(p.coefficients)[2 * index];
  const T ci = static_cast<const T*>(p.coefficients)[2 * index + 1];
  const std::int64_t tiles = ceil_div(p.length, kPhasorGradientTile),
                     per_segment = ceil_div(tiles, segments);
  const std::int64_t begin = min_of(p.length, segment * per_segment * kPhasorGradientTile);
  const std::int64_t end = min_of(p.length, begin + per_segment * kPhasorGradientTile);

  double sum_cr = 0, sum_ci = 0, sum_kr = 0, sum_ki = 0, sum_freq = 0;
  if (parts.freqs != nullptr) {
    for (std::int64_t i = 0; i < p.ndim; ++i) parts.freqs[part * p.ndim + i] = 0;
  }
  Phasor<T> phasor, step;
  if (p.positions == nullptr) step.set(freq[0], 1.0);
  for (std::int64_t n0 = begin; n0 < end; n0 += kPhasorGradientTile) {
    const int size = static_cast<int>(min_of(kPhasorGradientTile, end - n0));
    T tile_cr = 0, tile_ci = 0, tile_kr = 0, tile_ki = 0, tile_phase = 0, tile_slope = 0;
    if (p.positions == nullptr) phasor.set(freq[0], p.start + static_cast<double>(n0));
    for (int t = 0; t < size; ++t) {
      if (p.positions != nullptr) phasor.set(p, freq, n0 + t);
      T gr, gi;
      phasor_code_gradient<Storage>(p, head, n0 + t, d, pair, &gr, &gi);
      tile_kr += gr;
      tile_ki += gi;
      tile_cr += gr * phasor.re + gi * phasor.im;
      tile_ci += gi * phasor.re - gr * phasor.im;
      // Of the phase in cycles, without its factor 2 pi.
      const T phase =
          gi * (cr * phasor.re - ci * phasor.im) - gr * (cr * phasor.im + ci * phasor.re);
      tile_phase += phase;
      tile_slope += phase * static_cast<T>(t);
      if (p.positions != nullptr && parts.freqs != nullptr) {
        for (std::int64_t i = 0; i < p.ndim; ++i)
          parts.freqs[part * p.ndim + i] += core::kTwoPi * phase * position_of(p, n0 + t, i);
      }
      if (p.positions == nullptr) phasor.rotate(step);
    }
    sum_cr += static_cast<double>(tile_cr);
    sum_ci += static_cast<double>(tile_ci);
    sum_kr += static_cast<double>(tile_kr);
    sum_ki += static_cast<double>(tile_ki);
    sum_freq += static_cast<double>(tile_slope) +
                static_cast<double>(tile_phase) * (p.start + static_cast<double>(n0));
  }
  if (parts.freqs != nullptr && p.positions == nullptr) parts.freqs[part] = core::kTwoPi * sum_freq;
  if (parts.coefficients != nullptr) {
    parts.coefficients[2 * part] = sum_cr;
    parts.coefficients[2 * part + 1] = sum_ci;
  }
  if (parts.constant != nullptr) {
    parts.constant[2 * part] = sum_kr;
    parts.constant[2 * part + 1] = sum_ki;
  }
}

template <class Storage>
__global__ void __launch_bounds__(kThreads)
    phasor_positions_gradient_kernel(const PhasorFilterBackwardParams p,
                                     double* parts) {  // [H, N, ndim]
  using T = core::accumulate_t<Storage>;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  double* const warp_sums = layout.take<double>(kWarps);
  const std::int64_t codes = p.in_features * p.num_pairs;
  sum_position_gradients(
      p, codes, warp_sums, parts, [&](std::int64_t head, std::int64_t n, std::int64_t j) {
        const std::int64_t index = head * codes + j;
        const T cr = static_cast<const T*>(p.coefficients)[2 * index];
        const T ci = static_cast<const T*>(p.coefficients)[2 * index + 1];
        Phasor<T> phasor;
        phasor.set(p, p.freqs + index * p.ndim, n);
        T gr, gi;
        phasor_code_gradient<Storage>(p, head, n, j / p.num_pairs, j % p.num_pairs, &gr, &gi);
        return gi * (cr * phasor.re - ci * phasor.im) - gr * (cr * phasor.im + ci * phasor.re);
      });
}

}  // namespace torch_spe::cuda
