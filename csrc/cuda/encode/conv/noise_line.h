#pragma once

#include "encode/conv/line_tiles.h"
#include "normals.h"

namespace torch_spe::cuda {

// Realizations for which one thread makes noise: within one block of the generator.
constexpr int kGaussianGroup = 4, kSignGroup = 8;

// Positions and realizations of a tile of codes, and periods of a window.
template <bool kDenseNoise, int kNumTokens = 64, int kNumRealizations = 32, int kNumPeriods = 32>
struct ConvTileShape {
  static constexpr bool kDense = kDenseNoise;
  static constexpr int kTokens = kNumTokens, kRealizations = kNumRealizations,
                       kWindow = kNumPeriods;
  static_assert(kRealizations % kSignGroup == 0 && 128 % kRealizations == 0);
};

// Where tensor cores make the codes, noise costs most, of which a long tile needs less: it has the
// same number of codes. Elsewhere products cost most, and a long tile multiplies more zeros.
template <class Operand, bool kDense>
using LongConvTile = std::conditional_t<kDense && TileProduct<Operand, 128, 16>::kTensorCores,
                                        ConvTileShape<kDense, 128, 16, 128>, ConvTileShape<kDense>>;

TORCH_SPE_INLINE std::int64_t noise_periods(const core::NoiseParams& noise) {
  return noise.stride[0] * noise.stride[1] * noise.stride[2];
}

// The noise of one head and feature that a tile of positions needs, as far as it is the same for
// all taps of the other dimensions. Positions are relative to the tile's first; period q of
// realization r has its noise at position q s + class(r) - origin, with s the stride of the last
// dimension.
template <class Tile>
class NoiseTile {
 public:
  static constexpr bool kDense = Tile::kDense;
  std::int64_t origin = 0;
  int count;  // periods
  std::int64_t stride;

  TORCH_SPE_DEVICE NoiseTile(const ConvFilterParams& p, const LineTile& place, std::uint64_t seed)
      : count(static_cast<int>(min_of(Tile::kTokens, p.size[2] - place.n0) + p.kernel_size[2] - 1)),
        stride(p.generated.stride[2]),
        p_(p),
        place_(place),
        seed_(seed),
        first_period_(p.generated.start[2] + place.n0) {
    if constexpr (!kDense) {
      const core::NoiseParams& noise = p.generated;
      core::noise_shift(seed_, noise.ndim, place.head, place.d, noise.stride, shift_);
      const std::int64_t first = first_period_ + shift_[2];
      first_period_ = core::floor_divide(first, stride);
      origin = first - first_period_ * stride;
      count = static_cast<int>((origin + count - 1) / stride) + 1;
    }
  }

 protected:
  const ConvFilterParams& p_;
  LineTile place_;
  std::uint64_t seed_;
  std::int64_t shift_[3] = {0, 0, 0};
  std::int64_t first_period_;
};

// The noise of a tile along the line of one tap of the other dimensions.
template <class Tile>
class NoiseLine : public NoiseTile<Tile> {
 public:
  static constexpr bool kDense = Tile::kDense;
  static constexpr int kRealizations = Tile::kRealizations, kWindow = Tile::kWindow;

  TORCH_SPE_DEVICE NoiseLine(const NoiseTile<Tile>& tile, std::int64_t tap0, std::int64_t tap1)
      : NoiseTile<Tile>(tile) {
    line_[0] = place_.i0 + tap0;
    line_[1] = place_.i1 + tap1;
    for (int i = 0; i < 2; ++i) {
      const std::int64_t position = p_.generated.start[i] + line_[i] + shift_[i];
      const std::int64_t s = p_.generated.stride[i];
      period_[i] = kDense ? position : core::floor_divide(position, s);
      phase_[i] = kDense ? 0 : position - period_[i] * s;
    }
  }

  // Whether realization r has noise on this line, which only polyphase noise of several dimensions
  // may lack.
  TORCH_SPE_DEVICE bool has(std::int64_t r) const {
    const std::int64_t* const s = p_.generated.stride;
    return (s[1] == 1 || r / s[2] % s[1] == phase_[1]) &&
           (s[0] == 1 || r / (s[1] * s[2]) % s[0] == phase_[0]);
  }
  TORCH_SPE_DEVICE bool has_any(std::int64_t r0) const {
    if (p_.generated.stride[0] == 1 && p_.generated.stride[1] == 1) return true;
    for (int i = 0; i < kRealizations; ++i) {
      if (has(r0 + i)) return true;
    }
    return false;
  }

  // out[q - first][r - r0] for kWindow periods and kRealizations realizations, without the factor
  // of polyphase noise; 0 where there is none, and some number beyond the last realization.
  template <class Number>
  TORCH_SPE_DEVICE void fill(int first, std::int64_t r0, Number* out) const {
    fill<Number>(first, static_cast<int>(r0), kWindow, this->count - first,
                 static_cast<int>(threadIdx.x), kThreads, [=](int q, int column) {
                   return out + q * row_of<Number>(kRealizations) + column;
                 });
  }

  // The same for some rows of a window by some threads, of which this is one: `at` says where a
  // period and realization go. Generated noise is zero from row `periods` on.
  template <class Number, class At>
  TORCH_SPE_DEVICE void fill(int first, int r0, int rows, int periods, int thread, int threads,
                             const At& at) const {
    if (p_.noise != nullptr) {
      fill_given<Number>(first, r0, rows, thread, threads, at);
      return;
    }
    if (p_.generated.kind == core::NoiseKind::kGaussian) {
      fill_generated<core::NoiseKind::kGaussian, Number>(first, r0, rows, periods, thread, threads,
                                                         at);
    } else {
      fill_generated<core::NoiseKind::kRademacher, Number>(first, r0, rows, periods, thread,
                                                           threads, at);
    }
  }

 private:
  template <class Number, class At>
  TORCH_SPE_DEVICE void fill_given(int first, int r0, int rows, int thread, int threads,
                                   const At& at) const {
    const auto& strides = p_.noise_strides;
    // Read again, or it would be computed for generated noise too.
    const std::int64_t base = place_.head * read_again(strides[0]) +
                              place_.d * read_again(strides[1]) +
                              line_[0] * read_again(strides[2]) + line_[1] * read_again(strides[3]);
    const std::int64_t length = p_.size[2] + p_.kernel_size[2] - 1;
    TORCH_SPE_KEEP_LOOP
    for (int i = thread; i < rows * kRealizations; i += threads) {
      const std::int64_t j = place_.n0 + first + i / kRealizations, r = r0 + i % kRealizations;
      const bool inside = j < length && r < p_.num_realizations;
      const double value =
          inside ? read_as(p_.noise_dtype, p_.noise, base + j * strides[4] + r * strides[5]) : 0.0;
      write(static_cast<core::accumulate_t<Number>>(value),
            at(i / kRealizations, i % kRealizations));
    }
  }

  template <core::NoiseKind kKind, class Number, class At>
  TORCH_SPE_DEVICE void fill_generated(int first, int r0, int rows, int periods, int thread,
                                       int threads, const At& at) const {
    const core::NoiseParams& noise = p_.generated;
    constexpr int kGroup = kKind == core::NoiseKind::kGaussian ? kGaussianGroup : kSignGroup;
    constexpr int kGroups = kRealizations / kGroup;
    // A thread keeps to its realizations.
    const int column = (thread & (kGroups - 1)) * kGroup, r = r0 + column;
    const std::uint32_t source = core::noise_source(place_.head, place_.d);
    const std::uint32_t block =
        core::noise_block(static_cast<std::uint32_t>(kKind), noise.ndim,
                          r / static_cast<int>(core::realizations_of_block(kKind)));
    // Of the position only the bits of the last coordinate advance; in one dimension these are 64,
    // of which the higher ones change in one row at most.
    const std::uint64_t position0 =
        core::noise_position(noise.ndim, period_[0], period_[1], first_period_ + first);
    const auto low0 = static_cast<std::uint32_t>(position0);
    const std::uint32_t mask = noise.ndim == 3 ? 0x1fffffu : 0xffffffffu;
    const std::uint32_t left = 0u - low0;  // rows before that one
    const int wrap = noise.ndim == 1 && left != 0 && left < static_cast<std::uint32_t>(rows)
                         ? static_cast<int>(left)
                         : rows;
    const int end = r < p_.num_realizations ? static_cast<int>(min_of(rows, periods)) : 0;
    const auto make = [&](int q, std::uint32_t high) {
      const std::uint32_t low = (low0 & ~mask) | ((low0 + static_cast<std::uint32_t>(q)) & mask);
      const auto words = core::philox<core::ScalarNumbers>({{low, high, source, block}}, seed_);
      float values[kGroup];
      if constexpr (kKind == core::NoiseKind::kGaussian) {
        normals_of<Number>(words, values);
      } else {
        const std::uint32_t bits = core::word_of(words, r % 128 / 32) >> r % 32;
        TORCH_SPE_UNROLL
        for (int e = 0; e < kGroup; ++e) values[e] = (bits >> e & 1u) != 0 ? -1.0f : 1.0f;
      }
      if constexpr (!kDense) {
        TORCH_SPE_UNROLL
        for (int e = 0; e < kGroup; ++e) values[e] = has(r + e) ? values[e] : 0.0f;
      }
      write_operands(values, at(q, column));
    };
    int q = static_cast<int>(static_cast<unsigned>(thread) / kGroups);
    TORCH_SPE_KEEP_LOOP
    while (q < end) {
      const std::uint32_t high = static_cast<std::uint32_t>(position0 >> 32) + (q < wrap ? 0 : 1);
      const int stop = q < wrap && wrap < end ? wrap : end;
      if constexpr (kWindow > 128) {
        // Where few warps share a multiprocessor, two chains of instructions a warp.
        TORCH_SPE_UNROLL_TWICE
        for (; q < stop; q += threads / kGroups) make(q, high);
      } else {
        TORCH_SPE_KEEP_LOOP
        for (; q < stop; q += threads / kGroups) make(q, high);
      }
    }
    TORCH_SPE_KEEP_LOOP
    for (; q < rows; q += threads / kGroups) {
      constexpr float kZeros[kGroup] = {};
      write_operands(kZeros, at(q, column));
    }
  }

  using NoiseTile<Tile>::p_, NoiseTile<Tile>::place_, NoiseTile<Tile>::seed_,
      NoiseTile<Tile>::shift_, NoiseTile<Tile>::first_period_;
  std::int64_t line_[2], period_[2], phase_[2];
};

}  // namespace torch_spe::cuda
