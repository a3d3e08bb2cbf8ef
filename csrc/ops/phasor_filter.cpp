// The operator torch_spe::phasor_filter: checks, allocation, dispatch and autograd.
#include "phasor_filter.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <array>

#include "cpu/phasor_filter.h"
#include "operator.h"
#include "torch_spe/torch_spe.h"

namespace torch_spe {
namespace ops {
namespace {

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
constexpr const char* kOp = "phasor_filter";

void check(const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& coefficients,
           const OptionalTensor& constant, const OptionalTensor& positions, double start) {
  check_data(kOp, "x", x, 4, "[B, N, H, D]");
  TORCH_CHECK_VALUE(
      freqs.dim() == 3 || freqs.dim() == 4, kOp,
      ": freqs must have 3 dimensions [H, D, R/2] or 4 dimensions [H, D, R/2, ndim], got shape ",
      freqs.sym_sizes());
  check_data(kOp, "freqs", freqs, freqs.dim(), "[H, D, R/2] or [H, D, R/2, ndim]");
  check_data(kOp, "coefficients", coefficients, 4, "[H, D, R/2, 2]");
  check_same_device(kOp, "freqs", freqs, x, "x");
  check_same_device(kOp, "coefficients", coefficients, x, "x");
  check_parameter_type(kOp, "coefficients", coefficients, x);
  const auto heads = x.sym_size(2), features = x.sym_size(3), pairs = freqs.sym_size(2);
  check_size(kOp, "freqs", freqs, 0, heads, "H of x");
  check_size(kOp, "freqs", freqs, 1, features, "D of x");
  TORCH_CHECK_VALUE(pairs > 0, kOp,
                    ": freqs must have at least one pair of realizations (R >= 2), got shape ",
                    freqs.sym_sizes());
  check_size(kOp, "coefficients", coefficients, 0, heads, "H of x");
  check_size(kOp, "coefficients", coefficients, 1, features, "D of x");
  check_size(kOp, "coefficients", coefficients, 2, pairs, "R/2 of freqs");
  check_size(kOp, "coefficients", coefficients, 3, 2, "real and imaginary part");
  if (constant.has_value()) {
    check_data(kOp, "constant", *constant, 3, "[H, D, R]");
    check_same_device(kOp, "constant", *constant, x, "x");
    check_parameter_type(kOp, "constant", *constant, x);
    check_size(kOp, "constant", *constant, 0, heads, "H of x");
    check_size(kOp, "constant", *constant, 1, features, "D of x");
    check_size(kOp, "constant", *constant, 2, pairs * 2, "R, twice R/2 of freqs");
  }
  check_positions(kOp, positions, start, freqs, x);
}

// The tensors that the kernels read.
struct Inputs {
  at::Tensor x, freqs, coefficients, constant, positions;

  Inputs(const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& coefficients,
         const OptionalTensor& constant, const OptionalTensor& positions)
      : x(x), freqs(freqs.to(at::kDouble).contiguous()) {
    const auto type = accumulate_type(x.scalar_type());
    this->coefficients = coefficients.to(type).contiguous();
    if (constant.has_value()) this->constant = constant->to(type).contiguous();
    if (positions.has_value()) this->positions = positions->to(at::kDouble).contiguous();
  }

  void fill(core::PhasorFilterParams& p, double start) const {
    p.dtype = to_dtype(x.scalar_type());
    p.batch = x.size(0);
    p.length = x.size(1);
    p.num_heads = x.size(2);
    p.in_features = x.size(3);
    p.num_pairs = freqs.size(2);
    p.ndim = freqs.dim() == 4 ? freqs.size(3) : 1;
    p.num_threads = at::get_num_threads();
    p.x = x.const_data_ptr();
    std::copy_n(x.strides().data(), 4, p.x_strides);
    p.freqs = freqs.const_data_ptr<double>();
    p.coefficients = coefficients.const_data_ptr();
    p.constant = constant.defined() ? constant.const_data_ptr() : nullptr;
    p.positions = positions.defined() ? positions.const_data_ptr<double>() : nullptr;
    p.start = start;
  }
};

at::Tensor forward(const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& coefficients,
                   const OptionalTensor& constant, const OptionalTensor& positions, double start) {
  check(x, freqs, coefficients, constant, positions, start);
  check_finite(kOp, "freqs", freqs);
  check_finite(kOp, "coefficients", coefficients);
  if (constant.has_value()) check_finite(kOp, "constant", *constant);
  if (positions.has_value()) check_finite(kOp, "positions", *positions);
  at::Tensor out = at::empty({x.size(0), x.size(1), x.size(2), 2 * freqs.size(2)}, x.options());
  if (out.numel() == 0) return out;
  const Inputs inputs(x, freqs, coefficients, constant, positions);
  core::PhasorFilterParams params;
  inputs.fill(params, start);
  params.out = out.mutable_data_ptr();
  phasor_filter_kernels(x.device().type()).forward(params, x);
  return out;
}

at::Tensor forward_meta(const at::Tensor& x, const at::Tensor& freqs,
                        const at::Tensor& coefficients, const OptionalTensor& constant,
                        const OptionalTensor& positions, double start) {
  check(x, freqs, coefficients, constant, positions, start);
  return at::empty_symint({x.sym_size(0), x.sym_size(1), x.sym_size(2), freqs.sym_size(2) * 2},
                          x.options());
}

Gradients backward(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& freqs,
                   const at::Tensor& coefficients, const OptionalTensor& constant,
                   const OptionalTensor& positions, double start, std::array<bool, 5> mask) {
  check(x, freqs, coefficients, constant, positions, start);
  check_grad_out(kOp, grad_out, x, freqs.sym_size(2) * 2);
  const Inputs inputs(x, freqs, coefficients, constant, positions);
  const auto sums = [](bool wanted, const at::Tensor& like) {
    return wanted && like.defined() ? at::zeros(like.sizes(), like.options().dtype(at::kDouble))
                                    : at::Tensor();
  };
  const auto data = [](const at::Tensor& t) {
    return t.defined() ? t.mutable_data_ptr<double>() : nullptr;
  };
  at::Tensor grad_x = mask[0] ? at::empty(x.sizes(), x.options()) : at::Tensor();
  const at::Tensor grad_freqs = sums(mask[1], inputs.freqs);
  const at::Tensor grad_coefficients = sums(mask[2], inputs.coefficients);
  const at::Tensor grad_constant = sums(mask[3], inputs.constant);
  const at::Tensor grad_positions = sums(mask[4], inputs.positions);
  if (x.numel() > 0) {
    core::PhasorFilterBackwardParams params;
    inputs.fill(params, start);
    params.out = nullptr;
    params.grad_out = grad_out.const_data_ptr();
    std::copy_n(grad_out.strides().data(), 4, params.grad_out_strides);
    params.grad_x = mask[0] ? grad_x.mutable_data_ptr() : nullptr;
    params.grad_freqs = data(grad_freqs);
    params.grad_coefficients = data(grad_coefficients);
    params.grad_constant = data(grad_constant);
    params.grad_positions = data(grad_positions);
    phasor_filter_kernels(x.device().type()).backward(params, x);
  }
  const auto cast = [](const at::Tensor& grad, const at::Tensor& like) {
    return grad.defined() ? grad.to(like.scalar_type()) : grad;
  };
  return {grad_x, cast(grad_freqs, freqs), cast(grad_coefficients, coefficients),
          cast(grad_constant, constant.value_or(x)), cast(grad_positions, positions.value_or(x))};
}

Gradients backward_meta(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& freqs,
                        const at::Tensor& coefficients, const OptionalTensor& constant,
                        const OptionalTensor& positions, double start, std::array<bool, 5> mask) {
  check(x, freqs, coefficients, constant, positions, start);
  check_grad_out(kOp, grad_out, x, freqs.sym_size(2) * 2);
  const auto like = [](bool wanted, const at::Tensor& t) {
    return wanted ? at::empty_symint(t.sym_sizes(), t.options()) : at::Tensor();
  };
  return {like(mask[0], x), like(mask[1], freqs), like(mask[2], coefficients),
          constant.has_value() ? like(mask[3], *constant) : at::Tensor(),
          positions.has_value() ? like(mask[4], *positions) : at::Tensor()};
}

auto backward_op() {
  static const auto op =
      find_operator<decltype(backward_meta)>("torch_spe::phasor_filter_backward");
  return op;
}

struct PhasorFilter : torch::autograd::Function<PhasorFilter> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& freqs, const at::Tensor& coefficients,
                            const OptionalTensor& constant, const OptionalTensor& positions,
                            double start) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, freqs, coefficients, to_tensor(constant), to_tensor(positions)});
    ctx->saved_data["start"] = start;
    return phasor_filter(x, freqs, coefficients, constant, positions, start);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const auto mask = wanted_gradients<5>(*ctx, saved);
    auto [x, freqs, coefficients, constant, positions] =
        backward_op().call(grad_outputs[0], saved[0], saved[1], saved[2], to_optional(saved[3]),
                           to_optional(saved[4]), ctx->saved_data["start"].toDouble(), mask);
    return {x, freqs, coefficients, constant, positions, at::Tensor()};
  }
};

at::Tensor forward_autograd(const at::Tensor& x, const at::Tensor& freqs,
                            const at::Tensor& coefficients, const OptionalTensor& constant,
                            const OptionalTensor& positions, double start) {
  return PhasorFilter::apply(x, freqs, coefficients, constant, positions, start);
}

template <c10::DeviceType device>
at::Tensor forward_autocast(const at::Tensor& x, const at::Tensor& freqs,
                            const at::Tensor& coefficients, const OptionalTensor& constant,
                            const OptionalTensor& positions, double start) {
  const BelowAutocast<device> below;
  return phasor_filter(below.cast(x), freqs, coefficients, constant, positions, start);
}

TORCH_LIBRARY_IMPL(torch_spe, CPU, m) {
  m.impl("phasor_filter", forward);
  m.impl("phasor_filter_backward", backward);
}
#if defined(TORCH_SPE_CUDA)
TORCH_LIBRARY_IMPL(torch_spe, CUDA, m) {
  m.impl("phasor_filter", forward);
  m.impl("phasor_filter_backward", backward);
}
#endif
TORCH_LIBRARY_IMPL(torch_spe, Meta, m) {
  m.impl("phasor_filter", forward_meta);
  m.impl("phasor_filter_backward", backward_meta);
}
TORCH_LIBRARY_IMPL(torch_spe, Autograd, m) {
  m.impl("phasor_filter", forward_autograd);
  m.impl("phasor_filter_backward",
         OnceDifferentiable<backward_op, &kOp, decltype(backward_meta)>::call);
}
TORCH_LIBRARY_IMPL(torch_spe, AutocastCPU, m) {
  m.impl("phasor_filter", forward_autocast<c10::kCPU>);
}
TORCH_LIBRARY_IMPL(torch_spe, AutocastCUDA, m) {
  m.impl("phasor_filter", forward_autocast<c10::kCUDA>);
}

}  // namespace

PhasorFilterKernels& phasor_filter_kernels(c10::DeviceType device) {
  static PhasorFilterKernels cpu = {
      [](const core::PhasorFilterParams& p, const at::Tensor&) { cpu::phasor_filter_forward(p); },
      [](const core::PhasorFilterBackwardParams& p, const at::Tensor&) {
        cpu::phasor_filter_backward(p);
      }};
#if defined(TORCH_SPE_CUDA)
  static PhasorFilterKernels cuda = phasor_filter_cuda_kernels();
  if (device == c10::kCUDA) return cuda;
#endif
  (void)device;
  return cpu;
}

}  // namespace ops

at::Tensor phasor_filter(const at::Tensor& x, const at::Tensor& freqs,
                         const at::Tensor& coefficients, const std::optional<at::Tensor>& constant,
                         const std::optional<at::Tensor>& positions, double start) {
  static const auto op = ops::find_operator<decltype(phasor_filter)>("torch_spe::phasor_filter");
  return op.call(x, freqs, coefficients, constant, positions, start);
}

}  // namespace torch_spe
