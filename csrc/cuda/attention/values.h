// The kernel whose results have the form of values: outputs, divisors of rows, gradients of values.
#pragma once

#include "states.h"

namespace torch_spe::cuda::attention {

enum class Result {
  kOutput,   // divided by the denominator, by what is given, or not
  kRms,      // divided by the root of the mean square: a block has all values of its rows
  kDivisor,  // none: only the denominator plus eps
};

template <class Operand, Result kResult, class Decay>
struct ValuesShared {
  using T = core::accumulate_t<Operand>;
  static constexpr int kTokens = kChunk<Operand>;
  static constexpr int kSquares = 8;  // threads that have elements of a row
  Operand* row_x;                     // [row, r]
  Operand* col_x;                     // [column, r]
  Operand* state;                     // [r, e]
  Operand* weights;                   // [row, column]
  Operand* col_y;                     // [column, e]
  T* z;                               // [r]
  T* parts;                           // [thread], of sums over a row
  T* scale;                           // [row]: rows are multiplied by both
  T* inverse;                         // [row]
  T* squares;                         // [row, kSquares], sums for kRms
  T* fade;                            // [row], what reading the state fades by
  T* other_fade;                      // [row], the same for the state from the other direction
  Between<Decay, T, kTokens> between;

  TORCH_SPE_INLINE explicit ValuesShared(MemoryLayout& layout)
      : row_x(layout.take<Operand>(kTokens * row_of<Operand>(kDeep))),
        col_x(layout.take<Operand>(kTokens * row_of<Operand>(kDeep))),
        state(layout.take<Operand>(kDeep * row_of<Operand>(kWide))),
        weights(layout.take<Operand>(kTokens * row_of<Operand>(kTokens))),
        col_y(layout.take<Operand>(kTokens * row_of<Operand>(kWide))),
        z(layout.take<T>(kDeep)),
        parts(layout.take<T>(kThreads)),
        scale(layout.take<T>(kTokens)),
        inverse(layout.take<T>(kTokens)),
        squares(layout.take<T>(kResult == Result::kRms ? kTokens * kSquares : 0)),
        fade(layout.take<T>(Decay::kFades ? kTokens : 0)),
        other_fade(layout.take<T>(Decay::kFades ? kTokens : 0)),
        between(layout) {}
};

// With a decay, tokens of the chunk are seen each with a factor of its own, and when not causal
// there are two states: `states`, and `others` from the other direction.
template <class Storage, class Operand, Result kResult, class Decay>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    values_kernel(const Tokens<Storage> rows, const Tokens<Storage> columns, const Cut chunks,
                  const Cut segments, bool causal, bool columns_follow,
                  const States<core::accumulate_t<Storage>> states,
                  const States<core::accumulate_t<Storage>> others,
                  const RowDivision<core::accumulate_t<Storage>> division, Storage* out,
                  const Decay decay) {
  using T = core::accumulate_t<Storage>;
  using Shared = ValuesShared<Operand, kResult, Decay>;
  constexpr int kTokens = kChunk<Operand>;
  constexpr int kPerRow = kThreads / kTokens;  // threads that share the sums over a row
  constexpr bool kMakesValues = kResult != Result::kDivisor;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const Shared shared(layout);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t features = states.features, values = states.values;
  const std::int64_t tiles = kResult == Result::kOutput ? ceil_div(values, kWide) : 1;
  const std::int64_t block = blockIdx.x;
  const std::int64_t head = block / tiles % states.heads;
  const std::int64_t slot = block / tiles / states.heads;
  const Part chunk(chunks, slot);
  if (chunk.size == 0) return;
  const StateReader<T> reader(states, causal || Decay::kFades, chunks, segments, slot, chunk, head,
                              decay.to_chunk(slot, head, columns_follow));
  const bool sums_denominators = kResult != Result::kRms && division.by == Divide::kByDenominator;

  TileProduct<Operand, kTokens, kWide> product;
  T denominator = 0;  // the part of row thread / kPerRow that this thread adds up
  const int own_row = thread / kPerRow, part = thread % kPerRow;
  if constexpr (Decay::kFades) {
    if (thread < kTokens) {
      const std::int64_t i = decay.index(chunk.batch, chunk.begin + thread, head);
      shared.fade[thread] = thread < chunk.size ? decay.reading(i, columns_follow) : T(0);
      shared.other_fade[thread] = thread < chunk.size ? decay.reading(i, !columns_follow) : T(0);
    }
    shared.between.fill(decay, chunk, head);
  }
  // Adds what rows read from the state of the other direction.
  [[maybe_unused]] const auto add_others = [&](std::int64_t e0) {
    const StateReader<T> other(others, true, chunks, segments, slot, chunk, head,
                               decay.to_chunk(slot, head, !columns_follow));
    TileProduct<Operand, kTokens, kWide> sums;
    T sum = 0;
    sums.clear();
    for (std::int64_t r0 = 0; r0 < features; r0 += kDeep) {
      __syncthreads();  // the tiles before have been used
      rows.template load_x<kTokens, kDeep>(chunk, head, r0, features, shared.row_x);
      if constexpr (kMakesValues) {
        load_state<kDeep, kWide>(shared.state,
                                 [&](int r, int e, T(&out)[4]) { other.s(r0 + r, e0 + e, out); });
      }
      if (sums_denominators && thread < kDeep) shared.z[thread] = other.z(r0 + thread);
      __syncthreads();
      if constexpr (kMakesValues)
        sums.template multiply<kDeep, Major::kDepth, Major::kOuter>(shared.row_x, shared.state);
      if (sums_denominators) {
        for (int r = part; r < kDeep; r += kPerRow)
          sum += number_of(shared.row_x[own_row * row_of<Operand>(kDeep) + r]) * shared.z[r];
      }
    }
    product.add(sums, [&](int row) { return shared.other_fade[row]; });
    denominator += shared.other_fade[own_row] * sum;
  };
  // Rows before division, values [e0, e0 + kWide), and their denominators.
  const auto make_rows = [&](std::int64_t e0) {
    TileProduct<Operand, kTokens, kTokens> weights;
    product.clear();
    weights.clear();
    for (std::int64_t r0 = 0; r0 < features; r0 += kDeep) {
      __syncthreads();  // the tiles before have been used
      rows.template load_x<kTokens, kDeep>(chunk, head, r0, features, shared.row_x);
      if (causal || Decay::kFades)
        columns.template load_x<kTokens, kDeep>(chunk, head, r0, features, shared.col_x);
      if constexpr (kMakesValues) {
        load_state<kDeep, kWide>(shared.state,
                                 [&](int r, int e, T(&out)[4]) { reader.s(r0 + r, e0 + e, out); });
      }
      if (sums_denominators && thread < kDeep) shared.z[thread] = reader.z(r0 + thread);
      __syncthreads();
      if constexpr (kMakesValues) {
        product.template multiply<kDeep, Major::kDepth, Major::kOuter>(shared.row_x, shared.state);
      }
      if (causal || Decay::kFades) {
        weights.template multiply<kDeep, Major::kDepth, Major::kDepth>(shared.row_x, shared.col_x);
      }
      if (sums_denominators) {
        for (int r = part; r < kDeep; r += kPerRow)
          denominator +=
              number_of(shared.row_x[own_row * row_of<Operand>(kDeep) + r]) * shared.z[r];
      }
    }
    if (!(causal || Decay::kFades)) return;
    weights.for_each_row([&](int row) {
      Operand* const to = shared.weights + row * row_of<Operand>(kTokens);
      [[maybe_unused]] const T* const between = shared.between.factors + row * shared.between.kRow;
      return [=](int column, T value) {
        const bool seen =
            (Decay::kFades && !causal) || (columns_follow ? column >= row : column <= row);
        if constexpr (Decay::kFades) value *= between[column];
        write(seen ? value : T(0), to + column);
      };
    });
    if constexpr (Decay::kFades) {
      product.for_each([&](int row, int, T& element) { element *= shared.fade[row]; });
      denominator *= shared.fade[own_row];
      if (!causal) add_others(e0);
    }
    if constexpr (kMakesValues)
      columns.template load_y<kTokens, kWide>(chunk, head, e0, values, shared.col_y);
    __syncthreads();
    if constexpr (kMakesValues) {
      product.template multiply<kTokens, Major::kDepth, Major::kOuter>(shared.weights,
                                                                       shared.col_y);
    }
    if (sums_denominators) {
      for (int column = part; column < kTokens; column += kPerRow)
        denominator += number_of(shared.weights[own_row * row_of<Operand>(kTokens) + column]);
    }
  };
  // Divides rows by the quotients in shared memory.
  const auto write_rows = [&](std::int64_t e0) {
    const int end = static_cast<int>(min_of(kWide, values - e0));
    Storage* const first = out + rows.index(chunk.batch, chunk.begin, head) * values + e0;
    const bool divides = division.by != Divide::kNot;
    product.for_each_row([&](int row) {
      Storage* const to = first + row * rows.heads * values;
      const int own_end = row < chunk.size ? end : 0;
      const T scale = divides ? shared.scale[row] : T(1);
      const T inverse = divides ? shared.inverse[row] : T(1);
      return [=](int column, T value) {
        if (column < own_end) write(value * scale * inverse, to + column);
      };
    });
  };
  // Called by the threads that have a row in the chunk.
  const auto keep_divisor = [&](int row, T divisor, bool is_kept) {
    if (is_kept && division.divisor != nullptr)
      division.divisor[rows.index(chunk.batch, chunk.begin + row, head)] = divisor;
    const Quotient<T> quotient(divisor);
    shared.scale[row] = quotient.scale;
    shared.inverse[row] = quotient.inverse;
  };

  if constexpr (kResult == Result::kRms) {
    // Of more values than a tile has, rows are made twice: once for their mean squares.
    const int own_squares = TileProduct<Operand, kTokens, kWide>::kTensorCores
                                ? thread / 32 % 2 * 4 + thread % 4
                                : thread % Shared::kSquares;
    T* const squares = shared.squares + own_squares;
    for (std::int64_t e0 = 0; e0 < values; e0 += kWide) {
      make_rows(e0);
      product.for_each_row([&](int row) {
        T* const sum = squares + row * Shared::kSquares;
        if (e0 == 0) *sum = 0;
        return [=](int, T value) { *sum += value * value; };
      });
    }
    __syncthreads();
    if (thread < chunk.size) {
      T sum = 0;
      for (int i = 0; i < Shared::kSquares; ++i)
        sum += shared.squares[thread * Shared::kSquares + i];
      keep_divisor(thread, square_root(sum / static_cast<T>(values) + division.eps), true);
    }
    __syncthreads();
    for (std::int64_t e0 = 0; e0 < values; e0 += kWide) {
      if (values > kWide) make_rows(e0);
      write_rows(e0);
    }
  } else {
    const std::int64_t e0 = kMakesValues ? block % tiles * kWide : 0;
    make_rows(e0);
    if (sums_denominators) {
      shared.parts[thread] = denominator;
      __syncthreads();
    }
    if (division.by != Divide::kNot) {
      if (thread < chunk.size) {
        T divisor = 0;
        if (sums_denominators) {
          for (int i = 0; i < kPerRow; ++i) divisor += shared.parts[thread * kPerRow + i];
          divisor += division.eps;
        } else {
          divisor = division.divisor[rows.index(chunk.batch, chunk.begin + thread, head)];
        }
        keep_divisor(thread, divisor, sums_denominators && e0 == 0);
      }
      __syncthreads();
    }
    if constexpr (kMakesValues) write_rows(e0);
  }
}

template <class Operand, Result kResult, class Storage, class Decay,
          class T = core::accumulate_t<Storage>>
void make_values(const Tokens<Storage>& rows, const Tokens<Storage>& columns, const Cut& chunks,
                 const Cut& segments, bool causal, bool columns_follow, const States<T>& states,
                 const States<T>& others, const RowDivision<T>& division, Storage* out,
                 const Decay& decay, Stream stream) {
  const std::int64_t tiles = kResult == Result::kOutput ? ceil_div(states.values, kWide) : 1;
  const std::int64_t blocks = chunks.slots() * states.heads * tiles;
  if (blocks == 0) return;
  MemoryLayout size;
  ValuesShared<Operand, kResult, Decay>{size};
  launch(values_kernel<Storage, Operand, kResult, Decay>, grid_of(blocks), dim3(kThreads),
         size.size(), stream, rows, columns, chunks, segments, causal, columns_follow, states,
         others, division, out, decay);
}

}  // namespace torch_spe::cuda::attention
