// Codes of dense noise for 16-bit storage, sum_p kernel[p] z[n+p, r], on tensor cores: for kernels
// in which every warp keeps 32 positions along the last dimension and goes through features and
// realizations, 16 of which it has at a time.
//
// Noise costs most. A block is as long as it can be, since for all its warps together it makes the
// noise of as many more positions as the kernel has taps; each warp then multiplies only those
// positions that its taps reach. Along a diagonal of the Toeplitz matrix of taps everything is the
// same: one load brings a block of 8 x 8 taps to the registers of a warp, where it is a factor for
// every tile that it appears in.
#pragma once

#include "encode/conv/code_tile.h"

namespace torch_spe::cuda {

constexpr int kDenseWarps = 8, kDenseThreads = 32 * kDenseWarps;  // of a block
constexpr int kWarpPositions = 32;

// Positions and realizations of a block, positions of a window of noise.
using DenseTile = ConvTileShape<true, kDenseWarps * kWarpPositions, 16, 384>;

// A lag's taps in two neighbouring blocks of 8 x 8: taps lag, lag + 1 and lag + 8, lag + 9.
struct alignas(8) TapBlocks {
  std::uint32_t pairs[2];
};

// Windows of noise and taps, two in turn.
template <class Storage>
struct DenseCodesShared {
  static constexpr int kNoise = DenseTile::kWindow * row_of<Storage>(DenseTile::kRealizations);
  static constexpr int kTaps = DenseTile::kWindow + DenseTile::kTokens;
  Storage* noise;   // [window, position, r]
  TapBlocks* taps;  // [window, lag]

  TORCH_SPE_INLINE explicit DenseCodesShared(MemoryLayout& layout)
      : noise(layout.take<Storage>(2 * kNoise)), taps(layout.take<TapBlocks>(2 * kTaps)) {}
};

// With kPositionRows, rows of the tiles of codes are positions, else realizations.
template <class Storage, bool kPositionRows>
class DenseCodes {
 public:
  using Tile = DenseTile;
  using Shared = DenseCodesShared<Storage>;

  TORCH_SPE_DEVICE DenseCodes(const ConvFilterParams& p, const Shared& shared, std::int64_t n0)
      : p_(p),
        shared_(shared),
        seed_(noise_seed_of(p)),
        size_(static_cast<int>(p.kernel_size[2])),
        length_(static_cast<int>(min_of(DenseTile::kTokens, p.size[2] - n0))) {
    const auto thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    // Of four 8 x 8 matrices of noise; two that are a factor together come one after the other.
    const int third = lane / 16 * 8, second = lane / 8 % 2 * 8;
    row_ = (thread / 32 * kWarpPositions + (kPositionRows ? second : third) + lane % 8) *
               row_of<Storage>(Tile::kRealizations) +
           (kPositionRows ? third : second);
    pair_ = lane % 4 * 2 - lane / 4;
  }

  // The warp's codes of the place's feature, constant included, for 16 realizations from r0 on, in
  // tiles as products leave them: codes[i] of 16 realizations (rows) and positions 8 i .. 8 i + 7,
  // or, with kPositionRows, codes[2 i + j] of realizations 8 j .. 8 j + 7 and, as rows, positions
  // 16 i + 8 .. 16 i + 15, then 16 i .. 16 i + 7. All threads of the block call it.
  TORCH_SPE_DEVICE void make(const LineTile& place, int r0, float (&codes)[4][4]) {
    TORCH_SPE_UNROLL
    for (int i = 0; i < 16; ++i) codes[i / 4][i % 4] = 0;
    if (p_.constant != nullptr) set_constant(place, r0, codes);
    const NoiseTile<Tile> tile(p_, place, seed_);
    const int reach = ((length_ + 31) & ~31) + size_ - 1;  // positions that taps meet
    const int taps0 = static_cast<int>(p_.kernel_size[0]);
    const int taps1 = static_cast<int>(p_.kernel_size[1]);
    TORCH_SPE_KEEP_LOOP
    for (int tap0 = 0; tap0 < taps0; ++tap0) {
      TORCH_SPE_KEEP_LOOP
      for (int tap1 = 0; tap1 < taps1; ++tap1) {
        const NoiseLine<Tile> line(tile, tap0, tap1);
        TORCH_SPE_KEEP_LOOP
        for (int first = 0; first < reach; first += Tile::kWindow) {
          Storage* const noise = shared_.noise + window_ * Shared::kNoise;
          TapBlocks* const taps = shared_.taps + window_ * Shared::kTaps;
          const int left = (reach - first + 15) & ~15;
          const int rows = left < Tile::kWindow ? left : Tile::kWindow;
          line.template fill<Storage>(
              first, r0, rows, rows, static_cast<int>(threadIdx.x), kDenseThreads,
              [=](int q, int r) { return noise + q * row_of<Storage>(Tile::kRealizations) + r; });
          fill_taps(place, tap0, tap1, first, taps);
          // One barrier is enough: a window is filled again only after the next one, which no warp
          // passes before all have used this window.
          __syncthreads();
          if (position() < length_) multiply(noise, taps, first, codes);
          window_ = 1 - window_;
        }
      }
    }
  }

 private:
  TORCH_SPE_DEVICE static int position() {
    return static_cast<int>(threadIdx.x / 32u) * kWarpPositions;
  }

  TORCH_SPE_DEVICE void set_constant(const LineTile& place, int r0, float (&codes)[4][4]) const {
    const float* const constant = static_cast<const float*>(p_.constant) +
                                  (place.head * p_.in_features + place.d) * p_.num_realizations +
                                  r0;
    const int lane = static_cast<int>(threadIdx.x % 32u);
    float values[2][2];  // of realization rows, or of tiles and their columns
    TORCH_SPE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int r = kPositionRows ? i / 2 * 8 + lane % 4 * 2 + i % 2 : lane / 4 + i / 2 * 8;
      values[i / 2][i % 2] = r0 + r < p_.num_realizations ? constant[r] : 0.0f;
    }
    TORCH_SPE_UNROLL
    for (int i = 0; i < 16; ++i)
      codes[i / 4][i % 4] = kPositionRows ? values[i / 4 % 2][i % 2] : values[i / 2 % 2][0];
  }

  // The lag, position less position of the code, of the first pair of taps of a window.
  TORCH_SPE_DEVICE static int first_lag(int first) {
    const int lag = first - Tile::kTokens;
    return lag > -32 ? lag : -32;
  }

  TORCH_SPE_DEVICE void fill_taps(const LineTile& place, int tap0, int tap1, int first,
                                  TapBlocks* out) const {
    const int begin = first_lag(first), last = ((size_ + 15) & ~15) + 48;
    const int end = first + Tile::kWindow < last ? first + Tile::kWindow : last;
    int lag = begin + static_cast<int>(threadIdx.x);
    if (lag >= end) return;
    const float* const taps = taps_of<float>(p_, place, tap0, tap1);
    const auto tap = [&](int i) { return i >= 0 && i < size_ ? taps[i] : 0.0f; };
    TORCH_SPE_KEEP_LOOP
    for (; lag < end; lag += kDenseThreads) {
      const std::uint32_t pair = pack_pair<Storage>(tap(lag), tap(lag + 1));
      out[lag - begin].pairs[0] = pair;
      if (lag - begin >= 8) out[lag - begin - 8].pairs[1] = pair;
    }
  }

  TORCH_SPE_DEVICE void multiply(const Storage* noise, const TapBlocks* taps, int first,
                                 float (&codes)[4][4]) const {
    constexpr int kRow = row_of<Storage>(Tile::kRealizations);
    // Positions from the warp's own first one on, 16 at a step.
    const int from = first - position();
    const int begin = from > 0 ? from : 0, last = (size_ + 46) & ~15;
    const int end = from + Tile::kWindow < last ? from + Tile::kWindow : last;
    if (begin >= end) return;
    const Storage* rows = noise + row_ + (begin - first) * kRow;
    const TapBlocks* blocks = taps + pair_ + begin - first_lag(first);
    // Of the step before; along a diagonal blocks are the same.
    TapBlocks before[2] = {blocks[-24], blocks[-16]};
    TORCH_SPE_UNROLL_TWICE
    for (int step = begin; step < end; step += 16) {
      const TapBlocks now[2] = {blocks[-8], blocks[0]};
      // Positions 0-7 and 8-15 for realizations 0-7, then for 8-15; unless kPositionRows,
      // realizations 0-7 and 8-15 for positions 0-7, then for 8-15.
      std::uint32_t z[4];
      ldmatrix_x4<true>(z, rows);
      TORCH_SPE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const TapBlocks* const tile = i < 2 ? now : before;
        if constexpr (kPositionRows) {
          const std::uint32_t a[4] = {tile[0].pairs[0], tile[0].pairs[1], tile[1].pairs[0],
                                      tile[1].pairs[1]};
          const std::uint32_t b[2] = {z[i % 2 * 2], z[i % 2 * 2 + 1]};
          mma_m16n8k16<Storage>(codes[i], a, b);
        } else {
          mma_m16n8k16<Storage>(codes[i], z, tile[1 - i % 2].pairs);
        }
      }
      before[0] = now[0];
      before[1] = now[1];
      blocks += 16;
      rows += 16 * kRow;
    }
  }

  const ConvFilterParams& p_;
  const Shared& shared_;
  const std::uint64_t seed_;
  const int size_, length_;  // taps, and positions of the tile
  int row_, pair_;           // where the lane's noise and taps are
  int window_ = 0;
};

}  // namespace torch_spe::cuda
