// Tiles of positions along the last dimension, and tensors whose type is known at run time only.
#pragma once

#include "core/conv_filter.h"
#include "tiles.h"

namespace torch_spe::cuda {

// A line of positions along the last dimension, and where the tile begins on it.
struct LineTile {
  std::int64_t head, d, i0, i1, n0;

  TORCH_SPE_DEVICE std::int64_t offset(const std::int64_t (&strides)[6]) const {  // of x and out
    return i0 * strides[1] + i1 * strides[2] + n0 * strides[3] + head * strides[4];
  }
};

template <int kTokens>
struct LineTiles {
  std::int64_t size1, per_line, count;

  TORCH_SPE_INLINE LineTiles(std::int64_t size0, std::int64_t size1, std::int64_t size2)
      : size1(size1), per_line(ceil_div(size2, kTokens)), count(size0 * size1 * per_line) {}
  TORCH_SPE_INLINE explicit LineTiles(const ConvFilterParams& p)
      : LineTiles(p.size[0], p.size[1], p.size[2]) {}
  TORCH_SPE_DEVICE LineTile place(std::int64_t tile, std::int64_t head, std::int64_t d) const {
    const std::int64_t line = tile / per_line;
    return {head, d, line / size1, line % size1, tile % per_line * kTokens};
  }
};

TORCH_SPE_DEVICE double read_as(core::DType dtype, const void* data, std::int64_t i) {
  switch (dtype) {
    case core::DType::kFloat32:
      return read(static_cast<const float*>(data)[i]);
    case core::DType::kFloat64:
      return read(static_cast<const double*>(data)[i]);
    case core::DType::kFloat16:
      return read(static_cast<const core::Half*>(data)[i]);
    case core::DType::kBFloat16:
      break;
  }
  return read(static_cast<const core::BFloat16*>(data)[i]);
}

template <class T>
TORCH_SPE_DEVICE void write_as(core::DType dtype, T value, void* data, std::int64_t i) {
  switch (dtype) {
    case core::DType::kFloat32:
      return write(static_cast<float>(value), static_cast<float*>(data) + i);
    case core::DType::kFloat64:
      return write(static_cast<double>(value), static_cast<double*>(data) + i);
    case core::DType::kFloat16:
      return write(static_cast<float>(value), static_cast<core::Half*>(data) + i);
    case core::DType::kBFloat16:
      return write(static_cast<float>(value), static_cast<core::BFloat16*>(data) + i);
  }
}

}  // namespace torch_spe::cuda
