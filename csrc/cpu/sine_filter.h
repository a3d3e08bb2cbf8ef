// CPU kernels of the sine filter, xhat[b,n,h,r] = sum_d x[b,n,h,d] sum_j basis_dj(n)
// weight[h,d,j,r].
#pragma once

#include "core/sine_filter.h"
#include "isa.h"

namespace torch_spe::cpu {

using core::SineFilterBackwardParams;
using core::SineFilterParams;

TORCH_SPE_DECLARE_KERNEL(sine_filter_forward, SineFilterParams)
TORCH_SPE_DECLARE_KERNEL(sine_filter_backward, SineFilterBackwardParams)

}  // namespace torch_spe::cpu
