// Rotation of pairs of features at a run of consecutive positions, for kernels: from and to
// registers, wherever the features are stored.
#pragma once

#include "encode/phasor.h"
#include "rotary.h"

namespace torch_spe::cuda {

constexpr int kRotaryRun = 8;  // positions

TORCH_SPE_DEVICE double rotary_position(const RotaryParams& p, std::int64_t n) {
  return p.positions == nullptr ? p.start + static_cast<double>(n) : p.positions[n];
}

// The rotations e^(2 pi i f n) of one of the H D/2 pairs at positions n, n + 1, ... Consecutive
// positions need an exact one only at the first; 1 beyond the last position.
template <class T>
struct RotaryRun {
  Phasor<T> at[kRotaryRun];

  TORCH_SPE_DEVICE RotaryRun(const RotaryParams& p, std::int64_t pair, std::int64_t n) {
    const double freq = p.freqs[pair];
    if (p.positions == nullptr) {
      Phasor<T> step;
      step.set(freq, 1.0);
      at[0].set(freq, p.start + static_cast<double>(n));
      TORCH_SPE_UNROLL
      for (int t = 1; t < kRotaryRun; ++t) {
        at[t] = at[t - 1];
        at[t].rotate(step);
      }
    } else {
      TORCH_SPE_UNROLL
      for (int t = 0; t < kRotaryRun; ++t) {
        if (n + t < p.length) at[t].set(freq, p.positions[n + t]);
      }
    }
  }
};

// Features 2i and 2i + 1 of a token, or their gradients.
template <class T>
struct FeaturePair {
  T even, odd;

  TORCH_SPE_DEVICE FeaturePair rotated(const Phasor<T>& by) const {
    return {even * by.re - odd * by.im, even * by.im + odd * by.re};
  }
  TORCH_SPE_DEVICE FeaturePair rotated_back(const Phasor<T>& by) const {
    return {even * by.re + odd * by.im, odd * by.re - even * by.im};
  }
};

// The gradient of the angle in radians, from phi(x) and its gradient.
template <class T>
TORCH_SPE_DEVICE T angle_gradient(const FeaturePair<T>& features, const FeaturePair<T>& gradient) {
  return features.even * gradient.odd - features.odd * gradient.even;
}

// One pair of features of the tokens of a tensor [B, N, H, D] in global memory.
template <class Storage>
class PairColumn {
 public:
  using T = core::accumulate_t<Storage>;

  // `pair` of H D/2.
  TORCH_SPE_DEVICE PairColumn(const void* data, const std::int64_t (&strides)[4], std::int64_t pair,
                              std::int64_t pairs_of_head)
      : batch_(strides[0]),
        position_(strides[1]),
        feature_(strides[3]),
        at_(static_cast<const Storage*>(data) + pair / pairs_of_head * strides[2] +
            pair % pairs_of_head * 2 * strides[3]),
        joined_(strides[3] == 1 && strides[0] % 2 == 0 && strides[1] % 2 == 0 &&
                strides[2] % 2 == 0 &&
                reinterpret_cast<std::uintptr_t>(data) % sizeof(Stored) == 0) {}

  TORCH_SPE_DEVICE FeaturePair<T> load(std::int64_t b, std::int64_t n) const {
    const Storage* const from = at_ + b * batch_ + n * position_;
    if (joined_) {
      const Stored stored = *reinterpret_cast<const Stored*>(from);
      return {read(stored.even), read(stored.odd)};
    }
    return {read(from[0]), read(from[feature_])};
  }

 private:
  struct alignas(2 * sizeof(Storage)) Stored {
    Storage even, odd;
  };
  std::int64_t batch_, position_, feature_;
  const Storage* at_;
  bool joined_;
};

template <class Storage, class T>
TORCH_SPE_DEVICE FeaturePair<T> map_pair(FeatureMap map, const FeaturePair<T>& x) {
  return {map_feature<Storage>(map, x.even), map_feature<Storage>(map, x.odd)};
}

// Writes a pair to a contiguous tensor [B, N, H, D], whose pairs are aligned.
template <class Storage, class T>
TORCH_SPE_DEVICE void store_pair(const RotaryParams& p, void* data, std::int64_t b, std::int64_t n,
                                 std::int64_t pair, const FeaturePair<T>& value) {
  struct alignas(2 * sizeof(Storage)) Stored {
    Storage even, odd;
  } stored;
  write(value.even, &stored.even);
  write(value.odd, &stored.odd);
  const std::int64_t pairs = p.num_heads * (p.in_features / 2);
  static_cast<Stored*>(data)[(b * p.length + n) * pairs + pair] = stored;
}

}  // namespace torch_spe::cuda
