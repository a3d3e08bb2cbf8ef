#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_spe/torch_spe.h>

#include "core/linear_attention.h"
#include "core/sine_features.h"
#include "ops/kernels.h"

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

// The CPU kernel as one of another device, which knows nothing of encoders.
template <class Params>
void register_alternative() {
  auto& slots = torch_spe::ops::kernel_slots(typeid(Params)).slots;
  slots[static_cast<int>(torch_spe::ops::Slot::kAlternative)] =
      slots[static_cast<int>(torch_spe::ops::Slot::kCpu)];
}

TEST(SineAttention, IsAnEncoderAndAttentionOnEveryDevice) {
  using namespace torch_spe;
  register_alternative<core::LinearAttentionParams>();
  register_alternative<core::LinearAttentionBackwardParams>();
  register_alternative<core::SineFeaturesParams>();
  register_alternative<core::SineFeaturesBackwardParams>();
  torch::manual_seed(0);
  const auto options = torch::dtype(torch::kFloat64).requires_grad(true);
  const auto q = torch::randn({2, 70, 2, 3}, options), k = torch::randn({2, 70, 2, 3}, options);
  const auto v = torch::randn({2, 70, 2, 5}, options), freqs = torch::rand({2, 3, 1}, options);
  const auto amplitudes = torch::randn({2, 3, 1}, options);
  const auto offsets = torch::randn({2, 3, 1}, options), constant = torch::randn({2, 3}, options);
  const auto decay = torch::rand({2}, options).neg().detach().requires_grad_();
  const std::vector<torch::Tensor> inputs{q, k, v, freqs, amplitudes, offsets, constant, decay};
  const auto run = [&](const torch::Tensor& out) {
    auto all = torch::autograd::grad({out.square().sum()}, inputs);
    all.push_back(out);
    return all;
  };
  const auto qhat = sine_features(q, freqs, amplitudes, offsets, constant, {}, 9, "elu");
  const auto khat = sine_features(k, freqs, amplitudes, {}, constant, {}, 9, "elu");
  const auto expected =
      run(std::get<0>(linear_attention(qhat, khat, v, "identity", true, false, 1e-6, {}, {}, {}, {},
                                       false, {}, {}, "identity", true, decay)));
  for (const bool alternative : {false, true}) {
    ops::use_alternative_kernels(alternative);
    const auto got =
        run(sine_attention(q, k, v, freqs, amplitudes, offsets, constant, 9, "elu", "identity",
                           true, false, 1e-6, {}, {}, {}, "identity", true, decay));
    for (size_t i = 0; i < got.size(); ++i)
      EXPECT_TRUE(torch::allclose(got[i], expected[i], 1e-9, 1e-9)) << alternative << ", " << i;
  }
  ops::use_alternative_kernels(false);
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
