// The kernels of every operator for each device, found by the type of their parameters. An operator
// registers its CPU kernel beside its description, cuda.cpp registers the CUDA launchers, and a
// test library may register others that run instead of the CPU kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <typeindex>

namespace torch_spe::ops {

enum class Slot { kCpu, kCuda, kAlternative };

// Type in which a kernel wants the tables of an encoder, such as the weight of the sine filter.
enum class TableType { kAccumulate, kOfX };

struct AnyKernel {
  void (*call)() = nullptr;  // of the type that Kernel<Params> names
  TableType table_type = TableType::kAccumulate;
};

template <class Params>
struct Kernel {
  // The tensor tells the device.
  using Call = void (*)(const Params& params, const at::Tensor& on);
  Call call;
  TableType table_type;

  void operator()(const Params& params, const at::Tensor& on) const { call(params, on); }
};

struct KernelSlots {
  AnyKernel slots[3];

  // The kernel for tensors on a device. Throws where this build has none.
  const AnyKernel& of(c10::DeviceType device) const;
};
KernelSlots& kernel_slots(std::type_index params);

// Whose kernels run for tensors on a device.
Slot slot_of(c10::DeviceType device);

// Whether any kernel is registered there: a build for the CPU alone has none for CUDA.
bool has_kernels(Slot slot);

// Whether the kernels of Slot::kAlternative run in place of the CPU kernels.
void use_alternative_kernels(bool wanted);

template <class Params>
Kernel<Params> kernel_of(c10::DeviceType device) {
  static const KernelSlots& slots = kernel_slots(typeid(Params));
  const AnyKernel& found = slots.of(device);
  return {reinterpret_cast<typename Kernel<Params>::Call>(found.call), found.table_type};
}

template <class Params>
bool register_kernel(Slot slot, typename Kernel<Params>::Call call,
                     TableType table_type = TableType::kAccumulate) {
  kernel_slots(typeid(Params)).slots[static_cast<int>(slot)] = {reinterpret_cast<void (*)()>(call),
                                                                table_type};
  return true;
}

namespace detail {
template <class Function>
struct ParamsOf;
template <class Params, class... Rest>
struct ParamsOf<void (*)(const Params&, Rest...)> {
  using type = Params;
};
}  // namespace detail

// Registers a CPU kernel void(const Params&).
template <auto kernel>
bool register_cpu_kernel() {
  using Params = typename detail::ParamsOf<decltype(kernel)>::type;
  return register_kernel<Params>(Slot::kCpu,
                                 [](const Params& params, const at::Tensor&) { kernel(params); });
}

}  // namespace torch_spe::ops
