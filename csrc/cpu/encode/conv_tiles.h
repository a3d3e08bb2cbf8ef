// Tiles of the convolution filter: loaded from tensors, used with codes, stored.
// Included by kernels only, like simd.h.
#pragma once

#include "cpu/encode/conv_geometry.h"
#include "cpu/rows.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

TORCH_SPE_INLINE std::int64_t offset_of(const std::int64_t* strides, std::int64_t i0,
                                        std::int64_t i1, std::int64_t i2) {
  return i0 * strides[1] + i1 * strides[2] + i2 * strides[3];
}

// Tile [rows, B, width] of the columns [first, first + count) of a tensor [B, *size, H, columns],
// zero from `count` on.
template <class Storage, class T>
void load_tile(const core::ConvFilterParams& p, const GridBox& box, const void* tensor,
               const std::int64_t* strides, std::int64_t head, std::int64_t first,
               std::int64_t count, std::int64_t width, T* tile) {
  const Storage* from =
      static_cast<const Storage*>(tensor) + head * strides[4] + first * strides[5];
  for_each_row(box, p.generated.stride,
               [&](std::int64_t row, std::int64_t i0, std::int64_t i1, std::int64_t i2) {
                 for (std::int64_t b = 0; b < p.batch; ++b) {
                   T* to = tile + (row * p.batch + b) * width;
                   load_row(from + b * strides[0] + offset_of(strides, i0, i1, i2), strides[5],
                            count, to);
                   for (std::int64_t i = count; i < width; ++i) to[i] = 0;
                 }
               });
}

// The same as [count, ld], where a column's elements stand together, row by row.
template <class Storage, class T>
void load_columns(const core::ConvFilterParams& p, const GridBox& box, const void* tensor,
                  const std::int64_t* strides, std::int64_t head, std::int64_t first,
                  std::int64_t count, std::int64_t ld, T* tile) {
  const Storage* from =
      static_cast<const Storage*>(tensor) + head * strides[4] + first * strides[5];
  for_each_row(box, p.generated.stride,
               [&](std::int64_t row, std::int64_t i0, std::int64_t i1, std::int64_t i2) {
                 for (std::int64_t b = 0; b < p.batch; ++b) {
                   const Storage* token = from + b * strides[0] + offset_of(strides, i0, i1, i2);
                   T* to = tile + row * p.batch + b;
                   for (std::int64_t i = 0; i < count; ++i) {
                     to[i * ld] = core::load(token[i * strides[5]]);
                   }
                 }
               });
}

// Where the columns [first, first + count) of a token stand in a contiguous [B, *size, H, columns].
template <class Storage>
Storage* token_of(const core::ConvFilterParams& p, void* tensor, std::int64_t b, std::int64_t i0,
                  std::int64_t i1, std::int64_t i2, std::int64_t head, std::int64_t columns) {
  const std::int64_t n = ((b * p.size[0] + i0) * p.size[1] + i1) * p.size[2] + i2;
  return static_cast<Storage*>(tensor) + (n * p.num_heads + head) * columns;
}

template <class Storage, class T>
void store_tile(const core::ConvFilterParams& p, const GridBox& box, const T* tile,
                std::int64_t head, std::int64_t first, std::int64_t count, std::int64_t width,
                std::int64_t columns, void* tensor) {
  for_each_row(box, p.generated.stride,
               [&](std::int64_t row, std::int64_t i0, std::int64_t i1, std::int64_t i2) {
                 for (std::int64_t b = 0; b < p.batch; ++b) {
                   store_row(tile + (row * p.batch + b) * width, 1, count,
                             token_of<Storage>(p, tensor, b, i0, i1, i2, head, columns) + first);
                 }
               });
}

template <class Storage, class T>
void store_columns(const core::ConvFilterParams& p, const GridBox& box, const T* tile,
                   std::int64_t head, std::int64_t first, std::int64_t count, std::int64_t ld,
                   std::int64_t columns, void* tensor) {
  for_each_row(box, p.generated.stride,
               [&](std::int64_t row, std::int64_t i0, std::int64_t i1, std::int64_t i2) {
                 for (std::int64_t b = 0; b < p.batch; ++b) {
                   Storage* token =
                       token_of<Storage>(p, tensor, b, i0, i1, i2, head, columns) + first;
                   for (std::int64_t i = 0; i < count; ++i) {
                     core::store(tile[i * ld + row * p.batch + b], token + i);
                   }
                 }
               });
}

// Distance of columns: off the powers of two, which would meet in the same sets of the cache, and
// with a vector more beyond the last row.
template <class T>
std::int64_t column_distance(const core::ConvFilterParams& p, const ConvPlan& plan) {
  return round_up(plan.chunk(p, 0).rows() * p.batch, kLanes<T>) + kLanes<T>;
}

// columns = phi(columns), of [count, rows], ld apart; and grad *= phi'(x), given phi(x).
template <class T>
void map_columns(core::FeatureMap map, std::int64_t count, std::int64_t rows, std::int64_t ld,
                 T* columns) {
  if (map == core::FeatureMap::kIdentity) return;
  with_feature_map(map, [&](auto tag) {
    for (std::int64_t i = 0; i < count; ++i) {
      T* column = columns + i * ld;
      for (std::int64_t row = 0; row < rows; ++row)
        column[row] = core::apply_feature_map<tag.value>(column[row]);
    }
  });
}
template <class T>
void scale_columns_by_derivative(core::FeatureMap map, std::int64_t count, std::int64_t rows,
                                 std::int64_t ld, const T* phi, T* grad) {
  if (map == core::FeatureMap::kIdentity) return;
  with_feature_map(map, [&](auto tag) {
    for (std::int64_t i = 0; i < count; ++i)
      scale_by_derivative<tag.value>(phi + i * ld, rows, grad + i * ld);
  });
}

// y += x codes, for one feature. The consumers hold all that they need, by value: vectors stored
// may alias anything that is read through a pointer.
template <class T>
struct AddEncoded {
  const T* x;  // [rows, B]
  T* y;        // [rows, B, width]
  std::int64_t batch, width;

  template <int kRows, int kCols>
  TORCH_SPE_INLINE void operator()(std::int64_t row, std::int64_t valid, std::int64_t column,
                                   const Vec<T> (&codes)[kRows][kCols]) const {
    const T* from = x + row * batch;
    T* to = y + row * batch * width + column;
    if (batch == 1 && valid == kRows) {  // without loops
#pragma GCC unroll 16
      for (int t = 0; t < kRows; ++t) {
        const Vec<T> factor = Vec<T>{} + from[t];
        for (int v = 0; v < kCols; ++v) {
          T* at = to + t * width + v * kLanes<T>;
          store_vec(at, load_vec(at) + factor * codes[t][v]);
        }
      }
      return;
    }
    for (int t = 0; t < kRows; ++t) {
      if (t >= valid) break;
      for (std::int64_t b = 0; b < batch; ++b, ++from, to += width) {
        for (int v = 0; v < kCols; ++v) {
          store_vec(to + v * kLanes<T>, load_vec(to + v * kLanes<T>) + *from * codes[t][v]);
        }
      }
    }
  }
};

// partial[row, b] += codes * grad_out, of which the sum over the lanes is the gradient of x, for
// one feature. The first column starts the sums.
template <class T>
struct AddGradX {
  const T* g;  // [rows, B, width]
  T* partial;  // [rows, B, lanes]
  std::int64_t batch, width;

  template <int kRows, int kCols>
  TORCH_SPE_INLINE void operator()(std::int64_t row, std::int64_t valid, std::int64_t column,
                                   const Vec<T> (&codes)[kRows][kCols]) const {
    const T* from = g + row * batch * width + column;
    T* to = partial + row * batch * kLanes<T>;
    for (int t = 0; t < kRows; ++t) {
      if (t >= valid) break;
      for (std::int64_t b = 0; b < batch; ++b, from += width, to += kLanes<T>) {
        Vec<T> sum = column == 0 ? Vec<T>{} : load_vec(to);
        for (int v = 0; v < kCols; ++v) sum += load_vec(from + v * kLanes<T>) * codes[t][v];
        store_vec(to, sum);
      }
    }
  }
};

// Stores values of the first `count` columns in rows of a tensor.
template <class T, class Storage>
struct StoreRows {
  Storage* out;
  std::int64_t ld, count;

  template <int kRows, int kCols>
  TORCH_SPE_INLINE void operator()(std::int64_t row, std::int64_t valid, std::int64_t column,
                                   const Vec<T> (&values)[kRows][kCols]) const {
    for (int t = 0; t < kRows; ++t) {
      if (t >= valid) break;
      T buffer[kCols * kLanes<T>];
      for (int v = 0; v < kCols; ++v) store_vec(buffer + v * kLanes<T>, values[t][v]);
      store_row(buffer, 1, min_of(kCols * kLanes<T>, count - column),
                out + (row + t) * ld + column);
    }
  }
};

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
