// How a block walks through a segment of a sequence, chunk by chunk, with the state of the tokens
// it has passed.
#pragma once

#include "states.h"

namespace torch_spe::cuda::attention {

struct Walk {
  Cut segments;  // one for each block
  Cut chunks;    // whose slots factors of the decay have
  // States change from chunk to chunk: when causal or with a decay. Otherwise rows read the total.
  bool moves = false;
  bool masked = false;     // rows see of their own chunk what is on their side, else all of it
  bool within = false;     // rows see their own chunk at all
  bool backwards = false;  // from the end: rows see the columns that follow them
};

// The chunks of a block's segment, in the order of the walk.
template <int kTokens>
struct Steps {
  Part segment;
  std::int64_t first_slot;  // of chunks
  int count;
  bool backwards;

  TORCH_SPE_DEVICE Steps(const Walk& walk, std::int64_t slot)
      : segment(walk.segments, slot),
        first_slot(walk.chunks.first_slot(segment.sequence) +
                   segment.number * (walk.segments.size / kTokens)),
        count((segment.size + kTokens - 1) / kTokens),
        backwards(walk.backwards) {}
  TORCH_SPE_DEVICE int number(int step) const { return backwards ? count - 1 - step : step; }
  TORCH_SPE_DEVICE Part chunk(int step) const {
    Part chunk = segment;
    const int begin = number(step) * kTokens;
    chunk.begin += begin;
    chunk.size = segment.size - begin < kTokens ? segment.size - begin : kTokens;
    return chunk;
  }
};

// The state that a block takes along: where it comes from, and where it is kept on the way if it
// has more than one tile.
template <class T>
struct WalkingState {
  const T *s, *z;      // [R, E], [R] or null
  T *kept_s, *kept_z;  // the same; null for a state of one tile, which stays in registers
  std::int64_t features, values;

  // Blocks of a segment take S in tiles of disjoint columns or rows, but every one needs all of z:
  // there are `copies` of that.
  TORCH_SPE_DEVICE WalkingState(const States<T>& states, bool moves, std::int64_t slot,
                                std::int64_t sequence, std::int64_t head, std::int64_t copy,
                                std::int64_t copies)
      : features(states.features), values(states.values) {
    const std::int64_t own = slot * states.heads + head, size = features * values;
    const std::int64_t from = moves ? own : sequence * states.heads + head;
    s = (moves ? states.segment_s : states.total_s) + from * size;
    z = moves ? states.segment_z : states.total_z;
    if (z != nullptr) z += from * features;
    kept_s = states.walk_s == nullptr ? nullptr : states.walk_s + own * size;
    kept_z = states.walk_z == nullptr ? nullptr : states.walk_z + (own * copies + copy) * features;
  }
  // After the first chunk.
  TORCH_SPE_DEVICE void has_moved() {
    s = kept_s;
    z = kept_z;
  }
  // The tile at (r0, e0) as operands in shared memory, zero outside; after a barrier that follows
  // its last write.
  template <class Operand>
  TORCH_SPE_DEVICE void load(std::int64_t r0, std::int64_t e0, Operand* out) const {
    const T* const from = s + r0 * values + e0;
    const int rows = static_cast<int>(min_of(kWide, features - r0));
    const int columns = static_cast<int>(min_of(kWide, values - e0));
    const int stride = static_cast<int>(values);
    load_state<kWide, kWide>(out, [&](int row, int column, T(&four)[4]) {
      TORCH_SPE_UNROLL
      for (int i = 0; i < 4; ++i)
        four[i] = row < rows && column + i < columns ? from[row * stride + column + i] : T(0);
    });
  }
  // The same in registers; each thread reads what it has written itself.
  template <class Tile>
  TORCH_SPE_DEVICE void read(std::int64_t r0, std::int64_t e0, Tile& tile) const {
    const T* const from = s + r0 * values + e0;
    const int rows = static_cast<int>(min_of(kWide, features - r0));
    const int columns = static_cast<int>(min_of(kWide, values - e0));
    const int stride = static_cast<int>(values);
    tile.for_each([&](int row, int column, T& element) {
      element = row < rows && column < columns ? from[row * stride + column] : T(0);
    });
  }
  // The same row by row, with which a warp's tile takes fewer registers and a block's more.
  template <class Tile>
  TORCH_SPE_DEVICE void read_rows(std::int64_t r0, std::int64_t e0, Tile& tile) const {
    const T* const from = s + r0 * values + e0;
    const int rows = static_cast<int>(min_of(kWide, features - r0));
    const int columns = static_cast<int>(min_of(kWide, values - e0));
    tile.for_each_row([&](int row) {
      const T* const own = from + row * values;
      const int end = row < rows ? columns : 0;
      return [=](int column, T& element) { element = column < end ? own[column] : T(0); };
    });
  }
  template <class Tile>
  TORCH_SPE_DEVICE void write(std::int64_t r0, std::int64_t e0, Tile& tile) const {
    T* const to = kept_s + r0 * values + e0;
    const int rows = static_cast<int>(min_of(kWide, features - r0));
    const int columns = static_cast<int>(min_of(kWide, values - e0));
    const int stride = static_cast<int>(values);
    tile.for_each([&](int row, int column, T element) {
      if (row < rows && column < columns) to[row * stride + column] = element;
    });
  }
  TORCH_SPE_DEVICE T z_at(std::int64_t r) const { return r < features ? z[r] : T(0); }
};

// What rows read from the state of the other direction, where all tokens are seen with a decay: a
// walk of its own writes it, the walk that makes the results adds it.
template <class T>
struct OtherDirection {
  T* sums = nullptr;          // [B, L, H, columns of the results], or null
  T* denominators = nullptr;  // [B, L, H], or null
  bool writes = false;
};

// Copies a tile of 16-bit results from shared memory to rows `stride` apart, 16 bytes at once where
// `aligned`.
template <int kRows, class Storage>
TORCH_SPE_DEVICE void write_tile(const Storage* tile, Storage* out, std::int64_t stride, int count,
                                 int columns, bool aligned) {
  constexpr int kRow = row_of<Storage>(kWide), kVectors = kWide / 8;
  const int thread = thread_read_again();
  TORCH_SPE_UNROLL
  for (int i = 0; i < kRows * kVectors / kThreads; ++i) {
    const int vector = thread + i * kThreads;
    const int row = vector / kVectors, column = vector % kVectors * 8;
    if (row >= count) continue;
    const Storage* const from = tile + row * kRow + column;
    Storage* const to = out + row * stride + column;
    if (aligned && column + 8 <= columns) {
      *reinterpret_cast<Vector<Storage>*>(to) = *reinterpret_cast<const Vector<Storage>*>(from);
    } else {
      for (int e = 0; e < 8; ++e) {
        if (column + e < columns) to[e] = from[e];
      }
    }
  }
}

// Writes a tile of results to rows `stride` apart. rows(row) returns what makes a result of
// (column, value); `staging` is shared memory of the tile's size, which nobody reads but rows, each
// element where its result is made. All threads take part; a barrier must follow before `staging`
// is used again.
template <int kRows, class Storage, class Product, class Rows>
TORCH_SPE_DEVICE void write_results(Product& product, void* staging, Storage* out,
                                    std::int64_t stride, int count, int columns, bool aligned,
                                    const Rows& rows) {
  using T = core::accumulate_t<Storage>;
  if constexpr (sizeof(Storage) == 2) {
    Storage* const tile = static_cast<Storage*>(staging);
    product.template store<Storage>(tile, rows);
    __syncthreads();
    write_tile<kRows>(tile, out, stride, count, columns, aligned);
  } else {
    product.for_each_row([&](int row) {
      const auto make = rows(row);
      Storage* const to = out + row * stride;
      const int end = row < count ? columns : 0;
      return [=](int column, T value) {
        if (column < end) write(make(column, value), to + column);
      };
    });
  }
}

}  // namespace torch_spe::cuda::attention
