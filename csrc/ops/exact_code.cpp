// The operators torch_spe::exact_code and torch_spe::gate_exact_code.
#include "code_parameters.h"
#include "cpu/codes.h"

namespace torch_spe::ops {
namespace {

struct ExactCode : Operator {
  static constexpr const char* kName = "exact_code";
  static constexpr const char* kSchema =
      "exact_code(Tensor freqs, Tensor gains, float scale) -> (Tensor cycles, Tensor amplitudes)";
  static constexpr const char* kDoc =
      "Frequencies and amplitudes of sine_features, from the parameters of a position kernel.";
  static constexpr std::array kGradients{"freqs", "gains"};
  static constexpr std::array kOutputs{"cycles", "amplitudes"};

  struct Arguments {
    at::Tensor freqs;  // [H, D, K] or [H, D, K, ndim]
    at::Tensor gains;  // [H, D, K]
    double scale;
    auto fields() { return std::tie(freqs, gains, scale); }
  };

  static void check(const Arguments& a) { check_sines(kName, a.freqs, a.gains); }

  static TensorSpecs results(const Arguments& a) {
    TensorSpec cycles = spec_like(a.freqs);
    cycles.options = cycles.options.dtype(at::kDouble);
    return {cycles, spec_like(a.gains)};
  }

  static void forward(const Arguments& a, const Tensors& outputs) {
    core::ExactCodeParams p;
    KernelTensors kept;
    fill_sines(p, a.freqs, a.gains, a.scale, kept);
    p.cycles = outputs[0].mutable_data_ptr<double>();
    p.amplitudes = outputs[1].mutable_data_ptr();
    kernel_of<core::ExactCodeParams>(a.gains.device().type())(p, a.gains);
  }

  static void backward(BackwardCall<ExactCode>& b) {
    const Arguments& a = b.arguments;
    const auto type = a.gains.scalar_type();
    core::ExactCodeBackwardParams p;
    KernelTensors kept;
    fill_sines(p, a.freqs, a.gains, a.scale, kept);
    p.cycles = nullptr;
    p.amplitudes = nullptr;
    p.grad_cycles = static_cast<const double*>(gradient_or_zeros(b, 0, kept));
    p.grad_amplitudes = gradient_or_zeros(b, 1, kept);
    p.grad_freqs = b.overwritten_gradient("freqs", type);
    p.grad_gains = b.overwritten_gradient("gains", type);
    kernel_of<core::ExactCodeBackwardParams>(a.gains.device().type())(p, a.gains);
  }
};

struct GateExactCode : Operator {
  static constexpr const char* kName = "gate_exact_code";
  static constexpr const char* kSchema =
      "gate_exact_code(Tensor amplitudes, Tensor gate) -> (Tensor gated, Tensor constant)";
  static constexpr const char* kDoc =
      "Amplitudes of a code without noise with a part that does not depend on the position, in the "
      "proportion that the gate says.";
  static constexpr std::array kGradients{"amplitudes", "gate"};
  static constexpr std::array kOutputs{"gated", "constant"};

  struct Arguments {
    at::Tensor amplitudes;  // [H, D, K]
    at::Tensor gate;        // [H, D]
    auto fields() { return std::tie(amplitudes, gate); }
  };

  static void check(const Arguments& a) {
    check_data(kName, "gate", a.gate, 2, "[H, D]");
    TORCH_CHECK_VALUE(a.amplitudes.dim() == 3, kName,
                      ": amplitudes must have 3 dimensions [H, D, K], got shape ",
                      a.amplitudes.sym_sizes());
    Sizes sizes = a.gate.sym_sizes().vec();
    sizes.push_back(a.amplitudes.sym_size(2));
    check_like(kName, "amplitudes", a.amplitudes, sizes, "gate", a.gate);
  }

  static TensorSpecs results(const Arguments& a) {
    return {spec_like(a.amplitudes), spec_like(a.gate)};
  }

  static void fill(core::GateExactCodeParams& p, const Arguments& a, KernelTensors& kept) {
    p.dtype = to_dtype(a.gate.scalar_type());
    p.features = a.gate.numel();
    p.num_sines = a.amplitudes.size(2);
    p.num_threads = at::get_num_threads();
    p.amplitudes = kept.contiguous(a.amplitudes);
    p.gate = kept.contiguous(a.gate);
    p.gated = p.constant = nullptr;
  }

  static void forward(const Arguments& a, const Tensors& outputs) {
    core::GateExactCodeParams p;
    KernelTensors kept;
    fill(p, a, kept);
    p.gated = outputs[0].mutable_data_ptr();
    p.constant = outputs[1].mutable_data_ptr();
    kernel_of<core::GateExactCodeParams>(a.gate.device().type())(p, a.gate);
  }

  static void backward(BackwardCall<GateExactCode>& b) {
    const Arguments& a = b.arguments;
    const auto type = a.gate.scalar_type();
    core::GateExactCodeBackwardParams p;
    KernelTensors kept;
    fill(p, a, kept);
    p.grad_gated = gradient_or_zeros(b, 0, kept);
    p.grad_constant = gradient_or_zeros(b, 1, kept);
    p.grad_amplitudes = b.overwritten_gradient("amplitudes", type);
    p.grad_gate = b.overwritten_gradient("gate", type);
    kernel_of<core::GateExactCodeBackwardParams>(a.gate.device().type())(p, a.gate);
  }
};

const Registration<ExactCode> exact_code;
const Registration<GateExactCode> gate_exact_code;
[[maybe_unused]] const bool kernels = register_cpu_kernel<cpu::exact_code>() &&
                                      register_cpu_kernel<cpu::exact_code_backward>() &&
                                      register_cpu_kernel<cpu::gate_exact_code>() &&
                                      register_cpu_kernel<cpu::gate_exact_code_backward>();

}  // namespace
}  // namespace torch_spe::ops
