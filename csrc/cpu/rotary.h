// CPU kernels of rotary positions: features 2i and 2i + 1 of phi(x[b,n,h]) rotated by the angle
// 2 pi freqs[h,i] n.
#pragma once

#include "core/rotary.h"
#include "isa.h"

namespace torch_spe::cpu {

using core::RotaryBackwardParams;
using core::RotaryParams;

TORCH_SPE_DECLARE_KERNEL(rotary_forward, RotaryParams)
TORCH_SPE_DECLARE_KERNEL(rotary_backward, RotaryBackwardParams)

}  // namespace torch_spe::cpu
