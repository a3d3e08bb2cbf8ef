// Arguments that operators with noise share: its kind and type, and which of it is generated.
#pragma once

#include <string>
#include <string_view>

#include "core/conv_filter.h"
#include "register.h"

namespace torch_spe::ops {

core::NoiseKind to_noise_kind(const char* op, std::string_view kind);

// Types by their names, "float32" and so on: packages of AOTInductor pass the number of a
// ScalarType on as another one's.
at::ScalarType to_scalar_type(const char* op, std::string_view dtype);
std::string name_of(at::ScalarType type);

// One stride for each dimension; one number stands for all dimensions, none for 1.
void check_stride(const char* op, at::IntArrayRef stride, int64_t ndim);
void check_start(const char* op, c10::SymIntArrayRef start, int64_t ndim);

// The generator's parameters, after a look at its limits; `size` counts the positions of the noise.
core::NoiseParams noise_params(const char* op, const at::Tensor& seed, std::string_view kind,
                               at::IntArrayRef stride, c10::SymIntArrayRef start,
                               at::IntArrayRef size, int64_t num_heads, int64_t in_features,
                               int64_t num_realizations);

}  // namespace torch_spe::ops
