// What walks of 16-bit operands have in common whose warps have 16 rows of a chunk each: weights of
// a row, what it fades by and what it is divided by stay with its warp, so that a chunk has one
// barrier, while the tiles of the next one are copied.
#pragma once

#include "walk.h"
#include "warp_product.h"

namespace torch_spe::cuda::attention {

constexpr int kWarpRows = 16;
constexpr int kSixteens = kThreads / 32;  // of the rows, or columns, of a chunk
constexpr int kTileRow = row_of<core::BFloat16>(kWide);
constexpr int kMostTiles = 3;      // of features
constexpr int kBlocksOfWarps = 3;  // of a multiprocessor, where the state is one tile

// The rows of a thread's elements are the first two: first_row() and that plus 8.
TORCH_SPE_DEVICE int first_row_of_thread() {
  const int thread = thread_read_again();
  return thread / 32 * kWarpRows + thread % 32 / 4;
}

// Calls function(tile) with the number of a tile as a constant, so that what belongs to it can be
// in registers while the loop over tiles is one: unrolled, it would not stay in the cache of
// instructions.
template <int kTiles, class Function>
TORCH_SPE_DEVICE void at_tile(int tile, const Function& function) {
  if constexpr (kTiles == 1) {
    function(std::integral_constant<int, 0>{});
  } else if (tile == 0) {
    function(std::integral_constant<int, 0>{});
  } else if (kTiles == 2 || tile == 1) {
    function(std::integral_constant<int, 1>{});
  } else {
    function(std::integral_constant<int, kTiles - 1>{});
  }
}

// Puts phi in the place of the elements of a fragment.
template <class Operand>
TORCH_SPE_DEVICE void map_fragment(core::FeatureMap map, std::uint32_t (&fragment)[4]) {
  if (map == core::FeatureMap::kElu) {
    TORCH_SPE_UNROLL
    for (std::uint32_t& pair : fragment) {
      float low, high;
      map_elu_pair<Operand>(pair, &low, &high);
      pair = pack_pair<Operand>(low, high);
    }
  } else if (map == core::FeatureMap::kRelu) {
    TORCH_SPE_UNROLL
    for (std::uint32_t& pair : fragment) pair = map_relu_pair(pair);
  }
}

// The 16 rows of a warp, kWide values deep, as fragments of mma in registers.
template <class Operand>
struct WarpRows {
  std::uint32_t fragments[kWide / 16][4];

  // From a tile of the block.
  TORCH_SPE_DEVICE void load(const Operand* tile) {
    const int thread = static_cast<int>(threadIdx.x);
    TORCH_SPE_UNROLL
    for (int k = 0; k < kWide / 16; ++k)
      load_fragment<Major::kDepth>(fragments[k], tile + thread / 32 * kWarpRows * kTileRow + 16 * k,
                                   kTileRow, thread % 32);
  }
  TORCH_SPE_DEVICE void map(core::FeatureMap map) {
    TORCH_SPE_UNROLL
    for (int k = 0; k < kWide / 16; ++k) map_fragment<Operand>(map, fragments[k]);
  }
};

// The products of a warp's rows with 16 columns, which begin at `columns`.
template <class Operand>
TORCH_SPE_DEVICE void multiply_sixteen(WarpProduct<Operand, kWarpRows, 16>& sums,
                                       const WarpRows<Operand>& rows, const Operand* columns,
                                       int lane) {
  sums.clear();
  TORCH_SPE_UNROLL
  for (int k = 0; k < kWide / 16; ++k)
    sums.template multiply_fragment<Major::kDepth>(rows.fragments[k], columns + 16 * k, kTileRow,
                                                   lane);
}

// A vector in shared memory as factor B of a product: all columns are the same, and so are the
// elements of each row of the result.
template <class Operand>
TORCH_SPE_DEVICE void load_vector(std::uint32_t (&out)[2], const Operand* from) {
  const Operand* const own = from + threadIdx.x % 4 * 2;
  out[0] = *reinterpret_cast<const std::uint32_t*>(own);
  out[1] = *reinterpret_cast<const std::uint32_t*>(own + 8);
}

// Writes the 16 rows of a warp from a tile that only it uses to rows `stride` apart, of which there
// are `count` in the block; those where is_zero(row) become 0.
template <class Storage, class Zero>
TORCH_SPE_DEVICE void write_warp_rows(const Storage* tile, Storage* out, std::int64_t stride,
                                      int count, int columns, bool aligned, const Zero& is_zero) {
  constexpr int kVectors = kWide / 8;
  const int thread = thread_read_again();
  TORCH_SPE_UNROLL
  for (int i = 0; i < kWarpRows * kVectors / 32; ++i) {
    const int vector = thread % 32 + 32 * i;
    const int row = thread / 32 * kWarpRows + vector / kVectors, column = vector % kVectors * 8;
    if (row >= count) continue;
    auto eight = *reinterpret_cast<const Vector<Storage>*>(tile + row * kTileRow + column);
    if (is_zero(row)) eight = {};
    Storage* const to = out + row * stride + column;
    if (aligned && column + 8 <= columns) {
      *reinterpret_cast<Vector<Storage>*>(to) = eight;
    } else {
      TORCH_SPE_UNROLL
      for (int e = 0; e < 8; ++e) {
        if (column + e < columns) to[e] = eight.values[e];
      }
    }
  }
}

// What the tokens of a chunk fade by. Those of two sixteens meet at the ends of both: what lies
// between is the product of the way from each to the end of its own and of the sixteens between
// them; within 16 tokens a table is made of products of the steps. None is a quotient.
template <class Decay, class T>
struct WarpFactors {
  static constexpr int kCount = Decay::kFades ? kSixteens * kWarpRows : 0;
  static constexpr int kSize = 5 * kCount;
  static constexpr int kRow = 24;  // of the table: pairs are read without conflicts
  T* steps;                        // [token], exp of each step
  T* from_start;                   // [token], from the start of its sixteen, inclusive
  T* to_end;                       // [token], to the end of its sixteen
  T* reading;                      // [token], when it reads the state
  T* adding;                       // [token], when it is added to the state

  TORCH_SPE_DEVICE explicit WarpFactors(T* place)
      : steps(place),
        from_start(place + kCount),
        to_end(place + 2 * kCount),
        reading(place + 3 * kCount),
        adding(place + 4 * kCount) {}

  // What a thread reads of the next chunk's factors, before they are wanted.
  struct Ahead {
    T first = 0, reading = 0;
  };
  TORCH_SPE_DEVICE static Ahead read(const Decay& decay, const Part& chunk, std::int64_t head,
                                     bool backwards) {
    Ahead ahead;
    if constexpr (Decay::kFades) {
      const int thread = thread_read_again(), token = token_of(thread);
      if (token < chunk.size) {
        const std::int64_t n = chunk.begin + token;
        const std::int64_t i = decay.index(chunk.batch, n, head);
        if (thread % 32 < kWarpRows) {
          ahead.first = static_cast<T>(decay.steps.at(chunk.batch, n, head, 0));
          ahead.reading = decay.reading(i, backwards);
        } else {
          ahead.first = decay.adding(i, backwards);
        }
      }
    }
    return ahead;
  }
  // A warp makes the factors of its 16 tokens; a barrier must follow.
  TORCH_SPE_DEVICE void fill(const Ahead& ahead) const {
    if constexpr (Decay::kFades) {
      const int thread = thread_read_again(), token = token_of(thread);
      const bool first_half = thread % 32 < kWarpRows;
      if (first_half) {
        steps[token] = fast_exp(ahead.first);
        reading[token] = ahead.reading;
      } else {
        adding[token] = ahead.first;
      }
      __syncwarp();
      // The way from the start in the first half of the lanes, to the end in the other one.
      const T* const own = steps + token / kWarpRows * kWarpRows;
      T factor = 1;
      TORCH_SPE_UNROLL
      for (int i = 0; i < kWarpRows; ++i) {
        if (first_half == (i <= token % kWarpRows)) factor *= own[i];
      }
      (first_half ? from_start : to_end)[token] = factor;
    }
  }
  // Of all these, what tokens fade by that are added to a state, and what it fades by itself, where
  // nothing else is wanted: read before they are, one a thread, and put in their place.
  TORCH_SPE_DEVICE static T read_passing(const Decay& decay, const Part& chunk, std::int64_t head,
                                         bool backwards) {
    if constexpr (Decay::kFades) {
      const int thread = thread_read_again(), token = thread % kCount;
      if (token >= chunk.size) return 0;
      const std::int64_t i = decay.index(chunk.batch, chunk.begin + token, head);
      return thread < kCount ? decay.adding(i, backwards) : decay.reading(i, backwards);
    }
    return 0;
  }
  TORCH_SPE_DEVICE void fill_passing(T ahead) const {
    if constexpr (Decay::kFades) {
      const int thread = thread_read_again();
      (thread < kCount ? adding : reading)[thread % kCount] = ahead;
    }
  }
  // A warp makes the factors between its own 16 tokens, after __syncwarp.
  TORCH_SPE_DEVICE void fill_table(T* table) const {
    const int thread = thread_read_again(), column = thread % kWarpRows;
    const bool down = thread % 32 < kWarpRows;
    const T* const own = steps + thread / 32 * kWarpRows;
    const int count = down ? kWarpRows - 1 - column : column, next = down ? 1 : -1;
    const T* step = own + column + (down ? 1 : 0);
    T* to = table + column * (kRow + 1);
    if (down) *to = 1;
    T factor = 1;
    TORCH_SPE_UNROLL
    for (int i = 0; i < kWarpRows - 1; ++i, step += next) {
      to += next * kRow;
      if (i < count) {
        factor *= *step;
        *to = factor;
      }
    }
  }
  // A fragment whose columns are the tokens from 16 k on, added to a state.
  template <class Operand>
  TORCH_SPE_DEVICE void fade_added(std::uint32_t (&fragment)[4], int k) const {
    if constexpr (Decay::kFades) {
      const T* const own = adding + 16 * k + thread_read_again() % 4 * 2;
      TORCH_SPE_UNROLL
      for (int e = 0; e < 4; ++e) {
        T low, high;
        unpack_pair<Operand>(fragment[e], &low, &high);
        fragment[e] = pack_pair<Operand>(low * own[e / 2 * 8], high * own[e / 2 * 8 + 1]);
      }
    }
  }
  // What a state fades by over a chunk: the way from its start to the last of its tokens.
  TORCH_SPE_DEVICE core::Passage<T> over_chunk(int size, bool backwards) const {
    if constexpr (Decay::kFades) return {(backwards ? adding : reading) + size - 1, 0};
    return {};
  }
  // What lies between two sixteens.
  TORCH_SPE_DEVICE T between(int a, int b) const {
    T factor = 1;
    TORCH_SPE_KEEP_LOOP
    for (int i = (a < b ? a : b) + 1; i < (a < b ? b : a); ++i)
      factor *= from_start[i * kWarpRows + kWarpRows - 1];
    return factor;
  }

 private:
  TORCH_SPE_DEVICE static int token_of(int thread) {
    return thread / 32 * kWarpRows + thread % kWarpRows;
  }
};

// Multiplies weights between the warp's rows and the 16 columns from 16 j on by what lies between
// them, and those that are not seen by 0.
template <class Decay, class Operand, class T>
TORCH_SPE_DEVICE void fade_weights(WarpProduct<Operand, kWarpRows, 16>& weights, int j,
                                   const Walk& walk, const WarpFactors<Decay, T>& factors,
                                   const T* table) {
  const int thread = thread_read_again(), warp = thread / 32, row = thread % 32 / 4;
  if (j == warp) {
    weights.for_each([&](int i, int column, T& weight) {
      const int own = row + 8 * i;
      const bool seen = !walk.masked || (walk.backwards ? column >= own : column <= own);
      if constexpr (Decay::kFades) weight *= table[own * WarpFactors<Decay, T>::kRow + column];
      weight = seen ? weight : T(0);
    });
  } else if constexpr (Decay::kFades) {
    const bool after = j > warp;
    const T between = factors.between(j, warp);
    const T* const of_rows = (after ? factors.to_end : factors.from_start) + warp * kWarpRows + row;
    const T* const of_columns = (after ? factors.from_start : factors.to_end) + 16 * j;
    const T own[2] = {of_rows[0] * between, of_rows[8] * between};
    weights.for_each([&](int i, int column, T& weight) { weight *= own[i] * of_columns[column]; });
  }
}

// The warp's 16 rows of a tile of the state pass over a chunk, whose tokens are those of the tiles;
// also(fragment, k) takes the factors of the product that adds them.
template <class Decay, class Operand, class T, class Also>
TORCH_SPE_DEVICE void pass_over_chunk(WarpProduct<Operand, kWarpRows, kWide>& state,
                                      const WarpFactors<Decay, T>& factors,
                                      const core::Passage<T>& passage, const Operand* col_x,
                                      const Operand* col_y, const Also& also) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  state.for_each([&](int, int, T& element) { element = core::carry(passage, 0, element); });
  TORCH_SPE_UNROLL
  for (int k = 0; k < kSixteens; ++k) {
    std::uint32_t fragment[4];
    load_fragment<Major::kOuter>(fragment, col_x + 16 * k * kTileRow + warp * kWarpRows, kTileRow,
                                 lane);
    factors.template fade_added<Operand>(fragment, k);
    state.template multiply_fragment<Major::kOuter>(fragment, col_y + 16 * k * kTileRow, kTileRow,
                                                    lane);
    also(fragment, k);
  }
}

// The factors of the chunks' tokens: copied into shared memory a chunk ahead of the tiles that they
// belong to, and so there for all threads when these have been copied.
template <class T, int kTokens>
class FactorsAhead {
 public:
  TORCH_SPE_INLINE explicit FactorsAhead(MemoryLayout& layout, bool wanted = true)
      : ring_(layout.take<RowFactors<T>>(wanted ? 3 * kTokens : 0)) {}

  // Starts to copy those of a step, `stride` apart from `from` on; there for all after
  // copy_async_wait and a barrier.
  TORCH_SPE_DEVICE void begin(const RowFactors<T>* from, std::int64_t stride, int size,
                              int step) const {
    static_assert(sizeof(RowFactors<T>) == 16);
    const int token = static_cast<int>(threadIdx.x);
    if (token < size) copy_async16(ring_ + step % 3 * kTokens + token, from + token * stride);
  }
  TORCH_SPE_DEVICE const RowFactors<T>* of(int step) const { return ring_ + step % 3 * kTokens; }

 private:
  RowFactors<T>* ring_;
};

// Whether the warp's rows see some of the 16 columns from 16 j on.
TORCH_SPE_DEVICE bool sees_sixteen(const Walk& walk, int j) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  return !walk.masked || (walk.backwards ? j >= warp : j <= warp);
}

}  // namespace torch_spe::cuda::attention
