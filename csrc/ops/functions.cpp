// The public C++ functions: calls through the dispatcher. Arguments of an operator that a function
// does not have take the schema's default.
#include <ATen/core/dispatch/Dispatcher.h>

#include "noise_arguments.h"
#include "torch_spe/torch_spe.h"

namespace torch_spe {
namespace {

using MaybeTensor = std::optional<at::Tensor>;

c10::OperatorHandle find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

torch::jit::Stack call(const c10::OperatorHandle& op, torch::jit::Stack stack) {
  const auto& arguments = op.schema().arguments();
  while (stack.size() < arguments.size())
    stack.push_back(arguments[stack.size()].default_value().value());
  op.callBoxed(stack);
  return stack;
}

c10::IValue text(std::string_view value) { return std::string(value); }

}  // namespace

at::Tensor sine_filter(const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& weight,
                       const MaybeTensor& constant, const MaybeTensor& positions, double start,
                       std::string_view feature_map) {
  static const auto op = find("torch_spe::sine_filter");
  return call(op, {x, freqs, weight, constant, positions, start, text(feature_map)})[0].toTensor();
}

at::Tensor phasor_filter(const at::Tensor& x, const at::Tensor& freqs,
                         const at::Tensor& coefficients, const MaybeTensor& constant,
                         const MaybeTensor& positions, double start, std::string_view feature_map) {
  static const auto op = find("torch_spe::phasor_filter");
  return call(op, {x, freqs, coefficients, constant, positions, start, text(feature_map)})[0]
      .toTensor();
}

at::Tensor sine_features(const at::Tensor& x, const at::Tensor& freqs, const at::Tensor& amplitudes,
                         const MaybeTensor& offsets, const MaybeTensor& constant,
                         const MaybeTensor& positions, double start, std::string_view feature_map) {
  static const auto op = find("torch_spe::sine_features");
  return call(op, {x, freqs, amplitudes, offsets, constant, positions, start, text(feature_map)})[0]
      .toTensor();
}

at::Tensor rotary(const at::Tensor& x, const at::Tensor& freqs, const MaybeTensor& positions,
                  double start, std::string_view feature_map) {
  static const auto op = find("torch_spe::rotary");
  return call(op, {x, freqs, positions, start, text(feature_map)})[0].toTensor();
}

at::Tensor conv_filter(const at::Tensor& x, const at::Tensor& kernel, const MaybeTensor& noise,
                       const MaybeTensor& constant, const MaybeTensor& seed,
                       std::optional<int64_t> num_realizations, const std::string& noise_kind,
                       at::IntArrayRef noise_stride, at::IntArrayRef start,
                       std::string_view feature_map) {
  static const auto op = find("torch_spe::conv_filter");
  return call(op, {x, kernel, noise, constant, seed, num_realizations, noise_kind, noise_stride,
                   start, text(feature_map)})[0]
      .toTensor();
}

at::Tensor conv_noise(const at::Tensor& seed, int64_t num_heads, int64_t in_features,
                      at::IntArrayRef size, int64_t num_realizations, const std::string& noise_kind,
                      at::IntArrayRef noise_stride, at::IntArrayRef start,
                      std::optional<at::ScalarType> dtype) {
  static const auto op = find("torch_spe::conv_noise");
  return call(op, {seed, num_heads, in_features, size, num_realizations, noise_kind, noise_stride,
                   start, ops::name_of(dtype.value_or(at::kFloat))})[0]
      .toTensor();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_attention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, std::string_view feature_map,
    bool causal, bool normalize, double eps, const MaybeTensor& key_padding_mask,
    const MaybeTensor& cu_seqlens, const MaybeTensor& initial_s, const MaybeTensor& initial_z,
    bool return_state, const MaybeTensor& denominator_q, const MaybeTensor& denominator_k,
    std::string_view denominator_feature_map, bool rms_norm, const MaybeTensor& log_decay) {
  static const auto op = find("torch_spe::linear_attention");
  const auto results =
      call(op, {q, k, v, text(feature_map), causal, normalize, eps, key_padding_mask, cu_seqlens,
                initial_s, initial_z, return_state, denominator_q, denominator_k,
                text(denominator_feature_map), rms_norm, log_decay});
  return {results[0].toTensor(), results[1].toTensor(), results[2].toTensor()};
}

at::Tensor sine_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& freqs, const at::Tensor& amplitudes,
                          const MaybeTensor& offsets, const MaybeTensor& constant, double start,
                          std::string_view feature_map, std::string_view encoded_feature_map,
                          bool causal, bool normalize, double eps,
                          const MaybeTensor& key_padding_mask, const MaybeTensor& denominator_q,
                          const MaybeTensor& denominator_k,
                          std::string_view denominator_feature_map, bool rms_norm,
                          const MaybeTensor& log_decay) {
  static const auto op = find("torch_spe::sine_attention");
  return call(op,
              {q, k, v, freqs, amplitudes, offsets, constant, start, text(feature_map),
               text(encoded_feature_map), causal, normalize, eps, key_padding_mask, denominator_q,
               denominator_k, text(denominator_feature_map), rms_norm, log_decay})[0]
      .toTensor();
}

std::tuple<at::Tensor, at::Tensor> linear_attention_state(
    const at::Tensor& k, const at::Tensor& v, std::string_view feature_map,
    const MaybeTensor& key_padding_mask, const MaybeTensor& cu_seqlens,
    const MaybeTensor& initial_s, const MaybeTensor& initial_z, const MaybeTensor& denominator_k,
    std::string_view denominator_feature_map, const MaybeTensor& log_decay) {
  static const auto op = find("torch_spe::linear_attention_state");
  const auto results =
      call(op, {k, v, text(feature_map), key_padding_mask, cu_seqlens, initial_s, initial_z,
                denominator_k, text(denominator_feature_map), log_decay});
  return {results[0].toTensor(), results[1].toTensor()};
}

}  // namespace torch_spe
