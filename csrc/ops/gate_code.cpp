// The operator torch_spe::gate_code.
#include "code_parameters.h"
#include "cpu/codes.h"

namespace torch_spe::ops {
namespace {

struct GateCode : Operator {
  static constexpr const char* kName = "gate_code";
  static constexpr const char* kSchema =
      "gate_code(Tensor query, Tensor key, Tensor gate, Tensor noise, float scale) -> (Tensor "
      "gated_query, Tensor gated_key, Tensor constant)";
  static constexpr const char* kDoc =
      "Codes with a part that does not depend on the position, in the proportion that the gate "
      "says.";
  static constexpr std::array kGradients{"query", "key", "gate", "noise"};
  static constexpr std::array kOutputs{"gated_query", "gated_key", "constant"};

  struct Arguments {
    at::Tensor query;  // [H, D, ...]
    at::Tensor key;    // like query
    at::Tensor gate;   // [H, D]
    at::Tensor noise;  // [H, D, R]
    double scale;
    auto fields() { return std::tie(query, key, gate, noise, scale); }
  };

  static void check(const Arguments& a) {
    check_data(kName, "gate", a.gate, 2, "[H, D]");
    TORCH_CHECK_VALUE(a.query.dim() >= 2, kName,
                      ": query must have at least 2 dimensions [H, D, ...], got shape ",
                      a.query.sym_sizes());
    Sizes sizes = a.query.sym_sizes().vec();
    sizes[0] = a.gate.sym_size(0);
    sizes[1] = a.gate.sym_size(1);
    check_like(kName, "query", a.query, sizes, "gate", a.gate);
    check_like(kName, "key", a.key, sizes, "gate", a.gate);
    TORCH_CHECK_VALUE(a.noise.dim() == 3, kName,
                      ": noise must have 3 dimensions [H, D, R], got shape ", a.noise.sym_sizes());
    check_like(kName, "noise", a.noise, {sizes[0], sizes[1], a.noise.sym_size(2)}, "gate", a.gate);
  }

  static TensorSpecs results(const Arguments& a) {
    return {spec_like(a.query), spec_like(a.key), spec_like(a.noise)};
  }

  static void fill(core::GateCodeParams& p, const Arguments& a, KernelTensors& kept) {
    p.dtype = to_dtype(a.gate.scalar_type());
    p.features = a.gate.numel();
    p.size = a.gate.numel() > 0 ? a.query.numel() / a.gate.numel() : 0;
    p.num_realizations = a.noise.size(2);
    p.scale = a.scale;
    p.num_threads = at::get_num_threads();
    p.query = kept.contiguous(a.query);
    p.key = kept.contiguous(a.key);
    p.gate = kept.contiguous(a.gate);
    p.noise = kept.contiguous(a.noise);
    p.gated_query = p.gated_key = p.constant = nullptr;
  }

  static void forward(const Arguments& a, const Tensors& outputs) {
    core::GateCodeParams p;
    KernelTensors kept;
    fill(p, a, kept);
    p.gated_query = outputs[0].mutable_data_ptr();
    p.gated_key = outputs[1].mutable_data_ptr();
    p.constant = outputs[2].mutable_data_ptr();
    kernel_of<core::GateCodeParams>(a.gate.device().type())(p, a.gate);
  }

  static void backward(BackwardCall<GateCode>& b) {
    const Arguments& a = b.arguments;
    const auto type = a.gate.scalar_type();
    core::GateCodeBackwardParams p;
    KernelTensors kept;
    fill(p, a, kept);
    p.grad_gated_query = gradient_or_zeros(b, 0, kept);
    p.grad_gated_key = gradient_or_zeros(b, 1, kept);
    p.grad_constant = gradient_or_zeros(b, 2, kept);
    p.grad_query = b.overwritten_gradient("query", type);
    p.grad_key = b.overwritten_gradient("key", type);
    p.grad_gate = b.overwritten_gradient("gate", type);
    p.grad_noise = b.overwritten_gradient("noise", type);
    kernel_of<core::GateCodeBackwardParams>(a.gate.device().type())(p, a.gate);
  }
};

const Registration<GateCode> registration;
[[maybe_unused]] const bool kernels =
    register_cpu_kernel<cpu::gate_code>() && register_cpu_kernel<cpu::gate_code_backward>();

}  // namespace
}  // namespace torch_spe::ops
