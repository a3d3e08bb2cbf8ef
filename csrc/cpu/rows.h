// Rows of tensors on their way into a tile and out of it: where they stand, their conversion, the
// feature map phi and its derivative. Included by kernels only, like simd.h.
#pragma once

#include "core/feature_map.h"
#include "cpu/simd.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

// Where the rows of a tile stand: in a tensor or in the scratch memory of a fused kernel. Row
// (b, t, h) belongs to batch row b, position t and head h, counted from the tile's first ones.
template <class Storage>
struct TileView {
  Storage* first;
  std::int64_t batch_stride, position_stride, head_stride;
  std::int64_t column_stride;  // between the elements of a row

  TORCH_SPE_INLINE Storage* row(std::int64_t b, std::int64_t t, std::int64_t head) const {
    return first + b * batch_stride + t * position_stride + head * head_stride;
  }
};

// The rows from batch row b, position n and head h on of a strided tensor [B, N, H, columns].
template <class Storage>
TORCH_SPE_INLINE TileView<const Storage> strided_tile(const void* tensor,
                                                      const std::int64_t strides[4], std::int64_t b,
                                                      std::int64_t n, std::int64_t head) {
  return {static_cast<const Storage*>(tensor) + b * strides[0] + n * strides[1] + head * strides[2],
          strides[0], strides[1], strides[2], strides[3]};
}
// The same of a contiguous tensor. Null stays null.
template <class Storage>
TORCH_SPE_INLINE TileView<Storage> contiguous_tile(void* tensor, std::int64_t length,
                                                   std::int64_t heads, std::int64_t columns,
                                                   std::int64_t b, std::int64_t n,
                                                   std::int64_t head) {
  Storage* first = static_cast<Storage*>(tensor);
  if (first != nullptr) first += ((b * length + n) * heads + head) * columns;
  return {first, length * heads * columns, heads * columns, columns, 1};
}

template <core::FeatureMap kMap>
struct FeatureMapTag {
  static constexpr core::FeatureMap value = kMap;
};

// Calls function(tag) with the map as a constant, tag.value.
template <class Function>
TORCH_SPE_INLINE void with_feature_map(core::FeatureMap map, const Function& function) {
  switch (map) {
    case core::FeatureMap::kIdentity:
      return function(FeatureMapTag<core::FeatureMap::kIdentity>{});
    case core::FeatureMap::kElu:
      return function(FeatureMapTag<core::FeatureMap::kElu>{});
    case core::FeatureMap::kRelu:
      return function(FeatureMapTag<core::FeatureMap::kRelu>{});
  }
}

// out = phi(in), for a row of `n` elements with a stride.
template <core::FeatureMap kMap, class Storage, class T>
TORCH_SPE_INLINE void load_mapped_row(const Storage* in, std::int64_t stride, std::int64_t n,
                                      T* out) {
  if (stride == 1) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = core::apply_feature_map<kMap>(core::load(in[i]));
  } else {
    for (std::int64_t i = 0; i < n; ++i)
      out[i] = core::apply_feature_map<kMap>(core::load(in[i * stride]));
  }
}

// grad *= phi'(x), given phi(x).
template <core::FeatureMap kMap, class T>
TORCH_SPE_INLINE void scale_by_derivative(const T* phi, std::int64_t n, T* grad) {
  if constexpr (kMap != core::FeatureMap::kIdentity) {
    for (std::int64_t i = 0; i < n; ++i) grad[i] *= core::feature_map_derivative<kMap>(phi[i]);
  }
}

// The same for a vector of x in place, and for a vector of its gradient.
template <core::FeatureMap kMap, class T>
TORCH_SPE_INLINE Vec<T> map_lanes(const Vec<T>& x) {
  if constexpr (kMap == core::FeatureMap::kIdentity) return x;
  alignas(64) T lanes[kLanes<T>];
  store_vec(lanes, x);
  for (std::int64_t l = 0; l < kLanes<T>; ++l) lanes[l] = core::apply_feature_map<kMap>(lanes[l]);
  return load_vec(lanes);
}
template <core::FeatureMap kMap, class T>
TORCH_SPE_INLINE Vec<T> scale_lanes_by_derivative(const Vec<T>& phi, const Vec<T>& grad) {
  if constexpr (kMap == core::FeatureMap::kIdentity) return grad;
  return grad * core::feature_map_derivative<kMap>(phi);
}

// A vector of the first `count` of `lanes` elements, zero beyond.
template <class T, class Storage>
TORCH_SPE_INLINE Vec<T> load_lanes(const Storage* in, std::int64_t stride, std::int64_t count) {
  if constexpr (sizeof(Storage) == sizeof(T)) {  // the same type
    if (count == kLanes<T> && stride == 1) return load_vec<T>(in);
  }
  alignas(64) T lanes[kLanes<T>];
  if (count == kLanes<T>) {
    load_row(in, stride, kLanes<T>, lanes);
  } else {
    for (std::int64_t l = 0; l < kLanes<T>; ++l) lanes[l] = 0;
    load_row(in, stride, count, lanes);
  }
  return load_vec(lanes);
}
template <class T, class Storage>
TORCH_SPE_INLINE void store_lanes(const Vec<T>& value, Storage* out, std::int64_t count) {
  if constexpr (sizeof(Storage) == sizeof(T)) {  // the same type
    if (count == kLanes<T>) return store_vec<T>(out, value);
  }
  alignas(64) T lanes[kLanes<T>];
  store_vec(lanes, value);
  if (count == kLanes<T>) {
    store_row(lanes, 1, kLanes<T>, out);
  } else {
    store_row(lanes, 1, count, out);
  }
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
