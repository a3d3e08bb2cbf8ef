// The kernels that make codes of sines for each device, which the operators call.
#pragma once

#include <ATen/core/Tensor.h>

#include "core/codes.h"

namespace torch_spe::ops {

struct CodeKernels {
  // `tensor` tells the device.
  void (*sine_code)(const core::SineCodeParams& params, const at::Tensor& tensor);
  void (*sine_code_backward)(const core::SineCodeBackwardParams& params, const at::Tensor& tensor);
  void (*phase_code)(const core::PhaseCodeParams& params, const at::Tensor& tensor);
  void (*phase_code_backward)(const core::PhaseCodeBackwardParams& params,
                              const at::Tensor& tensor);
  void (*gate_code)(const core::GateCodeParams& params, const at::Tensor& tensor);
  void (*gate_code_backward)(const core::GateCodeBackwardParams& params, const at::Tensor& tensor);
  void (*phase_noise)(const core::PhaseNoiseParams& params, const at::Tensor& tensor);
  void (*circle_noise)(const core::CircleNoiseParams& params, const at::Tensor& tensor);
};

CodeKernels& code_kernels(c10::DeviceType device);
CodeKernels code_cuda_kernels();

}  // namespace torch_spe::ops
