#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_spe/torch_spe.h>

namespace {

TEST(SineFilter, EncodesAndDifferentiates) {
  torch::manual_seed(0);
  const auto options = torch::dtype(torch::kFloat64).requires_grad(true);
  const auto x = torch::randn({2, 70, 2, 3}, options);
  const auto freqs = torch::rand({2, 3, 2}, options);
  const auto weight = torch::randn({2, 3, 4, 5}, options);
  const auto out = torch_spe::sine_filter(x, freqs, weight);
  EXPECT_EQ(out.sizes(), (torch::IntArrayRef{2, 70, 2, 5}));
}

// xhat of the codes themselves, stored.
torch::Tensor contract(const torch::Tensor& x, const torch::Tensor& code) {
  return torch::einsum("bnhd,nhdr->bnhr", {x, code});
}

TEST(PhasorFilter, EncodesAndDifferentiates) {
  torch::manual_seed(0);
  const auto options = torch::dtype(torch::kFloat64).requires_grad(true);
  const auto x = torch::randn({2, 70, 2, 3}, options);
  const auto freqs = torch::rand({2, 3, 4}, options);
  const auto coefficients = torch::randn({2, 3, 4, 2}, options);
  const auto out = torch_spe::phasor_filter(x, freqs, coefficients, {}, {}, 5);
  const auto positions = torch::arange(5, 75, torch::kFloat64).reshape({70, 1, 1, 1});
  const auto phases = 2 * M_PI * freqs * positions;
  const auto re = coefficients.select(-1, 0), im = coefficients.select(-1, 1);
  const auto code =
      torch::stack({re * phases.cos() - im * phases.sin(), im * phases.cos() + re * phases.sin()},
                   -1)
          .flatten(-2);
  const auto expected = contract(x, code);
  EXPECT_TRUE(torch::allclose(out, expected, 1e-11, 1e-11));
  const auto weights = torch::randn_like(out);
  const auto got = torch::autograd::grad({(out * weights).sum()}, {x, freqs, coefficients});
  const auto want = torch::autograd::grad({(expected * weights).sum()}, {x, freqs, coefficients});
  for (size_t i = 0; i < got.size(); ++i)
    EXPECT_TRUE(torch::allclose(got[i], want[i], 1e-9, 1e-9)) << "gradient " << i;
}

TEST(SineFeatures, EncodesAndDifferentiates) {
  torch::manual_seed(0);
  const auto options = torch::dtype(torch::kFloat64).requires_grad(true);
  const auto x = torch::randn({2, 70, 2, 3}, options);
  const auto freqs = torch::rand({2, 3, 4}, options);
  const auto amplitudes = torch::randn({2, 3, 4}, options);
  const auto offsets = torch::randn({2, 3, 4}, options);
  const auto out = torch_spe::sine_features(x, freqs, amplitudes, offsets);
  const auto positions = torch::arange(70, torch::kFloat64).reshape({70, 1, 1, 1});
  const auto phases = 2 * M_PI * freqs * positions + offsets;
  const auto basis =
      (torch::stack({phases.cos(), phases.sin()}, -1) * amplitudes.unsqueeze(-1)).flatten(-2);
  const auto expected = (x.unsqueeze(-2) * basis.transpose(-1, -2)).flatten(-2);
  EXPECT_TRUE(torch::allclose(out, expected, 1e-11, 1e-11));
  const auto weights = torch::randn_like(out);
  const std::vector<torch::Tensor> inputs{x, freqs, amplitudes, offsets};
  const auto got = torch::autograd::grad({(out * weights).sum()}, inputs);
  const auto want = torch::autograd::grad({(expected * weights).sum()}, inputs);
  for (size_t i = 0; i < got.size(); ++i)
    EXPECT_TRUE(torch::allclose(got[i], want[i], 1e-9, 1e-9)) << "gradient " << i;
}

}  // namespace
