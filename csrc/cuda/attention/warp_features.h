// What features.h makes, for 16-bit operands, one tile of values and up to kMostTiles tiles of
// features, where rows see tokens on one side or, without a decay, all: a block makes all features
// of its rows, so that weights are made once; they and the state are in registers, and the next
// tiles are copied while these are multiplied. With one tile of features also where rows are
// divided, and what values.h makes of the same rows.
#pragma once

#include "step_terms.h"
#include "warp_walk.h"

namespace torch_spe::cuda::attention {

template <class Operand, class Decay, int kTiles, bool kDivided>
struct WarpFeaturesShared {
  using T = core::accumulate_t<Operand>;
  static constexpr int kTile = kChunk<Operand> * kTileRow;
  // As for values; rows of Y are in registers when those of the next chunk are copied.
  static constexpr int kStates = kTiles == 1 ? 2 : kTiles, kRowTiles = kTiles == 1 ? 2 : 1;
  Operand* row_y;  // [kRowTiles][row, e]
  Operand* col_y;  // [2][column, e]
  Operand* row_x;  // [2][row, r], not mapped; then results
  Operand* col_x;  // [2][column, r]
  Operand* state;  // [kStates][r, e]
  T* factors;      // [2], WarpFactors
  // Where rows are divided.
  VectorOperand<Operand> weights;               // [2][column], for z
  T* col_weight;                                // [2][column]
  T* z;                                         // [2][r]
  FactorsAhead<T, kChunk<Operand>> divided_by;  // of queries

  TORCH_SPE_INLINE explicit WarpFeaturesShared(MemoryLayout& layout)
      : row_y(layout.take<Operand>(kRowTiles * kTile)),
        col_y(layout.take<Operand>(2 * kTile)),
        row_x(layout.take<Operand>(2 * kTile)),
        col_x(layout.take<Operand>(2 * kTile)),
        state(layout.take<Operand>(kStates * kTile)),
        factors(layout.take<T>(2 * WarpFactors<Decay, T>::kSize)),
        weights(layout, kDivided ? 2 * kWide : 0),
        col_weight(layout.take<T>(kDivided ? 2 * kWide : 0)),
        z(layout.take<T>(kDivided ? 2 * kWide : 0)),
        divided_by(layout, kDivided) {}
};

// The weight of a token of a chunk, given the factors of its tokens, if these have any.
template <class Operand, class T>
TORCH_SPE_DEVICE T weight_of(const Tokens<Operand>& tokens, const RowFactors<T>* factors, int row) {
  return tokens.weighted ? factors[row].weight : tokens.constant_weight;
}

// Of a pair of features in a register: phi, and its derivative times a gradient.
template <class Operand, bool kIsElu>
TORCH_SPE_DEVICE void map_pair(bool is_relu, std::uint32_t pair, float (&phi)[2]) {
  if constexpr (kIsElu) {
    map_elu_pair<Operand>(pair, phi, phi + 1);
  } else {
    unpack_pair<Operand>(is_relu ? map_relu_pair(pair) : pair, phi, phi + 1);
  }
}
template <bool kIsElu>
TORCH_SPE_DEVICE float gradient_of_pair(bool is_relu, float gradient, float phi) {
  if constexpr (kIsElu) return gradient_of_input(FeatureMap::kElu, gradient, phi);
  return is_relu ? gradient_of_input(FeatureMap::kRelu, gradient, phi) : gradient;
}

// What a thread has of its two rows, for the gradient of the steps (StepTerms).
template <class T>
struct RowTerms {
  T diagonal[2] = {};  // the weight of the token itself
  T past[2] = {}, own[2] = {};
};

// Takes the diagonal out of the weights of a warp's own 16 tokens.
template <class Operand, class T>
TORCH_SPE_DEVICE void take_diagonal(WarpProduct<Operand, kWarpRows, 16>& weights,
                                    RowTerms<T>& terms) {
  const int row = thread_read_again() % 32 / 4;
  weights.for_each([&](int i, int column, T& weight) {
    if (column != row + 8 * i) return;
    terms.diagonal[i] = weight;
    weight = 0;
  });
  TORCH_SPE_UNROLL
  for (T& weight : terms.diagonal) weight = quad_sum(weight);
}

// Puts the gradients of the warp's 16 rows and kHalf features in the place of the features
// themselves, at `x`, from a product with the state and one within the chunk. `itself` is where
// features of the rows' tokens begin among the columns.
constexpr int kHalf = kWide / 2;
template <class Operand, class T, class Map>
TORCH_SPE_DEVICE void finish_features(WarpProduct<Operand, kWarpRows, kHalf>& past,
                                      const WarpProduct<Operand, kWarpRows, kHalf>& within,
                                      const Map&, core::FeatureMap map, bool reads_x,
                                      bool wants_terms, Operand* x, const Operand* itself,
                                      const T (&fade)[2], const T (&scale)[2], RowTerms<T>& terms) {
  constexpr bool kIsElu = Map::value;
  const int lane = thread_read_again() % 32;
  const bool is_relu = map == core::FeatureMap::kRelu;
  Operand* const out = x + lane / 4 * kTileRow + lane % 4 * 2;
  TORCH_SPE_UNROLL
  for (int k = 0; k < kHalf / 16; ++k) {
    std::uint32_t features[4] = {}, columns[4] = {};
    if (reads_x) load_fragment<Major::kDepth>(features, x + 16 * k, kTileRow, lane);
    if (wants_terms) load_fragment<Major::kDepth>(columns, itself + 16 * k, kTileRow, lane);
    __syncwarp();  // their place is free
    const auto finish = [&](int i, int j, T* element, const T* added) {
      T phi[2];
      map_pair<Operand, kIsElu>(is_relu, features[j % 2 * 2 + i], phi);
      T result[2] = {element[0] * fade[i], element[1] * fade[i]};
      if (wants_terms) {
        T feature[2], other[2];
        unpack_pair<Operand>(pack_pair<Operand>(phi[0], phi[1]), feature, feature + 1);
        unpack_pair<Operand>(columns[j % 2 * 2 + i], other, other + 1);
        TORCH_SPE_UNROLL
        for (int e = 0; e < 2; ++e) {
          terms.past[i] += result[e] * feature[e];
          terms.own[i] += added[e] * feature[e];
          result[e] += added[e] + terms.diagonal[i] * other[e];
        }
      } else {
        result[0] += added[0];
        result[1] += added[1];
      }
      *reinterpret_cast<std::uint32_t*>(out + 8 * i * kTileRow + 8 * j) =
          pack_pair<Operand>(gradient_of_pair<kIsElu>(is_relu, result[0], phi[0]) * scale[i],
                             gradient_of_pair<kIsElu>(is_relu, result[1], phi[1]) * scale[i]);
    };
    past.for_each_pair_with(within, finish, 2 * k, 2 * k + 2);
  }
}

// The rows' values (values.h), of a state and a chunk in shared memory, to `staged`, rows that only
// their own warp uses; `x` are the rows' features, not mapped.
template <class Operand, class Decay, class T>
TORCH_SPE_DEVICE void make_values_of_rows(const Operand* x, core::FeatureMap map,
                                          const Operand* state, const Operand* col_x,
                                          const Operand* col_y, const Walk& walk,
                                          const WarpFactors<Decay, T>& factors, const T* table,
                                          const T (&fade)[2], Operand* staged) {
  const int lane = thread_read_again() % 32;
  WarpRows<Operand> rows;
  rows.load(x);
  rows.map(map);
  WarpProduct<Operand, kWarpRows, kWide> product;
  product.clear();
  TORCH_SPE_UNROLL
  for (int k = 0; k < kWide / 16; ++k)
    product.template multiply_fragment<Major::kOuter>(rows.fragments[k], state + 16 * k * kTileRow,
                                                      kTileRow, lane);
  if constexpr (Decay::kFades)
    product.for_each([&](int i, int, T& element) { element *= fade[i]; });
  TORCH_SPE_UNROLL
  for (int j = 0; j < kSixteens; ++j) {
    if (!walk.within || !sees_sixteen(walk, j)) continue;
    WarpProduct<Operand, kWarpRows, 16> sums;
    multiply_sixteen(sums, rows, col_x + 16 * j * kTileRow, lane);
    fade_weights(sums, j, walk, factors, table);
    std::uint32_t fragment[4];
    sums.to_fragment(fragment);
    product.template multiply_fragment<Major::kOuter>(fragment, col_y + 16 * j * kTileRow, kTileRow,
                                                      lane);
  }
  __syncwarp();  // all have used the table
  product.store(staged);
}

// A block makes the features' gradients of the rows of a segment, and their values where
// `grad_values` is not null.
template <class Operand, class Decay, int kTiles, bool kDivided>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    warp_features_kernel(const Tokens<Operand> rows, const Tokens<Operand> columns, const Walk walk,
                         const States<core::accumulate_t<Operand>> states,
                         const StepTerms<core::accumulate_t<Operand>> terms, Operand* grad,
                         Operand* grad_values, const Decay decay) {
  static_assert(kTiles == 1 || !kDivided);
  using T = core::accumulate_t<Operand>;
  using Shared = WarpFeaturesShared<Operand, Decay, kTiles, kDivided>;
  using Factors = WarpFactors<Decay, T>;
  constexpr int kTokens = kChunk<Operand>, kTile = Shared::kTile;
  static_assert(kTokens == kSixteens * kWarpRows && kTokens == kWide);
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const Shared shared(layout);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const auto first_of_warp = [] {  // of its rows in a tile
    return thread_read_again() / 32 * kWarpRows * kTileRow;
  };
  const std::int64_t features = states.features, values = states.values;
  const int heads = static_cast<int>(states.heads), block = static_cast<int>(blockIdx.x);
  const int head = block % heads, slot = block / heads;
  const Steps<kTokens> steps(walk, slot);
  if (steps.segment.size == 0) return;
  const bool wants_terms = Decay::kFades && !kDivided && terms.wanted();
  const bool makes_values = kTiles == 1 && grad_values != nullptr;
  const bool reads_x = wants_terms || makes_values || rows.map != core::FeatureMap::kIdentity;

  // A warp has 16 rows of each tile of the state.
  WarpProduct<Operand, kWarpRows, kWide> state[kTiles];
  [[maybe_unused]] T z[4] = {};  // of a product whose first columns are both parts of the weights
  const auto store_state = [&](int t, int to) {
    state[t].store(shared.state + to * kTile);
    if (kDivided && lane % 4 == 0) {
      T* const own = shared.z + to * kWide + first_row_of_thread();
      own[0] = z[0] + z[1];
      own[8] = z[2] + z[3];
    }
  };
  {
    const WalkingState<T> from(states, walk.moves, slot, steps.segment.sequence, head, 0, 1);
    if (kDivided && from.z != nullptr && lane % 4 == 0) {
      z[0] = from.z_at(first_row_of_thread());
      z[2] = from.z_at(first_row_of_thread() + 8);
    }
    TORCH_SPE_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      from.read_rows(t * kWide, 0, state[t]);
      store_state(t, t);
    }
  }

  typename Factors::Ahead ahead;
  // Of queries, which are the rows or, backwards, the columns.
  const RowFactors<T>* const factors_of_queries =
      !walk.backwards ? rows.factors : (walk.within ? columns.factors : nullptr);
  const bool has_factors = kDivided && factors_of_queries != nullptr;
  const auto begin_factors = [&](int step) {
    if (!has_factors) return;
    const Part chunk = steps.chunk(step);
    shared.divided_by.begin(factors_of_queries + rows.index(chunk.batch, chunk.begin, head), heads,
                            chunk.size, step);
  };
  const auto row_y_of = [&](int step) {
    return shared.row_y + (Shared::kRowTiles == 1 ? 0 : step % 2 * kTile);
  };
  const auto begin_tiles = [&](int step, int t, int to) {
    Part chunk = steps.chunk(step);
    // Read again, or what follows from it would be kept in registers.
    chunk.batch = read_again(chunk.batch);
    const std::int64_t r0 = t * kWide, own_head = read_again(std::int64_t{head});
    if (reads_x)
      rows.template copy_x<kTokens, kWide>(chunk, own_head, r0, features,
                                           shared.row_x + to * kTile);
    if (walk.within)
      columns.template begin_x<kTokens, kWide>(chunk, own_head, r0, features,
                                               shared.col_x + to * kTile);
    if (t > 0) return;
    rows.template begin_y<kTokens, kWide>(chunk, own_head, 0, values, row_y_of(step));
    if (walk.within)
      columns.template begin_y<kTokens, kWide>(chunk, own_head, 0, values,
                                               shared.col_y + step % 2 * kTile);
    if (Decay::kFades) {
      const bool backwards = read_again(std::int64_t{walk.backwards}) != 0;
      ahead = Factors::read(decay, chunk, own_head, backwards);
    }
    if (step + 1 < steps.count) begin_factors(step + 1);
  };
  if constexpr (kDivided) {
    begin_factors(0);
    copy_async_wait();
    __syncthreads();
  }
  begin_tiles(0, 0, 0);
  TORCH_SPE_KEEP_LOOP
  for (int step = 0; step < steps.count; ++step) {
    const bool passes = walk.moves && step + 1 < steps.count;
    Operand* const col_y = shared.col_y + step % 2 * kTile;
    const Factors factors(shared.factors + step % 2 * Factors::kSize);
    const int parity = step % 2 * kWide;
    const int now = kTiles == 1 && walk.moves ? step % 2 : 0;  // the state of one tile
    const RowFactors<T>* divided_by = nullptr;                 // of queries
    WarpRows<Operand> y;
    std::uint32_t weights[kSixteens][4];
    RowTerms<T> row_terms;
    T fade[2] = {1, 1}, scale[2] = {1, 1}, row_weight[2] = {0, 0}, passing = 0;
    TORCH_SPE_KEEP_LOOP
    for (int t = 0; t < kTiles; ++t) {
      const int stage = (step * kTiles + t) % 2;
      const Part chunk = steps.chunk(read_again(step));
      Operand* const row_x = shared.row_x + stage * kTile;
      Operand* const col_x = shared.col_x + stage * kTile;
      copy_async_wait();
      if constexpr (kDivided) {
        divided_by = has_factors ? shared.divided_by.of(step) : nullptr;
        const RowFactors<T>* const of_columns = walk.backwards ? divided_by : nullptr;
        if (walk.within) {
          columns.template finish_x<kTokens, kWide>(chunk, 0, features, col_x, of_columns);
          columns.template finish_y<kTokens, kWide>(chunk, 0, values, col_y, of_columns);
        }
        if (!walk.backwards)
          rows.template finish_y<kTokens, kWide>(chunk, 0, values, row_y_of(step), divided_by);
        if (walk.within && thread < kTokens) {
          const T weight = thread < chunk.size ? weight_of(columns, of_columns, thread) : T(0);
          shared.col_weight[parity + thread] = weight;
          shared.weights.set(parity + thread, weight);
        }
      } else if (walk.within) {
        columns.template finish_x<kTokens, kWide>(chunk, head, t * kWide, features, col_x);
      }
      if (t == 0) factors.fill(ahead);
      __syncthreads();  // the tiles are there, and those before have been used
      const bool stays = t + 1 < kTiles;
      const int next_step = stays ? step : step + 1;
      if (next_step < steps.count) begin_tiles(next_step, stays ? t + 1 : 0, 1 - stage);
      if (kTiles > 1 && walk.moves && (t > 0 ? passes : step > 0))
        at_tile<kTiles>(t > 0 ? t - 1 : kTiles - 1, [&](auto before) {
          constexpr int kBefore = decltype(before)::value;
          store_state(kBefore, kBefore);
        });
      const Operand* const state_tile = shared.state + (kTiles == 1 ? now : t) * kTile;

      if (t == 0) {
        Operand* const row_y = row_y_of(step);
        T* const table = reinterpret_cast<T*>(row_y + first_of_warp());
        y.load(row_y);
        if constexpr (Decay::kFades) {
          TORCH_SPE_UNROLL
          for (int i = 0; i < 2; ++i) fade[i] = factors.reading[first_row_of_thread() + 8 * i];
          __syncwarp();  // the rows are in registers
          factors.fill_table(table);
          __syncwarp();
        }
        if constexpr (kDivided) {
          const RowFactors<T>* const of_rows = walk.backwards ? nullptr : divided_by;
          TORCH_SPE_UNROLL
          for (int i = 0; i < 2; ++i) {
            const int row = first_row_of_thread() + 8 * i;
            if (row >= chunk.size) continue;
            row_weight[i] = weight_of(rows, of_rows, row);
            if (of_rows != nullptr) scale[i] = of_rows[row].scale;
          }
        }
        TORCH_SPE_UNROLL
        for (int j = 0; j < kSixteens; ++j) {
          if (!walk.within || !sees_sixteen(walk, j)) continue;
          WarpProduct<Operand, kWarpRows, 16> sums;
          multiply_sixteen(sums, y, col_y + 16 * j * kTileRow, lane);
          if constexpr (kDivided) {
            const T* const own = shared.col_weight + parity + 16 * j;
            sums.for_each(
                [&](int i, int column, T& weight) { weight += row_weight[i] * own[column]; });
          }
          fade_weights(sums, j, walk, factors, table);
          if (wants_terms && j == warp) take_diagonal(sums, row_terms);
          sums.to_fragment(weights[j]);
        }
        // Where the table was, whose last use this is.
        if (makes_values)
          make_values_of_rows(row_x, rows.map, state_tile, col_x, col_y, walk, factors, table, fade,
                              row_y);
      }
      TORCH_SPE_KEEP_LOOP
      for (int first = 0; first < kWide; first += kHalf) {
        WarpProduct<Operand, kWarpRows, kHalf> product, within;
        product.clear();
        within.clear();
        TORCH_SPE_UNROLL
        for (int k = 0; k < kWide / 16; ++k)
          product.template multiply_fragment<Major::kDepth>(
              y.fragments[k], state_tile + first * kTileRow + 16 * k, kTileRow, lane);
        if constexpr (kDivided) {
          const T* const own = shared.z + now * kWide + first;
          product.for_each(
              [&](int i, int column, T& element) { element += row_weight[i] * own[column]; });
        }
        TORCH_SPE_UNROLL
        for (int j = 0; j < kSixteens; ++j) {
          if (!walk.within || !sees_sixteen(walk, j)) continue;
          within.template multiply_fragment<Major::kOuter>(
              weights[j], col_x + 16 * j * kTileRow + first, kTileRow, lane);
        }
        const auto finish = [&](auto is_elu) {
          finish_features(product, within, is_elu, rows.map, reads_x, wants_terms,
                          row_x + first_of_warp() + first, col_x + first_of_warp() + first, fade,
                          scale, row_terms);
        };
        if (rows.map == core::FeatureMap::kElu) {
          finish(std::true_type{});
        } else {
          finish(std::false_type{});
        }
      }
      __syncwarp();
      const std::int64_t first_row = rows.index(chunk.batch, chunk.begin, head);
      if (grad != nullptr)
        write_warp_rows(row_x, grad + first_row * features + t * kWide, heads * features,
                        chunk.size, static_cast<int>(min_of(kWide, features - t * kWide)),
                        rows_are_aligned<Operand>(grad, features),
                        [&](int row) { return rows.is_padding(chunk.batch, chunk.begin + row); });
      if (makes_values)
        write_warp_rows(row_y_of(step), grad_values + first_row * values, heads * values,
                        chunk.size, static_cast<int>(values),
                        rows_are_aligned<Operand>(grad_values, values),
                        [&](int row) { return rows.is_padding(chunk.batch, chunk.begin + row); });
      if constexpr (Decay::kFades && !kDivided) {
        if (wants_terms) {
          const std::int64_t at = (steps.first_slot + steps.number(step)) * heads + head;
          at_tile<kTiles>(t, [&](auto own) {
            constexpr int kOwn = decltype(own)::value;
            terms.template take_rounded<Operand>(state[kOwn], at * kTiles + kOwn, &passing);
          });
          if (t + 1 == kTiles) {
            const std::int64_t to =
                (chunk.batch * heads + head) * terms.length + chunk.begin + first_row_of_thread();
            TORCH_SPE_UNROLL
            for (int i = 0; i < 2; ++i) {
              const int row = first_row_of_thread() + 8 * i;
              const bool inside = row < chunk.size;
              const bool counts = inside && !rows.is_padding(chunk.batch, chunk.begin + row);
              terms.write_row(to + 8 * i, inside, counts ? row_terms.past[i] : T(0),
                              counts ? row_terms.own[i] : T(0));
            }
            terms.write_passing(passing, 0, at);
          }
        }
      }
      if (!passes) continue;
      const core::Passage<T> passage = factors.over_chunk(chunk.size, walk.backwards);
      if constexpr (kDivided) {
        TORCH_SPE_UNROLL
        for (T& sum : z) sum = core::carry(passage, 0, sum);
      }
      at_tile<kTiles>(t, [&](auto own) {
        pass_over_chunk(
            state[decltype(own)::value], factors, passage, col_x, col_y,
            [&]([[maybe_unused]] const std::uint32_t (&fragment)[4], [[maybe_unused]] int k) {
              if constexpr (kDivided) {
                std::uint32_t pairs[2];
                shared.weights.fragment(parity + 16 * k, pairs);
                mma_m16n8k16<Operand>(z, fragment, pairs);
              }
            });
      });
      if constexpr (kTiles == 1) store_state(0, (step + 1) % 2);
    }
  }
}

// Gradients of the rows' features, as make_features has it, and of their values where `grad_values`
// is not null, for one tile of features.
template <class Operand, class Decay, class T = core::accumulate_t<Operand>>
void make_warp_features(const Tokens<Operand>& rows, const Tokens<Operand>& columns,
                        const Walk& walk, const States<T>& states, const StepTerms<T>& terms,
                        bool is_divided, Operand* grad, Operand* grad_values, const Decay& decay,
                        Stream stream) {
  const std::int64_t blocks = walk.segments.slots() * states.heads;
  if (blocks == 0) return;
  const auto make = [&](auto tiles, auto divided) {
    constexpr int kTiles = decltype(tiles)::value;
    constexpr bool kDivided = decltype(divided)::value;
    MemoryLayout size;
    WarpFeaturesShared<Operand, Decay, kTiles, kDivided>{size};
    launch(warp_features_kernel<Operand, Decay, kTiles, kDivided>, grid_of(blocks), dim3(kThreads),
           size.size(), stream, rows, columns, walk, states, terms, grad, grad_values, decay);
  };
  if (is_divided) {
    make(std::integral_constant<int, 1>{}, std::true_type{});
  } else if (states.features <= kWide) {
    make(std::integral_constant<int, 1>{}, std::false_type{});
  } else if (states.features <= 2 * kWide) {
    make(std::integral_constant<int, 2>{}, std::false_type{});
  } else {
    make(std::integral_constant<int, 3>{}, std::false_type{});
  }
}

}  // namespace torch_spe::cuda::attention
