// Kernel of the convolution filter's gradient of its kernel with dense noise for 16-bit storage.
//
// A block goes along lines of positions, 16 at a time, for 16 features and 16 realizations. Each
// warp keeps the noise of one feature that 128 taps meet in a ring, to which it adds that of 16
// positions at every step: so noise is made once. For the next 16 positions each warp makes the
// gradients of the codes of one position and all 16 features, a product over the batch; they are
// exchanged, and the warp of a feature multiplies them with its noise. Elements of that product a
// step later are elements of the same lags: sums stay in registers, where a diagonal is a tap.
#pragma once

#include "encode/conv/dense_forward.h"

namespace torch_spe::cuda {

constexpr int kTapStep = 16;   // positions, and warps: each makes gradients for one of them
constexpr int kTapLags = 128;  // of a block
constexpr int kTapSlots = 9;   // of a ring, of 16 positions each
// Blocks of 8 lags. Of the first one only positions 0 .. 7 of a step matter, of the last one only
// the others: they share one tile of sums.
constexpr int kTapBlocks = 2 * kTapSlots - 1;
constexpr int kTapTile = 16;  // features and realizations of a block

// Noise of 16 realizations; its number of positions has no limit.
using DenseTapTile = ConvTileShape<true, 1 << 30, kTapTile, kTapStep>;

TORCH_SPE_DEVICE int own_lane() { return thread_read_again() & 31; }
TORCH_SPE_DEVICE int own_warp() { return thread_read_again() >> 5; }

// Where 8 values are in rows of 16: so that 8 rows lie in different banks.
TORCH_SPE_DEVICE int swizzled(int row, int half) { return row * 16 + (half ^ (row >> 2 & 1)) * 8; }

// Where a slot of the ring begins, which may be one of the next round.
TORCH_SPE_DEVICE int in_ring(int slot) {
  constexpr unsigned kSlot = kTapStep * kTapTile;
  const unsigned first = static_cast<unsigned>(slot) * kSlot, second = first - kTapSlots * kSlot;
  return static_cast<int>(first < second ? first : second);
}

template <class Storage>
struct DenseTapGradientShared {
  static constexpr int kRing = kTapSlots * kTapStep * kTapTile;
  static constexpr int kCodes = kTapStep * kTapTile + 8;    // of a feature
  static constexpr int kRows = 2 * kDenseBatch * kTapTile;  // of x and of grad_out at a position
  Storage* noise;                                           // [feature, slot, position, r]
  Storage* gradients;                                       // [2, feature, position, r] of codes
  Storage* rows;  // [position, x or grad_out, batch row, feature or r]

  TORCH_SPE_INLINE explicit DenseTapGradientShared(MemoryLayout& layout)
      : noise(layout.take<Storage>(kTapTile * kRing)),
        gradients(layout.take<Storage>(2 * kTapTile * kCodes)),
        rows(layout.take<Storage>(kTapStep * kRows)) {}
};

// Parts into which the kernel's gradient is summed: tiles of realizations, and segments of the
// positions.
struct DenseTapGradientBlocks {
  std::int64_t feature_tiles, realization_tiles, lag_tiles, blocks, per_line, steps, segments;

  TORCH_SPE_INLINE explicit DenseTapGradientBlocks(const ConvFilterParams& p)
      : feature_tiles(ceil_div(p.in_features, kTapTile)),
        realization_tiles(ceil_div(p.num_realizations, kTapTile)),
        lag_tiles(ceil_div(p.kernel_size[2], kTapLags)),
        blocks(p.num_heads * feature_tiles * realization_tiles * p.kernel_size[0] *
               p.kernel_size[1] * lag_tiles),
        per_line(ceil_div(p.size[2], kTapStep)),
        steps(p.size[0] * p.size[1] * per_line) {
    // A multiprocessor has one block at a time.
    const std::int64_t wanted = max_of(1, min_of(steps, kWalkingBlocks / 2 / max_of(1, blocks)));
    segments = max_of(1, ceil_div(steps, max_of(1, ceil_div(steps, wanted))));  // none is empty
  }
  TORCH_SPE_INLINE std::int64_t parts() const { return segments * realization_tiles; }
};

template <class Storage>
__global__ void __launch_bounds__(32 * kTapStep, 1)
    dense_conv_tap_gradient_kernel(const ConvFilterBackwardParams p,
                                   const DenseTapGradientBlocks blocks,
                                   double* parts) {  // [segment, realization tile, H, D, *P]
  using Shared = DenseTapGradientShared<Storage>;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const Shared shared(layout);
  // Registers are short: what is not a sum has 32 bits where that is enough, or is computed again.
  BlockIndices block(blockIdx.x);
  const int r0 = static_cast<int>(block.next(blocks.realization_tiles)) * kTapTile;
  const int d0 = static_cast<int>(block.next(blocks.feature_tiles)) * kTapTile;
  const int head = static_cast<int>(block.next(p.num_heads));
  const int segment = static_cast<int>(block.next(blocks.segments));
  const int lag0 = static_cast<int>(block.next(blocks.lag_tiles)) * kTapLags;
  const int tap1 = static_cast<int>(block.next(p.kernel_size[1]));
  const int tap0 = static_cast<int>(block.rest());
  const std::int64_t per_segment = ceil_div(blocks.steps, blocks.segments);
  const std::int64_t first_step = segment * per_segment;
  const int steps = static_cast<int>(min_of(blocks.steps - first_step, per_segment));
  const int lags = static_cast<int>(min_of(kTapLags, p.kernel_size[2] - lag0));
  const auto own_ring = [&] { return shared.noise + own_warp() * Shared::kRing; };

  // Lanes 0 .. 15 copy x, the others grad_out: of a batch row, one of two times 8 values.
  const auto own_rows = [&] { return shared.rows + own_warp() * Shared::kRows; };
  const auto own_row = [&] {
    const int lane = own_lane();
    return own_rows() + (lane >> 4) * (Shared::kRows / 2) + swizzled(lane >> 1 & 7, lane & 1);
  };
  const auto choose = [&](std::int64_t of_x, std::int64_t of_grad) {
    return own_lane() < 16 ? of_x : of_grad;
  };
  const bool aligned = choose(is_aligned<Storage>(p.x, p.x_strides),
                              is_aligned<Storage>(p.grad_out, p.grad_out_strides)) != 0;
  // Where the lane's values at a position are, in the first batch rows.
  const auto find = [&](const LineTile& place, int n) {
    const int lane = own_lane();
    const auto* const data = static_cast<const Storage*>(lane < 16 ? p.x : p.grad_out);
    return data + choose(place.offset(p.x_strides), place.offset(p.grad_out_strides)) +
           choose(p.x_strides[3], p.grad_out_strides[3]) * n +
           choose(p.x_strides[0], p.grad_out_strides[0]) * (lane >> 1 & 7) +
           choose(p.x_strides[5], p.grad_out_strides[5]) * (choose(d0, r0) + (lane & 1) * 8);
  };
  const int columns =
      static_cast<int>(choose(p.in_features - d0, p.num_realizations - r0) - (own_lane() & 1) * 8);
  const int length = static_cast<int>(p.size[2]), batch = static_cast<int>(p.batch);
  const auto copy_rows = [&](const Storage* data, int n, int b0) {
    const bool inside = n < length && b0 + (own_lane() >> 1 & 7) < batch;
    Storage* const to = own_row();
    if (inside && aligned && columns >= 8) {
      copy_async16(to, data);
    } else {
      write_eight(data, inside ? columns : 0, choose(p.x_strides[5], p.grad_out_strides[5]), to);
    }
  };

  float sums[kTapBlocks][4];  // of lags 8 l + column - row
  TORCH_SPE_UNROLL
  for (int i = 0; i < 4 * kTapBlocks; ++i) sums[i / 4][i % 4] = 0;
  const std::int64_t first_line = first_step / blocks.per_line;
  int i0 = static_cast<int>(first_line / p.size[1]), i1 = static_cast<int>(first_line % p.size[1]);
  int n0 = static_cast<int>(first_step % blocks.per_line) * kTapStep;
  int slot = 0;  // the first one
  const Storage* from = nullptr;
  const std::int64_t advance = choose(p.x_strides[3], p.grad_out_strides[3]) * kTapStep;
  const std::uint64_t seed = noise_seed_of(p);
  for (int step = 0; step < steps; ++step) {
    const int warp = own_warp();
    const LineTile place{head, d0 + warp, i0, i1, 0};
    const bool begins = step == 0 || n0 == 0;
    slot = begins || slot + 1 == kTapSlots ? 0 : slot + 1;

    from = begins ? find(place, n0 + warp) : from + advance;
    copy_rows(from, n0 + warp, 0);
    // Meanwhile: noise of the positions that come into the ring.
    if (place.d < p.in_features) {
      const NoiseTile<DenseTapTile> tile(p, place, seed);
      const NoiseLine<DenseTapTile> line(tile, tap0, tap1);
      Storage* const ring = own_ring();
      TORCH_SPE_KEEP_LOOP
      for (int i = begins ? 0 : kTapSlots - 1; i < kTapSlots; ++i) {
        Storage* const out = ring + in_ring(slot + i);
        line.template fill<Storage>(
            n0 + lag0 + 16 * i, r0, kTapStep, kTapStep, own_lane(), 32,
            [=](int q, int r) { return out + swizzled(q, r >> 3) + (r & 7); });
      }
    }
    // Gradients of codes.
    float products[2][4] = {};
    for (int b0 = 0;;) {
      copy_async_wait();
      const int lane = own_lane();
      if (p.feature_map != FeatureMap::kIdentity && lane < 16 && b0 + (lane >> 1) < batch)
        map_eight_features(p.feature_map, own_row());
      __syncwarp();
      std::uint32_t factors[4];  // features 0-7, 8-15 of x; realizations 0-7, 8-15 of grad_out
      ldmatrix_x4<true>(factors, own_rows() + (lane >> 4) * (Shared::kRows / 2) +
                                     swizzled(lane & 7, lane >> 3 & 1));
      const std::uint32_t a[4] = {factors[0], factors[1], 0, 0};
      TORCH_SPE_UNROLL
      for (int j = 0; j < 2; ++j) {
        const std::uint32_t b[2] = {factors[2 + j], 0};
        mma_m16n8k16<Storage>(products[j], a, b);
      }
      b0 += kDenseBatch;
      if (b0 >= batch) break;
      __syncwarp();  // the rows have been used
      copy_rows(from + choose(p.x_strides[0], p.grad_out_strides[0]) * b0, n0 + warp, b0);
    }
    const int lane = own_lane();
    Storage* const gradients = shared.gradients + step % 2 * (kTapTile * Shared::kCodes);
    TORCH_SPE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int j = i / 2, feature = (lane >> 2) + 8 * (i % 2);
      *reinterpret_cast<std::uint32_t*>(gradients + feature * Shared::kCodes + swizzled(warp, j) +
                                        (lane & 3) * 2) =
          pack_pair<Storage>(products[j][i % 2 * 2], products[j][i % 2 * 2 + 1]);
    }
    // One barrier is enough: gradients go to the same place again after the next one only.
    __syncthreads();

    std::uint32_t a[4];
    const Storage* const ring = own_ring();
    ldmatrix_x4<false>(a, gradients + warp * Shared::kCodes + swizzled(lane & 15, lane >> 4));
    TORCH_SPE_UNROLL
    for (int i = 0; i < kTapSlots; ++i) {
      std::uint32_t z[4];  // positions 0-7 and realizations 0-7, 8-15, then positions 8-15
      ldmatrix_x4<false>(
          z, ring + in_ring(slot + i) + swizzled((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1));
      const std::uint32_t b[2][2] = {{z[0], z[1]}, {z[2], z[3]}};
      TORCH_SPE_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int l = 2 * i + j;
        const std::uint32_t rows[4] = {l == kTapBlocks ? 0 : a[0], l == 0 ? 0 : a[1],
                                       l == kTapBlocks ? 0 : a[2], l == 0 ? 0 : a[3]};
        mma_m16n8k16<Storage>(sums[l % kTapBlocks], rows, b[j]);
      }
    }
    __syncwarp();  // the ring's first slot has been used
    n0 += kTapStep;
    if (n0 < length) continue;
    n0 = 0;
    if (++i1 < p.size[1]) continue;
    i1 = 0;
    ++i0;
  }

  // Diagonals, of 8 rows at a time, in place of the noise.
  constexpr int kColumns = 8 * (kTapBlocks + 1);
  static_assert(8 * kColumns * sizeof(float) <= Shared::kRing * sizeof(Storage));
  const int lane = own_lane(), warp = own_warp();
  float* const elements = reinterpret_cast<float*>(own_ring());
  float taps[kTapLags / 32] = {};
  TORCH_SPE_UNROLL
  for (int i = 0; i < 2; ++i) {
    TORCH_SPE_UNROLL
    for (int l = 0; l < kTapBlocks; ++l) {
      TORCH_SPE_UNROLL
      for (int e = 0; e < 2; ++e)
        elements[(lane >> 2) * kColumns + 8 * (i == 1 && l == 0 ? kTapBlocks : l) + (lane & 3) * 2 +
                 e] = sums[l][2 * i + e];
    }
    __syncwarp();
    TORCH_SPE_UNROLL
    for (int k = 0; k < kTapLags / 32; ++k) {
      for (int a = 0; a < 8; ++a) taps[k] += elements[a * kColumns + lane + 32 * k + 8 * i + a];
    }
    __syncwarp();
  }
  if (d0 + warp >= p.in_features) return;
  const std::int64_t part = segment * blocks.realization_tiles + r0 / kTapTile;
  double* const out =
      parts +
      ((((part * p.num_heads + head) * p.in_features + d0 + warp) * p.kernel_size[0] + tap0) *
           p.kernel_size[1] +
       tap1) *
          p.kernel_size[2] +
      lag0;
  TORCH_SPE_UNROLL
  for (int k = 0; k < kTapLags / 32; ++k) {
    if (lane + 32 * k < lags) out[lane + 32 * k] = static_cast<double>(taps[k]);
  }
}

template <class Storage>
void launch_dense_tap_gradient(const ConvFilterBackwardParams& p,
                               const DenseTapGradientBlocks& blocks, double* parts, Stream stream) {
  MemoryLayout size;
  DenseTapGradientShared<Storage>{size};
  launch(dense_conv_tap_gradient_kernel<Storage>, grid_of(blocks.blocks * blocks.segments),
         dim3(32 * kTapStep), size.size(), stream, p, blocks, parts);
}

}  // namespace torch_spe::cuda
