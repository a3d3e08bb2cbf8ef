// Asking for rows that will be read or written very soon. Included by kernels only, like simd.h.
#pragma once

#include "cpu/simd.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

// Asks for a row of `n` values, into the nearest cache: it waits there for a few rows of work, or
// passes into the next one. Asked for into the second cache, rows of linear attention left loads
// waiting three times as long (AMD EPYC with AVX2). Rows with a stride between the values are left
// to the machine. Inlined always: GCC drops calls of a function that does nothing but prefetch.
template <class Storage>
TORCH_SPE_INLINE void prefetch_near(const Storage* in, std::int64_t stride, std::int64_t n) {
  if (stride != 1) return;
  const char* bytes = reinterpret_cast<const char*>(in);
  const std::int64_t size = n * static_cast<std::int64_t>(sizeof(Storage));
  for (std::int64_t i = 0; i < size; i += 64) __builtin_prefetch(bytes + i, 0, 3);
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
