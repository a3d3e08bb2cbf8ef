// CUDA kernels of linear attention, out[n] = sum_m phi(q_n).phi(k_m) v_m / (sum_m phi(q_n).phi(k_m)
// + eps).
#pragma once

#include "core/linear_attention.h"
#include "runtime.h"

namespace torch_spe::cuda {

using core::LinearAttentionBackwardParams;
using core::LinearAttentionParams;

// Bytes of scratch memory on the device, which need not be initialised.
std::size_t linear_attention_forward_workspace(const LinearAttentionParams& params);
std::size_t linear_attention_backward_workspace(const LinearAttentionBackwardParams& params);

void linear_attention_forward(const LinearAttentionParams& params, void* workspace, bool allow_tf32,
                              Stream stream);
void linear_attention_backward(const LinearAttentionBackwardParams& params, void* workspace,
                               bool allow_tf32, Stream stream);

}  // namespace torch_spe::cuda
