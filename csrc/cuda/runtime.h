// What kernels and their launchers take from the CUDA runtime. Tests compile the same kernels as
// C++ for the CPU (TORCH_SPE_CUDA_EMULATION), so kernels use nothing else of it: launches go
// through `launch`, shared memory is dynamic and laid out by a `MemoryLayout`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/dtype.h"
#include "core/platform.h"

#if defined(TORCH_SPE_CUDA_EMULATION)
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

namespace torch_spe::cuda {

TORCH_SPE_INLINE std::int64_t max_of(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// Bytes of shared memory that kernels whose tiles have a choice take at most.
constexpr std::int64_t kMostShared = 96 * 1024;

#if defined(TORCH_SPE_CUDA_EMULATION)

using Stream = void*;
// Bytes that AddressSanitizer guards between two arrays of shared memory.
constexpr std::size_t kSharedGap = 32;
// Blocks that a launch should have where sums can be cut into parts: few, so that small tensors
// walk through the loops of large ones.
constexpr std::int64_t kWantedBlocks = 4;
constexpr std::int64_t kWalkingBlocks = 4;
#define TORCH_SPE_SHARED_MEMORY(name) unsigned char* const name = ::cuda_emulation::shared_memory()
#define TORCH_SPE_UNROLL
#define TORCH_SPE_UNROLL_TWICE
#define TORCH_SPE_KEEP_LOOP
#define TORCH_SPE_DEVICE inline

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, Stream,
            const Arguments&... arguments) {
  ::cuda_emulation::run(grid, block, shared_bytes, [&] { kernel(arguments...); });
}

#else

using Stream = cudaStream_t;
constexpr std::size_t kSharedGap = 0;
constexpr std::int64_t kWantedBlocks = 512;  // several for each multiprocessor of a large GPU
// Blocks that go through long loops: two for each multiprocessor, all at once.
constexpr std::int64_t kWalkingBlocks = 2 * 132;
#define TORCH_SPE_SHARED_MEMORY(name)                                      \
  extern __shared__ __align__(16) unsigned char torch_spe_shared_memory[]; \
  unsigned char* const name = torch_spe_shared_memory
#define TORCH_SPE_UNROLL _Pragma("unroll")
#define TORCH_SPE_UNROLL_TWICE _Pragma("unroll 2")
#define TORCH_SPE_KEEP_LOOP _Pragma("unroll 1")  // where registers are short
#define TORCH_SPE_DEVICE __device__ __forceinline__

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or it would be taken for one of a later launch
  std::string message = std::string("torch_spe: ") + what + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice) {
    message +=
        ": this build has none for this GPU, only for "
        "torch_spe.build_info()['cuda_architectures']. "
        "Rebuild it with TORCH_CUDA_ARCH_LIST, the GPU's compute capability (8.0 or later)";
  }
  throw std::runtime_error(message);
}

// Starts a kernel on the stream and reports an invalid launch. Does not wait. The limit of shared
// memory is always the same, since it belongs to the kernel and not to the launch: two threads may
// launch one with different sizes.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
            Stream stream, const Arguments&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments));
  if (shared_bytes > 48 * 1024) {
    check_cuda(
        cudaFuncSetAttribute(
            reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
            static_cast<int>(max_of(static_cast<std::int64_t>(shared_bytes), kMostShared))),
        "asking for shared memory");
  }
  [&](Parameters... converted) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&converted))...};
    check_cuda(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers,
                                shared_bytes, stream),
               "launching a kernel");
  }(arguments...);
}

#endif

// Lays out arrays in shared memory: on the host, from a null pointer, to learn their size; in the
// kernel to find them. Every array starts at a multiple of 16 bytes.
class MemoryLayout {
 public:
  TORCH_SPE_INLINE explicit MemoryLayout(unsigned char* base = nullptr) : base_(base) {}

  template <class T>
  TORCH_SPE_INLINE T* take(std::int64_t count) {
    const std::size_t begin = offset_;
    const std::size_t size = static_cast<std::size_t>(count) * sizeof(T);
    offset_ = (begin + size + kSharedGap + 15) / 16 * 16;
#if !defined(__CUDA_ARCH__)  // where the test would hide that this is shared memory
    if (base_ == nullptr) return nullptr;
#endif
#if defined(TORCH_SPE_CUDA_EMULATION)
    ::cuda_emulation::poison(base_ + begin + size, offset_ - begin - size);
#endif
    return reinterpret_cast<T*>(base_ + begin);
  }
  TORCH_SPE_INLINE std::size_t size() const { return offset_; }

 private:
  unsigned char* base_;
  std::size_t offset_ = 0;
};

TORCH_SPE_INLINE std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
TORCH_SPE_INLINE std::int64_t min_of(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// The first dimension of a grid, the only one that goes beyond 65535.
inline dim3 grid_of(std::int64_t blocks) {
  if (blocks > 0x7fffffff)
    throw std::runtime_error("torch_spe: the tensors are too large for one launch: " +
                             std::to_string(blocks) + " blocks");
  return dim3(static_cast<unsigned>(blocks));
}

// Calls `function` with a value of the storage type.
template <class Function>
void visit_storage(core::DType dtype, const Function& function) {
  switch (dtype) {
    case core::DType::kFloat32:
      return function(float{});
    case core::DType::kFloat64:
      return function(double{});
    case core::DType::kFloat16:
      return function(core::Half{});
    case core::DType::kBFloat16:
      return function(core::BFloat16{});
  }
}

}  // namespace torch_spe::cuda
