// Linear attention for one token of each sequence, forward.
#pragma once

#include "core/linear_attention.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

// N = M = 1, not packed: each query sees its own key and the initial state, a step of decoding.
void linear_attention_one_position(const core::LinearAttentionParams& p);

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
