// Kernel of the convolution filter's gradient of x with dense noise for 16-bit storage, see
// dense_codes.h.
#pragma once

#include "encode/conv/dense_forward.h"

namespace torch_spe::cuda {

constexpr int kDenseFeatures = 4;  // of a block

// grad_out of a batch row at `count` positions from `grad` on: of position t, out[t / 2][t % 2] are
// realizations 2 member, 2 member + 1 from r0 on, out[t / 2][t % 2 + 2] those 8 later. Zero where
// there are none.
template <class Storage>
TORCH_SPE_DEVICE void load_realizations(const ConvFilterBackwardParams& p, const Storage* grad,
                                        int r0, int count, bool aligned,
                                        std::uint32_t (&out)[kWarpPositions / 2][4]) {
  const int r = r0 + static_cast<int>(threadIdx.x % 4u * 2u);
  const std::int64_t stride = p.grad_out_strides[3], next = p.grad_out_strides[5];
  const bool whole = aligned && r0 + DenseTile::kRealizations <= p.num_realizations;
  grad += r * next;
  TORCH_SPE_UNROLL
  for (int t = 0; t < kWarpPositions; ++t) {
    std::uint32_t* const two = out[t / 2] + t % 2;
    two[0] = two[2] = 0;
    if (t < count && whole) {
      two[0] = *reinterpret_cast<const std::uint32_t*>(grad);
      two[2] = *reinterpret_cast<const std::uint32_t*>(grad + 8);
    } else if (t < count) {
      TORCH_SPE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int e = i / 2 * 8 + i % 2;
        if (r + e < p.num_realizations)
          two[i / 2 * 2] |= static_cast<std::uint32_t>(grad[e * next].bits) << i % 2 * 16;
      }
    }
    grad += stride;
  }
}

// A block makes the gradients of some positions and batch rows for 4 features, and goes through
// the realizations. Codes are factors in the registers they were made in: at a time those of two
// positions, all others being zero, times grad_out there, whose rows are the batch rows of the
// first and then those of the second position. Sums of one with the codes of the other are not
// used: columns are positions, and even ones matter in rows 0 .. 7 only, odd ones in the others.
template <class Storage>
__global__ void __launch_bounds__(kDenseThreads, 1)
    dense_conv_input_gradient_kernel(const ConvFilterBackwardParams p) {
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const DenseCodesShared<Storage> shared(layout);
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, member = lane % 4;
  const int position = static_cast<int>(threadIdx.x) / 32 * kWarpPositions;
  const LineTiles<DenseTile::kTokens> tiles(p);
  BlockIndices block(blockIdx.x);
  const int d0 =
      static_cast<int>(block.next(ceil_div(p.in_features, kDenseFeatures))) * kDenseFeatures;
  const int b0 = static_cast<int>(block.next(ceil_div(p.batch, kDenseBatch))) * kDenseBatch;
  const std::int64_t tile = block.next(tiles.count);
  LineTile place = tiles.place(tile, block.rest(), 0);
  const int count = static_cast<int>(min_of(kDenseFeatures, p.in_features - d0));
  const int length = static_cast<int>(min_of(DenseTile::kTokens, p.size[2] - place.n0));
  const auto& strides = p.grad_out_strides;
  const bool aligned = is_aligned<Storage>(p.grad_out, strides);
  DenseCodes<Storage, true> codes(p, shared, place.n0);

  float sums[kDenseFeatures][4][4];  // of positions 8 j + column
  TORCH_SPE_UNROLL
  for (int i = 0; i < 16 * kDenseFeatures; ++i) sums[i / 16][i / 4 % 4][i % 4] = 0;
  TORCH_SPE_KEEP_LOOP
  for (int r0 = 0; r0 < p.num_realizations; r0 += DenseTile::kRealizations) {
    std::uint32_t gradients[kWarpPositions / 2][4];
    const std::int64_t b = b0 + group;
    load_realizations(p,
                      static_cast<const Storage*>(p.grad_out) + place.offset(strides) +
                          b * strides[0] + position * strides[3],
                      r0, b < p.batch ? length - position : 0, aligned, gradients);
    TORCH_SPE_KEEP_LOOP
    for (int i = 0; i < count; ++i) {
      place.d = d0 + i;
      float made[4][4];
      codes.make(place, r0, made);
      TORCH_SPE_UNROLL
      for (int k = 0; k < kDenseFeatures; ++k) {
        if (k != i) continue;
        TORCH_SPE_UNROLL
        for (int j = 0; j < 4; ++j) {
          const float (&tile)[4] = made[j / 2 * 2], (&next)[4] = made[j / 2 * 2 + 1];
          const int e = 2 - j % 2 * 2;  // positions 8 .. 15 of a tile come first
          const std::uint32_t low = pack_pair<Storage>(tile[e], tile[e + 1]);
          const std::uint32_t high = pack_pair<Storage>(next[e], next[e + 1]);
          TORCH_SPE_UNROLL
          for (int s = 0; s < 4; ++s) {
            const bool own = group / 2 == s;
            const std::uint32_t two[2] = {own ? low : 0u, own ? high : 0u};
            mma_m16n8k16<Storage>(sums[k][j], gradients[4 * j + s], two);
          }
        }
      }
    }
  }

  // They go through the memory of noise, [position, batch row, d].
  constexpr int kResults = kWarpPositions * kDenseBatch * kDenseFeatures;
  static_assert(kDenseWarps * kResults * sizeof(float) <=
                2 * DenseCodesShared<Storage>::kNoise * sizeof(Storage));
  float* const results =
      reinterpret_cast<float*>(shared.noise) + position / kWarpPositions * kResults;
  __syncthreads();  // all noise has been used
  TORCH_SPE_UNROLL
  for (int k = 0; k < kDenseFeatures; ++k) {
    TORCH_SPE_UNROLL
    for (int i = 0; i < 8; ++i)
      results[((i / 2 * 8 + 2 * member + i % 2) * kDenseBatch + group) * kDenseFeatures + k] =
          sums[k][i / 2][i % 2 * 3];
  }
  __syncwarp();
  const bool vectors = p.in_features % kDenseFeatures == 0 &&
                       reinterpret_cast<std::uintptr_t>(p.grad_x) % sizeof(FourFeatures) == 0;
  TORCH_SPE_KEEP_LOOP
  for (int i = lane; i < kWarpPositions * kDenseBatch; i += 32) {
    const int t = position + i / kDenseBatch;
    const std::int64_t b = b0 + i % kDenseBatch;
    if (t >= length || b >= p.batch) continue;
    const std::int64_t n =
        ((b * p.size[0] + place.i0) * p.size[1] + place.i1) * p.size[2] + place.n0 + t;
    const Storage* const x = static_cast<const Storage*>(p.x) + place.offset(p.x_strides) +
                             b * p.x_strides[0] + t * p.x_strides[3] + d0 * p.x_strides[5];
    float values[kDenseFeatures];
    TORCH_SPE_UNROLL
    for (int k = 0; k < kDenseFeatures; ++k) {
      values[k] = results[i * kDenseFeatures + k];
      if (k < count)
        values[k] = gradient_of_input_at(p.feature_map, values[k], x + k * p.x_strides[5]);
    }
    Storage* const out =
        static_cast<Storage*>(p.grad_x) + (n * p.num_heads + place.head) * p.in_features + d0;
    if (vectors) {
      write_operands(values, out);
    } else {
      TORCH_SPE_UNROLL
      for (int k = 0; k < kDenseFeatures; ++k) {
        if (k < count) write(values[k], out + k);
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
