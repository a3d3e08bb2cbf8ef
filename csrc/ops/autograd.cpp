#include "autograd.h"

#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <cctype>
#include <memory>
#include <type_traits>

namespace torch_spe::ops {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// The tensor of a value, undefined for none.
at::Tensor tensor_of(const c10::IValue& value) {
  return value.isTensor() ? value.toTensor() : at::Tensor();
}
c10::IValue value_of(at::Tensor tensor) {
  return tensor.defined() ? c10::IValue(std::move(tensor)) : c10::IValue();
}

// SineFilterBackward for sine_filter.
std::string node_name(const OperatorInfo& info, const char* suffix) {
  std::string name;
  bool upper = true;
  for (const char c : info.name) {
    if (c != '_') name += upper ? static_cast<char>(std::toupper(c)) : c;
    upper = c == '_';
  }
  return name + suffix;
}

void check_no_forward_gradient(const OperatorInfo& info, const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !tensor.defined() || !tensor._fw_grad(0).defined(), info.name,
      ": forward-mode derivatives (jvp, jacfwd) are not implemented; use torch_spe.reference");
}

struct OperatorNode final : torch::autograd::Node {
  explicit OperatorNode(const OperatorInfo& info) : info(info) {}

  const OperatorInfo& info;
  // Arguments in the order of the schema: those that are tensors, and the others.
  std::vector<SavedVariable> tensors;
  std::vector<c10::IValue> values;
  std::vector<SavedVariable> outputs;  // those that the backward operator takes

  std::string name() const override { return node_name(info, "Backward"); }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& tensor : tensors) tensor.reset_data();
    for (auto& output : outputs) output.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list results(info.gradients.size());
    bool any = false;
    for (std::size_t i = 0; i < info.num_output_gradients; ++i) any = any || grads[i].defined();
    if (!any) return results;
    torch::jit::Stack stack;
    stack.reserve(info.num_output_gradients + info.saved.size() + info.num_arguments + 1);
    for (std::size_t i = 0; i < info.num_output_gradients; ++i)
      stack.push_back(value_of(std::move(grads[i])));
    for (const auto& output : outputs) stack.push_back(value_of(output.unpack(getptr())));
    auto tensor = tensors.begin();
    auto value = values.begin();
    for (const bool is_tensor : info.is_tensor) {
      if (is_tensor)
        stack.push_back(value_of((tensor++)->unpack()));
      else
        stack.push_back(*value++);
    }
    c10::List<bool> mask;
    mask.reserve(results.size());
    for (std::size_t i = 0; i < results.size(); ++i) mask.push_back(task_should_compute_output(i));
    stack.emplace_back(std::move(mask));
    info.backward->callBoxed(stack);
    for (std::size_t i = 0; i < results.size(); ++i) results[i] = tensor_of(stack[i]);
    return results;
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, info.name,
        ": compiled autograd is not supported outside torch.compile; compile the function that "
        "calls it, or set torch._dynamo.config.compiled_autograd = False");
  }
};

struct SecondDerivativeError final : torch::autograd::Node {
  explicit SecondDerivativeError(const OperatorInfo& info) : info(info) {}

  const OperatorInfo& info;

  std::string name() const override { return node_name(info, "BackwardBackward"); }
  variable_list apply(variable_list&&) override {
    TORCH_CHECK(false, info.name,
                ": second derivatives are not implemented; use torch_spe.reference for a "
                "differentiable backward");
  }
};

// A node as this version of torch holds it, by an intrusive or (2.11) by a shared pointer.
template <class Node>
auto make_node(const OperatorInfo& info) {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, torch::autograd::Node>) {
    return c10::make_intrusive<Node>(info);
  } else {
    return std::shared_ptr<Node>(new Node(info), [](Node* node) { deleteNode(node); });
  }
}

void redispatch(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

}  // namespace

void DifferentiableOperator::operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                                        torch::jit::Stack* stack) {
  const c10::IValue* arguments = stack->data() + stack->size() - info_.num_arguments;
  bool wanted = false;
  for (const std::size_t i : info_.gradients) {
    if (!arguments[i].isTensor()) continue;
    const at::Tensor& tensor = arguments[i].toTensor();
    check_no_forward_gradient(info_, tensor);
    wanted = wanted || (tensor.defined() && tensor.requires_grad());
  }
  if (!wanted || !at::GradMode::is_enabled()) return redispatch(op, keys, stack);

  const auto node = make_node<OperatorNode>(info_);
  variable_list inputs;
  inputs.reserve(info_.gradients.size());
  for (const std::size_t i : info_.gradients) inputs.push_back(tensor_of(arguments[i]));
  node->set_next_edges(torch::autograd::collect_next_edges(inputs));
  node->tensors.reserve(info_.num_arguments);
  node->values.reserve(info_.num_arguments);
  for (std::size_t i = 0; i < info_.num_arguments; ++i) {
    if (info_.is_tensor[i])
      node->tensors.emplace_back(tensor_of(arguments[i]), false);
    else
      node->values.push_back(arguments[i]);
  }
  auto [differentiable, keeps] = info_.outputs_of_call == nullptr
                                     ? std::pair<std::uint32_t, bool>(~0u, true)
                                     : info_.outputs_of_call(arguments);
  redispatch(op, keys, stack);
  const c10::IValue* outputs = stack->data() + stack->size() - info_.num_outputs;
  for (std::size_t i = 0; i < info_.num_output_gradients; ++i, differentiable >>= 1) {
    if (differentiable & 1)
      torch::autograd::set_history(outputs[i].toTensor(), node);
    else
      node->add_input_metadata(torch::autograd::Node::undefined_input());
  }
  node->outputs.reserve(info_.saved.size());
  for (const std::size_t i : info_.saved)
    node->outputs.emplace_back(keeps ? outputs[i].toTensor() : at::Tensor(),
                               i < info_.num_output_gradients);
}

void OnceDifferentiableOperator::operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                                            torch::jit::Stack* stack) {
  const std::size_t n = op.schema().arguments().size();
  variable_list inputs;
  bool wanted = false;
  for (const c10::IValue* value = stack->data() + stack->size() - n;
       value != stack->data() + stack->size(); ++value) {
    const at::Tensor tensor = tensor_of(*value);
    if (!tensor.defined()) continue;
    check_no_forward_gradient(info_, tensor);
    if (!tensor.requires_grad()) continue;
    wanted = true;
    inputs.push_back(tensor);
  }
  if (!wanted || !at::GradMode::is_enabled()) return redispatch(op, keys, stack);
  const auto node = make_node<SecondDerivativeError>(info_);
  node->set_next_edges(torch::autograd::collect_next_edges(inputs));
  redispatch(op, keys, stack);
  const std::size_t results = op.schema().returns().size();
  for (const c10::IValue* value = stack->data() + stack->size() - results;
       value != stack->data() + stack->size(); ++value)
    torch::autograd::set_history(tensor_of(*value), node);
}

}  // namespace torch_spe::ops
