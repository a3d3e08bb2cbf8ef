// The sine filter of 16-bit values at consecutive positions, on tensor cores. The products
// x (.) basis are made in registers, just where the tensor cores want them.
//
// Weights come in steps of 16 rows: the cos and the sin of the k-th sine of 8 features. After the K
// sines of these follows, when there is a constant, one whose phase is always 0: the constant takes
// the place of its cos, and 0 that of its sin. Four steps at a time are brought into shared memory,
// with their basis, while the tensor cores work on the four before.
#pragma once

#include "encode/phasor.h"
#include "sine_filter.h"

namespace torch_spe::cuda {

constexpr int kStepFeatures = 8;  // features of a step
constexpr int kStepRows = 2 * kStepFeatures;
constexpr int kStageSteps = 4;
constexpr int kStageSines = kStageSteps * kStepFeatures;
constexpr int kStageRows = kStageSteps * kStepRows;
constexpr int kSineTileRealizations = 64;
constexpr int kSineTileTokens = 128;
constexpr int kSineWarpTokens = kSineTileTokens / kWarps;

TORCH_SPE_DEVICE void fast_cos_sin_of(std::uint32_t phase, float* cos_out, float* sin_out) {
  fast_cos_sin(core::angle_of(phase), cos_out, sin_out);
}

// SineStep k of a group of 8 features.
struct SineStep {
  std::int64_t group, k;
};

struct SineSteps {
  std::int64_t features, sines, per_group, groups, count;

  TORCH_SPE_INLINE explicit SineSteps(const SineFilterParams& p)
      : features(p.in_features),
        sines(p.num_sines),
        per_group(p.num_sines + (p.constant != nullptr ? 1 : 0)),
        groups(ceil_div(p.in_features, kStepFeatures)),
        count(groups * per_group) {}
  TORCH_SPE_DEVICE SineStep at(std::int64_t step) const {
    // 32 bits: divisions of 64 take ten times as long.
    const auto size = static_cast<std::uint32_t>(per_group);
    const auto group = static_cast<std::uint32_t>(step) / size;
    return {group, static_cast<std::uint32_t>(step) - group * size};
  }
  // The index of feature f's sine of a step among those of a head, or -1 if there is none.
  TORCH_SPE_DEVICE std::int64_t sine(const SineStep& step, int f) const {
    const std::int64_t d = step.group * kStepFeatures + f;
    return d < features && step.k < sines ? d * sines + step.k : -1;
  }
  // The row of a head's weight [D, 2K, R] or constant [D, R] for feature f's cos (part 0) or sin
  // (part 1), or null.
  template <class Number>
  TORCH_SPE_DEVICE Number* row(const SineStep& step, int f, int part, std::int64_t realizations,
                               Number* weight, Number* constant) const {
    const std::int64_t d = step.group * kStepFeatures + f;
    if (d >= features) return nullptr;
    if (step.k < sines) return weight + ((d * sines + step.k) * 2 + part) * realizations;
    return part == 0 && constant != nullptr ? constant + d * realizations : nullptr;
  }
};

// A head's weight and constant.
template <class Storage>
struct SineCoefficients {
  const Storage *weight, *constant;
  std::int64_t realizations;
  bool aligned;

  TORCH_SPE_DEVICE SineCoefficients(const SineFilterParams& p, std::int64_t head)
      : weight(static_cast<const Storage*>(p.weight) +
               head * p.in_features * 2 * p.num_sines * p.num_realizations),
        constant(p.constant == nullptr ? nullptr
                                       : static_cast<const Storage*>(p.constant) +
                                             head * p.in_features * p.num_realizations),
        realizations(p.num_realizations),
        aligned(rows_are_aligned<Storage>(p.weight, realizations) &&
                rows_are_aligned<Storage>(p.constant, realizations)) {}

  // Starts to copy row `kk` of 16 of a step, realizations [r0, r0 + kSineTileRealizations), into
  // the tile `out`: 8 threads take a row. cos and sin of a feature are neighbours, or 8 rows apart.
  template <bool kNeighbours>
  TORCH_SPE_DEVICE void copy(const SineSteps& steps, const SineStep& step, std::int64_t r0,
                             Storage* out) const {
    const int kk = static_cast<int>(threadIdx.x) / 8,
              column = static_cast<int>(threadIdx.x) % 8 * 8;
    const int f = kNeighbours ? kk / 2 : kk % kStepFeatures,
              part = kNeighbours ? kk % 2 : kk / kStepFeatures;
    const Storage* const row = steps.row(step, f, part, realizations, weight, constant);
    Storage* const to = out + kk * row_of<Storage>(kSineTileRealizations) + column;
    const std::int64_t left = realizations - r0 - column;
    if (aligned && row != nullptr && left >= 8) {
      copy_async16(to, row + r0 + column);
    } else {
      for (int e = 0; e < 8; ++e) {
        to[e].bits = row != nullptr && e < left ? row[r0 + column + e].bits : std::uint16_t(0);
      }
    }
  }
};

// (cos, sin) of the sines of a stage as pairs of 16 bits, out[position][slot]: four threads make
// one sine, each a quarter of the positions. In kInterleaved order features f and f + 4 of a step
// are neighbours.
template <class Storage, bool kInterleaved, int kRow>
TORCH_SPE_DEVICE void fill_stage_basis(const SineFilterParams& p, const SineSteps& steps,
                                       const SineStep& step, std::int64_t head, std::int64_t n0,
                                       int positions, std::uint32_t* out) {
  const int slot = static_cast<int>(threadIdx.x) % kStageSines, in_step = slot % kStepFeatures;
  const int f = kInterleaved ? in_step / 2 + in_step % 2 * (kStepFeatures / 2) : in_step;
  const int quarter = (positions + 3) / 4;
  const int begin = static_cast<int>(threadIdx.x) / kStageSines * quarter;
  const int end = begin + quarter < positions ? begin + quarter : positions;
  const std::int64_t sine = steps.sine(step, f);
  core::FixedPhases fixed;
  if (sine >= 0) fixed.set(p.freqs[head * steps.features * steps.sines + sine], p.start);
  std::uint32_t phase = fixed.at(n0 + begin);
  for (int t = begin; t < end; ++t, phase += fixed.short_step()) {
    float c, s;
    fast_cos_sin_of(phase, &c, &s);
    out[t * kRow + slot] = pack_pair<Storage>(c, s);
  }
}

}  // namespace torch_spe::cuda
