// The basis of the sine filter: cos and sin of exact phases at a tile of positions.
// Included by kernels only, like simd.h.
#pragma once

#include "core/phase.h"
#include "core/sine_filter.h"
#include "cpu/simd.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

constexpr std::int64_t kSineTile = 64;  // positions

// Rows J of the basis of a feature: cos and sin of each sine, then 1 if there is a constant.
TORCH_SPE_INLINE std::int64_t num_basis_rows(const core::SineFilterParams& p) {
  return 2 * p.num_sines + (p.constant != nullptr ? 1 : 0);
}

// The basis of the features [d0, d0 + count) of a head at the positions [n0, n0 + size):
// basis[d][j][t], rows of kSineTile; the rows of a feature may be scaled by a column of x.
//
// At consecutive positions the phase of a tile is the exact phase of its first position rotated by
// t steps; the rotations by 0 .. kSineTile - 1 steps are computed once for a head, exactly too, so
// that every value is one complex product away from exact phases, wherever the tile lies.
template <class T>
class SineBasis {
 public:
  explicit SineBasis(const core::SineFilterParams& p)
      : p_(p),
        columns_(p.length == 1 ? 1 : min_of(kSineTile, round_up(p.length, kLanes<T>))),
        steps_(p.positions == nullptr ? p.in_features * p.num_sines * 2 * kSineTile : 0),
        cos_first_(p.in_features * p.num_sines),
        sin_first_(p.in_features * p.num_sines) {
    for (T& one : ones_) one = 1;
  }

  // `columns`, if given, is [d][t].
  void fill(std::int64_t head, std::int64_t n0, std::int64_t size, std::int64_t d0,
            std::int64_t count, T* basis, const T* columns = nullptr) {
    load_head(head);
    const std::int64_t rows = num_basis_rows(p_);
    if (p_.positions == nullptr) {
      first_phases(p_.start + static_cast<double>(n0), count * p_.num_sines,
                   freqs() + d0 * p_.num_sines, cos_first_.get(), sin_first_.get());
    }
    for (std::int64_t d = 0; d < count; ++d) {
      const T* scale = columns == nullptr ? ones_ : columns + d * kSineTile;
      for (std::int64_t k = 0; k < p_.num_sines; ++k) {
        T* cos_row = basis + (d * rows + 2 * k) * kSineTile;
        if (p_.positions == nullptr) {
          rotate(d * p_.num_sines + k, (d0 + d) * p_.num_sines + k, scale, cos_row,
                 cos_row + kSineTile);
        } else {
          at_positions(n0, size, (d0 + d) * p_.num_sines + k, scale, cos_row, cos_row + kSineTile);
        }
      }
      if (p_.constant != nullptr) {
        T* row = basis + (d * rows + rows - 1) * kSineTile;
        for (std::int64_t t = 0; t < columns_; ++t) row[t] = scale[t];
      }
    }
  }

 private:
  void load_head(std::int64_t head) {
    if (head == head_) return;
    head_ = head;
    if (p_.positions != nullptr) return;
    for (std::int64_t dk = 0; dk < p_.in_features * p_.num_sines; ++dk) {
      const double freq = freqs()[dk];
      T* cos_row = steps_ + dk * 2 * kSineTile;
      T* sin_row = cos_row + kSineTile;
      cos_row[0] = 1, sin_row[0] = 0;
      for (std::int64_t t = p_.length == 1 ? columns_ : 0; t < columns_; ++t) {
        core::cos_sin_cycles(core::reduce_cycles(freq, static_cast<double>(t)), cos_row + t,
                             sin_row + t);
      }
    }
  }

  const double* freqs() const { return p_.freqs + head_ * p_.in_features * p_.num_sines * p_.ndim; }

  // Exact phases of `count` sines at one position.
  static void first_phases(double position, std::int64_t count, const double* __restrict freq,
                           T* __restrict cos_first, T* __restrict sin_first) {
    for (std::int64_t i = 0; i < count; ++i) {
      core::cos_sin_cycles(core::reduce_cycles(freq[i], position), cos_first + i, sin_first + i);
    }
  }

  // The first phase of the tile, rotated by 0 .. kSineTile - 1 steps.
  void rotate(std::int64_t i, std::int64_t dk, const T* __restrict scale, T* __restrict cos_row,
              T* __restrict sin_row) const {
    const T c = cos_first_[i], s = sin_first_[i];
    const T* __restrict cos_step = steps_ + dk * 2 * kSineTile;
    const T* __restrict sin_step = cos_step + kSineTile;
    for (std::int64_t t = 0; t < columns_; ++t) {
      cos_row[t] = (c * cos_step[t] - s * sin_step[t]) * scale[t];
      sin_row[t] = (s * cos_step[t] + c * sin_step[t]) * scale[t];
    }
  }

  void at_positions(std::int64_t n0, std::int64_t size, std::int64_t dk, const T* scale, T* cos_row,
                    T* sin_row) const {
    const double* freq = freqs() + dk * p_.ndim;
    const double* position = p_.positions + n0 * p_.ndim;
    double cycles[kSineTile];
    for (std::int64_t t = 0; t < size; ++t)
      cycles[t] = core::reduce_cycles(freq[0], position[t * p_.ndim]);
    for (std::int64_t i = 1; i < p_.ndim; ++i) {
      for (std::int64_t t = 0; t < size; ++t) {
        cycles[t] =
            core::wrap_cycles(cycles[t] + core::reduce_cycles(freq[i], position[t * p_.ndim + i]));
      }
    }
    for (std::int64_t t = 0; t < size; ++t)
      core::cos_sin_cycles(cycles[t], cos_row + t, sin_row + t);
    for (std::int64_t t = 0; t < size; ++t) {
      cos_row[t] *= scale[t];
      sin_row[t] *= scale[t];
    }
  }

  const core::SineFilterParams& p_;
  const std::int64_t columns_;          // that are made: no more than a short sequence needs
  Workspace<T> steps_;                  // [D, K, 2, kSineTile]
  Workspace<T> cos_first_, sin_first_;  // [D, K], at the first position of the tile
  T ones_[kSineTile];
  std::int64_t head_ = -1;
};

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
