// Lets tests run torch_spe's operators on CPU tensors through the emulated CUDA kernels:
//   torch.ops.torch_spe_emulation.enable(True); torch.ops.torch_spe_emulation.set_schedule("lifo")
#include <torch/library.h>

#include <utility>

#include "cuda_emulation.h"
#include "ops/codes.h"
#include "ops/conv_filter.h"
#include "ops/linear_attention.h"
#include "ops/phasor_filter.h"
#include "ops/sine_features.h"
#include "ops/sine_filter.h"

namespace {

// Swaps the CPU kernels of an operator with the emulated ones.
template <class Kernels>
void swap_kernels(Kernels& cpu, Kernels emulated) {
  static Kernels other = emulated;
  std::swap(cpu, other);
}

void enable(bool wanted) {
  static bool enabled = false;
  if (wanted == enabled) return;
  enabled = wanted;
  using namespace torch_spe::ops;
  swap_kernels(code_kernels(c10::kCPU), code_cuda_kernels());
  swap_kernels(conv_filter_kernels(c10::kCPU), conv_filter_cuda_kernels());
  swap_kernels(linear_attention_kernels(c10::kCPU), linear_attention_cuda_kernels());
  swap_kernels(phasor_filter_kernels(c10::kCPU), phasor_filter_cuda_kernels());
  swap_kernels(sine_features_kernels(c10::kCPU), sine_features_cuda_kernels());
  swap_kernels(sine_filter_kernels(c10::kCPU), sine_filter_cuda_kernels());
}

TORCH_LIBRARY(torch_spe_emulation, m) {
  m.def("enable(bool enabled) -> ()", enable);
  m.def("launches() -> int", cuda_emulation::launches);
  m.def("set_schedule(str schedule) -> ()",
        [](const std::string& schedule) { cuda_emulation::set_schedule(schedule); });
}

}  // namespace
