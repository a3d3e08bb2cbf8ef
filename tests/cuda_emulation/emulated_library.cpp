// Lets tests run torch_spe's operators on CPU tensors through the emulated CUDA kernels:
//   torch.ops.torch_spe_emulation.enable(True); torch.ops.torch_spe_emulation.set_schedule("lifo")
#include <torch/library.h>

#include "cuda_emulation.h"
#include "ops/kernels.h"

namespace torch_spe::ops {
bool register_cuda_kernels();
}

namespace {

// Another library of this kind may have been loaded after this one.
void enable(bool enabled) {
  if (enabled) torch_spe::ops::register_cuda_kernels();
  torch_spe::ops::use_alternative_kernels(enabled);
}

TORCH_LIBRARY(torch_spe_emulation, m) {
  m.def("enable(bool enabled) -> ()", enable);
  m.def("launches() -> int", cuda_emulation::launches);
  m.def("set_schedule(str schedule) -> ()",
        [](const std::string& schedule) { cuda_emulation::set_schedule(schedule); });
}

}  // namespace
