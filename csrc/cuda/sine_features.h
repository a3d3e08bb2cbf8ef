// CUDA kernels of the sine features, with e = e^(i (2 pi f n + theta)) for each head, feature d and
// sine k,
//   xhat[b,n,h,2k,d] = x[b,n,h,d] amplitude[h,d,k] Re(e), xhat[b,n,h,2k+1,d] the same with Im(e),
// and last, if there is a constant, xhat[b,n,h,2K,d] = x[b,n,h,d] constant[h,d].
#pragma once

#include "core/sine_features.h"
#include "runtime.h"

namespace torch_spe::cuda {

using core::SineFeaturesBackwardParams;
using core::SineFeaturesParams;

void sine_features_forward(const SineFeaturesParams& params, Stream stream);

// Bytes of scratch memory on the device, which need not be initialised.
std::size_t sine_features_backward_workspace(const SineFeaturesBackwardParams& params);
void sine_features_backward(const SineFeaturesBackwardParams& params, void* workspace,
                            Stream stream);

}  // namespace torch_spe::cuda
