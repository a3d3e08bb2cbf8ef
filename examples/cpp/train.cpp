// Learns a relative position in C++: queries and keys encoded with sine codes must agree best at a
// lag of 3. Gradients of frequencies and weights go through torch_spe::sine_filter.
#include <torch/torch.h>
#include <torch_spe/torch_spe.h>

#include <iostream>
#include <vector>

int main() {
  torch::manual_seed(0);
  constexpr int64_t length = 64, heads = 2, features = 2, sines = 16, realizations = 64, lag = 3;

  auto freqs = torch::rand({heads, features, sines}).div(2).requires_grad_();
  auto query_weight = torch::randn({heads, features, 2 * sines, realizations}).div(40);
  auto key_weight = query_weight.clone();
  query_weight.requires_grad_();
  key_weight.requires_grad_();
  torch::optim::Adam optimizer(std::vector{freqs, query_weight, key_weight}, 0.003);

  const auto x = torch::ones({1, length, heads, features});  // the content says nothing
  const auto positions = torch::arange(length);
  const auto target = (positions.unsqueeze(1) - positions).eq(lag).to(torch::kFloat);  // [N, N]
  for (int step = 0; step <= 100; ++step) {
    const auto qhat = torch_spe::sine_filter(x, freqs, query_weight);  // [B, N, H, R]
    const auto khat = torch_spe::sine_filter(x, freqs, key_weight);
    const auto logits = torch::einsum("bnhr,bmhr->bhnm", {qhat, khat});
    const auto loss = (logits - target).square().mean();
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    if (step % 20 == 0) std::cout << "step " << step << "  loss " << loss.item<float>() << '\n';
  }
  std::cout << "built with torch " << torch_spe::build_info().torch << '\n';
}
