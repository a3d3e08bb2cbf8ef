// Linear attention with a decay per feature, by recurrences: see feature_recurrence.h.
#pragma once

#include "linear_attention.h"

namespace torch_spe::cuda::attention {

std::size_t feature_decay_forward_workspace(const LinearAttentionParams& params);
std::size_t feature_decay_backward_workspace(const LinearAttentionBackwardParams& params);
void feature_decay_forward(const LinearAttentionParams& params, void* workspace, Stream stream);
void feature_decay_backward(const LinearAttentionBackwardParams& params, void* workspace,
                            Stream stream);

}  // namespace torch_spe::cuda::attention
