// An operator from its description. One file describes an operator: its schema, a struct of its
// arguments, checks, the shapes of its results, and how parameters of the kernels are filled; its
// part in the dispatcher, autograd, autocast and Python is generated from that, without repeating
// any argument. All kernels are boxed: they see the arguments as a stack of values, in the order of
// the schema.
//
// A description derives from Operator and has
//   kSchema, kDoc               the schema without namespace, and one sentence
//   Arguments                   one field for each argument, and fields(), their std::tie
//   check(a)                    throws for what does not fit
//   results(a)                  sizes and options of the outputs
//   forward(a, outputs)         runs the kernel
//   check_values(a)             if there are any: checks that read values, before the forward pass
//   kGradients, backward(b)     arguments with a gradient, in the order of the schema, and their
//                               computation; without these there is none
// and of these, what differs from the default that is named:
//   kData                       arguments that autocast casts: none
//   kOutputs                    the outputs with a gradient, which are the first ones: "out"
//   kSaved                      outputs that the backward operator takes: none
//   check_backward(b)           by default gradients must be like the outputs
//   is_differentiable(a, i), keeps_outputs(a)
//                               whether output i of kOutputs has a gradient in this call, and
//                               whether this call keeps the outputs of kSaved: both always
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"

namespace torch_spe::ops {

using Tensors = c10::SmallVector<at::Tensor, 4>;

struct TensorSpec {
  c10::SymDimVector sizes;
  at::TensorOptions options;
};
using TensorSpecs = c10::SmallVector<TensorSpec, 4>;

// `source` tells type and device.
inline TensorSpec spec_like(const at::Tensor& source) {
  return {c10::SymDimVector(source.sym_sizes()), source.options()};
}

struct Operator {
  using Names = std::array<const char*, 0>;
  static constexpr Names kGradients{};
  static constexpr Names kData{};
  static constexpr std::array kOutputs{"out"};
  static constexpr Names kSaved{};
};

// What the backward operator is called with: <name>_backward(grad_<output>..., <saved output>...,
// <argument>..., bool[] output_mask) -> one gradient for each of kGradients.
template <class Op>
struct BackwardCall {
  static constexpr std::size_t kCount = Op::kGradients.size();

  typename Op::Arguments arguments;
  std::array<at::Tensor, Op::kOutputs.size()> grads;  // undefined for none
  std::array<at::Tensor, Op::kSaved.size()> saved;    // undefined where they were not kept
  std::array<bool, kCount> wanted;
  std::array<at::Tensor, kCount> inputs;   // the arguments that have a gradient
  std::array<at::Tensor, kCount> results;  // of any type; they are cast to that of the input

  // Where a kernel writes the gradient of the argument `name`: zeros of the argument's sizes, in
  // the type in which the kernel sums; null where nobody wants it.
  void* gradient(const char* name, at::ScalarType type) { return allocate(name, type, true); }
  // The same for kernels that write every element.
  void* overwritten_gradient(const char* name, at::ScalarType type) {
    return allocate(name, type, false);
  }
  double* double_gradient(const char* name) {
    return static_cast<double*>(gradient(name, at::kDouble));
  }

 private:
  void* allocate(const char* name, at::ScalarType type, bool zero) {
    std::size_t i = 0;
    while (i < kCount && std::strcmp(Op::kGradients[i], name) != 0) ++i;
    TORCH_INTERNAL_ASSERT(i < kCount, "no gradient of ", name);
    if (!wanted[i]) return nullptr;
    const auto options = inputs[i].options().dtype(type);
    results[i] =
        zero ? at::zeros(inputs[i].sizes(), options) : at::empty(inputs[i].sizes(), options);
    return results[i].mutable_data_ptr();
  }
};

// A description without its types.
struct OperatorInfo {
  std::string name;  // without namespace
  std::string doc;
  std::size_t num_arguments = 0, num_outputs = 0;
  std::vector<bool> is_tensor;         // of arguments
  std::vector<std::size_t> gradients;  // arguments
  std::vector<std::size_t> data;       // arguments
  std::size_t num_output_gradients = 0;
  std::vector<std::size_t> saved;  // outputs
  // Bit i for output i that has a gradient in this call, and whether outputs are kept; null where
  // that is all of them always.
  std::pair<std::uint32_t, bool> (*outputs_of_call)(const c10::IValue* arguments) = nullptr;
  std::optional<c10::OperatorHandle> backward;
};

// All operators that have been registered; backward operators are not among them.
const std::vector<const OperatorInfo*>& operators();

namespace detail {

struct Lists {
  std::vector<std::string> gradients, data, outputs, saved;
};

using BoxedFunction = void(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack*);
struct BoxedKernels {
  torch::CppFunction cpu, cuda, meta;
};

// Declares an operator and all that does not depend on its types.
OperatorInfo& declare(torch::Library& library, const char* schema, const char* doc,
                      const Lists& lists);
void implement(torch::Library& library, const std::string& name, BoxedKernels kernels);

// Refuses CUDA tensors, naming the operator, in a build without CUDA kernels.
void check_device(const c10::OperatorHandle& op, c10::DeviceType device);

inline void read(const c10::IValue& value, at::Tensor& field) {
  field = value.isNone() ? at::Tensor() : value.toTensor();
}
inline void read(const c10::IValue& value, OptionalTensor& field) {
  if (!value.isNone() && value.toTensor().defined()) field = value.toTensor();
}
// Lists; packages of AOTInductor pass None for an empty one.
void read(const c10::IValue& value, std::vector<int64_t>& field);
void read(const c10::IValue& value, std::vector<c10::SymInt>& field);
template <class T>
void read(const c10::IValue& value, T& field) {
  field = value.to<T>();
}

template <class Arguments>
Arguments read_arguments(const c10::IValue* values) {
  Arguments arguments;
  std::apply([&](auto&... fields) { (read(*values++, fields), ...); }, arguments.fields());
  return arguments;
}

inline void pass(torch::jit::Stack& stack, std::size_t num_arguments, at::Tensor* results,
                 std::size_t num_results) {
  stack.erase(stack.end() - static_cast<std::ptrdiff_t>(num_arguments), stack.end());
  for (std::size_t i = 0; i < num_results; ++i) stack.emplace_back(std::move(results[i]));
}

template <class Op>
const OperatorInfo*& info_of() {
  static const OperatorInfo* info = nullptr;
  return info;
}

template <class Op, c10::DeviceType device>
void forward(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  if constexpr (device == c10::kCUDA) check_device(op, device);
  constexpr std::size_t n =
      std::tuple_size_v<decltype(std::declval<typename Op::Arguments&>().fields())>;
  const auto a = read_arguments<typename Op::Arguments>(stack->data() + stack->size() - n);
  Op::check(a);
  if constexpr (device != c10::kMeta && requires { Op::check_values(a); }) Op::check_values(a);
  Tensors outputs;
  for (const TensorSpec& spec : Op::results(a))
    outputs.push_back(at::empty_symint(spec.sizes, spec.options));
  if constexpr (device != c10::kMeta) Op::forward(a, outputs);
  pass(*stack, n, outputs.data(), outputs.size());
}

// Gradients of outputs as such: sizes, type and device of the outputs.
template <class Op>
void check_gradients(const BackwardCall<Op>& b) {
  const TensorSpecs specs = Op::results(b.arguments);
  for (std::size_t i = 0; i < b.grads.size(); ++i) {
    if (b.grads[i].defined())
      check_gradient(info_of<Op>()->name.c_str(), Op::kOutputs[i], b.grads[i], specs[i].sizes,
                     specs[i].options);
  }
}

template <class Op, c10::DeviceType device>
void backward(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  if constexpr (device == c10::kCUDA) check_device(op, device);
  const OperatorInfo& info = *info_of<Op>();
  const std::size_t n = Op::kOutputs.size() + Op::kSaved.size() + info.num_arguments + 1;
  const c10::IValue* values = stack->data() + stack->size() - n;
  BackwardCall<Op> b;
  for (at::Tensor& grad : b.grads) read(*values++, grad);
  for (at::Tensor& output : b.saved) read(*values++, output);
  b.arguments = read_arguments<typename Op::Arguments>(values);
  const auto mask = values[info.num_arguments].toBoolList();
  TORCH_CHECK_VALUE(mask.size() == b.kCount, info.name, ": output_mask must have ", b.kCount,
                    " entries, got ", mask.size());
  for (std::size_t i = 0; i < b.kCount; ++i) {
    read(values[info.gradients[i]], b.inputs[i]);
    b.wanted[i] = mask[i] && b.inputs[i].defined();
  }
  Op::check(b.arguments);
  if constexpr (requires { Op::check_backward(b); })
    Op::check_backward(b);
  else
    check_gradients(b);
  if constexpr (device == c10::kMeta) {
    for (std::size_t i = 0; i < b.kCount; ++i) {
      if (b.wanted[i])
        b.results[i] = at::empty_symint(b.inputs[i].sym_sizes(), b.inputs[i].options());
    }
  } else {
    Op::backward(b);
    for (std::size_t i = 0; i < b.kCount; ++i) {
      if (b.results[i].defined()) b.results[i] = b.results[i].to(b.inputs[i].scalar_type());
    }
  }
  pass(*stack, n, b.results.data(), b.kCount);
}

template <class Op>
std::pair<std::uint32_t, bool> outputs_of_call(const c10::IValue* values) {
  const auto a = read_arguments<typename Op::Arguments>(values);
  std::uint32_t differentiable = 0;
  for (std::size_t i = 0; i < Op::kOutputs.size(); ++i)
    differentiable |= static_cast<std::uint32_t>(Op::is_differentiable(a, i)) << i;
  return {differentiable, Op::keeps_outputs(a)};
}

template <BoxedFunction* cpu, BoxedFunction* cuda, BoxedFunction* meta>
BoxedKernels box() {
  return {torch::CppFunction::makeFromBoxedFunction<cpu>(),
          torch::CppFunction::makeFromBoxedFunction<cuda>(),
          torch::CppFunction::makeFromBoxedFunction<meta>()};
}

}  // namespace detail

// Registers the operator that Op describes, as long as it lives.
template <class Op>
class Registration {
 public:
  Registration() : library_(torch::Library::FRAGMENT, "torch_spe", std::nullopt, __FILE__, 0) {
    const auto list = [](const auto& names) {
      return std::vector<std::string>(names.begin(), names.end());
    };
    OperatorInfo& info = detail::declare(
        library_, Op::kSchema, Op::kDoc,
        {list(Op::kGradients), list(Op::kData), list(Op::kOutputs), list(Op::kSaved)});
    constexpr std::size_t fields =
        std::tuple_size_v<decltype(std::declval<typename Op::Arguments&>().fields())>;
    TORCH_INTERNAL_ASSERT(fields == info.num_arguments, info.name,
                          ": the schema and fields() differ in their number of arguments");
    detail::info_of<Op>() = &info;
    if constexpr (requires { Op::keeps_outputs(std::declval<typename Op::Arguments>()); })
      info.outputs_of_call = detail::outputs_of_call<Op>;
    detail::implement(library_, info.name,
                      detail::box<detail::forward<Op, c10::kCPU>, detail::forward<Op, c10::kCUDA>,
                                  detail::forward<Op, c10::kMeta>>());
    if constexpr (Op::kGradients.size() > 0) {
      detail::implement(
          library_, info.name + "_backward",
          detail::box<detail::backward<Op, c10::kCPU>, detail::backward<Op, c10::kCUDA>,
                      detail::backward<Op, c10::kMeta>>());
    }
  }

 private:
  torch::Library library_;
};

}  // namespace torch_spe::ops
