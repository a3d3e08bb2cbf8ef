// Kernel of the convolution filter's gradient of x with dense noise for 16-bit storage, see
// dense_codes.h.
#pragma once

#include "encode/conv/dense_forward.h"

namespace torch_spe::cuda {

constexpr int kDenseFeatures = 8;  // of a block

// grad_out of a batch row and position: realizations 2 member, 2 member + 1 from r0 on, and those
// 8 later; zero where there are none.
template <class Storage>
TORCH_SPE_DEVICE void load_realizations(const ConvFilterBackwardParams& p, const Storage* grad,
                                        std::int64_t r0, bool aligned, bool inside,
                                        std::uint32_t (&out)[2]) {
  const int member = static_cast<int>(threadIdx.x) % 4;
  const std::int64_t stride = p.grad_out_strides[5];
  TORCH_SPE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const std::int64_t r = r0 + 8 * i + 2 * member;
    const std::int64_t count = inside ? p.num_realizations - r : 0;
    if (aligned && count >= 2) {
      out[i] = *reinterpret_cast<const std::uint32_t*>(grad + r);
    } else {
      out[i] = join_halves(count > 0 ? grad[r * stride].bits : std::uint16_t(0),
                           count > 1 ? grad[(r + 1) * stride].bits : std::uint16_t(0));
    }
  }
}

// A block makes the gradients of some positions and batch rows for 8 features, and goes through
// the realizations. Codes are factors in the registers they were made in: at a time those of one
// position, all others being zero, times grad_out there.
template <class Storage>
__global__ void __launch_bounds__(kDenseThreads, 1)
    dense_conv_input_gradient_kernel(const ConvFilterBackwardParams p) {
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const DenseCodesShared<Storage> shared(layout);
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, member = lane % 4;
  const int position = static_cast<int>(threadIdx.x) / 32 * kWarpPositions;
  const LineTiles<DenseTile::kTokens> tiles(p);
  const std::int64_t feature_tiles = ceil_div(p.in_features, kDenseFeatures);
  const std::int64_t batch_tiles = ceil_div(p.batch, kDenseBatch);
  std::int64_t block = blockIdx.x;
  const std::int64_t d0 = block % feature_tiles * kDenseFeatures;
  block /= feature_tiles;
  const std::int64_t b0 = block % batch_tiles * kDenseBatch;
  block /= batch_tiles;
  LineTile place = tiles.place(block % tiles.count, block / tiles.count, 0);
  const int count = static_cast<int>(min_of(kDenseFeatures, p.in_features - d0));
  const int length = static_cast<int>(min_of(DenseTile::kTokens, p.size[2] - place.n0));
  const auto& strides = p.grad_out_strides;
  const bool aligned = is_aligned<Storage>(p.grad_out, strides);
  DenseCodes<Storage> codes(p, shared);

  float sums[kDenseFeatures][2][4];  // positions and batch rows
  TORCH_SPE_UNROLL
  for (int i = 0; i < 8 * kDenseFeatures; ++i) sums[i / 8][i / 4 % 2][i % 4] = 0;
  TORCH_SPE_KEEP_LOOP
  for (int r0 = 0; r0 < p.num_realizations; r0 += DenseTile::kRealizations) {
    std::uint32_t gradients[kWarpPositions][2];
    const std::int64_t b = b0 + group, stride = strides[3];
    const Storage* from = static_cast<const Storage*>(p.grad_out) + place.offset(strides) +
                          b * strides[0] + position * stride;
    TORCH_SPE_UNROLL
    for (int t = 0; t < kWarpPositions; ++t) {
      load_realizations(p, from, r0, aligned, b < p.batch && position + t < length, gradients[t]);
      from += stride;
    }
    TORCH_SPE_KEEP_LOOP
    for (int i = 0; i < count; ++i) {
      place.d = d0 + i;
      float made[4][4];
      codes.template make<true>(place, r0, made);
      TORCH_SPE_UNROLL
      for (int k = 0; k < kDenseFeatures; ++k) {
        if (k != i) continue;
        TORCH_SPE_UNROLL
        for (int t = 0; t < kWarpPositions; ++t) {
          const float(&tile)[4] = made[t / 16 * 2], (&next)[4] = made[t / 16 * 2 + 1];
          const int e = t / 8 % 2 * 2;  // of positions 8 .. 15 of a tile
          const bool own = group == t % 8;
          const std::uint32_t low = own ? pack_pair<Storage>(tile[e], tile[e + 1]) : 0u;
          const std::uint32_t high = own ? pack_pair<Storage>(next[e], next[e + 1]) : 0u;
          const std::uint32_t one[4] = {e == 0 ? low : 0u, e == 0 ? 0u : low, e == 0 ? high : 0u,
                                        e == 0 ? 0u : high};
          mma_m16n8k16<Storage>(sums[k][t / 16], one, gradients[t]);
        }
      }
    }
  }

  // 16 positions at a time go through the memory of noise, [position, batch row, d].
  constexpr int kResults = 16 * kDenseBatch * kDenseFeatures;
  static_assert(kDenseWarps * kResults * sizeof(float) <=
                2 * DenseCodesShared<Storage>::kNoise * sizeof(Storage));
  float* const results =
      reinterpret_cast<float*>(shared.noise) + position / kWarpPositions * kResults;
  const bool vectors = p.in_features % 8 == 0 &&
                       reinterpret_cast<std::uintptr_t>(p.grad_x) % sizeof(Vector<Storage>) == 0;
  __syncthreads();  // all noise has been used
  TORCH_SPE_UNROLL
  for (int j = 0; j < 2; ++j) {
    __syncwarp();
    TORCH_SPE_UNROLL
    for (int k = 0; k < kDenseFeatures; ++k) {
      TORCH_SPE_UNROLL
      for (int i = 0; i < 4; ++i)
        results[((group + i / 2 * 8) * kDenseBatch + 2 * member + i % 2) * kDenseFeatures + k] =
            sums[k][j][i];
    }
    __syncwarp();
    TORCH_SPE_KEEP_LOOP
    for (int i = lane; i < 16 * kDenseBatch; i += 32) {
      const int t = position + 16 * j + i / kDenseBatch;
      const std::int64_t b = b0 + i % kDenseBatch;
      if (t >= length || b >= p.batch) continue;
      const std::int64_t n =
          ((b * p.size[0] + place.i0) * p.size[1] + place.i1) * p.size[2] + place.n0 + t;
      const Storage* const x = static_cast<const Storage*>(p.x) + place.offset(p.x_strides) +
                               b * p.x_strides[0] + t * p.x_strides[3] + d0 * p.x_strides[5];
      Vector<Storage> values;
      TORCH_SPE_UNROLL
      for (int k = 0; k < kDenseFeatures; ++k) {
        float gradient = results[i * kDenseFeatures + k];
        if (k < count)
          gradient = gradient_of_input_at(p.feature_map, gradient, x + k * p.x_strides[5]);
        write(gradient, values.values + k);
      }
      Storage* const out =
          static_cast<Storage*>(p.grad_x) + (n * p.num_heads + place.head) * p.in_features + d0;
      if (vectors) {
        *reinterpret_cast<Vector<Storage>*>(out) = values;
      } else {
        TORCH_SPE_UNROLL
        for (int k = 0; k < kDenseFeatures; ++k) {
          if (k < count) out[k] = values.values[k];
        }
      }
    }
  }
}

template <class Storage>
void launch_dense_input_gradient(const ConvFilterBackwardParams& p, Stream stream) {
  MemoryLayout size;
  DenseCodesShared<Storage>{size};
  const std::int64_t blocks = LineTiles<DenseTile::kTokens>(p).count *
                              ceil_div(p.batch, kDenseBatch) *
                              ceil_div(p.in_features, kDenseFeatures) * p.num_heads;
  launch(dense_conv_input_gradient_kernel<Storage>, grid_of(blocks), dim3(kDenseThreads),
         size.size(), stream, p);
}

}  // namespace torch_spe::cuda
