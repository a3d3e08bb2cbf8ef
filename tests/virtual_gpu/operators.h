// Which kernels the operators run on CPU tensors.
#pragma once

namespace vgpu {

// The CUDA kernels' launchers in place of the CPU's kernels, or the CPU's again. The only part of
// the virtual GPU that knows torch_spe's operators.
void use_cuda_kernels(bool wanted);

}  // namespace vgpu
