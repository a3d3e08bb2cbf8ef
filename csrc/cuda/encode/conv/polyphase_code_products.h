// Kernel of the convolution filter with polyphase noise and of its gradient by x for 16-bit
// storage, see polyphase_codes.h.
#pragma once

#include "encode/conv/polyphase_codes.h"

namespace torch_spe::cuda {

// Four values, zero from `count` on.
template <class Storage>
TORCH_SPE_DEVICE FourFeatures read_four(const Storage* from, int count, std::int64_t stride) {
  FourFeatures result{};
  TORCH_SPE_UNROLL
  for (int e = 0; e < 4; ++e) {
    if (e < count)
      result.pairs[e / 2] |= static_cast<std::uint32_t>(from[e * stride].bits) << e % 2 * 16;
  }
  return result;
}

// Brings a warp's sums to rows of the batch, through shared memory [position, row, batch row].
template <class Storage, bool kGradient>
TORCH_SPE_DEVICE void store_polyphase_products(const ConvFilterBackwardParams& p,
                                               const PolyphaseCodePlan& plan,
                                               const float (&sums)[2 * kCodePeriods][4],
                                               void* memory) {
  constexpr int kResults = kCodeTile * kCodeBatch;
  const int thread = thread_read_again(), lane = thread % 32, warp = thread / 32;
  const int group = lane / 4, member = lane % 4;
  Storage* const results = static_cast<Storage*>(memory) + warp * 2 * kCodePeriods * kResults;
  TORCH_SPE_UNROLL
  for (int t = 0; t < 2 * kCodePeriods; ++t) {
    TORCH_SPE_UNROLL
    for (int i = 0; i < 2; ++i)
      *reinterpret_cast<std::uint32_t*>(results + t * kResults + (group + 8 * i) * kCodeBatch +
                                        2 * member) =
          pack_pair<Storage>(sums[t][2 * i], sums[t][2 * i + 1]);
  }
  __syncwarp();
  const PolyphaseCodeBlock block(p, plan, kGradient, read_again(static_cast<int>(blockIdx.x)));
  const std::int64_t columns = kGradient ? p.in_features : p.num_realizations;
  const std::int64_t b = block.b + group, n0 = block.position(plan, warp);
  const int first = block.row + 4 * member, count = static_cast<int>(columns) - first;
  Storage* const out = static_cast<Storage*>(kGradient ? p.grad_x : p.out) +
                       ((b * p.size[2] + n0) * p.num_heads + block.head) * columns + first;
  const bool vectors =
      columns % 4 == 0 && reinterpret_cast<std::uintptr_t>(out) % sizeof(FourFeatures) == 0;
  TORCH_SPE_KEEP_LOOP
  for (int t = 0; t < 2 * kCodePeriods; t += 2) {
    std::uint32_t pairs[4];
    ldmatrix_x4<true>(pairs, results + t * kResults + lane * kCodeBatch);
    TORCH_SPE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int n = (t + i) % kCodePeriods * plan.stride + t / kCodePeriods;
      if (b >= p.batch || n0 + n >= p.size[2]) continue;
      FourFeatures four = {{pairs[2 * i], pairs[2 * i + 1]}};
      if (kGradient && p.feature_map != FeatureMap::kIdentity) {
        const Storage* const x = static_cast<const Storage*>(p.x) + b * p.x_strides[0] +
                                 (n0 + n) * p.x_strides[3] + block.head * p.x_strides[4] +
                                 first * p.x_strides[5];
        float values[4];
        TORCH_SPE_UNROLL
        for (int e = 0; e < 4; ++e) {
          if (e % 2 == 0) unpack_pair<Storage>(four.pairs[e / 2], values + e, values + e + 1);
          if (e < count)
            values[e] = gradient_of_input_at(p.feature_map, values[e], x + e * p.x_strides[5]);
        }
        TORCH_SPE_UNROLL
        for (int e = 0; e < 2; ++e)
          four.pairs[e] = pack_pair<Storage>(values[2 * e], values[2 * e + 1]);
      }
      Storage* const to = out + n * p.num_heads * columns;
      if (vectors && count >= 4) {
        *reinterpret_cast<FourFeatures*>(to) = four;
        continue;
      }
      TORCH_SPE_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (e < count) to[e].bits = static_cast<std::uint16_t>(four.pairs[e / 2] >> e % 2 * 16);
      }
    }
  }
}

// x times codes, summed over features; or, for the gradient of x, grad_out times codes, summed over
// realizations. A block makes 16 realizations or features of a tile of positions, a warp those of
// two values of u.
template <class Storage, bool kGradient>
__global__ void __launch_bounds__(kCodeThreads, 2)
    polyphase_code_kernel(const ConvFilterBackwardParams p, const PolyphaseCodePlan plan) {
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const PolyphaseCodeShared<Storage> shared(layout);
  using Codes = PolyphaseCodes<Storage, kGradient>;
  const PolyphaseCodeBlock block(p, plan, kGradient, static_cast<int>(blockIdx.x));
  const Codes codes(p, plan, shared, block);

  const auto& strides = kGradient ? p.grad_out_strides : p.x_strides;
  const void* const in = kGradient ? p.grad_out : p.x;
  const int sum_count = static_cast<int>(kGradient ? p.num_realizations : p.in_features);
  float sums[2 * kCodePeriods][4];  // of rows of realizations or features, and batch rows
  TORCH_SPE_UNROLL
  for (int i = 0; i < 8 * kCodePeriods; ++i) sums[i / 4][i % 4] = 0;
  __syncthreads();
  codes.locate(0);
  __syncthreads();
  TORCH_SPE_KEEP_LOOP
  for (int sum0 = 0; sum0 < sum_count; sum0 += kCodeTile) {
    codes.make_factors(sum0);
    __syncthreads();
    codes.locate(sum0 + kCodeTile);
    codes.make();
    // The operands of half of the positions at a time are in registers, those of the first one
    // while others make codes. What they are found by is read again, or it is kept in registers
    // for each position.
    FourFeatures factors[kCodePeriods];
    const auto load = [&](int u) {
      const PolyphaseCodeBlock& own = *shared.block;
      const int thread = thread_read_again(), first = sum0 + thread % 4 * 4;
      const std::int64_t next = read_again(strides[3]), b = own.b + thread % 32 / 4;
      const std::int64_t n = own.position(plan, thread / 32) + u;
      const Storage* from = static_cast<const Storage*>(in) + b * read_again(strides[0]) +
                            n * next + own.head * read_again(strides[4]) + first * strides[5];
      const int count = b < p.batch ? sum_count - first : 0;
      if (plan.aligned && count >= 4 && n + (kCodePeriods - 1) * plan.stride < p.size[2]) {
        TORCH_SPE_UNROLL
        for (int q = 0; q < kCodePeriods; ++q) {
          factors[q] = *reinterpret_cast<const FourFeatures*>(from);
          from += plan.stride * next;
        }
        return;
      }
      TORCH_SPE_UNROLL
      for (int q = 0; q < kCodePeriods; ++q) {
        factors[q] =
            read_four(from, n + q * plan.stride < p.size[2] ? count : 0, read_again(strides[5]));
        from += plan.stride * next;
      }
    };
    load(0);
    __syncthreads();
    // Of ldmatrix' four matrices a lane gives a row of number `matrix`.
    const int thread = thread_read_again(), matrix = thread % 32 / 8;
    const int half = kGradient ? matrix / 2 : matrix % 2;
    const int place = (kGradient ? matrix % 2 : matrix / 2) * 8 + thread % 8;
    TORCH_SPE_UNROLL
    for (int u = 0; u < 2; ++u) {
      if (u > 0) load(u);
      if (!kGradient && p.feature_map != FeatureMap::kIdentity) {
        TORCH_SPE_UNROLL
        for (int i = 0; i < 2 * kCodePeriods; ++i)
          factors[i / 2].pairs[i % 2] =
              map_feature_pair<Storage>(p.feature_map, factors[i / 2].pairs[i % 2]);
      }
      TORCH_SPE_UNROLL
      for (int q = 0; q < kCodePeriods; ++q) {
        std::uint32_t a[4];
        ldmatrix_x4<!kGradient>(
            a, shared.codes + Codes::chunk(thread / 32 * 2 + u, q, u << 2 | q / 2, half, place));
        mma_m16n8k16<Storage>(sums[u * kCodePeriods + q], a, factors[q].pairs);
      }
      if (p.constant == nullptr) continue;
      std::uint32_t a[4];
      ldmatrix_x4<!kGradient>(
          a, shared.codes + Codes::chunk(kCodePhases, Codes::parity_of(sum0), 0, half, place));
      TORCH_SPE_UNROLL
      for (int q = 0; q < kCodePeriods; ++q)
        mma_m16n8k16<Storage>(sums[u * kCodePeriods + q], a, factors[q].pairs);
    }
  }

  __syncthreads();  // all codes have been used
  store_polyphase_products<Storage, kGradient>(p, plan, sums, shared.codes);
}

// Starts the kernel, unless it is not made for these arguments.
template <class Storage, bool kGradient>
bool launch_polyphase_codes(const ConvFilterBackwardParams& p, Stream stream) {
  if (!PolyphaseCodePlan::takes(p)) return false;
  PolyphaseCodePlan plan(p);
  plan.aligned = kGradient ? is_aligned<Storage>(p.grad_out, p.grad_out_strides)
                           : is_aligned<Storage>(p.x, p.x_strides);
  MemoryLayout size;
  PolyphaseCodeShared<Storage>{size};
  const std::int64_t blocks =
      plan.tiles() * p.num_heads * (kGradient ? plan.feature_tiles : plan.realization_tiles);
  launch(polyphase_code_kernel<Storage, kGradient>, grid_of(blocks), dim3(kCodeThreads),
         size.size(), stream, p, plan);
  return true;
}

}  // namespace torch_spe::cuda
