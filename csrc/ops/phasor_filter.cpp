// The operator torch_spe::phasor_filter.
#include "cpu/phasor_filter.h"

#include "encoders.h"

namespace torch_spe::ops {
namespace {

struct PhasorFilter : PositionalEncoder<PhasorFilter> {
  static constexpr const char* kName = "phasor_filter";
  static constexpr const char* kSchema =
      "phasor_filter(Tensor x, Tensor freqs, Tensor coefficients, Tensor? constant=None, "
      "Tensor? positions=None, Scalar start=0, str feature_map='identity') -> Tensor";
  static constexpr const char* kDoc =
      "Encodes x [B, N, H, D] with one sinusoid for each feature and pair of realizations, as "
      "[B, N, H, R].";
  static constexpr std::array kGradients{"x", "freqs", "coefficients", "constant", "positions"};
  using Params = core::PhasorFilterParams;
  using BackwardParams = core::PhasorFilterBackwardParams;

  struct Arguments : EncoderArguments {
    at::Tensor coefficients;  // [H, D, R/2, 2]
    OptionalTensor constant;  // [H, D, R]
    auto fields() {
      return std::tie(x, freqs, coefficients, constant, positions, start, feature_map);
    }
  };

  static void check_tables(const Arguments& a) {
    check_freqs(kName, a, "R/2", "pair of realizations (R >= 2)");
    const c10::SymInt pairs = a.freqs.sym_size(2);
    check_table(kName, "coefficients", a.coefficients, a.x, 4, "[H, D, R/2, 2]");
    check_size(kName, "coefficients", a.coefficients, 2, pairs, "R/2 of freqs");
    check_size(kName, "coefficients", a.coefficients, 3, 2, "real and imaginary part");
    if (a.constant.has_value()) {
      check_table(kName, "constant", *a.constant, a.x, 3, "[H, D, R]");
      check_size(kName, "constant", *a.constant, 2, pairs * 2, "R, twice R/2 of freqs");
    }
  }

  static void check_finite_tables(const Arguments& a) {
    check_finite(kName, "coefficients", a.coefficients);
    if (a.constant.has_value()) check_finite(kName, "constant", *a.constant);
  }

  static c10::SymInt width(const Arguments& a) { return a.freqs.sym_size(2) * 2; }

  static void fill_tables(Params& p, const Arguments& a, at::ScalarType type, KernelTensors& kept) {
    p.num_pairs = a.freqs.size(2);
    p.ndim = a.freqs.dim() == 4 ? a.freqs.size(3) : 1;
    p.coefficients = kept.contiguous(a.coefficients, type);
    p.constant = kept.contiguous(a.constant, type);
  }

  static void set_table_gradients(BackwardParams& p, BackwardCall<PhasorFilter>& b) {
    p.grad_coefficients = b.double_gradient("coefficients");
    p.grad_constant = b.double_gradient("constant");
  }
};

const Registration<PhasorFilter> registration;
[[maybe_unused]] const bool kernels = register_cpu_kernel<cpu::phasor_filter_forward>() &&
                                      register_cpu_kernel<cpu::phasor_filter_backward>();

}  // namespace
}  // namespace torch_spe::ops
