#include "codes.h"
#include "cuda/codes.h"
#include "cuda_context.h"

namespace torch_spe::ops {
namespace {

template <auto kernel, class Params>
void run(const Params& params, const at::Tensor& tensor) {
  const CudaContext context(tensor);
  kernel(params, context.stream());
}

}  // namespace

CodeKernels code_cuda_kernels() {
  return {run<cuda::sine_code>,   run<cuda::sine_code_backward>,
          run<cuda::phase_code>,  run<cuda::phase_code_backward>,
          run<cuda::gate_code>,   run<cuda::gate_code_backward>,
          run<cuda::phase_noise>, run<cuda::circle_noise>};
}

}  // namespace torch_spe::ops
