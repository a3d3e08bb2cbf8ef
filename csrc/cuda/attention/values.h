// The kernel whose results have the form of values: outputs, divisors of rows, gradients of values.
#pragma once

#include "warp_values.h"

namespace torch_spe::cuda::attention {

template <class Operand, class Decay>
struct ValuesShared {
  using T = core::accumulate_t<Operand>;
  static constexpr int kTokens = kChunk<Operand>;
  static constexpr int kSquares = 8;  // threads that have elements of a row
  Operand* row_x;                     // [row, r], then results
  Operand* col_x;                     // [column, r]
  Operand* col_y;                     // [column, e]
  Operand* state;                     // [r, e]
  Operand* weights;                   // [row, column]
  VectorOperand<Operand> z;           // [r], rounded as the state is
  VectorOperand<Operand> ones;        // [column]
  T* denominators;                    // [row]
  T* scale;                           // [row]: rows are multiplied by both
  T* inverse;                         // [row]
  T* squares;                         // [row, kSquares], sums: in the place of the columns
  T* fade;                            // [row], what reading the state fades by
  Between<Decay, Operand> between;

  TORCH_SPE_INLINE explicit ValuesShared(MemoryLayout& layout)
      : row_x(layout.take<Operand>(kTokens * row_of<Operand>(kWide))),
        col_x(layout.take<Operand>(kTokens * row_of<Operand>(kWide))),
        col_y(layout.take<Operand>(kTokens * row_of<Operand>(kWide))),
        state(layout.take<Operand>(kWide * row_of<Operand>(kWide))),
        weights(layout.take<Operand>(kTokens * row_of<Operand>(kTokens))),
        z(layout, kWide),
        ones(layout, kTokens),
        denominators(layout.take<T>(kTokens)),
        scale(layout.take<T>(kTokens)),
        inverse(layout.take<T>(kTokens)),
        squares(layout.take<T>(kTokens * kSquares)),
        fade(layout.take<T>(Decay::kFades ? kTokens : 0)),
        between(Between<Decay, Operand>::over(layout, weights)) {}
};

// A block makes a tile of values of the rows of a segment. Without values (E = 0) it makes their
// denominators alone. With at most kWide features (kOneTile) the state stays in registers.
template <class Storage, class Operand, class Decay, bool kOneTile>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    values_kernel(const Tokens<Storage> rows, const Tokens<Storage> columns, const Walk walk,
                  const States<core::accumulate_t<Storage>> states,
                  const OtherDirection<core::accumulate_t<Storage>> other,
                  const RowDivision<core::accumulate_t<Storage>> division, Storage* out,
                  const Decay decay) {
  using T = core::accumulate_t<Storage>;
  using Shared = ValuesShared<Operand, Decay>;
  constexpr int kTokens = kChunk<Operand>;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const Shared shared(layout);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t features = states.features, values = states.values;
  const int tiles = static_cast<int>(max_of(1, ceil_div(values, kWide)));
  const int heads = static_cast<int>(states.heads), block = static_cast<int>(blockIdx.x);
  const int tile = block % tiles, head = block / tiles % heads, slot = block / tiles / heads;
  const std::int64_t e0 = tile * kWide;
  const Steps<kTokens> steps(walk, slot);
  if (steps.segment.size == 0) return;
  const std::int64_t end_of_features = kOneTile ? kWide : features;
  const bool makes_values = values > 0;
  const bool sums_denominators = division.by == Divide::kByDenominator;
  const bool sums_squares = division.by == Divide::kByRms || division.by == Divide::kSumSquares;
  WalkingState<T> from(states, walk.moves, slot, steps.segment.sequence, head, tile, tiles);

  TileProduct<Operand, kWide, kWide> state;
  VectorProduct<Operand, kWide> z;
  // Beside values, denominators are sums of the rounded operands that numerators are sums of:
  // values of 1 give 1. Alone, there is nothing that they should agree with.
  const auto set_z = [&](int r, T element) {
    if (makes_values) {
      shared.z.set_rounded(r, element);
    } else {
      shared.z.set(r, element);
    }
  };
  if (thread < kTokens) shared.ones.set(thread, T(1));
  z.clear();
  TORCH_SPE_KEEP_LOOP
  for (int step = 0; step < steps.count; ++step) {
    const Part chunk = steps.chunk(step);
    const std::int64_t first_row = rows.index(chunk.batch, chunk.begin, head);
    TileProduct<Operand, kTokens, kWide> product;
    VectorProduct<Operand, kTokens> denominators;
    product.clear();
    denominators.clear();
    __syncthreads();  // the tiles before have been used
    if (walk.moves && makes_values)
      columns.template load_y<kTokens, kWide>(chunk, head, e0, values, shared.col_y);
    if constexpr (Decay::kFades) {
      if (thread < kTokens) {
        shared.fade[thread] =
            thread < chunk.size
                ? decay.reading(decay.index(chunk.batch, chunk.begin + thread, head),
                                walk.backwards)
                : T(0);
      }
      if (walk.within) shared.between.fill(decay, chunk, head, step == 0);
    }
    {
      TileProduct<Operand, kTokens, kTokens> weights;
      weights.clear();
      TORCH_SPE_KEEP_LOOP
      for (std::int64_t r0 = 0; r0 < end_of_features; r0 += kWide) {
        if (r0 > 0) __syncthreads();
        rows.template load_x<kTokens, kWide>(chunk, head, r0, features, shared.row_x);
        if (walk.moves)
          columns.template load_x<kTokens, kWide>(chunk, head, r0, features, shared.col_x);
        if (step == 0 || !kOneTile) {
          if constexpr (kOneTile) {
            if (makes_values) {
              from.read(r0, e0, state);
              state.store(shared.state);
            }
          } else {
            if (makes_values) from.load(r0, e0, shared.state);
          }
          if (sums_denominators) {
            z.clear();
            z.for_each([&](int r, T& element) {
              element = from.z_at(r0 + r);
              set_z(r, element);
            });
          }
        }
        __syncthreads();
        if (walk.within) {
          weights.template multiply<kWide, Major::kDepth, Major::kDepth>(shared.row_x,
                                                                         shared.col_x);
          // Before the product with the state: they need not have registers at the same time.
          if (r0 + kWide >= end_of_features) {
            weights.store(shared.weights, [&](int row) {
              [[maybe_unused]] const T* const between =
                  shared.between.factors + row * shared.between.kRow;
              return [=](int column, T value) {
                const bool seen = !walk.masked || (walk.backwards ? column >= row : column <= row);
                if constexpr (Decay::kFades) value *= between[column];
                return seen ? value : T(0);
              };
            });
          }
        }
        if (makes_values)
          product.template multiply<kWide, Major::kDepth, Major::kOuter>(shared.row_x,
                                                                         shared.state);
        if (sums_denominators)
          denominators.template multiply<kWide, Major::kDepth>(shared.row_x, shared.z);
      }
      if constexpr (Decay::kFades)
        product.for_each([&](int row, int, T& element) { element *= shared.fade[row]; });
      // Also where nothing fades: its parts are added up in the same order then, so that a decay of
      // 0 changes no bit.
      denominators.for_each([&](int row, T& element) {
        if constexpr (Decay::kFades) element *= shared.fade[row];
      });
    }
    __syncthreads();  // rows have been used, and weights are there
    if (walk.within) {
      if (makes_values)
        product.template multiply<kTokens, Major::kDepth, Major::kOuter>(shared.weights,
                                                                         shared.col_y);
      if (sums_denominators)
        denominators.template multiply<kTokens, Major::kDepth>(shared.weights, shared.ones);
    }
    denominators.for_each([&](int row, T element) { shared.denominators[row] = element; });

    const auto finish = [&] {
      const int end = static_cast<int>(min_of(kWide, values - e0));
      if constexpr (Decay::kFades) {
        if (other.sums != nullptr || other.denominators != nullptr) {
          T* const sums = other.sums + first_row * values + e0;
          product.for_each([&](int row, int column, T& element) {
            if (row >= chunk.size || column >= end) return;
            T* const there = sums + row * heads * values + column;
            if (other.writes) {
              *there = element;
            } else {
              element += *there;
            }
          });
          if (other.writes && sums_denominators && tile == 0) {
            __syncthreads();
            if (thread < chunk.size)
              other.denominators[first_row + thread * heads] = shared.denominators[thread];
          }
          if (other.writes) return;
        }
      }
      if (sums_squares) {
        const int own = TileProduct<Operand, kTokens, kWide>::kTensorCores
                            ? thread / 32 % 2 * 4 + thread % 4
                            : thread % Shared::kSquares;
        product.for_each_row([&](int row) {
          T* const sum = shared.squares + row * Shared::kSquares + own;
          *sum = 0;
          return [=](int, T value) { *sum += value * value; };
        });
      }
      if (division.by != Divide::kNot) {
        __syncthreads();
        if (thread < chunk.size) {
          const std::int64_t i = first_row + thread * heads;
          T divisor = 0;
          if (sums_denominators) {
            divisor = shared.denominators[thread];
            if constexpr (Decay::kFades) {
              if (other.denominators != nullptr) divisor += other.denominators[i];
            }
            divisor += division.eps;
          } else if (division.by == Divide::kByGiven) {
            divisor = division.divisor[i];
          } else {
            if (sums_squares) {
              for (int j = 0; j < Shared::kSquares; ++j)
                divisor += shared.squares[thread * Shared::kSquares + j];
            } else {
              for (int j = 0; j < tiles; ++j) divisor += division.squares[j * division.rows + i];
            }
            if (division.by == Divide::kSumSquares)
              division.squares[tile * division.rows + i] = divisor;
            divisor = square_root(divisor / static_cast<T>(values) + division.eps);
          }
          if (division.writes(tile)) division.divisor[i] = divisor;
          const Quotient<T> quotient(divisor);
          shared.scale[thread] = quotient.scale;
          shared.inverse[thread] = quotient.inverse;
        }
        __syncthreads();
      }
      if (!makes_values || division.by == Divide::kSumSquares) return;
      write_results<kTokens>(product, shared.row_x, out + first_row * values + e0, heads * values,
                             chunk.size, end, rows_are_aligned<Storage>(out, values), [&](int row) {
                               const bool divides = division.by != Divide::kNot && row < chunk.size;
                               const T scale = divides ? shared.scale[row] : T(1);
                               const T inverse = divides ? shared.inverse[row] : T(1);
                               return [=](int, T value) { return value * scale * inverse; };
                             });
    };
    finish();  // before the state passes on: they need not have registers at the same time

    // The state passes over the chunk.
    if (walk.moves && step + 1 < steps.count) {
      const core::Passage<T> passage =
          decay.over_chunk(steps.first_slot + steps.number(step), head);
      TORCH_SPE_KEEP_LOOP
      for (std::int64_t r0 = 0; r0 < end_of_features; r0 += kWide) {
        if (Decay::kFades || !kOneTile) {
          if (r0 > 0) __syncthreads();
          decay.template load_added<kTokens>(columns, chunk, head, walk.backwards, r0, features,
                                             shared.col_x);
          __syncthreads();
        }
        if (makes_values) {
          if constexpr (!kOneTile) from.read(r0, e0, state);
          state.for_each([&](int, int, T& element) { element = core::carry(passage, 0, element); });
          state.template multiply<kTokens, Major::kOuter, Major::kOuter>(shared.col_x,
                                                                         shared.col_y);
          if constexpr (kOneTile) {
            state.store(shared.state);
          } else {
            from.write(r0, e0, state);
          }
        }
        if (sums_denominators) {
          if constexpr (!kOneTile) {
            z.clear();
            z.for_each([&](int r, T& element) { element = from.z_at(r0 + r); });
          }
          z.for_each([&](int, T& element) { element = core::carry(passage, 0, element); });
          z.template multiply<kTokens, Major::kOuter>(shared.col_x, shared.ones);
          z.for_each([&](int r, T element) {
            if constexpr (kOneTile) {
              set_z(r, element);
            } else if (r0 + r < features) {
              from.kept_z[r0 + r] = element;
            }
          });
        }
      }
      from.has_moved();
    }
  }
}

template <class Operand, class Storage, class Decay, class T = core::accumulate_t<Storage>>
void make_values(const Tokens<Storage>& rows, const Tokens<Storage>& columns, const Walk& walk,
                 const States<T>& states, const OtherDirection<T>& other,
                 const RowDivision<T>& division, Storage* out, const Decay& decay, Stream stream) {
  const std::int64_t blocks =
      walk.segments.slots() * states.heads * max_of(1, ceil_div(states.values, kWide));
  if (blocks == 0) return;
  if constexpr (std::is_same_v<Operand, Storage> && sizeof(Operand) == 2) {
    if (warp_values_can<Decay>(walk, states, other, division))
      return make_warp_values(rows, columns, walk, states, other, division, out, decay, stream);
  }
  MemoryLayout size;
  ValuesShared<Operand, Decay>{size};
  const auto make = [&](auto kernel) {
    launch(kernel, grid_of(blocks), dim3(kThreads), size.size(), stream, rows, columns, walk,
           states, other, division, out, decay);
  };
  if (states.features <= kWide) {
    make(values_kernel<Storage, Operand, Decay, true>);
  } else {
    make(values_kernel<Storage, Operand, Decay, false>);
  }
}

}  // namespace torch_spe::cuda::attention
