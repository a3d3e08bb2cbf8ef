#include "cuda/sine_filter.h"
#include "cuda_context.h"
#include "sine_filter.h"

namespace torch_spe::ops {

SineFilterKernels sine_filter_cuda_kernels() {
  return {[](const core::SineFilterParams& params, const at::Tensor& x) {
            const CudaContext context(x);
            cuda::sine_filter_forward(params, context.allow_tf32(), context.stream());
          },
          [](const core::SineFilterBackwardParams& params, const at::Tensor& x) {
            const CudaContext context(x);
            const at::Tensor workspace =
                context.workspace(cuda::sine_filter_backward_workspace(params));
            cuda::sine_filter_backward(params, workspace.mutable_data_ptr(), context.allow_tf32(),
                                       context.stream());
          },
          true};
}

}  // namespace torch_spe::ops
