// Linear attention with a decay per feature: see feature_fading.h.
#pragma once

#include "linear_attention.h"

namespace torch_spe::cuda::attention {

std::size_t feature_decay_forward_workspace(const LinearAttentionParams& params);
std::size_t feature_decay_backward_workspace(const LinearAttentionBackwardParams& params);
void feature_decay_forward(const LinearAttentionParams& params, void* workspace, bool allow_tf32,
                           Stream stream);
void feature_decay_backward(const LinearAttentionBackwardParams& params, void* workspace,
                            bool allow_tf32, Stream stream);

}  // namespace torch_spe::cuda::attention
