// The operator torch_spe::linear_attention_state: what keys and values leave behind, without
// queries. Its kernels are those of linear_attention.
#include "attention.h"

namespace torch_spe::ops {
namespace {

struct LinearAttentionState : Operator {
  static constexpr const char* kName = "linear_attention_state";
  static constexpr const char* kSchema =
      "linear_attention_state(Tensor k, Tensor v, str feature_map='elu', "
      "Tensor? key_padding_mask=None, Tensor? cu_seqlens=None, Tensor? initial_s=None, "
      "Tensor? initial_z=None, Tensor? denominator_k=None, "
      "str denominator_feature_map='identity', Tensor? log_decay=None) -> (Tensor s, Tensor z)";
  static constexpr const char* kDoc =
      "The state of linear attention after keys k [B, M, H, R] and values v [B, M, H, E]: "
      "s [B, H, R, E] and z [B, H, R].";
  static constexpr std::array kGradients{"k",        "v", "initial_s", "initial_z", "denominator_k",
                                         "log_decay"};
  static constexpr std::array kData{"k", "v", "denominator_k"};
  static constexpr std::array kOutputs{"s", "z"};

  struct Arguments : AttentionKeys {
    auto fields() {
      return std::tie(k, v, feature_map, key_padding_mask, cu_seqlens, initial_s, initial_z,
                      denominator_k, denominator_feature_map, log_decay);
    }
  };

  static void check(const Arguments& a) {
    check_data(kName, "k", a.k, 4, "[B, M, H, R]");
    check_keys(kName, a, a.k, "k");
    check_key_options(kName, a, a.k, "k", "[H], [H, R], [B, M, H] or [B, M, H, R]");
  }

  static void check_values(const Arguments& a) { check_decay_values(kName, a); }

  static TensorSpecs results(const Arguments& a) { return {a.s(), a.z()}; }

  static void fill(core::LinearAttentionParams& p, const Arguments& a, KernelTensors& kept) {
    fill_keys(kName, p, a, kept, "M of k");
    p.causal = false;
    p.normalize = true;  // z is wanted
    p.eps = 0;
    p.query_length = 0;
    p.q = nullptr;
    std::fill_n(p.q_strides, 4, 0);
  }

  static void forward(const Arguments& a, const Tensors& outputs) {
    core::LinearAttentionParams p;
    KernelTensors kept;
    fill(p, a, kept);
    p.final_s = outputs[0].mutable_data_ptr();
    p.final_z = outputs[1].mutable_data_ptr();
    kernel_of<core::LinearAttentionParams>(a.k.device().type())(p, a.k);
  }

  static void check_backward(const BackwardCall<LinearAttentionState>& b) {
    const auto& [grad_s, grad_z] = b.grads;
    if (grad_s.defined()) check_state(kName, "grad_s", grad_s, b.arguments, "k", true);
    if (grad_z.defined()) check_state(kName, "grad_z", grad_z, b.arguments, "k", false);
  }

  static void backward(BackwardCall<LinearAttentionState>& b) {
    const Arguments& a = b.arguments;
    core::LinearAttentionBackwardParams p;
    KernelTensors kept;
    fill(p, a, kept);
    p.result = p.grad_out = nullptr;
    std::fill_n(p.result_strides, 4, 0);
    std::fill_n(p.grad_out_strides, 4, 0);
    fill_state_gradients(p, a, b.grads[0], b.grads[1], kept);
    p.grad_q = nullptr;
    set_key_gradients(p, b);
    kernel_of<core::LinearAttentionBackwardParams>(a.k.device().type())(p, a.k);
  }
};

const Registration<LinearAttentionState> registration;

}  // namespace
}  // namespace torch_spe::ops
