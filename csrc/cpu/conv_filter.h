// CPU kernels of the convolution filter,
// xhat[b,n,h,r] = sum_d x[b,n,h,d] (constant[h,d,r] + sum_p kernel[h,d,p] z[h,d,n+p,r]).
#pragma once

#include "core/conv_filter.h"
#include "isa.h"

namespace torch_spe::cpu {

using core::ConvFilterBackwardParams;
using core::ConvFilterParams;
using core::ConvNoiseParams;
using core::NoiseParams;

TORCH_SPE_DECLARE_KERNEL(conv_filter_forward, ConvFilterParams)
TORCH_SPE_DECLARE_KERNEL(conv_filter_backward, ConvFilterBackwardParams)
TORCH_SPE_DECLARE_KERNEL(conv_noise, ConvNoiseParams)

}  // namespace torch_spe::cpu
