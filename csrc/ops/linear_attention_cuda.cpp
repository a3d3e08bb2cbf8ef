#include "cuda/linear_attention.h"
#include "cuda_context.h"
#include "linear_attention.h"

namespace torch_spe::ops {

LinearAttentionKernels linear_attention_cuda_kernels() {
  return {[](const core::LinearAttentionParams& params, const at::Tensor& q) {
            const CudaContext context(q);
            const at::Tensor workspace =
                context.workspace(cuda::linear_attention_forward_workspace(params));
            cuda::linear_attention_forward(params, workspace.mutable_data_ptr(),
                                           context.allow_tf32(), context.stream());
          },
          [](const core::LinearAttentionBackwardParams& params, const at::Tensor& q) {
            const CudaContext context(q);
            const at::Tensor workspace =
                context.workspace(cuda::linear_attention_backward_workspace(params));
            cuda::linear_attention_backward(params, workspace.mutable_data_ptr(),
                                            context.allow_tf32(), context.stream());
          }};
}

}  // namespace torch_spe::ops
