// Arguments of the kernels of the convolution filter, for every device.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "feature_map.h"
#include "noise.h"

namespace torch_spe::core {

// Generated noise z. Positions have three coordinates; with fewer dimensions the first ones have
// size, kernel size and stride 1, and start 0.
struct NoiseParams {
  NoiseKind kind;
  std::uint64_t seed;               // on the CPU
  const std::int64_t* device_seed;  // the same number, where the kernels run
  int ndim;
  std::int64_t stride[3];  // of polyphase noise, see core/noise.h
  std::int64_t start[3];   // the first position
};

struct ConvFilterParams {
  DType dtype;  // of x, out, grad_out, grad_x; "accumulate type" is float, or double for it
  FeatureMap feature_map = FeatureMap::kIdentity;  // phi: what is encoded is phi(x)
  std::int64_t batch;                              // B
  std::int64_t size[3];                            // of the grid of positions
  std::int64_t num_heads;                          // H
  std::int64_t in_features;                        // D
  std::int64_t num_realizations;                   // R
  std::int64_t kernel_size[3];                     // P
  int num_threads;                                 // on the CPU
  const void* x;                                   // [B, *size, H, D], strided
  std::int64_t x_strides[6];
  const void* kernel;    // [H, D, *P], accumulate type
  const void* constant;  // [H, D, R], accumulate type, or null for 0
  NoiseParams generated;
  const void* noise;  // [H, D, *(size + P - 1), R], strided, or null for generated noise
  DType noise_dtype;
  std::int64_t noise_strides[6];
  void* out;  // [B, *size, H, R]
};

struct ConvFilterBackwardParams : ConvFilterParams {
  const void* grad_out;  // [B, *size, H, R], strided
  std::int64_t grad_out_strides[6];
  // Each of these may be null when its gradient is not wanted.
  void* grad_x;         // [B, *size, H, D]
  void* grad_kernel;    // [H, D, *P], accumulate type
  void* grad_noise;     // [H, D, *(size + P - 1), R], of noise_dtype
  void* grad_constant;  // [H, D, R], accumulate type
};

struct ConvNoiseParams {
  DType dtype;
  std::int64_t num_heads, in_features, num_realizations;
  std::int64_t size[3];
  int num_threads;  // on the CPU
  NoiseParams generated;
  void* out;  // [H, D, *size, R]
};

}  // namespace torch_spe::core
