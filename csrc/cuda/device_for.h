// Independent work on many values, spread over the device by CUB. It does not compile as C++, so
// the emulation has a plain kernel in its place.
#pragma once

#include "runtime.h"

#if !defined(TORCH_SPE_CUDA_EMULATION)
#include <cub/device/device_for.cuh>
#endif

namespace torch_spe::cuda {

#if defined(TORCH_SPE_CUDA_EMULATION)

template <class Function>
void for_each_kernel(std::int64_t count, const Function function) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) function(i);
}

template <class Function>
void for_each_index(std::int64_t count, const Function& function, Stream stream) {
  if (count == 0) return;
  launch(for_each_kernel<Function>, grid_of(ceil_div(count, 128)), dim3(128), 0, stream, count,
         function);
}

#else

// Calls function(i) for each i < count, in any order.
template <class Function>
void for_each_index(std::int64_t count, const Function& function, Stream stream) {
  if (count == 0) return;
  check_cuda(cub::DeviceFor::Bulk(count, function, stream), "launching a loop of CUB");
}

#endif

}  // namespace torch_spe::cuda
