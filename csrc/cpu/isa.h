// The CPU kernels are compiled once for each instruction set, in namespaces of their own; the best
// that the machine has is chosen at run time. TORCH_SPE_CPU_CAPABILITY=baseline|avx2|avx512 lowers
// the choice (for tests).
#pragma once

namespace torch_spe::cpu {

enum class Isa { kBaseline, kAvx2, kAvx512 };

Isa active_isa();
const char* isa_name(Isa isa);

}  // namespace torch_spe::cpu

#if defined(TORCH_SPE_X86)
#define TORCH_SPE_DECLARE_KERNEL(name, Params) \
  namespace baseline {                         \
  void name(const Params& params);             \
  }                                            \
  namespace avx2 {                             \
  void name(const Params& params);             \
  }                                            \
  namespace avx512 {                           \
  void name(const Params& params);             \
  }                                            \
  inline void name(const Params& params) {     \
    switch (active_isa()) {                    \
      case Isa::kAvx512:                       \
        return avx512::name(params);           \
      case Isa::kAvx2:                         \
        return avx2::name(params);             \
      case Isa::kBaseline:                     \
        return baseline::name(params);         \
    }                                          \
  }
#else
#define TORCH_SPE_DECLARE_KERNEL(name, Params) \
  namespace baseline {                         \
  void name(const Params& params);             \
  }                                            \
  inline void name(const Params& params) { baseline::name(params); }
#endif
