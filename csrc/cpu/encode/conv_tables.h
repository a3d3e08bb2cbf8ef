// What the codes of the convolution filter are made from: padded kernels, constants, noise.
// Included by kernels only, like simd.h.
#pragma once

#include "cpu/encode/conv_noise_window.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

// Tables of one thread for a head, a block of realizations and a group of features: copies of the
// kernels, constants, and the noise. What is asked for again is not made again; the contents depend
// on the last call of load alone.
template <class T>
class ConvTables {
 public:
  ConvTables(const core::ConvFilterParams& p, const ConvPlan& plan)
      : p_(p),
        plan_(plan),
        dense_(p.generated.stride[0] * p.generated.stride[1] * p.generated.stride[2] == 1),
        kernel_rows_(p.kernel_size[0] * p.kernel_size[1]),
        kernel_ld_(plan.part_taps + 2 * kPad),
        sums_size_(plan.split() ? (plan.windows() / kSplit + kDenseRows) * kWidth<T> : 0),
        noise_size_(ConvNoiseWindow<T>::size(plan) + kSplitSums * sums_size_),
        max_slots_(count_slots()),
        window_(p, plan),
        kernels_(p.in_features * kernel_size()),
        constants_(p.in_features * kWidth<T>),
        shifts_(p.in_features * 3),
        phases_(p.in_features * 3),
        windows_(plan.group * noise_size_),
        dense_offsets_(kernel_rows_),
        classes_(kWidth<T> * 3) {}

  // For the realizations of the block that begins with `first`, at the positions of a box, and the
  // features [d0, d0 + count), count <= plan.group.
  void load(const GridBox& box, std::int64_t head, std::int64_t first, std::int64_t d0,
            std::int64_t count) {
    load_head(head);
    load_realizations(first);
    make_noise(box, d0, count);
  }

  const core::ConvFilterParams& params() const { return p_; }
  const ConvPlan& plan() const { return plan_; }
  bool dense() const { return dense_; }
  // Whether the classes of the realizations of a vector are consecutive.
  bool contiguous() const { return p_.generated.stride[2] % kLanes<T> == 0; }

  // And there is one dimension.
  bool in_a_line() const {
    const std::int64_t (&s)[3] = p_.generated.stride;
    return contiguous() && kernel_rows_ == 1 && s[0] * s[1] == 1;
  }

  std::int64_t kernel_rows() const { return kernel_rows_; }
  std::int64_t kernel_ld() const { return kernel_ld_; }
  std::int64_t kernel_size() const { return plan_.parts * kernel_rows_ * kernel_ld_; }
  std::int64_t max_slots() const { return max_slots_; }
  std::int64_t width() const { return width_; }  // of the block of realizations
  const T* kernel(std::int64_t d) const { return kernels_ + d * kernel_size(); }
  const T* constants(std::int64_t d) const { return constants_ + d * kWidth<T>; }
  const T* noise(std::int64_t d) const { return windows_ + (d - d0_) * noise_size_; }
  // Sums of the noise, and the distance between them.
  const T* sums(std::int64_t d) const { return noise(d) + ConvNoiseWindow<T>::size(plan_); }
  std::int64_t sums_size() const { return sums_size_; }
  const std::int64_t* phases(std::int64_t d) const { return phases_ + d * 3; }
  const std::int64_t* dense_offsets() const { return dense_offsets_; }
  const std::int64_t* classes(std::int64_t r) const { return classes_ + r * 3; }

  T noise_scale() const {
    const std::int64_t (&s)[3] = p_.generated.stride;
    return static_cast<T>(__builtin_sqrt(static_cast<double>(s[0] * s[1] * s[2])));
  }

 private:
  std::int64_t count_slots() const {
    std::int64_t slots = 1;
    for (int i = 0; i < 3; ++i) {
      const std::int64_t stride = p_.generated.stride[i];
      slots *= (p_.kernel_size[i] - 1 + stride - 1) / stride + 1;
    }
    return slots;
  }

  // Copies of the kernels between zeros, times the square root of the strides.
  void load_head(std::int64_t head) {
    if (head == head_) return;
    head_ = head;
    const T* kernel =
        static_cast<const T*>(p_.kernel) + head * p_.in_features * kernel_rows_ * p_.kernel_size[2];
    const T scale = noise_scale();
    for (std::int64_t i = 0; i < p_.in_features * kernel_size(); ++i) kernels_[i] = 0;
    for (std::int64_t row = 0; row < p_.in_features * kernel_rows_; ++row) {
      const T* from = kernel + row * p_.kernel_size[2];
      T* to =
          kernels_ + row / kernel_rows_ * kernel_size() + row % kernel_rows_ * kernel_ld_ + kPad;
      for (std::int64_t i = 0; i < plan_.part_taps; ++i) {
        if (plan_.split()) {
          split_taps(from, p_.kernel_size[2], i, kernel_rows_ * kernel_ld_, to + i);
        } else {
          to[i] = from[i] * scale;
        }
      }
    }
    for (std::int64_t d = 0; d < p_.in_features; ++d) {
      if (dense_) {
        for (int i = 0; i < 3; ++i) shifts_[d * 3 + i] = 0;
      } else {
        core::noise_shift(p_.generated.seed, p_.generated.ndim, head, d, p_.generated.stride,
                          shifts_ + d * 3);
      }
    }
    first_ = -1;
  }

  // The constants and classes of the realizations [first, first + width).
  void load_realizations(std::int64_t first) {
    if (first == first_) return;
    const std::int64_t width = block_width<T>(p_.num_realizations, first);
    first_ = first;
    width_ = width;
    const T* constant = static_cast<const T*>(p_.constant);
    for (std::int64_t d = 0; d < p_.in_features; ++d) {
      for (std::int64_t r = 0; r < width; ++r) {
        const bool given = constant != nullptr && first + r < p_.num_realizations;
        constants_[d * kWidth<T> + r] =
            given ? constant[(head_ * p_.in_features + d) * p_.num_realizations + first + r] : T(0);
      }
    }
    const std::int64_t (&s)[3] = p_.generated.stride;
    for (std::int64_t r = 0; r < width; ++r) {
      classes_[r * 3 + 2] = (first + r) % s[2];
      classes_[r * 3 + 1] = (first + r) / s[2] % s[1];
      classes_[r * 3 + 0] = (first + r) / s[2] / s[1] % s[0];
    }
    for (std::int64_t o = 0; o < kernel_rows_; ++o) {
      dense_offsets_[o] =
          (o / p_.kernel_size[1] * plan_.periods[1] + o % p_.kernel_size[1]) * plan_.part_periods;
    }
  }

  // Makes the noise of the features [d0, d0 + count), count <= plan.group.
  void make_noise(const GridBox& box, std::int64_t d0, std::int64_t count) {
    d0_ = d0;
    const core::NoiseParams& g = p_.generated;
    for (std::int64_t d = d0; d < d0 + count; ++d) {
      T* noise = windows_ + (d - d0) * noise_size_;
      window_.fill(box, head_, d, shifts_ + d * 3, first_, width_, noise);
      if (plan_.split()) {
        add_rows(noise, plan_.windows() / kSplit + kDenseRows, width_, sums_size_,
                 noise + ConvNoiseWindow<T>::size(plan_));
      }
      for (int i = 0; i < 3; ++i) {
        phases_[d * 3 + i] =
            core::floor_modulo(g.start[i] + box.begin[i] + shifts_[d * 3 + i], g.stride[i]);
      }
    }
  }

  const core::ConvFilterParams& p_;
  const ConvPlan& plan_;
  const bool dense_;
  const std::int64_t kernel_rows_, kernel_ld_, sums_size_, noise_size_, max_slots_;
  ConvNoiseWindow<T> window_;
  Workspace<T> kernels_;            // [D, parts, P0 P1, kPad + part_taps + kPad]
  Workspace<T> constants_;          // [D, kWidth]
  Workspace<std::int64_t> shifts_;  // [D, 3]
  Workspace<std::int64_t> phases_;  // [D, 3], of the box's first position
  Workspace<T> windows_;            // [group], each [periods, width] and [sums, periods / 4, width]
  Workspace<std::int64_t> dense_offsets_;
  Workspace<std::int64_t> classes_;  // [kWidth, 3]
  std::int64_t head_ = -1, first_ = -1, width_ = 0, d0_ = 0;
};

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
