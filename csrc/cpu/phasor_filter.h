// CPU kernels of the phasor filter,
//   xhat[b,n,h,2i] + i xhat[b,n,h,2i+1] = sum_d x[b,n,h,d] (c[h,d,i] e^(2 pi i f[h,d,i] n) +
//   constant[h,d,2i] + i constant[h,d,2i+1]).
#pragma once

#include "core/phasor_filter.h"
#include "isa.h"

namespace torch_spe::cpu {

using core::PhasorFilterBackwardParams;
using core::PhasorFilterParams;

TORCH_SPE_DECLARE_KERNEL(phasor_filter_forward, PhasorFilterParams)
TORCH_SPE_DECLARE_KERNEL(phasor_filter_backward, PhasorFilterBackwardParams)

}  // namespace torch_spe::cpu
