// The kernel of the gradients of queries and keys.
#pragma once

#include "walk.h"

namespace torch_spe::cuda::attention {

template <class Operand, class Decay>
struct FeaturesShared {
  using T = core::accumulate_t<Operand>;
  static constexpr int kTokens = kChunk<Operand>;
  Operand* row_y;    // [row, e]
  Operand* col_y;    // [column, e]
  Operand* state;    // [r, e]
  Operand* weights;  // [row, column]
  Operand* col_x;    // [column, r]
  T* row_weight;     // [row]
  T* row_scale;      // [row]
  T* col_weight;     // [column]
  T* z;              // [r]
  T* fade;           // [row], what reading the state fades by
  T* other_fade;     // [row], the same for the state from the other direction
  T* other_z;        // [r]
  Between<Decay, Operand> between;

  TORCH_SPE_INLINE explicit FeaturesShared(MemoryLayout& layout)
      : row_y(layout.take<Operand>(kTokens * row_of<Operand>(kDeep))),
        col_y(layout.take<Operand>(kTokens * row_of<Operand>(kDeep))),
        state(layout.take<Operand>(kWide * row_of<Operand>(kDeep))),
        weights(layout.take<Operand>(kTokens * row_of<Operand>(kTokens))),
        col_x(layout.take<Operand>(kTokens * row_of<Operand>(kWide))),
        row_weight(layout.take<T>(kTokens)),
        row_scale(layout.take<T>(kTokens)),
        col_weight(layout.take<T>(kTokens)),
        z(layout.take<T>(kWide)),
        fade(layout.take<T>(Decay::kFades ? kTokens : 0)),
        other_fade(layout.take<T>(Decay::kFades ? kTokens : 0)),
        other_z(layout.take<T>(Decay::kFades ? kWide : 0)),
        between(layout) {}
};

// With a decay there are the same factors and states as in values_kernel.
template <class Storage, class Operand, class Decay>
__global__ void __launch_bounds__(kThreads)
    features_kernel(const Tokens<Storage> rows, const Tokens<Storage> columns, const Cut chunks,
                    const Cut segments, bool causal, bool columns_follow,
                    const States<core::accumulate_t<Storage>> states,
                    const States<core::accumulate_t<Storage>> others, Storage* grad,
                    const Decay decay) {
  using T = core::accumulate_t<Storage>;
  constexpr int kTokens = kChunk<Operand>;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const FeaturesShared<Operand, Decay> shared(layout);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t features = states.features, values = states.values;
  const std::int64_t tiles = ceil_div(features, kWide);
  const std::int64_t block = blockIdx.x;
  const std::int64_t r0 = block % tiles * kWide;
  const std::int64_t head = block / tiles % states.heads;
  const std::int64_t slot = block / tiles / states.heads;
  const Part chunk(chunks, slot);
  if (chunk.size == 0) return;
  const bool has_chunks = causal || Decay::kFades;
  const StateReader<T> reader(states, has_chunks, chunks, segments, slot, chunk, head,
                              decay.to_chunk(slot, head, columns_follow));

  if (thread < kTokens) {
    const bool inside = thread < chunk.size;
    const std::int64_t n = chunk.begin + thread;
    shared.row_weight[thread] = inside ? rows.weight_of(chunk.batch, n, head) : T(0);
    // Padding, whatever it holds, has the gradient 0.
    shared.row_scale[thread] =
        inside && !rows.is_padding(chunk.batch, n) ? rows.scale_of(chunk.batch, n, head) : T(0);
    shared.col_weight[thread] =
        inside && has_chunks ? columns.weight_of(chunk.batch, n, head) : T(0);
  } else if (thread - kTokens < kWide) {
    shared.z[thread - kTokens] = reader.z(r0 + thread - kTokens);
  }
  if constexpr (Decay::kFades) {
    if (thread < kTokens) {
      const std::int64_t i = decay.index(chunk.batch, chunk.begin + thread, head);
      shared.fade[thread] = thread < chunk.size ? decay.reading(i, columns_follow) : T(0);
      shared.other_fade[thread] = thread < chunk.size ? decay.reading(i, !columns_follow) : T(0);
    }
    shared.between.fill(decay, chunk, head);
  }
  TileProduct<Operand, kTokens, kWide> product;
  TileProduct<Operand, kTokens, kTokens> weights;
  product.clear();
  weights.clear();
  // Adds what rows read from the state of the other direction.
  [[maybe_unused]] const auto add_others = [&] {
    const StateReader<T> other(others, true, chunks, segments, slot, chunk, head,
                               decay.to_chunk(slot, head, !columns_follow));
    TileProduct<Operand, kTokens, kWide> sums;
    sums.clear();
    if (thread < kWide) shared.other_z[thread] = other.z(r0 + thread);
    for (std::int64_t e0 = 0; e0 < values; e0 += kDeep) {
      __syncthreads();  // the tiles before have been used
      rows.template load_y<kTokens, kDeep>(chunk, head, e0, values, shared.row_y);
      load_state<kWide, kDeep>(shared.state,
                               [&](int r, int e, T(&out)[4]) { other.s(r0 + r, e0 + e, out); });
      __syncthreads();
      sums.template multiply<kDeep, Major::kDepth, Major::kDepth>(shared.row_y, shared.state);
    }
    product.add(sums, [&](int row) { return shared.other_fade[row]; });
  };
  for (std::int64_t e0 = 0; e0 < values; e0 += kDeep) {
    __syncthreads();  // the tiles before have been used
    rows.template load_y<kTokens, kDeep>(chunk, head, e0, values, shared.row_y);
    if (has_chunks) columns.template load_y<kTokens, kDeep>(chunk, head, e0, values, shared.col_y);
    load_state<kWide, kDeep>(shared.state,
                             [&](int r, int e, T(&out)[4]) { reader.s(r0 + r, e0 + e, out); });
    __syncthreads();
    product.template multiply<kDeep, Major::kDepth, Major::kDepth>(shared.row_y, shared.state);
    if (has_chunks) {
      weights.template multiply<kDeep, Major::kDepth, Major::kDepth>(shared.row_y, shared.col_y);
    }
  }
  if (values == 0) __syncthreads();  // weights and z are there
  if (has_chunks) {
    weights.for_each_row([&](int row) {
      Operand* const to = shared.weights + row * row_of<Operand>(kTokens);
      const T row_weight = shared.row_weight[row];
      const T* const col_weight = shared.col_weight;
      [[maybe_unused]] const T* const between = shared.between.factors + row * shared.between.kRow;
      return [=](int column, T value) {
        const bool seen =
            (Decay::kFades && !causal) || (columns_follow ? column >= row : column <= row);
        T weight = value + row_weight * col_weight[column];
        if constexpr (Decay::kFades) weight *= between[column];
        write(seen ? weight : T(0), to + column);
      };
    });
    if constexpr (Decay::kFades) {
      product.for_each([&](int row, int, T& element) { element *= shared.fade[row]; });
      if (!causal) add_others();
    }
    columns.template load_x<kTokens, kWide>(chunk, head, r0, features, shared.col_x);
    __syncthreads();
    product.template multiply<kTokens, Major::kDepth, Major::kOuter>(shared.weights, shared.col_x);
  }
  const int end = static_cast<int>(min_of(kWide, features - r0));
  const Storage* const first_x = rows.x + chunk.batch * rows.x_strides[0] +
                                 chunk.begin * rows.x_strides[1] + head * rows.x_strides[2] +
                                 r0 * rows.x_strides[3];
  Storage* const first = grad + rows.index(chunk.batch, chunk.begin, head) * features + r0;
  product.for_each_row([&](int row) {
    const Storage* const from = first_x + row * rows.x_strides[1];
    Storage* const to = first + row * rows.heads * features;
    const int own_end = row < chunk.size ? end : 0;
    const T row_weight = shared.row_weight[row], row_scale = shared.row_scale[row];
    const T* const z = shared.z;
    [[maybe_unused]] const T* const other_z = shared.other_z;
    [[maybe_unused]] const T fade = Decay::kFades ? shared.fade[row] : T(1);
    [[maybe_unused]] const T other_fade = Decay::kFades ? shared.other_fade[row] : T(0);
    const auto map = rows.map;
    const std::int64_t stride = rows.x_strides[3];
    return [=](int column, T value) {
      if (column >= own_end) return;
      T own_z = z[column];
      if constexpr (Decay::kFades) {
        own_z *= fade;
        if (!causal) own_z += other_fade * other_z[column];
      }
      const T sum = value + row_weight * own_z;
      const T gradient = gradient_of_input_at(map, sum, from + column * stride) * row_scale;
      write(row_scale == T(0) ? T(0) : gradient, to + column);
    };
  });
}

// Gradients of the rows' features, [B, L, H, R].
template <class Operand, class Storage, class Decay, class T = core::accumulate_t<Storage>>
void make_features(const Tokens<Storage>& rows, const Tokens<Storage>& columns, const Cut& chunks,
                   const Cut& segments, bool causal, bool columns_follow, const States<T>& states,
                   const States<T>& others, Storage* grad, const Decay& decay, Stream stream) {
  const std::int64_t blocks = chunks.slots() * states.heads * ceil_div(states.features, kWide);
  if (blocks == 0) return;
  MemoryLayout size;
  FeaturesShared<Operand, Decay>{size};
  launch(features_kernel<Storage, Operand, Decay>, grid_of(blocks), dim3(kThreads), size.size(),
         stream, rows, columns, chunks, segments, causal, columns_follow, states, others, grad,
         decay);
}

}  // namespace torch_spe::cuda::attention
