// The operator torch_spe::sine_code.
#include "code_parameters.h"
#include "cpu/codes.h"

namespace torch_spe::ops {
namespace {

struct SineCode : Operator {
  static constexpr const char* kName = "sine_code";
  static constexpr const char* kSchema =
      "sine_code(Tensor freqs, Tensor offsets, Tensor gains, Tensor noise, float scale) -> (Tensor "
      "cycles, Tensor query, Tensor key)";
  static constexpr const char* kDoc =
      "Frequencies and weights of sine_filter for queries and keys, from the parameters of a "
      "position kernel and noise.";
  static constexpr std::array kGradients{"freqs", "offsets", "gains", "noise"};
  static constexpr std::array kOutputs{"cycles", "query", "key"};

  struct Arguments : SineParameterArguments {
    at::Tensor noise;  // [H, D, 2K, R]
    auto fields() { return std::tie(freqs, offsets, gains, noise, scale); }
  };

  static void check(const Arguments& a) {
    Sizes sizes = check_parameters(kName, a);
    TORCH_CHECK_VALUE(a.noise.dim() == 4, kName,
                      ": noise must have 4 dimensions [H, D, 2K, R], got shape ",
                      a.noise.sym_sizes());
    sizes[2] = sizes[2] * 2;
    sizes.push_back(a.noise.sym_size(3));
    check_like(kName, "noise", a.noise, sizes, "gains", a.gains);
  }

  static TensorSpecs results(const Arguments& a) {
    TensorSpec cycles = spec_like(a.freqs);
    cycles.options = cycles.options.dtype(at::kDouble);
    return {cycles, spec_like(a.noise), spec_like(a.noise)};
  }

  static void fill(core::SineCodeParams& p, const Arguments& a, KernelTensors& kept) {
    fill_parameters(p, a, kept);
    p.num_realizations = a.noise.size(3);
    p.noise = kept.contiguous(a.noise);
    p.cycles = nullptr;
    p.query_weight = p.key_weight = nullptr;
  }

  static void forward(const Arguments& a, const Tensors& outputs) {
    core::SineCodeParams p;
    KernelTensors kept;
    fill(p, a, kept);
    p.cycles = outputs[0].mutable_data_ptr<double>();
    p.query_weight = outputs[1].mutable_data_ptr();
    p.key_weight = outputs[2].mutable_data_ptr();
    kernel_of<core::SineCodeParams>(a.gains.device().type())(p, a.gains);
  }

  static void backward(BackwardCall<SineCode>& b) {
    const Arguments& a = b.arguments;
    const auto type = a.gains.scalar_type();
    core::SineCodeBackwardParams p;
    KernelTensors kept;
    fill(p, a, kept);
    p.grad_cycles = static_cast<const double*>(gradient_or_zeros(b, 0, kept));
    p.grad_query_weight = gradient_or_zeros(b, 1, kept);
    p.grad_key_weight = gradient_or_zeros(b, 2, kept);
    p.grad_freqs = b.overwritten_gradient("freqs", type);
    p.grad_offsets = b.overwritten_gradient("offsets", type);
    p.grad_gains = b.overwritten_gradient("gains", type);
    p.grad_noise = b.overwritten_gradient("noise", type);
    kernel_of<core::SineCodeBackwardParams>(a.gains.device().type())(p, a.gains);
  }
};

const Registration<SineCode> registration;
[[maybe_unused]] const bool kernels =
    register_cpu_kernel<cpu::sine_code>() && register_cpu_kernel<cpu::sine_code_backward>();

}  // namespace
}  // namespace torch_spe::ops
