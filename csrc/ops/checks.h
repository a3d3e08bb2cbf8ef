// Argument checks shared by the operators. Every message names the operator's argument, what was
// expected, what came.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "core/dtype.h"

namespace torch_spe::ops {

// Rank and floating type (float32, float64, float16, bfloat16) of a data tensor.
void check_data(const char* op, const char* name, const at::Tensor& tensor, int64_t dim,
                const char* layout);

void check_same_device(const char* op, const char* name, const at::Tensor& tensor,
                       const at::Tensor& reference, const char* reference_name);

// `tensor` has the size `expected` in dimension `dim`.
void check_size(const char* op, const char* name, const at::Tensor& tensor, int64_t dim,
                const c10::SymInt& expected, const char* meaning);

// On the CPU, an error that names the first entry that is NaN or infinite. Elsewhere nothing:
// looking would stall the device.
void check_finite(const char* op, const char* name, const at::Tensor& tensor);

core::DType to_dtype(at::ScalarType type);

// float64 for float64, else float32.
at::ScalarType accumulate_type(at::ScalarType type);

// Marks outputs of a backward operator, so that differentiating them again is an error instead of
// silently wrong.
at::Tensor once_differentiable(const char* op, const at::Tensor& output);

}  // namespace torch_spe::ops
