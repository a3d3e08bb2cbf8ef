// The operator torch_spe::conv_filter.
#include "cpu/conv_filter.h"

#include <algorithm>

#include "kernels.h"
#include "noise_arguments.h"
#include "params.h"
#include "register.h"

namespace torch_spe::ops {
namespace {

constexpr const char* kLayouts[] = {"[B, N, H, D]", "[B, N1, N2, H, D]", "[B, N1, N2, N3, H, D]"};
constexpr const char* kNoiseLayouts[] = {"[H, D, N+P-1, R]", "[H, D, N1+P1-1, N2+P2-1, R]",
                                         "[H, D, N1+P1-1, N2+P2-1, N3+P3-1, R]"};

// Strides as of a tensor with three dimensions of positions, which begin at dimension `first`.
void copy_grid_strides(const at::Tensor& tensor, int64_t ndim, int64_t first,
                       int64_t (&strides)[6]) {
  std::fill_n(strides, 6, 0);
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    strides[i < first ? i : i + 3 - ndim] = tensor.stride(i);
  }
}

struct ConvFilter : Operator {
  static constexpr const char* kName = "conv_filter";
  static constexpr const char* kSchema =
      "conv_filter(Tensor x, Tensor kernel, Tensor? noise=None, Tensor? constant=None, "
      "Tensor? seed=None, SymInt? num_realizations=None, str noise_kind='gaussian', "
      "int[] noise_stride=[], SymInt[] start=[], str feature_map='identity') -> Tensor";
  static constexpr const char* kDoc =
      "Encodes x [B, *size, H, D] with codes of filtered noise, given or generated from a seed, as "
      "[B, *size, H, R].";
  static constexpr std::array kGradients{"x", "kernel", "noise", "constant"};
  static constexpr std::array kData{"x"};

  struct Arguments {
    at::Tensor x;             // [B, *size, H, D]
    at::Tensor kernel;        // [H, D, *P]
    OptionalTensor noise;     // [H, D, *(size + P - 1), R]
    OptionalTensor constant;  // [H, D, R]
    OptionalTensor seed;      // [1], int64
    std::optional<c10::SymInt> num_realizations;
    std::string noise_kind;
    std::vector<int64_t> noise_stride;
    std::vector<c10::SymInt> start;
    std::string feature_map;

    auto fields() {
      return std::tie(x, kernel, noise, constant, seed, num_realizations, noise_kind, noise_stride,
                      start, feature_map);
    }
    int64_t ndim() const { return kernel.dim() - 2; }
    c10::SymInt realizations() const {
      return noise.has_value() ? noise->sym_size(-1) : *num_realizations;
    }
  };

  static void check(const Arguments& a) {
    TORCH_CHECK_VALUE(a.kernel.dim() >= 3 && a.kernel.dim() <= 5, kName,
                      ": kernel must have 3 to 5 dimensions, [H, D, P], [H, D, P1, P2] or "
                      "[H, D, P1, P2, P3], got shape ",
                      a.kernel.sym_sizes());
    const int64_t ndim = a.ndim();
    check_data(kName, "x", a.x, ndim + 3, kLayouts[ndim - 1]);
    check_data(kName, "kernel", a.kernel, ndim + 2, "[H, D, *P]");
    check_same_device(kName, "kernel", a.kernel, a.x, "x");
    check_parameter_type(kName, "kernel", a.kernel, a.x);
    const auto heads = a.x.sym_size(ndim + 1), features = a.x.sym_size(ndim + 2);
    check_size(kName, "kernel", a.kernel, 0, heads, "H of x");
    check_size(kName, "kernel", a.kernel, 1, features, "D of x");
    for (int64_t i = 0; i < ndim; ++i) {
      TORCH_CHECK_VALUE(
          a.kernel.sym_size(2 + i) > 0, kName,
          ": kernel must have at least one tap in every dimension (P >= 1), got shape ",
          a.kernel.sym_sizes());
    }
    to_feature_map(kName, "feature_map", a.feature_map);
    check_noise(a, ndim, heads, features);
    if (a.constant.has_value()) {
      check_data(kName, "constant", *a.constant, 3, "[H, D, R]");
      check_same_device(kName, "constant", *a.constant, a.x, "x");
      check_parameter_type(kName, "constant", *a.constant, a.x);
      check_size(kName, "constant", *a.constant, 0, heads, "H of x");
      check_size(kName, "constant", *a.constant, 1, features, "D of x");
      check_size(kName, "constant", *a.constant, 2, a.realizations(), "R of the noise");
    }
  }

  static void check_noise(const Arguments& a, int64_t ndim, const c10::SymInt& heads,
                          const c10::SymInt& features) {
    to_noise_kind(kName, a.noise_kind);
    check_stride(kName, a.noise_stride, ndim);
    check_start(kName, a.start, ndim);
    TORCH_CHECK_VALUE(a.noise.has_value() != a.seed.has_value(), kName,
                      ": expected either noise or seed, got ",
                      a.noise.has_value() ? "both" : "neither of them");
    if (a.noise.has_value()) {
      const at::Tensor& noise = *a.noise;
      check_data(kName, "noise", noise, ndim + 3, kNoiseLayouts[ndim - 1]);
      check_same_device(kName, "noise", noise, a.x, "x");
      check_parameter_type(kName, "noise", noise, a.x);
      check_size(kName, "noise", noise, 0, heads, "H of x");
      check_size(kName, "noise", noise, 1, features, "D of x");
      for (int64_t i = 0; i < ndim; ++i) {
        check_size(kName, "noise", noise, 2 + i, a.x.sym_size(1 + i) + a.kernel.sym_size(2 + i) - 1,
                   "N + P - 1, N of x and P of kernel");
      }
      if (a.num_realizations.has_value())
        check_size(kName, "noise", noise, ndim + 2, *a.num_realizations, "num_realizations");
      TORCH_CHECK_VALUE(std::all_of(a.noise_stride.begin(), a.noise_stride.end(),
                                    [](int64_t s) { return s == 1; }),
                        kName, ": noise_stride must be 1 when noise is given, got ",
                        at::IntArrayRef(a.noise_stride));
      TORCH_CHECK_VALUE(a.start.empty(), kName, ": start must not be given along with noise, got ",
                        c10::SymIntArrayRef(a.start));
    } else {
      check_seed(kName, *a.seed);
      check_same_device(kName, "seed", *a.seed, a.x, "x");
      TORCH_CHECK_VALUE(a.num_realizations.has_value(), kName,
                        ": num_realizations must be given along with seed");
    }
    TORCH_CHECK_VALUE(a.realizations() > 0, kName, ": num_realizations must be at least 1, got ",
                      a.realizations());
  }

  static core::NoiseParams generated_noise(const Arguments& a) {
    const int64_t ndim = a.ndim();
    c10::SmallVector<int64_t, 3> size(ndim);
    for (int64_t i = 0; i < ndim; ++i) size[i] = a.x.size(1 + i) + a.kernel.size(2 + i) - 1;
    return noise_params(kName, *a.seed, a.noise_kind, a.noise_stride, a.start, size,
                        a.x.size(ndim + 1), a.x.size(ndim + 2), a.realizations().expect_int());
  }

  static void check_values(const Arguments& a) {
    check_finite(kName, "kernel", a.kernel);
    if (a.constant.has_value()) check_finite(kName, "constant", *a.constant);
    if (a.seed.has_value()) generated_noise(a);
  }

  static TensorSpecs results(const Arguments& a) {
    TensorSpec out = spec_like(a.x);
    out.sizes.back() = a.realizations();
    return {out};
  }

  static void fill(core::ConvFilterParams& p, const Arguments& a, KernelTensors& kept) {
    const auto type = accumulate_type(a.x.scalar_type());
    const int64_t ndim = a.ndim();
    p.dtype = to_dtype(a.x.scalar_type());
    p.feature_map = to_feature_map(kName, "feature_map", a.feature_map);
    p.batch = a.x.size(0);
    p.num_heads = a.x.size(ndim + 1);
    p.in_features = a.x.size(ndim + 2);
    p.num_realizations = a.realizations().expect_int();
    p.num_threads = at::get_num_threads();
    p.x = a.x.const_data_ptr();
    copy_grid_strides(a.x, ndim, 1, p.x_strides);
    p.kernel = kept.contiguous(a.kernel, type);
    p.constant = kept.contiguous(a.constant, type);
    std::fill_n(p.size, 3, 1);
    std::fill_n(p.kernel_size, 3, 1);
    for (int64_t i = 0; i < ndim; ++i) {
      p.size[3 - ndim + i] = a.x.size(1 + i);
      p.kernel_size[3 - ndim + i] = a.kernel.size(2 + i);
    }
    if (a.noise.has_value()) {
      p.generated = {core::NoiseKind::kGaussian, 0,         nullptr,
                     static_cast<int>(ndim),     {1, 1, 1}, {0, 0, 0}};
      p.noise = a.noise->const_data_ptr();
      p.noise_dtype = to_dtype(a.noise->scalar_type());
      copy_grid_strides(*a.noise, ndim, 2, p.noise_strides);
    } else {
      p.generated = generated_noise(a);
      p.noise = nullptr;
      p.noise_dtype = p.dtype;
    }
    p.out = nullptr;
  }

  static void forward(const Arguments& a, const Tensors& outputs) {
    core::ConvFilterParams p;
    KernelTensors kept;
    fill(p, a, kept);
    if (outputs[0].numel() == 0) return;
    p.out = outputs[0].mutable_data_ptr();
    kernel_of<core::ConvFilterParams>(a.x.device().type())(p, a.x);
  }

  static void backward(BackwardCall<ConvFilter>& b) {
    const Arguments& a = b.arguments;
    if (a.x.numel() == 0) {  // sums over nothing
      for (const char* name : kGradients) b.gradient(name, a.x.scalar_type());
      return;
    }
    const auto type = accumulate_type(a.x.scalar_type());
    const at::Tensor& grad_out = b.grads[0];
    core::ConvFilterBackwardParams p;
    KernelTensors kept;
    fill(p, a, kept);
    p.grad_out = grad_out.const_data_ptr();
    copy_grid_strides(grad_out, a.ndim(), 1, p.grad_out_strides);
    p.grad_x = b.overwritten_gradient("x", a.x.scalar_type());
    p.grad_kernel = b.gradient("kernel", type);
    p.grad_noise = b.overwritten_gradient(
        "noise", a.noise.has_value() ? a.noise->scalar_type() : a.x.scalar_type());
    p.grad_constant = b.gradient("constant", type);
    kernel_of<core::ConvFilterBackwardParams>(a.x.device().type())(p, a.x);
  }
};

const Registration<ConvFilter> registration;
[[maybe_unused]] const bool kernels = register_cpu_kernel<cpu::conv_filter_forward>() &&
                                      register_cpu_kernel<cpu::conv_filter_backward>();

}  // namespace
}  // namespace torch_spe::ops
