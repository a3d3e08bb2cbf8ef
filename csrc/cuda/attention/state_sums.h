// The sums of states over segments, and what makes the states in which segments start of them.
// Holds kernels.
#pragma once

#include "warp_state_sums.h"

namespace torch_spe::cuda::attention {

template <class Operand>
struct StateShared {
  using T = core::accumulate_t<Operand>;
  Operand* x;                     // [token, r]
  Operand* y;                     // [token, e]
  VectorOperand<Operand> weight;  // [token]

  TORCH_SPE_INLINE explicit StateShared(MemoryLayout& layout)
      : x(layout.take<Operand>(kChunk<Operand> * row_of<Operand>(kWide))),
        y(layout.take<Operand>(kChunk<Operand> * row_of<Operand>(kWide))),
        weight(layout, kChunk<Operand>) {}
};

// The states of one set of tokens: a block adds up a tile of S over a segment and, where states of
// chunks are wanted, writes what it has before each chunk.
template <class Storage, class Operand, class Decay>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    state_kernel(const Tokens<Storage> tokens, const Cut chunks, const Cut segments,
                 bool has_chunks, bool backwards, const States<core::accumulate_t<Storage>> states,
                 const Decay decay) {
  using T = core::accumulate_t<Storage>;
  constexpr int kTokens = kChunk<Operand>;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const StateShared<Operand> shared(layout);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t features = states.features, values = states.values;
  const std::int64_t tiles_r = ceil_div(features, kWide);
  const std::int64_t tiles_e = max_of(1, ceil_div(values, kWide));
  const std::int64_t block = blockIdx.x;
  const std::int64_t e0 = block % tiles_e * kWide;
  const std::int64_t r0 = block / tiles_e % tiles_r * kWide;
  const std::int64_t head = block / tiles_e / tiles_r % states.heads;
  const std::int64_t segment_slot = block / tiles_e / tiles_r / states.heads;
  const Part segment(segments, segment_slot);
  if (segment.size == 0) return;
  if (!has_chunks && !states.has_totals() &&
      segments.is_last(segment.sequence, segment.number, backwards))
    return;  // whose sums nobody reads
  const int count = static_cast<int>(ceil_div(segment.size, kTokens));
  const std::int64_t first_slot =
      chunks.first_slot(segment.sequence) + segment.number * (segments.size / kTokens);

  TileProduct<Operand, kWide, kWide> product;
  product.clear();
  VectorProduct<Operand, kWide> z;
  z.clear();
  const bool makes_z = states.segment_z != nullptr && e0 == 0;
  const auto write_state = [&](std::int64_t slot, T* s_out, T* z_out) {
    const int rows = static_cast<int>(min_of(kWide, features - r0));
    T* const s = s_out + ((slot * states.heads + head) * features + r0) * values + e0;
    const int columns = static_cast<int>(min_of(kWide, values - e0));
    product.for_each_row([&](int row) {
      T* const to = s + row * values;
      const int end = row < rows ? columns : 0;
      return [=](int column, T value) {
        if (column < end) to[column] = value;
      };
    });
    if (makes_z) {
      T* const to = z_out + (slot * states.heads + head) * features + r0;
      z.for_each([&](int r, T element) {
        if (r < rows) to[r] = element;
      });
    }
  };

  for (int i = 0; i < count; ++i) {
    const std::int64_t slot = first_slot + (backwards ? count - 1 - i : i);
    const Part chunk(chunks, slot);
    if (has_chunks) write_state(slot, states.chunk_s, states.chunk_z);
    __syncthreads();  // the tiles before have been used
    decay.template load_added<kTokens>(tokens, chunk, head, backwards, r0, features, shared.x);
    if (values > 0) tokens.template load_y<kTokens, kWide>(chunk, head, e0, values, shared.y);
    if (makes_z && thread < kTokens) {
      shared.weight.set(thread, thread < chunk.size
                                    ? tokens.weight_of(chunk.batch, chunk.begin + thread, head)
                                    : T(0));
    }
    __syncthreads();
    // Carried over the chunk, whose sums the product then adds to it: together that is a join.
    const core::Passage<T> passage = decay.over_chunk(slot, head);
    product.for_each(
        [&](int row, int, T& element) { element = core::carry(passage, r0 + row, element); });
    z.for_each([&](int r, T& element) { element = core::carry(passage, r0 + r, element); });
    if (values > 0)
      product.template multiply<kTokens, Major::kOuter, Major::kOuter>(shared.x, shared.y);
    if (makes_z) z.template multiply<kTokens, Major::kOuter>(shared.x, shared.weight);
  }
  write_state(segment_slot, states.segment_s, states.segment_z);
}

template <class Storage, class Operand, class Decay>
constexpr bool kSumsByWarps = std::is_same_v<Storage, Operand> && sizeof(Operand) == 2 &&
                              (!Decay::kFades || requires(Decay d) { d.adding(0, false); });

// Makes the states of tokens in their memory; initial states may be null.
template <class Operand, class Storage, class Decay, class T = core::accumulate_t<Storage>>
void make_states(const Tokens<Storage>& tokens, const Cut& chunks, const Cut& segments,
                 bool has_chunks, bool backwards, const T* initial_s, const T* initial_z,
                 const States<T>& states, const Decay& decay, Stream stream) {
  const std::int64_t tiles =
      ceil_div(states.features, kWide) * max_of(1, ceil_div(states.values, kWide));
  const std::int64_t blocks = segments.slots() * states.heads * tiles;
  const bool is_one = segments.bounds == nullptr && segments.per_sequence() == 1;
  if (blocks > 0 && (has_chunks || states.has_totals() || !is_one)) {
    const auto make = [&] {
      MemoryLayout size;
      StateShared<Operand>{size};
      launch(state_kernel<Storage, Operand, Decay>, grid_of(blocks), dim3(kThreads), size.size(),
             stream, tokens, chunks, segments, has_chunks, backwards, states, decay);
    };
    if constexpr (kSumsByWarps<Storage, Operand, Decay>) {
      if (has_chunks || states.values == 0) {
        make();
      } else {
        make_warp_state_sums(tokens, chunks, segments, backwards, states, decay, stream);
      }
    } else {
      make();
    }
  }
  using Elements = typename Scan<T, Decay>::Elements;
  const auto elements = [&](std::int64_t row, const T* initial, T* sums, T* total) {
    Elements own;
    own.head_size = states.features * row;
    own.size = states.heads * own.head_size;
    own.initial = initial;
    own.sums = sums;
    own.total = total;
    if constexpr (Scan<T, Decay>::kPerFeature) own.row = row;
    return own;
  };
  Scan<T, Decay> scan{decay, segments, backwards, {}, {}};
  if (states.values > 0)
    scan.s = elements(states.values, initial_s, states.segment_s, states.total_s);
  if (states.segment_z != nullptr)
    scan.z = elements(1, initial_z, states.segment_z, states.total_z);
  for_each_index(segments.sequences * (scan.s.size + scan.z.size), scan, stream);
}

}  // namespace torch_spe::cuda::attention
