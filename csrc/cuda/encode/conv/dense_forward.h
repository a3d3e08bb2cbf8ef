// Kernel of the convolution filter with dense noise for 16-bit storage, see dense_codes.h.
#pragma once

#include "encode/conv/dense_codes.h"

namespace torch_spe::cuda {

constexpr int kDenseBatch = 8;  // batch rows of a block

// Writes 8 values of a row to shared memory, zero from `count` on.
template <class Storage>
TORCH_SPE_DEVICE void write_eight(const Storage* from, int count, std::int64_t stride,
                                  Storage* to) {
  TORCH_SPE_KEEP_LOOP
  for (int e = 0; e < 8; ++e) {
    to[e].bits = e < count ? from->bits : std::uint16_t(0);
    from += stride;
  }
}

// Stores 8 values from shared memory, at once if there are 8 and `vectors` may be stored.
template <class Storage>
TORCH_SPE_DEVICE void store_eight(const Storage* values, std::int64_t count, bool vectors,
                                  Storage* out) {
  if (vectors && count >= 8) {
    *reinterpret_cast<Vector<Storage>*>(out) = *reinterpret_cast<const Vector<Storage>*>(values);
    return;
  }
  TORCH_SPE_KEEP_LOOP
  for (int e = 0; e < 8; ++e) {
    if (e < count) out[e] = values[e];
  }
}

struct alignas(8) FourFeatures {
  std::uint32_t pairs[2];
};

// The values `which` of two registers.
TORCH_SPE_DEVICE std::uint32_t join_pairs(std::uint32_t a, std::uint32_t b, int which) {
  return which == 0 ? (a & 0xffffu) | b << 16 : a >> 16 | (b & 0xffff0000u);
}

template <class Storage>
struct DenseForwardShared : DenseCodesShared<Storage> {
  Vector<Storage>* x;  // [warp, position of a lane, lane], 8 features of each

  TORCH_SPE_INLINE explicit DenseForwardShared(MemoryLayout& layout)
      : DenseCodesShared<Storage>(layout),
        x(layout.take<Vector<Storage>>(kDenseThreads * kWarpPositions / 4)) {}
};

// A block makes the results of some positions and batch rows for 16 realizations, and goes through
// the features. At every position they are a product over four features at a time, to which each
// lane brings the codes of its own position: of the other operand all that belongs to the positions
// of other lanes is zero. So codes stay in the registers they were made in.
template <class Storage>
__global__ void __launch_bounds__(kDenseThreads, 1)
    dense_conv_forward_kernel(const ConvFilterParams p) {
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const DenseForwardShared<Storage> shared(layout);
  const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, member = lane % 4;
  const int position = static_cast<int>(threadIdx.x) / 32 * kWarpPositions;
  const LineTiles<DenseTile::kTokens> tiles(p);
  BlockIndices block(blockIdx.x);
  const int r0 =
      static_cast<int>(block.next(ceil_div(p.num_realizations, DenseTile::kRealizations))) *
      DenseTile::kRealizations;
  const int b0 = static_cast<int>(block.next(ceil_div(p.batch, kDenseBatch))) * kDenseBatch;
  const std::int64_t tile = block.next(tiles.count);
  LineTile place = tiles.place(tile, block.rest(), 0);
  const int length = static_cast<int>(min_of(DenseTile::kTokens, p.size[2] - place.n0));
  // A lane has x of batch row `group` at positions 8 j + 2 member + e.
  Vector<Storage>* const own_x =
      shared.x + position / kWarpPositions * (32 * kWarpPositions / 4) + lane;
  DenseCodes<Storage, false> codes(p, shared, place.n0);

  float sums[4][2][4][4];       // at position 8 j + 2 s + e: of realizations and batch rows
  std::uint32_t kept[4][4][2];  // codes of four features, of two positions each
  TORCH_SPE_UNROLL
  for (int i = 0; i < 128; ++i) sums[i / 32][i / 16 % 2][i / 4 % 4][i % 4] = 0;
  TORCH_SPE_KEEP_LOOP
  for (int d = 0; d < p.in_features; ++d) {
    place.d = d;
    if (d % 8 == 0) {
      const std::int64_t stride = p.x_strides[3];
      const int first = position + 2 * member;
      const Storage* from = static_cast<const Storage*>(p.x) + place.offset(p.x_strides) +
                            (b0 + group) * p.x_strides[0] + first * stride + d * p.x_strides[5];
      const bool aligned = is_aligned<Storage>(p.x, p.x_strides);
      const int count = b0 + group < p.batch ? static_cast<int>(p.in_features) - d : 0;
      TORCH_SPE_KEEP_LOOP
      for (int i = 0; i < kWarpPositions / 4; ++i) {
        const int t = i / 2 * 8 + i % 2;
        Storage* const to = own_x[32 * i].values;
        if (aligned && count >= 8 && first + t < length) {
          copy_async16(to, from);
        } else {
          write_eight(from, first + t < length ? count : 0, p.x_strides[5], to);
        }
        from += i % 2 == 0 ? stride : 7 * stride;
      }
    }
    float made[4][4];
    codes.make(place, r0, made);
    if (d % 8 == 0) {
      copy_async_wait();
      if (p.feature_map != FeatureMap::kIdentity) {
        TORCH_SPE_KEEP_LOOP
        for (int i = 0; i < kWarpPositions / 4; ++i)
          map_eight_features(p.feature_map, own_x[32 * i].values);
      }
    }
    const bool last = d + 1 == p.in_features;
    TORCH_SPE_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (k < d % 4 || (k > d % 4 && !last)) continue;
      TORCH_SPE_UNROLL
      for (int i = 0; i < 8; ++i) {
        const float* const two = made[i / 2] + i % 2 * 2;
        kept[k][i / 2][i % 2] = k == d % 4 ? pack_pair<Storage>(two[0], two[1]) : 0u;
      }
    }
    if (d % 4 < 3 && !last) continue;
    TORCH_SPE_UNROLL
    for (int i = 0; i < 8; ++i) {
      const int j = i / 2, e = i % 2;
      const std::uint32_t a[4] = {
          join_pairs(kept[0][j][0], kept[1][j][0], e), join_pairs(kept[0][j][1], kept[1][j][1], e),
          join_pairs(kept[2][j][0], kept[3][j][0], e), join_pairs(kept[2][j][1], kept[3][j][1], e)};
      const auto features = reinterpret_cast<const FourFeatures*>(own_x + 32 * i)[d % 8 / 4];
      TORCH_SPE_UNROLL
      for (int s = 0; s < 4; ++s) {
        const std::uint32_t b[2] = {member == s ? features.pairs[0] : 0u,
                                    member == s ? features.pairs[1] : 0u};
        mma_m16n8k16<Storage>(sums[j][e][s], a, b);
      }
    }
  }

  // Half of the positions at a time go through the memory of x, [position, batch row, r].
  Storage* const results = reinterpret_cast<Storage*>(own_x - lane);
  const bool vectors = p.num_realizations % 8 == 0 &&
                       reinterpret_cast<std::uintptr_t>(p.out) % sizeof(Vector<Storage>) == 0;
  TORCH_SPE_UNROLL
  for (int k = 0; k < 2; ++k) {
    __syncwarp();
    TORCH_SPE_UNROLL
    for (int t = 0; t < 16; ++t) {
      TORCH_SPE_UNROLL
      for (int i = 0; i < 4; ++i)
        write(sums[2 * k + t / 8][t % 2][t / 2 % 4][i],
              results + (t * kDenseBatch + 2 * member + i % 2) * 16 + group + i / 2 * 8);
    }
    __syncwarp();
    TORCH_SPE_KEEP_LOOP
    for (int i = lane; i < 16 * kDenseBatch * 2; i += 32) {
      const int t = position + 16 * k + i / (2 * kDenseBatch);
      const std::int64_t b = b0 + i / 2 % kDenseBatch;
      const int r = r0 + i % 2 * 8;
      if (t >= length || b >= p.batch) continue;
      const std::int64_t n =
          ((b * p.size[0] + place.i0) * p.size[1] + place.i1) * p.size[2] + place.n0 + t;
      store_eight(
          results + i * 8, p.num_realizations - r, vectors,
          static_cast<Storage*>(p.out) + (n * p.num_heads + place.head) * p.num_realizations + r);
    }
  }
}

template <class Storage>
void launch_dense_forward(const ConvFilterParams& p, Stream stream) {
  MemoryLayout size;
  DenseForwardShared<Storage>{size};
  const std::int64_t blocks = LineTiles<DenseTile::kTokens>(p).count *
                              ceil_div(p.batch, kDenseBatch) *
                              ceil_div(p.num_realizations, DenseTile::kRealizations) * p.num_heads;
  launch(dense_conv_forward_kernel<Storage>, grid_of(blocks), dim3(kDenseThreads), size.size(),
         stream, p);
}

}  // namespace torch_spe::cuda
