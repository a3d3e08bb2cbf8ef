// Public C++ functions of torch_spe. All are differentiable and dispatch on the device of their
// arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

namespace torch_spe {

// Encodes x with sine codes: xhat[b,n,h,r] = sum_d x[b,n,h,d] Xbar[n,h,d,r], where
//   Xbar[n,h,d,r] = constant[h,d,r] + sum_k cos(2 pi f n) weight[h,d,2k,r] + sin(2 pi f n)
//   weight[h,d,2k+1,r]
// with f = freqs[h,d,k] in cycles per position. Xbar is never stored.
//
// With a feature map phi, "elu" (elu + 1) or "relu", what is encoded is phi(x).
//
// The result is [B, N, H, R], of x's type. Positions are start, start + 1, ... or those given, int
// or float; they are differentiable when they are float. Throws c10::Error (ValueError, TypeError
// in Python) naming the argument.
at::Tensor sine_filter(
    const at::Tensor& x,                                        // [B, N, H, D]
    const at::Tensor& freqs,                                    // [H, D, K] or [H, D, K, ndim]
    const at::Tensor& weight,                                   // [H, D, 2K, R]
    const std::optional<at::Tensor>& constant = std::nullopt,   // [H, D, R]
    const std::optional<at::Tensor>& positions = std::nullopt,  // [N] or [N, ndim]
    double start = 0, std::string_view feature_map = "identity");

// Encodes x with one sinusoid for each feature and pair of realizations: with c =
// coefficients[h,d,i,0] + i coefficients[h,d,i,1] and f = freqs[h,d,i] in cycles per position,
//   xhat[b,n,h,2i] + i xhat[b,n,h,2i+1]
//     = sum_d x[b,n,h,d] (c e^(2 pi i f n) + constant[h,d,2i] + i constant[h,d,2i+1]).
//
// Result, feature map, positions and errors are those of sine_filter.
at::Tensor phasor_filter(
    const at::Tensor& x,                                        // [B, N, H, D]
    const at::Tensor& freqs,                                    // [H, D, R/2] or [H, D, R/2, ndim]
    const at::Tensor& coefficients,                             // [H, D, R/2, 2]
    const std::optional<at::Tensor>& constant = std::nullopt,   // [H, D, R]
    const std::optional<at::Tensor>& positions = std::nullopt,  // [N] or [N, ndim]
    double start = 0, std::string_view feature_map = "identity");

// The codes' sines themselves as features, without noise: with f = freqs[h,d,k] in cycles per
// position, theta = offsets[h,d,k] (0 if not given) in radians and a = amplitudes[h,d,k], the
// result [B, N, H, 2KD], or [B, N, H, (2K + 1) D] with a constant, holds
//   at 2kD + d:       x[b,n,h,d] a cos(2 pi f n + theta),
//   at (2k + 1)D + d: x[b,n,h,d] a sin(2 pi f n + theta),
//   at 2KD + d:       x[b,n,h,d] constant[h,d],
// so that products of such rows are sums over d of relative position kernels. Feature map,
// positions and errors are those of sine_filter.
at::Tensor sine_features(
    const at::Tensor& x,                                        // [B, N, H, D]
    const at::Tensor& freqs,                                    // [H, D, K] or [H, D, K, ndim]
    const at::Tensor& amplitudes,                               // [H, D, K]
    const std::optional<at::Tensor>& offsets = std::nullopt,    // [H, D, K]
    const std::optional<at::Tensor>& constant = std::nullopt,   // [H, D]
    const std::optional<at::Tensor>& positions = std::nullopt,  // [N] or [N, ndim]
    double start = 0, std::string_view feature_map = "identity");

// Rotary positions: rotates features 2i and 2i + 1 of phi(x), phi the feature map, at position n by
// the angle 2 pi freqs[h,i] n. The result is [B, N, H, D], of x's type. Positions and errors are
// those of sine_filter.
at::Tensor rotary(const at::Tensor& x,                                        // [B, N, H, D]
                  const at::Tensor& freqs,                                    // [H, D/2]
                  const std::optional<at::Tensor>& positions = std::nullopt,  // [N]
                  double start = 0, std::string_view feature_map = "identity");

// Encodes x with codes of filtered noise: xhat[b,n,h,r] = sum_d x[b,n,h,d] Xbar[n,h,d,r], where
//   Xbar[n,h,d,r] = constant[h,d,r] + sum_p kernel[h,d,p] z[h,d,n+p,r]
// and n and p have one, two or three coordinates. Neither Xbar nor generated noise is ever stored.
//
// The noise z is given, or generated from a seed: a function of (h, d, position, r) alone, the same
// on every device, with positions start, start + 1, ... "gaussian" or "rademacher" (signs). With
// strides s, noise is polyphase: a realization has noise at one position of every s only, times the
// square root of s, and a code costs P / s products; take num_realizations divisible by the product
// of the strides. core/noise.h tells which number stands where.
//
// With a feature map phi, "elu" (elu + 1) or "relu", what is encoded is phi(x).
//
// The result is [B, *size, H, R], of x's type. Differentiable in x, kernel, noise and constant.
// Throws c10::Error (ValueError, TypeError in Python) naming the argument.
at::Tensor conv_filter(
    const at::Tensor& x,                                       // [B, *size, H, D]
    const at::Tensor& kernel,                                  // [H, D, *P]
    const std::optional<at::Tensor>& noise = std::nullopt,     // [H, D, *(size + P - 1), R]
    const std::optional<at::Tensor>& constant = std::nullopt,  // [H, D, R]
    const std::optional<at::Tensor>& seed = std::nullopt,      // [1], int64
    std::optional<int64_t> num_realizations = std::nullopt,    // needed along with seed
    const std::string& noise_kind = "gaussian",
    at::IntArrayRef noise_stride = {},  // one, or one for each dimension
    at::IntArrayRef start = {},         // one for each dimension
    std::string_view feature_map = "identity");

// The noise that conv_filter generates, [H, D, *size, R], at the positions from `start` on; of type
// float32 unless given.
at::Tensor conv_noise(const at::Tensor& seed, int64_t num_heads, int64_t in_features,
                      at::IntArrayRef size, int64_t num_realizations,
                      const std::string& noise_kind = "gaussian", at::IntArrayRef noise_stride = {},
                      at::IntArrayRef start = {},
                      std::optional<at::ScalarType> dtype = std::nullopt);

// Linear attention: out[n] = sum_m w_nm v_m / (sum_m w_nm + eps), w_nm = phi(q_n) . phi(k_m), over
// the keys m <= n when causal; 0 where that is 0 / 0; without the division when normalize is false.
// The feature map phi is "identity", "elu" (elu + 1) or "relu". No N x M matrix is stored.
//
// With denominator_q and denominator_k the denominator has features of its own, mapped by
// denominator_feature_map: sum_m psi(dq_n) . psi(dk_m) + eps. With rms_norm instead of normalize,
// rows are divided by the root of their mean square plus eps.
//
// With log_decay the weight of key m for query n is multiplied by exp(-|d_n - d_m|), d being the
// cumulative sums of the steps log_decay <= 0; token n has the step from the token before it. Steps
// may be the same for all tokens, and apart for the features of queries and keys.
//
// The results are out [B, N, H, E], of q's type, and, with return_state, the state after the last
// key, S = sum_m phi(k_m) v_m^T [B, H, R, E] and z = sum_m phi(k_m) [B, H, R] (of psi(dk_m),
// [B, H, F], with denominator_k), in float32, or float64 for float64 (both empty without). Passed
// on as initial_s and initial_z, it stands for the keys that made it. With cu_seqlens the S
// sequences packed in one row are independent of each other, and states have S rows. Causal
// attention takes as many keys as queries. Throws c10::Error (ValueError, TypeError in Python)
// naming the argument.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_attention(
    const at::Tensor& q,  // [B, N, H, R]
    const at::Tensor& k,  // [B, M, H, R]
    const at::Tensor& v,  // [B, M, H, E]
    std::string_view feature_map = "elu", bool causal = false, bool normalize = true,
    double eps = 1e-6,
    const std::optional<at::Tensor>& key_padding_mask = std::nullopt,  // [B, M], true for padding
    const std::optional<at::Tensor>& cu_seqlens = std::nullopt,        // [S + 1], int32 or int64
    const std::optional<at::Tensor>& initial_s = std::nullopt,         // [B, H, R, E]
    const std::optional<at::Tensor>& initial_z = std::nullopt,         // [B, H, R]
    bool return_state = false,
    const std::optional<at::Tensor>& denominator_q = std::nullopt,  // [B, N, H, F]
    const std::optional<at::Tensor>& denominator_k = std::nullopt,  // [B, M, H, F]
    std::string_view denominator_feature_map = "identity", bool rms_norm = false,
    // [H], [H, R], [B, N, H] or [B, N, H, R]
    const std::optional<at::Tensor>& log_decay = std::nullopt);

// sine_features of q (with the offsets) and k at the positions start, start + 1, ..., then
// linear_attention of these with `encoded_feature_map`, without encoded queries and keys in memory
// on the CPU, and for the backward pass on no device. The result is [B, N, H, E], of q's type.
at::Tensor sine_attention(
    const at::Tensor& q,                                       // [B, N, H, D]
    const at::Tensor& k,                                       // [B, M, H, D]
    const at::Tensor& v,                                       // [B, M, H, E]
    const at::Tensor& freqs,                                   // [H, D, K]
    const at::Tensor& amplitudes,                              // [H, D, K]
    const std::optional<at::Tensor>& offsets = std::nullopt,   // [H, D, K]
    const std::optional<at::Tensor>& constant = std::nullopt,  // [H, D]
    double start = 0, std::string_view feature_map = "identity",
    std::string_view encoded_feature_map = "identity", bool causal = false, bool normalize = true,
    double eps = 1e-6,
    const std::optional<at::Tensor>& key_padding_mask = std::nullopt,  // [B, M], true for padding
    const std::optional<at::Tensor>& denominator_q = std::nullopt,     // [B, N, H, F]
    const std::optional<at::Tensor>& denominator_k = std::nullopt,     // [B, M, H, F]
    std::string_view denominator_feature_map = "identity", bool rms_norm = false,
    const std::optional<at::Tensor>& log_decay = std::nullopt);  // [H] or [B, N, H]

// The state (S, z) that linear_attention returns, of keys and values alone.
std::tuple<at::Tensor, at::Tensor> linear_attention_state(
    const at::Tensor& k,  // [B, M, H, R]
    const at::Tensor& v,  // [B, M, H, E]
    std::string_view feature_map = "elu",
    const std::optional<at::Tensor>& key_padding_mask = std::nullopt,  // [B, M], true for padding
    const std::optional<at::Tensor>& cu_seqlens = std::nullopt,        // [S + 1], int32 or int64
    const std::optional<at::Tensor>& initial_s = std::nullopt,         // [B, H, R, E]
    const std::optional<at::Tensor>& initial_z = std::nullopt,         // [B, H, R]
    const std::optional<at::Tensor>& denominator_k = std::nullopt,     // [B, M, H, F]
    std::string_view denominator_feature_map = "identity",
    // [H], [H, R], [B, M, H] or [B, M, H, R]
    const std::optional<at::Tensor>& log_decay = std::nullopt);

// How this library was built, and what it uses on this machine.
struct BuildInfo {
  std::string version;   // of torch_spe
  std::string torch;     // version of the torch that it was built for
  std::string compiler;  // e.g. "GNU 12.2.0"
  std::string cuda;      // version of the CUDA toolkit, empty for a CPU build
  std::vector<std::string> cuda_architectures;  // e.g. {"8.0", "9.0", "9.0+PTX"}
  std::string instruction_set;                  // in use here: "baseline", "avx2" or "avx512"
};
BuildInfo build_info();

}  // namespace torch_spe
