// The operators torch_spe::phase_noise and torch_spe::circle_noise.
#include <limits>

#include "core/codes.h"
#include "cpu/codes.h"
#include "kernels.h"
#include "params.h"
#include "register.h"

namespace torch_spe::ops {
namespace {

struct CodeNoiseArguments {
  at::Tensor seed;  // [1], int64
  c10::SymInt num_heads, in_features, num_pairs;
  int64_t stream;
  std::string dtype;

  at::ScalarType type() const { return dtype == "float64" ? at::kDouble : at::kFloat; }
  at::TensorOptions options() const { return seed.options().dtype(type()); }
};

void check_count(const char* op, const char* name, const c10::SymInt& count, int64_t most) {
  TORCH_CHECK_VALUE(count >= 0 && count <= most, op, ": ", name, " must be in 0 .. ", most,
                    ", got ", count);
}

void check_code_noise(const char* op, const CodeNoiseArguments& a) {
  check_seed(op, a.seed);
  check_count(op, "num_heads", a.num_heads, core::kMaxNoiseHeads);
  check_count(op, "in_features", a.in_features, core::kMaxNoiseFeatures);
  check_count(op, "num_pairs", a.num_pairs, core::kMaxNoiseRealizations);
  check_count(op, "stream", a.stream, std::numeric_limits<uint32_t>::max());
  TORCH_CHECK_TYPE(a.dtype == "float32" || a.dtype == "float64", op,
                   ": dtype must be float32 or float64, got ", a.dtype);
}

template <class Params>
void fill_code_noise(Params& p, const CodeNoiseArguments& a) {
  p.dtype = to_dtype(a.type());
  p.num_heads = a.num_heads.expect_int();
  p.in_features = a.in_features.expect_int();
  p.num_pairs = a.num_pairs.expect_int();
  p.stream = static_cast<uint32_t>(a.stream);
  p.num_threads = at::get_num_threads();
  p.device_seed = a.seed.const_data_ptr<int64_t>();
}

struct PhaseNoise : Operator {
  static constexpr const char* kName = "phase_noise";
  static constexpr const char* kSchema =
      "phase_noise(Tensor seed, SymInt num_heads, SymInt in_features, SymInt num_sines, SymInt "
      "num_pairs, int stream=0, int ndim=1, str dtype='float32') -> (Tensor sine, Tensor "
      "phases, Tensor deviates)";
  static constexpr const char* kDoc =
      "The noise of phase_code: a sine, a phase in cycles and deviates of its frequency for each "
      "pair of realizations.";

  struct Arguments : CodeNoiseArguments {
    c10::SymInt num_sines;
    int64_t ndim;
    auto fields() {
      return std::tie(seed, num_heads, in_features, num_sines, num_pairs, stream, ndim, dtype);
    }
  };

  static void check(const Arguments& a) {
    check_code_noise(kName, a);
    TORCH_CHECK_VALUE(a.num_sines >= 1 && a.num_sines <= core::kMaxNoiseRealizations, kName,
                      ": num_sines must be in 1 .. ", core::kMaxNoiseRealizations, ", got ",
                      a.num_sines);
    TORCH_CHECK_VALUE(a.ndim >= 0 && a.ndim < (1 << 20), kName, ": ndim must be in 0 .. ",
                      (1 << 20) - 1, ", got ", a.ndim);
  }

  static TensorSpecs results(const Arguments& a) {
    return {{{a.num_heads, a.in_features, a.num_pairs}, a.seed.options()},
            {{a.num_heads, a.in_features, a.num_pairs}, a.options()},
            {{a.num_heads, a.in_features, a.num_pairs, a.ndim}, a.options()}};
  }

  static void forward(const Arguments& a, const Tensors& outputs) {
    core::PhaseNoiseParams p;
    fill_code_noise(p, a);
    p.num_sines = a.num_sines.expect_int();
    p.ndim = a.ndim;
    p.sine = outputs[0].mutable_data_ptr<int64_t>();
    p.phases = outputs[1].mutable_data_ptr();
    p.deviates = outputs[2].mutable_data_ptr();
    kernel_of<core::PhaseNoiseParams>(a.seed.device().type())(p, a.seed);
  }
};

struct CircleNoise : Operator {
  static constexpr const char* kName = "circle_noise";
  static constexpr const char* kSchema =
      "circle_noise(Tensor seed, SymInt num_heads, SymInt in_features, SymInt num_pairs, int "
      "stream=0, str dtype='float32') -> Tensor";
  static constexpr const char* kDoc =
      "Noise on the circle, one point for each pair of realizations: [H, D, R].";

  struct Arguments : CodeNoiseArguments {
    auto fields() { return std::tie(seed, num_heads, in_features, num_pairs, stream, dtype); }
  };

  static void check(const Arguments& a) { check_code_noise(kName, a); }

  static TensorSpecs results(const Arguments& a) {
    return {{{a.num_heads, a.in_features, a.num_pairs * 2}, a.options()}};
  }

  static void forward(const Arguments& a, const Tensors& outputs) {
    core::CircleNoiseParams p;
    fill_code_noise(p, a);
    p.out = outputs[0].mutable_data_ptr();
    kernel_of<core::CircleNoiseParams>(a.seed.device().type())(p, a.seed);
  }
};

const Registration<PhaseNoise> phase_noise;
const Registration<CircleNoise> circle_noise;
[[maybe_unused]] const bool kernels =
    register_cpu_kernel<cpu::phase_noise>() && register_cpu_kernel<cpu::circle_noise>();

}  // namespace
}  // namespace torch_spe::ops
