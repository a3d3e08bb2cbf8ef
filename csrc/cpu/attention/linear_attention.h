// CPU kernels of linear attention, out[n] = sum_m phi(q_n).phi(k_m) v_m / (sum_m phi(q_n).phi(k_m)
// + eps), and its variants (core/linear_attention.h).
#pragma once

#include "core/linear_attention.h"
#include "cpu/isa.h"

namespace torch_spe::cpu {

using core::LinearAttentionBackwardParams;
using core::LinearAttentionParams;

TORCH_SPE_DECLARE_KERNEL(linear_attention_forward, LinearAttentionParams)
TORCH_SPE_DECLARE_KERNEL(linear_attention_backward, LinearAttentionBackwardParams)

}  // namespace torch_spe::cpu
