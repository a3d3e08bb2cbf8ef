// The description of the operator torch_spe::sine_features, also for operators that encode so.
#pragma once

#include "core/sine_features.h"
#include "encoders.h"

namespace torch_spe::ops {

struct SineFeatures : PositionalEncoder<SineFeatures> {
  static constexpr const char* kName = "sine_features";
  static constexpr const char* kSchema =
      "sine_features(Tensor x, Tensor freqs, Tensor amplitudes, Tensor? offsets=None, "
      "Tensor? constant=None, Tensor? positions=None, Scalar start=0, "
      "str feature_map='identity') -> Tensor";
  static constexpr const char* kDoc =
      "Multiplies x [B, N, H, D] with the cosine and sine of every frequency, to "
      "[B, N, H, 2KD], or [B, N, H, (2K + 1) D] with a constant.";
  static constexpr std::array kGradients{"x",       "freqs",    "amplitudes",
                                         "offsets", "constant", "positions"};
  using Params = core::SineFeaturesParams;
  using BackwardParams = core::SineFeaturesBackwardParams;

  struct Arguments : EncoderArguments {
    at::Tensor amplitudes;    // [H, D, K]
    OptionalTensor offsets;   // [H, D, K]
    OptionalTensor constant;  // [H, D]
    auto fields() {
      return std::tie(x, freqs, amplitudes, offsets, constant, positions, start, feature_map);
    }
  };

  static void check_tables(const Arguments& a, const char* op = kName, const char* x = "x") {
    check_freqs(op, a, "K", "sine (K >= 1)", x);
    const auto check_sines = [&](const char* name, const at::Tensor& table) {
      check_table(op, name, table, a.x, 3, "[H, D, K]", x);
      check_size(op, name, table, 2, a.freqs.sym_size(2), "K of freqs");
    };
    check_sines("amplitudes", a.amplitudes);
    if (a.offsets.has_value()) check_sines("offsets", *a.offsets);
    if (a.constant.has_value()) check_table(op, "constant", *a.constant, a.x, 2, "[H, D]", x);
  }

  static void check_finite_tables(const Arguments& a, const char* op = kName) {
    check_finite(op, "amplitudes", a.amplitudes);
    if (a.offsets.has_value()) check_finite(op, "offsets", *a.offsets);
    if (a.constant.has_value()) check_finite(op, "constant", *a.constant);
  }

  static c10::SymInt width(const Arguments& a) {
    return (a.freqs.sym_size(2) * 2 + (a.constant.has_value() ? 1 : 0)) * a.freqs.sym_size(1);
  }

  static void fill_tables(Params& p, const Arguments& a, at::ScalarType type, KernelTensors& kept) {
    p.num_sines = a.freqs.size(2);
    p.ndim = a.freqs.dim() == 4 ? a.freqs.size(3) : 1;
    p.amplitudes = kept.contiguous(a.amplitudes, type);
    p.offsets =
        kept.doubles(a.offsets.has_value() ? *a.offsets
                                           : at::zeros(a.amplitudes.sizes(),
                                                       a.amplitudes.options().dtype(at::kDouble)));
    p.constant = kept.contiguous(a.constant, type);
  }

  static void set_table_gradients(BackwardParams& p, BackwardCall<SineFeatures>& b) {
    p.grad_amplitudes = b.double_gradient("amplitudes");
    p.grad_offsets = b.double_gradient("offsets");
    p.grad_constant = b.double_gradient("constant");
  }
};

}  // namespace torch_spe::ops
