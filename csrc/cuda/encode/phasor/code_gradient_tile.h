// Gradients of the codes of the phasor filter, summed over a segment of consecutive positions: from
// operands of tensor cores in registers, wherever their rows are stored.
//
// What is wanted are the sums of conj(e_n) G_n and of n conj(e_n) G_n, where G_n are the gradients
// of the codes at position n. Over a run of positions the first is made as a polynomial in the
// rotation s by one position, S = s S + G, so that s S is what the tensor cores add G to;
// U = s U + S counts G of the run's last position once, that of the one before twice, and so on.
// The exact e of the last position leads from both to the sums.
#pragma once

#include "encode/phasor.h"
#include "encode/phasor/gradient_parts.h"
#include "phasor_filter.h"

namespace torch_spe::cuda {

constexpr int kGradientPairs = 4;  // of a lane

// Lane 4 g + c has the codes of features g, g + 8 (halves) and pairs c + {0, 4, 8, 12} of its
// warp's 16 and 16.
struct LaneCodeGradients {
  std::int64_t first, num_pairs;  // index of its first code in [H, D, pairs]
  int features_left, pairs_left;  // from there on

  TORCH_SPE_DEVICE bool exists(int i, int half) const {
    return 8 * half < features_left && 4 * i < pairs_left;
  }
  // The index of code (i, half); 0 where there is none.
  TORCH_SPE_DEVICE std::int64_t index_or_first(int i, int half) const {
    return exists(i, half) ? first + half * 8 * num_pairs + 4 * i : 0;
  }
};

// kConstant: whether there is a constant, whose gradient takes registers.
template <class Storage, bool kConstant>
class PhasorCodeGradients {
 public:
  // Of the segment that begins at position `first`, which counts from the operator's start.
  // `sums` and `slopes`: memory of this thread, [i, half] every kThreads.
  TORCH_SPE_DEVICE PhasorCodeGradients(const PhasorFilterBackwardParams& p,
                                       const LaneCodeGradients& own, std::int64_t first,
                                       Phasor<float>* sums, Phasor<float>* slopes)
      : p_(p), own_(own), first_(first), sums_(sums), slopes_(slopes) {
    double freqs[kGradientPairs][2];
    load_freqs(freqs);
    TORCH_SPE_UNROLL
    for (int i = 0; i < kGradientPairs; ++i) {
      TORCH_SPE_UNROLL
      for (int half = 0; half < 2; ++half) {
        steps_[i][half].set_fast(freqs[i][half], 1.0);
        run_slopes_[i][half] = {0.0f, 0.0f};
        sums_[(2 * i + half) * kThreads] = slopes_[(2 * i + half) * kThreads] = {0.0f, 0.0f};
        run_sums_[i][2 * half] = run_sums_[i][2 * half + 1] = 0;
        if constexpr (kConstant) totals_[i][2 * half] = totals_[i][2 * half + 1] = 0;
      }
    }
  }

  // The next position: adds features times the gradients of the outputs of pairs i, summed over the
  // batch.
  TORCH_SPE_DEVICE void add(int i, const std::uint32_t (&features)[4],
                            const std::uint32_t (&grad)[2]) {
    float (&sum)[4] = run_sums_[i];
    TORCH_SPE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Phasor<float>& by = steps_[i][half];
      const float re = sum[2 * half] * by.re - sum[2 * half + 1] * by.im;
      sum[2 * half + 1] = sum[2 * half + 1] * by.re + sum[2 * half] * by.im;
      sum[2 * half] = re;
    }
    mma_m16n8k16<Storage>(sum, features, grad);
    if constexpr (kConstant) mma_m16n8k16<Storage>(totals_[i], features, grad);
    TORCH_SPE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Phasor<float>& by = steps_[i][half];
      Phasor<float>& slope = run_slopes_[i][half];
      const float re = slope.re;
      slope.re = by.re * re + sum[2 * half];
      slope.re -= by.im * slope.im;
      slope.im = by.re * slope.im + sum[2 * half + 1];
      slope.im += by.im * re;
    }
  }

  // Adds a run to the sums that ends before position `end` of the segment, and begins another.
  TORCH_SPE_DEVICE void close_run(int end) {
    const double last = p_.start + static_cast<double>(first_ + end - 1);
    double freqs[kGradientPairs][2];
    load_freqs(freqs);
    TORCH_SPE_UNROLL
    for (int i = 0; i < kGradientPairs; ++i) {
      TORCH_SPE_UNROLL
      for (int half = 0; half < 2; ++half) {
        Phasor<float> e;
        e.set_fast(freqs[i][half], last);
        e.im = -e.im;
        Phasor<float> sum{run_sums_[i][2 * half], run_sums_[i][2 * half + 1]};
        Phasor<float>& slope = run_slopes_[i][half];
        sum.rotate(e);
        slope.rotate(e);
        Phasor<float>& all = sums_[(2 * i + half) * kThreads];
        Phasor<float>& all_slopes = slopes_[(2 * i + half) * kThreads];
        all.re += sum.re;
        all.im += sum.im;
        all_slopes.re += static_cast<float>(end) * sum.re - slope.re;
        all_slopes.im += static_cast<float>(end) * sum.im - slope.im;
        run_sums_[i][2 * half] = run_sums_[i][2 * half + 1] = 0;
        slope = {0.0f, 0.0f};
      }
    }
  }

  // Writes the segment's parts of the parameters' gradients.
  TORCH_SPE_DEVICE void write(const PhasorGradientParts& parts, std::int64_t segment) const {
    const std::int64_t codes = p_.num_heads * p_.in_features * p_.num_pairs;
    Phasor<float> coefficients[kGradientPairs][2];
    TORCH_SPE_UNROLL
    for (int i = 0; i < kGradientPairs; ++i) {
      TORCH_SPE_UNROLL
      for (int half = 0; half < 2; ++half)
        coefficients[i][half] =
            static_cast<const Phasor<float>*>(p_.coefficients)[own_.index_or_first(i, half)];
    }
    TORCH_SPE_UNROLL
    for (int i = 0; i < kGradientPairs; ++i) {
      TORCH_SPE_UNROLL
      for (int half = 0; half < 2; ++half) {
        if (!own_.exists(i, half)) continue;
        const std::int64_t part = segment * codes + own_.index_or_first(i, half);
        const Phasor<float>&sum = sums_[(2 * i + half) * kThreads],
              &slope = slopes_[(2 * i + half) * kThreads];
        if (parts.freqs != nullptr) {
          // The phase's gradient is the imaginary part of conj(coefficient) w.
          const double re = coefficients[i][half].re, im = coefficients[i][half].im;
          parts.freqs[part] = core::kTwoPi * (re * slope.im - im * slope.re +
                                              (p_.start + static_cast<double>(first_)) *
                                                  (re * sum.im - im * sum.re));
        }
        if (parts.coefficients != nullptr) {
          parts.coefficients[2 * part] = sum.re;
          parts.coefficients[2 * part + 1] = sum.im;
        }
        if constexpr (kConstant) {
          if (parts.constant == nullptr) continue;
          parts.constant[2 * part] = totals_[i][2 * half];
          parts.constant[2 * part + 1] = totals_[i][2 * half + 1];
        }
      }
    }
  }

 private:
  // All at once; where there is no code, that of the first.
  TORCH_SPE_DEVICE void load_freqs(double (&freqs)[kGradientPairs][2]) const {
    TORCH_SPE_UNROLL
    for (int i = 0; i < kGradientPairs; ++i) {
      TORCH_SPE_UNROLL
      for (int half = 0; half < 2; ++half) freqs[i][half] = p_.freqs[own_.index_or_first(i, half)];
    }
  }

  const PhasorFilterBackwardParams& p_;
  const LaneCodeGradients own_;
  const std::int64_t first_;
  Phasor<float>*const sums_, *const slopes_;
  Phasor<float> steps_[kGradientPairs][2];
  float run_sums_[kGradientPairs][4];                // S, of both halves
  Phasor<float> run_slopes_[kGradientPairs][2];      // U
  float totals_[kConstant ? kGradientPairs : 1][4];  // of G
};

}  // namespace torch_spe::cuda
