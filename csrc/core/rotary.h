// Arguments of the kernels of rotary positions, for every device.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "feature_map.h"

namespace torch_spe::core {

// Features 2i and 2i + 1 of phi(x) are rotated by the angle 2 pi freqs[h, i] n.
struct RotaryParams {
  DType dtype;                                     // of x, out, grad_out and grad_x
  FeatureMap feature_map = FeatureMap::kIdentity;  // phi
  std::int64_t batch;                              // B
  std::int64_t length;                             // N
  std::int64_t num_heads;                          // H
  std::int64_t in_features;                        // D, even
  int num_threads;                                 // on the CPU
  const void* x;                                   // [B, N, H, D], strided
  std::int64_t x_strides[4];
  const double* freqs;      // [H, D/2], cycles per position
  const double* positions;  // [N], or null for start, start + 1, ...
  double start;
  void* out;  // [B, N, H, D]
};

struct RotaryBackwardParams : RotaryParams {
  const void* grad_out;  // [B, N, H, D], strided
  std::int64_t grad_out_strides[4];
  // Each of these may be null when its gradient is not wanted.
  void* grad_x;            // [B, N, H, D]
  double* grad_freqs;      // [H, D/2]
  double* grad_positions;  // [N]
};

}  // namespace torch_spe::core
