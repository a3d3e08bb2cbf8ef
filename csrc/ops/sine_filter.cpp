// The operator torch_spe::sine_filter: checks, allocation, dispatch and autograd.
#include "sine_filter.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <array>

#include "cpu/sine_filter.h"
#include "operator.h"
#include "torch_spe/torch_spe.h"

namespace torch_spe {
namespace ops {
namespace {

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
constexpr const char* kOp = "sine_filter";

void check(const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& weight,
           const OptionalTensor& constant, const OptionalTensor& positions, double start) {
  check_data(kOp, "x", x, 4, "[B, N, H, D]");
  TORCH_CHECK_VALUE(
      freqs.dim() == 3 || freqs.dim() == 4, kOp,
      ": freqs must have 3 dimensions [H, D, K] or 4 dimensions [H, D, K, ndim], got shape ",
      freqs.sym_sizes());
  check_data(kOp, "freqs", freqs, freqs.dim(), "[H, D, K] or [H, D, K, ndim]");
  check_data(kOp, "weight", weight, 4, "[H, D, 2K, R]");
  check_same_device(kOp, "freqs", freqs, x, "x");
  check_same_device(kOp, "weight", weight, x, "x");
  check_parameter_type(kOp, "weight", weight, x);
  const auto heads = x.sym_size(2), features = x.sym_size(3), sines = freqs.sym_size(2);
  check_size(kOp, "freqs", freqs, 0, heads, "H of x");
  check_size(kOp, "freqs", freqs, 1, features, "D of x");
  TORCH_CHECK_VALUE(sines > 0, kOp, ": freqs must have at least one sine (K >= 1), got shape ",
                    freqs.sym_sizes());
  check_size(kOp, "weight", weight, 0, heads, "H of x");
  check_size(kOp, "weight", weight, 1, features, "D of x");
  check_size(kOp, "weight", weight, 2, sines * 2, "2K, K of freqs");
  TORCH_CHECK_VALUE(weight.sym_size(3) > 0, kOp,
                    ": weight must have at least one realization (R >= 1), got shape ",
                    weight.sym_sizes());
  if (constant.has_value()) {
    check_data(kOp, "constant", *constant, 3, "[H, D, R]");
    check_same_device(kOp, "constant", *constant, x, "x");
    check_parameter_type(kOp, "constant", *constant, x);
    check_size(kOp, "constant", *constant, 0, heads, "H of x");
    check_size(kOp, "constant", *constant, 1, features, "D of x");
    check_size(kOp, "constant", *constant, 2, weight.sym_size(3), "R of weight");
  }
  check_positions(kOp, positions, start, freqs, x);
}

// The tensors that the kernels read.
struct Inputs {
  at::Tensor x, freqs, weight, constant, positions;

  Inputs(const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& weight,
         const OptionalTensor& constant, const OptionalTensor& positions)
      : x(x), freqs(freqs.to(at::kDouble).contiguous()) {
    const auto type = sine_filter_kernels(x.device().type()).weight_has_type_of_x
                          ? x.scalar_type()
                          : accumulate_type(x.scalar_type());
    this->weight = weight.to(type).contiguous();
    if (constant.has_value()) this->constant = constant->to(type).contiguous();
    if (positions.has_value()) this->positions = positions->to(at::kDouble).contiguous();
  }

  void fill(core::SineFilterParams& p, double start) const {
    p.dtype = to_dtype(x.scalar_type());
    p.batch = x.size(0);
    p.length = x.size(1);
    p.num_heads = x.size(2);
    p.in_features = x.size(3);
    p.num_sines = freqs.size(2);
    p.num_realizations = weight.size(3);
    p.ndim = freqs.dim() == 4 ? freqs.size(3) : 1;
    p.num_threads = at::get_num_threads();
    p.x = x.const_data_ptr();
    std::copy_n(x.strides().data(), 4, p.x_strides);
    p.freqs = freqs.const_data_ptr<double>();
    p.weight = weight.const_data_ptr();
    p.constant = constant.defined() ? constant.const_data_ptr() : nullptr;
    p.positions = positions.defined() ? positions.const_data_ptr<double>() : nullptr;
    p.start = start;
  }
};

at::Tensor forward(const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& weight,
                   const OptionalTensor& constant, const OptionalTensor& positions, double start) {
  check(x, freqs, weight, constant, positions, start);
  check_finite(kOp, "freqs", freqs);
  check_finite(kOp, "weight", weight);
  if (constant.has_value()) check_finite(kOp, "constant", *constant);
  if (positions.has_value()) check_finite(kOp, "positions", *positions);
  const Inputs inputs(x, freqs, weight, constant, positions);
  at::Tensor out = at::empty({x.size(0), x.size(1), x.size(2), weight.size(3)}, x.options());
  if (x.numel() == 0) return out.zero_();
  core::SineFilterParams params;
  inputs.fill(params, start);
  params.out = out.mutable_data_ptr();
  sine_filter_kernels(x.device().type()).forward(params, x);
  return out;
}

at::Tensor forward_meta(const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& weight,
                        const OptionalTensor& constant, const OptionalTensor& positions,
                        double start) {
  check(x, freqs, weight, constant, positions, start);
  return at::empty_symint({x.sym_size(0), x.sym_size(1), x.sym_size(2), weight.sym_size(3)},
                          x.options());
}

Gradients backward(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& freqs,
                   const at::Tensor& weight, const OptionalTensor& constant,
                   const OptionalTensor& positions, double start, std::array<bool, 5> mask) {
  check(x, freqs, weight, constant, positions, start);
  check_grad_out(kOp, grad_out, x, weight.sym_size(3));
  const Inputs inputs(x, freqs, weight, constant, positions);
  // The kernel writes every entry, but without positions or batch rows it does not run.
  const bool empty = x.numel() == 0;
  const auto output = [&](bool wanted, const at::Tensor& t) {
    if (!wanted || !t.defined()) return at::Tensor();
    const auto options = t.options().dtype(accumulate_type(t.scalar_type()));
    return empty ? at::zeros_like(t, options) : at::empty_like(t, options);
  };
  const auto data = [](const at::Tensor& t) {
    return t.defined() ? t.mutable_data_ptr() : nullptr;
  };
  at::Tensor grad_x = mask[0] ? at::empty(x.sizes(), x.options()) : at::Tensor();
  at::Tensor grad_freqs = mask[1] ? at::zeros_like(inputs.freqs) : at::Tensor();
  at::Tensor grad_weight = output(mask[2], inputs.weight);
  at::Tensor grad_constant = output(mask[3], inputs.constant);
  at::Tensor grad_positions =
      mask[4] && inputs.positions.defined() ? at::zeros_like(inputs.positions) : at::Tensor();
  if (!empty) {
    core::SineFilterBackwardParams params;
    inputs.fill(params, start);
    params.out = nullptr;
    params.grad_out = grad_out.const_data_ptr();
    std::copy_n(grad_out.strides().data(), 4, params.grad_out_strides);
    params.grad_x = data(grad_x);
    params.grad_freqs = static_cast<double*>(data(grad_freqs));
    params.grad_weight = data(grad_weight);
    params.grad_constant = data(grad_constant);
    params.grad_positions = static_cast<double*>(data(grad_positions));
    sine_filter_kernels(x.device().type()).backward(params, x);
  }
  const auto like = [](const at::Tensor& grad, const at::Tensor& t) {
    return grad.defined() ? grad.to(t.scalar_type()) : grad;
  };
  return {grad_x, like(grad_freqs, freqs), like(grad_weight, weight),
          constant.has_value() ? like(grad_constant, *constant) : at::Tensor(),
          positions.has_value() ? like(grad_positions, *positions) : at::Tensor()};
}

Gradients backward_meta(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& freqs,
                        const at::Tensor& weight, const OptionalTensor& constant,
                        const OptionalTensor& positions, double start, std::array<bool, 5> mask) {
  check(x, freqs, weight, constant, positions, start);
  check_grad_out(kOp, grad_out, x, weight.sym_size(3));
  const auto like = [](bool wanted, const at::Tensor& t) {
    return wanted ? at::empty_symint(t.sym_sizes(), t.options()) : at::Tensor();
  };
  return {like(mask[0], x), like(mask[1], freqs), like(mask[2], weight),
          constant.has_value() ? like(mask[3], *constant) : at::Tensor(),
          positions.has_value() ? like(mask[4], *positions) : at::Tensor()};
}

auto backward_op() {
  static const auto op = find_operator<decltype(backward_meta)>("torch_spe::sine_filter_backward");
  return op;
}

struct SineFilter : torch::autograd::Function<SineFilter> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& freqs, const at::Tensor& weight,
                            const OptionalTensor& constant, const OptionalTensor& positions,
                            double start) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, freqs, weight, to_tensor(constant), to_tensor(positions)});
    ctx->saved_data["start"] = start;
    return sine_filter(x, freqs, weight, constant, positions, start);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const auto mask = wanted_gradients<5>(*ctx, saved);
    auto [x, freqs, weight, constant, positions] =
        backward_op().call(grad_outputs[0], saved[0], saved[1], saved[2], to_optional(saved[3]),
                           to_optional(saved[4]), ctx->saved_data["start"].toDouble(), mask);
    return {x, freqs, weight, constant, positions, at::Tensor()};
  }
};

at::Tensor forward_autograd(const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& weight,
                            const OptionalTensor& constant, const OptionalTensor& positions,
                            double start) {
  return SineFilter::apply(x, freqs, weight, constant, positions, start);
}

template <c10::DeviceType device>
at::Tensor forward_autocast(const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& weight,
                            const OptionalTensor& constant, const OptionalTensor& positions,
                            double start) {
  const BelowAutocast<device> below;
  return sine_filter(below.cast(x), freqs, weight, constant, positions, start);
}

TORCH_LIBRARY_IMPL(torch_spe, CPU, m) {
  m.impl("sine_filter", forward);
  m.impl("sine_filter_backward", backward);
}
#if defined(TORCH_SPE_CUDA)
TORCH_LIBRARY_IMPL(torch_spe, CUDA, m) {
  m.impl("sine_filter", forward);
  m.impl("sine_filter_backward", backward);
}
#endif
TORCH_LIBRARY_IMPL(torch_spe, Meta, m) {
  m.impl("sine_filter", forward_meta);
  m.impl("sine_filter_backward", backward_meta);
}
TORCH_LIBRARY_IMPL(torch_spe, Autograd, m) {
  m.impl("sine_filter", forward_autograd);
  m.impl("sine_filter_backward",
         OnceDifferentiable<backward_op, &kOp, decltype(backward_meta)>::call);
}
TORCH_LIBRARY_IMPL(torch_spe, AutocastCPU, m) {
  m.impl("sine_filter", forward_autocast<c10::kCPU>);
}
TORCH_LIBRARY_IMPL(torch_spe, AutocastCUDA, m) {
  m.impl("sine_filter", forward_autocast<c10::kCUDA>);
}

}  // namespace

SineFilterKernels& sine_filter_kernels(c10::DeviceType device) {
  static SineFilterKernels cpu = {
      [](const core::SineFilterParams& p, const at::Tensor&) { cpu::sine_filter_forward(p); },
      [](const core::SineFilterBackwardParams& p, const at::Tensor&) {
        cpu::sine_filter_backward(p);
      },
      false};
#if defined(TORCH_SPE_CUDA)
  static SineFilterKernels cuda = sine_filter_cuda_kernels();
  if (device == c10::kCUDA) return cuda;
#endif
  (void)device;
  return cpu;
}

}  // namespace ops

at::Tensor sine_filter(const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& weight,
                       const std::optional<at::Tensor>& constant,
                       const std::optional<at::Tensor>& positions, double start) {
  static const auto op = ops::find_operator<decltype(sine_filter)>("torch_spe::sine_filter");
  return op.call(x, freqs, weight, constant, positions, start);
}

}  // namespace torch_spe
