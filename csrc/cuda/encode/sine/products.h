// Tiles of x (.) basis, which the general kernels of the sine filter multiply with the weight: made
// anywhere, for every type and kind of positions.
#pragma once

#include "encode/phasor.h"
#include "sine_filter.h"

namespace torch_spe::cuda {

TORCH_SPE_INLINE std::int64_t sine_rows(const SineFilterParams& p) {
  return 2 * p.num_sines + (p.constant != nullptr ? 1 : 0);
}

// cos and sin of a sine of a head at position n; `sine` = d K + k.
template <class T>
TORCH_SPE_DEVICE void sine_basis_at(const SineFilterParams& p, std::int64_t head, std::int64_t sine,
                                    std::int64_t n, T* cos_out, T* sin_out) {
  Phasor<T> phasor;
  phasor.set(p, p.freqs + (head * p.in_features * p.num_sines + sine) * p.ndim, n);
  *cos_out = phasor.re;
  *sin_out = phasor.im;
}

// The columns of x (.) basis of a head: cos and sin of every sine of every feature, then, when
// there is a constant, x itself. They come in chunks of kColumns, and no chunk holds both kinds.
template <int kColumns>
struct SineColumnChunks {
  std::int64_t sines, sine_chunks, count;

  TORCH_SPE_INLINE explicit SineColumnChunks(const SineFilterParams& p)
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
TORCH_SPE_DEVICE const Storage* sine_weight_of(const SineFilterParams& p, std::int64_t head) {
  return static_cast<const Storage*>(p.weight) +
         head * p.in_features * 2 * p.num_sines * p.num_realizations;
}
template <class Storage>
TORCH_SPE_DEVICE const Storage* sine_constant_of(const SineFilterParams& p, std::int64_t head) {
  return p.constant == nullptr
             ? nullptr
             : static_cast<const Storage*>(p.constant) + head * p.in_features * p.num_realizations;
}
template <class Storage>
TORCH_SPE_DEVICE bool sine_coefficients_are_aligned(const SineFilterParams& p) {
  return rows_are_aligned<Storage>(p.weight, p.num_realizations) &&
         rows_are_aligned<Storage>(p.constant, p.num_realizations);
}

// x (.) basis for a tile of tokens and a chunk of columns: out[row][column], zero outside.
template <class Storage, class Operand, int kRows, int kColumns>
TORCH_SPE_DEVICE void fill_sine_products(const SineFilterParams& p, const TokenTiles& tiles,
                                         std::int64_t tile, std::int64_t head, std::int64_t chunk,
                                         Operand* out) {
  using T = core::accumulate_t<Storage>;
  constexpr int kRow = row_of<Operand>(kColumns);
  constexpr int kPairs = kColumns / 2;
  const SineColumnChunks<kColumns> chunks(p);
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
    if (inside && is_sine) sine_basis_at(p, head, first, n0 + t, &c, &s);
    for (int b = 0; b < tiles.batch; ++b) {
      T even = 0, odd = 0;
      if (inside && b0 + b < p.batch) {
        const Storage* const token = x + b * p.x_strides[0] + t * p.x_strides[1];
        if (is_sine) {
          const T value = read_feature(p.feature_map, token[d * p.x_strides[3]]);
          even = value * c;
          odd = value * s;
        } else {
          even = read_feature(p.feature_map, token[d * p.x_strides[3]]);
          if (d + 1 < p.in_features)
            odd = read_feature(p.feature_map, token[(d + 1) * p.x_strides[3]]);
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

}  // namespace torch_spe::cuda
