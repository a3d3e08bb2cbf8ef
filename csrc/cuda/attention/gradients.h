// The kernel that makes the gradients of queries, keys and values in one launch, for 16-bit
// operands and at most kWide features and values: half of the blocks walk forwards for the queries,
// half backwards for keys and values.
#pragma once

#include "features.h"

namespace torch_spe::cuda::attention {

template <class Operand, class Decay>
struct KeyGradientsShared {
  using T = core::accumulate_t<Operand>;
  static constexpr int kTokens = kChunk<Operand>;
  static_assert(kTokens == kWide);     // tiles change their use
  Operand* row_x;                      // [row, r]
  Operand* row_y;                      // [row, e]
  Operand* col_x;                      // [column, r]
  Operand* col_y;                      // [column, e]
  Operand* state;                      // [r, e]
  Operand* x_weights;                  // [row, column], of X, then gradients of values
  Operand* y_weights;                  // [row, column], of Y
  Operand* unmapped;                   // [row, r], features as they are, then their gradients
  VectorOperand<Operand> col_weights;  // [column]
  T* col_weight;                       // [column]
  T* z;                                // [r]
  T* fade;                             // [row], what reading the state fades by
  Between<Decay, Operand> between;

  TORCH_SPE_INLINE explicit KeyGradientsShared(MemoryLayout& layout)
      : row_x(layout.take<Operand>(kTokens * row_of<Operand>(kWide))),
        row_y(layout.take<Operand>(kTokens * row_of<Operand>(kWide))),
        col_x(layout.take<Operand>(kTokens * row_of<Operand>(kWide))),
        col_y(layout.take<Operand>(kTokens * row_of<Operand>(kWide))),
        state(layout.take<Operand>(kWide * row_of<Operand>(kWide))),
        x_weights(layout.take<Operand>(kTokens * row_of<Operand>(kTokens))),
        y_weights(layout.take<Operand>(kTokens * row_of<Operand>(kTokens))),
        unmapped(layout.take<Operand>(kTokens * row_of<Operand>(kWide))),
        col_weights(layout, kTokens),
        col_weight(layout.take<T>(kTokens)),
        z(layout.take<T>(kWide)),
        fade(layout.take<T>(Decay::kFades ? kTokens : 0)),
        between(layout) {}
};

// What walk_values and walk_features make of a segment's keys, with the state of queries.
template <class Storage, class Decay>
TORCH_SPE_DEVICE void walk_keys(int block, const Tokens<Storage>& keys,
                                const Tokens<Storage>& queries, const Walk& walk,
                                const States<core::accumulate_t<Storage>>& states, Storage* grad_k,
                                Storage* grad_v, const Decay& decay) {
  using T = core::accumulate_t<Storage>;
  constexpr int kTokens = kChunk<Storage>;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const KeyGradientsShared<Storage, Decay> shared(layout);
  const int thread = static_cast<int>(threadIdx.x);
  const int heads = static_cast<int>(states.heads), head = block % heads, slot = block / heads;
  const int features = static_cast<int>(states.features);
  const int values = static_cast<int>(states.values);
  const Steps<kTokens> steps(walk, slot);
  if (steps.segment.size == 0) return;
  const bool has_z = states.segment_z != nullptr;
  WalkingState<T> from(states, walk.moves, slot, steps.segment.sequence, head, 0, 1);

  TileProduct<Storage, kWide, kWide> state;
  VectorProduct<Storage, kWide> z;
  from.read(0, 0, state);
  state.store(shared.state);
  z.clear();
  if (has_z) z.for_each([&](int r, T& element) { element = from.z_at(r); });
  TORCH_SPE_KEEP_LOOP
  for (int step = 0; step < steps.count; ++step) {
    const Part chunk = steps.chunk(step);
    const std::int64_t first_row = keys.index(chunk.batch, chunk.begin, head);
    __syncthreads();  // the tiles before have been used
    if (thread < kTokens) {
      const bool inside = thread < chunk.size;
      const std::int64_t n = chunk.begin + thread;
      const T weight = inside && walk.moves ? queries.weight_of(chunk.batch, n, head) : T(0);
      shared.col_weight[thread] = weight;
      shared.col_weights.set(thread, weight);
      if constexpr (Decay::kFades) {
        shared.fade[thread] =
            inside ? decay.reading(decay.index(chunk.batch, n, head), walk.backwards) : T(0);
      }
    }
    if (thread < kWide && !has_z) shared.z[thread] = 0;
    if (has_z) z.for_each([&](int r, T& element) { shared.z[r] = element; });
    if constexpr (Decay::kFades) shared.between.fill(decay, chunk, head, step == 0);
    if (keys.map != core::FeatureMap::kIdentity)
      keys.template copy_x<kTokens, kWide>(chunk, head, 0, features, shared.unmapped);
    keys.template load_x<kTokens, kWide>(chunk, head, 0, features, shared.row_x);
    keys.template load_y<kTokens, kWide>(chunk, head, 0, values, shared.row_y);
    if (walk.moves) {
      queries.template load_x<kTokens, kWide>(chunk, head, 0, features, shared.col_x);
      queries.template load_y<kTokens, kWide>(chunk, head, 0, values, shared.col_y);
    }
    __syncthreads();
    if (walk.moves) {
      const auto multiply = [&](const Storage* row, const Storage* column, bool weighted,
                                Storage* out) {
        TileProduct<Storage, kTokens, kTokens> weights;
        weights.clear();
        weights.template multiply<kWide, Major::kDepth, Major::kDepth>(row, column);
        weights.store(out, [&](int row) {
          const T* const col_weight = shared.col_weight;
          [[maybe_unused]] const T* const between =
              shared.between.factors + row * shared.between.kRow;
          return [=](int column, T value) {
            const bool seen = !walk.masked || (walk.backwards ? column >= row : column <= row);
            if (weighted) value += col_weight[column];
            if constexpr (Decay::kFades) value *= between[column];
            return seen ? value : T(0);
          };
        });
      };
      multiply(shared.row_x, shared.col_x, false, shared.x_weights);
      multiply(shared.row_y, shared.col_y, true, shared.y_weights);
      __syncthreads();  // weights are there
    }
    {
      TileProduct<Storage, kTokens, kWide> grad_x, grad_y;
      grad_y.clear();
      grad_y.template multiply<kWide, Major::kDepth, Major::kOuter>(shared.row_x, shared.state);
      if constexpr (Decay::kFades)
        grad_y.for_each([&](int row, int, T& element) { element *= shared.fade[row]; });
      if (walk.moves)
        grad_y.template multiply<kTokens, Major::kDepth, Major::kOuter>(shared.x_weights,
                                                                        shared.col_y);
      grad_x.clear();
      grad_x.template multiply<kWide, Major::kDepth, Major::kDepth>(shared.row_y, shared.state);
      grad_x.for_each([&](int row, int column, T& element) {
        element += shared.z[column];
        if constexpr (Decay::kFades) element *= shared.fade[row];
      });
      if (walk.moves)
        grad_x.template multiply<kTokens, Major::kDepth, Major::kOuter>(shared.y_weights,
                                                                        shared.col_x);
      copy_async_wait();
      __syncthreads();  // all but the tokens that the state has yet to add have been used
      grad_y.store(shared.x_weights);
      grad_x.store(shared.unmapped, [&](int row) {
        // Padding, whatever it holds, has the gradient 0.
        const bool is_padding = row < chunk.size && keys.is_padding(chunk.batch, chunk.begin + row);
        const auto map = keys.map;
        const Storage* const x = shared.unmapped + row * row_of<Storage>(kWide);
        return [=](int column, T value) {
          return is_padding ? T(0) : gradient_of_input_at(map, value, x + column);
        };
      });
    }
    // The state passes over the chunk.
    const bool passes = walk.moves && step + 1 < steps.count;
    if constexpr (Decay::kFades) {
      if (passes)
        decay.template load_added<kTokens>(queries, chunk, head, walk.backwards, 0, features,
                                           shared.col_x);
    }
    __syncthreads();
    if (passes) {
      const core::Passage<T> passage =
          decay.over_chunk(steps.first_slot + steps.number(step), head);
      state.for_each([&](int, int, T& element) { element = core::carry(passage, 0, element); });
      state.template multiply<kTokens, Major::kOuter, Major::kOuter>(shared.col_x, shared.col_y);
      state.store(shared.state);
      if (has_z) {
        z.for_each([&](int, T& element) { element = core::carry(passage, 0, element); });
        z.template multiply<kTokens, Major::kOuter>(shared.col_x, shared.col_weights);
      }
    }
    write_tile<kTokens>(shared.unmapped, grad_k + first_row * features, heads * features,
                        chunk.size, features, rows_are_aligned<Storage>(grad_k, features));
    write_tile<kTokens>(shared.x_weights, grad_v + first_row * values, heads * values, chunk.size,
                        values, rows_are_aligned<Storage>(grad_v, values));
  }
}

template <class Storage>
struct AttentionGradients {
  Storage *q, *k, *v;  // [B, L, H, R], [B, L, H, R], [B, L, H, E]
};

template <class Storage, class Decay>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    gradients_kernel(const Tokens<Storage> queries, const Tokens<Storage> keys,
                     const Walk walk_of_queries, const Walk walk_of_keys,
                     const States<core::accumulate_t<Storage>> key_states,
                     const States<core::accumulate_t<Storage>> query_states,
                     const AttentionGradients<Storage> grads, const Decay decay) {
  const int block = static_cast<int>(blockIdx.x);
  const int key_blocks = static_cast<int>(walk_of_keys.segments.slots() * query_states.heads);
  if (block < key_blocks) {
    walk_keys(block, keys, queries, walk_of_keys, query_states, grads.k, grads.v, decay);
  } else {
    walk_features<Storage, Storage, Decay, true>(block - key_blocks, queries, keys, walk_of_queries,
                                                 key_states, {}, {}, grads.q, decay);
  }
}

template <class Storage, class Decay, class T = core::accumulate_t<Storage>>
void make_gradients(const Tokens<Storage>& queries, const Tokens<Storage>& keys,
                    const Walk& walk_of_queries, const Walk& walk_of_keys,
                    const States<T>& key_states, const States<T>& query_states,
                    const AttentionGradients<Storage>& grads, const Decay& decay, Stream stream) {
  const std::int64_t blocks =
      (walk_of_queries.segments.slots() + walk_of_keys.segments.slots()) * key_states.heads;
  if (blocks == 0) return;
  MemoryLayout keys_size, queries_size;
  KeyGradientsShared<Storage, Decay>{keys_size};
  FeaturesShared<Storage, Storage, Decay>{queries_size};
  const std::size_t size =
      keys_size.size() < queries_size.size() ? queries_size.size() : keys_size.size();
  launch(gradients_kernel<Storage, Decay>, grid_of(blocks), dim3(kThreads), size, stream, queries,
         keys, walk_of_queries, walk_of_keys, key_states, query_states, grads, decay);
}

}  // namespace torch_spe::cuda::attention
