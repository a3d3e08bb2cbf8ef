// CUDA kernels of the sine filter, xhat[b,n,h,r] = sum_d x[b,n,h,d] sum_j basis_dj(n)
// weight[h,d,j,r].
#pragma once

#include "core/sine_filter.h"
#include "runtime.h"

namespace torch_spe::cuda {

using core::SineFilterBackwardParams;
using core::SineFilterParams;

void sine_filter_forward(const SineFilterParams& params, bool allow_tf32, Stream stream);

// Bytes of scratch memory on the device, which need not be initialised.
std::size_t sine_filter_backward_workspace(const SineFilterBackwardParams& params);
void sine_filter_backward(const SineFilterBackwardParams& params, void* workspace, bool allow_tf32,
                          Stream stream);

}  // namespace torch_spe::cuda
