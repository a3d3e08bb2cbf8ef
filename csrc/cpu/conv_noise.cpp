#include "conv_filter.h"
#include "encode/conv_geometry.h"
#include "noise.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {
namespace {

// The noise itself. One feature and one line of positions at a time.
template <class Storage>
void conv_noise_of(const ConvNoiseParams& p) {
  using T = core::accumulate_t<Storage>;
  const NoiseParams& g = p.generated;
  const std::int64_t (&s)[3] = g.stride;
  const std::int64_t classes = s[0] * s[1] * s[2];
  const T scale = static_cast<T>(__builtin_sqrt(static_cast<double>(classes)));
  const std::int64_t length = p.size[0] * p.size[1] * p.size[2];
  Storage* out = static_cast<Storage*>(p.out);
#pragma omp parallel for schedule(static) num_threads(p.num_threads)
  for (std::int64_t source = 0; source < p.num_heads * p.in_features; ++source) {
    const std::int64_t head = source / p.in_features, feature = source % p.in_features;
    std::int64_t shift[3] = {0, 0, 0};
    if (classes > 1) core::noise_shift(g.seed, g.ndim, head, feature, s, shift);
    const std::int64_t from = g.start[2] + shift[2];
    const std::int64_t period = core::floor_divide(from, s[2]);
    const std::int64_t periods = core::floor_divide(from + p.size[2] - 1, s[2]) - period + 1;
    Workspace<float> line(periods * kWidth<float> + kNoiseSlack);
    for (std::int64_t n = 0; n < length; n += p.size[2]) {
      const std::int64_t j0 = g.start[0] + shift[0] + n / p.size[2] / p.size[1];
      const std::int64_t j1 = g.start[1] + shift[1] + n / p.size[2] % p.size[1];
      for (std::int64_t first = 0; first < p.num_realizations; first += kWidth<float>) {
        const std::int64_t width = block_width<float>(p.num_realizations, first);
        const NoiseLine what{
            g.kind,  g.seed,  g.ndim,
            head,    feature, {core::floor_divide(j0, s[0]), core::floor_divide(j1, s[1]), period},
            periods, first,   width};
        if (g.kind == core::NoiseKind::kRademacher) {
          fill_signs(what, line.get());
        } else {
          fill_normals(what, line);
        }
        for (std::int64_t i = 0; i < p.size[2]; ++i) {
          const std::int64_t row = core::floor_divide(from + i, s[2]) - period;
          const std::int64_t here =
              (core::floor_modulo(j0, s[0]) * s[1] + core::floor_modulo(j1, s[1])) * s[2] +
              core::floor_modulo(from + i, s[2]);
          const std::int64_t end = min_of(first + width, p.num_realizations);
          Storage* to = out + (source * length + n + i) * p.num_realizations;
          for (std::int64_t r = first; r < end; ++r) core::store(T(0), to + r);
          for (std::int64_t r = first + core::floor_modulo(here - first, classes); r < end;
               r += classes) {
            core::store(static_cast<T>(line[row * width + r - first]) * scale, to + r);
          }
        }
      }
    }
  }
}

}  // namespace

void conv_noise(const ConvNoiseParams& p) {
  visit_storage(p.dtype, [&](auto storage) { conv_noise_of<decltype(storage)>(p); });
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
