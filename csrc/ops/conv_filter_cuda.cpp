#include "conv_filter.h"
#include "cuda/conv_filter.h"
#include "cuda_context.h"

namespace torch_spe::ops {

ConvFilterKernels conv_filter_cuda_kernels() {
  return {[](const core::ConvFilterParams& params, const at::Tensor& x) {
            const CudaContext context(x);
            cuda::conv_filter_forward(params, context.allow_tf32(), context.stream());
          },
          [](const core::ConvFilterBackwardParams& params, const at::Tensor& x) {
            const CudaContext context(x);
            const at::Tensor workspace =
                context.workspace(cuda::conv_filter_backward_workspace(params));
            cuda::conv_filter_backward(params, workspace.mutable_data_ptr(), context.allow_tf32(),
                                       context.stream());
          },
          [](const core::ConvNoiseParams& params, const at::Tensor& seed) {
            const CudaContext context(seed);
            cuda::conv_noise(params, context.stream());
          }};
}

}  // namespace torch_spe::ops
