#include "rotary.h"

#include "encode/rotary_tile.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {
namespace {

template <class Storage>
void rotary_forward_of(const RotaryParams& p) {
  using T = core::accumulate_t<Storage>;
  constexpr std::int64_t kBlock = RotaryPhasors<T>::kBlock;
#pragma omp parallel num_threads(p.num_threads) if (p.length > kBlock)
  {
    RotaryPhasors<T> phasors(p, 0, p.num_heads);
#pragma omp for schedule(static)
    for (std::int64_t n = 0; n < p.length; n += kBlock) {
      const auto x = strided_tile<Storage>(p.x, p.x_strides, 0, n, 0);
      const auto out =
          contiguous_tile<Storage>(p.out, p.length, p.num_heads, p.in_features, 0, n, 0);
      with_feature_map(p.feature_map, [&](auto map) {
        encode_rotary_tile<map.value>(phasors, p.in_features, n, min_of(kBlock, p.length - n),
                                      p.batch, x, out);
      });
    }
  }
}

template <class Storage>
void rotary_backward_of(const RotaryBackwardParams& p) {
  using T = core::accumulate_t<Storage>;
  constexpr std::int64_t kBlock = RotaryPhasors<T>::kBlock;
  constexpr std::int64_t kEnoughTasks = 32;
  const Parts parts(p.length, kEnoughTasks);
  const bool wants_phases = p.grad_freqs != nullptr || p.grad_positions != nullptr;
  const std::int64_t pairs = p.in_features / 2, width = round_up(p.in_features, kLanes<T>);
  const std::int64_t size = wants_phases ? p.num_heads * pairs : 0;
  Workspace<double> sums(parts.count * size);  // [parts, H, D/2], of the frequencies
  for (std::int64_t i = 0; i < parts.count * size; ++i) sums[i] = 0;
#pragma omp parallel num_threads(p.num_threads)
  {
    RotaryPhasors<T> phasors(p, 0, p.num_heads);
    const Workspace<T> products(wants_phases ? p.num_heads * width : 0);
#pragma omp for schedule(static)
    for (std::int64_t part = 0; part < parts.count; ++part) {
      double* const sums_of_part = sums + part * size;
      const auto grad_phases = [&](std::int64_t n, const T* row) {
        const double position = core::kTwoPi * phasors.position(n);
        double along_position = 0;
        for (std::int64_t head = 0; head < p.num_heads; ++head) {
          for (std::int64_t i = 0; i < pairs; ++i) {
            const double phase = static_cast<double>(row[head * width + 2 * i]) -
                                 static_cast<double>(row[head * width + 2 * i + 1]);
            sums_of_part[head * pairs + i] += position * phase;
            along_position += p.freqs[head * pairs + i] * phase;
          }
        }
        if (p.grad_positions != nullptr) p.grad_positions[n] = core::kTwoPi * along_position;
      };
      const std::int64_t end = min_of((part + 1) * parts.length, p.length);
      for (std::int64_t n = part * parts.length; n < end; n += kBlock) {
        const std::int64_t tile = min_of(kBlock, end - n);
        const auto x = strided_tile<Storage>(p.x, p.x_strides, 0, n, 0);
        const auto grad_out = strided_tile<Storage>(p.grad_out, p.grad_out_strides, 0, n, 0);
        const auto grad_x =
            contiguous_tile<Storage>(p.grad_x, p.length, p.num_heads, p.in_features, 0, n, 0);
        with_feature_map(p.feature_map, [&](auto map) {
          if (wants_phases) {
            differentiate_rotary_tile<map.value, true>(phasors, p.in_features, n, tile, p.batch, x,
                                                       grad_out, grad_x, products.get(),
                                                       grad_phases);
          } else {
            differentiate_rotary_tile<map.value, false>(phasors, p.in_features, n, tile, p.batch, x,
                                                        grad_out, grad_x, products.get(),
                                                        grad_phases);
          }
        });
      }
    }
  }
  if (p.grad_freqs == nullptr) return;
  for (std::int64_t i = 0; i < size; ++i) {
    double sum = 0;
    for (std::int64_t part = 0; part < parts.count; ++part) sum += sums[part * size + i];
    p.grad_freqs[i] = sum;
  }
}

}  // namespace

void rotary_forward(const RotaryParams& p) {
  visit_storage(p.dtype, [&](auto storage) { rotary_forward_of<decltype(storage)>(p); });
}

void rotary_backward(const RotaryBackwardParams& p) {
  visit_storage(p.dtype, [&](auto storage) { rotary_backward_of<decltype(storage)>(p); });
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
