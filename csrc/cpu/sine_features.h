// CPU kernels of the sine features, with e = e^(i (2 pi f n + theta)) for each head, feature d and
// sine k,
//   xhat[b,n,h,2k,d] = x[b,n,h,d] amplitude[h,d,k] Re(e), xhat[b,n,h,2k+1,d] the same with Im(e),
// and last, if there is a constant, xhat[b,n,h,2K,d] = x[b,n,h,d] constant[h,d].
#pragma once

#include "core/sine_features.h"
#include "isa.h"

namespace torch_spe::cpu {

using core::SineFeaturesBackwardParams;
using core::SineFeaturesParams;

TORCH_SPE_DECLARE_KERNEL(sine_features_forward, SineFeaturesParams)
TORCH_SPE_DECLARE_KERNEL(sine_features_backward, SineFeaturesBackwardParams)

}  // namespace torch_spe::cpu
