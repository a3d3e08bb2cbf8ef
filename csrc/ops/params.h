// How parameters of kernels are filled from tensors.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <utility>

#include "checks.h"

namespace torch_spe::ops {

// The tensors that a kernel reads, in the form in which it reads them, as long as this lives.
class KernelTensors {
 public:
  // Contiguous and of a type; null for none.
  const void* contiguous(const at::Tensor& tensor, at::ScalarType type) {
    if (!tensor.defined()) return nullptr;
    kept_.push_back(tensor.to(type).contiguous());
    return kept_.back().const_data_ptr();
  }
  const void* contiguous(const OptionalTensor& tensor, at::ScalarType type) {
    return tensor.has_value() ? contiguous(*tensor, type) : nullptr;
  }
  // Contiguous, of its own type.
  const void* contiguous(const at::Tensor& tensor) {
    return tensor.defined() ? contiguous(tensor, tensor.scalar_type()) : nullptr;
  }
  const void* contiguous(const OptionalTensor& tensor) {
    return tensor.has_value() ? contiguous(*tensor) : nullptr;
  }
  // As it is.
  const at::Tensor& keep(at::Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return kept_.back();
  }
  template <class MaybeTensor>
  const double* doubles(const MaybeTensor& tensor) {
    return static_cast<const double*>(contiguous(tensor, at::kDouble));
  }

 private:
  c10::SmallVector<at::Tensor, 8> kept_;
};

inline void copy_strides(const at::Tensor& tensor, int64_t (&strides)[4]) {
  std::copy_n(tensor.strides().data(), 4, strides);
}

}  // namespace torch_spe::ops
