// Exact sines, tile by tile, wherever the tile stands: encoded rows, and from their gradient those
// of x and of the parameters. Included by kernels only, like simd.h.
#pragma once

#include "cpu/encode/sine_features_phasors.h"
#include "cpu/rows.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

// Rows of the batch that share phasors.
constexpr std::int64_t kSineFeaturesRows = 4;

// What a tile covers: positions [n, n + size), n a multiple of kPhasorChunk and size at most
// kPhasorChunk, `rows` batch rows, at most kSineFeaturesRows, and heads [head, head + heads).
struct SineFeaturesTile {
  std::int64_t n, size, rows, head, heads;
};

// Columns of an encoded row.
TORCH_SPE_INLINE std::int64_t num_outputs(const core::SineFeaturesParams& p) {
  return (2 * p.num_sines + (p.constant == nullptr ? 0 : 1)) * p.in_features;
}

// phi(x) of up to kTrio positions and some batch rows.
template <class T, class Storage>
TORCH_SPE_INLINE void load_mapped_trio(core::FeatureMap map, const TileView<const Storage>& x,
                                       std::int64_t rows, std::int64_t t, std::int64_t count,
                                       std::int64_t head, std::int64_t d, std::int64_t lanes,
                                       Vec<T> (&out)[kSineFeaturesRows][kTrio]) {
  for (std::int64_t b = 0; b < rows; ++b) {
    for (std::int64_t j = 0; j < count; ++j) {
      out[b][j] =
          load_lanes<T>(x.row(b, t + j, head) + d * x.column_stride, x.column_stride, lanes);
    }
  }
  if (map == core::FeatureMap::kIdentity) return;
  with_feature_map(map, [&](auto tag) {
    for (std::int64_t b = 0; b < rows; ++b) {
      for (std::int64_t j = 0; j < count; ++j) out[b][j] = map_lanes<tag.value, T>(out[b][j]);
    }
  });
}

// Some positions, batch rows and features of one head in a tile: a vector of features, at most
// kTrio positions. Sizes that are known when this is inlined unroll its loops.
template <class T, class Storage, class Out>
TORCH_SPE_INLINE void encode_trio(SineFeaturesPhasors<T>& phasors, const TileView<const Storage>& x,
                                  const TileView<Out>& encoded, std::int64_t head, std::int64_t h,
                                  std::int64_t d, std::int64_t t, std::int64_t rows,
                                  std::int64_t count, std::int64_t lanes) {
  const core::SineFeaturesParams& p = phasors.params();
  const std::int64_t features = p.in_features;
  Vec<T> row[kSineFeaturesRows][kTrio];
  Out* out[kSineFeaturesRows][kTrio];
  load_mapped_trio<T>(p.feature_map, x, rows, t, count, h, d, lanes, row);
  for (std::int64_t b = 0; b < rows; ++b) {
    for (std::int64_t j = 0; j < count; ++j) out[b][j] = encoded.row(b, t + j, h) + d;
  }
  for (std::int64_t k = 0; k < p.num_sines; ++k) {
    Complex<T> e[kTrio];
    phasors.next(head * p.num_sines + k, d, t, e);
    const Vec<T> amplitude = phasors.amplitudes(head * p.num_sines + k, d);
    for (std::int64_t b = 0; b < rows; ++b) {
      for (std::int64_t j = 0; j < count; ++j) {
        const Vec<T> scaled = amplitude * row[b][j];
        store_lanes<T>(scaled * e[j].re, out[b][j] + 2 * k * features, lanes);
        store_lanes<T>(scaled * e[j].im, out[b][j] + (2 * k + 1) * features, lanes);
      }
    }
  }
  if (p.constant == nullptr) return;
  for (std::int64_t b = 0; b < rows; ++b) {
    for (std::int64_t j = 0; j < count; ++j) {
      store_lanes<T>(phasors.constant(head, d) * row[b][j], out[b][j] + 2 * p.num_sines * features,
                     lanes);
    }
  }
}

// Makes the encoded rows of a tile. The heads, features and batch rows of three positions lie next
// to each other, and are gone through in the order of memory: this costs what reading x and writing
// the result costs.
template <class T, class Storage, class Out>
void encode_sine_features_tile(SineFeaturesPhasors<T>& phasors, const SineFeaturesTile& tile,
                               const TileView<const Storage>& x,  // [rows, size, heads, D]
                               const TileView<Out>& encoded) {    // [rows, size, heads, J D]
  constexpr std::int64_t kWidth = kLanes<T>;
  const std::int64_t features = phasors.params().in_features;
  phasors.go_to(tile.n, tile.head, tile.heads);
  for (std::int64_t t = 0; t < tile.size; t += kTrio) {
    const std::int64_t count = min_of(kTrio, tile.size - t);
    for (std::int64_t h = 0; h < tile.heads; ++h) {
      for (std::int64_t d = 0; d < features; d += kWidth) {
        const std::int64_t head = tile.head + h, lanes = min_of(kWidth, features - d);
        if (tile.rows == 1 && count == kTrio && lanes == kWidth) {
          encode_trio(phasors, x, encoded, head, h, d, t, 1, kTrio, kWidth);
        } else {
          encode_trio(phasors, x, encoded, head, h, d, t, tile.rows, count, lanes);
        }
      }
    }
  }
}

// Gradients of the parameters, summed over positions. With g the output's gradient for a sine as a
// complex number, G = sum_b x[b] g[b] and w = G conj(e),
//   dx = amplitude Re(g conj(e)), damplitude = Re(w), dphase = amplitude Im(w).
// For a sine and a feature: Re(w), dphase, and the gradient of the frequency for each coordinate;
// and for a feature: the gradient of the constant.
class SineFeaturesSums {
 public:
  SineFeaturesSums(const core::SineFeaturesParams& p, std::int64_t width, double* sums)
      : sines_(p.num_heads * p.num_sines), sums_of_sine_(2 + p.ndim), width_(width), sums_(sums) {}

  // Elements that `sums` holds.
  static std::int64_t size(const core::SineFeaturesParams& p, std::int64_t width) {
    return p.num_heads * (p.num_sines * (2 + p.ndim) + 1) * width;
  }

  double* amplitudes(std::int64_t row) const { return of_sine(row, 0); }
  double* offsets(std::int64_t row) const { return of_sine(row, 1); }
  // Coordinates are `width` apart.
  double* freqs(std::int64_t row) const { return of_sine(row, 2); }
  double* constant(std::int64_t head) const { return of_sine(sines_, 0) + head * width_; }

 private:
  double* of_sine(std::int64_t row, std::int64_t which) const {
    return sums_ + (row * sums_of_sine_ + which) * width_;
  }

  const std::int64_t sines_, sums_of_sine_, width_;
  double* const sums_;
};

// Writes the sums of `heads` heads, the first of which is `first`, as gradients.
TORCH_SPE_INLINE void store_gradients(const core::SineFeaturesBackwardParams& p, std::int64_t first,
                                      std::int64_t heads, std::int64_t width,
                                      const SineFeaturesSums& sums) {
  for (std::int64_t head = 0; head < heads; ++head) {
    for (std::int64_t d = 0; d < p.in_features; ++d) {
      const std::int64_t feature = (first + head) * p.in_features + d;
      if (p.grad_constant != nullptr) p.grad_constant[feature] = sums.constant(head)[d];
      for (std::int64_t k = 0; k < p.num_sines; ++k) {
        const std::int64_t row = head * p.num_sines + k, at = feature * p.num_sines + k;
        if (p.grad_amplitudes != nullptr) p.grad_amplitudes[at] = sums.amplitudes(row)[d];
        if (p.grad_offsets != nullptr) p.grad_offsets[at] = sums.offsets(row)[d];
        for (std::int64_t a = 0; a < p.ndim && p.grad_freqs != nullptr; ++a)
          p.grad_freqs[at * p.ndim + a] = sums.freqs(row)[a * width + d];
      }
    }
  }
}

// Adds up the gradients of a tile: first in the type of computation, then to the sums in double.
template <class T>
class SineFeaturesGradient {
  static constexpr std::int64_t kWidth = kLanes<T>;

 public:
  // The phasors may be at other positions between tiles.
  explicit SineFeaturesGradient(SineFeaturesPhasors<T>& phasors)
      : p_(phasors.params()),
        phasors_(phasors),
        width_(phasors.width()),
        tile_sums_(p_.num_heads * p_.num_sines * 3 * width_),
        tile_constant_(p_.num_heads * width_) {}

  // From the gradient of a tile's encoded rows, that of x (unless grad_x.first is null); adds those
  // of the parameters to `sums`, and those of given positions to grad_positions, [N, ndim] or null.
  template <class Storage, class In, class Out>
  void add_tile(const SineFeaturesTile& tile,
                const TileView<const Storage>& x,    // [rows, size, heads, D]
                const TileView<const In>& grad_out,  // [rows, size, heads, J D]
                const TileView<Out>& grad_x,         // [rows, size, heads, D]
                const SineFeaturesSums& sums, double* grad_positions) {
    phasors_.go_to(tile.n, tile.head, tile.heads);
    clear_tile_sums(tile);
    for (std::int64_t t = 0; t < tile.size; t += kTrio) {
      for (std::int64_t h = 0; h < tile.heads; ++h) {
        for (std::int64_t d = 0; d < p_.in_features; d += kWidth) {
          const std::int64_t count = min_of(kTrio, tile.size - t);
          const std::int64_t lanes = min_of(kWidth, p_.in_features - d);
          if (tile.rows == 1 && count == kTrio && lanes == kWidth) {
            add_trio(tile, h, d, t, 1, kTrio, kWidth, x, grad_out, grad_x, sums, grad_positions);
          } else {
            add_trio(tile, h, d, t, tile.rows, count, lanes, x, grad_out, grad_x, sums,
                     grad_positions);
          }
        }
      }
    }
    add_tile_sums(tile, sums);
  }

 private:
  // Sizes that are known when this is inlined unroll its loops.
  template <class Storage, class In, class Out>
  TORCH_SPE_INLINE void add_trio(const SineFeaturesTile& tile, std::int64_t h, std::int64_t d,
                                 std::int64_t t, std::int64_t rows, std::int64_t count,
                                 std::int64_t lanes, const TileView<const Storage>& x,
                                 const TileView<const In>& grad_out, const TileView<Out>& grad_x,
                                 const SineFeaturesSums& sums, double* grad_positions) {
    const std::int64_t head = tile.head + h;
    const std::int64_t g_stride = grad_out.column_stride;
    Vec<T> row[kSineFeaturesRows][kTrio], grad_row[kSineFeaturesRows][kTrio];
    const In* g[kSineFeaturesRows][kTrio];
    Vec<T> grad_constant = {};
    load_mapped_trio<T>(p_.feature_map, x, rows, t, count, h, d, lanes, row);
    for (std::int64_t b = 0; b < rows; ++b) {
      for (std::int64_t j = 0; j < count; ++j) {
        g[b][j] = grad_out.row(b, t + j, h) + d * g_stride;
        grad_row[b][j] = Vec<T>{};
        if (p_.constant == nullptr) continue;
        const Vec<T> last =
            load_lanes<T>(g[b][j] + 2 * p_.num_sines * p_.in_features * g_stride, g_stride, lanes);
        grad_row[b][j] = last * phasors_.constant(head, d);
        grad_constant += last * row[b][j];
      }
    }
    if (p_.constant != nullptr) accumulate(grad_constant, tile_constant_ + head * width_ + d);
    for (std::int64_t k = 0; k < p_.num_sines; ++k) {
      const std::int64_t sine = head * p_.num_sines + k;
      const Vec<T> amplitude = phasors_.amplitudes(sine, d);
      Complex<T> e[kTrio];
      phasors_.next(sine, d, t, e);
      Vec<T> grad_amplitude = {}, grad_offset = {}, moment = {};
      alignas(64) T grad_phase[kTrio * kWidth];
      for (std::int64_t j = 0; j < count; ++j) {
        Complex<T> product = {};  // G
        for (std::int64_t b = 0; b < rows; ++b) {
          const In* at = g[b][j] + 2 * k * p_.in_features * g_stride;
          const Vec<T> re = load_lanes<T>(at, g_stride, lanes);
          const Vec<T> im = load_lanes<T>(at + p_.in_features * g_stride, g_stride, lanes);
          product.re += row[b][j] * re;
          product.im += row[b][j] * im;
          grad_row[b][j] += amplitude * (re * e[j].re + im * e[j].im);
        }
        const Vec<T> phase = amplitude * (product.im * e[j].re - product.re * e[j].im);
        grad_amplitude += product.re * e[j].re + product.im * e[j].im;
        grad_offset += phase;
        moment += static_cast<T>(t + j) * phase;
        store_vec(grad_phase + j * kWidth, phase);
      }
      T* tile_sums = tile_sums_ + sine * 3 * width_ + d;
      accumulate(grad_amplitude, tile_sums);
      accumulate(grad_offset, tile_sums + width_);
      accumulate(moment, tile_sums + 2 * width_);
      if (p_.positions != nullptr) {
        add_phase_gradients<T>(
            p_.ndim, count, grad_phase, p_.positions + (tile.n + t) * p_.ndim,
            phasors_.freqs(sine, d), phasors_.freqs_stride(), sums.freqs(sine) + d, width_,
            grad_positions == nullptr ? nullptr : grad_positions + (tile.n + t) * p_.ndim);
      }
    }
    if (grad_x.first == nullptr) return;
    if (p_.feature_map != core::FeatureMap::kIdentity) {
      with_feature_map(p_.feature_map, [&](auto map) {
        for (std::int64_t b = 0; b < rows; ++b) {
          for (std::int64_t j = 0; j < count; ++j)
            grad_row[b][j] = scale_lanes_by_derivative<map.value, T>(row[b][j], grad_row[b][j]);
        }
      });
    }
    for (std::int64_t b = 0; b < rows; ++b) {
      for (std::int64_t j = 0; j < count; ++j)
        store_lanes<T>(grad_row[b][j], grad_x.row(b, t + j, h) + d, lanes);
    }
  }

  static TORCH_SPE_INLINE void accumulate(const Vec<T>& value, T* sum) {
    store_vec(sum, load_vec(sum) + value);
  }

  void clear_tile_sums(const SineFeaturesTile& tile) {
    T* sines = tile_sums_ + tile.head * p_.num_sines * 3 * width_;
    T* constant = tile_constant_ + tile.head * width_;
    for (std::int64_t i = 0; i < tile.heads * p_.num_sines * 3 * width_; ++i) sines[i] = 0;
    for (std::int64_t i = 0; i < tile.heads * width_; ++i) constant[i] = 0;
  }

  void add_tile_sums(const SineFeaturesTile& tile, const SineFeaturesSums& sums) const {
    const double position = p_.start + static_cast<double>(tile.n);
    const std::int64_t end = tile.head + tile.heads;
    for (std::int64_t row = tile.head * p_.num_sines; row < end * p_.num_sines; ++row) {
      const T* tile_sums = tile_sums_ + row * 3 * width_;
      double* amplitude = sums.amplitudes(row);
      double* offset = sums.offsets(row);
      for (std::int64_t d = 0; d < width_; ++d) {
        amplitude[d] += tile_sums[d];
        offset[d] += tile_sums[width_ + d];
      }
      if (p_.positions != nullptr) continue;
      // The phase is 2 pi f n, and `moment` counts positions from the tile's start.
      double* freq = sums.freqs(row);
      for (std::int64_t d = 0; d < width_; ++d)
        freq[d] += core::kTwoPi * (position * tile_sums[width_ + d] + tile_sums[2 * width_ + d]);
    }
    for (std::int64_t head = tile.head; head < end; ++head) {
      double* constant = sums.constant(head);
      for (std::int64_t d = 0; d < width_; ++d) constant[d] += tile_constant_[head * width_ + d];
    }
  }

  const core::SineFeaturesParams& p_;
  SineFeaturesPhasors<T>& phasors_;
  const std::int64_t width_;    // D, filled up
  Workspace<T> tile_sums_;      // [H K, 3, D]: Re(w), dphase, t dphase
  Workspace<T> tile_constant_;  // [H, D]
};

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
