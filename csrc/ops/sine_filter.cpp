// The operator torch_spe::sine_filter.
#include "cpu/sine_filter.h"

#include "encoders.h"

namespace torch_spe::ops {
namespace {

struct SineFilter : PositionalEncoder<SineFilter> {
  static constexpr const char* kName = "sine_filter";
  static constexpr const char* kSchema =
      "sine_filter(Tensor x, Tensor freqs, Tensor weight, Tensor? constant=None, "
      "Tensor? positions=None, Scalar start=0, str feature_map='identity') -> Tensor";
  static constexpr const char* kDoc = "Encodes x [B, N, H, D] with sums of sines, as [B, N, H, R].";
  static constexpr std::array kGradients{"x", "freqs", "weight", "constant", "positions"};
  using Params = core::SineFilterParams;
  using BackwardParams = core::SineFilterBackwardParams;

  struct Arguments : EncoderArguments {
    at::Tensor weight;        // [H, D, 2K, R]
    OptionalTensor constant;  // [H, D, R]
    auto fields() { return std::tie(x, freqs, weight, constant, positions, start, feature_map); }
  };

  static void check_tables(const Arguments& a) {
    check_freqs(kName, a, "K", "sine (K >= 1)");
    check_table(kName, "weight", a.weight, a.x, 4, "[H, D, 2K, R]");
    check_size(kName, "weight", a.weight, 2, a.freqs.sym_size(2) * 2, "2K, K of freqs");
    TORCH_CHECK_VALUE(a.weight.sym_size(3) > 0, kName,
                      ": weight must have at least one realization (R >= 1), got shape ",
                      a.weight.sym_sizes());
    if (a.constant.has_value()) {
      check_table(kName, "constant", *a.constant, a.x, 3, "[H, D, R]");
      check_size(kName, "constant", *a.constant, 2, a.weight.sym_size(3), "R of weight");
    }
  }

  static void check_finite_tables(const Arguments& a) {
    check_finite(kName, "weight", a.weight);
    if (a.constant.has_value()) check_finite(kName, "constant", *a.constant);
  }

  static c10::SymInt width(const Arguments& a) { return a.weight.sym_size(3); }

  static void fill_tables(Params& p, const Arguments& a, at::ScalarType type, KernelTensors& kept) {
    p.num_sines = a.freqs.size(2);
    p.ndim = a.freqs.dim() == 4 ? a.freqs.size(3) : 1;
    p.num_realizations = a.weight.size(3);
    p.weight = kept.contiguous(a.weight, type);
    p.constant = kept.contiguous(a.constant, type);
  }

  static void set_table_gradients(BackwardParams& p, BackwardCall<SineFilter>& b) {
    const auto type = accumulate_type(b.arguments.x.scalar_type());
    p.grad_weight = b.overwritten_gradient("weight", type);
    p.grad_constant = b.overwritten_gradient("constant", type);
  }
};

const Registration<SineFilter> registration;
[[maybe_unused]] const bool kernels = register_cpu_kernel<cpu::sine_filter_forward>() &&
                                      register_cpu_kernel<cpu::sine_filter_backward>();

}  // namespace
}  // namespace torch_spe::ops
