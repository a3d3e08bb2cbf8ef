// The kernel whose results have the form of features: gradients of queries and keys.
#pragma once

#include "step_terms.h"
#include "walk.h"

namespace torch_spe::cuda::attention {

template <class Storage, class Operand, class Decay>
struct FeaturesShared {
  using T = core::accumulate_t<Operand>;
  static constexpr int kTokens = kChunk<Operand>;
  // 16-bit features wait where their gradients are put together.
  static constexpr bool kKeepsFeatures = sizeof(Storage) == 2;
  Operand* row_y;                      // [row, e]
  Operand* col_y;                      // [column, e]
  Operand* col_x;                      // [column, r]
  Operand* state;                      // [r, e]
  Operand* weights;                    // [row, column]
  Storage* row_x;                      // [row, r], not mapped; then results
  VectorOperand<Operand> col_weights;  // [column]
  T* row_weight;                       // [row]
  T* row_scale;                        // [row]
  T* col_weight;                       // [column]
  T* z;                                // [r]
  T* fade;                             // [row], what reading the state fades by
  T* diagonal;                         // [row], weights of the tokens themselves
  Between<Decay, Operand> between;

  TORCH_SPE_INLINE explicit FeaturesShared(MemoryLayout& layout)
      : row_y(layout.take<Operand>(kTokens * row_of<Operand>(kWide))),
        col_y(layout.take<Operand>(kTokens * row_of<Operand>(kWide))),
        col_x(layout.take<Operand>(kTokens * row_of<Operand>(kWide))),
        state(layout.take<Operand>(kWide * row_of<Operand>(kWide))),
        weights(layout.take<Operand>(kTokens * row_of<Operand>(kTokens))),
        row_x(layout.take<Storage>(kKeepsFeatures ? kTokens * row_of<Storage>(kWide) : 0)),
        col_weights(layout, kTokens),
        row_weight(layout.take<T>(kTokens)),
        row_scale(layout.take<T>(kTokens)),
        col_weight(layout.take<T>(kTokens)),
        z(layout.take<T>(kWide)),
        fade(layout.take<T>(Decay::kFades ? kTokens : 0)),
        diagonal(layout.take<T>(Decay::kFades ? kTokens : 0)),
        between(Between<Decay, Operand>::over(layout, weights)) {}
};

// A block makes a tile of features' gradients of the rows of a segment. With at most kWide values
// (kOneTile) the state stays in registers.
template <class Storage, class Operand, class Decay, bool kOneTile>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    features_kernel(const Tokens<Storage> rows, const Tokens<Storage> columns, const Walk walk,
                    const States<core::accumulate_t<Storage>> states,
                    const OtherDirection<core::accumulate_t<Storage>> other,
                    const StepTerms<core::accumulate_t<Storage>> terms, Storage* grad,
                    const Decay decay) {
  using T = core::accumulate_t<Storage>;
  using Shared = FeaturesShared<Storage, Operand, Decay>;
  constexpr int kTokens = kChunk<Operand>;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const Shared shared(layout);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t features = states.features, values = states.values;
  const int tiles = static_cast<int>(ceil_div(features, kWide));
  const int heads = static_cast<int>(states.heads);
  const int block = static_cast<int>(blockIdx.x);
  const int tile = block % tiles, head = block / tiles % heads, slot = block / tiles / heads;
  const std::int64_t r0 = tile * kWide;
  const int end = static_cast<int>(min_of(kWide, features - r0));
  const Steps<kTokens> steps(walk, slot);
  if (steps.segment.size == 0) return;
  // Without values there is one tile of none: zeros.
  const std::int64_t end_of_values = kOneTile ? kWide : values;
  const bool has_values = values > 0, has_z = states.segment_z != nullptr;
  const bool wants_terms = Decay::kFades && terms.wanted();
  WalkingState<T> from(states, walk.moves, slot, steps.segment.sequence, head, 0, 1);

  TileProduct<Operand, kWide, kWide> state;
  VectorProduct<Operand, kWide> z;
  z.clear();
  if (has_z) z.for_each([&](int r, T& element) { element = from.z_at(r0 + r); });
  TORCH_SPE_KEEP_LOOP
  for (int step = 0; step < steps.count; ++step) {
    const Part chunk = steps.chunk(step);
    const std::int64_t first_row = rows.index(chunk.batch, chunk.begin, head);
    TileProduct<Operand, kTokens, kWide> product;
    product.clear();
    __syncthreads();  // the tiles before have been used
    if constexpr (Shared::kKeepsFeatures) {
      if (wants_terms || (!other.writes && rows.map != core::FeatureMap::kIdentity))
        rows.template copy_x<kTokens, kWide>(chunk, head, r0, features, shared.row_x);
    }
    if (thread < kTokens) {
      const bool inside = thread < chunk.size;
      const std::int64_t n = chunk.begin + thread;
      shared.row_weight[thread] = inside ? rows.weight_of(chunk.batch, n, head) : T(0);
      // Padding, whatever it holds, has the gradient 0.
      shared.row_scale[thread] =
          inside && !rows.is_padding(chunk.batch, n) ? rows.scale_of(chunk.batch, n, head) : T(0);
      const T weight = inside && walk.moves ? columns.weight_of(chunk.batch, n, head) : T(0);
      shared.col_weight[thread] = weight;
      shared.col_weights.set(thread, weight);
      if constexpr (Decay::kFades) {
        shared.fade[thread] =
            inside ? decay.reading(decay.index(chunk.batch, n, head), walk.backwards) : T(0);
      }
    }
    if (thread < kWide && !has_z) shared.z[thread] = 0;
    if (has_z) z.for_each([&](int r, T& element) { shared.z[r] = element; });
    if constexpr (Decay::kFades) {
      if (walk.within) shared.between.fill(decay, chunk, head, step == 0);
    }
    if (walk.within)
      columns.template load_x<kTokens, kWide>(chunk, head, r0, features, shared.col_x);
    {
      TileProduct<Operand, kTokens, kTokens> weights;
      weights.clear();
      TORCH_SPE_KEEP_LOOP
      for (std::int64_t e0 = 0; e0 < end_of_values; e0 += kWide) {
        if (e0 > 0) __syncthreads();
        if (has_values) {
          rows.template load_y<kTokens, kWide>(chunk, head, e0, values, shared.row_y);
          if (walk.moves)
            columns.template load_y<kTokens, kWide>(chunk, head, e0, values, shared.col_y);
          if constexpr (kOneTile) {
            if (step == 0) {
              from.read(r0, e0, state);
              state.store(shared.state);
            }
          } else {
            from.load(r0, e0, shared.state);
          }
        }
        __syncthreads();
        if (walk.within) {
          if (has_values)
            weights.template multiply<kWide, Major::kDepth, Major::kDepth>(shared.row_y,
                                                                           shared.col_y);
          // Before the product with the state: they need not have registers at the same time.
          if (e0 + kWide >= end_of_values) {
            weights.store(shared.weights, [&](int row) {
              const T row_weight = shared.row_weight[row];
              const T* const col_weight = shared.col_weight;
              [[maybe_unused]] const T* const between =
                  shared.between.factors + row * shared.between.kRow;
              return [=](int column, T value) {
                const bool seen = !walk.masked || (walk.backwards ? column >= row : column <= row);
                T weight = value + row_weight * col_weight[column];
                if constexpr (Decay::kFades) {
                  weight *= between[column];
                  if (wants_terms && column == row) {
                    shared.diagonal[row] = weight;
                    return T(0);
                  }
                }
                return seen ? weight : T(0);
              };
            });
          }
        }
        if (has_values)
          product.template multiply<kWide, Major::kDepth, Major::kDepth>(shared.row_y,
                                                                         shared.state);
      }
    }
    product.for_each([&](int row, int column, T& element) {
      element += shared.row_weight[row] * shared.z[column];
      if constexpr (Decay::kFades) element *= shared.fade[row];
    });
    copy_async_wait();
    __syncthreads();  // rows have been used, and weights are there
    if (wants_terms) {
      TileProduct<Operand, kTokens, kWide> within;
      within.clear();
      within.template multiply<kTokens, Major::kDepth, Major::kOuter>(shared.weights, shared.col_x);
      const auto add_within = [&](auto is_mapped) {
        const auto features_of = [&](int row) {
          const T scale = shared.row_scale[row];
          const Storage* const kept = shared.row_x + row * row_of<Storage>(kWide);
          return [=, &rows, &chunk](int column) {
            T x = 0;
            if constexpr (Shared::kKeepsFeatures) {
              x = read(kept[column]);
              if constexpr (decltype(is_mapped)::value) x = select_feature<Storage>(rows.map, x);
              x *= scale;
            } else if (column < end && scale != T(0)) {
              x = rows.x_at(chunk.batch, chunk.begin + row, head, r0 + column);
            }
            Operand rounded;  // as the other walk takes it
            write(x, &rounded);
            return number_of(rounded);
          };
        };
        terms.add_within(product, within, tile,
                         (chunk.batch * heads + head) * terms.length + chunk.begin, chunk.size,
                         shared.diagonal, shared.row_scale, features_of, [&](int row) {
                           const Operand* const x = shared.col_x + row * row_of<Operand>(kWide);
                           return [=](int column) { return number_of(x[column]); };
                         });
      };
      if (Shared::kKeepsFeatures && rows.map == core::FeatureMap::kIdentity) {
        add_within(std::false_type{});
      } else {
        add_within(std::true_type{});
      }
    } else if (walk.within) {
      product.template multiply<kTokens, Major::kDepth, Major::kOuter>(shared.weights,
                                                                       shared.col_x);
    }

    if constexpr (Decay::kFades) {
      if (other.sums != nullptr) {
        T* const sums = other.sums + first_row * features + r0;
        product.for_each([&](int row, int column, T& element) {
          if (row >= chunk.size || column >= end) return;
          T* const there = sums + row * heads * features + column;
          if (other.writes) {
            *there = element;
          } else {
            element += *there;
          }
        });
      }
    }
    if (!other.writes && grad != nullptr) {
      const Storage* const first_x = rows.x + chunk.batch * rows.x_strides[0] +
                                     chunk.begin * rows.x_strides[1] + head * rows.x_strides[2] +
                                     r0 * rows.x_strides[3];
      const std::int64_t x_stride = read_again(rows.x_strides[3]);
      write_results<kTokens>(
          product, shared.row_x, grad + first_row * features + r0, heads * features, chunk.size,
          end, rows_are_aligned<Storage>(grad, features), [&](int row) {
            const T row_scale = shared.row_scale[row];
            const auto map = rows.map;
            [[maybe_unused]] const Storage* const x = first_x + row * rows.x_strides[1];
            [[maybe_unused]] const std::int64_t stride = x_stride;
            [[maybe_unused]] const Storage* const kept =
                shared.row_x + row * row_of<Storage>(kWide);
            return [=](int column, T value) {
              if (row_scale == T(0)) return T(0);
              const Storage* at;
              if constexpr (Shared::kKeepsFeatures) {
                at = kept + column;
              } else {
                at = x + column * stride;
              }
              return gradient_of_input_at(map, value, at) * row_scale;
            };
          });
    }

    if (wants_terms) {
      const std::int64_t at = (steps.first_slot + steps.number(step)) * heads + head;
      T passing = 0;
      if (has_values) {
        TORCH_SPE_KEEP_LOOP
        for (std::int64_t e0 = 0; e0 < end_of_values; e0 += kWide) {
          if constexpr (!kOneTile) from.read(r0, e0, state);
          terms.take_state(state, at, r0, e0, features, values, &passing);
        }
      }
      if (has_z) terms.take_z(z, at, r0, features, &passing);
      terms.write_passing(passing, tile, at);
    }

    // The state passes over the chunk.
    if (walk.moves && step + 1 < steps.count) {
      const core::Passage<T> passage =
          decay.over_chunk(steps.first_slot + steps.number(step), head);
      if constexpr (Decay::kFades) {
        __syncthreads();
        decay.template load_added<kTokens>(columns, chunk, head, walk.backwards, r0, features,
                                           shared.col_x);
        __syncthreads();
      }
      if (has_values) {
        TORCH_SPE_KEEP_LOOP
        for (std::int64_t e0 = 0; e0 < end_of_values; e0 += kWide) {
          if constexpr (!kOneTile) {
            __syncthreads();
            columns.template load_y<kTokens, kWide>(chunk, head, e0, values, shared.col_y);
            __syncthreads();
            from.read(r0, e0, state);
          }
          state.for_each([&](int, int, T& element) { element = core::carry(passage, 0, element); });
          state.template multiply<kTokens, Major::kOuter, Major::kOuter>(shared.col_x,
                                                                         shared.col_y);
          if constexpr (kOneTile) {
            state.store(shared.state);
          } else {
            from.write(r0, e0, state);
          }
        }
      }
      if (has_z) {
        z.for_each([&](int, T& element) { element = core::carry(passage, 0, element); });
        z.template multiply<kTokens, Major::kOuter>(shared.col_x, shared.col_weights);
      }
      from.has_moved();
    }
  }
}

// Gradients of the rows' features, [B, L, H, R]; null where only `terms` are wanted.
template <class Operand, class Storage, class Decay, class T = core::accumulate_t<Storage>>
void make_features(const Tokens<Storage>& rows, const Tokens<Storage>& columns, const Walk& walk,
                   const States<T>& states, const OtherDirection<T>& other,
                   const StepTerms<T>& terms, Storage* grad, const Decay& decay, Stream stream) {
  const std::int64_t blocks =
      walk.segments.slots() * states.heads * ceil_div(states.features, kWide);
  if (blocks == 0) return;
  MemoryLayout size;
  FeaturesShared<Storage, Operand, Decay>{size};
  const auto make = [&](auto kernel) {
    launch(kernel, grid_of(blocks), dim3(kThreads), size.size(), stream, rows, columns, walk,
           states, other, terms, grad, decay);
  };
  if (states.values <= kWide) {
    make(features_kernel<Storage, Operand, Decay, true>);
  } else {
    make(features_kernel<Storage, Operand, Decay, false>);
  }
}

}  // namespace torch_spe::cuda::attention
