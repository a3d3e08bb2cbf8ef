// What values.h makes, for 16-bit operands and up to kMostTiles tiles of features: with the state
// in registers, and the next tiles copied while these are multiplied.
#pragma once

#include "warp_walk.h"

namespace torch_spe::cuda::attention {

// With a decay and more tiles, registers do not suffice for denominators and for results of both
// directions.
template <class Decay, int kTiles>
constexpr bool kIsWhole = !Decay::kFades || kTiles == 1;

template <class Operand, class Decay, int kTiles>
struct WarpValuesShared {
  using T = core::accumulate_t<Operand>;
  static constexpr int kTile = kChunk<Operand> * kTileRow;
  // One state is read while the next one is written; of several tiles, each is written while others
  // are read.
  static constexpr int kStates = kTiles == 1 ? 2 : kTiles;
  Operand* row_x;  // [2][row, r], then results: now and next
  Operand* col_x;  // [2][column, r]
  Operand* col_y;  // [2][column, e]
  Operand* state;  // [kStates][r, e]
  Operand* z;      // [kStates][r], rounded as the state is
  T* z_sums;       // [kTiles][r], of which each thread has its own
  T* factors;      // [2], WarpFactors

  TORCH_SPE_INLINE explicit WarpValuesShared(MemoryLayout& layout)
      : row_x(layout.take<Operand>(2 * kTile)),
        col_x(layout.take<Operand>(2 * kTile)),
        col_y(layout.take<Operand>(2 * kTile)),
        state(layout.take<Operand>(kStates * kTile)),
        z(layout.take<Operand>(kStates * kWide)),
        z_sums(layout.take<T>(kTiles * kWide)),
        factors(layout.take<T>(2 * WarpFactors<Decay, T>::kSize)) {}
};

// Of the rows of a thread: what is read where all are divided, and what they are multiplied by.
template <class T>
struct RowQuotients {
  T scale[2] = {1, 1}, inverse[2] = {1, 1};
};

// Divisors of rows. `denominators` are sums of the weights, or unused; `product` has the rows'
// values, zero outside.
// values_kernel has the same for rows whose sums are in shared memory: in each form of one function
// for both that was tried, registers of one of these kernels spilled. They are as scarce as that:
// kReadsAgain takes fewer with a decay and more without one.
template <bool kReadsAgain, class Product, class T>
TORCH_SPE_DEVICE RowQuotients<T> divide_rows(Product& product, const T (&denominators)[2],
                                             const RowDivision<T>& division,
                                             const OtherDirection<T>& other, std::int64_t first_row,
                                             std::int64_t heads, int size, std::int64_t values,
                                             int tile) {
  RowQuotients<T> quotients;
  const auto again = [](auto value) {
    if constexpr (kReadsAgain) return read_again(value);
    return value;
  };
  if (division.by == Divide::kNot) return quotients;
  T divisors[2] = {denominators[0], denominators[1]};
  if (division.by == Divide::kByRms || division.by == Divide::kSumSquares) {
    divisors[0] = divisors[1] = 0;
    product.for_each([&](int i, int, T value) { divisors[i] += value * value; });
    TORCH_SPE_UNROLL
    for (T& divisor : divisors) divisor = quad_sum(divisor);
  }
  TORCH_SPE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int row = first_row_of_thread() + 8 * i;
    if (row >= size) continue;
    const std::int64_t at = first_row + row * heads;
    T divisor = divisors[i];
    const bool is_first = thread_read_again() % 4 == 0;
    if (division.by == Divide::kByDenominator) {
      if (other.denominators != nullptr) divisor += other.denominators[at];
      divisor += division.eps;
    } else if (division.by == Divide::kByGiven) {
      divisor = division.divisor[at];
    } else {
      if (division.by == Divide::kBySquares) {
        divisor = 0;
        const std::int64_t count = ceil_div(again(values), kWide);
        for (int j = 0; j < count; ++j) divisor += division.squares[j * division.rows + at];
      } else if (division.by == Divide::kSumSquares && is_first) {
        division.squares[again(tile) * division.rows + at] = divisor;
      }
      divisor = square_root(divisor / static_cast<T>(again(values)) + division.eps);
    }
    if (division.writes(tile) && is_first) division.divisor[at] = divisor;
    const Quotient<T> quotient(divisor);
    quotients.scale[i] = quotient.scale;
    quotients.inverse[i] = quotient.inverse;
  }
  return quotients;
}

// A block makes a tile of values of the rows of a segment.
template <class Operand, class Decay, int kTiles>
__global__ void __launch_bounds__(kThreads, kTiles == 1 ? 3 : 2)
    warp_values_kernel(const Tokens<Operand> rows, const Tokens<Operand> columns, const Walk walk,
                       const States<core::accumulate_t<Operand>> states,
                       const OtherDirection<core::accumulate_t<Operand>> other,
                       const RowDivision<core::accumulate_t<Operand>> division, Operand* out,
                       const Decay decay) {
  using T = core::accumulate_t<Operand>;
  using Shared = WarpValuesShared<Operand, Decay, kTiles>;
  using Factors = WarpFactors<Decay, T>;
  constexpr int kTokens = kChunk<Operand>, kTile = Shared::kTile;
  static_assert(kTokens == kSixteens * kWarpRows && kTokens == kWide);
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const Shared shared(layout);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const std::int64_t features = states.features, values = states.values;
  const int tiles = static_cast<int>(ceil_div(values, kWide));
  const int heads = static_cast<int>(states.heads), block = static_cast<int>(blockIdx.x);
  const int tile = block % tiles, head = block / tiles % heads, slot = block / tiles / heads;
  const auto first_value = [&] { return read_again(tile) * std::int64_t{kWide}; };
  const Steps<kTokens> steps(walk, slot);
  if (steps.segment.size == 0) return;
  const bool sums_denominators = kIsWhole<Decay, kTiles> && division.by == Divide::kByDenominator;
  const WalkingState<T> from(states, walk.moves, slot, steps.segment.sequence, head, tile, tiles);
  const std::uint32_t ones = pack_pair<Operand>(1, 1);
  const std::uint32_t vector_of_ones[2] = {ones, ones};

  // A warp has 16 rows of each tile of the state, and their z.
  WarpProduct<Operand, kWarpRows, kWide> state[kTiles];
  // Of that, every fourth lane has two elements.
  const bool has_z = sums_denominators && lane % 4 == 0;
  const auto own_z = [&](int t) { return shared.z_sums + t * kWide + first_row_of_thread(); };
  const auto store_state = [&](int t, int to) {
    state[t].store(shared.state + to * kTile);
    if (!has_z) return;
    const T* const sums = own_z(t);
    Operand* const z = shared.z + to * kWide + first_row_of_thread();
    write(sums[0], z);
    write(sums[8], z + 8);
  };
  TORCH_SPE_UNROLL
  for (int t = 0; t < kTiles; ++t) {
    from.read_rows(t * kWide, first_value(), state[t]);
    if (has_z) {
      own_z(t)[0] = from.z_at(t * kWide + first_row_of_thread());
      own_z(t)[8] = from.z_at(t * kWide + first_row_of_thread() + 8);
    }
    store_state(t, t);
  }

  typename Factors::Ahead ahead;
  const auto begin_tiles = [&](int step, int t, int to) {
    Part chunk = steps.chunk(step);
    // Read again, or what follows from it would be kept in registers.
    chunk.batch = read_again(chunk.batch);
    const std::int64_t r0 = t * kWide, own_head = read_again(std::int64_t{head});
    rows.template copy_x<kTokens, kWide>(chunk, own_head, r0, features, shared.row_x + to * kTile);
    if (walk.moves) {
      columns.template begin_x<kTokens, kWide>(chunk, own_head, r0, features,
                                               shared.col_x + to * kTile);
      if (t == 0)
        columns.template begin_y<kTokens, kWide>(chunk, own_head, first_value(), values,
                                                 shared.col_y + step % 2 * kTile);
    }
    if (Decay::kFades && t == 0) {
      const bool backwards = read_again(std::int64_t{walk.backwards}) != 0;
      ahead = Factors::read(decay, chunk, own_head, backwards);
    }
  };
  begin_tiles(0, 0, 0);
  TORCH_SPE_KEEP_LOOP
  for (int step = 0; step < steps.count; ++step) {
    const bool passes = walk.moves && step + 1 < steps.count;
    Operand* const col_y = shared.col_y + step % 2 * kTile;
    const Factors factors(shared.factors + step % 2 * Factors::kSize);
    WarpProduct<Operand, kWarpRows, kWide> product;
    WarpProduct<Operand, kWarpRows, 16> weights[kTiles == 1 ? 1 : kSixteens];
    T denominators[4] = {};
    product.clear();
    if constexpr (kTiles > 1) {
      TORCH_SPE_UNROLL
      for (int j = 0; j < kSixteens; ++j) weights[j].clear();
    }
    TORCH_SPE_KEEP_LOOP
    for (int t = 0; t < kTiles; ++t) {
      const int stage = (step * kTiles + t) % 2;
      const Part chunk = steps.chunk(read_again(step));
      Operand* const row_x = shared.row_x + stage * kTile;
      Operand* const col_x = shared.col_x + stage * kTile;
      copy_async_wait();
      if (walk.moves) {
        columns.template finish_x<kTokens, kWide>(chunk, head, t * kWide, features, col_x);
        if (t == 0)
          columns.template finish_y<kTokens, kWide>(chunk, head, first_value(), values, col_y);
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

      const int at = kTiles == 1 && walk.moves ? step % 2 : t;
      const auto multiply_state = [&](const std::uint32_t (&fragment)[4], int k) {
        product.template multiply_fragment<Major::kOuter>(
            fragment, shared.state + at * kTile + 16 * k * kTileRow, kTileRow, lane);
        if (!sums_denominators) return;
        std::uint32_t pairs[2];
        load_vector(pairs, shared.z + at * kWide + 16 * k);
        mma_m16n8k16<Operand>(denominators, fragment, pairs);
      };
      const auto multiply_columns = [&](WarpProduct<Operand, kWarpRows, 16>& sums, int j,
                                        const std::uint32_t (&fragment)[4], int k) {
        sums.template multiply_fragment<Major::kDepth>(fragment, col_x + 16 * j * kTileRow + 16 * k,
                                                       kTileRow, lane);
      };
      T* const table = reinterpret_cast<T*>(row_x + warp * kWarpRows * kTileRow);
      const auto fade = [&] {
        if constexpr (Decay::kFades) {
          const T* const own = factors.reading + first_row_of_thread();
          product.for_each([&](int i, int, T& element) { element *= own[8 * i]; });
          TORCH_SPE_UNROLL
          for (int i = 0; i < 4; ++i) denominators[i] *= own[i / 2 * 8];
          __syncwarp();  // the rows are in registers
          if (walk.within) factors.fill_table(table);
          __syncwarp();
        }
      };
      const auto add_columns = [&](WarpProduct<Operand, kWarpRows, 16>& sums, int j) {
        fade_weights(sums, j, walk, factors, table);
        std::uint32_t fragment[4];
        sums.to_fragment(fragment);
        product.template multiply_fragment<Major::kOuter>(fragment, col_y + 16 * j * kTileRow,
                                                          kTileRow, lane);
        if (sums_denominators) mma_m16n8k16<Operand>(denominators, fragment, vector_of_ones);
      };
      if constexpr (kTiles == 1) {
        WarpRows<Operand> x;
        x.load(row_x);
        x.map(rows.map);
        TORCH_SPE_UNROLL
        for (int k = 0; k < kWide / 16; ++k) multiply_state(x.fragments[k], k);
        fade();
        TORCH_SPE_UNROLL
        for (int j = 0; j < kSixteens; ++j) {
          if (!walk.within || !sees_sixteen(walk, j)) continue;
          WarpProduct<Operand, kWarpRows, 16> sums;
          multiply_sixteen(sums, x, col_x + 16 * j * kTileRow, lane);
          add_columns(sums, j);
        }
      } else {
        TORCH_SPE_KEEP_LOOP
        for (int k = 0; k < kWide / 16; ++k) {
          std::uint32_t fragment[4];
          load_fragment<Major::kDepth>(fragment, row_x + warp * kWarpRows * kTileRow + 16 * k,
                                       kTileRow, lane);
          map_fragment<Operand>(rows.map, fragment);
          multiply_state(fragment, k);
          TORCH_SPE_UNROLL
          for (int j = 0; j < kSixteens; ++j) {
            if (walk.within && sees_sixteen(walk, j)) multiply_columns(weights[j], j, fragment, k);
          }
        }
        if (t + 1 == kTiles) {
          fade();
          TORCH_SPE_UNROLL
          for (int j = 0; j < kSixteens; ++j) {
            if (walk.within && sees_sixteen(walk, j)) add_columns(weights[j], j);
          }
        }
      }

      if (t + 1 == kTiles) {
        const std::int64_t first_row = rows.index(chunk.batch, chunk.begin, head);
        const std::int64_t e0 = first_value();
        const int end = static_cast<int>(min_of(kWide, values - e0));
        bool finishes = true;
        if constexpr (Decay::kFades && kIsWhole<Decay, kTiles>) {
          if (other.sums != nullptr) {
            T* const sums = other.sums + first_row * values + e0;
            product.for_each_row([&](int row) {
              T* const own = sums + row * heads * values;
              const int columns_of_row = row < chunk.size ? end : 0;
              return [=](int column, T& element) {
                if (column >= columns_of_row) return;
                if (other.writes) {
                  own[column] = element;
                } else {
                  element += own[column];
                }
              };
            });
            if (other.writes && sums_denominators && tile == 0 && lane % 4 == 0) {
              TORCH_SPE_UNROLL
              for (int i = 0; i < 2; ++i) {
                const int row = first_row_of_thread() + 8 * i;
                if (row < chunk.size)
                  other.denominators[first_row + row * heads] = denominators[2 * i];
              }
            }
            finishes = !other.writes;
          }
        }
        if (finishes) {
          const T sums[2] = {denominators[0], denominators[2]};
          const RowQuotients<T> quotients = divide_rows<Decay::kFades>(
              product, sums, division, other, first_row, heads, chunk.size, values, tile);
          if (division.by != Divide::kSumSquares) {
            __syncwarp();  // rows and table have been used
            int number = 0;
            product.template store<Operand>(row_x, [&](int) {
              const T scale = quotients.scale[number], inverse = quotients.inverse[number];
              ++number;
              return [=](int, T value) { return value * scale * inverse; };
            });
            __syncwarp();
            write_warp_rows(row_x, out + first_row * values + e0, heads * values, chunk.size, end,
                            rows_are_aligned<Operand>(out, values), [&](int row) {
                              return rows.is_padding(chunk.batch, chunk.begin + row);
                            });
          }
        }
      }

      if (!passes) continue;
      // This tile of the state passes over the chunk.
      const core::Passage<T> passage = factors.over_chunk(chunk.size, walk.backwards);
      T added[4] = {};  // to z, in all columns of a product
      at_tile<kTiles>(t, [&](auto own_tile) {
        pass_over_chunk(state[decltype(own_tile)::value], factors, passage, col_x, col_y,
                        [&](const std::uint32_t (&fragment)[4], int) {
                          if (sums_denominators)
                            mma_m16n8k16<Operand>(added, fragment, vector_of_ones);
                        });
      });
      if (has_z) {
        T* const z = own_z(t);
        z[0] = core::carry(passage, 0, z[0]) + added[0];
        z[8] = core::carry(passage, 0, z[8]) + added[2];
      }
      if constexpr (kTiles == 1) store_state(0, (step + 1) % 2);
    }
  }
}

template <class Decay, class T>
bool warp_values_can(const Walk& walk, const States<T>& states, const OtherDirection<T>& other,
                     const RowDivision<T>& division) {
  if (states.values == 0 || states.features > kMostTiles * kWide) return false;
  // With one tile of features and a state that stays, values_kernel has fewer instructions.
  if (states.features <= kWide) return walk.moves;
  return kIsWhole<Decay, kMostTiles> ||
         (division.by != Divide::kByDenominator && other.sums == nullptr);
}

template <class Operand, class Decay, class T = core::accumulate_t<Operand>>
void make_warp_values(const Tokens<Operand>& rows, const Tokens<Operand>& columns, const Walk& walk,
                      const States<T>& states, const OtherDirection<T>& other,
                      const RowDivision<T>& division, Operand* out, const Decay& decay,
                      Stream stream) {
  const std::int64_t blocks = walk.segments.slots() * states.heads * ceil_div(states.values, kWide);
  if (blocks == 0) return;
  const auto make = [&](auto tiles) {
    constexpr int kTiles = decltype(tiles)::value;
    MemoryLayout size;
    WarpValuesShared<Operand, Decay, kTiles>{size};
    launch(warp_values_kernel<Operand, Decay, kTiles>, grid_of(blocks), dim3(kThreads), size.size(),
           stream, rows, columns, walk, states, other, division, out, decay);
  };
  if (states.features <= kWide) {
    make(std::integral_constant<int, 1>{});
    return;
  }
  if (states.features <= 2 * kWide) {
    make(std::integral_constant<int, 2>{});
  } else {
    make(std::integral_constant<int, 3>{});
  }
}

}  // namespace torch_spe::cuda::attention
