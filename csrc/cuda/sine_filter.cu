#include "sine_filter.h"
#include "sine_products.h"

namespace torch_spe::cuda {
namespace {

TORCH_SPE_INLINE std::int64_t num_rows(const SineFilterParams& p) {
  return 2 * p.num_sines + (p.constant != nullptr ? 1 : 0);
}

// cos and sin of a sine of a head at position n; `sine` = d K + k.
template <class T>
TORCH_SPE_DEVICE void basis_at(const SineFilterParams& p, std::int64_t head, std::int64_t sine,
                               std::int64_t n, T* cos_out, T* sin_out) {
  Phasor<T> phasor;
  phasor.set(p, p.freqs + (head * p.in_features * p.num_sines + sine) * p.ndim, n);
  *cos_out = phasor.re;
  *sin_out = phasor.im;
}

// The columns of x (.) basis of a head: cos and sin of every sine of every feature, then, when
// there is a constant, x itself. They come in chunks of kColumns, and no chunk holds both kinds.
template <int kColumns>
struct Chunks {
  std::int64_t sines, sine_chunks, count;

  TORCH_SPE_INLINE explicit Chunks(const SineFilterParams& p)
      : sines(p.in_features * p.num_sines),
        sine_chunks(ceil_div(2 * sines, kColumns)),
        count(sine_chunks + (p.constant != nullptr ? ceil_div(p.in_features, kColumns) : 0)) {}

  // The row of a head's coefficients, weight [D, 2K, R] or constant [D, R], that belongs to a
  // column of a chunk; null beyond the last.
  template <class Number>
  TORCH_SPE_DEVICE Number* row(const SineFilterParams& p, Number* weight, Number* constant,
                               std::int64_t chunk, int column) const {
    if (chunk < sine_chunks) {
      const std::int64_t row = chunk * kColumns + column;
      return row < 2 * sines ? weight + row * p.num_realizations : nullptr;
    }
    const std::int64_t row = (chunk - sine_chunks) * kColumns + column;
    return row < p.in_features ? constant + row * p.num_realizations : nullptr;
  }
};

// The coefficients of a head.
template <class Storage>
TORCH_SPE_DEVICE const Storage* weight_of(const SineFilterParams& p, std::int64_t head) {
  return static_cast<const Storage*>(p.weight) +
         head * p.in_features * 2 * p.num_sines * p.num_realizations;
}
template <class Storage>
TORCH_SPE_DEVICE const Storage* constant_of(const SineFilterParams& p, std::int64_t head) {
  return p.constant == nullptr
             ? nullptr
             : static_cast<const Storage*>(p.constant) + head * p.in_features * p.num_realizations;
}
template <class Storage>
TORCH_SPE_DEVICE bool coefficients_are_aligned(const SineFilterParams& p) {
  return rows_are_aligned<Storage>(p.weight, p.num_realizations) &&
         rows_are_aligned<Storage>(p.constant, p.num_realizations);
}

// x (.) basis for a tile of tokens and a chunk of columns: out[row][column], zero outside.
template <class Storage, class Operand, int kRows, int kColumns>
TORCH_SPE_DEVICE void fill_products(const SineFilterParams& p, const TokenTiles& tiles,
                                    std::int64_t tile, std::int64_t head, std::int64_t chunk,
                                    Operand* out) {
  using T = core::accumulate_t<Storage>;
  constexpr int kRow = row_of<Operand>(kColumns);
  constexpr int kPairs = kColumns / 2;
  const Chunks<kColumns> chunks(p);
  const std::int64_t b0 = tiles.first_batch(tile), n0 = tiles.first_position(tile);
  const Storage* const x = static_cast<const Storage*>(p.x) + b0 * p.x_strides[0] +
                           n0 * p.x_strides[1] + head * p.x_strides[2];
  const bool is_sine = chunk < chunks.sine_chunks;
  // A thread keeps to two columns, the cos and the sin of a sine or two constants.
  const int pair = static_cast<int>(threadIdx.x) % kPairs;
  const std::int64_t first =
      is_sine ? chunk * kPairs + pair : (chunk - chunks.sine_chunks) * kColumns + 2 * pair;
  const std::int64_t d =
      is_sine ? static_cast<std::uint32_t>(first) / static_cast<std::uint32_t>(p.num_sines) : first;
  const bool valid = is_sine ? first < chunks.sines : d < p.in_features;
  for (int t = static_cast<int>(threadIdx.x) / kPairs; t < tiles.positions;
       t += kThreads / kPairs) {
    const bool inside = valid && n0 + t < p.length;
    T c = 0, s = 0;
    if (inside && is_sine) basis_at(p, head, first, n0 + t, &c, &s);
    for (int b = 0; b < tiles.batch; ++b) {
      T even = 0, odd = 0;
      if (inside && b0 + b < p.batch) {
        const Storage* const token = x + b * p.x_strides[0] + t * p.x_strides[1];
        if (is_sine) {
          const T value = read(token[d * p.x_strides[3]]);
          even = value * c;
          odd = value * s;
        } else {
          even = read(token[d * p.x_strides[3]]);
          if (d + 1 < p.in_features) odd = read(token[(d + 1) * p.x_strides[3]]);
        }
      }
      Operand* const to = out + (t * tiles.batch + b) * kRow + 2 * pair;
      write(even, to);
      write(odd, to + 1);
    }
  }
  // Rows that belong to no position, when the batch does not divide the tile.
  const int used = tiles.positions * tiles.batch;
  for (int i = static_cast<int>(threadIdx.x); i < (kRows - used) * kColumns; i += kThreads)
    write(T(0), out + (used + i / kColumns) * kRow + i % kColumns);
}

// Forward: a block makes the products of some tokens, chunk by chunk in turn in two buffers, and
// multiplies them with the weight.
template <class Operand>
struct ForwardShape {
  static constexpr int kTokens = sizeof(Operand) == 2 ? 128 : 64;
  static constexpr int kColumns = 32;
  static constexpr int kReal = 64;
};

template <class Operand>
struct ForwardShared {
  using Shape = ForwardShape<Operand>;
  static constexpr int kProducts = Shape::kTokens * row_of<Operand>(Shape::kColumns);
  static constexpr int kWeight = Shape::kColumns * row_of<Operand>(Shape::kReal);
  Operand* products;  // [2, token, column]
  Operand* weight;    // [2, column, r]

  TORCH_SPE_INLINE explicit ForwardShared(Carver& carver) {
    products = carver.take<Operand>(2 * kProducts);
    weight = carver.take<Operand>(2 * kWeight);
  }
};

template <class Storage, class Operand>
__global__ void __launch_bounds__(kThreads) forward_kernel(const SineFilterParams p) {
  using Shape = ForwardShape<Operand>;
  TORCH_SPE_SHARED_MEMORY(memory);
  Carver carver(memory);
  const ForwardShared<Operand> shared(carver);
  const TokenTiles tiles(p.batch, p.length, Shape::kTokens);
  const Chunks<Shape::kColumns> chunks(p);
  const std::int64_t real = p.num_realizations, real_tiles = ceil_div(real, Shape::kReal);
  const std::int64_t block = blockIdx.x;
  const std::int64_t r0 = block % real_tiles * Shape::kReal;
  const std::int64_t tile = block / real_tiles % tiles.count();
  const std::int64_t head = block / real_tiles / tiles.count();
  const Storage* const weight = weight_of<Storage>(p, head);
  const Storage* const constant = constant_of<Storage>(p, head);
  const bool aligned = coefficients_are_aligned<Storage>(p);

  TileProduct<Operand, Shape::kTokens, Shape::kReal> product;
  product.clear();
  for (std::int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    Operand* const products = shared.products + chunk % 2 * shared.kProducts;
    Operand* const weight_tile = shared.weight + chunk % 2 * shared.kWeight;
    copy_tile<Shape::kColumns, Shape::kReal, Storage>(
        weight_tile, real - r0, 1, aligned, [&](int column) {
          const Storage* const row = chunks.row(p, weight, constant, chunk, column);
          return row == nullptr ? nullptr : row + r0;
        });
    fill_products<Storage, Operand, Shape::kTokens, Shape::kColumns>(p, tiles, tile, head, chunk,
                                                                     products);
    copy_async_wait();
    // One barrier is enough: a buffer is filled again only after the next one, which no warp passes
    // before all have done with this product.
    __syncthreads();
    product.template multiply<Shape::kColumns, Major::kDepth, Major::kOuter>(products, weight_tile);
  }
  Storage* const out = static_cast<Storage*>(p.out);
  const std::int64_t b0 = tiles.first_batch(tile), n0 = tiles.first_position(tile);
  product.for_each([&](int row, int column, auto value) {
    const std::int64_t b = b0 + row % tiles.batch, n = n0 + row / tiles.batch;
    if (row >= tiles.batch * tiles.positions || b >= p.batch || n >= p.length ||
        r0 + column >= real)
      return;
    write(value, out + ((b * p.length + n) * p.num_heads + head) * real + r0 + column);
  });
}

// The backward pass is cut into segments of the tokens; each writes its part of the sums over them.
//
// Gradients of x, frequencies and positions: a block takes a group of features of one head, whose
// rows of weight make one tile (or several, when one feature has more rows), and walks over tokens.
template <class Operand>
struct DataShape {
  static constexpr int kTokens = sizeof(Operand) == 8 ? 32 : 64;
  static constexpr int kColumns = 64;
  static constexpr int kReal = 32;
};

template <class Operand>
struct DataShared {
  using T = core::accumulate_t<Operand>;
  using Shape = DataShape<Operand>;
  static constexpr int kRow = Shape::kColumns + 1;
  Operand* grad_out;  // [token, r]
  Operand* weight;    // [column, r]
  T* basis;           // [position, column]
  T* grad_products;   // [token, column]
  T* grad_phase;      // [position, sine]

  TORCH_SPE_INLINE explicit DataShared(Carver& carver) {
    grad_out = carver.take<Operand>(Shape::kTokens * row_of<Operand>(Shape::kReal));
    weight = carver.take<Operand>(Shape::kColumns * row_of<Operand>(Shape::kReal));
    basis = carver.take<T>(Shape::kTokens * kRow);
    grad_products = carver.take<T>(Shape::kTokens * kRow);
    grad_phase = carver.take<T>(Shape::kTokens * Shape::kColumns / 2);
  }
};

template <int kColumns>
struct FeatureGroups {
  std::int64_t features, tiles, count;  // features of a group, tiles of a group, groups of a head

  TORCH_SPE_INLINE explicit FeatureGroups(const SineFilterParams& p)
      : features(max_of(1, kColumns / num_rows(p))),
        tiles(ceil_div(num_rows(p), kColumns)),
        count(ceil_div(p.in_features, features)) {}
};

// Whether the kernels of sine_products.h serve, and among them that of the gradients of x and
// frequencies.
bool has_products(const SineFilterParams& p) {
  return (p.dtype == core::DType::kFloat16 || p.dtype == core::DType::kBFloat16) &&
         p.positions == nullptr && p.in_features > 0 && p.num_sines > 0 && p.num_realizations > 0;
}
bool has_data_products(const SineFilterParams& p) {
  return has_products(p) && p.in_features * p.num_sines <= kMostTurningSines;
}

template <class Operand>
std::int64_t data_segments(const SineFilterParams& p) {
  using Shape = DataShape<Operand>;
  if (has_data_products(p))
    return num_segments(p.num_heads, TokenTiles(p.batch, p.length, kTileTokens).count());
  return num_segments(p.num_heads * FeatureGroups<Shape::kColumns>(p).count,
                      TokenTiles(p.batch, p.length, Shape::kTokens).count());
}

template <class Storage, class Operand>
__global__ void __launch_bounds__(kThreads)
    backward_data_kernel(const SineFilterBackwardParams p, std::int64_t segments,
                         double* freqs_parts,        // [segment, H, D, K, ndim]
                         double* positions_parts) {  // [batch tile, head, group, N, ndim]
  using T = core::accumulate_t<Storage>;
  using Shape = DataShape<Operand>;
  using Shared = DataShared<Operand>;
  constexpr int kRow = Shared::kRow;
  TORCH_SPE_SHARED_MEMORY(memory);
  Carver carver(memory);
  const Shared shared(carver);
  const TokenTiles tiles(p.batch, p.length, Shape::kTokens);
  const FeatureGroups<Shape::kColumns> groups(p);
  const std::int64_t rows = num_rows(p), real = p.num_realizations, sines = p.num_sines;
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
  const Storage* const weight = weight_of<Storage>(p, head) + d0 * 2 * sines * real;
  const Storage* const constant = constant_of<Storage>(p, head);
  const bool weight_aligned = coefficients_are_aligned<Storage>(p);
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
        basis_at(p, head, d0 * sines + k0 + sine, n0 + t, to, to + 1);
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
      for (std::int64_t r0 = 0; r0 < real; r0 += Shape::kReal) {
        __syncthreads();  // the tiles before have been used
        copy_tile<Shape::kTokens, Shape::kReal, Storage>(
            shared.grad_out, real - r0, p.grad_out_strides[3], grad_aligned, [&](int row) {
              const int t = row / tiles.batch, b = row % tiles.batch;
              return t < positions && b < batch
                         ? grad_out + (b0 + b) * p.grad_out_strides[0] +
                               (n0 + t) * p.grad_out_strides[1] + r0 * p.grad_out_strides[3]
                         : nullptr;
            });
        copy_tile<Shape::kColumns, Shape::kReal, Storage>(
            shared.weight, real - r0, 1, weight_aligned, [&](int column) {
              const int feature = groups.tiles == 1 ? column / static_cast<int>(rows) : 0;
              const std::int64_t j = column0 + column - feature * rows;
              const Storage* const row = j < 2 * sines ? weight + (feature * 2 * sines + j) * real
                                                       : constant + (d0 + feature) * real;
              return column < columns ? row + r0 : nullptr;
            });
        copy_async_wait();
        __syncthreads();
        product.template multiply<Shape::kReal, Major::kDepth, Major::kDepth>(shared.grad_out,
                                                                              shared.weight);
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
          write(sum, grad_x +
                         (((b0 + b) * p.length + n0 + t) * p.num_heads + head) * p.in_features +
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
          sum += read(values[b * p.x_strides[0]]) * (c * products[1] - s * products[0]);
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

// Gradient of the weight: a block takes a chunk of columns of one head and some realizations, and
// walks over tokens.
template <class Operand>
struct WeightShape {
  static constexpr int kTokens = sizeof(Operand) == 8 ? 32 : 64;
  static constexpr int kColumns = 64;
  static constexpr int kReal = 64;
};

template <class Operand>
struct WeightShared {
  using Shape = WeightShape<Operand>;
  static constexpr int kProducts = Shape::kTokens * row_of<Operand>(Shape::kColumns);
  static constexpr int kGradOut = Shape::kTokens * row_of<Operand>(Shape::kReal);
  Operand* products;  // [2, token, column]
  Operand* grad_out;  // [2, token, r]

  TORCH_SPE_INLINE explicit WeightShared(Carver& carver) {
    products = carver.take<Operand>(2 * kProducts);
    grad_out = carver.take<Operand>(2 * kGradOut);
  }
};

template <class Operand>
std::int64_t weight_blocks(const SineFilterParams& p) {
  using Shape = WeightShape<Operand>;
  if (has_products(p))
    return p.num_heads * ceil_div(Steps(p).count, kBlockSteps) *
           ceil_div(p.num_realizations, kRealTile);
  return p.num_heads * Chunks<Shape::kColumns>(p).count *
         ceil_div(p.num_realizations, Shape::kReal);
}

template <class Operand>
std::int64_t weight_segments(const SineFilterParams& p) {
  const int tokens = has_products(p) ? kWeightTokens : WeightShape<Operand>::kTokens;
  return num_segments(weight_blocks<Operand>(p), TokenTiles(p.batch, p.length, tokens).count());
}

template <class Storage, class Operand>
__global__ void __launch_bounds__(kThreads)
    backward_weight_kernel(const SineFilterBackwardParams p, std::int64_t segments,
                           core::accumulate_t<Storage>* weight_parts,      // [segment, H, D, 2K, R]
                           core::accumulate_t<Storage>* constant_parts) {  // [segment, H, D, R]
  using T = core::accumulate_t<Storage>;
  using Shape = WeightShape<Operand>;
  TORCH_SPE_SHARED_MEMORY(memory);
  Carver carver(memory);
  const WeightShared<Operand> shared(carver);
  const TokenTiles tiles(p.batch, p.length, Shape::kTokens);
  const Chunks<Shape::kColumns> chunks(p);
  const std::int64_t real = p.num_realizations, real_tiles = ceil_div(real, Shape::kReal);
  const std::int64_t block = blockIdx.x;
  const std::int64_t segment = block % segments;
  const std::int64_t r0 = block / segments % real_tiles * Shape::kReal;
  const std::int64_t chunk = block / segments / real_tiles % chunks.count;
  const std::int64_t head = block / segments / real_tiles / chunks.count;
  const auto& strides = p.grad_out_strides;
  const Storage* const grad_out =
      static_cast<const Storage*>(p.grad_out) + head * strides[2] + r0 * strides[3];
  const bool aligned = rows_are_aligned<Storage>(p.grad_out, strides[0]) &&
                       rows_are_aligned<Storage>(p.grad_out, strides[1]) &&
                       rows_are_aligned<Storage>(p.grad_out, strides[2]);

  TileProduct<Operand, Shape::kColumns, Shape::kReal> product;
  product.clear();
  const std::int64_t per_segment = ceil_div(tiles.count(), segments);
  const std::int64_t end_tile = min_of(tiles.count(), (segment + 1) * per_segment);
  for (std::int64_t tile = segment * per_segment; tile < end_tile; ++tile) {
    Operand* const products = shared.products + tile % 2 * shared.kProducts;
    Operand* const grad_tile = shared.grad_out + tile % 2 * shared.kGradOut;
    const std::int64_t b0 = tiles.first_batch(tile), n0 = tiles.first_position(tile);
    copy_tile<Shape::kTokens, Shape::kReal, Storage>(
        grad_tile, real - r0, strides[3], aligned, [&](int row) {
          const std::int64_t t = n0 + row / tiles.batch, b = b0 + row % tiles.batch;
          return row / tiles.batch < tiles.positions && t < p.length && b < p.batch
                     ? grad_out + b * strides[0] + t * strides[1]
                     : nullptr;
        });
    fill_products<Storage, Operand, Shape::kTokens, Shape::kColumns>(p, tiles, tile, head, chunk,
                                                                     products);
    copy_async_wait();
    __syncthreads();  // one is enough, as in the forward kernel
    product.template multiply<Shape::kTokens, Major::kOuter, Major::kOuter>(products, grad_tile);
  }
  const std::int64_t rows = (segment * p.num_heads + head) * p.in_features;
  product.for_each([&](int column, int r, T value) {
    T* const row = chunks.row(p, weight_parts + rows * 2 * p.num_sines * real,
                              constant_parts + rows * real, chunk, column);
    if (row != nullptr && r0 + r < real) row[r0 + r] = value;
  });
}

// Parts of the scratch memory of the backward pass.
template <class Operand>
struct Workspace {
  using T = core::accumulate_t<Operand>;
  std::int64_t data_segments, weight_segments, position_parts;
  std::int64_t num_freqs, num_weights, num_constants, num_positions;
  double *freqs = nullptr, *positions = nullptr;
  T *weight = nullptr, *constant = nullptr;
  std::size_t size = 0;

  Workspace(const SineFilterBackwardParams& p, void* memory)
      : data_segments(cuda::data_segments<Operand>(p)),
        weight_segments(cuda::weight_segments<Operand>(p)),
        position_parts(TokenTiles(p.batch, p.length, DataShape<Operand>::kTokens).batch_tiles *
                       p.num_heads * FeatureGroups<DataShape<Operand>::kColumns>(p).count),
        num_freqs(p.num_heads * p.in_features * p.num_sines * p.ndim),
        num_weights(p.num_heads * p.in_features * 2 * p.num_sines * p.num_realizations),
        num_constants(p.num_heads * p.in_features * p.num_realizations),
        num_positions(p.length * p.ndim) {
    Carver carver(static_cast<unsigned char*>(memory));
    if (p.grad_freqs != nullptr) freqs = carver.take<double>(data_segments * num_freqs);
    if (p.grad_positions != nullptr)
      positions = carver.take<double>(position_parts * num_positions);
    if (p.grad_weight != nullptr || p.grad_constant != nullptr) {
      weight = carver.take<T>(weight_segments * num_weights);
      if (p.constant != nullptr) constant = carver.take<T>(weight_segments * num_constants);
    }
    size = carver.size();
  }
};

template <class Storage, class Operand>
void backward_data(const SineFilterBackwardParams& p, const Workspace<Operand>& workspace,
                   Stream stream) {
  Carver size;
  if constexpr (sizeof(Storage) == 2) {
    if (has_data_products(p)) {
      SineDataShared<Storage>{size, TokenTiles(p.batch, p.length, kTileTokens), Steps(p)};
      launch(sine_data_kernel<Storage>, grid_of(workspace.data_segments * p.num_heads),
             dim3(kThreads), size.size(), stream, p, workspace.data_segments, workspace.freqs);
      return;
    }
  }
  DataShared<Operand>{size};
  const std::int64_t blocks =
      workspace.data_segments * p.num_heads * FeatureGroups<DataShape<Operand>::kColumns>(p).count;
  launch(backward_data_kernel<Storage, Operand>, grid_of(blocks), dim3(kThreads), size.size(),
         stream, p, workspace.data_segments, workspace.freqs, workspace.positions);
}

template <class Storage, class Operand>
void backward_weight(const SineFilterBackwardParams& p, const Workspace<Operand>& workspace,
                     Stream stream) {
  Carver size;
  const dim3 grid = grid_of(workspace.weight_segments * weight_blocks<Operand>(p));
  if constexpr (sizeof(Storage) == 2) {
    if (has_products(p)) {
      SineWeightShared<Storage>{size, TokenTiles(p.batch, p.length, kWeightTokens), Steps(p)};
      launch(sine_weight_kernel<Storage>, grid, dim3(kThreads), size.size(), stream, p,
             workspace.weight_segments, workspace.weight, workspace.constant);
      return;
    }
  }
  WeightShared<Operand>{size};
  launch(backward_weight_kernel<Storage, Operand>, grid, dim3(kThreads), size.size(), stream, p,
         workspace.weight_segments, workspace.weight, workspace.constant);
}

template <class Storage, class Operand>
void backward(const SineFilterBackwardParams& p, void* memory, Stream stream) {
  using T = core::accumulate_t<Storage>;
  const Workspace<Operand> workspace(p, memory);
  if (p.grad_x != nullptr || p.grad_freqs != nullptr || p.grad_positions != nullptr) {
    backward_data<Storage>(p, workspace, stream);
    if (p.grad_freqs != nullptr)
      sum_parts(workspace.freqs, workspace.data_segments, workspace.num_freqs, p.grad_freqs,
                stream);
    if (p.grad_positions != nullptr)
      sum_parts(workspace.positions, workspace.position_parts, workspace.num_positions,
                p.grad_positions, stream);
  }
  if (p.grad_weight == nullptr && p.grad_constant == nullptr) return;
  backward_weight<Storage>(p, workspace, stream);
  if (p.grad_weight != nullptr)
    sum_parts(workspace.weight, workspace.weight_segments, workspace.num_weights,
              static_cast<T*>(p.grad_weight), stream);
  if (p.grad_constant != nullptr)
    sum_parts(workspace.constant, workspace.weight_segments, workspace.num_constants,
              static_cast<T*>(p.grad_constant), stream);
}

template <class Storage, class Operand>
void forward(const SineFilterParams& p, Stream stream) {
  Carver size;
  if constexpr (sizeof(Storage) == 2) {
    if (has_products(p)) {
      const TokenTiles tiles(p.batch, p.length, kTileTokens);
      SineProductShared<Storage>{size, tiles};
      const std::int64_t blocks =
          tiles.count() * p.num_heads * ceil_div(p.num_realizations, kRealTile);
      launch(sine_product_kernel<Storage>, grid_of(blocks), dim3(kThreads), size.size(), stream, p);
      return;
    }
  }
  using Shape = ForwardShape<Operand>;
  ForwardShared<Operand>{size};
  const std::int64_t blocks = TokenTiles(p.batch, p.length, Shape::kTokens).count() * p.num_heads *
                              ceil_div(p.num_realizations, Shape::kReal);
  launch(forward_kernel<Storage, Operand>, grid_of(blocks), dim3(kThreads), size.size(), stream, p);
}

}  // namespace

void sine_filter_forward(const SineFilterParams& p, bool allow_tf32, Stream stream) {
  visit_operands(p.dtype, allow_tf32, [&](auto storage, auto operand) {
    forward<decltype(storage), decltype(operand)>(p, stream);
  });
}

std::size_t sine_filter_backward_workspace(const SineFilterBackwardParams& p) {
  std::size_t size = 0;
  // The same whether tf32 is allowed or not: tiles of both have the same shapes.
  visit_storage(p.dtype,
                [&](auto storage) { size = Workspace<decltype(storage)>(p, nullptr).size; });
  return size;
}

void sine_filter_backward(const SineFilterBackwardParams& p, void* workspace, bool allow_tf32,
                          Stream stream) {
  visit_operands(p.dtype, allow_tf32, [&](auto storage, auto operand) {
    backward<decltype(storage), decltype(operand)>(p, workspace, stream);
  });
}

}  // namespace torch_spe::cuda
