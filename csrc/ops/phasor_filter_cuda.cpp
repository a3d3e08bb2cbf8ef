#include "cuda/phasor_filter.h"
#include "cuda_context.h"
#include "phasor_filter.h"

namespace torch_spe::ops {

PhasorFilterKernels phasor_filter_cuda_kernels() {
  return {[](const core::PhasorFilterParams& params, const at::Tensor& x) {
            const CudaContext context(x);
            cuda::phasor_filter_forward(params, context.stream());
          },
          [](const core::PhasorFilterBackwardParams& params, const at::Tensor& x) {
            const CudaContext context(x);
            const at::Tensor workspace =
                context.workspace(cuda::phasor_filter_backward_workspace(params));
            cuda::phasor_filter_backward(params, workspace.mutable_data_ptr(), context.stream());
          }};
}

}  // namespace torch_spe::ops
