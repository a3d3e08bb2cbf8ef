// The operator torch_spe::sine_features: checks, allocation, dispatch and autograd.
#include "sine_features.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <array>

#include "cpu/sine_features.h"
#include "operator.h"
#include "torch_spe/torch_spe.h"

namespace torch_spe {
namespace ops {
namespace {

using Gradients =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
constexpr const char* kOp = "sine_features";

void check(const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& amplitudes,
           const OptionalTensor& offsets, const OptionalTensor& constant,
           const OptionalTensor& positions, double start) {
  check_data(kOp, "x", x, 4, "[B, N, H, D]");
  TORCH_CHECK_VALUE(
      freqs.dim() == 3 || freqs.dim() == 4, kOp,
      ": freqs must have 3 dimensions [H, D, K] or 4 dimensions [H, D, K, ndim], got shape ",
      freqs.sym_sizes());
  check_data(kOp, "freqs", freqs, freqs.dim(), "[H, D, K] or [H, D, K, ndim]");
  check_same_device(kOp, "freqs", freqs, x, "x");
  const auto heads = x.sym_size(2), features = x.sym_size(3), sines = freqs.sym_size(2);
  check_size(kOp, "freqs", freqs, 0, heads, "H of x");
  check_size(kOp, "freqs", freqs, 1, features, "D of x");
  TORCH_CHECK_VALUE(sines > 0, kOp, ": freqs must have at least one sine (K >= 1), got shape ",
                    freqs.sym_sizes());
  const auto check_sines = [&](const char* name, const at::Tensor& tensor) {
    check_data(kOp, name, tensor, 3, "[H, D, K]");
    check_same_device(kOp, name, tensor, x, "x");
    check_parameter_type(kOp, name, tensor, x);
    check_size(kOp, name, tensor, 0, heads, "H of x");
    check_size(kOp, name, tensor, 1, features, "D of x");
    check_size(kOp, name, tensor, 2, sines, "K of freqs");
  };
  check_sines("amplitudes", amplitudes);
  if (offsets.has_value()) check_sines("offsets", *offsets);
  if (constant.has_value()) {
    check_data(kOp, "constant", *constant, 2, "[H, D]");
    check_same_device(kOp, "constant", *constant, x, "x");
    check_parameter_type(kOp, "constant", *constant, x);
    check_size(kOp, "constant", *constant, 0, heads, "H of x");
    check_size(kOp, "constant", *constant, 1, features, "D of x");
  }
  check_positions(kOp, positions, start, freqs, x);
}

// Numbers that x becomes: 2K, and one for the constant, for each of D features.
c10::SymInt num_outputs(const at::Tensor& freqs, const OptionalTensor& constant) {
  return (freqs.sym_size(2) * 2 + (constant.has_value() ? 1 : 0)) * freqs.sym_size(1);
}

// The tensors that the kernels read.
struct Inputs {
  at::Tensor x, freqs, amplitudes, offsets, constant, positions;

  Inputs(const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& amplitudes,
         const OptionalTensor& offsets, const OptionalTensor& constant,
         const OptionalTensor& positions)
      : x(x), freqs(freqs.to(at::kDouble).contiguous()) {
    const auto type = accumulate_type(x.scalar_type());
    this->amplitudes = amplitudes.to(type).contiguous();
    this->offsets = offsets.has_value() ? offsets->to(at::kDouble).contiguous()
                                        : at::zeros(amplitudes.sizes(), this->freqs.options());
    if (constant.has_value()) this->constant = constant->to(type).contiguous();
    if (positions.has_value()) this->positions = positions->to(at::kDouble).contiguous();
  }

  void fill(core::SineFeaturesParams& p, double start) const {
    p.dtype = to_dtype(x.scalar_type());
    p.batch = x.size(0);
    p.length = x.size(1);
    p.num_heads = x.size(2);
    p.in_features = x.size(3);
    p.num_sines = freqs.size(2);
    p.ndim = freqs.dim() == 4 ? freqs.size(3) : 1;
    p.num_threads = at::get_num_threads();
    p.x = x.const_data_ptr();
    std::copy_n(x.strides().data(), 4, p.x_strides);
    p.freqs = freqs.const_data_ptr<double>();
    p.amplitudes = amplitudes.const_data_ptr();
    p.offsets = offsets.const_data_ptr<double>();
    p.constant = constant.defined() ? constant.const_data_ptr() : nullptr;
    p.positions = positions.defined() ? positions.const_data_ptr<double>() : nullptr;
    p.start = start;
  }
};

at::Tensor forward(const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& amplitudes,
                   const OptionalTensor& offsets, const OptionalTensor& constant,
                   const OptionalTensor& positions, double start) {
  check(x, freqs, amplitudes, offsets, constant, positions, start);
  check_finite(kOp, "freqs", freqs);
  check_finite(kOp, "amplitudes", amplitudes);
  if (offsets.has_value()) check_finite(kOp, "offsets", *offsets);
  if (constant.has_value()) check_finite(kOp, "constant", *constant);
  if (positions.has_value()) check_finite(kOp, "positions", *positions);
  at::Tensor out = at::empty(
      {x.size(0), x.size(1), x.size(2), num_outputs(freqs, constant).expect_int()}, x.options());
  if (out.numel() == 0) return out;
  const Inputs inputs(x, freqs, amplitudes, offsets, constant, positions);
  core::SineFeaturesParams params;
  inputs.fill(params, start);
  params.out = out.mutable_data_ptr();
  sine_features_kernels(x.device().type()).forward(params, x);
  return out;
}

at::Tensor forward_meta(const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& amplitudes,
                        const OptionalTensor& offsets, const OptionalTensor& constant,
                        const OptionalTensor& positions, double start) {
  check(x, freqs, amplitudes, offsets, constant, positions, start);
  return at::empty_symint(
      {x.sym_size(0), x.sym_size(1), x.sym_size(2), num_outputs(freqs, constant)}, x.options());
}

Gradients backward(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& freqs,
                   const at::Tensor& amplitudes, const OptionalTensor& offsets,
                   const OptionalTensor& constant, const OptionalTensor& positions, double start,
                   std::array<bool, 6> mask) {
  check(x, freqs, amplitudes, offsets, constant, positions, start);
  check_grad_out(kOp, grad_out, x, num_outputs(freqs, constant));
  const Inputs inputs(x, freqs, amplitudes, offsets, constant, positions);
  const auto sums = [](bool wanted, const at::Tensor& like) {
    return wanted && like.defined() ? at::zeros(like.sizes(), like.options().dtype(at::kDouble))
                                    : at::Tensor();
  };
  const auto data = [](const at::Tensor& t) {
    return t.defined() ? t.mutable_data_ptr<double>() : nullptr;
  };
  at::Tensor grad_x = mask[0] ? at::empty(x.sizes(), x.options()) : at::Tensor();
  const at::Tensor grad_freqs = sums(mask[1], inputs.freqs);
  const at::Tensor grad_amplitudes = sums(mask[2], inputs.amplitudes);
  const at::Tensor grad_offsets = sums(mask[3] && offsets.has_value(), inputs.offsets);
  const at::Tensor grad_constant = sums(mask[4], inputs.constant);
  const at::Tensor grad_positions = sums(mask[5], inputs.positions);
  if (x.numel() > 0) {
    core::SineFeaturesBackwardParams params;
    inputs.fill(params, start);
    params.out = nullptr;
    params.grad_out = grad_out.const_data_ptr();
    std::copy_n(grad_out.strides().data(), 4, params.grad_out_strides);
    params.grad_x = mask[0] ? grad_x.mutable_data_ptr() : nullptr;
    params.grad_freqs = data(grad_freqs);
    params.grad_amplitudes = data(grad_amplitudes);
    params.grad_offsets = data(grad_offsets);
    params.grad_constant = data(grad_constant);
    params.grad_positions = data(grad_positions);
    sine_features_kernels(x.device().type()).backward(params, x);
  }
  const auto cast = [](const at::Tensor& grad, const at::Tensor& like) {
    return grad.defined() ? grad.to(like.scalar_type()) : grad;
  };
  return {grad_x,
          cast(grad_freqs, freqs),
          cast(grad_amplitudes, amplitudes),
          cast(grad_offsets, offsets.value_or(x)),
          cast(grad_constant, constant.value_or(x)),
          cast(grad_positions, positions.value_or(x))};
}

Gradients backward_meta(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& freqs,
                        const at::Tensor& amplitudes, const OptionalTensor& offsets,
                        const OptionalTensor& constant, const OptionalTensor& positions,
                        double start, std::array<bool, 6> mask) {
  check(x, freqs, amplitudes, offsets, constant, positions, start);
  check_grad_out(kOp, grad_out, x, num_outputs(freqs, constant));
  const auto like = [](bool wanted, const at::Tensor& t) {
    return wanted ? at::empty_symint(t.sym_sizes(), t.options()) : at::Tensor();
  };
  return {like(mask[0], x),
          like(mask[1], freqs),
          like(mask[2], amplitudes),
          offsets.has_value() ? like(mask[3], *offsets) : at::Tensor(),
          constant.has_value() ? like(mask[4], *constant) : at::Tensor(),
          positions.has_value() ? like(mask[5], *positions) : at::Tensor()};
}

auto backward_op() {
  static const auto op =
      find_operator<decltype(backward_meta)>("torch_spe::sine_features_backward");
  return op;
}

struct SineFeatures : torch::autograd::Function<SineFeatures> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& freqs, const at::Tensor& amplitudes,
                            const OptionalTensor& offsets, const OptionalTensor& constant,
                            const OptionalTensor& positions, double start) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward(
        {x, freqs, amplitudes, to_tensor(offsets), to_tensor(constant), to_tensor(positions)});
    ctx->saved_data["start"] = start;
    return sine_features(x, freqs, amplitudes, offsets, constant, positions, start);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const auto mask = wanted_gradients<6>(*ctx, saved);
    auto [x, freqs, amplitudes, offsets, constant, positions] = backward_op().call(
        grad_outputs[0], saved[0], saved[1], saved[2], to_optional(saved[3]), to_optional(saved[4]),
        to_optional(saved[5]), ctx->saved_data["start"].toDouble(), mask);
    return {x, freqs, amplitudes, offsets, constant, positions, at::Tensor()};
  }
};

at::Tensor forward_autograd(const at::Tensor& x, const at::Tensor& freqs,
                            const at::Tensor& amplitudes, const OptionalTensor& offsets,
                            const OptionalTensor& constant, const OptionalTensor& positions,
                            double start) {
  return SineFeatures::apply(x, freqs, amplitudes, offsets, constant, positions, start);
}

template <c10::DeviceType device>
at::Tensor forward_autocast(const at::Tensor& x, const at::Tensor& freqs,
                            const at::Tensor& amplitudes, const OptionalTensor& offsets,
                            const OptionalTensor& constant, const OptionalTensor& positions,
                            double start) {
  const BelowAutocast<device> below;
  return sine_features(below.cast(x), freqs, amplitudes, offsets, constant, positions, start);
}

TORCH_LIBRARY_IMPL(torch_spe, CPU, m) {
  m.impl("sine_features", forward);
  m.impl("sine_features_backward", backward);
}
#if defined(TORCH_SPE_CUDA)
TORCH_LIBRARY_IMPL(torch_spe, CUDA, m) {
  m.impl("sine_features", forward);
  m.impl("sine_features_backward", backward);
}
#endif
TORCH_LIBRARY_IMPL(torch_spe, Meta, m) {
  m.impl("sine_features", forward_meta);
  m.impl("sine_features_backward", backward_meta);
}
TORCH_LIBRARY_IMPL(torch_spe, Autograd, m) {
  m.impl("sine_features", forward_autograd);
  m.impl("sine_features_backward",
         OnceDifferentiable<backward_op, &kOp, decltype(backward_meta)>::call);
}
TORCH_LIBRARY_IMPL(torch_spe, AutocastCPU, m) {
  m.impl("sine_features", forward_autocast<c10::kCPU>);
}
TORCH_LIBRARY_IMPL(torch_spe, AutocastCUDA, m) {
  m.impl("sine_features", forward_autocast<c10::kCUDA>);
}

}  // namespace

SineFeaturesKernels& sine_features_kernels(c10::DeviceType device) {
  static SineFeaturesKernels cpu = {
      [](const core::SineFeaturesParams& p, const at::Tensor&) { cpu::sine_features_forward(p); },
      [](const core::SineFeaturesBackwardParams& p, const at::Tensor&) {
        cpu::sine_features_backward(p);
      }};
#if defined(TORCH_SPE_CUDA)
  static SineFeaturesKernels cuda = sine_features_cuda_kernels();
  if (device == c10::kCUDA) return cuda;
#endif
  (void)device;
  return cpu;
}

}  // namespace ops

at::Tensor sine_features(const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& amplitudes,
                         const std::optional<at::Tensor>& offsets,
                         const std::optional<at::Tensor>& constant,
                         const std::optional<at::Tensor>& positions, double start) {
  static const auto op = ops::find_operator<decltype(sine_features)>("torch_spe::sine_features");
  return op.call(x, freqs, amplitudes, offsets, constant, positions, start);
}

}  // namespace torch_spe
