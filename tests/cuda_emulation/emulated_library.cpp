// Lets tests run torch_spe's operators on CPU tensors through the emulated CUDA kernels:
//   torch.ops.torch_spe_emulation.enable(True); torch.ops.torch_spe_emulation.set_schedule("lifo")
#include <torch/library.h>

#include "cuda_emulation.h"
#include "ops/kernels.h"

namespace {

TORCH_LIBRARY(torch_spe_emulation, m) {
  m.def("enable(bool enabled) -> ()", [](bool enabled) {
    using namespace torch_spe::ops;
    use_kernels(enabled ? Slot::kEmulation : Slot::kCpu);
  });
  m.def("launches() -> int", cuda_emulation::launches);
  m.def("set_schedule(str schedule) -> ()",
        [](const std::string& schedule) { cuda_emulation::set_schedule(schedule); });
}

}  // namespace
