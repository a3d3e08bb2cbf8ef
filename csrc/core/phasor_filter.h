// Arguments of the kernels of the phasor filter, for every device.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "feature_map.h"

namespace torch_spe::core {

struct PhasorFilterParams {
  DType
      dtype;  // of x, out, grad_out and grad_x; "accumulate type" below is float, or double for it
  FeatureMap feature_map = FeatureMap::kIdentity;  // phi: what is encoded is phi(x)
  std::int64_t batch;                              // B
  std::int64_t length;                             // N
  std::int64_t num_heads;                          // H
  std::int64_t in_features;                        // D
  std::int64_t num_pairs;                          // R / 2
  std::int64_t ndim;                               // dimensions of a position
  int num_threads;                                 // on the CPU
  const void* x;                                   // [B, N, H, D], strided
  std::int64_t x_strides[4];
  const double* freqs;       // [H, D, R/2, ndim], cycles per position
  const void* coefficients;  // [H, D, R/2, 2], accumulate type
  const void* constant;      // [H, D, R], accumulate type, or null
  const double* positions;   // [N, ndim], or null for start, start + 1, ...
  double start;
  void* out;  // [B, N, H, R]
};

struct PhasorFilterBackwardParams : PhasorFilterParams {
  const void* grad_out;  // [B, N, H, R], strided
  std::int64_t grad_out_strides[4];
  // Each of these may be null when its gradient is not wanted.
  void* grad_x;               // [B, N, H, D]
  double* grad_freqs;         // [H, D, R/2, ndim]
  double* grad_coefficients;  // [H, D, R/2, 2]
  double* grad_constant;      // [H, D, R]
  double* grad_positions;     // [N, ndim]
};

}  // namespace torch_spe::core
