// The kernels of the sine filter for each device, which the operator calls.
#pragma once

#include <ATen/core/Tensor.h>

#include "core/sine_filter.h"

namespace torch_spe::ops {

struct SineFilterKernels {
  // `x` tells the device.
  void (*forward)(const core::SineFilterParams& params, const at::Tensor& x);
  void (*backward)(const core::SineFilterBackwardParams& params, const at::Tensor& x);
  bool weight_has_type_of_x;  // otherwise the accumulate type
};

SineFilterKernels& sine_filter_kernels(c10::DeviceType device);
SineFilterKernels sine_filter_cuda_kernels();

}  // namespace torch_spe::ops
