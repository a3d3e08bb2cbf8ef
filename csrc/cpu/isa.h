// The CPU kernels are compiled once for each instruction set, in namespaces of their own; the best
// that the machine has is chosen at run time. TORCH_SPE_CPU_CAPABILITY=baseline|avx2|avx512 lowers
// the choice (for tests).
#pragma once

namespace torch_spe::cpu {

enum class Isa { kBaseline, kAvx2, kAvx512 };

Isa active_isa();
const char* isa_name(Isa isa);

}  // namespace torch_spe::cpu

// The build may leave instruction sets out (TORCH_SPE_INSTRUCTION_SETS in CMakeLists.txt), never
// the baseline.
#if defined(TORCH_SPE_HAS_AVX2)
#define TORCH_SPE_DECLARE_AVX2(name, Params) \
  namespace avx2 {                           \
  void name(const Params& params);           \
  }
#define TORCH_SPE_CALL_AVX2(name) \
  if (active_isa() == Isa::kAvx2) return avx2::name(params);
#else
#define TORCH_SPE_DECLARE_AVX2(name, Params)
#define TORCH_SPE_CALL_AVX2(name)
#endif
#if defined(TORCH_SPE_HAS_AVX512)
#define TORCH_SPE_DECLARE_AVX512(name, Params) \
  namespace avx512 {                           \
  void name(const Params& params);             \
  }
#define TORCH_SPE_CALL_AVX512(name) \
  if (active_isa() == Isa::kAvx512) return avx512::name(params);
#else
#define TORCH_SPE_DECLARE_AVX512(name, Params)
#define TORCH_SPE_CALL_AVX512(name)
#endif
#define TORCH_SPE_DECLARE_KERNEL(name, Params) \
  namespace baseline {                         \
  void name(const Params& params);             \
  }                                            \
  TORCH_SPE_DECLARE_AVX2(name, Params)         \
  TORCH_SPE_DECLARE_AVX512(name, Params)       \
  inline void name(const Params& params) {     \
    TORCH_SPE_CALL_AVX512(name)                \
    TORCH_SPE_CALL_AVX2(name)                  \
    baseline::name(params);                    \
  }
