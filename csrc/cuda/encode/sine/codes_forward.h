// Kernel of the sine filter's forward pass by codes, see codes.h.
#pragma once

#include "encode/sine/codes.h"

namespace torch_spe::cuda {

// A block takes 32 positions, 8 batch rows and 64 realizations of a head, and goes through the
// features. Each warp applies the codes of four positions.
template <class Storage, int kEights>
__global__ void __launch_bounds__(kCodeThreads, kCodeBlocks)
    sine_codes_forward_kernel(const SineFilterParams p) {
  using Shared = SineCodesShared<Storage>;
  constexpr int kOwn = kCodePositions / kCodeWarps;  // positions of a warp
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const Shared shared(layout, p);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  const int group = lane / 4, member = lane % 4;
  const SineCodesPlace place(p, SineCodesPlace::realization_tiles(p));
  const std::int64_t n0 = place.n0(), b0 = place.b0(), r0 = place.r0(), head = place.head;
  const SineCodes<Storage, kEights> codes(p, shared, head, r0);
  codes.bring_weights(0);
  codes.make_phases(n0);

  const int first = warp * kOwn;
  const int positions = static_cast<int>(min_of(p.length - n0, kCodePositions)) - first;
  // x of this lane's batch row at the warp's first position, features 2 member and 2 member + 1 of
  // those from d0 on. Computed for every eight features: registers are short.
  const auto x_from = [&](int d0) {
    const std::uint32_t lane = static_cast<std::uint32_t>(thread_read_again()) % kLanes;
    return static_cast<const Storage*>(p.x) + b0 * p.x_strides[0] + n0 * p.x_strides[1] +
           head * p.x_strides[2] + d0 + (lane / 4 * p.x_strides[0] + first * p.x_strides[1]) +
           2 * (lane % 4);
  };
  const int features = b0 + group < p.batch ? static_cast<int>(p.in_features) - 2 * member : 0;
  float sums[kOwn][kCodeRealizations / 16][4] = {};
  __syncthreads();  // the phases are there
  const int all_features = static_cast<int>(p.in_features);
  for (int d0 = 0; d0 < all_features; d0 += kCodeWarps) {
    std::uint32_t inputs[kOwn] = {};  // loaded while the codes are made
    const Storage* from_x = x_from(d0);
    TORCH_SPE_UNROLL
    for (int i = 0; i < kOwn; ++i, from_x += p.x_strides[1]) {
      if (i < positions && d0 < features)
        inputs[i] = *reinterpret_cast<const std::uint32_t*>(from_x);
    }
    codes.make(d0);
    if (d0 + kCodeWarps < all_features) codes.bring_weights(d0 + kCodeWarps);
    __syncthreads();  // the codes are there
    if (p.feature_map != FeatureMap::kIdentity) {
      TORCH_SPE_UNROLL
      for (std::uint32_t& input : inputs) input = map_feature_pair<Storage>(p.feature_map, input);
    }
    TORCH_SPE_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      // What is not there meets codes of 0, or is not stored. Of a product over 16 summands, 8 are
      // 0: the lower ones for the upper 16 of 32 realizations, whose codes are in their place.
      const std::uint32_t low[2] = {inputs[i], 0}, high[2] = {0, inputs[i]};
      const Storage* const from =
          shared.codes + (first + i) * Shared::kPosition + lane % 8 * Shared::kRow + lane / 8 * 8;
      TORCH_SPE_UNROLL
      for (int j = 0; j < kCodeRealizations / 32; ++j) {
        std::uint32_t a[4];
        ldmatrix_x4<true>(a, from + 32 * j);
        mma_m16n8k16<Storage>(sums[i][2 * j], a, low);
        mma_m16n8k16<Storage>(sums[i][2 * j + 1], a, high);
      }
    }
    __syncthreads();  // the codes have been used
  }

  // Rows of the output are gathered in shared memory: each warp has a part of that of the codes.
  constexpr int kRows = kOwn * kCodeBatch;
  static_assert(kCodeWarps * kRows * Shared::kRow <= kCodePositions * Shared::kPosition);
  Storage* const rows = shared.codes + warp * kRows * Shared::kRow;
  TORCH_SPE_UNROLL
  for (int i = 0; i < kOwn; ++i) {
    TORCH_SPE_UNROLL
    for (int m = 0; m < kCodeRealizations / 16; ++m) {
      TORCH_SPE_UNROLL
      for (int e = 0; e < 4; ++e)
        write(sums[i][m][e], rows + (i * kCodeBatch + 2 * member + e % 2) * Shared::kRow + 16 * m +
                                 group + e / 2 * 8);
    }
  }
  __syncwarp();
  const int column = lane % 8 * 8;
  const std::int64_t row_size = p.num_heads * p.num_realizations;
  Storage* const out = static_cast<Storage*>(p.out) + (b0 * p.length + n0 + first) * row_size +
                       head * p.num_realizations + r0 + column;
  TORCH_SPE_KEEP_LOOP
  for (int i = 0; i < kRows / 4; ++i) {
    const int row = 4 * i + lane / 8, b = row % kCodeBatch, t = row / kCodeBatch;
    if (t < positions && b0 + b < p.batch && r0 + column < p.num_realizations) {
      *reinterpret_cast<Vector<Storage>*>(out + (b * p.length + t) * row_size) =
          *reinterpret_cast<const Vector<Storage>*>(rows + row * Shared::kRow + column);
    }
  }
}

}  // namespace torch_spe::cuda
