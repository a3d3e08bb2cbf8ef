#include "encoders.h"

namespace torch_spe::ops {

void check_freqs(const char* op, const EncoderArguments& a, const char* count, const char* missing,
                 const char* x_name) {
  const at::Tensor& freqs = a.freqs;
  TORCH_CHECK_VALUE(freqs.dim() == 3 || freqs.dim() == 4, op,
                    ": freqs must have 3 dimensions [H, D, ", count, "] or 4 dimensions [H, D, ",
                    count, ", ndim], got shape ", freqs.sym_sizes());
  check_data(op, "freqs", freqs, freqs.dim(), "");
  const std::string of = std::string(" of ") + x_name;
  check_same_device(op, "freqs", freqs, a.x, x_name);
  check_size(op, "freqs", freqs, 0, a.x.sym_size(2), ("H" + of).c_str());
  check_size(op, "freqs", freqs, 1, a.x.sym_size(3), ("D" + of).c_str());
  TORCH_CHECK_VALUE(freqs.sym_size(2) > 0, op, ": freqs must have at least one ", missing,
                    ", got shape ", freqs.sym_sizes());
}

void check_table(const char* op, const char* name, const at::Tensor& table, const at::Tensor& x,
                 int64_t dim, const char* layout, const char* x_name) {
  const std::string of = std::string(" of ") + x_name;
  check_data(op, name, table, dim, layout);
  check_same_device(op, name, table, x, x_name);
  check_parameter_type(op, name, table, x, x_name);
  check_size(op, name, table, 0, x.sym_size(2), ("H" + of).c_str());
  check_size(op, name, table, 1, x.sym_size(3), ("D" + of).c_str());
}

void check_encoder(const char* op, const EncoderArguments& a) {
  check_positions(op, a.positions, a.start, a.freqs, a.x);
  to_feature_map(op, "feature_map", a.feature_map);
}

}  // namespace torch_spe::ops
