#include "kernels.h"

#include <c10/util/Exception.h>

#include <unordered_map>

namespace torch_spe::ops {
namespace {

bool alternative_wanted = false;

std::unordered_map<std::type_index, KernelSlots>& all_slots() {
  static std::unordered_map<std::type_index, KernelSlots> all;
  return all;
}

}  // namespace

Slot slot_of(c10::DeviceType device) {
  if (device == c10::kCUDA) return Slot::kCuda;
  return alternative_wanted ? Slot::kAlternative : Slot::kCpu;
}

const AnyKernel& KernelSlots::of(c10::DeviceType device) const {
  const AnyKernel& found = slots[static_cast<int>(slot_of(device))];
  TORCH_CHECK_NOT_IMPLEMENTED(found.call != nullptr, "torch_spe: no kernel for the device ",
                              device);
  return found;
}

KernelSlots& kernel_slots(std::type_index params) { return all_slots()[params]; }

bool has_kernels(Slot slot) {
  for (const auto& [params, kernels] : all_slots()) {
    if (kernels.slots[static_cast<int>(slot)].call != nullptr) return true;
  }
  return false;
}

void use_alternative_kernels(bool wanted) { alternative_wanted = wanted; }

}  // namespace torch_spe::ops
