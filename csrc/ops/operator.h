// What all operators share: their handles, and their part in autograd and autocast.
#pragma once

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>

#include "checks.h"

namespace torch_spe::ops {

using OptionalTensor = std::optional<at::Tensor>;

inline OptionalTensor to_optional(const at::Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}
inline at::Tensor to_tensor(const OptionalTensor& t) { return t.value_or(at::Tensor()); }

// The handle of an operator; Function is its C++ signature.
template <class Function>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Function>();
}

// Which of the first n inputs want a gradient; all n were saved, in the order of the inputs. Edges
// are numbered over the tensors that were given.
template <std::size_t n>
std::array<bool, n> wanted_gradients(const torch::autograd::AutogradContext& ctx,
                                     const torch::autograd::variable_list& saved) {
  std::size_t edge = 0;
  std::array<bool, n> wanted{};
  for (std::size_t i = 0; i < n; ++i)
    wanted[i] = saved[i].defined() && ctx.needs_input_grad(edge++);
  return wanted;
}

// A backward operator for the key Autograd: what it does below, with results that cannot be
// differentiated again. `handle` returns the operator; `name` stands in the error.
template <auto handle, const char* const* name, class Function>
struct OnceDifferentiable;
template <auto handle, const char* const* name, class Gradients, class... Arguments>
struct OnceDifferentiable<handle, name, Gradients(Arguments...)> {
  static Gradients call(Arguments... arguments) {
    Gradients grads;
    {
      at::AutoDispatchBelowADInplaceOrView guard;
      grads = handle().call(std::forward<Arguments>(arguments)...);
    }
    if (!at::GradMode::is_enabled()) return grads;
    return std::apply(
        [](const auto&... grad) { return Gradients(once_differentiable(*name, grad)...); }, grads);
  }
};

// While it lives, operators see no autocast. Only data goes through cast(): parameters and states
// keep their precision, they are converted on load.
template <c10::DeviceType device>
class BelowAutocast {
 public:
  at::Tensor cast(const at::Tensor& data) const {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), data, device);
  }

 private:
  c10::impl::ExcludeDispatchKeyGuard guard_{c10::DispatchKeySet(
      device == c10::kCPU ? c10::DispatchKey::AutocastCPU : c10::DispatchKey::AutocastCUDA)};
};

}  // namespace torch_spe::ops
