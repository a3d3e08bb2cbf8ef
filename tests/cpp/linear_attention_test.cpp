#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_spe/torch_spe.h>

namespace {

using torch::Tensor;

// Causal, with elu + 1 and its normalizer, through the N x N matrix.
Tensor plain_attention(const Tensor& q, const Tensor& k, const Tensor& v) {
  const Tensor weights =
      torch::einsum("bnhr,bmhr->bhnm", {torch::elu(q) + 1, torch::elu(k) + 1}).tril();
  const Tensor sums = weights.sum(-1).transpose(1, 2).unsqueeze(-1);
  return torch::einsum("bhnm,bmhe->bnhe", {weights, v}) / (sums + 1e-6);
}

TEST(LinearAttention, AgreesWithThePlainEquationsAndTheirGradients) {
  torch::manual_seed(0);
  const auto options = torch::dtype(torch::kFloat64).requires_grad(true);
  const Tensor q = torch::randn({2, 70, 2, 3}, options);
  const Tensor k = torch::randn({2, 70, 2, 3}, options);
  const Tensor v = torch::randn({2, 70, 2, 5}, options);
  const Tensor out = std::get<0>(torch_spe::linear_attention(q, k, v, "elu", true));
  const Tensor expected = plain_attention(q, k, v);
  EXPECT_TRUE(torch::allclose(out, expected, 1e-12, 1e-12));

  const Tensor grad = torch::randn_like(expected);
  const auto grads = torch::autograd::grad({out}, {q, k, v}, {grad});
  const auto expected_grads = torch::autograd::grad({expected}, {q, k, v}, {grad});
  for (size_t i = 0; i < 3; ++i)
    EXPECT_TRUE(torch::allclose(grads[i], expected_grads[i], 1e-10, 1e-10));
}

TEST(LinearAttention, ContinuesFromAState) {
  torch::manual_seed(0);
  const Tensor q = torch::randn({1, 100, 2, 4}), k = torch::randn({1, 100, 2, 4}),
               v = torch::randn({1, 100, 2, 3});
  const auto part = [](const Tensor& t, int64_t begin, int64_t end) {
    return t.slice(1, begin, end);
  };
  const auto [whole, s, z] = torch_spe::linear_attention(q, k, v, "relu", true, true, 1e-6, {}, {},
                                                         {}, {}, /*return_state=*/true);
  const auto [first, s1, z1] =
      torch_spe::linear_attention(part(q, 0, 37), part(k, 0, 37), part(v, 0, 37), "relu", true,
                                  true, 1e-6, {}, {}, {}, {}, true);
  const auto [second, s2, z2] =
      torch_spe::linear_attention(part(q, 37, 100), part(k, 37, 100), part(v, 37, 100), "relu",
                                  true, true, 1e-6, {}, {}, s1, z1, true);
  EXPECT_TRUE(torch::allclose(torch::cat({first, second}, 1), whole, 1e-4, 1e-5));
  EXPECT_TRUE(torch::allclose(s2, s, 1e-4, 1e-5));
  EXPECT_TRUE(torch::allclose(z2, z, 1e-4, 1e-5));
}

TEST(LinearAttention, NamesTheArgumentThatIsWrong) {
  const Tensor q = torch::randn({1, 4, 2, 3}), k = torch::randn({1, 5, 2, 3}),
               v = torch::randn({1, 5, 2, 3});
  try {
    torch_spe::linear_attention(q, k, v, "elu", true);
    FAIL() << "no error for a causal pass with fewer queries than keys";
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what()).find("k must be as long as q"), std::string::npos);
  }
  EXPECT_THROW(torch_spe::linear_attention(q, k, v, "gelu"), c10::Error);
}

}  // namespace
