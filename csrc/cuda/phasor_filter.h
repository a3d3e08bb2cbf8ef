// CUDA kernels of the phasor filter,
//   xhat[b,n,h,2i] + i xhat[b,n,h,2i+1] = sum_d x[b,n,h,d] (c[h,d,i] e^(2 pi i f[h,d,i] n) +
//   constant[h,d,2i] + i constant[h,d,2i+1]).
#pragma once

#include "core/phasor_filter.h"
#include "runtime.h"

namespace torch_spe::cuda {

using core::PhasorFilterBackwardParams;
using core::PhasorFilterParams;

void phasor_filter_forward(const PhasorFilterParams& params, Stream stream);

// Bytes of scratch memory on the device, which need not be initialised.
std::size_t phasor_filter_backward_workspace(const PhasorFilterBackwardParams& params);
void phasor_filter_backward(const PhasorFilterBackwardParams& params, void* workspace,
                            Stream stream);

}  // namespace torch_spe::cuda
