// The kernels of the convolution filter for each device, which the operators call.
#pragma once

#include <ATen/core/Tensor.h>

#include "core/conv_filter.h"

namespace torch_spe::ops {

struct ConvFilterKernels {
  // The tensor tells the device.
  void (*forward)(const core::ConvFilterParams& params, const at::Tensor& x);
  void (*backward)(const core::ConvFilterBackwardParams& params, const at::Tensor& x);
  void (*noise)(const core::ConvNoiseParams& params, const at::Tensor& seed);
};

ConvFilterKernels& conv_filter_kernels(c10::DeviceType device);
ConvFilterKernels conv_filter_cuda_kernels();

}  // namespace torch_spe::ops
