// Kernel of the sine filter's gradient of x by codes, see codes.h.
#pragma once

#include "encode/sine/codes.h"

namespace torch_spe::cuda {

// A block takes 32 positions and 8 batch rows of a head and goes through the features, and for each
// eight of these through the realizations. Each warp applies the codes of four positions.
template <class Storage, int kEights>
__global__ void __launch_bounds__(kCodeThreads, kCodeBlocks)
    sine_codes_input_gradient_kernel(const SineFilterBackwardParams p) {
  using Shared = SineCodesShared<Storage>;
  constexpr int kOwn = kCodePositions / kCodeWarps;  // positions of a warp
  constexpr int kDepths = kCodeRealizations / 16;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const Shared shared(layout, p);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  const int group = lane / 4, member = lane % 4;
  const SineCodesPlace place(p, 1);
  const std::int64_t n0 = place.n0(), b0 = place.b0(), head = place.head;
  const SineCodes<Storage, kEights> codes(p, shared, head, 0);
  codes.bring_weights(0);

  // Gradients of this lane's batch row as first factors, whose rows are the batch at one of the
  // warp's positions, then at the next: realizations 2 member + {0, 1, 8, 9} + 16 depth. A product
  // with the codes of either position uses one half of the rows.
  const int first = warp * kOwn;
  const int positions = static_cast<int>(min_of(p.length - n0, kCodePositions)) - first;
  std::uint32_t grad[kOwn / 2][kDepths][4];
  const auto load_grad = [&](int r0) {
    const std::int64_t stride = read_again(p.grad_out_strides[1]);
    const Storage* from = static_cast<const Storage*>(p.grad_out) +
                          (b0 + group) * read_again(p.grad_out_strides[0]) + (n0 + first) * stride +
                          head * read_again(p.grad_out_strides[2]) + r0 + 2 * member;
    const int left =
        b0 + group < p.batch ? static_cast<int>(p.num_realizations) - r0 - 2 * member : 0;
    TORCH_SPE_UNROLL
    for (int i = 0; i < kOwn; ++i, from += stride) {
      TORCH_SPE_UNROLL
      for (int e = 0; e < 2 * kDepths; ++e)
        grad[i / 2][e / 2][i % 2 + e % 2 * 2] =
            i < positions && 8 * e < left ? *reinterpret_cast<const std::uint32_t*>(from + 8 * e)
                                          : 0u;
    }
  };
  load_grad(0);
  codes.make_phases(n0);
  // The next features of the gradient of x to write: 2 member and 2 member + 1 of these eight.
  const int all_features = static_cast<int>(p.in_features),
            realizations = static_cast<int>(p.num_realizations);
  Storage* out = static_cast<Storage*>(p.grad_x) +
                 (((b0 + group) * p.length + n0 + first) * p.num_heads + head) * p.in_features +
                 2 * member;
  float sums[kOwn][4] = {};
  __syncthreads();  // the phases are there
  for (int d0 = 0, r0 = 0; d0 < all_features;) {
    const int next_d0 = r0 + kCodeRealizations < realizations ? d0 : d0 + kCodeWarps;
    const int next_r0 = r0 + kCodeRealizations < realizations ? r0 + kCodeRealizations : 0;
    codes.make(d0);
    if (next_d0 < all_features) codes.bring_weights(next_d0, next_r0);
    __syncthreads();  // the codes are there
    TORCH_SPE_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      const Storage* const from =
          shared.codes + (first + i) * Shared::kPosition + lane % 8 * Shared::kRow + lane / 8 * 8;
      TORCH_SPE_UNROLL
      for (int depth = 0; depth < kDepths; depth += 2) {
        std::uint32_t b[4];
        ldmatrix_x4<false>(b, from + 16 * depth);
        TORCH_SPE_UNROLL
        for (int l = 0; l < 2; ++l) {
          const std::uint32_t pair[2] = {b[2 * l], b[2 * l + 1]};
          mma_m16n8k16<Storage>(sums[i], grad[i / 2][depth + l], pair);
        }
      }
    }
    if (next_d0 > d0) {
      Storage* to = out;
      const std::int64_t row_size = read_again(p.num_heads) * p.in_features;
      const bool exists = b0 + group < p.batch && d0 + 2 * member < all_features;
      TORCH_SPE_UNROLL
      for (int i = 0; i < kOwn; ++i, to += row_size) {
        float low = sums[i][i % 2 * 2], high = sums[i][i % 2 * 2 + 1];
        if (exists && i < positions) {
          if (p.feature_map != FeatureMap::kIdentity) {
            const Storage* const x = static_cast<const Storage*>(p.x) +
                                     (b0 + group) * read_again(p.x_strides[0]) +
                                     (n0 + first + i) * read_again(p.x_strides[1]) +
                                     head * read_again(p.x_strides[2]) + d0 + 2 * member;
            low = gradient_of_input_at(p.feature_map, low, x);
            high = gradient_of_input_at(p.feature_map, high, x + 1);
          }
          *reinterpret_cast<std::uint32_t*>(to) = pack_pair<Storage>(low, high);
        }
        TORCH_SPE_UNROLL
        for (float& sum : sums[i]) sum = 0;
      }
      out += kCodeWarps;
    }
    if (realizations > kCodeRealizations) load_grad(next_r0);
    __syncthreads();  // the codes have been used
    d0 = next_d0;
    r0 = next_r0;
  }
}

}  // namespace torch_spe::cuda
