// The schemas of all operators, in one place.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

TORCH_LIBRARY(torch_spe, m) {
  m.def(
      "conv_filter(Tensor x, Tensor kernel, Tensor? noise=None, Tensor? constant=None, "
      "Tensor? seed=None, SymInt? num_realizations=None, str noise_kind='gaussian', "
      "int[] noise_stride=[], SymInt[] start=[]) -> Tensor");
  m.def(
      "conv_filter_backward(Tensor grad_out, Tensor x, Tensor kernel, Tensor? noise, "
      "Tensor? constant, Tensor? seed, str noise_kind, int[] noise_stride, SymInt[] start, "
      "bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "conv_noise(Tensor seed, SymInt num_heads, SymInt in_features, SymInt[] size, "
      "SymInt num_realizations, str noise_kind='gaussian', int[] noise_stride=[], "
      "SymInt[] start=[], ScalarType? dtype=None) -> Tensor");
  m.def(
      "sine_filter(Tensor x, Tensor freqs, Tensor weight, Tensor? constant=None, Tensor? "
      "positions=None, "
      "float start=0.0) -> Tensor");
  m.def(
      "sine_filter_backward(Tensor grad_out, Tensor x, Tensor freqs, Tensor weight, Tensor? "
      "constant, "
      "Tensor? positions, float start, bool[5] output_mask) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def(
      "phasor_filter(Tensor x, Tensor freqs, Tensor coefficients, Tensor? constant=None, Tensor? "
      "positions=None, float start=0.0) -> Tensor");
  m.def(
      "phasor_filter_backward(Tensor grad_out, Tensor x, Tensor freqs, Tensor coefficients, "
      "Tensor? constant, Tensor? positions, float start, bool[5] output_mask) -> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor)");
  m.def(
      "linear_attention(Tensor q, Tensor k, Tensor v, str feature_map='elu', bool causal=False, "
      "bool normalize=True, float eps=1e-6, Tensor? key_padding_mask=None, Tensor? "
      "cu_seqlens=None, Tensor? initial_s=None, Tensor? initial_z=None, bool return_state=False) "
      "-> (Tensor out, Tensor s, Tensor z)");
  m.def(
      "linear_attention_backward(Tensor? grad_out, Tensor? grad_s, Tensor? grad_z, Tensor? out, "
      "Tensor q, Tensor k, Tensor v, str feature_map, bool causal, bool normalize, float eps, "
      "Tensor? key_padding_mask, Tensor? cu_seqlens, Tensor? initial_s, Tensor? initial_z, "
      "bool[5] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sine_features(Tensor x, Tensor freqs, Tensor amplitudes, Tensor? offsets=None, Tensor? "
      "constant=None, Tensor? positions=None, float start=0.0) -> Tensor");
  m.def(
      "sine_features_backward(Tensor grad_out, Tensor x, Tensor freqs, Tensor amplitudes, Tensor? "
      "offsets, Tensor? constant, Tensor? positions, float start, bool[6] output_mask) -> (Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor)");

  // What the modules make codes with, see core/codes.h.
  m.def(
      "sine_code(Tensor freqs, Tensor offsets, Tensor gains, Tensor noise, float scale) -> (Tensor "
      "cycles, Tensor query, Tensor key)");
  m.def(
      "sine_code_backward(Tensor grad_cycles, Tensor grad_query, Tensor grad_key, Tensor freqs, "
      "Tensor offsets, Tensor gains, Tensor noise, float scale, bool[4] output_mask) -> (Tensor, "
      "Tensor, Tensor, Tensor)");
  m.def(
      "phase_code(Tensor freqs, Tensor offsets, Tensor gains, Tensor? bandwidths, Tensor sine, "
      "Tensor phases, Tensor? deviates, float scale) -> (Tensor cycles, Tensor query, Tensor key)");
  m.def(
      "phase_code_backward(Tensor grad_cycles, Tensor grad_query, Tensor grad_key, Tensor freqs, "
      "Tensor offsets, Tensor gains, Tensor? bandwidths, Tensor sine, Tensor phases, Tensor? "
      "deviates, float scale, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gate_code(Tensor query, Tensor key, Tensor gate, Tensor noise, float scale) -> (Tensor "
      "gated_query, Tensor gated_key, Tensor constant)");
  m.def(
      "gate_code_backward(Tensor grad_query, Tensor grad_key, Tensor grad_constant, Tensor query, "
      "Tensor key, Tensor gate, Tensor noise, float scale, bool[4] output_mask) -> (Tensor, "
      "Tensor, "
      "Tensor, Tensor)");
  m.def(
      "phase_noise(Tensor seed, SymInt num_heads, SymInt in_features, SymInt num_sines, SymInt "
      "num_pairs, int stream=0, int ndim=1, ScalarType? dtype=None) -> (Tensor sine, Tensor "
      "phases, "
      "Tensor deviates)");
  m.def(
      "circle_noise(Tensor seed, SymInt num_heads, SymInt in_features, SymInt num_pairs, int "
      "stream=0, ScalarType? dtype=None) -> Tensor");
}

#if !defined(TORCH_SPE_CUDA)
namespace {

void refuse_cuda(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack*) {
  TORCH_CHECK_VALUE(
      false, op.schema().name(),
      ": its arguments are on a CUDA device, but this build of torch_spe is for the CPU "
      "only. Rebuild it where nvcc of the CUDA version of torch (torch.version.cuda) is "
      "installed, with TORCH_SPE_CUDA=1: TORCH_SPE_CUDA=1 pip install "
      "--no-build-isolation --force-reinstall --no-deps . ; or move the tensors with "
      ".cpu().");
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_spe, CUDA, m) {
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.name.rfind("torch_spe::", 0) == 0)
      m.impl(name.name.c_str(), torch::CppFunction::makeFromBoxedFunction<&refuse_cuda>());
  }
}
#endif
