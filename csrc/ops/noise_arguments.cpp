#include "noise_arguments.h"

#include <array>
#include <utility>

namespace torch_spe::ops {
namespace {

constexpr std::array<std::pair<std::string_view, at::ScalarType>, 4> kTypes{{
    {"float32", at::kFloat},
    {"float64", at::kDouble},
    {"float16", at::kHalf},
    {"bfloat16", at::kBFloat16},
}};

}  // namespace

at::ScalarType to_scalar_type(const char* op, std::string_view dtype) {
  for (const auto& [name, type] : kTypes)
    if (name == dtype) return type;
  TORCH_CHECK_TYPE(false, op, ": dtype must be float32, float64, float16 or bfloat16, got ", dtype);
}

std::string name_of(at::ScalarType type) {
  for (const auto& [name, known] : kTypes)
    if (known == type) return std::string(name);
  return c10::toString(type);
}

core::NoiseKind to_noise_kind(const char* op, std::string_view kind) {
  if (kind == "gaussian") return core::NoiseKind::kGaussian;
  if (kind == "rademacher") return core::NoiseKind::kRademacher;
  TORCH_CHECK_VALUE(false, op, ": noise_kind must be 'gaussian' or 'rademacher', got '", kind, "'");
}

void check_stride(const char* op, at::IntArrayRef stride, int64_t ndim) {
  TORCH_CHECK_VALUE(stride.size() <= 1 || static_cast<int64_t>(stride.size()) == ndim, op,
                    ": noise_stride must be one number or ", ndim, ", got ", stride);
  int64_t product = 1;
  for (int64_t i = 0; i < ndim && !stride.empty(); ++i) {
    const int64_t s = stride[stride.size() == 1 ? 0 : i];
    TORCH_CHECK_VALUE(s >= 1 && s <= (1 << 20), op, ": noise_stride must be in 1 .. 2^20, got ",
                      stride);
    product *= s;
    TORCH_CHECK_VALUE(product <= (1 << 20), op,
                      ": the product of noise_stride must be at most 2^20, got ", stride);
  }
}

void check_start(const char* op, c10::SymIntArrayRef start, int64_t ndim) {
  TORCH_CHECK_VALUE(start.empty() || static_cast<int64_t>(start.size()) == ndim, op,
                    ": start must have ", ndim, " coordinates, got ", start);
}

core::NoiseParams noise_params(const char* op, const at::Tensor& seed, std::string_view kind,
                               at::IntArrayRef stride, c10::SymIntArrayRef start,
                               at::IntArrayRef size, int64_t num_heads, int64_t in_features,
                               int64_t num_realizations) {
  const int ndim = static_cast<int>(size.size());
  core::NoiseParams p{
      to_noise_kind(op, kind), 0, seed.const_data_ptr<int64_t>(), ndim, {1, 1, 1}, {0, 0, 0}};
  // Reading it on another device would stall that.
  if (seed.is_cpu()) p.seed = static_cast<uint64_t>(*p.device_seed);
  TORCH_CHECK_VALUE(num_heads <= core::kMaxNoiseHeads, op, ": num_heads must be at most ",
                    core::kMaxNoiseHeads, " with generated noise, got ", num_heads);
  TORCH_CHECK_VALUE(in_features <= core::kMaxNoiseFeatures, op, ": in_features must be at most ",
                    core::kMaxNoiseFeatures, " with generated noise, got ", in_features);
  TORCH_CHECK_VALUE(num_realizations <= core::kMaxNoiseRealizations, op,
                    ": num_realizations must be at most ", core::kMaxNoiseRealizations, ", got ",
                    num_realizations);
  const int64_t limit = int64_t{1} << (core::noise_position_bits(ndim) - 1);
  for (int i = 0; i < ndim; ++i) {
    const int64_t first = start.empty() ? 0 : start[i].expect_int();
    TORCH_CHECK_VALUE(first >= -limit && first <= limit - size[i], op,
                      ": start must be such that the "
                      "positions of noise in ",
                      ndim, " dimensions are in [", -limit, ", ", limit, "), got ", first, " .. ",
                      first, " + ", size[i] - 1, " in dimension ", i);
    p.start[3 - ndim + i] = first;
    if (!stride.empty()) p.stride[3 - ndim + i] = stride[stride.size() == 1 ? 0 : i];
  }
  return p;
}

}  // namespace torch_spe::ops
