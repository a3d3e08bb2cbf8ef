#include "codes.h"
#include "encode/phasor.h"

namespace torch_spe::cuda {
namespace {

// Warps make the items of a Make that calls for it, threads those of others.
template <class Make>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    item_kernel(const Make make, const std::int64_t count) {
  const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * (kThreads / Make::kItemLanes) +
                            threadIdx.x / Make::kItemLanes;
  if (item < count) make(item, static_cast<int>(threadIdx.x) % Make::kItemLanes);
}

template <class Make>
void for_each_item(std::int64_t count, const Make& make, Stream stream) {
  if (count == 0) return;
  launch(item_kernel<Make>, grid_of(ceil_div(count, kThreads / Make::kItemLanes)), dim3(kThreads),
         0, stream, make, count);
}

struct WarpSum {
  template <class T>
  TORCH_SPE_DEVICE T operator()(T value) const {
    return warp_sum(value);
  }
};

template <class T>
struct MakeSineCode {
  static constexpr int kItemLanes = kLanes;
  core::SineCodeParams p;
  TORCH_SPE_DEVICE void operator()(std::int64_t i, int lane) const {
    core::make_sine_code<T, kLanes>(p, i, lane);
  }
};
template <class T>
struct MakeSineCodeBackward {
  static constexpr int kItemLanes = kLanes;
  core::SineCodeBackwardParams p;
  TORCH_SPE_DEVICE void operator()(std::int64_t i, int lane) const {
    core::make_sine_code_backward<T, kLanes>(p, i, lane, WarpSum{});
  }
};
template <class T>
struct MakeExactCode {
  static constexpr int kItemLanes = 1;
  core::ExactCodeParams p;
  TORCH_SPE_DEVICE void operator()(std::int64_t i, int) const { core::make_exact_code<T>(p, i); }
};
template <class T>
struct MakeExactCodeBackward {
  static constexpr int kItemLanes = 1;
  core::ExactCodeBackwardParams p;
  TORCH_SPE_DEVICE void operator()(std::int64_t i, int) const {
    core::make_exact_code_backward<T>(p, i);
  }
};
template <class T>
struct MakePhaseCode {
  static constexpr int kItemLanes = 1;
  core::PhaseCodeParams p;
  TORCH_SPE_DEVICE void operator()(std::int64_t i, int) const {
    const std::int64_t k = p.sine[i];
    const bool valid = k >= 0 && k < p.num_sines;
    const std::int64_t at = i / p.num_pairs * p.num_sines + (valid ? k : 0);
    core::PhaseSine<T> sine(p, at);
    if (!valid) sine.amplitude = static_cast<T>(NAN);  // the host cannot look
    const auto cycles = [&](std::int64_t axis) {
      return core::cycles_of(axis, static_cast<const T*>(p.freqs)[at * p.ndim + axis]);
    };
    core::make_phase_code(p, sine, core::phase_of_pair<T>(p, i), cycles, i);
  }
};
// Items are sines; the lanes of a warp share the pairs of the feature.
template <class T>
struct MakePhaseCodeBackward {
  static constexpr int kItemLanes = kLanes;
  core::PhaseCodeBackwardParams p;

  TORCH_SPE_DEVICE void operator()(std::int64_t index, int lane) const {
    const std::int64_t k = index % p.num_sines;
    const std::int64_t first = index / p.num_sines * p.num_pairs, end = first + p.num_pairs;
    const core::PhaseSine<T> sine(p, index);
    core::PhaseSums<T> sums;
    for (std::int64_t i = first + lane; i < end; i += kLanes) {
      if (p.sine[i] == k) sums.add(p, sine, core::phase_of_pair<T>(p, i), i);
    }
    sums = {warp_sum(sums.amplitude), warp_sum(sums.offset), warp_sum(sums.bandwidth)};
    if (lane == 0) core::store_gradients(p, sine, sums, index);
    for (std::int64_t axis = 0; axis < p.ndim && p.grad_freqs != nullptr; ++axis) {
      double sum = 0;
      for (std::int64_t i = first + lane; i < end; i += kLanes) {
        if (p.sine[i] == k) sum += p.grad_cycles[i * p.ndim + axis];
      }
      sum = warp_sum(sum);
      if (lane == 0) core::store_grad_freq<T>(p, axis, sum, index * p.ndim + axis);
    }
  }
};
template <class T>
struct GateCode {
  static constexpr int kItemLanes = kLanes;
  core::GateCodeParams p;
  TORCH_SPE_DEVICE void operator()(std::int64_t i, int lane) const {
    core::gate_code<T, kLanes>(p, i, lane);
  }
};
template <class T>
struct GateCodeBackward {
  static constexpr int kItemLanes = kLanes;
  core::GateCodeBackwardParams p;
  TORCH_SPE_DEVICE void operator()(std::int64_t i, int lane) const {
    core::gate_code_backward<T, kLanes>(p, i, lane, WarpSum{});
  }
};

template <class T>
struct GateExactCode {
  static constexpr int kItemLanes = 1;
  core::GateExactCodeParams p;
  TORCH_SPE_DEVICE void operator()(std::int64_t i, int) const { core::gate_exact_code<T>(p, i); }
};
template <class T>
struct GateExactCodeBackward {
  static constexpr int kItemLanes = 1;
  core::GateExactCodeBackwardParams p;
  TORCH_SPE_DEVICE void operator()(std::int64_t i, int) const {
    core::gate_exact_code_backward<T>(p, i);
  }
};

// Item i of [H D, max(K, P)] is sine i of the order, and pair i.
template <class T>
struct MakePhaseNoise {
  static constexpr int kItemLanes = 1;
  core::PhaseNoiseParams p;

  TORCH_SPE_DEVICE void operator()(std::int64_t item, int) const {
    const std::int64_t width = max_of(p.num_sines, p.num_pairs);
    const std::int64_t feature = item / width, i = item % width;
    if (i < p.num_sines) {
      const int place = core::rank_of(static_cast<int>(i), static_cast<int>(p.num_sines),
                                      [&](int k) { return core::order_key(p, feature, k); });
      for (std::int64_t pair = place; pair < p.num_pairs; pair += p.num_sines)
        p.sine[feature * p.num_pairs + pair] = i;
    }
    if (i < p.num_pairs) make_pair(feature, i);
  }

 private:
  TORCH_SPE_DEVICE void make_pair(std::int64_t feature, std::int64_t pair) const {
    const std::int64_t at = feature * p.num_pairs + pair;
    const std::int64_t first = pair % p.num_sines;
    for (std::int64_t axis = 0; axis < max_of(p.ndim, 1); ++axis) {
      const auto words_of = [&](std::int64_t other) {
        return core::phase_words(p, core::PhaseNoiseUse::kPair, axis, feature, other);
      };
      const auto words = words_of(pair);
      if (axis == 0)
        static_cast<T*>(p.phases)[at] = static_cast<T>(core::uniform_of(words.word[0]));
      if (p.ndim == 0) return;
      const int count = core::pairs_of_sine(p, first);
      const int rank = core::rank_of(
          static_cast<int>(pair / p.num_sines), count,
          [&](std::int64_t j) { return core::stratum_key(words_of(first + j * p.num_sines)); });
      static_cast<T*>(p.deviates)[at * p.ndim + axis] =
          static_cast<T>(core::stratified_normal(rank, count, words));
    }
  }
};

// Items are blocks of four pairs, [H D, P / 4].
template <class T>
struct MakeCircleNoise {
  static constexpr int kItemLanes = 1;
  core::CircleNoiseParams p;
  TORCH_SPE_DEVICE void operator()(std::int64_t i, int) const {
    const std::int64_t blocks = ceil_div(p.num_pairs, 4);
    core::make_circle_noise<T>(p, i / blocks, i % blocks);
  }
};

// Calls function(Make<T>{p}) for the type of the values.
template <template <class> class Make, class Params, class Function>
void with_type(const Params& p, const Function& function) {
  if (p.dtype == core::DType::kFloat64) return function(Make<double>{p});
  function(Make<float>{p});
}

std::int64_t num_sines(const core::SineParameters& p) {
  return p.num_heads * p.in_features * p.num_sines;
}

}  // namespace

void sine_code(const core::SineCodeParams& p, Stream stream) {
  with_type<MakeSineCode>(p, [&](const auto& make) { for_each_item(num_sines(p), make, stream); });
}

void sine_code_backward(const core::SineCodeBackwardParams& p, Stream stream) {
  with_type<MakeSineCodeBackward>(
      p, [&](const auto& make) { for_each_item(num_sines(p), make, stream); });
}

void exact_code(const core::ExactCodeParams& p, Stream stream) {
  with_type<MakeExactCode>(p, [&](const auto& make) { for_each_item(num_sines(p), make, stream); });
}

void exact_code_backward(const core::ExactCodeBackwardParams& p, Stream stream) {
  with_type<MakeExactCodeBackward>(
      p, [&](const auto& make) { for_each_item(num_sines(p), make, stream); });
}

void phase_code(const core::PhaseCodeParams& p, Stream stream) {
  with_type<MakePhaseCode>(p, [&](const auto& make) {
    for_each_item(p.num_heads * p.in_features * p.num_pairs, make, stream);
  });
}

void phase_code_backward(const core::PhaseCodeBackwardParams& p, Stream stream) {
  with_type<MakePhaseCodeBackward>(
      p, [&](const auto& make) { for_each_item(num_sines(p), make, stream); });
}

void gate_code(const core::GateCodeParams& p, Stream stream) {
  with_type<GateCode>(p, [&](const auto& make) { for_each_item(p.features, make, stream); });
}

void gate_code_backward(const core::GateCodeBackwardParams& p, Stream stream) {
  with_type<GateCodeBackward>(p,
                              [&](const auto& make) { for_each_item(p.features, make, stream); });
}

void gate_exact_code(const core::GateExactCodeParams& p, Stream stream) {
  with_type<GateExactCode>(p, [&](const auto& make) { for_each_item(p.features, make, stream); });
}

void gate_exact_code_backward(const core::GateExactCodeBackwardParams& p, Stream stream) {
  with_type<GateExactCodeBackward>(
      p, [&](const auto& make) { for_each_item(p.features, make, stream); });
}

void phase_noise(const core::PhaseNoiseParams& p, Stream stream) {
  with_type<MakePhaseNoise>(p, [&](const auto& make) {
    for_each_item(p.num_heads * p.in_features * max_of(p.num_sines, p.num_pairs), make, stream);
  });
}

void circle_noise(const core::CircleNoiseParams& p, Stream stream) {
  with_type<MakeCircleNoise>(p, [&](const auto& make) {
    for_each_item(p.num_heads * p.in_features * ceil_div(p.num_pairs, 4), make, stream);
  });
}

}  // namespace torch_spe::cuda
