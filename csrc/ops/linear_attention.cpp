// The operator torch_spe::linear_attention.
#include "linear_attention.h"

#include "cpu/attention/linear_attention.h"

namespace torch_spe::ops {
namespace {

const Registration<LinearAttention> registration;
[[maybe_unused]] const bool kernels = register_cpu_kernel<cpu::linear_attention_forward>() &&
                                      register_cpu_kernel<cpu::linear_attention_backward>();

}  // namespace
}  // namespace torch_spe::ops
