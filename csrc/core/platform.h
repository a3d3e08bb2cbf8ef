// What the mathematics in core/ needs to compile for the host, for CUDA, and for several
// instruction sets at once.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TORCH_SPE_INLINE __host__ __device__ __forceinline__
#else
// Always inlined, so that no copy compiled for one instruction set can be linked into another's
// code.
#define TORCH_SPE_INLINE inline __attribute__((always_inline))
#endif
