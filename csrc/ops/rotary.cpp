// The operator torch_spe::rotary.
#include "cpu/rotary.h"

#include "encoders.h"

namespace torch_spe::ops {
namespace {

struct Rotary : PositionalEncoder<Rotary> {
  static constexpr const char* kName = "rotary";
  static constexpr const char* kSchema =
      "rotary(Tensor x, Tensor freqs, Tensor? positions=None, Scalar start=0, "
      "str feature_map='identity') -> Tensor";
  static constexpr const char* kDoc =
      "Rotates the features 2i and 2i + 1 of x [B, N, H, D] at position n by the angle "
      "2 pi freqs[h, i] n.";
  static constexpr std::array kGradients{"x", "freqs", "positions"};
  using Params = core::RotaryParams;
  using BackwardParams = core::RotaryBackwardParams;

  struct Arguments : EncoderArguments {  // freqs [H, D/2], positions [N]
    auto fields() { return std::tie(x, freqs, positions, start, feature_map); }
  };

  static void check_tables(const Arguments& a) {
    check_data(kName, "freqs", a.freqs, 2, "[H, D/2]");
    check_same_device(kName, "freqs", a.freqs, a.x, "x");
    check_size(kName, "freqs", a.freqs, 0, a.x.sym_size(2), "H of x");
    TORCH_CHECK_VALUE(
        (a.freqs.sym_size(1) * 2).sym_eq(a.x.sym_size(3)).expect_true(__FILE__, __LINE__), kName,
        ": freqs must have half as many frequencies as x has features (D/2), got shape ",
        a.freqs.sym_sizes(), " for x of shape ", a.x.sym_sizes());
  }

  static void check_finite_tables(const Arguments&) {}
  static c10::SymInt width(const Arguments& a) { return a.x.sym_size(3); }
  static void fill_tables(Params&, const Arguments&, at::ScalarType, KernelTensors&) {}
  static void set_table_gradients(BackwardParams&, BackwardCall<Rotary>&) {}
};

const Registration<Rotary> registration;
[[maybe_unused]] const bool kernels =
    register_cpu_kernel<cpu::rotary_forward>() && register_cpu_kernel<cpu::rotary_backward>();

}  // namespace
}  // namespace torch_spe::ops
