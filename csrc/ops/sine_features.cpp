// The operator torch_spe::sine_features.
#include "sine_features.h"

#include "cpu/sine_features.h"

namespace torch_spe::ops {
namespace {

const Registration<SineFeatures> registration;
[[maybe_unused]] const bool kernels = register_cpu_kernel<cpu::sine_features_forward>() &&
                                      register_cpu_kernel<cpu::sine_features_backward>();

}  // namespace
}  // namespace torch_spe::ops
