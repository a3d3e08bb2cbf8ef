// Arguments of the kernels of linear attention, for every device.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "feature_map.h"

namespace torch_spe::core {

// With cu_seqlens there are S = num_sequences sequences in one batch row; otherwise S = B. States
// have the accumulate type of dtype: float, or double for double.
struct LinearAttentionParams {
  DType dtype;  // of q, k, v, out and their gradients
  FeatureMap feature_map;
  bool causal;
  bool normalize;
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
  const void* initial_s;  // [S, H, R, E], or null
  const void* initial_z;  // [S, H, R], or null
  void* out;              // [B, N, H, E]
  void* final_s;          // [S, H, R, E], or null
  void* final_z;          // [S, H, R], or null
};

struct LinearAttentionBackwardParams : LinearAttentionParams {
  const void* result;  // out of the forward pass, [B, N, H, E], strided; only read to normalize
  std::int64_t result_strides[4];
  const void* grad_out;  // [B, N, H, E], strided
  std::int64_t grad_out_strides[4];
  const void* grad_final_s;  // [S, H, R, E], or null
  const void* grad_final_z;  // [S, H, R], or null
  // Each of these may be null when its gradient is not wanted.
  void* grad_q;          // [B, N, H, R]
  void* grad_k;          // [B, M, H, R]
  void* grad_v;          // [B, M, H, E]
  void* grad_initial_s;  // [S, H, R, E]
  void* grad_initial_z;  // [S, H, R]
};

}  // namespace torch_spe::core
