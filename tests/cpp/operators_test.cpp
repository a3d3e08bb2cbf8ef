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

}  // namespace
