#include "kernels.h"

#include <c10/util/Exception.h>

#include <unordered_map>

namespace torch_spe::ops {
namespace {

Slot slot_of_cpu = Slot::kCpu;

std::unordered_map<std::type_index, KernelSlots>& all_slots() {
  static std::unordered_map<std::type_index, KernelSlots> all;
  return all;
}

}  // namespace

const AnyKernel& KernelSlots::of(c10::DeviceType device) const {
  const Slot slot = device == c10::kCUDA ? Slot::kCuda : slot_of_cpu;
  const AnyKernel& found = slots[static_cast<int>(slot)];
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

void use_kernels(Slot slot) { slot_of_cpu = slot; }

}  // namespace torch_spe::ops
