// Kernel of the sine filter's gradients of x, frequencies and positions, for every type and kind of
// positions.
#pragma once

#include "encode/sine/products.h"

namespace torch_spe::cuda {

// Gradients of x, frequencies and positions: a block takes a group of features of one head, whose
// rows of weight make one tile (or several, when one feature has more rows), and walks over tokens.
template <class Operand>
struct SineInputGradientShape {
  static constexpr int kTokens = sizeof(Operand) == 8 ? 32 : 64;
  static constexpr int kColumns = 64;
  static constexpr int kRealizations = 32;
};

template <class Operand>
struct SineInputGradientShared {
  using T = core::accumulate_t<Operand>;
  using Shape = SineInputGradientShape<Operand>;
  static constexpr int kRow = Shape::kColumns + 1;
  Operand* grad_out;  // [token, r]
  Operand* weight;    // [column, r]
  T* basis;           // [position, column]
  T* grad_products;   // [token, column]
  T* grad_phase;      // [position, sine]

  TORCH_SPE_INLINE explicit SineInputGradientShared(MemoryLayout& layout) {
    grad_out = layout.take<Operand>(Shape::kTokens * row_of<Operand>(Shape::kRealizations));
    weight = layout.take<Operand>(Shape::kColumns * row_of<Operand>(Shape::kRealizations));
    basis = layout.take<T>(Shape::kTokens * kRow);
    grad_products = layout.take<T>(Shape::kTokens * kRow);
    grad_phase = layout.take<T>(Shape::kTokens * Shape::kColumns / 2);
  }
};

template <int kColumns>
struct SineFeatureGroups {
  std::int64_t features, tiles, count;  // features of a group, tiles of a group, groups of a head

  TORCH_SPE_INLINE explicit SineFeatureGroups(const SineFilterParams& p)
      : features(max_of(1, kColumns / sine_rows(p))),
        tiles(ceil_div(sine_rows(p), kColumns)),
        count(ceil_div(p.in_features, features)) {}
};

template <class Storage, class Operand>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    sine_input_gradient_kernel(const SineFilterBackwardParams p, std::int64_t segments,
                               double* freqs_parts,        // [segment, H, D, K, ndim]
                               double* positions_parts) {  // [batch tile, head, group, N, ndim]
  using T = core::accumulate_t<Storage>;
  using Shape = SineInputGradientShape<Operand>;
  using Shared = SineInputGradientShared<Operand>;
  constexpr int kRow = Shared::kRow;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const Shared shared(layout);
  const TokenTiles tiles(p.batch, p.length, Shape::kTokens);
  const SineFeatureGroups<Shape::kColumns> groups(p);
  const std::int64_t rows = sine_rows(p), realizations = p.num_realizations, sines = p.num_sines;
  const std::int64_t block = blockIdx.x;
  const std::int64_t segment = block % segments;
  const std::int64_t group = block / segments % groups.count;
  const std::int64_t head = block / segments / groups.count;
  const std::int64_t d0 = group * groups.features;
  const int features = static_cast<int>(min_of(groups.features, p.in_features - d0));
  const Storage* const x =
      static_cast<const Storage*>(p.x) + head * p.x_strides[2] + d0 * p.x_strides[3];
  const Storage* const grad_out =
      static_cast<const Storage*>(p.grad_out) + head * p.grad_out_strides[2];
  const Storage* const weight = sine_weight_of<Storage>(p, head) + d0 * 2 * sines * realizations;
  const Storage* const constant = sine_constant_of<Storage>(p, head);
  const bool weight_aligned = sine_coefficients_are_aligned<Storage>(p);
  const bool grad_aligned = rows_are_aligned<Storage>(p.grad_out, p.grad_out_strides[0]) &&
                            rows_are_aligned<Storage>(p.grad_out, p.grad_out_strides[1]) &&
                            rows_are_aligned<Storage>(p.grad_out, p.grad_out_strides[2]);
  const bool wants_phase = p.grad_freqs != nullptr || p.grad_positions != nullptr;
  const int thread = static_cast<int>(threadIdx.x);

  const std::int64_t per_segment = ceil_div(tiles.count(), segments);
  const std::int64_t first_tile = segment * per_segment;
  const std::int64_t end_tile = min_of(tiles.count(), first_tile + per_segment);
  if (first_tile >= end_tile && freqs_parts != nullptr) {
    double* const part =
        freqs_parts + ((segment * p.num_heads + head) * p.in_features + d0) * sines * p.ndim;
    for (std::int64_t i = thread; i < features * sines * p.ndim; i += kThreads) part[i] = 0;
  }
  for (std::int64_t tile = first_tile; tile < end_tile; ++tile) {
    const std::int64_t b0 = tiles.first_batch(tile), n0 = tiles.first_position(tile);
    const int batch = static_cast<int>(min_of(tiles.batch, p.batch - b0));
    const int positions = static_cast<int>(min_of(tiles.positions, p.length - n0));
    T grad_x_sum = 0;  // of token `thread`, when its feature has several tiles
    for (std::int64_t column_tile = 0; column_tile < groups.tiles; ++column_tile) {
      const std::int64_t column0 = column_tile * Shape::kColumns;
      const int columns = static_cast<int>(min_of(Shape::kColumns, features * rows - column0));
      // Sines in this tile: all of the features, or a part of one feature's.
      const std::int64_t k0 = column0 / 2;
      const int tile_sines =
          static_cast<int>(groups.tiles == 1 ? features * sines
                                             : max_of(0, min_of(Shape::kColumns / 2, sines - k0)));
      const int feature_columns = static_cast<int>(groups.tiles == 1 ? rows : columns);
      // Column of the cos of a sine, and the number of the sine in the group.
      const auto column_of = [&](int sine) {
        if (groups.tiles > 1) return 2 * sine;
        const int feature = sine / static_cast<int>(sines);
        return feature * static_cast<int>(rows) + 2 * (sine - feature * static_cast<int>(sines));
      };

      __syncthreads();  // the basis before has been used
      for (int i = thread; i < positions * tile_sines; i += kThreads) {
        const int t = i / tile_sines, sine = i % tile_sines;
        T* const to = shared.basis + t * kRow + column_of(sine);
        sine_basis_at(p, head, d0 * sines + k0 + sine, n0 + t, to, to + 1);
      }
      if (p.constant != nullptr && column0 + columns == features * rows) {
        const int constants = groups.tiles == 1 ? features : 1;
        for (int i = thread; i < positions * constants; i += kThreads) {
          const int column = (i % constants + 1) * feature_columns - 1;
          shared.basis[i / constants * kRow + column] = 1;
        }
      }

      TileProduct<Operand, Shape::kTokens, Shape::kColumns> product;
      product.clear();
      for (std::int64_t r0 = 0; r0 < realizations; r0 += Shape::kRealizations) {
        __syncthreads();  // the tiles before have been used
        copy_tile<Shape::kTokens, Shape::kRealizations, Storage>(
            shared.grad_out, realizations - r0, p.grad_out_strides[3], grad_aligned, [&](int row) {
              const int t = row / tiles.batch, b = row % tiles.batch;
              return t < positions && b < batch
                         ? grad_out + (b0 + b) * p.grad_out_strides[0] +
                               (n0 + t) * p.grad_out_strides[1] + r0 * p.grad_out_strides[3]
                         : nullptr;
            });
        copy_tile<Shape::kColumns, Shape::kRealizations, Storage>(
            shared.weight, realizations - r0, 1, weight_aligned, [&](int column) {
              const int feature = groups.tiles == 1 ? column / static_cast<int>(rows) : 0;
              const std::int64_t j = column0 + column - feature * rows;
              const Storage* const row = j < 2 * sines
                                             ? weight + (feature * 2 * sines + j) * realizations
                                             : constant + (d0 + feature) * realizations;
              return column < columns ? row + r0 : nullptr;
            });
        copy_async_wait();
        __syncthreads();
        product.template multiply<Shape::kRealizations, Major::kDepth, Major::kDepth>(
            shared.grad_out, shared.weight);
      }
      product.for_each(
          [&](int row, int column, T value) { shared.grad_products[row * kRow + column] = value; });
      __syncthreads();

      if (p.grad_x != nullptr) {
        Storage* const grad_x = static_cast<Storage*>(p.grad_x);
        for (int i = thread; i < positions * tiles.batch * features; i += kThreads) {
          const int row = i / features, feature = i % features;
          const int t = row / tiles.batch, b = row % tiles.batch;
          if (b >= batch) continue;
          const T* const basis = shared.basis + t * kRow + feature * feature_columns;
          const T* const products = shared.grad_products + row * kRow + feature * feature_columns;
          T sum = grad_x_sum;
          for (int j = 0; j < feature_columns; ++j) sum += basis[j] * products[j];
          if (groups.tiles > 1) grad_x_sum = sum;
          if (column_tile + 1 < groups.tiles) continue;
          const Storage* const value =
              x + (b0 + b) * p.x_strides[0] + (n0 + t) * p.x_strides[1] + feature * p.x_strides[3];
          write(gradient_of_input_at(p.feature_map, sum, value),
                grad_x + (((b0 + b) * p.length + n0 + t) * p.num_heads + head) * p.in_features +
                    d0 + feature);
        }
      }
      if (!wants_phase) continue;

      // The phase of a sine, in cycles, is freq . position: its derivative is
      // 2 pi (cos . grad_sin - sin . grad_cos).
      for (int i = thread; i < positions * tile_sines; i += kThreads) {
        const int t = i / tile_sines, sine = i % tile_sines;
        const int column = column_of(sine), feature = column / feature_columns;
        const T c = shared.basis[t * kRow + column], s = shared.basis[t * kRow + column + 1];
        const Storage* const values =
            x + b0 * p.x_strides[0] + (n0 + t) * p.x_strides[1] + feature * p.x_strides[3];
        T sum = 0;
        for (int b = 0; b < batch; ++b) {
          const T* const products = shared.grad_products + (t * tiles.batch + b) * kRow + column;
          sum += read_feature(p.feature_map, values[b * p.x_strides[0]]) *
                 (c * products[1] - s * products[0]);
        }
        shared.grad_phase[t * (Shape::kColumns / 2) + sine] = static_cast<T>(core::kTwoPi) * sum;
      }
      __syncthreads();
      // Sums over positions are kept in double: the terms grow with the position.
      const int ndim = static_cast<int>(p.ndim);
      const std::int64_t sine0 = (head * p.in_features + d0) * sines + k0;
      if (freqs_parts != nullptr) {
        double* const part =
            freqs_parts + segment * p.num_heads * p.in_features * sines * ndim + sine0 * ndim;
        for (int i = thread; i < tile_sines * ndim; i += kThreads) {
          double sum = 0;
          for (int t = 0; t < positions; ++t) {
            sum += static_cast<double>(shared.grad_phase[t * (Shape::kColumns / 2) + i / ndim]) *
                   position_of(p, n0 + t, i % ndim);
          }
          part[i] = tile == first_tile ? sum : part[i] + sum;
        }
      }
      if (positions_parts != nullptr) {
        double* const part =
            positions_parts +
            (((tile / tiles.position_tiles * p.num_heads + head) * groups.count + group) *
                 p.length +
             n0) *
                ndim;
        for (int i = thread; i < positions * ndim; i += kThreads) {
          double sum = column_tile == 0 ? 0 : part[i];
          for (int sine = 0; sine < tile_sines; ++sine) {
            sum += static_cast<double>(shared.grad_phase[i / ndim * (Shape::kColumns / 2) + sine]) *
                   p.freqs[(sine0 + sine) * ndim + i % ndim];
          }
          part[i] = sum;
        }
      }
    }
  }
}

}  // namespace torch_spe::cuda
