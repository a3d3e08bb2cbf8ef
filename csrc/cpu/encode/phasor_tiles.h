// How the phasor filter cuts up its work: groups of heads, and batch rows that share phasors.
// Included by kernels only, like simd.h.
#pragma once

#include "core/phasor_filter.h"
#include "cpu/encode/phasors.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

// Rows of the batch that share phasors: few enough that a tile stays in the level 1 cache, more
// where the exact phases of given positions cost more than that.
TORCH_SPE_INLINE std::int64_t num_shared_rows(const core::PhasorFilterParams& p) {
  return min_of(p.batch, p.positions == nullptr ? 4 : 16);
}

// Heads that a thread goes through side by side, as their data lie in memory: no more than leaves
// work for all threads, and than have their parameters and phasors in the level 2 cache.
TORCH_SPE_INLINE std::int64_t group_heads(const core::PhasorFilterParams& p) {
  constexpr std::int64_t kCacheBytes = 1 << 19;
  const std::int64_t bytes =
      p.in_features * p.num_pairs * (12 * static_cast<std::int64_t>(sizeof(float)) + 8 * p.ndim);
  return max_of(1, min_of(p.num_heads / p.num_threads, kCacheBytes / max_of(bytes, 1)));
}

struct HeadGroup {
  std::int64_t first, count;
};

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
