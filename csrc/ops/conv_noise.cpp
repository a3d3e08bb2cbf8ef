// The operator torch_spe::conv_noise.
#include "cpu/conv_filter.h"
#include "kernels.h"
#include "noise_arguments.h"
#include "params.h"
#include "register.h"

namespace torch_spe::ops {
namespace {

struct ConvNoise : Operator {
  static constexpr const char* kName = "conv_noise";
  static constexpr const char* kSchema =
      "conv_noise(Tensor seed, SymInt num_heads, SymInt in_features, SymInt[] size, "
      "SymInt num_realizations, str noise_kind='gaussian', int[] noise_stride=[], "
      "SymInt[] start=[], str dtype='float32') -> Tensor";
  static constexpr const char* kDoc =
      "The noise [H, D, *size, R] that conv_filter generates from a seed.";

  struct Arguments {
    at::Tensor seed;  // [1], int64
    c10::SymInt num_heads, in_features;
    std::vector<c10::SymInt> size;
    c10::SymInt num_realizations;
    std::string noise_kind;
    std::vector<int64_t> noise_stride;
    std::vector<c10::SymInt> start;
    std::string dtype;

    auto fields() {
      return std::tie(seed, num_heads, in_features, size, num_realizations, noise_kind,
                      noise_stride, start, dtype);
    }
  };

  static void check(const Arguments& a) {
    check_seed(kName, a.seed);
    TORCH_CHECK_VALUE(a.size.size() >= 1 && a.size.size() <= 3, kName,
                      ": size must have 1 to 3 numbers, got ", c10::SymIntArrayRef(a.size));
    const auto check_count = [](const char* name, const c10::SymInt& count) {
      TORCH_CHECK_VALUE(count >= 0, kName, ": ", name, " must not be negative, got ", count);
    };
    check_count("num_heads", a.num_heads);
    check_count("in_features", a.in_features);
    check_count("num_realizations", a.num_realizations);
    for (const auto& n : a.size) check_count("size", n);
    to_noise_kind(kName, a.noise_kind);
    check_stride(kName, a.noise_stride, static_cast<int64_t>(a.size.size()));
    check_start(kName, a.start, static_cast<int64_t>(a.size.size()));
    to_scalar_type(kName, a.dtype);
  }

  static TensorSpecs results(const Arguments& a) {
    c10::SymDimVector sizes{a.num_heads, a.in_features};
    sizes.append(a.size.begin(), a.size.end());
    sizes.push_back(a.num_realizations);
    return {{sizes, a.seed.options().dtype(to_scalar_type(kName, a.dtype))}};
  }

  static core::NoiseParams generated_noise(const Arguments& a) {
    c10::SmallVector<int64_t, 3> size;
    for (const auto& n : a.size) size.push_back(n.expect_int());
    return noise_params(kName, a.seed, a.noise_kind, a.noise_stride, a.start, size,
                        a.num_heads.expect_int(), a.in_features.expect_int(),
                        a.num_realizations.expect_int());
  }

  static void check_values(const Arguments& a) { generated_noise(a); }

  static void forward(const Arguments& a, const Tensors& outputs) {
    if (outputs[0].numel() == 0) return;
    core::ConvNoiseParams p;
    p.num_heads = a.num_heads.expect_int();
    p.in_features = a.in_features.expect_int();
    p.num_realizations = a.num_realizations.expect_int();
    p.generated = generated_noise(a);
    p.dtype = to_dtype(outputs[0].scalar_type());
    std::fill_n(p.size, 3, 1);
    for (std::size_t i = 0; i < a.size.size(); ++i)
      p.size[3 - a.size.size() + i] = a.size[i].expect_int();
    p.num_threads = at::get_num_threads();
    p.out = outputs[0].mutable_data_ptr();
    kernel_of<core::ConvNoiseParams>(a.seed.device().type())(p, a.seed);
  }
};

const Registration<ConvNoise> registration;
[[maybe_unused]] const bool kernels = register_cpu_kernel<cpu::conv_noise>();

}  // namespace
}  // namespace torch_spe::ops
