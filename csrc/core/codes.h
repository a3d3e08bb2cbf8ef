// What codes of sines are made of, from the parameters of a position kernel and noise, and the
// gate that adds a part without positions. A few values for each feature: the filters apply them.
//
// Every function makes one item of its result with kLanes lanes that share the work: 1 on the CPU,
// a warp on a GPU. `sum` adds up a number over the lanes.
#pragma once

#include <math.h>

#include <cstdint>

#include "dtype.h"
#include "feature_map.h"
#include "noise.h"
#include "phase.h"
#include "platform.h"

namespace torch_spe::core {

TORCH_SPE_INLINE float log_plus_1(float x) { return ::log1pf(x); }
TORCH_SPE_INLINE double log_plus_1(double x) { return ::log1p(x); }
TORCH_SPE_INLINE float square_root(float x) { return ::sqrtf(x); }
TORCH_SPE_INLINE double square_root(double x) { return ::sqrt(x); }

// 1 / (1 + e^-x), to full relative accuracy on both sides.
template <class T>
TORCH_SPE_INLINE T sigmoid(T x) {
  const T e = exp_nonpositive(x < T(0) ? x : -x);
  return (x < T(0) ? e : T(1)) / (T(1) + e);
}
// log(1 + e^x), whose derivative is the sigmoid.
template <class T>
TORCH_SPE_INLINE T softplus(T x) {
  return (x < T(0) ? T(0) : x) + log_plus_1(exp_nonpositive(x < T(0) ? x : -x));
}

// The sum of term(0) .. term(count - 1) that is this lane's share.
template <class T, int kLanes, class Term>
TORCH_SPE_INLINE T lane_sum(int lane, std::int64_t count, const Term& term) {
  T total = 0;
  if constexpr (kLanes > 1) {
    for (std::int64_t i = lane; i < count; i += kLanes) total += term(i);
  } else {
    constexpr int kParts = 16;  // independent sums, for vectors
    T parts[kParts] = {};
    std::int64_t i = 0;
    for (; i + kParts <= count; i += kParts) {
      for (int j = 0; j < kParts; ++j) parts[j] += term(i + j);
    }
    for (; i < count; ++i) total += term(i);
    for (int j = 0; j < kParts; ++j) total += parts[j];
  }
  return total;
}

// The parameters of a position kernel P(tau) = sum_k softplus(gain_k)^2 / 2K
// cos(2 pi f_k tau + offset_k) of each head and feature.
struct SineParameters {
  DType dtype;               // of all tensors that are not integers: float32 or float64
  std::int64_t num_heads;    // H
  std::int64_t in_features;  // D
  std::int64_t num_sines;    // K
  std::int64_t ndim;         // dimensions of a position
  double scale;              // of the amplitudes softplus(gain)
  int num_threads;           // on the CPU
  const void* freqs;         // logits of the frequencies, [H, D, K, ndim]
  const void* offsets;       // radians, [H, D, K]
  const void* gains;         // [H, D, K]
};

// f in cycles per position from its logit: in (0, 1/2) in the first dimension, which the signs of
// the others make up for. In double: rounded to float, a phase at position 20000 would be off by a
// thousandth of a cycle.
TORCH_SPE_INLINE double cycles_of(std::int64_t axis, double logit) {
  const double value = sigmoid(logit);
  return axis == 0 ? value / 2 : value - 0.5;
}
TORCH_SPE_INLINE double cycles_derivative(std::int64_t axis, double logit) {
  return sigmoid(logit) * sigmoid(-logit) * (axis == 0 ? 0.5 : 1.0);
}

// Amplitude, and the turn by the offset, of sine `index` of [H, D, K].
template <class T>
struct Sine {
  T amplitude, amplitude_derivative, cos, sin;

  TORCH_SPE_INLINE Sine(const SineParameters& p, std::int64_t index) {
    const T gain = static_cast<const T*>(p.gains)[index];
    amplitude = softplus(gain) * static_cast<T>(p.scale);
    amplitude_derivative = sigmoid(gain) * static_cast<T>(p.scale);
    const double offset = static_cast<double>(static_cast<const T*>(p.offsets)[index]);
    cos_sin_cycles(wrap_cycles(offset * (1 / kTwoPi)), &cos, &sin);
  }
};

// Dense noise z: with the weights of cosine and sine of a key u_k = amplitude z_k, those of a query
// are u rotated back by the offset.
struct SineCodeParams : SineParameters {
  std::int64_t num_realizations;  // R
  const void* noise;              // [H, D, K, 2, R]
  double* cycles;                 // [H, D, K, ndim]
  void* query_weight;             // [H, D, K, 2, R]
  void* key_weight;               // [H, D, K, 2, R]
};
struct SineCodeBackwardParams : SineCodeParams {
  const double* grad_cycles;
  const void *grad_query_weight, *grad_key_weight;
  // Each of these may be null when its gradient is not wanted.
  void *grad_freqs, *grad_offsets, *grad_gains, *grad_noise;
};

// Sine `index` of [H, D, K].
template <class T, int kLanes>
TORCH_SPE_INLINE void make_sine_code(const SineCodeParams& p, std::int64_t index, int lane) {
  const std::int64_t realizations = p.num_realizations, at = index * 2 * realizations;
  for (std::int64_t axis = lane; axis < p.ndim; axis += kLanes) {
    const std::int64_t i = index * p.ndim + axis;
    p.cycles[i] = cycles_of(axis, static_cast<const T*>(p.freqs)[i]);
  }
  const Sine<T> sine(p, index);
  const T amplitude = sine.amplitude, cos = sine.cos, sin = sine.sin;
  const T* __restrict__ const noise = static_cast<const T*>(p.noise) + at;
  T* __restrict__ const query = static_cast<T*>(p.query_weight) + at;
  T* __restrict__ const key = static_cast<T*>(p.key_weight) + at;
  for (std::int64_t r = lane; r < realizations; r += kLanes) {
    const T re = amplitude * noise[r], im = amplitude * noise[realizations + r];
    key[r] = re;
    key[realizations + r] = im;
    query[r] = cos * re + sin * im;
    query[realizations + r] = cos * im - sin * re;
  }
}

template <class T, int kLanes, class Sum>
TORCH_SPE_INLINE void make_sine_code_backward(const SineCodeBackwardParams& p, std::int64_t index,
                                              int lane, const Sum& sum) {
  const std::int64_t realizations = p.num_realizations, at = index * 2 * realizations;
  for (std::int64_t axis = lane; axis < p.ndim && p.grad_freqs != nullptr; axis += kLanes) {
    const std::int64_t i = index * p.ndim + axis;
    static_cast<T*>(p.grad_freqs)[i] = static_cast<T>(
        p.grad_cycles[i] * cycles_derivative(axis, static_cast<const T*>(p.freqs)[i]));
  }
  const Sine<T> sine(p, index);
  const T cos = sine.cos, sin = sine.sin;
  const T* __restrict__ const noise = static_cast<const T*>(p.noise) + at;
  const T* __restrict__ const query = static_cast<const T*>(p.grad_query_weight) + at;
  const T* __restrict__ const key = static_cast<const T*>(p.grad_key_weight) + at;
  // Gradients of amplitude times noise.
  const auto grad_re = [&](std::int64_t r) {
    return key[r] + cos * query[r] - sin * query[realizations + r];
  };
  const auto grad_im = [&](std::int64_t r) {
    return key[realizations + r] + sin * query[r] + cos * query[realizations + r];
  };
  if (p.grad_gains != nullptr) {
    const T total = sum(lane_sum<T, kLanes>(lane, realizations, [&](std::int64_t r) {
      return grad_re(r) * noise[r] + grad_im(r) * noise[realizations + r];
    }));
    if (lane == 0) static_cast<T*>(p.grad_gains)[index] = total * sine.amplitude_derivative;
  }
  if (p.grad_offsets != nullptr) {
    const T total = sum(lane_sum<T, kLanes>(lane, realizations, [&](std::int64_t r) {
      const T re = noise[r], im = noise[realizations + r];
      return query[r] * (cos * im - sin * re) - query[realizations + r] * (cos * re + sin * im);
    }));
    if (lane == 0) static_cast<T*>(p.grad_offsets)[index] = total * sine.amplitude;
  }
  if (p.grad_noise != nullptr) {
    T* __restrict__ const grad_noise = static_cast<T*>(p.grad_noise) + at;
    for (std::int64_t r = lane; r < realizations; r += kLanes) {
      grad_noise[r] = sine.amplitude * grad_re(r);
      grad_noise[realizations + r] = sine.amplitude * grad_im(r);
    }
  }
}

// Without noise a code is made of the frequencies and amplitudes themselves; nothing of offsets.
struct ExactCodeParams : SineParameters {
  double* cycles;    // [H, D, K, ndim]
  void* amplitudes;  // [H, D, K]
};
struct ExactCodeBackwardParams : ExactCodeParams {
  const double* grad_cycles;
  const void* grad_amplitudes;
  // Each of these may be null when its gradient is not wanted.
  void *grad_freqs, *grad_gains;
};

// Sine `index` of [H, D, K].
template <class T>
TORCH_SPE_INLINE void make_exact_code(const ExactCodeParams& p, std::int64_t index) {
  for (std::int64_t i = index * p.ndim; i < (index + 1) * p.ndim; ++i)
    p.cycles[i] = cycles_of(i % p.ndim, static_cast<const T*>(p.freqs)[i]);
  static_cast<T*>(p.amplitudes)[index] =
      softplus(static_cast<const T*>(p.gains)[index]) * static_cast<T>(p.scale);
}

template <class T>
TORCH_SPE_INLINE void make_exact_code_backward(const ExactCodeBackwardParams& p,
                                               std::int64_t index) {
  if (p.grad_freqs != nullptr) {
    for (std::int64_t i = index * p.ndim; i < (index + 1) * p.ndim; ++i) {
      static_cast<T*>(p.grad_freqs)[i] = static_cast<T>(
          p.grad_cycles[i] * cycles_derivative(i % p.ndim, static_cast<const T*>(p.freqs)[i]));
    }
  }
  if (p.grad_gains != nullptr) {
    static_cast<T*>(p.grad_gains)[index] = static_cast<const T*>(p.grad_amplitudes)[index] *
                                           sigmoid(static_cast<const T*>(p.gains)[index]) *
                                           static_cast<T>(p.scale);
  }
}

// Phase noise: pair i of realizations is sine k(i) alone, from a random phase.
struct PhaseCodeParams : SineParameters {
  std::int64_t num_pairs;    // R / 2
  const void* bandwidths;    // logarithms of deviations of the frequencies, [H, D, K], or null
  const std::int64_t* sine;  // k(i), [H, D, R/2]
  const void* phases;        // in cycles, [H, D, R/2]
  const void* deviates;      // of the frequencies, [H, D, R/2, ndim], with bandwidths
  double* cycles;            // [H, D, R/2, ndim]
  void* query_coefficients;  // [H, D, R/2, 2]
  void* key_coefficients;    // [H, D, R/2, 2]
};
struct PhaseCodeBackwardParams : PhaseCodeParams {
  const double* grad_cycles;
  const void *grad_query_coefficients, *grad_key_coefficients;
  // Each of these may be null when its gradient is not wanted.
  void *grad_freqs, *grad_offsets, *grad_gains, *grad_bandwidths;
};

// What pairs take from sine `index` of [H, D, K].
template <class T>
struct PhaseSine : Sine<T> {
  T deviation;  // of the frequency

  TORCH_SPE_INLINE PhaseSine(const PhaseCodeParams& p, std::int64_t index)
      : Sine<T>(p, index),
        deviation(p.bandwidths == nullptr ? T(0)
                                          : static_cast<T>(::exp(static_cast<double>(
                                                static_cast<const T*>(p.bandwidths)[index])))) {}
};

// A point of the unit circle.
template <class T>
struct Point {
  T cos, sin;
};

// The phase of pair `index` of [H, D, R/2].
template <class T>
TORCH_SPE_INLINE Point<T> phase_of_pair(const PhaseCodeParams& p, std::int64_t index) {
  Point<T> point;
  const double cycles = static_cast<double>(static_cast<const T*>(p.phases)[index]);
  cos_sin_cycles(wrap_cycles(cycles), &point.cos, &point.sin);
  return point;
}
// That of its query, from that of its key.
template <class T>
TORCH_SPE_INLINE Point<T> rotated(const Point<T>& key, const PhaseSine<T>& sine) {
  return {key.cos * sine.cos - key.sin * sine.sin, key.sin * sine.cos + key.cos * sine.sin};
}

// Pair `index` of [H, D, R/2]; cycles(axis) are those of its sine.
template <class T, class Cycles>
TORCH_SPE_INLINE void make_phase_code(const PhaseCodeParams& p, const PhaseSine<T>& sine,
                                      const Point<T>& key_phase, const Cycles& cycles,
                                      std::int64_t index) {
  const Point<T> query_phase = rotated(key_phase, sine);
  T* const key = static_cast<T*>(p.key_coefficients) + 2 * index;
  T* const query = static_cast<T*>(p.query_coefficients) + 2 * index;
  key[0] = sine.amplitude * key_phase.cos;
  key[1] = sine.amplitude * key_phase.sin;
  query[0] = sine.amplitude * query_phase.cos;
  query[1] = sine.amplitude * query_phase.sin;
  for (std::int64_t axis = 0; axis < p.ndim; ++axis) {
    const std::int64_t at = index * p.ndim + axis;
    const T move =
        p.bandwidths == nullptr ? T(0) : sine.deviation * static_cast<const T*>(p.deviates)[at];
    p.cycles[at] = cycles(axis) + static_cast<double>(move);
  }
}

// Sums over the pairs of a sine.
template <class T>
struct PhaseSums {
  T amplitude = 0, offset = 0, bandwidth = 0;

  TORCH_SPE_INLINE void add(const PhaseCodeBackwardParams& p, const PhaseSine<T>& sine,
                            const Point<T>& key_phase, std::int64_t index) {
    const Point<T> query_phase = rotated(key_phase, sine);
    const T* const query = static_cast<const T*>(p.grad_query_coefficients) + 2 * index;
    const T* const key = static_cast<const T*>(p.grad_key_coefficients) + 2 * index;
    amplitude += key[0] * key_phase.cos + key[1] * key_phase.sin + query[0] * query_phase.cos +
                 query[1] * query_phase.sin;
    offset += query[1] * query_phase.cos - query[0] * query_phase.sin;
    for (std::int64_t axis = 0; axis < p.ndim && p.bandwidths != nullptr; ++axis) {
      const std::int64_t at = index * p.ndim + axis;
      bandwidth += static_cast<T>(p.grad_cycles[at]) * static_cast<const T*>(p.deviates)[at];
    }
  }
};

// Writes the gradients of sine `index` of [H, D, K].
template <class T>
TORCH_SPE_INLINE void store_gradients(const PhaseCodeBackwardParams& p, const PhaseSine<T>& sine,
                                      const PhaseSums<T>& sums, std::int64_t index) {
  if (p.grad_gains != nullptr)
    static_cast<T*>(p.grad_gains)[index] = sums.amplitude * sine.amplitude_derivative;
  if (p.grad_offsets != nullptr)
    static_cast<T*>(p.grad_offsets)[index] = sums.offset * sine.amplitude;
  if (p.grad_bandwidths != nullptr)
    static_cast<T*>(p.grad_bandwidths)[index] = sums.bandwidth * sine.deviation;
}
// That of frequency `index` of [H, D, K, ndim], from the sum over its pairs.
template <class T>
TORCH_SPE_INLINE void store_grad_freq(const PhaseCodeBackwardParams& p, std::int64_t axis,
                                      double sum, std::int64_t index) {
  const T freq = static_cast<const T*>(p.freqs)[index];
  static_cast<T*>(p.grad_freqs)[index] = static_cast<T>(sum * cycles_derivative(axis, freq));
}

// The gate: with g = sigmoid(gate) a code keeps the share 1 - g of its power, sqrt(1 - g) of its
// amplitude, and a constant code sqrt(g) noise gets the rest.
struct GateCodeParams {
  DType dtype;                    // of all tensors: float32 or float64
  std::int64_t features;          // H D
  std::int64_t size;              // values of a feature's code
  std::int64_t num_realizations;  // R
  double scale;                   // of the noise
  int num_threads;                // on the CPU
  const void *query, *key;        // [H D, size]
  const void* gate;               // [H D]
  const void* noise;              // [H D, R]
  void *gated_query, *gated_key;  // [H D, size]
  void* constant;                 // [H D, R]
};
struct GateCodeBackwardParams : GateCodeParams {
  const void *grad_gated_query, *grad_gated_key, *grad_constant;
  // Each of these may be null when its gradient is not wanted.
  void *grad_query, *grad_key, *grad_gate, *grad_noise;
};

template <class T, int kLanes>
TORCH_SPE_INLINE void scale_row(T factor, const void* in, std::int64_t at, std::int64_t size,
                                void* out, int lane) {
  const T* __restrict__ const from = static_cast<const T*>(in) + at;
  T* __restrict__ const to = static_cast<T*>(out) + at;
  for (std::int64_t i = lane; i < size; i += kLanes) to[i] = factor * from[i];
}

// Feature `index` of [H D].
template <class T, int kLanes>
TORCH_SPE_INLINE void gate_code(const GateCodeParams& p, std::int64_t index, int lane) {
  const T gate = static_cast<const T*>(p.gate)[index];
  const T coded = square_root(sigmoid(-gate)), constant = square_root(sigmoid(gate));
  scale_row<T, kLanes>(coded, p.query, index * p.size, p.size, p.gated_query, lane);
  scale_row<T, kLanes>(coded, p.key, index * p.size, p.size, p.gated_key, lane);
  scale_row<T, kLanes>(constant * static_cast<T>(p.scale), p.noise, index * p.num_realizations,
                       p.num_realizations, p.constant, lane);
}

template <class T, int kLanes, class Sum>
TORCH_SPE_INLINE void gate_code_backward(const GateCodeBackwardParams& p, std::int64_t index,
                                         int lane, const Sum& sum) {
  const T gate = static_cast<const T*>(p.gate)[index];
  const T off = sigmoid(-gate), on = sigmoid(gate);
  const T coded = square_root(off), constant = square_root(on) * static_cast<T>(p.scale);
  const std::int64_t at = index * p.size, realizations = p.num_realizations,
                     noise_at = index * realizations;
  if (p.grad_query != nullptr)
    scale_row<T, kLanes>(coded, p.grad_gated_query, at, p.size, p.grad_query, lane);
  if (p.grad_key != nullptr)
    scale_row<T, kLanes>(coded, p.grad_gated_key, at, p.size, p.grad_key, lane);
  if (p.grad_noise != nullptr)
    scale_row<T, kLanes>(constant, p.grad_constant, noise_at, realizations, p.grad_noise, lane);
  if (p.grad_gate == nullptr) return;
  const auto product = [&](const void* a, const void* b, std::int64_t begin, std::int64_t size) {
    const T* const left = static_cast<const T*>(a) + begin;
    const T* const right = static_cast<const T*>(b) + begin;
    return lane_sum<T, kLanes>(lane, size, [&](std::int64_t i) { return left[i] * right[i]; });
  };
  const T of_code = product(p.grad_gated_query, p.query, at, p.size) +
                    product(p.grad_gated_key, p.key, at, p.size);
  const T of_constant = product(p.grad_constant, p.noise, noise_at, realizations);
  const T total = sum((constant * off * of_constant - coded * on * of_code) / 2);
  if (lane == 0) static_cast<T*>(p.grad_gate)[index] = total;
}

// The same gate of a code without noise, whose constant is one value for each feature.
struct GateExactCodeParams {
  DType dtype;             // of all tensors: float32 or float64
  std::int64_t features;   // H D
  std::int64_t num_sines;  // K
  int num_threads;         // on the CPU
  const void* amplitudes;  // [H D, K]
  const void* gate;        // [H D]
  void* gated;             // [H D, K]
  void* constant;          // [H D]
};
struct GateExactCodeBackwardParams : GateExactCodeParams {
  const void *grad_gated, *grad_constant;
  // Each of these may be null when its gradient is not wanted.
  void *grad_amplitudes, *grad_gate;
};

// Feature `index` of [H D].
template <class T>
TORCH_SPE_INLINE void gate_exact_code(const GateExactCodeParams& p, std::int64_t index) {
  const T gate = static_cast<const T*>(p.gate)[index];
  scale_row<T, 1>(square_root(sigmoid(-gate)), p.amplitudes, index * p.num_sines, p.num_sines,
                  p.gated, 0);
  static_cast<T*>(p.constant)[index] = square_root(sigmoid(gate));
}

template <class T>
TORCH_SPE_INLINE void gate_exact_code_backward(const GateExactCodeBackwardParams& p,
                                               std::int64_t index) {
  const T gate = static_cast<const T*>(p.gate)[index];
  const T off = sigmoid(-gate), on = sigmoid(gate);
  const T coded = square_root(off), constant = square_root(on);
  const std::int64_t at = index * p.num_sines;
  if (p.grad_amplitudes != nullptr)
    scale_row<T, 1>(coded, p.grad_gated, at, p.num_sines, p.grad_amplitudes, 0);
  if (p.grad_gate == nullptr) return;
  T of_code = 0;
  for (std::int64_t i = at; i < at + p.num_sines; ++i)
    of_code += static_cast<const T*>(p.grad_gated)[i] * static_cast<const T*>(p.amplitudes)[i];
  const T of_constant = static_cast<const T*>(p.grad_constant)[index];
  static_cast<T*>(p.grad_gate)[index] = (constant * off * of_constant - coded * on * of_code) / 2;
}

// Noise of these codes, in the way of core/noise.h: words 0 and 1 of the counter are an index and
// the stream, and the last word tells the uses apart.
struct PhaseNoiseParams {
  DType dtype;  // of phases, deviates and circle: float32 or float64
  std::int64_t num_heads, in_features, num_sines, num_pairs;
  std::int64_t ndim;  // of the deviates; 0 for none
  std::uint32_t stream;
  int num_threads;                  // on the CPU
  const std::int64_t* device_seed;  // where the kernels run
  std::int64_t* sine;               // [H, D, P]
  void* phases;                     // in cycles, [H, D, P]
  void* deviates;                   // [H, D, P, ndim]
};
struct CircleNoiseParams {
  DType dtype;  // float32 or float64
  std::int64_t num_heads, in_features, num_pairs;
  std::uint32_t stream;
  int num_threads;
  const std::int64_t* device_seed;
  void* out;  // [H, D, P, 2]
};

enum class PhaseNoiseUse : std::uint32_t { kOrder = 0, kPair = 1, kCircle = 2 };

// Four words for a feature of [H D]; `axis` is less than 2^20.
template <class Params>
TORCH_SPE_INLINE Words<ScalarNumbers> phase_words(const Params& p, PhaseNoiseUse use,
                                                  std::int64_t axis, std::int64_t feature,
                                                  std::int64_t index) {
  const auto uses = static_cast<std::int64_t>(use) << 20;
  return philox<ScalarNumbers>({{static_cast<std::uint32_t>(index), p.stream,
                                 noise_source(feature / p.in_features, feature % p.in_features),
                                 noise_block(kPhasePurpose, 1, uses | axis)}},
                               static_cast<std::uint64_t>(*p.device_seed));
}
// In (0, 1).
TORCH_SPE_INLINE double uniform_of(std::uint32_t word) {
  return (static_cast<double>(word) + 0.5) * 0x1p-32;
}

// What decides on the place of a sine, and of pair p among those of its sine.
TORCH_SPE_INLINE std::uint32_t order_key(const PhaseNoiseParams& p, std::int64_t feature,
                                         std::int64_t sine) {
  return word_of(phase_words(p, PhaseNoiseUse::kOrder, 0, feature, sine / 4), sine % 4);
}
TORCH_SPE_INLINE std::uint32_t stratum_key(const Words<ScalarNumbers>& pair) {
  return pair.word[1];
}

// How many of key(0) .. key(count - 1) come before key(i).
template <class Key>
TORCH_SPE_INLINE int rank_of(int i, int count, const Key& key) {
  const std::uint32_t own = key(i);
  int rank = 0;
  for (int j = 0; j < count; ++j) {
    const std::uint32_t other = key(j);
    rank +=
        static_cast<int>(other < own) | (static_cast<int>(other == own) & static_cast<int>(j < i));
  }
  return rank;
}

// Pairs p, p + K, p + 2K ... have the same sine.
TORCH_SPE_INLINE int pairs_of_sine(const PhaseNoiseParams& p, std::int64_t first) {
  return static_cast<int>((p.num_pairs - first + p.num_sines - 1) / p.num_sines);
}

// The quantile of the unit normal distribution to 7 digits: M. J. Wichura, "Algorithm AS 241: the
// percentage points of the normal distribution", 1988, PPND7.
TORCH_SPE_INLINE double normal_quantile(double u) {
  const double q = u - 0.5;
  if (q >= -0.425 && q <= 0.425) {
    const double r = 0.180625 - q * q;
    return q * (((5.9109374720e1 * r + 1.5929113202e2) * r + 5.0434271938e1) * r + 3.3871327179) /
           (((6.7187563600e1 * r + 7.8757757664e1) * r + 1.7895169469e1) * r + 1.0);
  }
  double r = ::sqrt(-::log(q < 0 ? u : 1.0 - u)), z;
  if (r <= 5.0) {
    r -= 1.6;
    z = (((1.7023821103e-1 * r + 1.3067284816) * r + 2.7568153900) * r + 1.4234372777) /
        ((1.2021132975e-1 * r + 7.3700164250e-1) * r + 1.0);
  } else {
    r -= 5.0;
    z = (((1.7337203997e-2 * r + 4.2868294337e-1) * r + 3.0812263860) * r + 6.6579051150) /
        ((1.2258202635e-2 * r + 2.4197894225e-1) * r + 1.0);
  }
  return q < 0 ? -z : z;
}

// The deviate of a pair: the ranks of the pairs of a sine are the strata, of equal probability,
// from which they are drawn.
TORCH_SPE_INLINE double stratified_normal(int rank, int count, const Words<ScalarNumbers>& pair) {
  return normal_quantile((static_cast<double>(rank) + uniform_of(pair.word[2])) /
                         static_cast<double>(count));
}

// Points of the circle with radius sqrt(2), pairs of unit variance: four of a feature of [H D].
template <class T>
TORCH_SPE_INLINE void make_circle_noise(const CircleNoiseParams& p, std::int64_t feature,
                                        std::int64_t block) {
  const Words<ScalarNumbers> words = phase_words(p, PhaseNoiseUse::kCircle, 0, feature, block);
  for (int i = 0; i < 4 && 4 * block + i < p.num_pairs; ++i) {
    T cos, sin;
    cos_sin_cycles(wrap_cycles(uniform_of(words.word[i])), &cos, &sin);
    T* const out = static_cast<T*>(p.out) + 2 * (feature * p.num_pairs + 4 * block + i);
    out[0] = static_cast<T>(1.4142135623730951) * cos;
    out[1] = static_cast<T>(1.4142135623730951) * sin;
  }
}

}  // namespace torch_spe::core
