// Sums of few parts of many values.
#pragma once

#include "tiles.h"

namespace torch_spe::cuda {

constexpr std::int64_t kFewParts = 16;

// out[i] = sum over parts of parts[part * size + i], in the order of the parts; `size` is a
// multiple of 4, of which a thread takes 4.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_few_parts_kernel(const T* parts, int count, std::int64_t size, T* out) {
  static_assert(sizeof(T) == 4);
  const std::int64_t i = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4;
  if (i >= size) return;
  using Four = Vector<T>;
  const T* from = parts + i;
  Four sum = *reinterpret_cast<const Four*>(from);
  for (int part = 1; part < count; ++part) {
    from += size;
    const Four next = *reinterpret_cast<const Four*>(from);
    TORCH_SPE_UNROLL
    for (int e = 0; e < Four::kSize; ++e) sum.values[e] += next.values[e];
  }
  *reinterpret_cast<Four*>(out + i) = sum;
}

// sum_parts, with a kernel for few parts of many values.
inline void sum_weight_parts(const float* parts, std::int64_t count, std::int64_t size, float* out,
                             Stream stream) {
  if (size == 0) return;
  if (count > kFewParts || size % 4 != 0 || reinterpret_cast<std::uintptr_t>(out) % 16 != 0)
    return sum_parts(parts, count, size, out, stream);
  launch(sum_few_parts_kernel<float>, grid_of(ceil_div(size, 4 * kThreads)), dim3(kThreads), 0,
         stream, parts, static_cast<int>(count), size, out);
}
inline void sum_weight_parts(const double* parts, std::int64_t count, std::int64_t size,
                             double* out, Stream stream) {
  sum_parts(parts, count, size, out, stream);
}

}  // namespace torch_spe::cuda
