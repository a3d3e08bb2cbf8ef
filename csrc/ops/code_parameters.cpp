#include "code_parameters.h"

namespace torch_spe::ops {

void check_sizes(const char* op, const char* name, const at::Tensor& tensor, const Sizes& sizes) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (std::size_t i = 0; fits && i < sizes.size(); ++i) {
    fits =
        tensor.sym_size(static_cast<int64_t>(i)).sym_eq(sizes[i]).expect_true(__FILE__, __LINE__);
  }
  TORCH_CHECK_VALUE(fits, op, ": ", name, " must have shape ", c10::SymIntArrayRef(sizes), ", got ",
                    tensor.sym_sizes());
}

void check_like(const char* op, const char* name, const at::Tensor& tensor, const Sizes& sizes,
                const char* reference_name, const at::Tensor& reference) {
  check_sizes(op, name, tensor, sizes);
  check_same_device(op, name, tensor, reference, reference_name);
  const auto type = reference.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble, op, ": ", reference_name,
                   " must be float32 or float64, got ", type);
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, op, ": ", name, " must be ", type, " like ",
                   reference_name, ", got ", tensor.scalar_type());
}

Sizes with_grid(Sizes sizes, const at::Tensor& freqs) {
  if (freqs.dim() == 4) sizes.push_back(freqs.sym_size(3));
  return sizes;
}

Sizes check_sines(const char* op, const at::Tensor& freqs, const at::Tensor& gains) {
  check_data(op, "gains", gains, 3, "[H, D, K]");
  const Sizes sizes = gains.sym_sizes().vec();
  TORCH_CHECK_VALUE(freqs.dim() == 3 || (freqs.dim() == 4 && freqs.sym_size(3) > 0), op,
                    ": freqs must have shape [H, D, K] or [H, D, K, ndim], got ",
                    freqs.sym_sizes());
  check_like(op, "freqs", freqs, with_grid(sizes, freqs), "gains", gains);
  TORCH_CHECK_VALUE(sizes[2] > 0, op, ": gains must have at least one sine (K >= 1), got shape ",
                    gains.sym_sizes());
  return sizes;
}

Sizes check_parameters(const char* op, const SineParameterArguments& a) {
  const Sizes sizes = check_sines(op, a.freqs, a.gains);
  check_like(op, "offsets", a.offsets, sizes, "gains", a.gains);
  return sizes;
}

void fill_sines(core::SineParameters& p, const at::Tensor& freqs, const at::Tensor& gains,
                double scale, KernelTensors& kept) {
  p.dtype = to_dtype(gains.scalar_type());
  p.num_heads = gains.size(0);
  p.in_features = gains.size(1);
  p.num_sines = gains.size(2);
  p.ndim = freqs.dim() == 4 ? freqs.size(3) : 1;
  p.scale = scale;
  p.num_threads = at::get_num_threads();
  p.freqs = kept.contiguous(freqs);
  p.offsets = nullptr;
  p.gains = kept.contiguous(gains);
}

void fill_parameters(core::SineParameters& p, const SineParameterArguments& a,
                     KernelTensors& kept) {
  fill_sines(p, a.freqs, a.gains, a.scale, kept);
  p.offsets = kept.contiguous(a.offsets);
}

}  // namespace torch_spe::ops
