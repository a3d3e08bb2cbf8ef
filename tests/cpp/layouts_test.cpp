// Tensors that no kernel reads, such as sparse ones, are refused by name in every operator.
#include <gtest/gtest.h>
#include <torch/nested.h>
#include <torch/torch.h>
#include <torch_spe/torch_spe.h>

#include <functional>

#include "ops/register.h"

namespace {

// Any value of the argument's type: layouts are looked at before everything else.
c10::IValue value_of(const c10::Argument& argument, const at::Tensor& tensor) {
  if (argument.type()->isSubtypeOf(*c10::OptionalType::create(c10::TensorType::get())))
    return tensor;
  if (argument.default_value()) return *argument.default_value();
  if (argument.type()->kind() == c10::TypeKind::ListType)
    return argument.name() == "output_mask" ? c10::IValue(c10::List<bool>({true}))
                                            : c10::IValue(c10::List<int64_t>({1}));
  return int64_t{1};
}

struct Layout {
  std::function<at::Tensor(const at::Tensor&)> convert;
  const char* got;
};

const std::vector<Layout> kLayouts = {
    {[](const at::Tensor& t) { return t.to_sparse(); }, "(torch.strided), got Sparse"},
    {[](const at::Tensor& t) { return t.to_sparse_csr(); }, "(torch.strided), got SparseCsr"},
    {[](const at::Tensor& t) { return t.to_mkldnn(); }, "(torch.strided), got Mkldnn"},
    {[](const at::Tensor& t) { return at::quantize_per_tensor(t, 1.0, 0, at::kQInt8); },
     "got a quantized one"},
    {[](const at::Tensor& t) {
       return torch::nested::nested_tensor(std::vector<at::Tensor>{t, t});
     },
     "got a nested one"},
};

void expect_refusal(const c10::OperatorHandle& op) {
  const auto& arguments = op.schema().arguments();
  for (std::size_t wrong = 0; wrong < arguments.size(); ++wrong) {
    if (!arguments[wrong].type()->isSubtypeOf(*c10::OptionalType::create(c10::TensorType::get())))
      continue;
    for (const Layout& layout : kLayouts) {
      for (const bool requires_grad : {false, true}) {
        torch::jit::Stack stack;
        for (std::size_t i = 0; i < arguments.size(); ++i) {
          auto tensor = torch::ones({2, 2});
          if (i == wrong) tensor = layout.convert(tensor);
          const bool differentiable = !tensor.is_quantized() && requires_grad;
          stack.push_back(value_of(arguments[i], tensor.detach().requires_grad_(differentiable)));
        }
        const std::string expected = arguments[wrong].name() + " must be a dense tensor";
        try {
          op.callBoxed(stack);
          ADD_FAILURE() << op.schema().name() << " takes " << arguments[wrong].name() << " "
                        << layout.got;
        } catch (const c10::TypeError& error) {
          const std::string message = error.what_without_backtrace();
          EXPECT_NE(message.find(expected), std::string::npos) << message;
          EXPECT_NE(message.find(layout.got), std::string::npos) << message;
        }
      }
    }
  }
}

TEST(Layouts, EveryOperatorRefusesWhatIsNotDense) {
  ASSERT_FALSE(torch_spe::ops::operators().empty());
  for (const torch_spe::ops::OperatorInfo* info : torch_spe::ops::operators()) {
    expect_refusal(
        c10::Dispatcher::singleton().findSchemaOrThrow(("torch_spe::" + info->name).c_str(), ""));
    if (info->backward) expect_refusal(*info->backward);
  }
}

TEST(Layouts, ThePublicFunctionsNameTheArgument) {
  const auto x = torch::ones({1, 3, 2, 4}), freqs = torch::ones({2, 2});
  try {
    torch_spe::rotary(x.to_sparse(), freqs);
    FAIL();
  } catch (const c10::TypeError& error) {
    EXPECT_STREQ(error.what_without_backtrace(),
                 "rotary: x must be a dense tensor (torch.strided), got Sparse");
  }
}

}  // namespace
