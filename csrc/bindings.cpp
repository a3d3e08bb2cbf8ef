// The Python module torch_spe._C. Loading it registers the operators with PyTorch's dispatcher; the
// module has a function for each of them, made from its schema.
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>

#include <sstream>

#include "ops/register.h"
#include "torch_spe/torch_spe.h"

namespace {

// A default as Python writes it.
std::string literal(const c10::IValue& value) {
  if (value.isString()) return "'" + value.toStringRef() + "'";
  if (value.isBool()) return value.toBool() ? "True" : "False";
  if (value.isNone()) return "None";
  if (value.isList() && value.toListRef().empty()) return "[]";
  std::ostringstream text;
  text << value;
  return text.str();
}

// The first line is the signature in the form in which Python's inspect reads it.
std::string docstring(const torch_spe::ops::OperatorInfo& info, const c10::FunctionSchema& schema) {
  std::ostringstream text;
  text << info.name << "(";
  const char* separator = "";
  for (const c10::Argument& argument : schema.arguments()) {
    text << separator << argument.name();
    if (argument.default_value().has_value()) text << "=" << literal(*argument.default_value());
    separator = ", ";
  }
  text << ")\n--\n\n" << info.doc << "\n\n" << schema << "\n";
  return text.str();
}

void add_operator(pybind11::module_& m, const torch_spe::ops::OperatorInfo& info) {
  const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow(("torch_spe::" + info.name).c_str(), "");
  const std::string doc = docstring(info, op.schema());
  m.def(
      info.name.c_str(),
      [op](const pybind11::args& args, const pybind11::kwargs& kwargs) {
        auto stack = torch::jit::createStackForSchema(op.schema(), torch::jit::tuple_slice(args),
                                                      kwargs, std::nullopt);
        {
          const pybind11::gil_scoped_release release;
          op.callBoxed(stack);
        }
        return torch::jit::createPyObjectForStack(std::move(stack));
      },
      doc.c_str());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of torch_spe.";
  m.def("build_info", [] {
    const torch_spe::BuildInfo info = torch_spe::build_info();
    pybind11::dict dict;
    dict["version"] = info.version;
    dict["torch"] = info.torch;
    dict["compiler"] = info.compiler;
    dict["cuda"] =
        info.cuda.empty() ? pybind11::object(pybind11::none()) : pybind11::str(info.cuda);
    dict["cuda_architectures"] = info.cuda_architectures;
    dict["instruction_set"] = info.instruction_set;
    return dict;
  });
  pybind11::options options;
  options.disable_function_signatures();
  for (const torch_spe::ops::OperatorInfo* info : torch_spe::ops::operators())
    add_operator(m, *info);
}
