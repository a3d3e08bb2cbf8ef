// The kernels of linear attention for each device, which the operator calls.
#pragma once

#include <ATen/core/Tensor.h>

#include "core/linear_attention.h"

namespace torch_spe::ops {

struct LinearAttentionKernels {
  // `q` tells the device.
  void (*forward)(const core::LinearAttentionParams& params, const at::Tensor& q);
  void (*backward)(const core::LinearAttentionBackwardParams& params, const at::Tensor& q);
};

LinearAttentionKernels& linear_attention_kernels(c10::DeviceType device);
LinearAttentionKernels linear_attention_cuda_kernels();

}  // namespace torch_spe::ops
