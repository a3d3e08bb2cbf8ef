// Rotation of pairs of features at a run of consecutive positions, for kernels: from and to
// registers, wherever the features are stored.
#pragma once

#include "encode/phasor.h"
#include "rotary.h"

namespace torch_spe::cuda {

constexpr int kRotaryRun = 4;  // positions

TORCH_SPE_DEVICE double rotary_position(const RotaryParams& p, std::int64_t n) {
  return p.positions == nullptr ? p.start + static_cast<double>(n) : p.positions[n];
}

// The rotations e^(2 pi i f n) of one of the H D/2 pairs at positions n, n + 1, ... Consecutive
// positions need an exact one only at the first. Beyond the last position, any.
template <class T>
struct RotaryRun {
  Phasor<T> at[kRotaryRun];

  TORCH_SPE_DEVICE void set(const RotaryParams& p, std::int64_t pair, std::int64_t n) {
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
      for (int t = 0; t < kRotaryRun; ++t)
        at[t].set(freq, p.positions[min_of(n + t, p.length - 1)]);
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

// Neighbouring pairs of features of a token as they are stored, which a lane reads and writes at
// once: 8 or 16 bytes of `joined` pairs, else one pair. Loads leave them as they are: whatever is
// computed from a value waits for it, and all loads of a tile should be under way by then.
template <class Storage, bool kJoined>
struct StoredPairs {
  using T = core::accumulate_t<Storage>;
  static constexpr int kCount = kJoined && sizeof(Storage) < 8 ? 2 : 1;
  static constexpr bool kPacked = sizeof(Storage) == 2;  // a pair in a word
  using Word = std::conditional_t<kPacked, std::uint32_t, Storage>;
  struct alignas(2 * kCount * sizeof(Storage)) Words {
    Word of[kPacked ? kCount : 2 * kCount];
  } words;

  TORCH_SPE_DEVICE void load(const Storage* from, std::int64_t feature_stride) {
    if constexpr (kJoined) {
      words = *reinterpret_cast<const Words*>(from);
    } else if constexpr (kPacked) {
      words.of[0] = join_halves(from[0].bits, from[feature_stride].bits);
    } else {
      words.of[0] = from[0];
      words.of[1] = from[feature_stride];
    }
  }
  // To a contiguous tensor [.., H, D], whose pairs are aligned.
  TORCH_SPE_DEVICE void store(Storage* to) const { *reinterpret_cast<Words*>(to) = words; }

  // Puts phi in the place of features.
  TORCH_SPE_DEVICE void map(FeatureMap map) {
    TORCH_SPE_UNROLL
    for (Word& word : words.of) {
      if constexpr (kPacked) {
        word = map_feature_pair<Storage>(map, word);
      } else {
        word = map_feature<Storage>(map, word);
      }
    }
  }

  TORCH_SPE_DEVICE FeaturePair<T> pair(int i) const {
    FeaturePair<T> pair;
    if constexpr (kPacked) {
      unpack_pair<Storage>(words.of[i], &pair.even, &pair.odd);
    } else {
      pair = {words.of[2 * i], words.of[2 * i + 1]};
    }
    return pair;
  }
  TORCH_SPE_DEVICE void set_pair(int i, const FeaturePair<T>& pair) {
    if constexpr (kPacked) {
      words.of[i] = pack_pair<Storage>(pair.even, pair.odd);
    } else {
      words.of[2 * i] = pair.even;
      words.of[2 * i + 1] = pair.odd;
    }
  }
};

// Whether a tensor [B, N, H, D] has such joined pairs.
template <class Storage>
TORCH_SPE_INLINE bool has_joined_pairs(const void* data, const std::int64_t (&strides)[4],
                                       std::int64_t features) {
  constexpr std::int64_t kFeatures = 2 * StoredPairs<Storage, true>::kCount;
  return features % kFeatures == 0 && strides[3] == 1 && strides[0] % kFeatures == 0 &&
         strides[1] % kFeatures == 0 && strides[2] % kFeatures == 0 &&
         reinterpret_cast<std::uintptr_t>(data) % (kFeatures * sizeof(Storage)) == 0;
}

// The pairs of one lane, of the tokens of a tensor [B, N, H, D] in global memory.
template <class Storage, bool kJoined>
class PairColumn {
 public:
  using Pairs = StoredPairs<Storage, kJoined>;

  // From `pair` of H D/2 on.
  TORCH_SPE_DEVICE PairColumn(const void* data, const std::int64_t (&strides)[4], std::int64_t pair,
                              std::int64_t pairs_of_head)
      : batch_(strides[0]),
        position_(strides[1]),
        feature_(strides[3]),
        at_(static_cast<const Storage*>(data) + pair / pairs_of_head * strides[2] +
            pair % pairs_of_head * 2 * strides[3]) {}

  TORCH_SPE_DEVICE void load(std::int64_t b, std::int64_t n, Pairs* out) const {
    out->load(at_ + b * batch_ + n * position_, feature_);
  }

 private:
  std::int64_t batch_, position_, feature_;
  const Storage* at_;
};

// A run of positions of one batch row. Beyond the last position it has what that has, so that loads
// are not conditional.
template <class Storage, bool kJoined>
struct PairRun {
  using T = core::accumulate_t<Storage>;
  using Pairs = StoredPairs<Storage, kJoined>;
  Pairs at[kRotaryRun];

  TORCH_SPE_DEVICE void load(const PairColumn<Storage, kJoined>& from, std::int64_t b,
                             std::int64_t n, std::int64_t length) {
    TORCH_SPE_UNROLL
    for (int t = 0; t < kRotaryRun; ++t) from.load(b, min_of(n + t, length - 1), &at[t]);
  }
  TORCH_SPE_DEVICE void map(FeatureMap map) {
    if (map == FeatureMap::kIdentity) return;
    TORCH_SPE_UNROLL
    for (int t = 0; t < kRotaryRun; ++t) at[t].map(map);
  }
};

}  // namespace torch_spe::cuda
