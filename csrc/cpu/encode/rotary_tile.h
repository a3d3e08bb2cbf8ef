// Rotary positions, tile by tile, wherever the tile stands: the phasors of positions, rows rotated
// by them, and the gradients of rows and phases. Included by kernels only, like simd.h.
#pragma once

#include "core/rotary.h"
#include "cpu/encode/phasors.h"
#include "cpu/rows.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

// The phasors of some heads at a position, laid out for rows whose pairs of features lie side by
// side: for each head the cosines, each twice, then the sines, each twice, the first time with a
// minus. So a rotated row is x * cosines + swapped(x) * sines.
//
// At consecutive positions the phasor of a position is the exact one of its block's first position
// rotated by an exact phasor of 0 .. kBlock - 1 steps: every value is one complex product away from
// exact phases, wherever the position lies, and in whatever order positions are asked for.
template <class T>
class RotaryPhasors {
 public:
  static constexpr std::int64_t kBlock = 16;

  RotaryPhasors(const core::RotaryParams& p, std::int64_t first_head, std::int64_t heads)
      : p_(p),
        consecutive_(p.positions == nullptr),
        heads_(heads),
        pairs_(p.in_features / 2),
        width_(round_up(p.in_features, kLanes<T>)),
        freqs_(p.freqs + first_head * pairs_),
        cos_(heads * pairs_),
        sin_(heads * pairs_),
        rows_(2 * width_),
        row_(size()),
        block_(consecutive_ ? size() : 0),
        steps_(consecutive_ ? min_of(kBlock, p.length) * size() : 0) {
    // Filled up with zeros.
    for (std::int64_t i = 0; i < 2 * width_; ++i) rows_[i] = 0;
    for (std::int64_t i = 0; i < size(); ++i) row_[i] = 0;
    if (!consecutive_) return;
    for (std::int64_t i = 0; i < size(); ++i) block_[i] = 0;
    for (std::int64_t t = 0; t < min_of(kBlock, p.length); ++t) {
      for (std::int64_t i = 0; i < size(); ++i) steps_[t * size() + i] = 0;
      fill(static_cast<double>(t), steps_ + t * size());
    }
  }

  std::int64_t heads() const { return heads_; }
  // Scratch rows for what is stored in another type than it is computed in, [D filled up].
  T* x_row() const { return rows_; }
  T* encoded_row() const { return rows_ + width_; }
  std::int64_t width() const { return width_; }
  const double* freqs() const { return freqs_; }  // [heads, D/2]
  double position(std::int64_t n) const {
    return consecutive_ ? p_.start + static_cast<double>(n) : p_.positions[n];
  }

  // The phasors at a position, [heads, 2, D filled up], valid until the next call.
  const T* at(std::int64_t n) {
    if (!consecutive_) {
      fill(position(n), row_);
      return row_;
    }
    if (n / kBlock != block_index_) {
      block_index_ = n / kBlock;
      fill(position(block_index_ * kBlock), block_);
    }
    const T* steps = steps_ + n % kBlock * size();
    for (std::int64_t at = 0; at < size(); at += 2 * width_) {
      for (std::int64_t d = at; d < at + width_; d += kLanes<T>) {
        const Vec<T> c = load_vec(block_ + d), s = load_vec(block_ + d + width_);
        const Vec<T> cos_step = load_vec(steps + d), sin_step = load_vec(steps + d + width_);
        store_vec(row_ + d, c * cos_step - s * sin_step);
        store_vec(row_ + d + width_, c * sin_step + s * cos_step);
      }
    }
    return row_;
  }

 private:
  std::int64_t size() const { return heads_ * 2 * width_; }

  void fill(double position, T* out) {
    exact_phasors<T>(1, freqs_, 0, heads_ * pairs_, &position, cos_, sin_);
    for (std::int64_t head = 0; head < heads_; ++head, out += 2 * width_) {
      const T* c = cos_ + head * pairs_;
      const T* s = sin_ + head * pairs_;
      for (std::int64_t i = 0; i < pairs_; ++i) {
        out[2 * i] = out[2 * i + 1] = c[i];
        out[width_ + 2 * i] = -s[i];
        out[width_ + 2 * i + 1] = s[i];
      }
    }
  }

  const core::RotaryParams& p_;
  const bool consecutive_;
  const std::int64_t heads_, pairs_, width_;
  const double* freqs_;
  Workspace<T> cos_, sin_;  // [heads, D/2]
  Workspace<T> rows_;
  Workspace<T> row_, block_;  // [heads, 2, D filled up]
  Workspace<T> steps_;        // [kBlock, heads, 2, D filled up]
  std::int64_t block_index_ = -1;
};

template <class T, std::size_t... kLane>
TORCH_SPE_INLINE Vec<T> swap_pairs_of(Vec<T> row, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(row, row, (static_cast<int>(kLane) ^ 1)...);
}
// Features 2i + 1 and 2i in each other's place.
template <class T>
TORCH_SPE_INLINE Vec<T> swap_pairs(Vec<T> row) {
  return swap_pairs_of<T>(row, std::make_index_sequence<static_cast<std::size_t>(kLanes<T>)>{});
}

// Calls function(d, count) for the vectors of a row; `count` is the number of lanes but for a rest.
template <class T, class Function>
TORCH_SPE_INLINE void for_each_vector(std::int64_t features, const Function& function) {
  std::int64_t d = 0;
  for (; d + kLanes<T> <= features; d += kLanes<T>) function(d, kLanes<T>);
  if (d < features) function(d, features - d);
}

// Makes the encoded rows of the positions [n, n + size) and of some batch rows.
template <core::FeatureMap kMap, class T, class Storage, class Out>
void encode_rotary_tile(RotaryPhasors<T>& phasors, std::int64_t features, std::int64_t n,
                        std::int64_t size, std::int64_t batch,
                        const TileView<const Storage>& x,  // [batch, size, heads, D]
                        const TileView<Out>& out) {        // [batch, size, heads, D]
  const std::int64_t width = phasors.width(), heads = phasors.heads();
  for (std::int64_t t = 0; t < size; ++t) {
    const T* const phasors_of_position = phasors.at(n + t);
    for (std::int64_t b = 0; b < batch; ++b) {
      const T* c = phasors_of_position;
      for (std::int64_t head = 0; head < heads; ++head, c += 2 * width) {
        const Storage* const from = x.row(b, t, head);
        Out* const to = out.row(b, t, head);
        if constexpr (sizeof(Storage) == sizeof(T) && sizeof(Out) == sizeof(T)) {
          for_each_vector<T>(features, [&](std::int64_t d, std::int64_t count) {
            const Vec<T> row = map_lanes<kMap, T>(
                load_lanes<T>(from + d * x.column_stride, x.column_stride, count));
            store_lanes<T>(row * load_vec(c + d) + swap_pairs<T>(row) * load_vec(c + width + d),
                           to + d, count);
          });
        } else {  // whole rows are converted faster than vectors
          T* const row = phasors.x_row();
          T* const encoded = phasors.encoded_row();
          load_mapped_row<kMap>(from, x.column_stride, features, row);
          for (std::int64_t d = 0; d < width; d += kLanes<T>) {
            const Vec<T> value = load_vec(row + d);
            store_vec(encoded + d,
                      value * load_vec(c + d) + swap_pairs<T>(value) * load_vec(c + width + d));
          }
          store_row(encoded, 1, features, to);
        }
      }
    }
  }
}

// From the gradient of the encoded rows, that of x (unless grad_x.first is null) and, with kPhases,
// those of the phases: grad_phases(n, products) is called for each position with products
// [heads, D filled up], summed over the batch rows, of which the difference of elements 2i and
// 2i + 1 is the gradient of the phase of pair i in radians.
template <core::FeatureMap kMap, bool kPhases, class T, class Storage, class In, class Out,
          class GradPhases>
void differentiate_rotary_tile(RotaryPhasors<T>& phasors, std::int64_t features, std::int64_t n,
                               std::int64_t size, std::int64_t batch,
                               const TileView<const Storage>& x,    // [batch, size, heads, D]
                               const TileView<const In>& grad_out,  // [batch, size, heads, D]
                               const TileView<Out>& grad_x,         // [batch, size, heads, D]
                               T* products, const GradPhases& grad_phases) {
  // With the phase theta, y = x e^(i theta): dx = dy e^(-i theta), dtheta = x_2i dx_2i+1 - x_2i+1
  // dx_2i.
  constexpr bool kReadsX = kPhases || kMap != core::FeatureMap::kIdentity;
  const std::int64_t width = phasors.width(), heads = phasors.heads();
  for (std::int64_t t = 0; t < size; ++t) {
    const T* const phasors_of_position = phasors.at(n + t);
    if constexpr (kPhases) {
      for (std::int64_t i = 0; i < heads * width; ++i) products[i] = 0;
    }
    for (std::int64_t b = 0; b < batch; ++b) {
      const T* c = phasors_of_position;
      for (std::int64_t head = 0; head < heads; ++head, c += 2 * width) {
        const Storage* const from = x.row(b, t, head);
        const In* const grad = grad_out.row(b, t, head);
        if constexpr (sizeof(Storage) == sizeof(T) && sizeof(In) == sizeof(T) &&
                      sizeof(Out) == sizeof(T)) {
          for_each_vector<T>(features, [&](std::int64_t d, std::int64_t count) {
            const Vec<T> g =
                load_lanes<T>(grad + d * grad_out.column_stride, grad_out.column_stride, count);
            Vec<T> dx = g * load_vec(c + d) - swap_pairs<T>(g) * load_vec(c + width + d);
            if constexpr (kReadsX) {
              const Vec<T> row = map_lanes<kMap, T>(
                  load_lanes<T>(from + d * x.column_stride, x.column_stride, count));
              if constexpr (kPhases) {
                T* sum = products + head * width + d;
                store_vec(sum, load_vec(sum) + row * swap_pairs<T>(dx));
              }
              dx = scale_lanes_by_derivative<kMap, T>(row, dx);
            }
            if (grad_x.first != nullptr) store_lanes<T>(dx, grad_x.row(b, t, head) + d, count);
          });
        } else {
          T* const row = phasors.x_row();
          T* const dx = phasors.encoded_row();
          load_row(grad, grad_out.column_stride, features, dx);
          for (std::int64_t d = 0; d < width; d += kLanes<T>) {
            const Vec<T> g = load_vec(dx + d);
            store_vec(dx + d, g * load_vec(c + d) - swap_pairs<T>(g) * load_vec(c + width + d));
          }
          if constexpr (kReadsX) load_mapped_row<kMap>(from, x.column_stride, features, row);
          if constexpr (kPhases) {
            T* const sums = products + head * width;
            for (std::int64_t d = 0; d < width; d += kLanes<T>) {
              store_vec(sums + d,
                        load_vec(sums + d) + load_vec(row + d) * swap_pairs<T>(load_vec(dx + d)));
            }
          }
          scale_by_derivative<kMap>(row, features, dx);
          if (grad_x.first != nullptr) store_row(dx, 1, features, grad_x.row(b, t, head));
        }
      }
    }
    if constexpr (kPhases) grad_phases(n + t, products);
  }
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
