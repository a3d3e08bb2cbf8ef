// The sine filter of 16-bit values at consecutive positions where several batch rows share a
// position's codes
//   code[n, d, r] = constant[d, r] + sum over k of cos weight[d, 2k, r] + sin weight[d, 2k + 1, r],
// which are then made once: the product over the sines, rounded to 16 bits in shared memory, from
// where a product over features (or realizations) takes them at every position.
#pragma once

#include "encode/sine/steps.h"

namespace torch_spe::cuda {

constexpr int kCodeWarps = 8, kCodeThreads = 32 * kCodeWarps;
constexpr int kCodeBlocks = 2;      // of a multiprocessor
constexpr int kCodePositions = 32;  // of a block
constexpr int kCodeRealizations = 64;
constexpr int kCodeBatch = 8;
constexpr int kMostCodeEights = 3;           // more spill registers
constexpr std::int64_t kLeastCodeBatch = 4;  // fewer rows cost less without codes

// Rows of the product over the sines, in eights.
TORCH_SPE_INLINE std::int64_t sine_code_eights(const SineFilterParams& p) {
  return ceil_div(2 * p.num_sines + (p.constant != nullptr ? 1 : 0), 8);
}

// What a block works on. Numbers of tiles have 32 bits, as registers are short.
struct SineCodesPlace {
  std::uint32_t position_tile, batch_tile, realization_tile, head;

  TORCH_SPE_INLINE static std::int64_t position_tiles(const SineFilterParams& p) {
    return ceil_div(p.length, kCodePositions);
  }
  TORCH_SPE_INLINE static std::int64_t batch_tiles(const SineFilterParams& p) {
    return ceil_div(p.batch, kCodeBatch);
  }
  TORCH_SPE_INLINE static std::int64_t realization_tiles(const SineFilterParams& p) {
    return ceil_div(p.num_realizations, kCodeRealizations);
  }
  // Of blocks, where the realizations are in `realization_tiles` tiles.
  TORCH_SPE_INLINE static std::int64_t count(const SineFilterParams& p,
                                             std::int64_t realization_tiles) {
    return position_tiles(p) * batch_tiles(p) * realization_tiles * p.num_heads;
  }
  TORCH_SPE_DEVICE SineCodesPlace(const SineFilterParams& p, std::int64_t realization_tiles) {
    BlockIndices block(blockIdx.x);
    position_tile = block.next(position_tiles(p));
    batch_tile = block.next(batch_tiles(p));
    realization_tile = block.next(realization_tiles);
    head = block.rest();
  }
  TORCH_SPE_DEVICE std::int64_t n0() const { return std::int64_t{position_tile} * kCodePositions; }
  TORCH_SPE_DEVICE std::int64_t b0() const { return std::int64_t{batch_tile} * kCodeBatch; }
  TORCH_SPE_DEVICE std::int64_t r0() const {
    return std::int64_t{realization_tile} * kCodeRealizations;
  }
};

template <class Storage>
struct SineCodesShared {
  static constexpr int kRow = row_of<Storage>(kCodeRealizations);
  // Positions lie 16 bytes apart, modulo 128, so that lanes write to different banks.
  static constexpr int kPosition = kCodeWarps * kRow + 8;
  struct alignas(8) Phase {
    std::uint32_t first, step;
  };
  Phase* phases;    // [D, K], at the block's first position
  Storage* weight;  // [warp, 2K (and the constant), r]
  Storage* zero;    // a row
  Storage* codes;   // [position, warp, r]

  TORCH_SPE_INLINE SineCodesShared(MemoryLayout& layout, const SineFilterParams& p)
      : phases(layout.take<Phase>(p.in_features * p.num_sines)),
        weight(layout.take<Storage>(kCodeWarps * (2 * p.num_sines + 1) * kRow)),
        zero(layout.take<Storage>(kRow)),
        codes(layout.take<Storage>(kCodePositions * kPosition)) {}
};

// Whether these kernels serve.
template <class Storage>
TORCH_SPE_INLINE bool runs_on_codes(const SineFilterParams& p) {
  if (sizeof(Storage) != 2 || p.positions != nullptr || p.batch < kLeastCodeBatch ||
      p.num_sines == 0 || p.in_features == 0 || p.num_realizations == 0 ||
      sine_code_eights(p) > kMostCodeEights)
    return false;
  const auto is_even = [](std::int64_t stride) { return stride % 2 == 0; };
  MemoryLayout size;
  SineCodesShared<Storage>{size, p};
  return is_even(p.in_features) && p.x_strides[3] == 1 && is_even(p.x_strides[0]) &&
         is_even(p.x_strides[1]) && is_even(p.x_strides[2]) &&
         reinterpret_cast<std::uintptr_t>(p.x) % 4 == 0 &&
         rows_are_aligned<Storage>(p.weight, p.num_realizations) &&
         rows_are_aligned<Storage>(p.constant, p.num_realizations) &&
         static_cast<std::int64_t>(size.size()) <= kMostShared;
}

// Makes the codes of a head, 64 realizations of 8 features at a time: each warp those of one
// feature, at the 32 positions of the block.
template <class Storage, int kEights>
class SineCodes {
 public:
  TORCH_SPE_DEVICE SineCodes(const SineFilterParams& p, const SineCodesShared<Storage>& shared,
                             std::int64_t head, std::int64_t r0)
      : p_(p),
        phases_(shared.phases),
        own_weight_(shared.weight + warp() * (2 * p.num_sines + 1) * Shared::kRow),
        zero_(shared.zero),
        codes_(shared.codes),
        column_(static_cast<std::uint32_t>(r0) + threadIdx.x % 8 * 8),
        head_(static_cast<std::uint32_t>(head)) {
    for (int i = static_cast<int>(threadIdx.x); i < Shared::kRow; i += kCodeThreads)
      shared.zero[i].bits = 0;
  }

  // The phases of all sines at position n0, in shared memory after a barrier.
  TORCH_SPE_DEVICE void make_phases(std::int64_t n0) const {
    constexpr int kAtOnce = 4;  // loads
    const int count = features() * sines();
    const double* const freqs = p_.freqs + std::int64_t{head_} * count;
    TORCH_SPE_KEEP_LOOP
    for (int i0 = static_cast<int>(threadIdx.x); i0 < count; i0 += kAtOnce * kCodeThreads) {
      double freq[kAtOnce];
      TORCH_SPE_UNROLL
      for (int j = 0; j < kAtOnce; ++j)
        freq[j] = freqs[min_of_ints(i0 + j * kCodeThreads, count - 1)];
      TORCH_SPE_UNROLL
      for (int j = 0; j < kAtOnce; ++j) {
        core::FixedPhases fixed;
        fixed.set(freq[j], p_.start);
        if (i0 + j * kCodeThreads < count)
          phases_[i0 + j * kCodeThreads] = {fixed.at(n0), fixed.short_step()};
      }
    }
  }

  // Starts to copy the weights of the warp's one of features [d0, d0 + 8), 64 realizations from
  // r0 + further on, for make() to wait for.
  TORCH_SPE_DEVICE void bring_weights(int d0, std::uint32_t further = 0) const {
    const int d = d0 + warp();
    const std::uint32_t column = column_ + further;
    const bool exists = d < features() && column < p_.num_realizations;
    const std::int64_t feature = head_ * p_.in_features + d, realizations = p_.num_realizations;
    Storage* to = own_weight_ + lane() / 8 * Shared::kRow + lane() % 8 * 8;
    const Storage* from = static_cast<const Storage*>(p_.weight) +
                          (feature * 2 * sines() + lane() / 8) * realizations + column;
    TORCH_SPE_KEEP_LOOP
    for (int row = lane() / 8; row < 2 * sines(); row += 4) {
      copy_row(exists, from, to);
      from += 4 * realizations;
      to += 4 * Shared::kRow;
    }
    if (p_.constant != nullptr && lane() < 8)
      copy_row(exists, static_cast<const Storage*>(p_.constant) + feature * realizations + column,
               own_weight_ + 2 * sines() * Shared::kRow + lane() * 8);
  }

  // The codes of these features, in shared memory after a barrier.
  TORCH_SPE_DEVICE void make(int d0) const {
    const int group = lane() / 4, member = lane() % 4;
    const int d = min_of_ints(d0 + warp(), features() - 1);
    std::uint32_t a[2][kEights][2];  // of 16 positions, 8 rows: positions group, group + 8
    TORCH_SPE_UNROLL
    for (int i = 0; i < kEights; ++i) {
      const int sine = member + 4 * i;
      const auto phase = phases_[d * sines() + min_of_ints(sine, sines() - 1)];
      // Beyond the sines, 1 for the constant, and 0.
      const std::uint32_t other =
          sine == sines() && (p_.constant != nullptr) ? pack_pair<Storage>(1.0f, 0.0f) : 0u;
      // Rotated from position to position: the unit that makes cosine and sine is slow.
      Phasor<float> e, step;
      fast_cos_sin_of(phase.first + static_cast<std::uint32_t>(group) * phase.step, &e.re, &e.im);
      fast_cos_sin_of(8 * phase.step, &step.re, &step.im);
      TORCH_SPE_UNROLL
      for (int t = 0; t < 4; ++t) {
        a[t / 2][i][t % 2] = sine < sines() ? pack_pair<Storage>(e.re, e.im) : other;
        e.rotate(step);
      }
    }
    copy_async_wait();
    __syncwarp();  // the warp's weights are there
    Storage* const out = codes_ + group * Shared::kPosition + warp() * Shared::kRow + 2 * member;
    // The last 8 rows of an odd number, of 32 realizations at once.
    const Storage* const tail = row_at(kEights / 2 * 16 + lane() % 8) + lane() / 8 * 8;
    TORCH_SPE_KEEP_LOOP
    for (int j = 0; j < kCodeRealizations / 32; ++j) {
      std::uint32_t last[4] = {};
      if constexpr (kEights % 2 != 0) ldmatrix_x4<true>(last, tail + 32 * j);
      TORCH_SPE_UNROLL
      for (int l = 0; l < 2; ++l) {
        float sums[2][2][4] = {};
        TORCH_SPE_UNROLL
        for (int depth = 0; depth < kEights / 2; ++depth) {
          std::uint32_t b[4];
          ldmatrix_x4<true>(b,
                            row_at(depth * 16 + lane() % 16) + lane() / 16 * 8 + 32 * j + 16 * l);
          TORCH_SPE_UNROLL
          for (int i = 0; i < 4; ++i) {
            const std::uint32_t factors[4] = {a[i / 2][2 * depth][0], a[i / 2][2 * depth][1],
                                              a[i / 2][2 * depth + 1][0],
                                              a[i / 2][2 * depth + 1][1]};
            const std::uint32_t pair[2] = {b[2 * (i % 2)], b[2 * (i % 2) + 1]};
            mma_m16n8k16<Storage>(sums[i / 2][i % 2], factors, pair);
          }
        }
        if constexpr (kEights % 2 != 0) {
          // Both tiles of 16 positions are in one factor, each beside 8 summands that are 0.
          const std::uint32_t factors[4] = {a[0][kEights - 1][0], a[0][kEights - 1][1],
                                            a[1][kEights - 1][0], a[1][kEights - 1][1]};
          TORCH_SPE_UNROLL
          for (int i = 0; i < 2; ++i) {
            const std::uint32_t low[2] = {last[2 * l + i], 0}, high[2] = {0, last[2 * l + i]};
            mma_m16n8k16<Storage>(sums[0][i], factors, low);
            mma_m16n8k16<Storage>(sums[1][i], factors, high);
          }
        }
        TORCH_SPE_UNROLL
        for (int i = 0; i < 4; ++i) {
          Storage* const to = out + i / 2 * 16 * Shared::kPosition + 32 * j + 16 * l + i % 2 * 8;
          const float (&four)[4] = sums[i / 2][i % 2];
          *reinterpret_cast<std::uint32_t*>(to) = pack_pair<Storage>(four[0], four[1]);
          *reinterpret_cast<std::uint32_t*>(to + 8 * Shared::kPosition) =
              pack_pair<Storage>(four[2], four[3]);
        }
      }
    }
    __syncwarp();  // the warp has used its weights
  }

 private:
  using Shared = SineCodesShared<Storage>;
  struct alignas(16) Zeros {
    std::uint32_t words[4];
  };
  TORCH_SPE_DEVICE static int lane() { return static_cast<int>(threadIdx.x % kLanes); }
  TORCH_SPE_DEVICE static int warp() { return static_cast<int>(threadIdx.x / kLanes); }
  TORCH_SPE_DEVICE int sines() const { return static_cast<int>(p_.num_sines); }
  TORCH_SPE_DEVICE int features() const { return static_cast<int>(p_.in_features); }
  TORCH_SPE_DEVICE static int min_of_ints(int a, int b) { return a < b ? a : b; }

  TORCH_SPE_DEVICE const Storage* row_at(int row) const {
    return row < 2 * sines() + (p_.constant != nullptr ? 1 : 0) ? own_weight_ + row * Shared::kRow
                                                                : zero_;
  }
  TORCH_SPE_DEVICE static void copy_row(bool exists, const Storage* from, Storage* to) {
    if (exists) {
      copy_async16(to, from);
    } else {
      *reinterpret_cast<Zeros*>(to) = {};
    }
  }

  const SineFilterParams& p_;
  typename Shared::Phase* phases_;
  Storage* own_weight_;
  const Storage* zero_;
  Storage* codes_;
  std::uint32_t column_, head_;  // the first realization that this lane copies
};

}  // namespace torch_spe::cuda
