// CUDA kernels of rotary positions,
//   out[b,n,h,2i] + i out[b,n,h,2i+1] = (x[b,n,h,2i] + i x[b,n,h,2i+1]) e^(2 pi i f[h,i] n).
#pragma once

#include "core/rotary.h"
#include "runtime.h"

namespace torch_spe::cuda {

using core::RotaryBackwardParams;
using core::RotaryParams;

void rotary_forward(const RotaryParams& params, Stream stream);

// Bytes of scratch memory on the device, which need not be initialised.
std::size_t rotary_backward_workspace(const RotaryBackwardParams& params);
void rotary_backward(const RotaryBackwardParams& params, void* workspace, Stream stream);

}  // namespace torch_spe::cuda
