// CPU kernels of core/codes.h.
#pragma once

#include "core/codes.h"
#include "isa.h"

namespace torch_spe::cpu {

using core::CircleNoiseParams;
using core::ExactCodeBackwardParams;
using core::ExactCodeParams;
using core::GateCodeBackwardParams;
using core::GateCodeParams;
using core::GateExactCodeBackwardParams;
using core::GateExactCodeParams;
using core::PhaseCodeBackwardParams;
using core::PhaseCodeParams;
using core::PhaseNoiseParams;
using core::SineCodeBackwardParams;
using core::SineCodeParams;

TORCH_SPE_DECLARE_KERNEL(sine_code, SineCodeParams)
TORCH_SPE_DECLARE_KERNEL(sine_code_backward, SineCodeBackwardParams)
TORCH_SPE_DECLARE_KERNEL(exact_code, ExactCodeParams)
TORCH_SPE_DECLARE_KERNEL(exact_code_backward, ExactCodeBackwardParams)
TORCH_SPE_DECLARE_KERNEL(phase_code, PhaseCodeParams)
TORCH_SPE_DECLARE_KERNEL(phase_code_backward, PhaseCodeBackwardParams)
TORCH_SPE_DECLARE_KERNEL(gate_code, GateCodeParams)
TORCH_SPE_DECLARE_KERNEL(gate_code_backward, GateCodeBackwardParams)
TORCH_SPE_DECLARE_KERNEL(gate_exact_code, GateExactCodeParams)
TORCH_SPE_DECLARE_KERNEL(gate_exact_code_backward, GateExactCodeBackwardParams)
TORCH_SPE_DECLARE_KERNEL(phase_noise, PhaseNoiseParams)
TORCH_SPE_DECLARE_KERNEL(circle_noise, CircleNoiseParams)

}  // namespace torch_spe::cpu
