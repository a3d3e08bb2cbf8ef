// The CUDA kernels of every operator, registered for CUDA tensors. One adapter makes the device of
// a tensor current, allocates scratch memory and passes what a launcher takes.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <type_traits>

#include "cuda/codes.h"
#include "cuda/conv_filter.h"
#include "cuda/linear_attention.h"
#include "cuda/phasor_filter.h"
#include "cuda/rotary.h"
#include "cuda/runtime.h"
#include "cuda/sine_features.h"
#include "cuda/sine_filter.h"
#include "kernels.h"

#if !defined(TORCH_SPE_CUDA_EMULATION)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace torch_spe::ops {
namespace {

// Test libraries run these kernels on CPU tensors.
#if defined(TORCH_SPE_ALTERNATIVE_KERNELS)
constexpr Slot kSlot = Slot::kAlternative;
#else
constexpr Slot kSlot = Slot::kCuda;
#endif

#if defined(TORCH_SPE_CUDA_EMULATION)
struct DeviceGuard {
  explicit DeviceGuard(c10::Device) {}
};
cuda::Stream current_stream() { return nullptr; }
#else
using DeviceGuard = c10::cuda::CUDAGuard;
cuda::Stream current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }
#endif

// torch.backends.cuda.matmul.fp32_precision, which torch.set_float32_matmul_precision sets too.
bool allow_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

// Launchers take params, then scratch memory if they have a `workspace` function, then whether
// TF32 is allowed if that matters to them, and the stream.
template <auto launch, auto workspace, class Params>
void run(const Params& params, const at::Tensor& on) {
  const DeviceGuard guard(on.device());
  const cuda::Stream stream = current_stream();
  using Launch = decltype(launch);
  if constexpr (std::is_null_pointer_v<decltype(workspace)>) {
    if constexpr (std::is_invocable_v<Launch, const Params&, bool, cuda::Stream>)
      launch(params, allow_tf32(), stream);
    else
      launch(params, stream);
  } else {
    // Freed memory is given out again on the same stream only, so that it may be dropped while the
    // kernels that use it are still queued.
    // Never without an address, which launchers take for memory that is not there.
    const auto size = std::max<int64_t>(1, static_cast<int64_t>(workspace(params)));
    const at::Tensor scratch = at::empty({size}, on.options().dtype(at::kByte));
    if constexpr (std::is_invocable_v<Launch, const Params&, void*, bool, cuda::Stream>)
      launch(params, scratch.mutable_data_ptr(), allow_tf32(), stream);
    else
      launch(params, scratch.mutable_data_ptr(), stream);
  }
}

template <auto launch, auto workspace = nullptr>
void add(TableType table_type = TableType::kAccumulate) {
  using Params = typename detail::ParamsOf<decltype(launch)>::type;
  register_kernel<Params>(kSlot, run<launch, workspace, Params>, table_type);
}

}  // namespace

// Test libraries call it again where there are several of them, for the kernels of one.
bool register_cuda_kernels() {
  add<cuda::conv_filter_forward>();
  add<cuda::conv_filter_backward, cuda::conv_filter_backward_workspace>();
  add<cuda::conv_noise>();
  add<cuda::linear_attention_forward, cuda::linear_attention_forward_workspace>();
  add<cuda::linear_attention_backward, cuda::linear_attention_backward_workspace>();
  add<cuda::phasor_filter_forward>();
  add<cuda::phasor_filter_backward, cuda::phasor_filter_backward_workspace>();
  add<cuda::rotary_forward>();
  add<cuda::rotary_backward, cuda::rotary_backward_workspace>();
  add<cuda::sine_features_forward>();
  add<cuda::sine_features_backward, cuda::sine_features_backward_workspace>();
  add<cuda::sine_filter_forward>(TableType::kOfX);
  add<cuda::sine_filter_backward, cuda::sine_filter_backward_workspace>(TableType::kOfX);
  add<cuda::sine_code>();
  add<cuda::sine_code_backward>();
  add<cuda::exact_code>();
  add<cuda::exact_code_backward>();
  add<cuda::phase_code>();
  add<cuda::phase_code_backward>();
  add<cuda::gate_code>();
  add<cuda::gate_code_backward>();
  add<cuda::gate_exact_code>();
  add<cuda::gate_exact_code_backward>();
  add<cuda::phase_noise>();
  add<cuda::circle_noise>();
  return true;
}

namespace {
[[maybe_unused]] const bool registered = register_cuda_kernels();
}  // namespace
}  // namespace torch_spe::ops
