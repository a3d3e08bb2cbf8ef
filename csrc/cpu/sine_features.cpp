#include "sine_features.h"

#include "encode/sine_features_tile.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {
namespace {

// Calls function(tile, first batch row) for the tiles of the positions [n0, n1), of all heads.
template <class Function>
TORCH_SPE_INLINE void for_each_tile(const SineFeaturesParams& p, std::int64_t n0, std::int64_t n1,
                                    const Function& function) {
  for (std::int64_t n = n0; n < n1; n += kPhasorChunk) {
    for (std::int64_t b = 0; b < p.batch; b += kSineFeaturesRows) {
      const std::int64_t rows = min_of(kSineFeaturesRows, p.batch - b);
      function(SineFeaturesTile{n, min_of(kPhasorChunk, n1 - n), rows, 0, p.num_heads}, b);
    }
  }
}

template <class Storage>
void sine_features_forward_of(const SineFeaturesParams& p) {
  using T = core::accumulate_t<Storage>;
  const std::int64_t segments = (p.length + kPhasorSegment - 1) / kPhasorSegment;
  const std::int64_t outputs = num_outputs(p);
#pragma omp parallel num_threads(p.num_threads) if (segments > 1)
  {
    SineFeaturesPhasors<T> phasors(p);
#pragma omp for schedule(static)
    for (std::int64_t segment = 0; segment < segments; ++segment) {
      const std::int64_t n0 = segment * kPhasorSegment;
      for_each_tile(
          p, n0, min_of(n0 + kPhasorSegment, p.length),
          [&](const SineFeaturesTile& tile, std::int64_t b) {
            encode_sine_features_tile(
                phasors, tile, strided_tile<Storage>(p.x, p.x_strides, b, tile.n, 0),
                contiguous_tile<Storage>(p.out, p.length, p.num_heads, outputs, b, tile.n, 0));
          });
    }
  }
}

template <class Storage>
void sine_features_backward_of(const SineFeaturesBackwardParams& p) {
  using T = core::accumulate_t<Storage>;
  constexpr std::int64_t kEnoughTasks = 32;
  const Parts parts(p.length, kEnoughTasks);
  const std::int64_t width = round_up(p.in_features, kLanes<T>);
  const std::int64_t size = SineFeaturesSums::size(p, width);
  Workspace<double> sums(parts.count * size);
  for (std::int64_t i = 0; i < parts.count * size; ++i) sums[i] = 0;
  // Parts share no position.
  if (p.grad_positions != nullptr) {
    for (std::int64_t i = 0; i < p.length * p.ndim; ++i) p.grad_positions[i] = 0;
  }
#pragma omp parallel num_threads(p.num_threads)
  {
    SineFeaturesPhasors<T> phasors(p);
    SineFeaturesGradient<T> gradient(phasors);
#pragma omp for schedule(static)
    for (std::int64_t part = 0; part < parts.count; ++part) {
      const std::int64_t n0 = part * parts.length;
      const SineFeaturesSums sums_of_part(p, width, sums + part * size);
      for_each_tile(p, n0, min_of(n0 + parts.length, p.length),
                    [&](const SineFeaturesTile& tile, std::int64_t b) {
                      gradient.add_tile(
                          tile, strided_tile<Storage>(p.x, p.x_strides, b, tile.n, 0),
                          strided_tile<Storage>(p.grad_out, p.grad_out_strides, b, tile.n, 0),
                          contiguous_tile<Storage>(p.grad_x, p.length, p.num_heads, p.in_features,
                                                   b, tile.n, 0),
                          sums_of_part, p.grad_positions);
                    });
    }
  }
  for (std::int64_t part = 1; part < parts.count; ++part) {
    for (std::int64_t i = 0; i < size; ++i) sums[i] += sums[part * size + i];
  }
  store_gradients(p, 0, p.num_heads, width, SineFeaturesSums(p, width, sums));
}

}  // namespace

void sine_features_forward(const SineFeaturesParams& p) {
  visit_storage(p.dtype, [&](auto storage) { sine_features_forward_of<decltype(storage)>(p); });
}

void sine_features_backward(const SineFeaturesBackwardParams& p) {
  visit_storage(p.dtype, [&](auto storage) { sine_features_backward_of<decltype(storage)>(p); });
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
