// The phasors of exact sines and their parameters, with features along the lanes. Included by
// kernels only, like simd.h.
#pragma once

#include "core/sine_features.h"
#include "cpu/encode/phasors.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

// The phasors of all heads and sines, [H K, D], three positions at a time, in lanes of features.
template <class T>
class SineFeaturesPhasors {
  static constexpr std::int64_t kWidth = kLanes<T>;

 public:
  explicit SineFeaturesPhasors(const core::SineFeaturesParams& p)
      : p_(p),
        consecutive_(p.positions == nullptr),
        rows_(p.num_heads * p.num_sines),
        width_(round_up(p.in_features, kWidth)),
        freqs_(p.ndim * rows_ * width_),
        offsets_(2 * rows_ * width_),
        amplitudes_(rows_ * width_),
        constant_(p.num_heads * width_),
        table_(consecutive_ ? rows_ : 0, width_),
        middle_(2 * rows_ * width_) {
    load();
  }

  // Reads the parameters, once more where they are now those of other heads.
  void load() {
    const T* amplitudes = static_cast<const T*>(p_.amplitudes);
    const T* constant = static_cast<const T*>(p_.constant);
    for (std::int64_t row = 0; row < rows_; ++row) {
      const std::int64_t head = row / p_.num_sines, k = row % p_.num_sines;
      for (std::int64_t d = 0; d < width_; ++d) {
        const bool inside = d < p_.in_features;
        const std::int64_t from = (head * p_.in_features + d) * p_.num_sines + k;
        for (std::int64_t a = 0; a < p_.ndim; ++a)
          freqs_[(a * rows_ + row) * width_ + d] = inside ? p_.freqs[from * p_.ndim + a] : 0;
        amplitudes_[row * width_ + d] = inside ? amplitudes[from] : 0;
        const double cycles = inside ? p_.offsets[from] / core::kTwoPi : 0;
        core::cos_sin_cycles(core::wrap_cycles(cycles), offsets_ + 2 * row * width_ + d,
                             offsets_ + (2 * row + 1) * width_ + d);
        if (k == 0)
          constant_[head * width_ + d] =
              inside && constant != nullptr ? constant[head * p_.in_features + d] : 0;
      }
    }
    if (consecutive_) table_.load_sines(rows_, freqs_, offsets_, p_.start, p_.length);
  }

  // Goes to position n, a multiple of kPhasorChunk, for the given heads.
  void go_to(std::int64_t n, std::int64_t first_head, std::int64_t heads) {
    n_ = n;
    if (!consecutive_) return;
    table_.go_to(n);
    for (std::int64_t row = first_head * p_.num_sines; row < (first_head + heads) * p_.num_sines;
         ++row) {
      const T* from = table_.middle(row);
      T* to = middle_ + 2 * row * width_;
      for (std::int64_t i = 0; i < 2 * width_; ++i) to[i] = from[i];
    }
  }

  // The phasors of a row, at the features from d on, at the positions n + t, n + t + 1 and
  // n + t + 2. After go_to(n) every row and vector of features is asked for t = 0, 3, 6, ...
  TORCH_SPE_INLINE void next(std::int64_t row, std::int64_t d, std::int64_t t,
                             Complex<T> out[kTrio]) {
    if (consecutive_) {
      TrioOfPhasors<T> trio;
      T* middle = middle_ + 2 * row * width_ + d;
      trio.start(table_, row, d);
      trio.middle = load_complex<T>(middle, middle + width_);
      trio.next(out);
      store_vec(middle, trio.middle.re);
      store_vec(middle + width_, trio.middle.im);
      return;
    }
    const T* offset = offsets_ + 2 * row * width_ + d;
    for (std::int64_t j = 0; j < kTrio; ++j) {
      alignas(64) T re[kWidth], im[kWidth];
      exact_phasors(p_.ndim, freqs_ + row * width_ + d, rows_ * width_, kWidth,
                    p_.positions + min_of(n_ + t + j, p_.length - 1) * p_.ndim, re, im);
      out[j] = multiply(load_complex<T>(re, im), load_complex<T>(offset, offset + width_));
    }
  }

  const core::SineFeaturesParams& params() const { return p_; }
  std::int64_t width() const { return width_; }
  Vec<T> amplitudes(std::int64_t row, std::int64_t d) const {
    return load_vec(amplitudes_ + row * width_ + d);
  }
  Vec<T> constant(std::int64_t head, std::int64_t d) const {
    return load_vec(constant_ + head * width_ + d);
  }
  const double* freqs(std::int64_t row, std::int64_t d) const { return freqs_ + row * width_ + d; }
  std::int64_t freqs_stride() const { return rows_ * width_; }

 private:
  const core::SineFeaturesParams& p_;
  const bool consecutive_;
  const std::int64_t rows_, width_;  // H K, and D filled up
  Workspace<double> freqs_;
  Workspace<T> offsets_, amplitudes_, constant_;
  PhasorTable<T> table_;
  Workspace<T> middle_;
  std::int64_t n_ = 0;
};

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
