// What linear_attention and linear_attention_state share: keys, values and the state they make.
#pragma once

#include "core/linear_attention.h"
#include "kernels.h"
#include "params.h"
#include "register.h"

namespace torch_spe::ops {

struct AttentionKeys {
  at::Tensor k;  // [B, M, H, R]
  at::Tensor v;  // [B, M, H, E]
  std::string feature_map;
  OptionalTensor key_padding_mask;  // [B, M]
  OptionalTensor cu_seqlens;        // [S + 1]
  OptionalTensor initial_s;         // [S, H, R, E]
  OptionalTensor initial_z;         // [S, H, F]
  OptionalTensor denominator_k;     // [B, M, H, F]
  std::string denominator_feature_map;
  OptionalTensor log_decay;  // [H], [H, R], [B, M, H] or [B, M, H, R]

  c10::SymInt num_sequences() const;  // S
  c10::SymInt num_features() const;   // F
  TensorSpec s() const;
  TensorSpec z() const;
};

// k and v alone; `like` is a tensor of the batch size, number of heads and type that all have, and
// `features` the letter of its last size.
void check_keys(const char* op, const AttentionKeys& a, const at::Tensor& like,
                const char* like_name, const char* features = "R");
// What comes with them; `decay_forms` are the shapes of log_decay, as errors list them.
void check_key_options(const char* op, const AttentionKeys& a, const at::Tensor& like,
                       const char* like_name, const char* decay_forms);
// On the CPU, an error that names the first entry of log_decay that is NaN or greater than 0.
void check_decay_values(const char* op, const AttentionKeys& a);
// A state or the gradient of one.
void check_state(const char* op, const char* name, const at::Tensor& tensor, const AttentionKeys& a,
                 const char* like_name, bool is_s);
void check_like(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& like,
                const char* like_name);

// Parameters that belong to the keys; `length_name` says what cu_seqlens ends with.
void fill_keys(const char* op, core::LinearAttentionParams& p, const AttentionKeys& a,
               KernelTensors& kept, const char* length_name);

// Gradients of the final state; where one is given and the other is not, that is 0.
void fill_state_gradients(core::LinearAttentionBackwardParams& p, const AttentionKeys& a,
                          const at::Tensor& grad_s, const at::Tensor& grad_z, KernelTensors& kept);

// Where the gradients of keys and states are written.
template <class Call>
void set_key_gradients(core::LinearAttentionBackwardParams& p, Call& b) {
  const auto type = b.arguments.k.scalar_type();
  p.grad_k = b.overwritten_gradient("k", type);
  p.grad_v = b.overwritten_gradient("v", type);
  p.grad_initial_s = b.overwritten_gradient("initial_s", accumulate_type(type));
  p.grad_initial_z = b.overwritten_gradient("initial_z", accumulate_type(type));
  p.grad_denominator_k = b.overwritten_gradient("denominator_k", type);
  if (!b.arguments.log_decay.has_value()) return;
  p.grad_log_decay = b.overwritten_gradient("log_decay", b.arguments.log_decay->scalar_type());
  p.constant_decay = b.arguments.log_decay->dim() <= 2;
}

}  // namespace torch_spe::ops
