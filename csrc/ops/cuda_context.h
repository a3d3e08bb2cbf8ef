// Where a CUDA kernel runs: the device of a tensor, made current, its current stream, and scratch
// memory from PyTorch's caching allocator.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Context.h>

#include "cuda/runtime.h"

#if !defined(TORCH_SPE_CUDA_EMULATION)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace torch_spe::ops {

class CudaContext {
 public:
#if defined(TORCH_SPE_CUDA_EMULATION)
  explicit CudaContext(const at::Tensor& tensor) : options_(tensor.options()) {}
  cuda::Stream stream() const { return nullptr; }
#else
  explicit CudaContext(const at::Tensor& tensor)
      : options_(tensor.options()), guard_(tensor.device()) {}
  cuda::Stream stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }
#endif

  // Freed memory is given out again on the same stream only, so that a workspace may be dropped
  // while the kernels that use it are still queued.
  at::Tensor workspace(std::size_t bytes) const {
    return at::empty({static_cast<int64_t>(bytes)}, options_.dtype(at::kByte));
  }

  // torch.backends.cuda.matmul.fp32_precision, which torch.set_float32_matmul_precision sets too.
  bool allow_tf32() const {
    return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
           at::Float32Precision::TF32;
  }

 private:
  at::TensorOptions options_;
#if !defined(TORCH_SPE_CUDA_EMULATION)
  c10::cuda::CUDAGuard guard_;
#endif
};

}  // namespace torch_spe::ops
