// The kernel whose results have the form of values (outputs, divisors of rows, gradients of values)
// where each feature fades on its own: a block makes those of a chunk and head, from the states
// around the chunk and the weights within it.
#pragma once

#include "decay_gradient.h"
#include "feature_fading.h"
#include "walk.h"
#include "warp_product.h"

namespace torch_spe::cuda::attention {

// What rows see: tokens before them, after them, or both, with the states at the chunk's start and
// end. Their own token is seen once.
template <class T>
struct SeenStates {
  bool before = false, after = false;
  States<T> states_before, states_after;  // of the same sizes

  TORCH_SPE_DEVICE bool sees(bool what_comes_after) const {
    return what_comes_after ? after : before;
  }
  TORCH_SPE_DEVICE States<T> states(bool what_comes_after) const {
    return choose(what_comes_after, states_before, states_after);
  }
  // States of the same sizes, chosen at run time so that one code serves both.
  TORCH_SPE_DEVICE static States<T> choose(bool second, const States<T>& a, const States<T>& b) {
    States<T> chosen = a;
    chosen.chunk_s = second ? b.chunk_s : a.chunk_s;
    chosen.chunk_z = second ? b.chunk_z : a.chunk_z;
    chosen.segment_s = second ? b.segment_s : a.segment_s;
    chosen.segment_z = second ? b.segment_z : a.segment_z;
    return chosen;
  }
};

template <class Storage, class Operand>
struct FeatureValuesShared {
  using T = core::accumulate_t<Operand>;
  using Sub = SubChunk<Operand>;
  static constexpr int kTokens = Sub::kTokens;
  static constexpr int kRow = row_of<Operand>(kDeep), kTile = kTokens * kRow;
  static constexpr int kWithin = Sub::kSize == 16 ? 4 : 3;  // levels within a sub-chunk
  Operand* levels;   // [near, far, within, ...; token, r]: X with heads or tails
  Operand* weights;  // [row, column]
  T* diagonal;       // [row]
  T* denominators;   // [row]
  T* scale;          // [row]: rows are multiplied by both
  T* inverse;        // [row]
  // In the place of the levels, when weights are there.
  Operand* row_x;    // [row, r]
  Operand* state;    // [r, e]
  Operand* col_y;    // [column, e]
  Storage* results;  // [row, e], of 16 bits

  TORCH_SPE_INLINE explicit FeatureValuesShared(MemoryLayout& layout) {
    constexpr int kState = kDeep * row_of<Operand>(kWide);
    constexpr int kWideTile = kTokens * row_of<Operand>(kWide);
    constexpr int kLater = kTile + kState + kWideTile + (sizeof(Storage) == 2 ? kWideTile : 0);
    constexpr int kLevels = (2 + kWithin) * kTile;
    levels = layout.take<Operand>(kLevels > kLater ? kLevels : kLater);
    weights = layout.take<Operand>(kTokens * row_of<Operand>(kTokens));
    diagonal = layout.take<T>(kTokens);
    denominators = layout.take<T>(kTokens);
    scale = layout.take<T>(kTokens);
    inverse = layout.take<T>(kTokens);
    row_x = levels;
    state = row_x + kTile;
    col_y = state + kState;
    results = reinterpret_cast<Storage*>(col_y + kWideTile);
  }
};

// The number that becomes of a value as an operand.
template <class Operand, class T>
TORCH_SPE_DEVICE T as_operand(T value) {
  Operand operand;
  write(value, &operand);
  return number_of(operand);
}

// Weights of a chunk's rows for its columns, as operands in shared memory where they are seen, and
// their sums as `denominators`: both of a warp's own rows.
template <class Storage, class Operand>
TORCH_SPE_DEVICE void make_feature_weights(const Tokens<Storage>& rows,
                                           const Tokens<Storage>& columns, int features,
                                           std::int64_t slot, const SubChunk<Operand>& sub,
                                           bool before, bool after,
                                           const FeatureDecay<core::accumulate_t<Storage>>& decay,
                                           const FeatureValuesShared<Storage, Operand>& shared) {
  using T = core::accumulate_t<Storage>;
  using Shared = FeatureValuesShared<Storage, Operand>;
  constexpr int kSize = SubChunk<Operand>::kSize, kRow = Shared::kRow, kTile = Shared::kTile;
  const int warp = sub.warp, first = sub.first;
  WarpProduct<Operand, kSize, kSize> own, near;
  WarpProduct<Operand, kSize, 2 * kSize> far;
  own.clear();
  near.clear();
  far.clear();
  T diagonal[kSize];
  TORCH_SPE_UNROLL
  for (int t = 0; t < kSize; ++t) diagonal[t] = 0;
  Operand* const mine = shared.levels + first * kRow;
  const Operand* const near_columns = shared.levels + (warp ^ 1) * kSize * kRow;
  const Operand* const far_columns = shared.levels + kTile + (warp / 2 ^ 1) * 2 * kSize * kRow;

  TORCH_SPE_KEEP_LOOP
  for (int r0 = 0; r0 < features; r0 += kDeep) {
    const int r = r0 + sub.lane;
    T later[kSize], earlier[kSize], factors[kSize];
    sub.load_factors(decay.steps, r, features, factors);
    sub.load_x(rows, r, features, later);
    sub.load_x(columns, r, features, earlier);
    const T* const over = decay.over_subs_of(slot, sub.head, r);
    const T over_inner[2] = {over[decay.width], over[2 * decay.width]};
    TORCH_SPE_UNROLL
    for (int t = 0; t < kSize; ++t) diagonal[t] += later[t] * earlier[t];
    if (!before) exchange(later, earlier);
    bool rows_are_later = before;
    TORCH_SPE_KEEP_LOOP
    while (true) {
      __syncthreads();  // the tiles before have been used
      Operand* const out = mine + sub.lane;
      sub.write_near(factors, later, earlier, out, kRow);
      sub.write_far(factors, over_inner, later, earlier, out + kTile, kRow);
      sub.write_within(factors, later, earlier, out + 2 * kTile, kRow, kTile);
      __syncthreads();
      if ((warp % 2 == 1) == rows_are_later)
        near.template multiply<kDeep, Major::kDepth, Major::kDepth>(mine, kRow, near_columns, kRow);
      if ((warp >= 2) == rows_are_later)
        far.template multiply<kDeep, Major::kDepth, Major::kDepth>(mine + kTile, kRow, far_columns,
                                                                   kRow);
      // Read again, or the conditions below would be kept in registers.
      const int first_row = thread_read_again() % 32 / 4;
      TORCH_SPE_UNROLL
      for (int level = 0; level < Shared::kWithin; ++level) {
        const Operand* const x = mine + (2 + level) * kTile;
        WarpProduct<Operand, kSize, kSize> part;
        part.clear();
        part.template multiply<kDeep, Major::kDepth, Major::kDepth>(x, kRow, x, kRow);
        own.add_where(part, [&](int i, int column) {
          const int row = first_row + 8 * i, half = kSize / 2 >> level;
          return (row / half ^ 1) == column / half && (row > column) == rows_are_later;
        });
      }
      if (!rows_are_later || !after) break;
      rows_are_later = false;
      exchange(later, earlier);
    }
  }

  TORCH_SPE_UNROLL
  for (int t = 0; t < kSize; ++t) {
    const T sum = warp_sum(diagonal[t]);
    if (sub.lane == 0) shared.diagonal[first + t] = sum;
  }
  __syncwarp();
  own.for_each_row([&](int row) {
    const T on_diagonal = shared.diagonal[row];
    const int own_column = row - first;
    return [=](int column, T& value) {
      if (column == own_column) value = on_diagonal;
    };
  });
  constexpr int kWeightsRow = row_of<Operand>(SubChunk<Operand>::kTokens);
  T sums[decltype(own)::kRows] = {};
  const auto store = [&](auto& product, int first_column) {
    product.for_each([&](int i, int, T value) { sums[i] += as_operand<Operand>(value); });
    product.store(
        shared.weights + first_column, [](int) { return [](int, T value) { return value; }; },
        kWeightsRow);
  };
  store(own, first);
  if (warp % 2 == 1 ? before : after) store(near, (warp ^ 1) * kSize);
  if (warp >= 2 ? before : after) store(far, (warp / 2 ^ 1) * 2 * kSize);
  TORCH_SPE_UNROLL
  for (int i = 0; i < decltype(own)::kRows; ++i) {
    const T sum = quad_sum(sums[i]);
    if (sub.lane % 4 == 0) shared.denominators[first + sub.lane / 4 + 8 * i] = sum;
  }
  __syncwarp();
}

template <class Storage, class Operand>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    feature_values_kernel(const Tokens<Storage> rows, const Tokens<Storage> columns,
                          const Cut segments, const SeenStates<core::accumulate_t<Storage>> seen,
                          const RowDivision<core::accumulate_t<Storage>> division, Storage* out,
                          const FeatureDecay<core::accumulate_t<Storage>> decay) {
  using T = core::accumulate_t<Storage>;
  using Sub = SubChunk<Operand>;
  using Shared = FeatureValuesShared<Storage, Operand>;
  constexpr int kTokens = Sub::kTokens, kSize = Sub::kSize, kRow = Shared::kRow;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const Shared shared(layout);
  const int features = static_cast<int>(seen.states_before.features);
  const int values = static_cast<int>(seen.states_before.values);
  const std::int64_t heads = decay.heads, head = blockIdx.x % heads, slot = blockIdx.x / heads;
  const Part chunk(decay.chunks, slot);
  if (chunk.size == 0) return;
  const Sub sub(chunk, head);
  make_feature_weights(rows, columns, features, slot, sub, seen.before, seen.after, decay, shared);

  const std::int64_t first_row = rows.index(chunk.batch, chunk.begin, head);
  const int tiles = values <= kWide ? 1 : (values + kWide - 1) / kWide;
  const bool makes_values = values > 0;
  const bool by_squares = division.by == Divide::kByRms;
  const bool sums_denominators = division.by == Divide::kByDenominator;
  WarpProduct<Operand, kSize, kWide> product;
  constexpr int kRows = decltype(product)::kRows;
  T squares[kRows] = {};

  const auto find_divisors = [&] {
    __syncwarp();
    TORCH_SPE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const T square = quad_sum(squares[i]);
      const int row = sub.first + sub.lane / 4 + 8 * i;
      if (sub.lane % 4 != 0 || row >= chunk.size) continue;
      const std::int64_t at = first_row + row * heads;
      T divisor;
      if (sums_denominators) {
        divisor = shared.denominators[row] + division.eps;
      } else if (by_squares) {
        divisor = square_root(square / static_cast<T>(values) + division.eps);
      } else {
        divisor = division.divisor[at];
      }
      if (division.writes(0)) division.divisor[at] = divisor;
      const Quotient<T> quotient(divisor);
      shared.scale[row] = quotient.scale;
      shared.inverse[row] = quotient.inverse;
    }
    __syncwarp();
  };
  // Rows of several tiles that their squares divide are made twice.
  const int passes = by_squares && tiles > 1 ? 2 : 1;
  TORCH_SPE_KEEP_LOOP
  for (int step = 0; step < passes * tiles; ++step) {
    const int e0 = step % tiles * kWide;
    const bool with_denominators = sums_denominators && step == 0;
    product.clear();
    T denominators[kSize];
    TORCH_SPE_UNROLL
    for (int t = 0; t < kSize; ++t) denominators[t] = 0;
    TORCH_SPE_KEEP_LOOP
    for (int way = 0; way < 2; ++way) {
      const bool is_after = way == 1;
      if (!seen.sees(is_after)) continue;
      const StateReader<T> reader(seen.states(is_after), decay.chunks, segments, slot, chunk, head,
                                  decay.to_chunk(slot, head, is_after));
      TORCH_SPE_KEEP_LOOP
      for (int r0 = 0; r0 < features; r0 += kDeep) {
        const int r = r0 + sub.lane;
        T x[kSize], factors[kSize];
        sub.load_factors(decay.steps, r, features, factors);
        sub.load_x(rows, r, features, x);
        const T* const over = decay.over_subs_of(slot, head, r);
        const T z = with_denominators ? reader.z(r) : T(0);
        __syncthreads();  // the tiles before have been used
        Operand* const to = shared.row_x + sub.first * kRow + sub.lane;
        const auto take = [&](int t, T factor) {
          const T faded = as_operand<Operand>(x[t] * factor);
          denominators[t] += faded * z;
          write(faded, to + t * kRow);
        };
        if (is_after) {
          sub.template take_tails<0, kSize>(factors, decay.after_sub(over, sub.warp), take);
        } else {
          sub.template take_heads<0, kSize>(factors, decay.before_sub(over, sub.warp), take);
        }
        if (!makes_values) continue;
        load_state<kDeep, kWide>(shared.state, [&](int row, int column, T(&four)[4]) {
          reader.s(r0 + row, e0 + column, four);
        });
        __syncthreads();
        product.template multiply<kDeep, Major::kDepth, Major::kOuter>(
            shared.row_x + sub.first * kRow, kRow, shared.state, row_of<Operand>(kWide));
      }
    }
    if (with_denominators) {
      TORCH_SPE_UNROLL
      for (int t = 0; t < kSize; ++t) {
        const T sum = warp_sum(denominators[t]);
        if (sub.lane == 0) shared.denominators[sub.first + t] += sum;
      }
    }
    if (makes_values) {
      columns.template load_y<kTokens, kWide>(chunk, head, e0, values, shared.col_y);
      __syncthreads();
      TORCH_SPE_KEEP_LOOP
      for (int other = 0; other < kSubs; ++other) {
        if (other != sub.warp && !(other < sub.warp ? seen.before : seen.after)) continue;
        product.template multiply<kSize, Major::kDepth, Major::kOuter>(
            shared.weights + sub.first * row_of<Operand>(kTokens) + other * kSize,
            row_of<Operand>(kTokens), shared.col_y + other * kSize * row_of<Operand>(kWide),
            row_of<Operand>(kWide));
      }
    }
    if (by_squares && step < tiles)
      product.for_each([&](int i, int, T value) { squares[i] += value * value; });
    if (step < (passes - 1) * tiles) continue;
    if (step == (passes - 1) * tiles && division.by != Divide::kNot) find_divisors();
    if (!makes_values) return;
    const int end = static_cast<int>(min_of(kWide, values - e0));
    write_results<kTokens>(product, shared.results, out + first_row * values + e0, heads * values,
                           chunk.size, end, rows_are_aligned<Storage>(out, values), [&](int row) {
                             const bool divides = division.by != Divide::kNot && row < chunk.size;
                             const T scale = divides ? shared.scale[row] : T(1);
                             const T inverse = divides ? shared.inverse[row] : T(1);
                             return [=](int, T value) { return value * scale * inverse; };
                           });
  }
}

// Results [B, L, H, E] of rows, or only what they are divided by.
template <class Operand, class Storage, class T = core::accumulate_t<Storage>>
void make_feature_values(const Tokens<Storage>& rows, const Tokens<Storage>& columns,
                         const Cut& segments, const SeenStates<T>& seen,
                         const RowDivision<T>& division, Storage* out, const FeatureDecay<T>& decay,
                         Stream stream) {
  const std::int64_t blocks = decay.chunks.slots() * decay.heads;
  if (blocks == 0) return;
  MemoryLayout size;
  FeatureValuesShared<Storage, Operand>{size};
  launch(feature_values_kernel<Storage, Operand>, grid_of(blocks), dim3(kThreads), size.size(),
         stream, rows, columns, segments, seen, division, out, decay);
}

}  // namespace torch_spe::cuda::attention
