// A single position, as in generation, of the sine and phasor filters: parameters are read once,
// where they lie, and nothing is made for other positions. The whole forward kernels.
// Included by kernels only, like simd.h.
#pragma once

#include "core/phase.h"
#include "core/phasor_filter.h"
#include "core/sine_filter.h"
#include "cpu/rows.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

// Elements of phasors and of weights from which on waking the other threads takes less time than
// they save.
constexpr std::int64_t kPhasorsWorthThreads = 1 << 16;
constexpr std::int64_t kWeightsWorthThreads = 1 << 20;

template <class Params>
TORCH_SPE_INLINE double first_position(const Params& p) {
  return p.positions == nullptr ? p.start : *p.positions;
}

// phi(x) of a head, [B, D].
template <class Storage, class T, class Params>
void load_one_position(const Params& p, std::int64_t head, T* x) {
  const auto from = strided_tile<Storage>(p.x, p.x_strides, 0, 0, head);
  with_feature_map(p.feature_map, [&](auto map) {
    for (std::int64_t b = 0; b < p.batch; ++b)
      load_mapped_row<map.value>(from.row(b, 0, 0), from.column_stride, p.in_features,
                                 x + b * p.in_features);
  });
}

// y[b, r] += x[b] code[r].
template <class T>
TORCH_SPE_INLINE void add_outer(std::int64_t batch, const T* x, std::int64_t x_stride,
                                std::int64_t columns, const T* __restrict code, T* y) {
  for (std::int64_t b = 0; b < batch; ++b) {
    const T scale = x[b * x_stride];
    T* __restrict row = y + b * columns;
    for (std::int64_t r = 0; r < columns; ++r) row[r] += scale * code[r];
  }
}

// out = y, [B, R], of a head.
template <class Storage, class T, class Params>
void store_one_position(const Params& p, std::int64_t head, std::int64_t columns, const T* y) {
  const auto to = contiguous_tile<Storage>(p.out, 1, p.num_heads, columns, 0, 0, head);
  for (std::int64_t b = 0; b < p.batch; ++b)
    store_row(y + b * columns, 1, columns, to.row(b, 0, 0));
}

// Positions with one coordinate.
template <class Storage>
void encode_phasors_of_one_position(const core::PhasorFilterParams& p) {
  using T = core::accumulate_t<Storage>;
  const std::int64_t pairs = p.num_pairs;
  const double position = first_position(p);
  const std::int64_t work = p.num_heads * p.in_features * pairs;
#pragma omp parallel num_threads(p.num_threads) if (work >= kPhasorsWorthThreads)
  {
    Workspace<T> x(p.batch * p.in_features), y(p.batch * 2 * pairs), code(2 * pairs);
    Workspace<T> cos(pairs), sin(pairs);
#pragma omp for schedule(static)
    for (std::int64_t head = 0; head < p.num_heads; ++head) {
      load_one_position<Storage>(p, head, x.get());
      for (std::int64_t k = 0; k < p.batch * 2 * pairs; ++k) y[k] = 0;
      for (std::int64_t d = 0; d < p.in_features; ++d) {
        const std::int64_t row = (head * p.in_features + d) * pairs;
        const double* __restrict freqs = p.freqs + row;
        const T* __restrict c = static_cast<const T*>(p.coefficients) + 2 * row;
        T* __restrict cos_of = cos.get();
        T* __restrict sin_of = sin.get();
        T* __restrict of = code.get();
        for (std::int64_t i = 0; i < pairs; ++i)
          core::cos_sin_cycles(core::reduce_cycles(freqs[i], position), cos_of + i, sin_of + i);
        for (std::int64_t i = 0; i < pairs; ++i) {
          of[2 * i] = c[2 * i] * cos_of[i] - c[2 * i + 1] * sin_of[i];
          of[2 * i + 1] = c[2 * i] * sin_of[i] + c[2 * i + 1] * cos_of[i];
        }
        if (p.constant != nullptr) {
          const T* __restrict constant = static_cast<const T*>(p.constant) + 2 * row;
          for (std::int64_t r = 0; r < 2 * pairs; ++r) of[r] += constant[r];
        }
        add_outer(p.batch, x + d, p.in_features, 2 * pairs, code.get(), y.get());
      }
      store_one_position<Storage>(p, head, 2 * pairs, y.get());
    }
  }
}

// Positions with one coordinate, one row of the batch: sums over rows of the weights. With more
// rows the codes are worth making.
template <class Storage>
void encode_sines_of_one_position(const core::SineFilterParams& p) {
  using T = core::accumulate_t<Storage>;
  const std::int64_t realizations = p.num_realizations, sines = p.num_sines;
  const double position = first_position(p);
  const std::int64_t work = p.num_heads * p.in_features * sines * realizations;
#pragma omp parallel num_threads(p.num_threads) if (work >= kWeightsWorthThreads)
  {
    Workspace<T> x(p.in_features), y(realizations);
    Workspace<T> cos(p.in_features * sines), sin(p.in_features * sines);
#pragma omp for schedule(static)
    for (std::int64_t head = 0; head < p.num_heads; ++head) {
      load_one_position<Storage>(p, head, x.get());
      T* __restrict sums = y.get();
      for (std::int64_t r = 0; r < realizations; ++r) sums[r] = 0;
      const std::int64_t first = head * p.in_features;
      const double* __restrict freqs = p.freqs + first * sines;
      T* __restrict cos_of = cos.get();
      T* __restrict sin_of = sin.get();
      for (std::int64_t k = 0; k < p.in_features * sines; ++k)
        core::cos_sin_cycles(core::reduce_cycles(freqs[k], position), cos_of + k, sin_of + k);
      for (std::int64_t d = 0; d < p.in_features; ++d) {
        const T* __restrict row =
            static_cast<const T*>(p.weight) + (first + d) * 2 * sines * realizations;
        for (std::int64_t k = d * sines; k < (d + 1) * sines; ++k, row += 2 * realizations) {
          const T c = x[d] * cos_of[k], s = x[d] * sin_of[k];
          for (std::int64_t r = 0; r < realizations; ++r)
            sums[r] += c * row[r] + s * row[realizations + r];
        }
        if (p.constant == nullptr) continue;
        const T* __restrict constant =
            static_cast<const T*>(p.constant) + (first + d) * realizations;
        for (std::int64_t r = 0; r < realizations; ++r) sums[r] += x[d] * constant[r];
      }
      store_one_position<Storage>(p, head, realizations, y.get());
    }
  }
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
