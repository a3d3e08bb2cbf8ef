// Checks and parameters that the operators share which make codes of sines and gate them. The
// modules call them; what they compute stands in core/codes.h.
#pragma once

#include <vector>

#include "core/codes.h"
#include "kernels.h"
#include "params.h"
#include "register.h"

namespace torch_spe::ops {

using Sizes = std::vector<c10::SymInt>;

// Sizes, device and type, those of `reference`: float32 or float64.
void check_like(const char* op, const char* name, const at::Tensor& tensor, const Sizes& sizes,
                const char* reference_name, const at::Tensor& reference);
void check_sizes(const char* op, const char* name, const at::Tensor& tensor, const Sizes& sizes);

// `sizes`, and the dimension of positions if frequencies have one.
Sizes with_grid(Sizes sizes, const at::Tensor& freqs);

struct SineParameterArguments {
  at::Tensor freqs;    // [H, D, K] or [H, D, K, ndim]
  at::Tensor offsets;  // [H, D, K]
  at::Tensor gains;    // [H, D, K]
  double scale;
};

// Returns [H, D, K].
Sizes check_parameters(const char* op, const SineParameterArguments& a);
void fill_parameters(core::SineParameters& p, const SineParameterArguments& a, KernelTensors& kept);
// The same without offsets.
Sizes check_sines(const char* op, const at::Tensor& freqs, const at::Tensor& gains);
void fill_sines(core::SineParameters& p, const at::Tensor& freqs, const at::Tensor& gains,
                double scale, KernelTensors& kept);

// The gradient of output i, contiguous; zeros where there is none.
template <class Op>
const void* gradient_or_zeros(const BackwardCall<Op>& b, std::size_t i, KernelTensors& kept) {
  if (b.grads[i].defined()) return kept.contiguous(b.grads[i]);
  const TensorSpec spec = Op::results(b.arguments)[i];
  return kept.contiguous(at::zeros_symint(spec.sizes, spec.options));
}

}  // namespace torch_spe::ops
