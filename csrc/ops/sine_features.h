// The kernels of the sine features for each device, which the operator calls.
#pragma once

#include <ATen/core/Tensor.h>

#include "core/sine_features.h"

namespace torch_spe::ops {

struct SineFeaturesKernels {
  // `x` tells the device.
  void (*forward)(const core::SineFeaturesParams& params, const at::Tensor& x);
  void (*backward)(const core::SineFeaturesBackwardParams& params, const at::Tensor& x);
};

SineFeaturesKernels& sine_features_kernels(c10::DeviceType device);
SineFeaturesKernels sine_features_cuda_kernels();

}  // namespace torch_spe::ops
