// Asking for rows that will be read or written very soon. Included by kernels only, like simd.h.
#pragma once

#include "cpu/simd.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

// Into the nearest cache: a row waits there for a few rows of work, or passes into the next one.
// prefetch_row, which asks for the second cache, left rows of linear attention waiting for memory
// (three times as long on an AMD EPYC with AVX2). Inlined always: GCC drops calls of a function
// that does nothing but prefetch.
template <class Storage>
TORCH_SPE_INLINE void prefetch_near(const Storage* in, std::int64_t stride, std::int64_t n) {
  if (stride != 1) return;
  const char* bytes = reinterpret_cast<const char*>(in);
  const std::int64_t size = n * static_cast<std::int64_t>(sizeof(Storage));
  for (std::int64_t i = 0; i < size; i += 64) __builtin_prefetch(bytes + i, 0, 3);
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
