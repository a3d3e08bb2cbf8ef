#include "attention.h"

namespace torch_spe::ops {
namespace {

// int64, contiguous; starts with 0, never falls, and ends with the length.
const int64_t* fill_bounds(const char* op, const at::Tensor& cu_seqlens, int64_t length,
                           const char* length_name, KernelTensors& kept) {
  const at::Tensor bounds = cu_seqlens.to(at::kLong).contiguous();
  const auto* data = static_cast<const int64_t*>(kept.contiguous(bounds));
  if (bounds.is_cuda()) {
    // Reading the values would stall the device: it checks them itself, before the kernels run.
    const at::Tensor rises = (bounds.slice(0, 1) >= bounds.slice(0, 0, -1)).all();
    const at::Tensor ends = at::logical_and(bounds[0].eq(0), bounds[-1].eq(length));
    at::_assert_async(
        at::logical_and(rises, ends),
        "linear_attention: cu_seqlens must start with 0, never decrease and end with N");
    return data;
  }
  const int64_t last = bounds.numel() - 1;
  TORCH_CHECK_VALUE(data[0] == 0, op, ": cu_seqlens must start with 0, got ", data[0]);
  for (int64_t i = 0; i < last; ++i) {
    TORCH_CHECK_VALUE(data[i] <= data[i + 1], op, ": cu_seqlens must not decrease, got ", data[i],
                      " before ", data[i + 1], " at index ", i);
  }
  TORCH_CHECK_VALUE(data[last] == length, op, ": cu_seqlens must end with ", length, " (",
                    length_name, "), got ", data[last]);
  return data;
}

}  // namespace

c10::SymInt AttentionKeys::num_sequences() const {
  return cu_seqlens.has_value() ? cu_seqlens->sym_size(0) - 1 : k.sym_size(0);
}
c10::SymInt AttentionKeys::num_features() const {
  return denominator_k.has_value() ? denominator_k->sym_size(3) : k.sym_size(3);
}
TensorSpec AttentionKeys::s() const {
  return {{num_sequences(), k.sym_size(2), k.sym_size(3), v.sym_size(3)},
          k.options().dtype(accumulate_type(k.scalar_type()))};
}
TensorSpec AttentionKeys::z() const {
  return {{num_sequences(), k.sym_size(2), num_features()},
          k.options().dtype(accumulate_type(k.scalar_type()))};
}

void check_like(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& like,
                const char* like_name) {
  check_same_device(op, name, tensor, like, like_name);
  TORCH_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), op, ": ", name, " must be ",
                   like.scalar_type(), " like ", like_name, ", got ", tensor.scalar_type());
}

void check_state(const char* op, const char* name, const at::Tensor& tensor, const AttentionKeys& a,
                 const char* like_name, bool is_s) {
  const std::string like = like_name, features = is_s || !a.denominator_k.has_value()
                                                     ? "R of " + like
                                                     : std::string("F of denominator_k");
  check_data(op, name, tensor, is_s ? 4 : 3, is_s ? "[B, H, R, E]" : "[B, H, R]");
  check_same_device(op, name, tensor, a.k, like_name);
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble, op,
                   ": ", name, " must be float32 or float64, got ", tensor.scalar_type());
  check_size(op, name, tensor, 0, a.num_sequences(),
             a.cu_seqlens.has_value() ? "sequences in cu_seqlens" : ("B of " + like).c_str());
  check_size(op, name, tensor, 1, a.k.sym_size(2), ("H of " + like).c_str());
  check_size(op, name, tensor, 2, is_s ? a.k.sym_size(3) : a.num_features(), features.c_str());
  if (is_s) check_size(op, name, tensor, 3, a.v.sym_size(3), "E of v");
}

void check_keys(const char* op, const AttentionKeys& a, const at::Tensor& like,
                const char* like_name, const char* features) {
  const std::string letter = features;
  check_data(op, "k", a.k, 4, ("[B, M, H, " + letter + "]").c_str());
  check_data(op, "v", a.v, 4, "[B, M, H, E]");
  check_like(op, "k", a.k, like, like_name);
  check_like(op, "v", a.v, like, like_name);
  const std::string of = std::string(" of ") + like_name;
  check_size(op, "k", a.k, 0, like.sym_size(0), ("B" + of).c_str());
  check_size(op, "k", a.k, 2, like.sym_size(2), ("H" + of).c_str());
  check_size(op, "k", a.k, 3, like.sym_size(3), (letter + of).c_str());
  check_size(op, "v", a.v, 0, like.sym_size(0), ("B" + of).c_str());
  check_size(op, "v", a.v, 1, a.k.sym_size(1), "M of k");
  check_size(op, "v", a.v, 2, like.sym_size(2), ("H" + of).c_str());
  TORCH_CHECK_VALUE(like.sym_size(3) > 0, op, ": ", like_name, " must have at least one feature (",
                    letter, " >= 1), got shape ", like.sym_sizes());
  TORCH_CHECK_VALUE(a.v.sym_size(3) > 0, op,
                    ": v must have at least one feature (E >= 1), got shape ", a.v.sym_sizes());
  to_feature_map(op, "feature_map", a.feature_map);
  to_feature_map(op, "denominator_feature_map", a.denominator_feature_map);
}

void check_key_options(const char* op, const AttentionKeys& a, const at::Tensor& like,
                       const char* like_name, const char* decay_forms) {
  const std::string of = std::string(" of ") + like_name;
  if (a.key_padding_mask.has_value()) {
    const at::Tensor& mask = *a.key_padding_mask;
    TORCH_CHECK_VALUE(mask.dim() == 2, op,
                      ": key_padding_mask must have 2 dimensions [B, M], got shape ",
                      mask.sym_sizes());
    TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, op,
                     ": key_padding_mask must be bool (true where a key is padding), got ",
                     mask.scalar_type());
    check_same_device(op, "key_padding_mask", mask, like, like_name);
    check_size(op, "key_padding_mask", mask, 0, like.sym_size(0), ("B" + of).c_str());
    check_size(op, "key_padding_mask", mask, 1, a.k.sym_size(1), "M of k");
  }
  if (a.cu_seqlens.has_value()) {
    const at::Tensor& bounds = *a.cu_seqlens;
    TORCH_CHECK_VALUE(bounds.dim() == 1, op,
                      ": cu_seqlens must have 1 dimension [S + 1], got shape ", bounds.sym_sizes());
    TORCH_CHECK_TYPE(bounds.scalar_type() == at::kInt || bounds.scalar_type() == at::kLong, op,
                     ": cu_seqlens must be int32 or int64, got ", bounds.scalar_type());
    check_same_device(op, "cu_seqlens", bounds, like, like_name);
    TORCH_CHECK_VALUE(bounds.sym_size(0) > 0, op,
                      ": cu_seqlens must have at least one entry, got shape ", bounds.sym_sizes());
    check_size(op, like_name, like, 0, 1, "B, with cu_seqlens");
  }
  if (a.denominator_k.has_value()) {
    const at::Tensor& k = *a.denominator_k;
    check_data(op, "denominator_k", k, 4, "[B, M, H, F]");
    check_like(op, "denominator_k", k, like, like_name);
    check_size(op, "denominator_k", k, 0, like.sym_size(0), ("B" + of).c_str());
    check_size(op, "denominator_k", k, 1, a.k.sym_size(1), "M of k");
    check_size(op, "denominator_k", k, 2, like.sym_size(2), ("H" + of).c_str());
    TORCH_CHECK_VALUE(k.sym_size(3) > 0, op,
                      ": denominator_k must have at least one feature (F >= 1), got shape ",
                      k.sym_sizes());
  }
  if (a.log_decay.has_value()) {
    const at::Tensor& decay = *a.log_decay;
    const int64_t dim = decay.dim(), tokens = dim > 2 ? 2 : 0;  // dimensions before H
    TORCH_CHECK_VALUE(dim >= 1 && dim <= 4, op, ": log_decay must have the shape ", decay_forms,
                      ", got shape ", decay.sym_sizes());
    TORCH_CHECK_TYPE(decay.scalar_type() == at::kFloat || decay.scalar_type() == at::kDouble, op,
                     ": log_decay must be float32 or float64, got ", decay.scalar_type());
    check_same_device(op, "log_decay", decay, like, like_name);
    const auto check_own = [&](int64_t i, const c10::SymInt& size, const std::string& meaning) {
      check_size(op, "log_decay", decay, i, size,
                 (meaning + "; the shape is " + decay_forms).c_str());
    };
    if (tokens > 0) {
      check_own(0, like.sym_size(0), "B" + of);
      check_own(1, a.k.sym_size(1), "M of k");
    }
    check_own(tokens, like.sym_size(2), "H" + of);
    if (dim % 2 == 0) {
      check_own(tokens + 1, like.sym_size(3), "R" + of);
      if (a.denominator_k.has_value())
        check_size(op, "denominator_k", *a.denominator_k, 3, like.sym_size(3),
                   ("R" + of + ", with a decay per feature").c_str());
    }
  }
  TORCH_CHECK_VALUE(a.initial_s.has_value() == a.initial_z.has_value(), op, ": ",
                    a.initial_s.has_value() ? "initial_z" : "initial_s", " must be given with ",
                    a.initial_s.has_value() ? "initial_s" : "initial_z", ", got none");
  if (a.initial_s.has_value()) {
    check_state(op, "initial_s", *a.initial_s, a, like_name, true);
    check_state(op, "initial_z", *a.initial_z, a, like_name, false);
  }
}

namespace {

// Whether a few values are at most 0 and no NaN. A loop takes less time than PyTorch's operators
// take to begin, and there is a call for each token that is generated.
bool is_seen_at_most_zero(const at::Tensor& tensor) {
  constexpr int64_t few = 8192;
  if (tensor.scalar_type() != at::kFloat || tensor.numel() > few || !tensor.is_contiguous() ||
      tensor._is_zerotensor()) {
    return false;
  }
  const float* values = tensor.const_data_ptr<float>();
  int64_t others = 0;
  const int64_t count = tensor.numel();
  for (int64_t i = 0; i < count; ++i) others += !(values[i] <= 0);
  return others == 0;
}

}  // namespace

void check_decay_values(const char* op, const AttentionKeys& a) {
  if (!a.log_decay.has_value() || !a.log_decay->is_cpu()) return;
  if (is_seen_at_most_zero(*a.log_decay)) return;
  const at::Tensor wrong = a.log_decay->le(0).logical_not();
  if (!wrong.any().item<bool>()) return;
  TORCH_CHECK_VALUE(false, op, ": log_decay must be at most 0, got ",
                    a.log_decay->masked_select(wrong)[0].item<double>());
}

void fill_keys(const char* op, core::LinearAttentionParams& p, const AttentionKeys& a,
               KernelTensors& kept, const char* length_name) {
  const auto state = accumulate_type(a.k.scalar_type());
  p.dtype = to_dtype(a.k.scalar_type());
  p.feature_map = to_feature_map(op, "feature_map", a.feature_map);
  p.num_sequences = a.cu_seqlens.has_value() ? a.cu_seqlens->size(0) - 1 : a.k.size(0);
  p.num_heads = a.k.size(2);
  p.key_length = a.k.size(1);
  p.num_realizations = a.k.size(3);
  p.value_features = a.v.size(3);
  p.num_threads = at::get_num_threads();
  p.cu_seqlens = a.cu_seqlens.has_value()
                     ? fill_bounds(op, *a.cu_seqlens, a.k.size(1), length_name, kept)
                     : nullptr;
  p.key_padding_mask = static_cast<const bool*>(kept.contiguous(a.key_padding_mask));
  p.k = a.k.const_data_ptr();
  copy_strides(a.k, p.k_strides);
  p.v = a.v.const_data_ptr();
  copy_strides(a.v, p.v_strides);
  p.denominator_feature_map =
      to_feature_map(op, "denominator_feature_map", a.denominator_feature_map);
  p.denominator_features = p.num_realizations;
  p.has_own_denominator = a.denominator_k.has_value();
  if (p.has_own_denominator) {
    p.denominator_features = a.denominator_k->size(3);
    p.denominator_k = a.denominator_k->const_data_ptr();
    copy_strides(*a.denominator_k, p.denominator_k_strides);
  }
  if (a.log_decay.has_value()) {
    at::Tensor decay = *a.log_decay;
    p.decay_features = decay.dim() % 2 == 0 ? p.num_realizations : 1;
    if (decay.dim() % 2 == 1) decay = decay.unsqueeze(-1);
    decay = decay.expand({a.k.size(0), p.key_length, p.num_heads, p.decay_features});
    p.log_decay = decay.const_data_ptr();
    copy_strides(decay, p.log_decay_strides);
    p.log_decay_dtype = to_dtype(decay.scalar_type());
  }
  p.initial_s = kept.contiguous(a.initial_s, state);
  p.initial_z = kept.contiguous(a.initial_z, state);
  p.out = p.final_s = p.final_z = nullptr;
}

void fill_state_gradients(core::LinearAttentionBackwardParams& p, const AttentionKeys& a,
                          const at::Tensor& grad_s, const at::Tensor& grad_z, KernelTensors& kept) {
  const auto state = accumulate_type(a.k.scalar_type());
  const auto fill = [&](const at::Tensor& grad, const at::Tensor& other, const TensorSpec& spec) {
    if (grad.defined() || !other.defined()) return kept.contiguous(grad, state);
    return kept.contiguous(at::zeros_symint(spec.sizes, spec.options));
  };
  p.grad_final_s = fill(grad_s, grad_z, a.s());
  p.grad_final_z = fill(grad_z, grad_s, a.z());
}

}  // namespace torch_spe::ops
