#include "operators.h"

#include <utility>

#include "ops/codes.h"
#include "ops/conv_filter.h"
#include "ops/linear_attention.h"
#include "ops/phasor_filter.h"
#include "ops/sine_features.h"
#include "ops/sine_filter.h"

namespace vgpu {
namespace {

template <class Kernels>
void swap_kernels(Kernels& cpu, Kernels cuda) {
  static Kernels other = cuda;
  std::swap(cpu, other);
}

}  // namespace

void use_cuda_kernels(bool wanted) {
  static bool used = false;
  if (wanted == used) return;
  used = wanted;
  using namespace torch_spe::ops;
  swap_kernels(code_kernels(c10::kCPU), code_cuda_kernels());
  swap_kernels(conv_filter_kernels(c10::kCPU), conv_filter_cuda_kernels());
  swap_kernels(linear_attention_kernels(c10::kCPU), linear_attention_cuda_kernels());
  swap_kernels(phasor_filter_kernels(c10::kCPU), phasor_filter_cuda_kernels());
  swap_kernels(sine_features_kernels(c10::kCPU), sine_features_cuda_kernels());
  swap_kernels(sine_filter_kernels(c10::kCPU), sine_filter_cuda_kernels());
}

}  // namespace vgpu
