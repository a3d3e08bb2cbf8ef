// The operator torch_spe::phase_code.
#include "code_parameters.h"
#include "cpu/codes.h"

namespace torch_spe::ops {
namespace {

struct PhaseCode : Operator {
  static constexpr const char* kName = "phase_code";
  static constexpr const char* kSchema =
      "phase_code(Tensor freqs, Tensor offsets, Tensor gains, Tensor? bandwidths, Tensor sine, "
      "Tensor phases, Tensor? deviates, float scale) -> (Tensor cycles, Tensor query, Tensor key)";
  static constexpr const char* kDoc =
      "Frequencies and coefficients of phasor_filter for queries and keys, from the parameters of "
      "a position kernel and phase noise.";
  static constexpr std::array kGradients{"freqs", "offsets", "gains", "bandwidths"};
  static constexpr std::array kOutputs{"cycles", "query", "key"};

  struct Arguments : SineParameterArguments {
    OptionalTensor bandwidths;  // [H, D, K]
    at::Tensor sine;            // [H, D, R/2], int64
    at::Tensor phases;          // [H, D, R/2]
    OptionalTensor deviates;    // [H, D, R/2] or [H, D, R/2, ndim]
    auto fields() {
      return std::tie(freqs, offsets, gains, bandwidths, sine, phases, deviates, scale);
    }
    Sizes sizes() const {  // [H, D, R/2]
      return {gains.sym_size(0), gains.sym_size(1), sine.sym_size(2)};
    }
  };

  static void check(const Arguments& a) {
    const Sizes parameters = check_parameters(kName, a);
    if (a.bandwidths.has_value())
      check_like(kName, "bandwidths", *a.bandwidths, parameters, "gains", a.gains);
    TORCH_CHECK_VALUE(a.sine.dim() == 3, kName,
                      ": sine must have 3 dimensions [H, D, R/2], got shape ", a.sine.sym_sizes());
    TORCH_CHECK_TYPE(a.sine.scalar_type() == at::kLong, kName, ": sine must be int64, got ",
                     a.sine.scalar_type());
    check_same_device(kName, "sine", a.sine, a.gains, "gains");
    check_sizes(kName, "sine", a.sine, a.sizes());
    check_like(kName, "phases", a.phases, a.sizes(), "gains", a.gains);
    TORCH_CHECK_VALUE(a.bandwidths.has_value() == a.deviates.has_value(), kName,
                      ": expected both bandwidths and deviates or none, got ",
                      a.bandwidths.has_value() ? "bandwidths" : "deviates");
    if (a.deviates.has_value())
      check_like(kName, "deviates", *a.deviates, with_grid(a.sizes(), a.freqs), "gains", a.gains);
  }

  // On the CPU, where reading is cheap; elsewhere codes of a sine that there is not are NaN.
  static void check_range(const at::Tensor& sine, int64_t num_sines) {
    if (!sine.device().is_cpu() || sine.numel() == 0) return;
    const auto [least, most] = at::aminmax(sine);
    TORCH_CHECK_INDEX(least.item<int64_t>() >= 0 && most.item<int64_t>() < num_sines, kName,
                      ": sine must be in 0 .. K - 1 = ", num_sines - 1, ", got ",
                      least.item<int64_t>(), " .. ", most.item<int64_t>());
  }

  static TensorSpecs results(const Arguments& a) {
    Sizes sizes = a.sizes();
    const c10::SymDimVector cycles(c10::SymIntArrayRef(with_grid(sizes, a.freqs)));
    sizes.emplace_back(2);
    const c10::SymDimVector coefficients{c10::SymIntArrayRef(sizes)};
    return {{cycles, a.gains.options().dtype(at::kDouble)},
            {coefficients, a.gains.options()},
            {coefficients, a.gains.options()}};
  }

  static void fill(core::PhaseCodeParams& p, const Arguments& a, KernelTensors& kept) {
    check_range(a.sine, a.gains.size(2));
    fill_parameters(p, a, kept);
    p.num_pairs = a.sine.size(2);
    p.bandwidths = kept.contiguous(a.bandwidths);
    p.sine = static_cast<const int64_t*>(kept.contiguous(a.sine));
    p.phases = kept.contiguous(a.phases);
    p.deviates = kept.contiguous(a.deviates);
    p.cycles = nullptr;
    p.query_coefficients = p.key_coefficients = nullptr;
  }

  static void forward(const Arguments& a, const Tensors& outputs) {
    core::PhaseCodeParams p;
    KernelTensors kept;
    fill(p, a, kept);
    p.cycles = outputs[0].mutable_data_ptr<double>();
    p.query_coefficients = outputs[1].mutable_data_ptr();
    p.key_coefficients = outputs[2].mutable_data_ptr();
    kernel_of<core::PhaseCodeParams>(a.gains.device().type())(p, a.gains);
  }

  static void backward(BackwardCall<PhaseCode>& b) {
    const Arguments& a = b.arguments;
    const auto type = a.gains.scalar_type();
    core::PhaseCodeBackwardParams p;
    KernelTensors kept;
    fill(p, a, kept);
    p.grad_cycles = static_cast<const double*>(gradient_or_zeros(b, 0, kept));
    p.grad_query_coefficients = gradient_or_zeros(b, 1, kept);
    p.grad_key_coefficients = gradient_or_zeros(b, 2, kept);
    p.grad_freqs = b.overwritten_gradient("freqs", type);
    p.grad_offsets = b.overwritten_gradient("offsets", type);
    p.grad_gains = b.overwritten_gradient("gains", type);
    p.grad_bandwidths = b.overwritten_gradient("bandwidths", type);
    kernel_of<core::PhaseCodeBackwardParams>(a.gains.device().type())(p, a.gains);
  }
};

const Registration<PhaseCode> registration;
[[maybe_unused]] const bool kernels =
    register_cpu_kernel<cpu::phase_code>() && register_cpu_kernel<cpu::phase_code_backward>();

}  // namespace
}  // namespace torch_spe::ops
