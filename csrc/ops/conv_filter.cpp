// The operators torch_spe::conv_filter and torch_spe::conv_noise: checks, allocation, dispatch and
// autograd.
#include "conv_filter.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>

#include "cpu/conv_filter.h"
#include "operator.h"
#include "torch_spe/torch_spe.h"

namespace torch_spe {
namespace ops {
namespace {

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
constexpr const char* kOp = "conv_filter";
constexpr const char* kLayouts[] = {"[B, N, H, D]", "[B, N1, N2, H, D]", "[B, N1, N2, N3, H, D]"};
constexpr const char* kNoiseLayouts[] = {"[H, D, N+P-1, R]", "[H, D, N1+P1-1, N2+P2-1, R]",
                                         "[H, D, N1+P1-1, N2+P2-1, N3+P3-1, R]"};

core::NoiseKind to_noise_kind(const char* op, c10::string_view kind) {
  if (kind == "gaussian") return core::NoiseKind::kGaussian;
  if (kind == "rademacher") return core::NoiseKind::kRademacher;
  TORCH_CHECK_VALUE(false, op, ": noise_kind must be 'gaussian' or 'rademacher', got '", kind, "'");
}

void check_seed(const char* op, const at::Tensor& seed) {
  TORCH_CHECK_TYPE(seed.scalar_type() == at::kLong, op, ": seed must be int64, got ",
                   seed.scalar_type());
  TORCH_CHECK_VALUE(seed.sym_numel().sym_eq(1).expect_true(__FILE__, __LINE__), op,
                    ": seed must have one element, got shape ", seed.sym_sizes());
}

// One stride for each dimension; one number stands for all dimensions, none for 1.
void check_stride(const char* op, at::IntArrayRef stride, int64_t ndim) {
  TORCH_CHECK_VALUE(stride.size() <= 1 || static_cast<int64_t>(stride.size()) == ndim, op,
                    ": noise_stride must be one number or ", ndim, ", got ", stride);
  int64_t product = 1;
  for (int64_t i = 0; i < ndim && !stride.empty(); ++i) {
    const int64_t s = stride[stride.size() == 1 ? 0 : i];
    TORCH_CHECK_VALUE(s >= 1 && s <= (1 << 20), op, ": noise_stride must be in 1 .. 2^20, got ",
                      stride);
    product *= s;
    TORCH_CHECK_VALUE(product <= (1 << 20), op,
                      ": the product of noise_stride must be at most 2^20, got ", stride);
  }
}

void check_start(const char* op, c10::SymIntArrayRef start, int64_t ndim) {
  TORCH_CHECK_VALUE(start.empty() || static_cast<int64_t>(start.size()) == ndim, op,
                    ": start must have ", ndim, " coordinates, got ", start);
}

// Dimensions of the positions.
int64_t check_ndim(const at::Tensor& kernel) {
  TORCH_CHECK_VALUE(kernel.dim() >= 3 && kernel.dim() <= 5, kOp,
                    ": kernel must have 3 to 5 dimensions, [H, D, P], [H, D, P1, P2] or "
                    "[H, D, P1, P2, P3], got shape ",
                    kernel.sym_sizes());
  return kernel.dim() - 2;
}

c10::SymInt realizations(const OptionalTensor& noise,
                         const std::optional<c10::SymInt>& num_realizations) {
  return noise.has_value() ? noise->sym_size(-1) : *num_realizations;
}

void check(const at::Tensor& x, const at::Tensor& kernel, const OptionalTensor& noise,
           const OptionalTensor& constant, const OptionalTensor& seed,
           const std::optional<c10::SymInt>& num_realizations, c10::string_view noise_kind,
           at::IntArrayRef noise_stride, c10::SymIntArrayRef start) {
  const int64_t ndim = check_ndim(kernel);
  check_data(kOp, "x", x, ndim + 3, kLayouts[ndim - 1]);
  check_data(kOp, "kernel", kernel, ndim + 2, "[H, D, *P]");
  check_same_device(kOp, "kernel", kernel, x, "x");
  check_parameter_type(kOp, "kernel", kernel, x);
  const auto heads = x.sym_size(ndim + 1), features = x.sym_size(ndim + 2);
  check_size(kOp, "kernel", kernel, 0, heads, "H of x");
  check_size(kOp, "kernel", kernel, 1, features, "D of x");
  for (int64_t i = 0; i < ndim; ++i) {
    TORCH_CHECK_VALUE(kernel.sym_size(2 + i) > 0, kOp,
                      ": kernel must have at least one tap in every dimension (P >= 1), got shape ",
                      kernel.sym_sizes());
  }
  to_noise_kind(kOp, noise_kind);
  check_stride(kOp, noise_stride, ndim);
  check_start(kOp, start, ndim);
  TORCH_CHECK_VALUE(noise.has_value() != seed.has_value(), kOp,
                    ": expected either noise or seed, got ",
                    noise.has_value() ? "both" : "neither of them");
  if (noise.has_value()) {
    check_data(kOp, "noise", *noise, ndim + 3, kNoiseLayouts[ndim - 1]);
    check_same_device(kOp, "noise", *noise, x, "x");
    check_parameter_type(kOp, "noise", *noise, x);
    check_size(kOp, "noise", *noise, 0, heads, "H of x");
    check_size(kOp, "noise", *noise, 1, features, "D of x");
    for (int64_t i = 0; i < ndim; ++i) {
      check_size(kOp, "noise", *noise, 2 + i, x.sym_size(1 + i) + kernel.sym_size(2 + i) - 1,
                 "N + P - 1, N of x and P of kernel");
    }
    if (num_realizations.has_value()) {
      check_size(kOp, "noise", *noise, ndim + 2, *num_realizations, "num_realizations");
    }
    TORCH_CHECK_VALUE(
        std::all_of(noise_stride.begin(), noise_stride.end(), [](int64_t s) { return s == 1; }),
        kOp, ": noise_stride must be 1 when noise is given, got ", noise_stride);
    TORCH_CHECK_VALUE(start.empty(), kOp, ": start must not be given along with noise, got ",
                      start);
  } else {
    check_seed(kOp, *seed);
    check_same_device(kOp, "seed", *seed, x, "x");
    TORCH_CHECK_VALUE(num_realizations.has_value(), kOp,
                      ": num_realizations must be given along with seed");
  }
  const c10::SymInt real = realizations(noise, num_realizations);
  TORCH_CHECK_VALUE(real > 0, kOp, ": num_realizations must be at least 1, got ", real);
  if (constant.has_value()) {
    check_data(kOp, "constant", *constant, 3, "[H, D, R]");
    check_same_device(kOp, "constant", *constant, x, "x");
    check_parameter_type(kOp, "constant", *constant, x);
    check_size(kOp, "constant", *constant, 0, heads, "H of x");
    check_size(kOp, "constant", *constant, 1, features, "D of x");
    check_size(kOp, "constant", *constant, 2, real, "R of the noise");
  }
}

// The generator's parameters, after a look at its limits; `size` counts the positions of the noise.
core::NoiseParams noise_params(const char* op, const at::Tensor& seed, c10::string_view kind,
                               at::IntArrayRef stride, at::IntArrayRef start, at::IntArrayRef size,
                               int64_t num_heads, int64_t in_features, int64_t num_realizations) {
  const int ndim = static_cast<int>(size.size());
  core::NoiseParams p{
      to_noise_kind(op, kind), 0, seed.const_data_ptr<int64_t>(), ndim, {1, 1, 1}, {0, 0, 0}};
  // Reading it on another device would stall that.
  if (seed.is_cpu()) p.seed = static_cast<uint64_t>(*p.device_seed);
  TORCH_CHECK_VALUE(num_heads <= core::kMaxNoiseHeads, op, ": noise is generated for at most ",
                    core::kMaxNoiseHeads, " heads, got ", num_heads);
  TORCH_CHECK_VALUE(in_features <= core::kMaxNoiseFeatures, op, ": noise is generated for at most ",
                    core::kMaxNoiseFeatures, " features of a head, got ", in_features);
  TORCH_CHECK_VALUE(num_realizations <= core::kMaxNoiseRealizations, op,
                    ": num_realizations must be at most ", core::kMaxNoiseRealizations, ", got ",
                    num_realizations);
  const int64_t limit = int64_t{1} << (core::noise_position_bits(ndim) - 1);
  for (int i = 0; i < ndim; ++i) {
    const int64_t first = start.empty() ? 0 : start[i];
    TORCH_CHECK_VALUE(first >= -limit && first <= limit - size[i], op, ": positions of noise in ",
                      ndim, " dimensions must be in [", -limit, ", ", limit, "), got ", first,
                      " .. ", first, " + ", size[i] - 1, " in dimension ", i);
    p.start[3 - ndim + i] = first;
    if (!stride.empty()) p.stride[3 - ndim + i] = stride[stride.size() == 1 ? 0 : i];
  }
  return p;
}

// The tensors that the kernels read.
struct Inputs {
  at::Tensor x, kernel, noise, constant;

  Inputs(const at::Tensor& x, const at::Tensor& kernel, const OptionalTensor& noise,
         const OptionalTensor& constant)
      : x(x) {
    const auto type = accumulate_type(x.scalar_type());
    this->kernel = kernel.to(type).contiguous();
    if (noise.has_value()) this->noise = *noise;
    if (constant.has_value()) this->constant = constant->to(type).contiguous();
  }

  void fill(core::ConvFilterParams& p, int64_t num_realizations, const OptionalTensor& seed,
            c10::string_view noise_kind, at::IntArrayRef noise_stride,
            at::IntArrayRef start) const {
    const int64_t ndim = kernel.dim() - 2;
    p.dtype = to_dtype(x.scalar_type());
    p.batch = x.size(0);
    p.num_heads = x.size(ndim + 1);
    p.in_features = x.size(ndim + 2);
    p.num_realizations = num_realizations;
    p.num_threads = at::get_num_threads();
    p.x = x.const_data_ptr();
    copy_strides(x, ndim, 1, p.x_strides);
    p.kernel = kernel.const_data_ptr();
    p.constant = constant.defined() ? constant.const_data_ptr() : nullptr;
    std::vector<int64_t> noise_size(ndim);
    std::fill_n(p.size, 3, 1);
    std::fill_n(p.kernel_size, 3, 1);
    for (int64_t i = 0; i < ndim; ++i) {
      p.size[3 - ndim + i] = x.size(1 + i);
      p.kernel_size[3 - ndim + i] = kernel.size(2 + i);
      noise_size[i] = x.size(1 + i) + kernel.size(2 + i) - 1;
    }
    if (noise.defined()) {
      p.generated = {core::NoiseKind::kGaussian, 0,         nullptr,
                     static_cast<int>(ndim),     {1, 1, 1}, {0, 0, 0}};
      p.noise = noise.const_data_ptr();
      p.noise_dtype = to_dtype(noise.scalar_type());
      copy_strides(noise, ndim, 2, p.noise_strides);
    } else {
      p.generated = noise_params(kOp, *seed, noise_kind, noise_stride, start, noise_size,
                                 p.num_heads, p.in_features, num_realizations);
      p.noise = nullptr;
      p.noise_dtype = p.dtype;
    }
    p.out = nullptr;
  }

  // Strides as of a tensor with three dimensions of positions, which begin at dimension `first`.
  static void copy_strides(const at::Tensor& tensor, int64_t ndim, int64_t first,
                           int64_t (&strides)[6]) {
    std::fill_n(strides, 6, 0);
    for (int64_t i = 0; i < tensor.dim(); ++i) {
      strides[i < first ? i : i + 3 - ndim] = tensor.stride(i);
    }
  }
};

std::vector<c10::SymInt> output_shape(const at::Tensor& x, const c10::SymInt& last) {
  std::vector<c10::SymInt> shape = x.sym_sizes().vec();
  shape.back() = last;
  return shape;
}

at::Tensor forward(const at::Tensor& x, const at::Tensor& kernel, const OptionalTensor& noise,
                   const OptionalTensor& constant, const OptionalTensor& seed,
                   std::optional<int64_t> num_realizations, c10::string_view noise_kind,
                   at::IntArrayRef noise_stride, at::IntArrayRef start) {
  const std::optional<c10::SymInt> given =
      num_realizations.has_value() ? std::optional<c10::SymInt>(*num_realizations) : std::nullopt;
  check(x, kernel, noise, constant, seed, given, noise_kind, noise_stride,
        c10::fromIntArrayRefSlow(start));
  check_finite(kOp, "kernel", kernel);
  if (constant.has_value()) check_finite(kOp, "constant", *constant);
  const int64_t real = realizations(noise, given).expect_int();
  const Inputs inputs(x, kernel, noise, constant);
  core::ConvFilterParams params;
  inputs.fill(params, real, seed, noise_kind, noise_stride, start);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = real;
  at::Tensor out = at::empty(shape, x.options());
  if (out.numel() == 0) return out;
  params.out = out.mutable_data_ptr();
  conv_filter_kernels(x.device().type()).forward(params, x);
  return out;
}

at::Tensor forward_meta(const at::Tensor& x, const at::Tensor& kernel, const OptionalTensor& noise,
                        const OptionalTensor& constant, const OptionalTensor& seed,
                        std::optional<c10::SymInt> num_realizations, c10::string_view noise_kind,
                        at::IntArrayRef noise_stride, c10::SymIntArrayRef start) {
  check(x, kernel, noise, constant, seed, num_realizations, noise_kind, noise_stride, start);
  return at::empty_symint(output_shape(x, realizations(noise, num_realizations)), x.options());
}

Gradients backward(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& kernel,
                   const OptionalTensor& noise, const OptionalTensor& constant,
                   const OptionalTensor& seed, c10::string_view noise_kind,
                   at::IntArrayRef noise_stride, at::IntArrayRef start, std::array<bool, 4> mask) {
  const int64_t real = grad_out.size(-1);
  check(x, kernel, noise, constant, seed, real, noise_kind, noise_stride,
        c10::fromIntArrayRefSlow(start));
  check_data(kOp, "grad_out", grad_out, x.dim(), "like x");
  const Inputs inputs(x, kernel, noise, constant);
  const bool want_noise = mask[2] && noise.has_value();
  const bool want_constant = mask[3] && constant.has_value();
  at::Tensor grad_x = mask[0] ? at::empty(x.sizes(), x.options()) : at::Tensor();
  at::Tensor grad_kernel = mask[1] ? at::zeros_like(inputs.kernel) : at::Tensor();
  at::Tensor grad_noise = want_noise ? at::empty(noise->sizes(), noise->options()) : at::Tensor();
  at::Tensor grad_constant = want_constant ? at::zeros_like(inputs.constant) : at::Tensor();
  if (x.numel() > 0) {
    core::ConvFilterBackwardParams params;
    inputs.fill(params, real, seed, noise_kind, noise_stride, start);
    params.grad_out = grad_out.const_data_ptr();
    Inputs::copy_strides(grad_out, kernel.dim() - 2, 1, params.grad_out_strides);
    params.grad_x = mask[0] ? grad_x.mutable_data_ptr() : nullptr;
    params.grad_kernel = mask[1] ? grad_kernel.mutable_data_ptr() : nullptr;
    params.grad_noise = want_noise ? grad_noise.mutable_data_ptr() : nullptr;
    params.grad_constant = want_constant ? grad_constant.mutable_data_ptr() : nullptr;
    conv_filter_kernels(x.device().type()).backward(params, x);
  } else if (want_noise) {
    grad_noise.zero_();
  }
  if (mask[1]) grad_kernel = grad_kernel.to(kernel.scalar_type());
  if (want_constant) grad_constant = grad_constant.to(constant->scalar_type());
  return {grad_x, grad_kernel, grad_noise, grad_constant};
}

Gradients backward_meta(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& kernel,
                        const OptionalTensor& noise, const OptionalTensor& constant,
                        const OptionalTensor& seed, c10::string_view noise_kind,
                        at::IntArrayRef noise_stride, c10::SymIntArrayRef start,
                        std::array<bool, 4> mask) {
  check(x, kernel, noise, constant, seed, grad_out.sym_size(-1), noise_kind, noise_stride, start);
  const auto like = [](bool wanted, const OptionalTensor& t) {
    return wanted && t.has_value() ? at::empty_symint(t->sym_sizes(), t->options()) : at::Tensor();
  };
  return {like(mask[0], x), like(mask[1], kernel), like(mask[2], noise), like(mask[3], constant)};
}

auto forward_op() {
  static const auto op = find_operator<decltype(forward_meta)>("torch_spe::conv_filter");
  return op;
}

auto backward_op() {
  static const auto op = find_operator<decltype(backward_meta)>("torch_spe::conv_filter_backward");
  return op;
}

struct ConvFilter : torch::autograd::Function<ConvFilter> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const at::Tensor& kernel, const OptionalTensor& noise,
                            const OptionalTensor& constant, const OptionalTensor& seed,
                            std::optional<c10::SymInt> num_realizations,
                            c10::string_view noise_kind, at::IntArrayRef noise_stride,
                            c10::SymIntArrayRef start) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, kernel, to_tensor(noise), to_tensor(constant), to_tensor(seed)});
    ctx->saved_data["noise_kind"] = std::string(noise_kind);
    ctx->saved_data["noise_stride"] = noise_stride.vec();
    ctx->saved_data["start"] = start;
    return forward_op().call(x, kernel, noise, constant, seed, std::move(num_realizations),
                             noise_kind, noise_stride, start);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const auto mask = wanted_gradients<4>(*ctx, saved);
    const std::string noise_kind = ctx->saved_data["noise_kind"].toStringRef();
    const std::vector<int64_t> noise_stride = ctx->saved_data["noise_stride"].toIntVector();
    const std::vector<c10::SymInt> start = ctx->saved_data["start"].toSymIntVector();
    auto [x, kernel, noise, constant] = backward_op().call(
        grad_outputs[0], saved[0], saved[1], to_optional(saved[2]), to_optional(saved[3]),
        to_optional(saved[4]), noise_kind, noise_stride, start, mask);
    return {x,
            kernel,
            noise,
            constant,
            at::Tensor(),
            at::Tensor(),
            at::Tensor(),
            at::Tensor(),
            at::Tensor()};
  }
};

at::Tensor forward_autograd(const at::Tensor& x, const at::Tensor& kernel,
                            const OptionalTensor& noise, const OptionalTensor& constant,
                            const OptionalTensor& seed, std::optional<c10::SymInt> num_realizations,
                            c10::string_view noise_kind, at::IntArrayRef noise_stride,
                            c10::SymIntArrayRef start) {
  return ConvFilter::apply(x, kernel, noise, constant, seed, std::move(num_realizations),
                           noise_kind, noise_stride, start);
}

template <c10::DeviceType device>
at::Tensor forward_autocast(const at::Tensor& x, const at::Tensor& kernel,
                            const OptionalTensor& noise, const OptionalTensor& constant,
                            const OptionalTensor& seed, std::optional<c10::SymInt> num_realizations,
                            c10::string_view noise_kind, at::IntArrayRef noise_stride,
                            c10::SymIntArrayRef start) {
  const BelowAutocast<device> below;
  return forward_op().call(below.cast(x), kernel, noise, constant, seed,
                           std::move(num_realizations), noise_kind, noise_stride, start);
}

constexpr const char* kNoiseOp = "conv_noise";

void check_noise(const at::Tensor& seed, const c10::SymInt& num_heads,
                 const c10::SymInt& in_features, c10::SymIntArrayRef size,
                 const c10::SymInt& num_realizations, c10::string_view noise_kind,
                 at::IntArrayRef noise_stride, c10::SymIntArrayRef start,
                 std::optional<at::ScalarType> dtype) {
  check_seed(kNoiseOp, seed);
  TORCH_CHECK_VALUE(size.size() >= 1 && size.size() <= 3, kNoiseOp,
                    ": size must have 1 to 3 numbers, got ", size);
  const auto check_count = [](const char* name, const c10::SymInt& count) {
    TORCH_CHECK_VALUE(count >= 0, kNoiseOp, ": ", name, " must not be negative, got ", count);
  };
  check_count("num_heads", num_heads);
  check_count("in_features", in_features);
  check_count("num_realizations", num_realizations);
  for (const auto& n : size) check_count("size", n);
  to_noise_kind(kNoiseOp, noise_kind);
  check_stride(kNoiseOp, noise_stride, static_cast<int64_t>(size.size()));
  check_start(kNoiseOp, start, static_cast<int64_t>(size.size()));
  to_dtype(dtype.value_or(at::kFloat));
}

at::Tensor make_noise(const at::Tensor& seed, int64_t num_heads, int64_t in_features,
                      at::IntArrayRef size, int64_t num_realizations, c10::string_view noise_kind,
                      at::IntArrayRef noise_stride, at::IntArrayRef start,
                      std::optional<at::ScalarType> dtype) {
  check_noise(seed, num_heads, in_features, c10::fromIntArrayRefSlow(size), num_realizations,
              noise_kind, noise_stride, c10::fromIntArrayRefSlow(start), dtype);
  std::vector<int64_t> shape{num_heads, in_features};
  shape.insert(shape.end(), size.begin(), size.end());
  shape.push_back(num_realizations);
  at::Tensor out = at::empty(shape, seed.options().dtype(dtype.value_or(at::kFloat)));
  core::ConvNoiseParams p;
  p.generated = noise_params(kNoiseOp, seed, noise_kind, noise_stride, start, size, num_heads,
                             in_features, num_realizations);
  if (out.numel() == 0) return out;
  p.dtype = to_dtype(out.scalar_type());
  p.num_heads = num_heads;
  p.in_features = in_features;
  p.num_realizations = num_realizations;
  std::fill_n(p.size, 3, 1);
  std::copy(size.begin(), size.end(), p.size + 3 - size.size());
  p.num_threads = at::get_num_threads();
  p.out = out.mutable_data_ptr();
  conv_filter_kernels(seed.device().type()).noise(p, seed);
  return out;
}

at::Tensor noise_meta(const at::Tensor& seed, c10::SymInt num_heads, c10::SymInt in_features,
                      c10::SymIntArrayRef size, c10::SymInt num_realizations,
                      c10::string_view noise_kind, at::IntArrayRef noise_stride,
                      c10::SymIntArrayRef start, std::optional<at::ScalarType> dtype) {
  check_noise(seed, num_heads, in_features, size, num_realizations, noise_kind, noise_stride, start,
              dtype);
  std::vector<c10::SymInt> shape{num_heads, in_features};
  shape.insert(shape.end(), size.begin(), size.end());
  shape.push_back(num_realizations);
  return at::empty_symint(shape, seed.options().dtype(dtype.value_or(at::kFloat)));
}

TORCH_LIBRARY_IMPL(torch_spe, CPU, m) {
  m.impl("conv_filter", forward);
  m.impl("conv_filter_backward", backward);
  m.impl("conv_noise", make_noise);
}
#if defined(TORCH_SPE_CUDA)
TORCH_LIBRARY_IMPL(torch_spe, CUDA, m) {
  m.impl("conv_filter", forward);
  m.impl("conv_filter_backward", backward);
  m.impl("conv_noise", make_noise);
}
#endif
TORCH_LIBRARY_IMPL(torch_spe, Meta, m) {
  m.impl("conv_filter", forward_meta);
  m.impl("conv_filter_backward", backward_meta);
  m.impl("conv_noise", noise_meta);
}
TORCH_LIBRARY_IMPL(torch_spe, Autograd, m) {
  m.impl("conv_filter", forward_autograd);
  m.impl("conv_filter_backward",
         OnceDifferentiable<backward_op, &kOp, decltype(backward_meta)>::call);
}
TORCH_LIBRARY_IMPL(torch_spe, AutocastCPU, m) {
  m.impl("conv_filter", forward_autocast<c10::kCPU>);
}
TORCH_LIBRARY_IMPL(torch_spe, AutocastCUDA, m) {
  m.impl("conv_filter", forward_autocast<c10::kCUDA>);
}

}  // namespace

ConvFilterKernels& conv_filter_kernels(c10::DeviceType device) {
  static ConvFilterKernels cpu = {
      [](const core::ConvFilterParams& p, const at::Tensor&) { cpu::conv_filter_forward(p); },
      [](const core::ConvFilterBackwardParams& p, const at::Tensor&) {
        cpu::conv_filter_backward(p);
      },
      [](const core::ConvNoiseParams& p, const at::Tensor&) { cpu::conv_noise(p); }};
#if defined(TORCH_SPE_CUDA)
  static ConvFilterKernels cuda = conv_filter_cuda_kernels();
  if (device == c10::kCUDA) return cuda;
#endif
  (void)device;
  return cpu;
}

}  // namespace ops

at::Tensor conv_filter(const at::Tensor& x, const at::Tensor& kernel,
                       const std::optional<at::Tensor>& noise,
                       const std::optional<at::Tensor>& constant,
                       const std::optional<at::Tensor>& seed,
                       std::optional<int64_t> num_realizations, const std::string& noise_kind,
                       at::IntArrayRef noise_stride, at::IntArrayRef start) {
  return ops::forward_op().call(
      x, kernel, noise, constant, seed,
      num_realizations.has_value() ? std::optional<c10::SymInt>(*num_realizations) : std::nullopt,
      noise_kind, noise_stride, c10::fromIntArrayRefSlow(start));
}

at::Tensor conv_noise(const at::Tensor& seed, int64_t num_heads, int64_t in_features,
                      at::IntArrayRef size, int64_t num_realizations, const std::string& noise_kind,
                      at::IntArrayRef noise_stride, at::IntArrayRef start,
                      std::optional<at::ScalarType> dtype) {
  static const auto op = ops::find_operator<decltype(ops::noise_meta)>("torch_spe::conv_noise");
  return op.call(seed, num_heads, in_features, c10::fromIntArrayRefSlow(size), num_realizations,
                 noise_kind, noise_stride, c10::fromIntArrayRefSlow(start), dtype);
}

}  // namespace torch_spe
