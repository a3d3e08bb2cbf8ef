// The smallest operator there is, out = factor x, from schema to gradient: what CONTRIBUTING walks
// through.
#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "ops/kernels.h"
#include "ops/params.h"
#include "ops/register.h"

namespace {

using namespace torch_spe;
using namespace torch_spe::ops;

// Parameters and kernels; those of the library stand in csrc/core, csrc/cpu and csrc/cuda.
struct ScaleParams {
  core::DType dtype;  // of all tensors
  std::int64_t count;
  double factor;
  const void* x;
  void* out;
};
struct ScaleBackwardParams : ScaleParams {
  const void* grad_out;
  void* grad_x;  // null when it is not wanted
};

template <class T>
void scale(std::int64_t count, double factor, const void* in, void* out) {
  for (std::int64_t i = 0; i < count; ++i)
    static_cast<T*>(out)[i] = static_cast<T>(factor) * static_cast<const T*>(in)[i];
}
void scale(const ScaleParams& p, const void* in, void* out) {
  if (out == nullptr) return;
  if (p.dtype == core::DType::kFloat64)
    scale<double>(p.count, p.factor, in, out);
  else if (p.dtype == core::DType::kFloat32)
    scale<float>(p.count, p.factor, in, out);
  else
    scale<c10::BFloat16>(p.count, p.factor, in, out);
}
void scale_forward(const ScaleParams& p) { scale(p, p.x, p.out); }
void scale_backward(const ScaleBackwardParams& p) { scale(p, p.grad_out, p.grad_x); }

// The description.
struct Scale : Operator {
  static constexpr const char* kName = "example_scale";
  static constexpr const char* kSchema = "example_scale(Tensor x, float factor=2.0) -> Tensor";
  static constexpr const char* kDoc = "Multiplies x [N] with a factor.";
  static constexpr std::array kGradients{"x"};
  static constexpr std::array kData{"x"};

  struct Arguments {
    at::Tensor x;  // [N]
    double factor;
    auto fields() { return std::tie(x, factor); }
  };

  static void check(const Arguments& a) { check_data(kName, "x", a.x, 1, "[N]"); }

  static TensorSpecs results(const Arguments& a) { return {spec_like(a.x)}; }

  static void fill(ScaleParams& p, const Arguments& a, KernelTensors& kept) {
    p.dtype = to_dtype(a.x.scalar_type());
    p.count = a.x.numel();
    p.factor = a.factor;
    p.x = kept.contiguous(a.x);
    p.out = nullptr;
  }

  static void forward(const Arguments& a, const Tensors& outputs) {
    ScaleParams p;
    KernelTensors kept;
    fill(p, a, kept);
    p.out = outputs[0].mutable_data_ptr();
    kernel_of<ScaleParams>(a.x.device().type())(p, a.x);
  }

  static void backward(BackwardCall<Scale>& b) {
    ScaleBackwardParams p;
    KernelTensors kept;
    fill(p, b.arguments, kept);
    p.grad_out = kept.contiguous(b.grads[0]);
    p.grad_x = b.overwritten_gradient("x", b.arguments.x.scalar_type());
    kernel_of<ScaleBackwardParams>(b.arguments.x.device().type())(p, b.arguments.x);
  }
};

const Registration<Scale> registration;
[[maybe_unused]] const bool kernels =
    register_cpu_kernel<scale_forward>() && register_cpu_kernel<scale_backward>();

// What a C++ program sees.
at::Tensor example_scale(const at::Tensor& x, double factor) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("torch_spe::example_scale", "");
  torch::jit::Stack stack{x, factor};
  op.callBoxed(stack);
  return stack[0].toTensor();
}

TEST(ExampleOperator, ComputesAndDifferentiates) {
  const auto x = torch::randn({5}, torch::dtype(torch::kFloat64).requires_grad(true));
  const auto out = example_scale(x, 3);
  EXPECT_TRUE(torch::equal(out, 3 * x));
  EXPECT_EQ(out.grad_fn()->name(), "ExampleScaleBackward");
  const auto weights = torch::randn({5}, torch::kFloat64);
  const auto grad = torch::autograd::grad({(out * weights).sum()}, {x})[0];
  EXPECT_TRUE(torch::equal(grad, 3 * weights));
  {
    const torch::NoGradGuard guard;
    EXPECT_FALSE(example_scale(x, 3).requires_grad());
  }
}

TEST(ExampleOperator, RefusesSecondDerivatives) {
  const auto x = torch::randn({5}, torch::dtype(torch::kFloat64).requires_grad(true));
  const auto loss = example_scale(x, 3).square().sum();
  const auto grad = torch::autograd::grad({loss}, {x}, {}, true, true)[0];
  EXPECT_THROW(torch::autograd::grad({grad.sum()}, {x}), c10::Error);
}

TEST(ExampleOperator, HasShapesOnMeta) {
  const auto out = example_scale(torch::empty({5}, torch::device(torch::kMeta)), 3);
  EXPECT_EQ(out.sizes(), (torch::IntArrayRef{5}));
  EXPECT_TRUE(out.is_meta());
}

TEST(ExampleOperator, FollowsAutocast) {
  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  const auto out = example_scale(torch::ones({5}), 3);
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  EXPECT_EQ(out.scalar_type(), at::kBFloat16);
}

TEST(ExampleOperator, NamesTheArgumentInErrors) {
  try {
    example_scale(torch::ones({5, 2}), 3);
    FAIL();
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what()).find("example_scale: x must have 1 dimensions [N]"),
              std::string::npos);
  }
}

}  // namespace
