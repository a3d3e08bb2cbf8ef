// What the kernels of several operators share: tiles of tokens, copies into shared memory, sums of
// partial results.
#pragma once

#include "feature_maps.h"
#include "tile_product.h"

namespace torch_spe::cuda {

// The rows of a tile are tokens: for each of `positions` positions, `batch` rows of the batch,
// which share what depends on the position only.
struct TokenTiles {
  static constexpr std::int64_t kMostBatch = 16;
  std::int64_t batch_tiles;  // of the tensor
  int batch, positions;      // of a tile
  std::int64_t position_tiles;

  TORCH_SPE_INLINE TokenTiles(std::int64_t batch_size, std::int64_t length, int rows)
      : batch_tiles(ceil_div(batch_size, kMostBatch)),
        batch(static_cast<int>(ceil_div(batch_size, batch_tiles))),
        positions(rows / batch),
        position_tiles(ceil_div(length, positions)) {}
  TORCH_SPE_INLINE std::int64_t count() const { return batch_tiles * position_tiles; }
  TORCH_SPE_INLINE std::int64_t first_batch(std::int64_t tile) const {
    return tile / position_tiles * batch;
  }
  TORCH_SPE_INLINE std::int64_t first_position(std::int64_t tile) const {
    return tile % position_tiles * positions;
  }
};

// Takes an index of a block apart into those of its dimensions, the last one first.
class BlockIndices {
 public:
  TORCH_SPE_DEVICE explicit BlockIndices(std::uint32_t block) : rest_(block) {}
  TORCH_SPE_DEVICE std::uint32_t next(std::int64_t count) {
    const auto size = static_cast<std::uint32_t>(count);
    const std::uint32_t before = rest_ / size, index = rest_ - before * size;
    rest_ = before;
    return index;
  }
  TORCH_SPE_DEVICE std::uint32_t rest() const { return rest_; }

 private:
  std::uint32_t rest_;
};

// Into how many segments to cut sums over `tiles` tiles, where each has `blocks` blocks.
TORCH_SPE_INLINE std::int64_t num_segments(std::int64_t blocks, std::int64_t tiles) {
  return max_of(1, min_of(tiles, ceil_div(kWantedBlocks, max_of(1, blocks))));
}

// Whether rows that begin at `base` and multiples of `stride` elements from it can be copied in
// pieces of 16 bytes.
template <class Storage>
TORCH_SPE_INLINE bool rows_are_aligned(const void* base, std::int64_t stride) {
  constexpr std::int64_t kVector = 16 / static_cast<std::int64_t>(sizeof(Storage));
  return reinterpret_cast<std::uintptr_t>(base) % 16 == 0 && stride % kVector == 0;
}

// Whether that is so for all rows, along its last dimension, of a tensor.
template <class Storage, int kDims>
TORCH_SPE_INLINE bool is_aligned(const void* data, const std::int64_t (&strides)[kDims]) {
  bool aligned = strides[kDims - 1] == 1;
  TORCH_SPE_UNROLL
  for (int i = 0; i + 1 < kDims; ++i)
    aligned = aligned && rows_are_aligned<Storage>(data, strides[i]);
  return aligned;
}

// Copies a tile [kRows, kColumns] to shared memory as operands, zero from column `columns` on and
// in rows for which `row` gives null. The copy may go on until copy_async_wait.
template <int kRows, int kColumns, class Storage, class Operand, class Row>
TORCH_SPE_DEVICE void copy_tile(Operand* out, std::int64_t columns, std::int64_t stride,
                                bool aligned, const Row& row) {
  constexpr int kRow = row_of<Operand>(kColumns);
  if constexpr (sizeof(Operand) == 2) {
    if (aligned && stride == 1) {
      constexpr int kVectors = kColumns / 8;
      for (int i = static_cast<int>(threadIdx.x); i < kRows * kVectors; i += kThreads) {
        const Storage* const from = row(i / kVectors);
        const int column = i % kVectors * 8;
        Operand* const to = out + i / kVectors * kRow + column;
        if (from != nullptr && column + 8 <= columns) {
          copy_async16(to, from + column);
        } else {
          for (int e = 0; e < 8; ++e) {
            to[e].bits =
                from != nullptr && column + e < columns ? from[column + e].bits : std::uint16_t(0);
          }
        }
      }
      return;
    }
  }
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kColumns; i += kThreads) {
    const Storage* const from = row(i / kColumns);
    const int column = i % kColumns;
    using T = core::accumulate_t<Storage>;
    const T value = from != nullptr && column < columns ? read(from[column * stride]) : T(0);
    write(value, out + i / kColumns * kRow + column);
  }
}

// Puts phi in the place of what this thread has copied with copy_tile, between copy_async_wait and
// the barrier that follows it: whoever copies an element maps it, without another barrier.
template <int kRows, int kColumns, class Storage>
TORCH_SPE_DEVICE void map_copied_tile(FeatureMap map, Storage* tile, std::int64_t stride,
                                      bool aligned) {
  static_assert(sizeof(Storage) == 2);
  if (map == FeatureMap::kIdentity) return;
  constexpr int kRow = row_of<Storage>(kColumns);
  if (aligned && stride == 1) {
    constexpr int kVectors = kColumns / 8;
    TORCH_SPE_KEEP_LOOP
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kVectors; i += kThreads)
      map_eight_features(map, tile + i / kVectors * kRow + i % kVectors * 8);
  } else {
    TORCH_SPE_KEEP_LOOP
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kColumns; i += kThreads)
      map_one_feature(map, tile + i / kColumns * kRow + i % kColumns);
  }
}

// 16 bytes of values.
template <class Storage>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / static_cast<int>(sizeof(Storage));
  Storage values[kSize];
};

// Writes a group of values as operands, those of 16 bits all at once.
template <int kCount, class T, class Operand>
TORCH_SPE_DEVICE void write_operands(const T (&values)[kCount], Operand* out) {
  if constexpr (sizeof(Operand) == 2) {
    struct alignas(2 * kCount) Pairs {
      std::uint32_t of[kCount / 2];
    } pairs;
    TORCH_SPE_UNROLL
    for (int e = 0; e < kCount; e += 2)
      pairs.of[e / 2] = pack_pair<Operand>(values[e], values[e + 1]);
    *reinterpret_cast<Pairs*>(out) = pairs;
  } else {
    TORCH_SPE_UNROLL
    for (int e = 0; e < kCount; ++e)
      write(static_cast<core::accumulate_t<Operand>>(values[e]), out + e);
  }
}

// Loads a tile [kRows, kColumns] into shared memory as operands of transform(row, number). The tile
// is zero from column `columns` on and in rows for which `row` gives null; `aligned` rows have
// stride 1 and are read 16 bytes at once.
template <int kRows, int kColumns, class Storage, class Operand, class Row, class Transform>
TORCH_SPE_DEVICE void load_tile(Operand* out, std::int64_t columns, std::int64_t stride,
                                bool aligned, const Row& row, const Transform& transform) {
  using T = core::accumulate_t<Storage>;
  constexpr int kRow = row_of<Operand>(kColumns);
  constexpr int kVector = Vector<Storage>::kSize;
  TORCH_SPE_KEEP_LOOP
  for (int i = thread_read_again(); i < kRows * (kColumns / kVector); i += kThreads) {
    const int m = i / (kColumns / kVector), column = i % (kColumns / kVector) * kVector;
    const Storage* const from = row(m);
    Operand* const to = out + m * kRow + column;
    if (aligned && from != nullptr && column + kVector <= columns) {
      const auto numbers = *reinterpret_cast<const Vector<Storage>*>(from + column);
      T transformed[kVector];
      TORCH_SPE_UNROLL
      for (int e = 0; e < kVector; ++e) transformed[e] = transform(m, read(numbers.values[e]));
      write_operands(transformed, to);
    } else {
      for (int e = 0; e < kVector; ++e) {
        const bool inside = from != nullptr && column + e < columns;
        write(inside ? transform(m, read(from[(column + e) * stride])) : T(0), to + e);
      }
    }
  }
}

// out[i] = sum over parts of parts[part * size + i], always in the same order. A block takes 32
// values; each warp adds up a quarter of the parts.
template <class Part, class T>
__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(const Part* parts, std::int64_t count, std::int64_t size, T* out) {
  constexpr int kNumbers = 32, kQuarters = kThreads / kNumbers;
  TORCH_SPE_SHARED_MEMORY(memory);
  Part* const sums = reinterpret_cast<Part*>(memory);
  const int thread = static_cast<int>(threadIdx.x), quarter = thread / kNumbers;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kNumbers + thread % kNumbers;
  const std::int64_t each = ceil_div(count, kQuarters), end = min_of(count, (quarter + 1) * each);
  Part sum = 0;
  if (i < size) {
    for (std::int64_t part = quarter * each; part < end; ++part) sum += parts[part * size + i];
  }
  sums[thread] = sum;
  __syncthreads();
  if (quarter > 0 || i >= size) return;
  for (int q = 1; q < kQuarters; ++q) sum += sums[thread + q * kNumbers];
  out[i] = static_cast<T>(sum);
}

template <class Part, class T>
void sum_parts(const Part* parts, std::int64_t count, std::int64_t size, T* out, Stream stream) {
  if (size == 0) return;
  launch(sum_parts_kernel<Part, T>, grid_of(ceil_div(size, 32)), dim3(kThreads),
         kThreads * sizeof(Part), stream, parts, count, size, out);
}

// Calls function(storage, operand) with values of the type of x and of what goes into products.
template <class Function>
void visit_operands(core::DType dtype, bool allow_tf32, const Function& function) {
  if (dtype == core::DType::kFloat32 && allow_tf32) return function(float{}, Tf32{});
  visit_storage(dtype, [&](auto storage) { function(storage, storage); });
}

}  // namespace torch_spe::cuda
