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

Sizes check_parameters(const char* op, const SineParameterArguments& a) {
  check_data(op, "gains", a.gains, 3, "[H, D, K]");
  const Sizes sizes = a.gains.sym_sizes().vec();
  TORCH_CHECK_VALUE(a.freqs.dim() == 3 || (a.freqs.dim() == 4 && a.freqs.sym_size(3) > 0), op,
                    ": freqs must have shape [H, D, K] or [H, D, K, ndim], got ",
                    a.freqs.sym_sizes());
  check_like(op, "freqs", a.freqs, with_grid(sizes, a.freqs), "gains", a.gains);
  check_like(op, "offsets", a.offsets, sizes, "gains", a.gains);
  TORCH_CHECK_VALUE(sizes[2] > 0, op, ": gains must have at least one sine (K >= 1), got shape ",
                    a.gains.sym_sizes());
  return sizes;
}

void fill_parameters(core::SineParameters& p, const SineParameterArguments& a,
                     KernelTensors& kept) {
  p.dtype = to_dtype(a.gains.scalar_type());
  p.num_heads = a.gains.size(0);
  p.in_features = a.gains.size(1);
  p.num_sines = a.gains.size(2);
  p.ndim = a.freqs.dim() == 4 ? a.freqs.size(3) : 1;
  p.scale = a.scale;
  p.num_threads = at::get_num_threads();
  p.freqs = kept.contiguous(a.freqs);
  p.offsets = kept.contiguous(a.offsets);
  p.gains = kept.contiguous(a.gains);
}

}  // namespace torch_spe::ops
