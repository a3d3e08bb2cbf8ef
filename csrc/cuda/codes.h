// CUDA kernels of core/codes.h.
#pragma once

#include "core/codes.h"
#include "runtime.h"

namespace torch_spe::cuda {

void sine_code(const core::SineCodeParams& params, Stream stream);
void sine_code_backward(const core::SineCodeBackwardParams& params, Stream stream);
void exact_code(const core::ExactCodeParams& params, Stream stream);
void exact_code_backward(const core::ExactCodeBackwardParams& params, Stream stream);
void phase_code(const core::PhaseCodeParams& params, Stream stream);
void phase_code_backward(const core::PhaseCodeBackwardParams& params, Stream stream);
void gate_code(const core::GateCodeParams& params, Stream stream);
void gate_code_backward(const core::GateCodeBackwardParams& params, Stream stream);
void gate_exact_code(const core::GateExactCodeParams& params, Stream stream);
void gate_exact_code_backward(const core::GateExactCodeBackwardParams& params, Stream stream);
void phase_noise(const core::PhaseNoiseParams& params, Stream stream);
void circle_noise(const core::CircleNoiseParams& params, Stream stream);

}  // namespace torch_spe::cuda
