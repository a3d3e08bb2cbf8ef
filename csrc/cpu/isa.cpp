#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace torch_spe::cpu {
namespace {

// The best instruction set that both this build and this machine have.
Isa best_isa() {
#if defined(TORCH_SPE_HAS_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx512;
  }
#endif
#if defined(TORCH_SPE_HAS_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

bool is_built(Isa isa) {
#if !defined(TORCH_SPE_HAS_AVX512)
  if (isa == Isa::kAvx512) return false;
#endif
#if !defined(TORCH_SPE_HAS_AVX2)
  if (isa == Isa::kAvx2) return false;
#endif
  (void)isa;
  return true;
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("TORCH_SPE_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (std::string(wanted) != isa_name(isa)) continue;
    if (!is_built(isa)) {
      throw std::runtime_error(std::string("TORCH_SPE_CPU_CAPABILITY=") + wanted +
                               ": this build has no kernels for it (TORCH_SPE_INSTRUCTION_SETS)");
    }
    if (isa > best) {
      throw std::runtime_error(std::string("TORCH_SPE_CPU_CAPABILITY=") + wanted +
                               ": this machine and this build support " + isa_name(best) +
                               " at best");
    }
    return isa;
  }
  throw std::runtime_error(
      std::string("TORCH_SPE_CPU_CAPABILITY: expected baseline, avx2 or avx512, got ") + wanted);
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kBaseline:
      break;
  }
  return "baseline";
}

}  // namespace torch_spe::cpu
