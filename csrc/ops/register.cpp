#include "register.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/jit_type.h>
#include <torch/csrc/jit/frontend/function_schema_parser.h>

#include <algorithm>
#include <deque>

#include "autograd.h"
#include "kernels.h"

namespace torch_spe::ops {
namespace {

std::vector<const OperatorInfo*>& all_operators() {
  static std::vector<const OperatorInfo*> all;
  return all;
}

std::size_t index_of(const std::vector<c10::Argument>& arguments, const std::string& name) {
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i].name() == name) return i;
  }
  TORCH_INTERNAL_ASSERT(false, "no '", name, "' in the schema");
}

c10::FunctionSchema backward_schema(const c10::FunctionSchema& forward,
                                    const detail::Lists& lists) {
  const c10::TypePtr tensor = c10::TensorType::get();
  const c10::TypePtr optional = c10::OptionalType::create(tensor);
  std::vector<c10::Argument> arguments;
  for (const std::string& output : lists.outputs)
    arguments.emplace_back("grad_" + output, lists.outputs.size() > 1 ? optional : tensor);
  for (const std::string& output : lists.saved) arguments.emplace_back(output, optional);
  for (const c10::Argument& a : forward.arguments())
    arguments.emplace_back(a.name(), a.type(), a.real_type(), a.N());
  const auto count = static_cast<int32_t>(lists.gradients.size());
  arguments.emplace_back("output_mask", c10::ListType::ofBools(), count);
  const std::vector<c10::Argument> returns(count, c10::Argument("", tensor));
  c10::FunctionSchema schema(forward.name() + "_backward", "", std::move(arguments), returns);
  schema.setAliasAnalysis(c10::AliasAnalysisKind::FROM_SCHEMA);
  return schema;
}

// Below autocast, with the data in the type that it chooses: parameters and states keep their
// precision, they are converted on load.
template <c10::DeviceType device>
class AutocastOperator final : public c10::OperatorKernel {
 public:
  explicit AutocastOperator(const OperatorInfo& info) : info_(info) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
    const c10::impl::ExcludeDispatchKeyGuard below(c10::DispatchKeySet(
        device == c10::kCPU ? c10::DispatchKey::AutocastCPU : c10::DispatchKey::AutocastCUDA));
    const auto type = at::autocast::get_autocast_dtype(device);
    c10::IValue* arguments = stack->data() + stack->size() - info_.num_arguments;
    for (const std::size_t i : info_.data) {
      if (arguments[i].isTensor() && !arguments[i].toTensor().is_mkldnn())  // refused below
        arguments[i] = at::autocast::cached_cast(type, arguments[i].toTensor(), device);
    }
    op.callBoxed(stack);
  }

 private:
  const OperatorInfo& info_;
};

// Where tensors arrive that no kernel reads, such as sparse ones.
constexpr c10::DispatchKey kOtherLayouts[] = {
    c10::DispatchKey::SparseCPU,           c10::DispatchKey::SparseCUDA,
    c10::DispatchKey::SparseMeta,          c10::DispatchKey::SparseCsrCPU,
    c10::DispatchKey::SparseCsrCUDA,       c10::DispatchKey::SparseCsrMeta,
    c10::DispatchKey::MkldnnCPU,           c10::DispatchKey::QuantizedCPU,
    c10::DispatchKey::QuantizedCUDA,       c10::DispatchKey::NestedTensorCPU,
    c10::DispatchKey::NestedTensorCUDA,    c10::DispatchKey::NestedTensorMeta,
    c10::DispatchKey::AutogradNestedTensor};

// Names the first argument that is no dense tensor.
void refuse_layouts(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const c10::IValue* values = stack->data() + stack->size() - arguments.size();
  const std::string name = op.schema().name().substr(op.schema().name().find("::") + 2);
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    if (!values[i].isTensor()) continue;
    const at::Tensor& tensor = values[i].toTensor();
    if (!tensor.defined()) continue;
    TORCH_CHECK_TYPE(!tensor.is_nested(), name, ": ", arguments[i].name(),
                     " must be a dense tensor, got a nested one");
    TORCH_CHECK_TYPE(!tensor.is_quantized(), name, ": ", arguments[i].name(),
                     " must be a dense tensor, got a quantized one, ", tensor.scalar_type());
    TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, name, ": ", arguments[i].name(),
                     " must be a dense tensor (torch.strided), got ", tensor.layout());
  }
  TORCH_INTERNAL_ASSERT(false, name, ": all arguments are dense");
}

void refuse_other_layouts(torch::Library& library, const std::string& name) {
  for (const c10::DispatchKey key : kOtherLayouts) {
    library.impl(name.c_str(),
                 torch::dispatch(key, torch::CppFunction::makeFromBoxedFunction<refuse_layouts>()));
  }
}

template <class Kernel>
torch::CppFunction function_of(const OperatorInfo& info) {
  return torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Kernel>(info));
}

}  // namespace

const std::vector<const OperatorInfo*>& operators() { return all_operators(); }

namespace detail {

void read(const c10::IValue& value, std::vector<int64_t>& field) {
  if (!value.isNone()) field = value.toIntVector();
}

void read(const c10::IValue& value, std::vector<c10::SymInt>& field) {
  if (value.isNone()) return;
  if (value.isIntList()) {
    const auto list = value.toIntVector();
    field.assign(list.begin(), list.end());
  } else {
    field = value.toSymIntVector();
  }
}

void check_device(const c10::OperatorHandle& op, c10::DeviceType device) {
  TORCH_CHECK_VALUE(
      device != c10::kCUDA || has_kernels(Slot::kCuda), op.schema().name(),
      ": its arguments are on a CUDA device, but this build of torch_spe is for the CPU "
      "only. Rebuild it where nvcc of the CUDA version of torch (torch.version.cuda) is "
      "installed, with TORCH_SPE_CUDA=1: TORCH_SPE_CUDA=1 pip install "
      "--no-build-isolation --force-reinstall --no-deps . ; or move the tensors with "
      ".cpu().");
}

OperatorInfo& declare(torch::Library& library, const char* schema, const char* doc,
                      const Lists& lists) {
  static std::deque<OperatorInfo> infos;  // at addresses that stay
  OperatorInfo& info = infos.emplace_back();
  c10::FunctionSchema forward = torch::jit::parseSchema(schema);
  forward.setAliasAnalysis(c10::AliasAnalysisKind::FROM_SCHEMA);
  info.name = forward.name();
  info.doc = doc;
  info.num_arguments = forward.arguments().size();
  info.num_outputs = forward.returns().size();
  info.num_output_gradients = lists.outputs.size();
  for (const c10::Argument& a : forward.arguments())
    info.is_tensor.push_back(
        a.type()->isSubtypeOf(*c10::OptionalType::create(c10::TensorType::get())));
  for (const std::string& name : lists.gradients)
    info.gradients.push_back(index_of(forward.arguments(), name));
  for (const std::string& name : lists.data)
    info.data.push_back(index_of(forward.arguments(), name));
  for (const std::string& name : lists.saved)
    info.saved.push_back(info.num_outputs == 1 ? 0 : index_of(forward.returns(), name));
  all_operators().push_back(&info);

  if (!lists.gradients.empty()) {
    library.def(backward_schema(forward, lists));
    refuse_other_layouts(library, info.name + "_backward");
    library.impl(
        (info.name + "_backward").c_str(),
        torch::dispatch(c10::DispatchKey::Autograd, function_of<OnceDifferentiableOperator>(info)));
    info.backward = c10::Dispatcher::singleton().findSchemaOrThrow(
        ("torch_spe::" + info.name + "_backward").c_str(), "");
  }
  library.def(std::move(forward));
  refuse_other_layouts(library, info.name);
  const char* name = info.name.c_str();
  if (!lists.gradients.empty()) {
    library.impl(name, torch::dispatch(c10::DispatchKey::Autograd,
                                       function_of<DifferentiableOperator>(info)));
  }
  if (!lists.data.empty()) {
    library.impl(name, torch::dispatch(c10::DispatchKey::AutocastCPU,
                                       function_of<AutocastOperator<c10::kCPU>>(info)));
    library.impl(name, torch::dispatch(c10::DispatchKey::AutocastCUDA,
                                       function_of<AutocastOperator<c10::kCUDA>>(info)));
  }
  return info;
}

void implement(torch::Library& library, const std::string& name, BoxedKernels kernels) {
  library.impl(name.c_str(), torch::dispatch(c10::DispatchKey::CPU, std::move(kernels.cpu)));
  library.impl(name.c_str(), torch::dispatch(c10::DispatchKey::CUDA, std::move(kernels.cuda)));
  library.impl(name.c_str(), torch::dispatch(c10::DispatchKey::Meta, std::move(kernels.meta)));
}

}  // namespace detail
}  // namespace torch_spe::ops
