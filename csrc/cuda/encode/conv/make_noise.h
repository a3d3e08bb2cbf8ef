#pragma once

#include "encode/conv/noise_line.h"

namespace torch_spe::cuda {

// The i-th number of a noise.
template <class Storage>
struct MakeConvNoise {
  ConvNoiseParams p;

  TORCH_SPE_DEVICE void operator()(std::int64_t i) const {
    Storage* const out = static_cast<Storage*>(p.out) + i;
    const auto next = [&](std::int64_t size) {
      const std::int64_t index = i % size;
      i /= size;
      return index;
    };
    const std::int64_t r = next(p.num_realizations);
    std::int64_t position[3];
    TORCH_SPE_UNROLL
    for (int k = 2; k >= 0; --k) position[k] = next(p.size[k]);
    const std::int64_t d = next(p.in_features), head = i;
    const core::NoiseParams& noise = p.generated;
    const auto seed = static_cast<std::uint64_t>(*noise.device_seed);
    std::int64_t shift[3] = {0, 0, 0}, period[3];
    if (noise_periods(noise) > 1) core::noise_shift(seed, noise.ndim, head, d, noise.stride, shift);
    bool has = true;
    std::int64_t rest = r;
    TORCH_SPE_UNROLL
    for (int k = 2; k >= 0; --k) {
      const std::int64_t shifted = noise.start[k] + position[k] + shift[k];
      period[k] = core::floor_divide(shifted, noise.stride[k]);
      has = has && shifted - period[k] * noise.stride[k] == rest % noise.stride[k];
      rest /= noise.stride[k];
    }
    using T = core::accumulate_t<Storage>;
    T value = 0;
    if (has) {
      value = static_cast<T>(__builtin_sqrt(static_cast<double>(noise_periods(noise)))) *
              static_cast<T>(core::noise_value(noise.kind, seed, noise.ndim, period[0], period[1],
                                               period[2], head, d, r));
    }
    write(value, out);
  }
};

}  // namespace torch_spe::cuda
