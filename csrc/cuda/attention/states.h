// The states of linear attention on the device, and scans of the sums over segments. How two states
// join is core/state.h's to decide.
#pragma once

#include "decay.h"

namespace torch_spe::cuda::attention {

// Sizes, and the states of a set of tokens as scratch memory holds them. Without values (E = 0)
// there is z alone; where z is null, S alone.
template <class T>
struct States {
  std::int64_t heads = 0, features = 0, values = 0;  // H, R, E
  // Before (after) each chunk since its segment's start (end).
  T* chunk_s = nullptr;  // [slot, H, R, E]
  T* chunk_z = nullptr;  // [slot, H, R], or null
  // Sums of each segment, then the state at its start (end), initial state included.
  T* segment_s = nullptr;  // [slot, H, R, E]
  T* segment_z = nullptr;  // [slot, H, R], or null
  // Of the whole sequence, initial state included; null where nobody wants it.
  T* total_s = nullptr;  // [S, H, R, E]
  T* total_z = nullptr;  // [S, H, R], or null
  // Where blocks keep the state with which they walk through a segment, if it has many tiles.
  T* walk_s = nullptr;  // [slot, H, R, E]
  T* walk_z = nullptr;  // [slot, H, tiles, R]

  TORCH_SPE_INLINE bool has_totals() const { return total_s != nullptr || total_z != nullptr; }
};

// Fills a tile of a state with operands; elements(row, column, out) gives four of a row.
template <int kRows, int kColumns, class Operand, class Elements>
TORCH_SPE_DEVICE void load_state(Operand* out, const Elements& elements) {
  using T = core::accumulate_t<Operand>;
  constexpr int kRow = row_of<Operand>(kColumns), kFours = kColumns / 4;
  const auto load = [&](int i) {
    T four[4];
    elements(i / kFours, i % kFours * 4, four);
    write_operands(four, out + i / kFours * kRow + i % kFours * 4);
  };
  if constexpr (sizeof(T) == 8) {  // which would take too many registers at once
    TORCH_SPE_KEEP_LOOP
    for (int i = thread_read_again(); i < kRows * kFours; i += kThreads) load(i);
  } else {
    for (int i = thread_read_again(); i < kRows * kFours; i += kThreads) load(i);
  }
}

// Replaces the sums of segments by the state at each one's start (end, backwards), for each element
// of the states separately, and writes the total where it is wanted.
template <class T, class Decay>
struct Scan {
  // Where features fade on their own.
  static constexpr bool kPerFeature = requires(Decay d) { d.features; };
  struct Row {
    std::int64_t row = 1;  // elements of a feature
  };
  struct Nothing {};
  struct Elements : std::conditional_t<kPerFeature, Row, Nothing> {
    std::int64_t size = 0, head_size = 1;  // elements of a state of all heads, and of one
    const T* initial = nullptr;            // [S, size], or null
    T* sums = nullptr;                     // [slot, size]
    T* total = nullptr;                    // [S, size], or null
  };
  static constexpr int kAtOnce = sizeof(T) == 8 || Decay::kFades ? 4 : 8;
  Decay decay;
  Cut segments;
  bool backwards;
  Elements s, z;

  TORCH_SPE_DEVICE void operator()(std::int64_t i) const {
    const std::int64_t size_s = segments.sequences * s.size;
    if (i < size_s) {
      scan(s, i);
    } else {
      scan(z, i - size_s);
    }
  }
  TORCH_SPE_DEVICE static std::int64_t feature_of(const Elements& own, std::int64_t element) {
    if constexpr (kPerFeature) return element % own.head_size / own.row;
    return 0;
  }
  TORCH_SPE_DEVICE void scan(const Elements& own, std::int64_t i) const {
    const std::int64_t sequence = i / own.size, element = i % own.size;
    const std::int64_t count = ceil_div(segments.length_of(sequence), segments.size);
    const std::int64_t first = segments.first_slot(sequence);
    const std::int64_t needed = own.total != nullptr ? count : count - 1;
    const std::int64_t head = element / own.head_size, feature = feature_of(own, element);
    const std::int64_t to_next = backwards ? -1 : 1;
    std::int64_t slot = first + (backwards ? count - 1 : 0);
    T state = own.initial == nullptr ? T(0) : own.initial[i];
    TORCH_SPE_KEEP_LOOP
    for (std::int64_t j = 0; j < count; j += kAtOnce) {
      // Sums and factors of several segments are read before the first one is replaced.
      T sums[kAtOnce], factors[kAtOnce];
      TORCH_SPE_UNROLL
      for (int a = 0; a < kAtOnce; ++a) {
        sums[a] = 0;
        factors[a] = 1;
        if (j + a >= needed) continue;
        const std::int64_t at = slot + a * to_next;
        sums[a] = own.sums[at * own.size + element];
        factors[a] = core::carry(decay.over_segment(at, head), feature, T(1));
      }
      TORCH_SPE_UNROLL
      for (int a = 0; a < kAtOnce; ++a, slot += to_next) {
        if (j + a >= count) break;
        own.sums[slot * own.size + element] = state;
        if (j + a < needed) state = core::join(core::Passage<T>{factors + a, 0}, 0, state, sums[a]);
      }
    }
    if (own.total != nullptr) own.total[i] = state;
  }
};

}  // namespace torch_spe::cuda::attention
