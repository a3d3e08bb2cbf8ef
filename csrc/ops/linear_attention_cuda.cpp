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
            core::LinearAttentionBackwardParams full = params;
            at::Tensor out, divisor;
            if (full.normalize && full.saved_row_divisor == nullptr) {
              core::LinearAttentionParams forward = params;
              const auto wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
              out =
                  at::empty({q.size(0), q.size(1), q.size(2), params.value_features}, q.options());
              divisor = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(wide));
              forward.out = out.mutable_data_ptr();
              forward.row_divisor = divisor.mutable_data_ptr();
              forward.final_s = forward.final_z = nullptr;
              const at::Tensor space =
                  context.workspace(cuda::linear_attention_forward_workspace(forward));
              cuda::linear_attention_forward(forward, space.mutable_data_ptr(),
                                             context.allow_tf32(), context.stream());
              full.saved_row_divisor = divisor.const_data_ptr();
            }
            const at::Tensor workspace =
                context.workspace(cuda::linear_attention_backward_workspace(full));
            cuda::linear_attention_backward(full, workspace.mutable_data_ptr(),
                                            context.allow_tf32(), context.stream());
          }};
}

}  // namespace torch_spe::ops
