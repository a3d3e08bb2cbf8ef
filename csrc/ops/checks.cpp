#include "checks.h"

#include <ATen/ATen.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace torch_spe::ops {

void check_data(const char* op, const char* name, const at::Tensor& tensor, int64_t dim,
                const char* layout) {
  TORCH_CHECK_TYPE(tensor.defined(), op, ": ", name, " must be a tensor, got none");
  TORCH_CHECK_VALUE(tensor.dim() == dim, op, ": ", name, " must have ", dim, " dimensions ", layout,
                    ", got shape ", tensor.sym_sizes());
  const auto type = tensor.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, op,
      ": ", name, " must be float32, float64, float16 or bfloat16, got ", type);
}

void check_same_device(const char* op, const char* name, const at::Tensor& tensor,
                       const at::Tensor& reference, const char* reference_name) {
  TORCH_CHECK_VALUE(tensor.device() == reference.device(), op, ": ", name,
                    " must be on the device of ", reference_name, ", ", reference.device(),
                    ", got ", tensor.device());
}

void check_size(const char* op, const char* name, const at::Tensor& tensor, int64_t dim,
                const c10::SymInt& expected, const char* meaning) {
  TORCH_CHECK_VALUE(tensor.sym_size(dim).sym_eq(expected).expect_true(__FILE__, __LINE__), op, ": ",
                    name, " must have size ", expected, " (", meaning, ") in dimension ", dim,
                    ", got shape ", tensor.sym_sizes());
}

void check_parameter_type(const char* op, const char* name, const at::Tensor& tensor,
                          const at::Tensor& x, const char* x_name) {
  const auto type = tensor.scalar_type(), own = x.scalar_type(), wide = accumulate_type(own);
  TORCH_CHECK_TYPE(type == own || type == wide, op, ": ", name, " must be ", own, " like ", x_name,
                   own == wide ? "" : std::string(" or ") + c10::toString(wide), ", got ", type);
}

void check_positions(const char* op, const OptionalTensor& positions, const c10::Scalar& start,
                     const at::Tensor& freqs, const at::Tensor& x) {
  const c10::SymInt ndim = freqs.dim() == 4 ? freqs.sym_size(3) : c10::SymInt(1);
  TORCH_CHECK_VALUE(ndim > 0, op,
                    ": freqs must have at least one dimension of positions, got shape ",
                    freqs.sym_sizes());
  if (positions.has_value()) {
    check_same_device(op, "positions", *positions, x, "x");
    TORCH_CHECK_VALUE(positions->dim() == 1 || positions->dim() == 2, op,
                      ": positions must have shape [N] or [N, ndim], got shape ",
                      positions->sym_sizes());
    TORCH_CHECK_TYPE(positions->scalar_type() == at::kDouble ||
                         positions->scalar_type() == at::kFloat ||
                         at::isIntegralType(positions->scalar_type(), /*includeBool=*/false),
                     op, ": positions must be float64, float32 or of an integer type, got ",
                     positions->scalar_type());
    check_size(op, "positions", *positions, 0, x.sym_size(1), "N of x");
    const c10::SymInt given = positions->dim() == 2 ? positions->sym_size(1) : c10::SymInt(1);
    TORCH_CHECK_VALUE(
        given.sym_eq(ndim).expect_true(__FILE__, __LINE__), op, ": positions must have ", ndim,
        " coordinates each (the last dimension of freqs), got shape ", positions->sym_sizes());
  } else {
    TORCH_CHECK_VALUE(ndim == 1, op, ": positions must be given when freqs has ", ndim,
                      " dimensions of positions");
  }
  if (start.isSymbolic()) return;  // whatever it is when the graph runs
  TORCH_CHECK_TYPE(!start.isComplex(), op, ": start must be a real number, got ",
                   start.toComplexDouble());
  const double first = start.toDouble();
  TORCH_CHECK_VALUE(!positions.has_value() || first == 0, op,
                    ": start must be 0 when positions are given, got ", first);
  TORCH_CHECK_VALUE(std::isfinite(first), op, ": start must be finite, got ", first);
}

void check_grad_out(const char* op, const at::Tensor& grad_out, const at::Tensor& x,
                    const c10::SymInt& last) {
  TORCH_CHECK_VALUE(grad_out.dim() == x.dim(), op, ": grad_out must have ", x.dim(),
                    " dimensions like x, got shape ", grad_out.sym_sizes());
  TORCH_CHECK_TYPE(grad_out.scalar_type() == x.scalar_type(), op, ": grad_out must be ",
                   x.scalar_type(), " like x, got ", grad_out.scalar_type());
  check_same_device(op, "grad_out", grad_out, x, "x");
  for (int64_t i = 0; i + 1 < x.dim(); ++i)
    check_size(op, "grad_out", grad_out, i, x.sym_size(i), "that of x");
  check_size(op, "grad_out", grad_out, x.dim() - 1, last, "that of the output");
}

namespace {

// Up to this many values a loop takes less time than a reduction of PyTorch's takes to begin; there
// are several for each token that is generated.
constexpr int64_t kFewValues = 8192;

// Whether no value has the exponent of infinities and NaN.
template <class Word>
bool has_only_finite(const void* values, int64_t count, Word exponent) {
  Word others = 0;
  for (int64_t i = 0; i < count; ++i) {
    Word word;
    std::memcpy(&word, static_cast<const Word*>(values) + i, sizeof(Word));
    others |= static_cast<Word>((word & exponent) == exponent);
  }
  return others == 0;
}

bool is_seen_finite(const at::Tensor& tensor) {
  if (tensor.numel() > kFewValues || !tensor.is_contiguous() || tensor._is_zerotensor()) {
    return false;
  }
  const void* values = tensor.const_data_ptr();
  if (tensor.scalar_type() == at::kFloat) {
    return has_only_finite<uint32_t>(values, tensor.numel(), 0x7f800000U);
  }
  if (tensor.scalar_type() == at::kDouble) {
    return has_only_finite<uint64_t>(values, tensor.numel(), 0x7ff0000000000000U);
  }
  return false;
}

}  // namespace

void check_finite(const char* op, const char* name, const at::Tensor& tensor) {
  if (!tensor.device().is_cpu() || !tensor.is_floating_point() || tensor.numel() == 0) return;
  if (is_seen_finite(tensor)) return;
  // One pass finds out in the usual case; a sum that merely overflows is looked at more closely.
  const auto type = tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  if (std::isfinite(at::sum(tensor.detach(), type).item<double>())) return;
  const at::Tensor finite = at::isfinite(tensor.detach());
  if (finite.all().item<bool>()) return;
  const at::Tensor index = at::nonzero(finite.logical_not())[0];
  at::Tensor value = tensor.detach();
  for (int64_t i = 0; i < index.size(0); ++i) value = value.select(0, index[i].item<int64_t>());
  TORCH_CHECK_VALUE(false, op, ": ", name, " must be finite, got ", value.item<double>(),
                    " at index ", at::IntArrayRef(index.const_data_ptr<int64_t>(), index.size(0)));
}

core::DType to_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return core::DType::kFloat32;
    case at::kDouble:
      return core::DType::kFloat64;
    case at::kHalf:
      return core::DType::kFloat16;
    case at::kBFloat16:
      return core::DType::kBFloat16;
    default:
      TORCH_CHECK_TYPE(false, "torch_spe: expected float32, float64, float16 or bfloat16, got ",
                       type);
  }
}

at::ScalarType accumulate_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

core::FeatureMap to_feature_map(const char* op, const char* name, std::string_view map) {
  if (map == "identity") return core::FeatureMap::kIdentity;
  if (map == "elu") return core::FeatureMap::kElu;
  if (map == "relu") return core::FeatureMap::kRelu;
  TORCH_CHECK_VALUE(false, op, ": ", name, " must be 'identity', 'elu' or 'relu', got '", map, "'");
}

void check_gradient(const char* op, const char* name, const at::Tensor& grad,
                    c10::SymIntArrayRef sizes, const at::TensorOptions& options) {
  bool fits = grad.dim() == static_cast<int64_t>(sizes.size());
  for (std::size_t i = 0; fits && i < sizes.size(); ++i)
    fits = grad.sym_size(static_cast<int64_t>(i)).sym_eq(sizes[i]).expect_true(__FILE__, __LINE__);
  TORCH_CHECK_VALUE(fits, op, ": grad_", name, " must have shape ", sizes, ", got ",
                    grad.sym_sizes());
  const auto type = c10::typeMetaToScalarType(options.dtype());
  TORCH_CHECK_TYPE(grad.scalar_type() == type, op, ": grad_", name, " must be ", type, " like ",
                   name, ", got ", grad.scalar_type());
  TORCH_CHECK_VALUE(grad.device() == options.device(), op, ": grad_", name,
                    " must be on the device of ", name, ", ", options.device(), ", got ",
                    grad.device());
}

void check_seed(const char* op, const at::Tensor& seed) {
  TORCH_CHECK_TYPE(seed.scalar_type() == at::kLong, op, ": seed must be int64, got ",
                   seed.scalar_type());
  TORCH_CHECK_VALUE(seed.sym_numel().sym_eq(1).expect_true(__FILE__, __LINE__), op,
                    ": seed must have one element, got shape ", seed.sym_sizes());
}

}  // namespace torch_spe::ops
