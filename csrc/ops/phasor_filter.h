// The kernels of the phasor filter for each device, which the operator calls.
#pragma once

#include <ATen/core/Tensor.h>

#include "core/phasor_filter.h"

namespace torch_spe::ops {

struct PhasorFilterKernels {
  // `x` tells the device.
  void (*forward)(const core::PhasorFilterParams& params, const at::Tensor& x);
  void (*backward)(const core::PhasorFilterBackwardParams& params, const at::Tensor& x);
};

PhasorFilterKernels& phasor_filter_kernels(c10::DeviceType device);
PhasorFilterKernels phasor_filter_cuda_kernels();

}  // namespace torch_spe::ops
