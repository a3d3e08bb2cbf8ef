// Runs a layer that Python has compiled ahead of time, for sequences of any length:
//
//   run_package MODEL.pt2 B N C
//
// docs/pytorch.md shows how the package is made. Linking the library registers its operators.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>
#include <torch_spe/torch_spe.h>

#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: run_package MODEL.pt2 B N C\n";
    return 2;
  }
  std::cout << "torch_spe " << torch_spe::build_info().version << '\n';
  const c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const std::vector<std::int64_t> sizes{std::atoll(argv[2]), std::atoll(argv[3]),
                                        std::atoll(argv[4])};
  const at::Tensor x = torch::linspace(-1, 1, sizes[0] * sizes[1] * sizes[2]).view(sizes);
  const at::Tensor out = model.run({x})[0];
  std::cout << "output " << out.sizes() << ", mean square " << out.square().mean().item<double>()
            << '\n';
}
