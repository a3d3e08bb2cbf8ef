// How the sine filter cuts up its work, and what both of its passes load.
// Included by kernels only, like simd.h.
#pragma once

#include "cpu/encode/sine_basis.h"
#include "cpu/rows.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

constexpr std::int64_t kCodeTileBytes = 256 * 1024;  // a tile of codes stays in the level 2 cache
constexpr std::int64_t kOneRowBytes = 512 * 1024;    // see one_row_group_size

// Elements from one position to the next in a tile of codes: a cache line more than the codes of
// its features, since rows a power of two apart would share a few cache sets.
template <class T>
std::int64_t code_stride(std::int64_t count, std::int64_t width) {
  return count * width + 64 / static_cast<std::int64_t>(sizeof(T));
}

// Features whose codes at kSineTile positions fit the cache.
template <class T>
std::int64_t group_size(const core::SineFilterParams& p) {
  const std::int64_t width = round_up(p.num_realizations, kLanes<T>);
  const std::int64_t bytes = kSineTile * width * static_cast<std::int64_t>(sizeof(T));
  return max_of(1, min_of(p.in_features, kCodeTileBytes / bytes));
}

// Features whose weights, their gradients, basis and its gradient fit the cache in the backward
// pass of a single row.
template <class T>
std::int64_t one_row_group_size(const core::SineFilterParams& p) {
  const std::int64_t elements = 2 * num_basis_rows(p) * (p.num_realizations + kSineTile);
  const std::int64_t bytes = elements * static_cast<std::int64_t>(sizeof(T));
  return max_of(1, min_of(p.in_features, kOneRowBytes / bytes));
}

// The weights of the features [d0, d0 + count) of a head as [d, j, r], the constant as their last
// row.
template <class T>
void load_weights(const core::SineFilterParams& p, std::int64_t head, std::int64_t d0,
                  std::int64_t count, T* weights) {
  const std::int64_t realizations = p.num_realizations, sine_rows = 2 * p.num_sines * realizations;
  const std::int64_t first = head * p.in_features + d0;
  const T* weight = static_cast<const T*>(p.weight) + first * sine_rows;
  const T* constant = static_cast<const T*>(p.constant);
  for (std::int64_t d = 0; d < count; ++d) {
    std::memcpy(weights, weight + d * sine_rows, sine_rows * sizeof(T));
    weights += sine_rows;
    if (constant == nullptr) continue;
    std::memcpy(weights, constant + (first + d) * realizations, realizations * sizeof(T));
    weights += realizations;
  }
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
        load_mapped_row<map.value>(x + b * strides[0] + t * strides[1], strides[3], count, row);
      }
    }
  });
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
