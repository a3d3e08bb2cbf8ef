// The description of the operator torch_spe::linear_attention, also for operators that encode
// first.
#pragma once

#include <cmath>

#include "attention.h"

namespace torch_spe::ops {

struct LinearAttention : Operator {
  static constexpr const char* kName = "linear_attention";
  static constexpr const char* kSchema =
      "linear_attention(Tensor q, Tensor k, Tensor v, str feature_map='elu', bool causal=False, "
      "bool normalize=True, float eps=1e-6, Tensor? key_padding_mask=None, "
      "Tensor? cu_seqlens=None, Tensor? initial_s=None, Tensor? initial_z=None, "
      "bool return_state=False, Tensor? denominator_q=None, Tensor? denominator_k=None, "
      "str denominator_feature_map='identity', bool rms_norm=False, Tensor? log_decay=None) "
      "-> (Tensor out, Tensor s, Tensor z, Tensor divisor)";
  static constexpr const char* kDoc =
      "Linear attention [B, N, H, E] of queries q [B, N, H, R], keys k [B, M, H, R] and values v "
      "[B, M, H, E]; the state after the last key with return_state; what each row was divided "
      "by.";
  static constexpr std::array kGradients{
      "q", "k", "v", "initial_s", "initial_z", "denominator_q", "denominator_k", "log_decay"};
  static constexpr std::array kData{"q", "k", "v", "denominator_q", "denominator_k"};
  static constexpr std::array kOutputs{"out", "s", "z"};
  static constexpr std::array kSaved{"out", "divisor"};

  struct Arguments : AttentionKeys {
    at::Tensor q;  // [B, N, H, R]
    bool causal, normalize, rms_norm, return_state = false;
    double eps;
    OptionalTensor denominator_q;  // [B, N, H, F]

    auto fields() {
      return std::tie(q, k, v, feature_map, causal, normalize, eps, key_padding_mask, cu_seqlens,
                      initial_s, initial_z, return_state, denominator_q, denominator_k,
                      denominator_feature_map, rms_norm, log_decay);
    }
    bool divides() const { return normalize || rms_norm; }
    c10::SymDimVector out_sizes() const {
      return {q.sym_size(0), q.sym_size(1), q.sym_size(2), v.sym_size(3)};
    }
  };

  static bool is_differentiable(const Arguments& a, std::size_t output) {
    return output == 0 || a.return_state;
  }
  static bool keeps_outputs(const Arguments& a) { return a.divides(); }

  static void check(const Arguments& a, const char* op = kName, const char* features = "R",
                    const char* decay_forms = "[H], [H, R], [B, N, H] or [B, N, H, R]") {
    check_data(op, "q", a.q, 4, (std::string("[B, N, H, ") + features + "]").c_str());
    check_keys(op, a, a.q, "q", features);
    TORCH_CHECK_VALUE(std::isfinite(a.eps) && a.eps >= 0, op,
                      ": eps must be finite and not negative, got ", a.eps);
    TORCH_CHECK_VALUE(!a.rms_norm || !a.normalize, op,
                      ": rms_norm and normalize exclude each other, got both true");
    if (a.causal) {
      TORCH_CHECK_VALUE(a.q.sym_size(1).sym_eq(a.k.sym_size(1)).expect_true(__FILE__, __LINE__), op,
                        ": k must be as long as q (N = M) when causal, got N = ", a.q.sym_size(1),
                        " and M = ", a.k.sym_size(1),
                        "; keys before the first query belong in the initial state");
    }
    if (a.cu_seqlens.has_value())
      check_size(op, "k", a.k, 1, a.q.sym_size(1), "N of q, with cu_seqlens");
    if (a.log_decay.has_value())
      check_size(op, "k", a.k, 1, a.q.sym_size(1), "N of q, with log_decay");
    TORCH_CHECK_VALUE(
        a.denominator_q.has_value() == a.denominator_k.has_value(), op, ": ",
        a.denominator_q.has_value() ? "denominator_k" : "denominator_q", " must be given with ",
        a.denominator_q.has_value() ? "denominator_q" : "denominator_k", ", got none");
    check_key_options(op, a, a.q, "q", decay_forms);
    if (a.denominator_q.has_value()) {
      const at::Tensor& q = *a.denominator_q;
      TORCH_CHECK_VALUE(a.normalize, op,
                        ": normalize must be true with denominator_q and denominator_k");
      check_data(op, "denominator_q", q, 4, "[B, N, H, F]");
      check_like(op, "denominator_q", q, a.q, "q");
      check_size(op, "denominator_q", q, 0, a.q.sym_size(0), "B of q");
      check_size(op, "denominator_q", q, 1, a.q.sym_size(1), "N of q");
      check_size(op, "denominator_q", q, 2, a.q.sym_size(2), "H of q");
      check_size(op, "denominator_q", q, 3, a.num_features(), "F of denominator_k");
    }
  }

  static void check_values(const Arguments& a) { check_decay_values(kName, a); }

  static TensorSpecs results(const Arguments& a) {
    const at::TensorOptions state = a.s().options;
    return {{a.out_sizes(), a.q.options()},
            a.return_state ? a.s() : TensorSpec{{0}, state},
            a.return_state ? a.z() : TensorSpec{{0}, state},
            a.divides() ? TensorSpec{{a.q.sym_size(0), a.q.sym_size(1), a.q.sym_size(2)}, state}
                        : TensorSpec{{0}, state}};
  }

  static void fill(core::LinearAttentionParams& p, const Arguments& a, KernelTensors& kept) {
    fill_keys(kName, p, a, kept, "N of q");
    p.causal = a.causal;
    p.normalize = a.normalize;
    p.rms_norm = a.rms_norm;
    p.eps = a.eps;
    p.query_length = a.q.size(1);
    p.q = a.q.const_data_ptr();
    copy_strides(a.q, p.q_strides);
    if (p.has_own_denominator) {
      p.denominator_q = a.denominator_q->const_data_ptr();
      copy_strides(*a.denominator_q, p.denominator_q_strides);
    }
  }

  static void forward(const Arguments& a, const Tensors& outputs) {
    core::LinearAttentionParams p;
    KernelTensors kept;
    fill(p, a, kept);
    run(p, a, outputs);
  }
  static void run(core::LinearAttentionParams& p, const Arguments& a, const Tensors& outputs) {
    p.out = outputs[0].mutable_data_ptr();
    if (a.return_state) {
      p.final_s = outputs[1].mutable_data_ptr();
      p.final_z = outputs[2].mutable_data_ptr();
    }
    if (a.divides()) p.row_divisor = outputs[3].mutable_data_ptr();
    kernel_of<core::LinearAttentionParams>(a.q.device().type())(p, a.q);
  }

  static void check_backward(const BackwardCall<LinearAttention>& b) {
    const Arguments& a = b.arguments;
    const auto& [grad_out, grad_s, grad_z] = b.grads;
    check_rows(a, grad_out, b.saved[0], b.saved[1]);
    if (grad_s.defined()) check_state(kName, "grad_s", grad_s, a, "q", true);
    if (grad_z.defined()) check_state(kName, "grad_z", grad_z, a, "q", false);
  }
  static void check_rows(const Arguments& a, const at::Tensor& grad_out, const at::Tensor& out,
                         const at::Tensor& divisor, const char* op = kName) {
    TORCH_CHECK_VALUE(!a.divides() || (out.defined() && divisor.defined()), op,
                      ": out and divisor must be given when normalize or rms_norm is true");
    const auto check_sizes = [&](const char* name, const at::Tensor& rows) {
      if (!rows.defined()) return;
      check_data(op, name, rows, 4, "[B, N, H, E]");
      check_like(op, name, rows, a.q, "q");
      const auto sizes = a.out_sizes();
      for (int64_t i = 0; i < 4; ++i) check_size(op, name, rows, i, sizes[i], "of out");
    };
    check_sizes("grad_out", grad_out);
    check_sizes("out", out);
    if (!divisor.defined() || !a.divides()) return;
    const TensorSpec spec = results(a)[3];
    check_data(op, "divisor", divisor, 3, "[B, N, H]");
    for (int64_t i = 0; i < 3; ++i) check_size(op, "divisor", divisor, i, spec.sizes[i], "of q");
    const auto type = accumulate_type(a.q.scalar_type());
    TORCH_CHECK_TYPE(divisor.scalar_type() == type, op, ": divisor must be ", type, ", got ",
                     divisor.scalar_type());
  }

  static void backward(BackwardCall<LinearAttention>& b) {
    core::LinearAttentionBackwardParams p;
    KernelTensors kept;
    fill_backward(p, b, kept);
    kernel_of<core::LinearAttentionBackwardParams>(b.arguments.q.device().type())(p, b.arguments.q);
  }
  static void fill_backward(core::LinearAttentionBackwardParams& p,
                            BackwardCall<LinearAttention>& b, KernelTensors& kept) {
    const Arguments& a = b.arguments;
    const auto& [grad_out, grad_s, grad_z] = b.grads;
    const auto& [out, divisor] = b.saved;
    fill(p, a, kept);
    const at::Tensor grad = kept.keep(
        grad_out.defined() ? grad_out
                           : at::zeros({1}, a.q.options())
                                 .expand({a.q.size(0), a.q.size(1), a.q.size(2), a.v.size(3)}));
    p.grad_out = grad.const_data_ptr();
    copy_strides(grad, p.grad_out_strides);
    p.result = nullptr;
    if (a.divides()) {
      p.result = out.const_data_ptr();
      copy_strides(out, p.result_strides);
      p.saved_row_divisor = kept.contiguous(divisor);
    }
    fill_state_gradients(p, a, grad_s, grad_z, kept);
    p.grad_q = b.overwritten_gradient("q", a.q.scalar_type());
    p.grad_denominator_q = b.overwritten_gradient("denominator_q", a.q.scalar_type());
    set_key_gradients(p, b);
  }
};

}  // namespace torch_spe::ops
