// How the sine filter cuts up its work, and what both of its passes load.
// Included by kernels only, like simd.h.
#pragma once

#include <unistd.h>

#include "cpu/encode/sine_basis.h"
#include "cpu/prefetch.h"
#include "cpu/rows.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

// The codes of a group of features at kCodePositions positions stay in the level 2 cache until the
// batch has been multiplied with them, and so do those that their gradients need, of kSineTile
// positions. Weights, read from there once for kCodePositions positions, weigh more than codes do.
constexpr std::int64_t kCodePositions = 12;
constexpr std::int64_t kCodeTileBytes = 96 * 1024;
constexpr std::int64_t kOneRowCodeTileBytes = 256 * 1024;  // of a single row, forward
constexpr std::int64_t kOneRowBytes = 512 * 1024;          // see one_row_group_size

// Of the codes whose gradients are made. Each group of features reads the gradient of the output
// anew: half of a cache of 1 MB, beside the weights and their gradients, took 8 to 14 % less time
// than a quarter. A larger cache is filled to the same size.
inline std::int64_t grad_code_tile_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  const std::int64_t cache = sysconf(_SC_LEVEL2_CACHE_SIZE);  // 0 or -1 where it is not known
#else
  const std::int64_t cache = 0;
#endif
  return min_of(max_of(cache / 2, 256 * 1024), 512 * 1024);
}

// Elements from one position to the next in a tile of codes: a cache line more than the codes of
// its features, since rows a power of two apart would share a few cache sets.
template <class T>
std::int64_t code_stride(std::int64_t count, std::int64_t width) {
  return count * width + 64 / static_cast<std::int64_t>(sizeof(T));
}

// Features whose codes at `positions` positions fit that many bytes.
template <class T>
std::int64_t group_size(const core::SineFilterParams& p, std::int64_t positions,
                        std::int64_t tile_bytes) {
  const std::int64_t width = round_up(p.num_realizations, kLanes<T>);
  const std::int64_t bytes = positions * width * static_cast<std::int64_t>(sizeof(T));
  return max_of(1, min_of(p.in_features, tile_bytes / bytes));
}

// Features whose weights, their gradients, basis and its gradient fit the cache in the backward
// pass of a single row.
template <class T>
std::int64_t one_row_group_size(const core::SineFilterParams& p) {
  const std::int64_t width = round_up(p.num_realizations, kLanes<T>);
  const std::int64_t elements = 2 * num_basis_rows(p) * (width + kSineTile);
  const std::int64_t bytes = elements * static_cast<std::int64_t>(sizeof(T));
  return max_of(1, min_of(p.in_features, kOneRowBytes / bytes));
}

// The weights of the features [d0, d0 + count) of a head as [d, j, r], the constant as their last
// row; rows are padded to `width` with zeros.
template <class T>
void load_weights(const core::SineFilterParams& p, std::int64_t head, std::int64_t d0,
                  std::int64_t count, std::int64_t width, T* weights) {
  const std::int64_t realizations = p.num_realizations, first = head * p.in_features + d0;
  const T* weight = static_cast<const T*>(p.weight) + first * 2 * p.num_sines * realizations;
  const T* constant = static_cast<const T*>(p.constant);
  if (constant != nullptr) constant += first * realizations;
  const auto load = [&](const T* row) {
    load_row(row, 1, realizations, weights);
    for (std::int64_t r = realizations; r < width; ++r) weights[r] = 0;
    weights += width;
  };
  for (std::int64_t d = 0; d < count; ++d) {
    for (std::int64_t j = 0; j < 2 * p.num_sines; ++j, weight += realizations) load(weight);
    if (constant != nullptr) load(constant + d * realizations);
  }
}

// Asks for a row of x or of the output's gradient that comes some 16 rows after row (b, t).
template <class Storage>
TORCH_SPE_INLINE void prefetch_later_row(const core::SineFilterParams& p, const Storage* first,
                                         const std::int64_t* strides, std::int64_t size,
                                         std::int64_t b, std::int64_t t, std::int64_t columns) {
  const std::int64_t later = min_of(t + max_of(1, 16 / p.batch), size - 1);
  prefetch_near(first + b * strides[0] + later * strides[1], strides[3], columns);
}

// phi(x) at a tile of positions, for one head and a group of features, as [t, b, d].
template <class Storage, class T>
void load_x(const core::SineFilterParams& p, std::int64_t head, std::int64_t n0, std::int64_t size,
            std::int64_t d0, std::int64_t count, T* tile) {
  const auto& strides = p.x_strides;
  const Storage* x =
      static_cast<const Storage*>(p.x) + n0 * strides[1] + head * strides[2] + d0 * strides[3];
  with_feature_map(p.feature_map, [&](auto map) {
    T* row = tile;
    for (std::int64_t t = 0; t < size; ++t) {
      for (std::int64_t b = 0; b < p.batch; ++b, row += count) {
        prefetch_later_row(p, x, strides, size, b, t, count);
        load_mapped_row<map.value>(x + b * strides[0] + t * strides[1], strides[3], count, row);
      }
    }
  });
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
