// The operator torch_spe::linear_attention: checks, allocation, dispatch and autograd.
#include "linear_attention.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <array>
#include <cmath>

#include "cpu/linear_attention.h"
#include "operator.h"
#include "torch_spe/torch_spe.h"

namespace torch_spe {
namespace ops {
namespace {

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Mask = std::array<bool, 5>;  // gradients wanted: q, k, v, initial_s, initial_z
constexpr const char* kOp = "linear_attention";

core::FeatureMap to_feature_map(c10::string_view name) {
  if (name == "identity") return core::FeatureMap::kIdentity;
  if (name == "elu") return core::FeatureMap::kElu;
  if (name == "relu") return core::FeatureMap::kRelu;
  TORCH_CHECK_VALUE(false, kOp, ": feature_map must be 'identity', 'elu' or 'relu', got '", name,
                    "'");
}

// The arguments that all passes share.
struct Arguments {
  const at::Tensor &q, &k, &v;
  c10::string_view feature_map;
  bool causal, normalize;
  double eps;
  const OptionalTensor &key_padding_mask, &cu_seqlens, &initial_s, &initial_z;

  c10::SymInt num_sequences() const {
    return cu_seqlens.has_value() ? cu_seqlens->sym_size(0) - 1 : q.sym_size(0);
  }
  at::TensorOptions state_options() const {
    return q.options().dtype(accumulate_type(q.scalar_type()));
  }
  c10::SymDimVector out_shape() const {
    return {q.sym_size(0), q.sym_size(1), q.sym_size(2), v.sym_size(3)};
  }
  c10::SymDimVector s_shape() const {
    return {num_sequences(), q.sym_size(2), q.sym_size(3), v.sym_size(3)};
  }
  c10::SymDimVector z_shape() const { return {num_sequences(), q.sym_size(2), q.sym_size(3)}; }
};

void check_like_q(const char* name, const at::Tensor& tensor, const at::Tensor& q) {
  check_same_device(kOp, name, tensor, q, "q");
  TORCH_CHECK_TYPE(tensor.scalar_type() == q.scalar_type(), kOp, ": ", name, " must be ",
                   q.scalar_type(), " like q, got ", tensor.scalar_type());
}

// A state, or the gradient of one.
void check_state(const char* name, const at::Tensor& tensor, const Arguments& a, bool is_s) {
  const char* layout = is_s ? "[B, H, R, E]" : "[B, H, R]";
  check_data(kOp, name, tensor, is_s ? 4 : 3, layout);
  check_same_device(kOp, name, tensor, a.q, "q");
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble, kOp,
                   ": ", name, " must be float32 or float64, got ", tensor.scalar_type());
  check_size(kOp, name, tensor, 0, a.num_sequences(),
             a.cu_seqlens.has_value() ? "sequences in cu_seqlens" : "B of q");
  check_size(kOp, name, tensor, 1, a.q.sym_size(2), "H of q");
  check_size(kOp, name, tensor, 2, a.q.sym_size(3), "R of q");
  if (is_s) check_size(kOp, name, tensor, 3, a.v.sym_size(3), "E of v");
}

void check(const Arguments& a) {
  check_data(kOp, "q", a.q, 4, "[B, N, H, R]");
  check_data(kOp, "k", a.k, 4, "[B, M, H, R]");
  check_data(kOp, "v", a.v, 4, "[B, M, H, E]");
  check_like_q("k", a.k, a.q);
  check_like_q("v", a.v, a.q);
  check_size(kOp, "k", a.k, 0, a.q.sym_size(0), "B of q");
  check_size(kOp, "k", a.k, 2, a.q.sym_size(2), "H of q");
  check_size(kOp, "k", a.k, 3, a.q.sym_size(3), "R of q");
  check_size(kOp, "v", a.v, 0, a.q.sym_size(0), "B of q");
  check_size(kOp, "v", a.v, 1, a.k.sym_size(1), "M of k");
  check_size(kOp, "v", a.v, 2, a.q.sym_size(2), "H of q");
  TORCH_CHECK_VALUE(a.q.sym_size(3) > 0, kOp,
                    ": q must have at least one feature (R >= 1), got shape ", a.q.sym_sizes());
  TORCH_CHECK_VALUE(a.v.sym_size(3) > 0, kOp,
                    ": v must have at least one feature (E >= 1), got shape ", a.v.sym_sizes());
  to_feature_map(a.feature_map);
  TORCH_CHECK_VALUE(std::isfinite(a.eps) && a.eps >= 0, kOp,
                    ": eps must be finite and not negative, got ", a.eps);
  if (a.causal) {
    TORCH_CHECK_VALUE(a.q.sym_size(1).sym_eq(a.k.sym_size(1)).expect_true(__FILE__, __LINE__), kOp,
                      ": k must be as long as q (N = M) when causal, got N = ", a.q.sym_size(1),
                      " and M = ", a.k.sym_size(1),
                      "; keys before the first query belong in the initial state");
  }
  if (a.key_padding_mask.has_value()) {
    const at::Tensor& mask = *a.key_padding_mask;
    TORCH_CHECK_VALUE(mask.dim() == 2, kOp,
                      ": key_padding_mask must have 2 dimensions [B, M], got shape ",
                      mask.sym_sizes());
    TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, kOp,
                     ": key_padding_mask must be bool (true where a key is padding), got ",
                     mask.scalar_type());
    check_same_device(kOp, "key_padding_mask", mask, a.q, "q");
    check_size(kOp, "key_padding_mask", mask, 0, a.q.sym_size(0), "B of q");
    check_size(kOp, "key_padding_mask", mask, 1, a.k.sym_size(1), "M of k");
  }
  if (a.cu_seqlens.has_value()) {
    const at::Tensor& bounds = *a.cu_seqlens;
    TORCH_CHECK_VALUE(bounds.dim() == 1, kOp,
                      ": cu_seqlens must have 1 dimension [S + 1], got shape ", bounds.sym_sizes());
    TORCH_CHECK_TYPE(bounds.scalar_type() == at::kInt || bounds.scalar_type() == at::kLong, kOp,
                     ": cu_seqlens must be int32 or int64, got ", bounds.scalar_type());
    check_same_device(kOp, "cu_seqlens", bounds, a.q, "q");
    TORCH_CHECK_VALUE(bounds.sym_size(0) > 0, kOp,
                      ": cu_seqlens must have at least one entry, got shape ", bounds.sym_sizes());
    check_size(kOp, "q", a.q, 0, 1, "B, with cu_seqlens");
    check_size(kOp, "k", a.k, 1, a.q.sym_size(1), "N of q, with cu_seqlens");
  }
  TORCH_CHECK_VALUE(a.initial_s.has_value() == a.initial_z.has_value(), kOp, ": ",
                    a.initial_s.has_value() ? "initial_z" : "initial_s", " must be given with ",
                    a.initial_s.has_value() ? "initial_s" : "initial_z", ", got none");
  if (a.initial_s.has_value()) {
    check_state("initial_s", *a.initial_s, a, true);
    check_state("initial_z", *a.initial_z, a, false);
  }
}

// int64, contiguous; starts with 0, never falls, and ends with N.
at::Tensor check_bounds(const at::Tensor& cu_seqlens, int64_t length) {
  const at::Tensor bounds = cu_seqlens.to(at::kLong).contiguous();
  if (bounds.is_cuda()) {
    // Looking at the numbers would stall the device: it checks them itself, before the kernels run.
    const at::Tensor rises = (bounds.slice(0, 1) >= bounds.slice(0, 0, -1)).all();
    const at::Tensor ends = at::logical_and(bounds[0].eq(0), bounds[-1].eq(length));
    at::_assert_async(
        at::logical_and(rises, ends),
        "linear_attention: cu_seqlens must start with 0, never decrease and end with N");
    return bounds;
  }
  const int64_t* data = bounds.const_data_ptr<int64_t>();
  const int64_t last = bounds.numel() - 1;
  TORCH_CHECK_VALUE(data[0] == 0, kOp, ": cu_seqlens must start with 0, got ", data[0]);
  for (int64_t i = 0; i < last; ++i) {
    TORCH_CHECK_VALUE(data[i] <= data[i + 1], kOp, ": cu_seqlens must not decrease, got ", data[i],
                      " before ", data[i + 1], " at index ", i);
  }
  TORCH_CHECK_VALUE(data[last] == length, kOp, ": cu_seqlens must end with ", length,
                    " (N of q), got ", data[last]);
  return bounds;
}

// Contiguous and of the accumulate type; undefined for none.
at::Tensor as_state(const OptionalTensor& tensor, const Arguments& a) {
  return tensor.has_value() ? tensor->to(accumulate_type(a.q.scalar_type())).contiguous()
                            : at::Tensor();
}
const void* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}
void* mutable_data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}

// The tensors that the kernels read, in the form that they read.
struct Inputs {
  at::Tensor mask, bounds, initial_s, initial_z;

  explicit Inputs(const Arguments& a)
      : initial_s(as_state(a.initial_s, a)), initial_z(as_state(a.initial_z, a)) {
    if (a.key_padding_mask.has_value()) mask = a.key_padding_mask->contiguous();
    if (a.cu_seqlens.has_value()) bounds = check_bounds(*a.cu_seqlens, a.q.size(1));
  }

  void fill(core::LinearAttentionParams& p, const Arguments& a) const {
    p.dtype = to_dtype(a.q.scalar_type());
    p.feature_map = to_feature_map(a.feature_map);
    p.causal = a.causal;
    p.normalize = a.normalize;
    p.eps = a.eps;
    p.num_sequences = bounds.defined() ? bounds.size(0) - 1 : a.q.size(0);
    p.num_heads = a.q.size(2);
    p.query_length = a.q.size(1);
    p.key_length = a.k.size(1);
    p.num_realizations = a.q.size(3);
    p.value_features = a.v.size(3);
    p.num_threads = at::get_num_threads();
    p.cu_seqlens = bounds.defined() ? bounds.const_data_ptr<int64_t>() : nullptr;
    p.key_padding_mask = mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
    p.q = a.q.const_data_ptr();
    std::copy_n(a.q.strides().data(), 4, p.q_strides);
    p.k = a.k.const_data_ptr();
    std::copy_n(a.k.strides().data(), 4, p.k_strides);
    p.v = a.v.const_data_ptr();
    std::copy_n(a.v.strides().data(), 4, p.v_strides);
    p.initial_s = data_or_null(initial_s);
    p.initial_z = data_or_null(initial_z);
    p.out = p.final_s = p.final_z = nullptr;
  }
};

Outputs empty_outputs(const Arguments& a, bool return_state) {
  const auto state = a.state_options();
  return {at::empty_symint(a.out_shape(), a.q.options()),
          return_state ? at::empty_symint(a.s_shape(), state) : at::empty({0}, state),
          return_state ? at::empty_symint(a.z_shape(), state) : at::empty({0}, state)};
}

Outputs forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                c10::string_view feature_map, bool causal, bool normalize, double eps,
                const OptionalTensor& key_padding_mask, const OptionalTensor& cu_seqlens,
                const OptionalTensor& initial_s, const OptionalTensor& initial_z,
                bool return_state) {
  const Arguments a{q,          k,         v,        feature_map,
                    causal,     normalize, eps,      key_padding_mask,
                    cu_seqlens, initial_s, initial_z};
  check(a);
  const Inputs inputs(a);
  const Outputs outputs = empty_outputs(a, return_state);
  core::LinearAttentionParams params;
  inputs.fill(params, a);
  params.out = std::get<0>(outputs).mutable_data_ptr();
  if (return_state) {
    params.final_s = std::get<1>(outputs).mutable_data_ptr();
    params.final_z = std::get<2>(outputs).mutable_data_ptr();
  }
  linear_attention_kernels(q.device().type()).forward(params, q);
  return outputs;
}

Outputs forward_meta(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     c10::string_view feature_map, bool causal, bool normalize, double eps,
                     const OptionalTensor& key_padding_mask, const OptionalTensor& cu_seqlens,
                     const OptionalTensor& initial_s, const OptionalTensor& initial_z,
                     bool return_state) {
  const Arguments a{q,          k,         v,        feature_map,
                    causal,     normalize, eps,      key_padding_mask,
                    cu_seqlens, initial_s, initial_z};
  check(a);
  return empty_outputs(a, return_state);
}

void check_backward(const Arguments& a, const OptionalTensor& grad_out,
                    const OptionalTensor& grad_s, const OptionalTensor& grad_z,
                    const OptionalTensor& out) {
  check(a);
  TORCH_CHECK_VALUE(!a.normalize || out.has_value(), kOp,
                    ": out must be given when normalize is true");
  for (const auto& [name, tensor] : {std::pair{"grad_out", &grad_out}, std::pair{"out", &out}}) {
    if (!tensor->has_value()) continue;
    check_data(kOp, name, **tensor, 4, "[B, N, H, E]");
    check_like_q(name, **tensor, a.q);
    const auto shape = a.out_shape();
    for (int64_t i = 0; i < 4; ++i) check_size(kOp, name, **tensor, i, shape[i], "of out");
  }
  if (grad_s.has_value()) check_state("grad_s", *grad_s, a, true);
  if (grad_z.has_value()) check_state("grad_z", *grad_z, a, false);
}

Gradients empty_gradients(const Arguments& a, const Mask& mask) {
  const auto like = [](bool wanted, const at::Tensor& t) {
    return wanted ? at::empty_symint(t.sym_sizes(), t.options()) : at::Tensor();
  };
  const auto like_optional = [&](bool wanted, const OptionalTensor& t) {
    return t.has_value() ? like(wanted, *t) : at::Tensor();
  };
  return {like(mask[0], a.q), like(mask[1], a.k), like(mask[2], a.v),
          like_optional(mask[3], a.initial_s), like_optional(mask[4], a.initial_z)};
}

Gradients backward(const OptionalTensor& grad_out, const OptionalTensor& grad_s,
                   const OptionalTensor& grad_z, const OptionalTensor& out, const at::Tensor& q,
                   const at::Tensor& k, const at::Tensor& v, c10::string_view feature_map,
                   bool causal, bool normalize, double eps, const OptionalTensor& key_padding_mask,
                   const OptionalTensor& cu_seqlens, const OptionalTensor& initial_s,
                   const OptionalTensor& initial_z, Mask mask) {
  const Arguments a{q,          k,         v,        feature_map,
                    causal,     normalize, eps,      key_padding_mask,
                    cu_seqlens, initial_s, initial_z};
  check_backward(a, grad_out, grad_s, grad_z, out);
  const Inputs inputs(a);
  const auto zeros_expanded = [](at::IntArrayRef shape, const at::TensorOptions& options) {
    return at::zeros({1}, options).expand(shape);
  };
  const at::Tensor grad =
      grad_out.has_value()
          ? *grad_out
          : zeros_expanded({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
  at::Tensor grad_final_s = as_state(grad_s, a), grad_final_z = as_state(grad_z, a);
  core::LinearAttentionBackwardParams params;
  inputs.fill(params, a);
  const auto s_shape = {params.num_sequences, params.num_heads, params.num_realizations,
                        params.value_features};
  const auto z_shape = {params.num_sequences, params.num_heads, params.num_realizations};
  if (grad_final_s.defined() != grad_final_z.defined()) {
    if (!grad_final_s.defined()) grad_final_s = at::zeros(s_shape, a.state_options());
    if (!grad_final_z.defined()) grad_final_z = at::zeros(z_shape, a.state_options());
  }
  auto [grad_q, grad_k, grad_v, grad_initial_s, grad_initial_z] = empty_gradients(a, mask);
  // The kernel writes these contiguously, in the accumulate type.
  const at::Tensor wide_s =
      grad_initial_s.defined() ? at::empty(s_shape, a.state_options()) : at::Tensor();
  const at::Tensor wide_z =
      grad_initial_z.defined() ? at::empty(z_shape, a.state_options()) : at::Tensor();
  params.grad_out = grad.const_data_ptr();
  std::copy_n(grad.strides().data(), 4, params.grad_out_strides);
  params.result = out.has_value() ? out->const_data_ptr() : nullptr;
  if (out.has_value()) std::copy_n(out->strides().data(), 4, params.result_strides);
  params.grad_final_s = data_or_null(grad_final_s);
  params.grad_final_z = data_or_null(grad_final_z);
  params.grad_q = mutable_data_or_null(grad_q);
  params.grad_k = mutable_data_or_null(grad_k);
  params.grad_v = mutable_data_or_null(grad_v);
  params.grad_initial_s = mutable_data_or_null(wide_s);
  params.grad_initial_z = mutable_data_or_null(wide_z);
  linear_attention_kernels(q.device().type()).backward(params, q);
  if (wide_s.defined()) grad_initial_s = wide_s.to(grad_initial_s.scalar_type());
  if (wide_z.defined()) grad_initial_z = wide_z.to(grad_initial_z.scalar_type());
  return {grad_q, grad_k, grad_v, grad_initial_s, grad_initial_z};
}

Gradients backward_meta(const OptionalTensor& grad_out, const OptionalTensor& grad_s,
                        const OptionalTensor& grad_z, const OptionalTensor& out,
                        const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        c10::string_view feature_map, bool causal, bool normalize, double eps,
                        const OptionalTensor& key_padding_mask, const OptionalTensor& cu_seqlens,
                        const OptionalTensor& initial_s, const OptionalTensor& initial_z,
                        Mask mask) {
  const Arguments a{q,          k,         v,        feature_map,
                    causal,     normalize, eps,      key_padding_mask,
                    cu_seqlens, initial_s, initial_z};
  check_backward(a, grad_out, grad_s, grad_z, out);
  return empty_gradients(a, mask);
}

auto backward_op() {
  static const auto op =
      find_operator<decltype(backward_meta)>("torch_spe::linear_attention_backward");
  return op;
}

struct LinearAttention : torch::autograd::Function<LinearAttention> {
  static torch::autograd::variable_list forward(
      torch::autograd::AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
      const at::Tensor& v, c10::string_view feature_map, bool causal, bool normalize, double eps,
      const OptionalTensor& key_padding_mask, const OptionalTensor& cu_seqlens,
      const OptionalTensor& initial_s, const OptionalTensor& initial_z, bool return_state) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, s, z] =
        linear_attention(q, k, v, feature_map, causal, normalize, eps, key_padding_mask, cu_seqlens,
                         initial_s, initial_z, return_state);
    ctx->save_for_backward({q, k, v, to_tensor(key_padding_mask), to_tensor(cu_seqlens),
                            to_tensor(initial_s), to_tensor(initial_z),
                            normalize ? out : at::Tensor()});
    ctx->saved_data["feature_map"] = std::string(feature_map);
    ctx->saved_data["causal"] = causal;
    ctx->saved_data["normalize"] = normalize;
    ctx->saved_data["eps"] = eps;
    ctx->set_materialize_grads(false);
    if (!return_state) ctx->mark_non_differentiable({s, z});
    return {out, s, z};
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const auto needed = wanted_gradients<7>(*ctx, saved);
    const std::string& feature_map = ctx->saved_data["feature_map"].toStringRef();
    auto [q, k, v, initial_s, initial_z] = backward_op().call(
        to_optional(grad_outputs[0]), to_optional(grad_outputs[1]), to_optional(grad_outputs[2]),
        to_optional(saved[7]), saved[0], saved[1], saved[2], feature_map,
        ctx->saved_data["causal"].toBool(), ctx->saved_data["normalize"].toBool(),
        ctx->saved_data["eps"].toDouble(), to_optional(saved[3]), to_optional(saved[4]),
        to_optional(saved[5]), to_optional(saved[6]),
        Mask{needed[0], needed[1], needed[2], needed[5], needed[6]});
    const at::Tensor none;
    return {q, k, v, none, none, none, none, none, none, initial_s, initial_z, none};
  }
};

Outputs forward_autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         c10::string_view feature_map, bool causal, bool normalize, double eps,
                         const OptionalTensor& key_padding_mask, const OptionalTensor& cu_seqlens,
                         const OptionalTensor& initial_s, const OptionalTensor& initial_z,
                         bool return_state) {
  const auto outputs =
      LinearAttention::apply(q, k, v, feature_map, causal, normalize, eps, key_padding_mask,
                             cu_seqlens, initial_s, initial_z, return_state);
  return {outputs[0], outputs[1], outputs[2]};
}

template <c10::DeviceType device>
Outputs forward_autocast(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                         c10::string_view feature_map, bool causal, bool normalize, double eps,
                         const OptionalTensor& key_padding_mask, const OptionalTensor& cu_seqlens,
                         const OptionalTensor& initial_s, const OptionalTensor& initial_z,
                         bool return_state) {
  const BelowAutocast<device> below;
  return linear_attention(below.cast(q), below.cast(k), below.cast(v), feature_map, causal,
                          normalize, eps, key_padding_mask, cu_seqlens, initial_s, initial_z,
                          return_state);
}

TORCH_LIBRARY_IMPL(torch_spe, CPU, m) {
  m.impl("linear_attention", forward);
  m.impl("linear_attention_backward", backward);
}
#if defined(TORCH_SPE_CUDA)
TORCH_LIBRARY_IMPL(torch_spe, CUDA, m) {
  m.impl("linear_attention", forward);
  m.impl("linear_attention_backward", backward);
}
#endif
TORCH_LIBRARY_IMPL(torch_spe, Meta, m) {
  m.impl("linear_attention", forward_meta);
  m.impl("linear_attention_backward", backward_meta);
}
TORCH_LIBRARY_IMPL(torch_spe, Autograd, m) {
  m.impl("linear_attention", forward_autograd);
  m.impl("linear_attention_backward",
         OnceDifferentiable<backward_op, &kOp, decltype(backward_meta)>::call);
}
TORCH_LIBRARY_IMPL(torch_spe, AutocastCPU, m) {
  m.impl("linear_attention", forward_autocast<c10::kCPU>);
}
TORCH_LIBRARY_IMPL(torch_spe, AutocastCUDA, m) {
  m.impl("linear_attention", forward_autocast<c10::kCUDA>);
}

}  // namespace

LinearAttentionKernels& linear_attention_kernels(c10::DeviceType device) {
  static LinearAttentionKernels cpu = {
      [](const core::LinearAttentionParams& p, const at::Tensor&) {
        cpu::linear_attention_forward(p);
      },
      [](const core::LinearAttentionBackwardParams& p, const at::Tensor&) {
        cpu::linear_attention_backward(p);
      }};
#if defined(TORCH_SPE_CUDA)
  static LinearAttentionKernels cuda = linear_attention_cuda_kernels();
  if (device == c10::kCUDA) return cuda;
#endif
  (void)device;
  return cpu;
}

}  // namespace ops

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_attention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, std::string_view feature_map,
    bool causal, bool normalize, double eps, const std::optional<at::Tensor>& key_padding_mask,
    const std::optional<at::Tensor>& cu_seqlens, const std::optional<at::Tensor>& initial_s,
    const std::optional<at::Tensor>& initial_z, bool return_state) {
  static const auto op =
      ops::find_operator<decltype(linear_attention)>("torch_spe::linear_attention");
  return op.call(q, k, v, feature_map, causal, normalize, eps, key_padding_mask, cu_seqlens,
                 initial_s, initial_z, return_state);
}

}  // namespace torch_spe
