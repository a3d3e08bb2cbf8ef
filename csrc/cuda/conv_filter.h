// CUDA kernels of the convolution filter,
// xhat[b,n,h,r] = sum_d x[b,n,h,d] (constant[h,d,r] + sum_p kernel[h,d,p] z[h,d,n+p,r]).
#pragma once

#include "core/conv_filter.h"
#include "runtime.h"

namespace torch_spe::cuda {

using core::ConvFilterBackwardParams;
using core::ConvFilterParams;
using core::ConvNoiseParams;

void conv_filter_forward(const ConvFilterParams& params, bool allow_tf32, Stream stream);

// Bytes of scratch memory on the device, which need not be initialised.
std::size_t conv_filter_backward_workspace(const ConvFilterBackwardParams& params);
void conv_filter_backward(const ConvFilterBackwardParams& params, void* workspace, bool allow_tf32,
                          Stream stream);

void conv_noise(const ConvNoiseParams& params, Stream stream);

}  // namespace torch_spe::cuda
