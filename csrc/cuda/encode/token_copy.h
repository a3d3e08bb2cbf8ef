// Copies tiles of tokens to shared memory, tile after tile, with little arithmetic between them.
#pragma once

#include "tiles.h"

namespace torch_spe::cuda {

// Copies 16-bit values [kRows tokens, kColumns] of tiles of a tensor [B, N, ..] to shared memory,
// as copy_tile does. Where rows are aligned and whole and the batch rows of a tile divide those
// that the block copies at once, a thread keeps its batch row and column, and only its position
// advances.
template <int kRows, int kColumns, class Storage>
class TokenCopy {
 public:
  // `first` points at the first column of the token at position 0 and batch row 0; `columns` are
  // left from there on.
  TORCH_SPE_DEVICE TokenCopy(const TokenTiles& tiles, const Storage* first,
                             const std::int64_t (&strides)[4], std::int64_t columns, bool aligned,
                             std::int64_t batch, std::int64_t length)
      : tiles_(tiles),
        first_(first),
        batch_stride_(strides[0]),
        position_stride_(strides[1]),
        column_stride_(strides[3]),
        columns_(columns),
        batch_(batch),
        length_(length),
        aligned_(aligned),
        plain_(aligned && strides[3] == 1 && columns >= kColumns && kAtOnce % tiles.batch == 0) {}

  // The tile whose first token is at position n0 and batch row b0.
  TORCH_SPE_DEVICE void copy(std::int64_t b0, std::int64_t n0, Storage* out) const {
    if (!plain_) {
      copy_tile<kRows, kColumns, Storage>(
          out, columns_, column_stride_, aligned_, [&](int row) -> const Storage* {
            const int t = row / tiles_.batch, b = row % tiles_.batch;
            return t < tiles_.positions && n0 + t < length_ && b0 + b < batch_
                       ? first_ + (b0 + b) * batch_stride_ + (n0 + t) * position_stride_
                       : nullptr;
          });
      return;
    }
    // Computed for every tile: registers are short.
    const std::uint32_t row = threadIdx.x / kVectors, column = threadIdx.x % kVectors * 8;
    const auto batch = static_cast<std::uint32_t>(tiles_.batch);
    const std::uint32_t own_position = row / batch, own_batch = row - own_position * batch;
    const int positions_at_once = static_cast<int>(kAtOnce / batch);
    const Storage* from =
        first_ + (b0 + own_batch) * batch_stride_ + (n0 + own_position) * position_stride_ + column;
    const int left = b0 + own_batch < batch_
                         ? static_cast<int>(min_of(tiles_.positions, length_ - n0) - own_position)
                         : 0;
    Storage* to = out + row * row_of<Storage>(kColumns) + column;
    TORCH_SPE_UNROLL
    for (int i = 0; i < kRows / kAtOnce; ++i) {
      if (i * positions_at_once < left) {
        copy_async16(to, from);
      } else {
        *reinterpret_cast<Zeros*>(to) = {};
      }
      from += positions_at_once * position_stride_;
      to += kAtOnce * row_of<Storage>(kColumns);
    }
  }

 private:
  struct alignas(16) Zeros {
    std::uint32_t words[4];
  };
  static constexpr int kVectors = kColumns / 8, kAtOnce = kThreads / kVectors;
  static_assert(sizeof(Storage) == 2 && kRows % kAtOnce == 0);
  const TokenTiles& tiles_;
  const Storage* first_;
  std::int64_t batch_stride_, position_stride_, column_stride_, columns_, batch_, length_;
  bool aligned_, plain_;
};

}  // namespace torch_spe::cuda
