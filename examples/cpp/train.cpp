// Learns in C++ to recall what came three positions earlier: sine codes encode queries and keys of
// linear attention, and gradients flow through both operators into frequencies and weights.
#include <torch/torch.h>
#include <torch_spe/torch_spe.h>

#include <iostream>
#include <vector>

int main() {
  torch::manual_seed(0);
  constexpr int64_t batch = 8, length = 64, heads = 2, features = 2, values = 8;
  constexpr int64_t sines = 16, realizations = 64, lag = 3;

  auto freqs = torch::rand({heads, features, sines}).div(2).requires_grad_();
  auto query_weight = torch::randn({heads, features, 2 * sines, realizations}).div(40);
  auto key_weight = query_weight.clone();
  query_weight.requires_grad_();
  key_weight.requires_grad_();
  torch::optim::Adam optimizer(std::vector{freqs, query_weight, key_weight}, 0.003);

  const auto x = torch::ones({1, length, heads, features});  // the content says nothing
  for (int step = 0; step <= 60; ++step) {
    const auto v = torch::randn({batch, length, heads, values});
    const auto target = torch::constant_pad_nd(v.narrow(1, 0, length - lag), {0, 0, 0, 0, lag, 0});

    const auto qhat = torch_spe::sine_filter(x, freqs, query_weight);  // [1, N, H, R]
    const auto khat = torch_spe::sine_filter(x, freqs, key_weight);
    const std::vector<int64_t> shape{batch, length, heads, realizations};
    const auto [out, s, z] = torch_spe::linear_attention(qhat.expand(shape), khat.expand(shape), v,
                                                         "identity", /*causal=*/true,
                                                         /*normalize=*/false);
    const auto loss = (out - target).square().mean();

    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    if (step % 20 == 0) std::cout << "step " << step << "  loss " << loss.item<float>() << '\n';
  }
  std::cout << "built with torch " << torch_spe::build_info().torch << '\n';
}
