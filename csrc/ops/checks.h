// Argument checks shared by the operators. Every message names the operator's argument, what was
// expected, what came.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Scalar.h>

#include <optional>
#include <string_view>

#include "core/dtype.h"
#include "core/feature_map.h"

namespace torch_spe::ops {

using OptionalTensor = std::optional<at::Tensor>;

// Rank and floating type (float32, float64, float16, bfloat16) of a data tensor.
void check_data(const char* op, const char* name, const at::Tensor& tensor, int64_t dim,
                const char* layout);

void check_same_device(const char* op, const char* name, const at::Tensor& tensor,
                       const at::Tensor& reference, const char* reference_name);

// `tensor` has the size `expected` in dimension `dim`.
void check_size(const char* op, const char* name, const at::Tensor& tensor, int64_t dim,
                const c10::SymInt& expected, const char* meaning);

// Parameters have the type of x, or float32 beside a half-precision x.
void check_parameter_type(const char* op, const char* name, const at::Tensor& tensor,
                          const at::Tensor& x, const char* x_name = "x");

// Positions [N] or [N, ndim] for x [B, N, H, D] and freqs [H, D, *] or [H, D, *, ndim]; without
// them, ndim is 1 and start is finite.
void check_positions(const char* op, const OptionalTensor& positions, const c10::Scalar& start,
                     const at::Tensor& freqs, const at::Tensor& x);

// The gradient of an operator's output: the type and device of x, and the output's shape, which is
// that of x but for its last size.
void check_grad_out(const char* op, const at::Tensor& grad_out, const at::Tensor& x,
                    const c10::SymInt& last);

// On the CPU, an error that names the first entry that is NaN or infinite. Elsewhere nothing:
// looking would stall the device.
void check_finite(const char* op, const char* name, const at::Tensor& tensor);

core::DType to_dtype(at::ScalarType type);

// float64 for float64, else float32.
at::ScalarType accumulate_type(at::ScalarType type);

// phi of its name.
core::FeatureMap to_feature_map(const char* op, const char* name, std::string_view map);

// The gradient of an output called `name`: its sizes, type and device.
void check_gradient(const char* op, const char* name, const at::Tensor& grad,
                    c10::SymIntArrayRef sizes, const at::TensorOptions& options);

// One int64.
void check_seed(const char* op, const at::Tensor& seed);

}  // namespace torch_spe::ops
