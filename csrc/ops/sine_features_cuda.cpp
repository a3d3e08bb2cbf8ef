#include "cuda/sine_features.h"
#include "cuda_context.h"
#include "sine_features.h"

namespace torch_spe::ops {

SineFeaturesKernels sine_features_cuda_kernels() {
  return {[](const core::SineFeaturesParams& params, const at::Tensor& x) {
            const CudaContext context(x);
            cuda::sine_features_forward(params, context.stream());
          },
          [](const core::SineFeaturesBackwardParams& params, const at::Tensor& x) {
            const CudaContext context(x);
            const at::Tensor workspace =
                context.workspace(cuda::sine_features_backward_workspace(params));
            cuda::sine_features_backward(params, workspace.mutable_data_ptr(), context.stream());
          }};
}

}  // namespace torch_spe::ops
