#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_spe/torch_spe.h>

namespace {

// xhat[b,n,h,r] = sum_d x[b,n,h,d] (constant[h,d,r] + sum_p kernel[h,d,p] z[h,d,n+p,r]), number by
// number.
torch::Tensor plain(const torch::Tensor& x, const torch::Tensor& kernel, const torch::Tensor& noise,
                    const torch::Tensor& constant) {
  const auto length = x.size(1), taps = kernel.size(2), real = noise.size(3);
  auto out = torch::zeros({x.size(0), length, x.size(2), real}, x.options());
  auto o = out.accessor<double, 4>();
  const auto a = x.accessor<double, 4>(), z = noise.accessor<double, 4>();
  const auto k = kernel.accessor<double, 3>(), c = constant.accessor<double, 3>();
  for (int64_t b = 0; b < x.size(0); ++b) {
    for (int64_t n = 0; n < length; ++n) {
      for (int64_t h = 0; h < x.size(2); ++h) {
        for (int64_t d = 0; d < x.size(3); ++d) {
          for (int64_t r = 0; r < real; ++r) {
            double code = c[h][d][r];
            for (int64_t p = 0; p < taps; ++p) code += k[h][d][p] * z[h][d][n + p][r];
            o[b][n][h][r] += a[b][n][h][d] * code;
          }
        }
      }
    }
  }
  return out;
}

struct Arguments {
  torch::Tensor x, kernel, constant, seed;

  Arguments() {
    torch::manual_seed(0);
    x = torch::randn({2, 50, 2, 3}, torch::kFloat64);
    kernel = torch::randn({2, 3, 9}, torch::kFloat64);
    constant = torch::randn({2, 3, 8}, torch::kFloat64);
    seed = torch::tensor({int64_t{5}});
  }

  torch::Tensor run(int64_t stride) const {
    return torch_spe::conv_filter(x, kernel, {}, constant, seed, 8, "gaussian", {stride}, {-20});
  }
  torch::Tensor noise(int64_t stride) const {
    return torch_spe::conv_noise(seed, 2, 3, {50 + 9 - 1}, 8, "gaussian", {stride}, {-20},
                                 torch::kFloat64);
  }
};

TEST(ConvFilter, GivesTheFormulasValues) {
  const Arguments a;
  for (int64_t stride : {1, 4}) {
    const auto expected = plain(a.x, a.kernel, a.noise(stride), a.constant);
    EXPECT_LT((a.run(stride) - expected).abs().max().item<double>(), 1e-12);
    const auto given = torch_spe::conv_filter(a.x, a.kernel, a.noise(stride), a.constant);
    EXPECT_LT((given - expected).abs().max().item<double>(), 1e-12);
  }
}

// The output is linear in x, and in kernel and constant together: the scalar product of a gradient
// with its argument is that of the output with its gradient.
TEST(ConvFilter, DifferentiatesWhatItComputes) {
  for (int64_t stride : {1, 4}) {
    Arguments a;
    for (auto* t : {&a.x, &a.kernel, &a.constant}) t->requires_grad_();
    const auto out = a.run(stride);
    const auto grad = torch::randn_like(out);
    out.backward(grad);
    const auto dot = [](const torch::Tensor& s, const torch::Tensor& t) {
      return (s * t).sum().item<double>();
    };
    const double expected = dot(out, grad);
    EXPECT_NEAR(dot(a.x.grad(), a.x), expected, 1e-9);
    EXPECT_NEAR(dot(a.kernel.grad(), a.kernel) + dot(a.constant.grad(), a.constant), expected,
                1e-9);
    // And not only along the argument itself.
    const torch::NoGradGuard guard;
    Arguments other;
    other.x = torch::randn_like(a.x);
    EXPECT_NEAR(dot(a.x.grad(), other.x), dot(other.run(stride), grad), 1e-9);
  }
}

TEST(ConvFilter, NamesTheArgumentInErrors) {
  Arguments a;
  a.kernel = torch::randn({2, 4, 9}, torch::kFloat64);
  try {
    a.run(1);
    FAIL() << "expected an error";
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what()).find("kernel must have size 3 (D of x)"),
              std::string::npos);
  }
}

}  // namespace
