#include <torch/version.h>

#include <sstream>

#include "cpu/isa.h"
#include "torch_spe/torch_spe.h"

namespace torch_spe {

BuildInfo build_info() {
  BuildInfo info;
  info.version = TORCH_SPE_VERSION;
  info.torch = TORCH_VERSION;
  info.compiler = TORCH_SPE_COMPILER;
  info.cuda = TORCH_SPE_CUDA_VERSION;
  std::istringstream architectures(TORCH_SPE_CUDA_ARCHITECTURES);
  for (std::string name; architectures >> name;) info.cuda_architectures.push_back(name);
  info.instruction_set = cpu::isa_name(cpu::active_isa());
  return info;
}

}  // namespace torch_spe
