// What the kernels of the sine features for 16-bit values at consecutive positions share. A lane
// has two neighbouring features, so that a warp reads and writes 128 bytes at once.
#pragma once

#include "encode/sine/steps.h"
#include "encode/sine_features/rotated_sine.h"

namespace torch_spe::cuda {

// All sines of the two features of each lane: phases with their offsets at the first position of
// a warp's run, how they advance by a position, and amplitudes.
struct SinePairTable {
  struct alignas(16) Phases {
    std::uint32_t first[2], step[2];  // in units of 2^-32 cycles
  };
  struct alignas(8) Two {
    float of[2];
  };
  Phases* phases;   // [warp, K, lane]
  Two* amplitudes;  // [warp, K, lane]

  TORCH_SPE_INLINE SinePairTable(MemoryLayout& layout, const SineFeaturesParams& p)
      : phases(layout.take<Phases>(kWarps * p.num_sines * kLanes)),
        amplitudes(layout.take<Two>(kWarps * p.num_sines * kLanes)) {}

  // From here on, those of this lane alone; those of sine k at k * kLanes.
  TORCH_SPE_DEVICE void keep_own(const SineFeaturesParams& p) {
    const std::int64_t own = threadIdx.x / kLanes * p.num_sines * kLanes + threadIdx.x % kLanes;
    phases += own;
    amplitudes += own;
  }
  // Features d and d + 1 from position n on. Only whoever fills a place reads it.
  TORCH_SPE_DEVICE void fill(const SineFeaturesParams& p, std::int64_t head, std::int64_t d,
                             std::int64_t n) const {
    TORCH_SPE_KEEP_LOOP
    for (int k = 0; k < p.num_sines; ++k) {
      Phases own;
      Two amplitude;
      TORCH_SPE_UNROLL
      for (int f = 0; f < 2; ++f) {
        const std::int64_t index = (head * p.in_features + d + f) * p.num_sines + k;
        const double freq = p.freqs[index], offset = p.offsets[index] * (1 / core::kTwoPi);
        own.first[f] = core::fixed_phase(
            core::wrap_cycles(core::reduce_cycles(freq, p.start + static_cast<double>(n)) +
                              core::reduce_cycles(offset, 1.0)));
        own.step[f] = core::fixed_phase(core::reduce_cycles(freq, 1.0));
        amplitude.of[f] = static_cast<const float*>(p.amplitudes)[index];
      }
      phases[k * kLanes] = own;
      amplitudes[k * kLanes] = amplitude;
    }
  }
};

// Offsets of a tile's tokens, in values from its first one. What lies beyond the last position or
// batch row is read from the last one.
template <int kPositions, int kBatch>
class PairTile {
 public:
  TORCH_SPE_DEVICE PairTile(int positions_left, int batch_left)
      : positions_(positions_left < kPositions ? positions_left : kPositions),
        batch_(batch_left < kBatch ? batch_left : kBatch) {}

  TORCH_SPE_DEVICE bool inside(int t, int b) const { return t < positions_ && b < batch_; }
  TORCH_SPE_DEVICE std::uint32_t offset(const std::int64_t (&strides)[4], int t, int b) const {
    const auto at = [](int i, int count) {
      return static_cast<std::uint32_t>(i < count ? i : count - 1);
    };
    return at(t, positions_) * static_cast<std::uint32_t>(strides[1]) +
           at(b, batch_) * static_cast<std::uint32_t>(strides[0]);
  }

 private:
  int positions_, batch_;  // that there are
};

// Whether lanes can read pairs of a tensor [B, N, H, columns], with offsets within a tile of 32
// bits.
template <class Storage>
TORCH_SPE_INLINE bool has_feature_pairs(const void* data, const std::int64_t (&strides)[4],
                                        std::int64_t columns) {
  constexpr std::int64_t kMost = std::int64_t{1} << 26;
  const auto fits = [](std::int64_t stride) {
    return stride % 2 == 0 && stride >= 0 && stride <= kMost;
  };
  return columns % 2 == 0 && columns <= kMost && strides[3] == 1 && fits(strides[0]) &&
         fits(strides[1]) && strides[2] % 2 == 0 &&
         reinterpret_cast<std::uintptr_t>(data) % (2 * sizeof(Storage)) == 0;
}

// Whether the kernels for pairs serve, apart from what they need of shared memory.
template <class Storage>
TORCH_SPE_INLINE bool runs_on_pairs(const SineFeaturesParams& p) {
  return sizeof(Storage) == 2 && p.positions == nullptr && p.batch < (std::int64_t{1} << 30) &&
         has_feature_pairs<Storage>(p.x, p.x_strides, p.in_features);
}

template <class Storage>
TORCH_SPE_DEVICE std::uint32_t load_pair(const Storage* from) {
  return *reinterpret_cast<const std::uint32_t*>(from);
}

}  // namespace torch_spe::cuda
