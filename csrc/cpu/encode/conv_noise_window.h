// The noise of the convolution filter in a part of the grid, generated or from a tensor.
// Included by kernels only, like simd.h.
#pragma once

#include "cpu/encode/conv_products.h"
#include "cpu/noise.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

// The noise that the codes of one feature in a box need, [periods, width], from the generator or
// from a tensor.
template <class T>
class ConvNoiseWindow {
 public:
  ConvNoiseWindow(const core::ConvFilterParams& p, const ConvPlan& plan)
      : p_(p),
        plan_(plan),
        line_(sizeof(T) == sizeof(float) ? 0 : plan.periods[2] * kWidth<T> + kNoiseSlack) {}

  static std::int64_t size(const ConvPlan& plan) {
    return plan.windows() * kWidth<T> + max_of(kNoiseSlack, kWindowSlack * kWidth<T>);
  }

  void fill(const GridBox& box, std::int64_t head, std::int64_t feature,
            const std::int64_t shift[3], std::int64_t first, std::int64_t width, T* out) const {
    const std::int64_t (&periods)[3] = plan_.periods;
    if (p_.noise == nullptr) {
      const core::NoiseParams& g = p_.generated;
      NoiseLine line{g.kind, g.seed, g.ndim, head, feature, {}, periods[2], first, width};
      std::int64_t origin[3];
      for (int i = 0; i < 3; ++i) {
        origin[i] = core::floor_divide(g.start[i] + box.begin[i] + shift[i], g.stride[i]);
      }
      origin[2] -= plan_.lead;
      line.period[2] = origin[2];
      for (std::int64_t i0 = 0; i0 < periods[0]; ++i0) {
        for (std::int64_t i1 = 0; i1 < periods[1]; ++i1) {
          line.period[0] = origin[0] + i0;
          line.period[1] = origin[1] + i1;
          fill_line(line, out + (i0 * periods[1] + i1) * periods[2] * width);
        }
      }
    } else {
      visit_storage(p_.noise_dtype, [&](auto storage) {
        load_tensor<decltype(storage)>(box, head, feature, first, width, out);
      });
    }
    // Blocks of rows may reach over the end.
    T* end = out + plan_.windows() * width;
    for (std::int64_t i = 0; i < kWindowSlack * width; ++i) end[i] = 0;
  }

 private:
  void fill_line(const NoiseLine& line, T* out) const {
    if (line.kind == core::NoiseKind::kRademacher) {
      fill_signs(line, out);
    } else if constexpr (sizeof(T) == sizeof(float)) {
      fill_normals(line, out);
    } else {
      fill_normals(line, line_);
      for (std::int64_t i = 0; i < line.count * line.width; ++i) out[i] = line_[i];
    }
  }

  template <class Storage>
  void load_tensor(const GridBox& box, std::int64_t head, std::int64_t feature, std::int64_t first,
                   std::int64_t width, T* out) const {
    const auto& s = p_.noise_strides;
    const Storage* noise =
        static_cast<const Storage*>(p_.noise) + head * s[0] + feature * s[1] + first * s[5];
    const std::int64_t given = min_of(width, p_.num_realizations - first);
    const std::int64_t (&periods)[3] = plan_.periods;
    std::int64_t available[3];
    for (int i = 0; i < 3; ++i) {
      available[i] = p_.size[i] + p_.kernel_size[i] - 1 - box.begin[i];
    }
    for (std::int64_t i0 = 0; i0 < periods[0]; ++i0) {
      for (std::int64_t i1 = 0; i1 < periods[1]; ++i1) {
        for (std::int64_t i2 = 0; i2 < periods[2]; ++i2) {
          T* row = out + ((i0 * periods[1] + i1) * periods[2] + i2) * width;
          const bool inside = i0 < available[0] && i1 < available[1] && i2 < available[2];
          if (inside) {
            load_row(noise + (box.begin[0] + i0) * s[2] + (box.begin[1] + i1) * s[3] +
                         (box.begin[2] + i2) * s[4],
                     s[5], given, row);
          }
          for (std::int64_t r = inside ? given : 0; r < width; ++r) row[r] = 0;
        }
      }
    }
  }

  const core::ConvFilterParams& p_;
  const ConvPlan& plan_;
  Workspace<float> line_;
};

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
