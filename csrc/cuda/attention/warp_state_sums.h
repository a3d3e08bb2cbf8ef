// What state_kernel makes of a segment, for 16-bit operands and without the states of chunks: with
// 16 rows of a tile of the state in each warp's registers, and the next tokens copied while these
// are multiplied.
#pragma once

#include "warp_walk.h"

namespace torch_spe::cuda::attention {

template <class Operand, class Decay>
struct WarpStateShared {
  using T = core::accumulate_t<Operand>;
  static constexpr int kTokens = kChunk<Operand>, kTile = kTokens * kTileRow;
  Operand* x;                           // [2][token, r], now and next
  Operand* y;                           // [2][token, e]
  VectorOperand<Operand> weights;       // [2][token]
  T* factors;                           // [2], WarpFactors
  FactorsAhead<T, kTokens> divided_by;  // of queries

  TORCH_SPE_INLINE explicit WarpStateShared(MemoryLayout& layout)
      : x(layout.take<Operand>(2 * kTile)),
        y(layout.take<Operand>(2 * kTile)),
        weights(layout, 2 * kTokens),
        factors(layout.take<T>(2 * WarpFactors<Decay, T>::kSize)),
        divided_by(layout) {}
};

template <class Operand, class Decay>
__global__ void __launch_bounds__(kThreads, kBlocksOfWarps)
    warp_state_kernel(const Tokens<Operand> tokens, const Cut segments, const Cut chunks,
                      const bool backwards, const States<core::accumulate_t<Operand>> states,
                      const Decay decay) {
  using T = core::accumulate_t<Operand>;
  using Shared = WarpStateShared<Operand, Decay>;
  using Factors = WarpFactors<Decay, T>;
  constexpr int kTokens = Shared::kTokens, kTile = Shared::kTile;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const Shared shared(layout);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t features = states.features, values = states.values;
  const int tiles_r = static_cast<int>(ceil_div(features, kWide));
  const int tiles_e = static_cast<int>(ceil_div(values, kWide));
  const int heads = static_cast<int>(states.heads), block = static_cast<int>(blockIdx.x);
  const std::int64_t e0 = block % tiles_e * kWide, r0 = block / tiles_e % tiles_r * kWide;
  const int head = block / tiles_e / tiles_r % heads, slot = block / tiles_e / tiles_r / heads;
  const Walk walk{segments, chunks, true, false, false, backwards};
  const Steps<kTokens> steps(walk, slot);
  if (steps.segment.size == 0) return;
  if (!states.has_totals() &&
      segments.is_last(steps.segment.sequence, steps.segment.number, backwards))
    return;  // whose sums nobody reads
  const bool makes_z = states.segment_z != nullptr && e0 == 0;

  WarpProduct<Operand, kWarpRows, kWide> state;
  T z[4] = {};  // of a product whose first columns are both parts of the weights
  state.clear();
  T weight_ahead = 0, factor_ahead = 0;
  const auto begin_factors = [&](int step) {
    if (tokens.factors == nullptr) return;
    const Part chunk = steps.chunk(step);
    shared.divided_by.begin(tokens.factors + tokens.index(chunk.batch, chunk.begin, head), heads,
                            chunk.size, step);
  };
  const auto begin_tiles = [&](int step) {
    const Part chunk = steps.chunk(step);
    const int stage = step % 2 * kTile;
    tokens.template begin_x<kTokens, kWide>(chunk, head, r0, features, shared.x + stage);
    tokens.template begin_y<kTokens, kWide>(chunk, head, e0, values, shared.y + stage);
    if (makes_z && thread < kTokens)
      weight_ahead =
          thread < chunk.size ? tokens.weight_of(chunk.batch, chunk.begin + thread, head) : T(0);
    factor_ahead = Factors::read_passing(decay, chunk, head, backwards);
    if (step + 1 < steps.count) begin_factors(step + 1);
  };
  begin_factors(0);
  copy_async_wait();
  __syncthreads();
  begin_tiles(0);
  TORCH_SPE_KEEP_LOOP
  for (int step = 0; step < steps.count; ++step) {
    const Part chunk = steps.chunk(step);
    Operand* const x = shared.x + step % 2 * kTile;
    Operand* const y = shared.y + step % 2 * kTile;
    const Factors factors(shared.factors + step % 2 * Factors::kSize);
    const int first_weight = step % 2 * kTokens;
    copy_async_wait();
    const RowFactors<T>* const divided_by =
        tokens.factors == nullptr ? nullptr : shared.divided_by.of(step);
    tokens.template finish_x<kTokens, kWide>(chunk, r0, features, x, divided_by);
    tokens.template finish_y<kTokens, kWide>(chunk, e0, values, y, divided_by);
    if (makes_z && thread < kTokens) shared.weights.set(first_weight + thread, weight_ahead);
    factors.fill_passing(factor_ahead);
    __syncthreads();  // the tiles are there, and those before have been used
    if (step + 1 < steps.count) begin_tiles(step + 1);
    const core::Passage<T> passage = factors.over_chunk(chunk.size, backwards);
    TORCH_SPE_UNROLL
    for (T& sum : z) sum = core::carry(passage, 0, sum);
    pass_over_chunk(state, factors, passage, x, y, [&](const std::uint32_t (&fragment)[4], int k) {
      if (!makes_z) return;
      std::uint32_t pairs[2];
      shared.weights.fragment(first_weight + 16 * k, pairs);
      mma_m16n8k16<Operand>(z, fragment, pairs);
    });
  }

  const std::int64_t to = static_cast<std::int64_t>(slot) * heads + head;
  const int rows = static_cast<int>(min_of(kWide, features - r0));
  const int columns = static_cast<int>(min_of(kWide, values - e0));
  T* const s = states.segment_s + (to * features + r0) * values + e0;
  state.for_each_row([&](int row) {
    T* const own = s + row * values;
    const int end = row < rows ? columns : 0;
    return [=](int column, T element) {
      if (column < end) own[column] = element;
    };
  });
  if (!makes_z || thread % 4 != 0) return;
  TORCH_SPE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int row = first_row_of_thread() + 8 * i;
    if (row < rows) states.segment_z[to * features + r0 + row] = z[2 * i] + z[2 * i + 1];
  }
}

// The sums of all segments.
template <class Operand, class Decay, class T = core::accumulate_t<Operand>>
void make_warp_state_sums(const Tokens<Operand>& tokens, const Cut& chunks, const Cut& segments,
                          bool backwards, const States<T>& states, const Decay& decay,
                          Stream stream) {
  const std::int64_t tiles = ceil_div(states.features, kWide) * ceil_div(states.values, kWide);
  const std::int64_t blocks = segments.slots() * states.heads * tiles;
  MemoryLayout size;
  WarpStateShared<Operand, Decay>{size};
  launch(warp_state_kernel<Operand, Decay>, grid_of(blocks), dim3(kThreads), size.size(), stream,
         tokens, segments, chunks, backwards, states, decay);
}

}  // namespace torch_spe::cuda::attention
