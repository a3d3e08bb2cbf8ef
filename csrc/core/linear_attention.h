// Arguments of the kernels of linear attention, for every device.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "feature_map.h"
#include "sine_features.h"

namespace torch_spe::core {

// With cu_seqlens there are S = num_sequences sequences in one batch row; otherwise S = B. States
// have the accumulate type of dtype: float, or double for double.
//
// The state of keys alone: no queries, query_length 0, not causal, q and out null.
struct LinearAttentionParams {
  DType dtype;  // of q, k, v, out and their gradients
  FeatureMap feature_map;
  bool causal;
  bool normalize;         // rows are divided by the denominator plus eps
  bool rms_norm = false;  // rows are divided by the root of their mean square plus eps instead
  double eps;
  std::int64_t num_sequences;      // S
  std::int64_t num_heads;          // H
  std::int64_t query_length;       // N
  std::int64_t key_length;         // M
  std::int64_t num_realizations;   // R
  std::int64_t value_features;     // E
  int num_threads;                 // on the CPU
  const std::int64_t* cu_seqlens;  // [S + 1], or null
  const bool* key_padding_mask;    // [B, M], true where a key is padding, or null
  const void* q;                   // [B, N, H, R], strided
  std::int64_t q_strides[4];
  const void* k;  // [B, M, H, R], strided
  std::int64_t k_strides[4];
  const void* v;  // [B, M, H, E], strided
  std::int64_t v_strides[4];
  // Features of the denominator apart from those of the numerator: the denominator is then
  // sum_m psi(dq_n) . psi(dk_m), and z the sum of psi(dk_m). Only with normalize. The pointers do
  // not say whether there are such features: a tensor without elements has none.
  bool has_own_denominator = false;
  const void* denominator_q = nullptr;  // [B, N, H, F], strided
  std::int64_t denominator_q_strides[4] = {};
  const void* denominator_k = nullptr;  // [B, M, H, F], strided
  std::int64_t denominator_k_strides[4] = {};
  FeatureMap denominator_feature_map = FeatureMap::kIdentity;  // psi
  std::int64_t denominator_features = 0;                       // F; R where they are not apart
  // The decay: the logarithm, at most 0, of the factor with which everything before a token fades
  // on the way from the token before it. Strides are 0 where it is shared; one column for all
  // features, or one for each. Then query_length is key_length, or 0 (keys alone).
  const void* log_decay = nullptr;  // [B, M, H, 1 or R], strided
  std::int64_t log_decay_strides[4] = {};
  DType log_decay_dtype = DType::kFloat32;  // or kFloat64
  std::int64_t decay_features = 0;          // 1 or R; 0 for none
  // Exact sines that encode q and k where they are loaded, or null. Then q and k are x of these,
  // [B, N, H, D], and the feature map is that of the encoded rows; positions are consecutive,
  // sequences rows of the batch, and there is at most one column of decay. CPU only.
  const SineFeaturesParams* q_sines = nullptr;
  const SineFeaturesParams* k_sines = nullptr;
  const void* initial_s;  // [S, H, R, E], or null
  const void* initial_z;  // [S, H, F], or null
  void* out;              // [B, N, H, E]
  // What every row was divided by, kept for the backward pass: the denominator plus eps, or the
  // root of the mean square plus eps; where that is 0, out is 0. Null where nobody wants it.
  void* row_divisor = nullptr;  // [B, N, H], accumulate type
  void* final_s;                // [S, H, R, E], or null
  void* final_z;                // [S, H, F], or null
};

struct LinearAttentionBackwardParams : LinearAttentionParams {
  const void* result;  // out of the forward pass, [B, N, H, E], strided; only read with normalize
                       // or rms_norm
  std::int64_t result_strides[4];
  const void* saved_row_divisor = nullptr;  // row_divisor of the forward pass, given with result
  const void* grad_out;                     // [B, N, H, E], strided
  std::int64_t grad_out_strides[4];
  const void* grad_final_s;  // [S, H, R, E], or null
  const void* grad_final_z;  // [S, H, F], or null
  // Each of these may be null when its gradient is not wanted.
  void* grad_q;                        // [B, N, H, R]
  void* grad_k;                        // [B, M, H, R]
  void* grad_v;                        // [B, M, H, E]
  void* grad_initial_s;                // [S, H, R, E]
  void* grad_initial_z;                // [S, H, F]
  void* grad_denominator_q = nullptr;  // [B, N, H, F]
  void* grad_denominator_k = nullptr;  // [B, M, H, F]
  // Of log_decay_dtype: [H, 1 or R], summed over batch and tokens, if the decay is shared by these
  // (constant_decay), else [B, M, H, 1 or R].
  void* grad_log_decay = nullptr;
  bool constant_decay = false;
  // With sines grad_q and grad_k are grad_x of these, [B, N, H, D].
  const SineFeaturesBackwardParams* grad_q_sines = nullptr;
  const SineFeaturesBackwardParams* grad_k_sines = nullptr;
};

}  // namespace torch_spe::core
