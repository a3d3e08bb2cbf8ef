// The part of operators in autograd: a graph node for a forward operator, and one that explains
// itself for a backward operator.
#pragma once

#include "register.h"

namespace torch_spe::ops {

// For the key Autograd of an operator: saves its arguments in a node that calls the backward
// operator.
class DifferentiableOperator final : public c10::OperatorKernel {
 public:
  explicit DifferentiableOperator(const OperatorInfo& info) : info_(info) {}
  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                  torch::jit::Stack* stack);

 private:
  const OperatorInfo& info_;
};

// For the key Autograd of a backward operator: results that cannot be differentiated again. A node
// that throws stands between them and every argument, so that each way to ask for a second
// derivative meets it.
class OnceDifferentiableOperator final : public c10::OperatorKernel {
 public:
  explicit OnceDifferentiableOperator(const OperatorInfo& info) : info_(info) {}
  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                  torch::jit::Stack* stack);

 private:
  const OperatorInfo& info_;
};

}  // namespace torch_spe::ops
