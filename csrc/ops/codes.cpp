// The operators that make codes of sines from parameters and noise, and the noise itself: checks,
// allocation, dispatch and autograd. The modules call them; what they compute stands in
// core/codes.h.
#include "codes.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <array>
#include <limits>
#include <vector>

#include "cpu/codes.h"
#include "operator.h"

namespace torch_spe::ops {
namespace {

using Sizes = std::vector<c10::SymInt>;
using Triple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Mask = std::array<bool, 4>;

constexpr const char* kSineCode = "sine_code";
constexpr const char* kPhaseCode = "phase_code";
constexpr const char* kGateCode = "gate_code";
constexpr const char* kPhaseNoise = "phase_noise";
constexpr const char* kCircleNoise = "circle_noise";

void check_sizes(const char* op, const char* name, const at::Tensor& tensor, const Sizes& sizes) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (std::size_t i = 0; fits && i < sizes.size(); ++i) {
    fits =
        tensor.sym_size(static_cast<int64_t>(i)).sym_eq(sizes[i]).expect_true(__FILE__, __LINE__);
  }
  TORCH_CHECK_VALUE(fits, op, ": ", name, " must have shape ", c10::SymIntArrayRef(sizes), ", got ",
                    tensor.sym_sizes());
}

// Sizes, device and type, those of `reference`: float32 or float64.
void check_like(const char* op, const char* name, const at::Tensor& tensor, const Sizes& sizes,
                const char* reference_name, const at::Tensor& reference) {
  check_sizes(op, name, tensor, sizes);
  check_same_device(op, name, tensor, reference, reference_name);
  const auto type = reference.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble, op, ": ", reference_name,
                   " must be float32 or float64, got ", type);
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, op, ": ", name, " must be ", type, " like ",
                   reference_name, ", got ", tensor.scalar_type());
}

// `sizes`, and the dimension of positions if frequencies have one.
Sizes with_grid(Sizes sizes, const at::Tensor& freqs) {
  if (freqs.dim() == 4) sizes.push_back(freqs.sym_size(3));
  return sizes;
}

// Returns [H, D, K].
Sizes check_parameters(const char* op, const at::Tensor& freqs, const at::Tensor& offsets,
                       const at::Tensor& gains) {
  check_data(op, "gains", gains, 3, "[H, D, K]");
  const Sizes sizes = gains.sym_sizes().vec();
  TORCH_CHECK_VALUE(freqs.dim() == 3 || (freqs.dim() == 4 && freqs.sym_size(3) > 0), op,
                    ": freqs must have shape [H, D, K] or [H, D, K, ndim], got ",
                    freqs.sym_sizes());
  check_like(op, "freqs", freqs, with_grid(sizes, freqs), "gains", gains);
  check_like(op, "offsets", offsets, sizes, "gains", gains);
  TORCH_CHECK_VALUE(sizes[2] > 0, op, ": gains must have at least one sine (K >= 1), got shape ",
                    gains.sym_sizes());
  return sizes;
}

void fill(core::SineParameters& p, const at::Tensor& freqs, const at::Tensor& offsets,
          const at::Tensor& gains, double scale) {
  p.dtype = to_dtype(gains.scalar_type());
  p.num_heads = gains.size(0);
  p.in_features = gains.size(1);
  p.num_sines = gains.size(2);
  p.ndim = freqs.dim() == 4 ? freqs.size(3) : 1;
  p.scale = scale;
  p.num_threads = at::get_num_threads();
  p.freqs = freqs.const_data_ptr();
  p.offsets = offsets.const_data_ptr();
  p.gains = gains.const_data_ptr();
}

at::Tensor like(bool wanted, const OptionalTensor& tensor) {
  return wanted && tensor.has_value() ? at::empty_symint(tensor->sym_sizes(), tensor->options())
                                      : at::Tensor();
}
void* data(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr() : nullptr;
}
const void* const_data(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}
OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

// sine_code

void check_sine_code(const at::Tensor& freqs, const at::Tensor& offsets, const at::Tensor& gains,
                     const at::Tensor& noise) {
  Sizes sizes = check_parameters(kSineCode, freqs, offsets, gains);
  TORCH_CHECK_VALUE(noise.dim() == 4, kSineCode,
                    ": noise must have 4 dimensions [H, D, 2K, R], got shape ", noise.sym_sizes());
  sizes[2] = sizes[2] * 2;
  sizes.push_back(noise.sym_size(3));
  check_like(kSineCode, "noise", noise, sizes, "gains", gains);
}

Triple sine_code_meta(const at::Tensor& freqs, const at::Tensor& offsets, const at::Tensor& gains,
                      const at::Tensor& noise, double) {
  check_sine_code(freqs, offsets, gains, noise);
  return {like(true, freqs), like(true, noise), like(true, noise)};
}

Triple sine_code(const at::Tensor& freqs, const at::Tensor& offsets, const at::Tensor& gains,
                 const at::Tensor& noise, double scale) {
  const Triple outputs = sine_code_meta(freqs, offsets, gains, noise, scale);
  const at::Tensor f = freqs.contiguous(), o = offsets.contiguous(), g = gains.contiguous(),
                   z = noise.contiguous();
  core::SineCodeParams p;
  fill(p, f, o, g, scale);
  p.num_realizations = noise.size(3);
  p.noise = z.const_data_ptr();
  p.cycles = data(std::get<0>(outputs));
  p.query_weight = data(std::get<1>(outputs));
  p.key_weight = data(std::get<2>(outputs));
  code_kernels(gains.device().type()).sine_code(p, gains);
  return outputs;
}

Gradients sine_code_backward_meta(const at::Tensor& grad_cycles, const at::Tensor& grad_query,
                                  const at::Tensor& grad_key, const at::Tensor& freqs,
                                  const at::Tensor& offsets, const at::Tensor& gains,
                                  const at::Tensor& noise, double, Mask mask) {
  check_sine_code(freqs, offsets, gains, noise);
  check_like(kSineCode, "grad_cycles", grad_cycles, freqs.sym_sizes().vec(), "gains", gains);
  check_like(kSineCode, "grad_query", grad_query, noise.sym_sizes().vec(), "gains", gains);
  check_like(kSineCode, "grad_key", grad_key, noise.sym_sizes().vec(), "gains", gains);
  return {like(mask[0], freqs), like(mask[1], offsets), like(mask[2], gains), like(mask[3], noise)};
}

Gradients sine_code_backward(const at::Tensor& grad_cycles, const at::Tensor& grad_query,
                             const at::Tensor& grad_key, const at::Tensor& freqs,
                             const at::Tensor& offsets, const at::Tensor& gains,
                             const at::Tensor& noise, double scale, Mask mask) {
  const Gradients grads = sine_code_backward_meta(grad_cycles, grad_query, grad_key, freqs, offsets,
                                                  gains, noise, scale, mask);
  const at::Tensor f = freqs.contiguous(), o = offsets.contiguous(), g = gains.contiguous(),
                   z = noise.contiguous(), gc = grad_cycles.contiguous(),
                   gq = grad_query.contiguous(), gk = grad_key.contiguous();
  core::SineCodeBackwardParams p;
  fill(p, f, o, g, scale);
  p.num_realizations = noise.size(3);
  p.noise = z.const_data_ptr();
  p.cycles = p.query_weight = p.key_weight = nullptr;
  p.grad_cycles = gc.const_data_ptr();
  p.grad_query_weight = gq.const_data_ptr();
  p.grad_key_weight = gk.const_data_ptr();
  p.grad_freqs = data(std::get<0>(grads));
  p.grad_offsets = data(std::get<1>(grads));
  p.grad_gains = data(std::get<2>(grads));
  p.grad_noise = data(std::get<3>(grads));
  code_kernels(gains.device().type()).sine_code_backward(p, gains);
  return grads;
}

auto sine_code_op() {
  static const auto op = find_operator<decltype(sine_code_meta)>("torch_spe::sine_code");
  return op;
}
auto sine_code_backward_op() {
  static const auto op =
      find_operator<decltype(sine_code_backward_meta)>("torch_spe::sine_code_backward");
  return op;
}

struct SineCode : torch::autograd::Function<SineCode> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx,
                                                const at::Tensor& freqs, const at::Tensor& offsets,
                                                const at::Tensor& gains, const at::Tensor& noise,
                                                double scale) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({freqs, offsets, gains, noise});
    ctx->saved_data["scale"] = scale;
    auto [cycles, query, key] = sine_code_op().call(freqs, offsets, gains, noise, scale);
    return {cycles, query, key};
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    auto [freqs, offsets, gains, noise] = sine_code_backward_op().call(
        grad_outputs[0], grad_outputs[1], grad_outputs[2], saved[0], saved[1], saved[2], saved[3],
        ctx->saved_data["scale"].toDouble(), wanted_gradients<4>(*ctx, saved));
    return {freqs, offsets, gains, noise, at::Tensor()};
  }
};

Triple sine_code_autograd(const at::Tensor& freqs, const at::Tensor& offsets,
                          const at::Tensor& gains, const at::Tensor& noise, double scale) {
  const auto outputs = SineCode::apply(freqs, offsets, gains, noise, scale);
  return {outputs[0], outputs[1], outputs[2]};
}

// phase_code

// Returns [H, D, R/2].
Sizes check_phase_code(const at::Tensor& freqs, const at::Tensor& offsets, const at::Tensor& gains,
                       const OptionalTensor& bandwidths, const at::Tensor& sine,
                       const at::Tensor& phases, const OptionalTensor& deviates) {
  Sizes sizes = check_parameters(kPhaseCode, freqs, offsets, gains);
  if (bandwidths.has_value())
    check_like(kPhaseCode, "bandwidths", *bandwidths, sizes, "gains", gains);
  TORCH_CHECK_VALUE(sine.dim() == 3, kPhaseCode,
                    ": sine must have 3 dimensions [H, D, R/2], got shape ", sine.sym_sizes());
  TORCH_CHECK_TYPE(sine.scalar_type() == at::kLong, kPhaseCode, ": sine must be int64, got ",
                   sine.scalar_type());
  check_same_device(kPhaseCode, "sine", sine, gains, "gains");
  sizes[2] = sine.sym_size(2);
  check_sizes(kPhaseCode, "sine", sine, sizes);
  check_like(kPhaseCode, "phases", phases, sizes, "gains", gains);
  TORCH_CHECK_VALUE(bandwidths.has_value() == deviates.has_value(), kPhaseCode,
                    ": expected both bandwidths and deviates or none, got ",
                    bandwidths.has_value() ? "bandwidths" : "deviates");
  if (deviates.has_value())
    check_like(kPhaseCode, "deviates", *deviates, with_grid(sizes, freqs), "gains", gains);
  return sizes;
}

// On the CPU, where looking is cheap; elsewhere codes of a sine that there is not are NaN.
void check_range(const at::Tensor& sine, int64_t num_sines) {
  if (!sine.device().is_cpu() || sine.numel() == 0) return;
  const auto [least, most] = at::aminmax(sine);
  TORCH_CHECK_INDEX(least.item<int64_t>() >= 0 && most.item<int64_t>() < num_sines, kPhaseCode,
                    ": sine must be in 0 .. K - 1 = ", num_sines - 1, ", got ",
                    least.item<int64_t>(), " .. ", most.item<int64_t>());
}

Triple phase_code_meta(const at::Tensor& freqs, const at::Tensor& offsets, const at::Tensor& gains,
                       const OptionalTensor& bandwidths, const at::Tensor& sine,
                       const at::Tensor& phases, const OptionalTensor& deviates, double) {
  Sizes sizes = check_phase_code(freqs, offsets, gains, bandwidths, sine, phases, deviates);
  const at::Tensor cycles = at::empty_symint(with_grid(sizes, freqs), gains.options());
  sizes.emplace_back(2);
  return {cycles, at::empty_symint(sizes, gains.options()),
          at::empty_symint(sizes, gains.options())};
}

// The tensors that the kernels read.
struct PhaseCodeInputs {
  at::Tensor freqs, offsets, gains, sine, phases;
  OptionalTensor bandwidths, deviates;

  PhaseCodeInputs(const at::Tensor& freqs, const at::Tensor& offsets, const at::Tensor& gains,
                  const OptionalTensor& bandwidths, const at::Tensor& sine,
                  const at::Tensor& phases, const OptionalTensor& deviates)
      : freqs(freqs.contiguous()),
        offsets(offsets.contiguous()),
        gains(gains.contiguous()),
        sine(sine.contiguous()),
        phases(phases.contiguous()),
        bandwidths(contiguous(bandwidths)),
        deviates(contiguous(deviates)) {}

  void fill(core::PhaseCodeParams& p, double scale) const {
    ops::fill(p, freqs, offsets, gains, scale);
    p.num_pairs = sine.size(2);
    p.bandwidths = const_data(bandwidths);
    p.sine = sine.const_data_ptr<int64_t>();
    p.phases = phases.const_data_ptr();
    p.deviates = const_data(deviates);
    p.cycles = p.query_coefficients = p.key_coefficients = nullptr;
  }
};

Triple phase_code(const at::Tensor& freqs, const at::Tensor& offsets, const at::Tensor& gains,
                  const OptionalTensor& bandwidths, const at::Tensor& sine,
                  const at::Tensor& phases, const OptionalTensor& deviates, double scale) {
  const Triple outputs =
      phase_code_meta(freqs, offsets, gains, bandwidths, sine, phases, deviates, scale);
  check_range(sine, gains.size(2));
  const PhaseCodeInputs inputs(freqs, offsets, gains, bandwidths, sine, phases, deviates);
  core::PhaseCodeParams p;
  inputs.fill(p, scale);
  p.cycles = data(std::get<0>(outputs));
  p.query_coefficients = data(std::get<1>(outputs));
  p.key_coefficients = data(std::get<2>(outputs));
  code_kernels(gains.device().type()).phase_code(p, gains);
  return outputs;
}

Gradients phase_code_backward_meta(const at::Tensor& grad_cycles, const at::Tensor& grad_query,
                                   const at::Tensor& grad_key, const at::Tensor& freqs,
                                   const at::Tensor& offsets, const at::Tensor& gains,
                                   const OptionalTensor& bandwidths, const at::Tensor& sine,
                                   const at::Tensor& phases, const OptionalTensor& deviates, double,
                                   Mask mask) {
  Sizes sizes = check_phase_code(freqs, offsets, gains, bandwidths, sine, phases, deviates);
  check_like(kPhaseCode, "grad_cycles", grad_cycles, with_grid(sizes, freqs), "gains", gains);
  sizes.emplace_back(2);
  check_like(kPhaseCode, "grad_query", grad_query, sizes, "gains", gains);
  check_like(kPhaseCode, "grad_key", grad_key, sizes, "gains", gains);
  return {like(mask[0], freqs), like(mask[1], offsets), like(mask[2], gains),
          like(mask[3], bandwidths)};
}

Gradients phase_code_backward(const at::Tensor& grad_cycles, const at::Tensor& grad_query,
                              const at::Tensor& grad_key, const at::Tensor& freqs,
                              const at::Tensor& offsets, const at::Tensor& gains,
                              const OptionalTensor& bandwidths, const at::Tensor& sine,
                              const at::Tensor& phases, const OptionalTensor& deviates,
                              double scale, Mask mask) {
  const Gradients grads =
      phase_code_backward_meta(grad_cycles, grad_query, grad_key, freqs, offsets, gains, bandwidths,
                               sine, phases, deviates, scale, mask);
  check_range(sine, gains.size(2));
  const PhaseCodeInputs inputs(freqs, offsets, gains, bandwidths, sine, phases, deviates);
  const at::Tensor gc = grad_cycles.contiguous(), gq = grad_query.contiguous(),
                   gk = grad_key.contiguous();
  core::PhaseCodeBackwardParams p;
  inputs.fill(p, scale);
  p.grad_cycles = gc.const_data_ptr();
  p.grad_query_coefficients = gq.const_data_ptr();
  p.grad_key_coefficients = gk.const_data_ptr();
  p.grad_freqs = data(std::get<0>(grads));
  p.grad_offsets = data(std::get<1>(grads));
  p.grad_gains = data(std::get<2>(grads));
  p.grad_bandwidths = data(std::get<3>(grads));
  code_kernels(gains.device().type()).phase_code_backward(p, gains);
  return grads;
}

auto phase_code_op() {
  static const auto op = find_operator<decltype(phase_code_meta)>("torch_spe::phase_code");
  return op;
}
auto phase_code_backward_op() {
  static const auto op =
      find_operator<decltype(phase_code_backward_meta)>("torch_spe::phase_code_backward");
  return op;
}

struct PhaseCode : torch::autograd::Function<PhaseCode> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx,
                                                const at::Tensor& freqs, const at::Tensor& offsets,
                                                const at::Tensor& gains,
                                                const OptionalTensor& bandwidths,
                                                const at::Tensor& sine, const at::Tensor& phases,
                                                const OptionalTensor& deviates, double scale) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward(
        {freqs, offsets, gains, to_tensor(bandwidths), sine, phases, to_tensor(deviates)});
    ctx->saved_data["scale"] = scale;
    auto [cycles, query, key] =
        phase_code_op().call(freqs, offsets, gains, bandwidths, sine, phases, deviates, scale);
    return {cycles, query, key};
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    auto [freqs, offsets, gains, bandwidths] = phase_code_backward_op().call(
        grad_outputs[0], grad_outputs[1], grad_outputs[2], saved[0], saved[1], saved[2],
        to_optional(saved[3]), saved[4], saved[5], to_optional(saved[6]),
        ctx->saved_data["scale"].toDouble(), wanted_gradients<4>(*ctx, saved));
    const at::Tensor none;
    return {freqs, offsets, gains, bandwidths, none, none, none, none};
  }
};

Triple phase_code_autograd(const at::Tensor& freqs, const at::Tensor& offsets,
                           const at::Tensor& gains, const OptionalTensor& bandwidths,
                           const at::Tensor& sine, const at::Tensor& phases,
                           const OptionalTensor& deviates, double scale) {
  const auto outputs =
      PhaseCode::apply(freqs, offsets, gains, bandwidths, sine, phases, deviates, scale);
  return {outputs[0], outputs[1], outputs[2]};
}

// gate_code

void check_gate_code(const at::Tensor& query, const at::Tensor& key, const at::Tensor& gate,
                     const at::Tensor& noise) {
  check_data(kGateCode, "gate", gate, 2, "[H, D]");
  TORCH_CHECK_VALUE(query.dim() >= 2, kGateCode,
                    ": query must have at least 2 dimensions [H, D, ...], got shape ",
                    query.sym_sizes());
  Sizes sizes = query.sym_sizes().vec();
  sizes[0] = gate.sym_size(0);
  sizes[1] = gate.sym_size(1);
  check_like(kGateCode, "query", query, sizes, "gate", gate);
  check_like(kGateCode, "key", key, sizes, "gate", gate);
  TORCH_CHECK_VALUE(noise.dim() == 3, kGateCode,
                    ": noise must have 3 dimensions [H, D, R], got shape ", noise.sym_sizes());
  check_like(kGateCode, "noise", noise, {sizes[0], sizes[1], noise.sym_size(2)}, "gate", gate);
}

void fill(core::GateCodeParams& p, const at::Tensor& query, const at::Tensor& key,
          const at::Tensor& gate, const at::Tensor& noise, double scale) {
  p.dtype = to_dtype(gate.scalar_type());
  p.features = gate.numel();
  p.size = gate.numel() > 0 ? query.numel() / gate.numel() : 0;
  p.num_realizations = noise.size(2);
  p.scale = scale;
  p.num_threads = at::get_num_threads();
  p.query = query.const_data_ptr();
  p.key = key.const_data_ptr();
  p.gate = gate.const_data_ptr();
  p.noise = noise.const_data_ptr();
  p.gated_query = p.gated_key = p.constant = nullptr;
}

Triple gate_code_meta(const at::Tensor& query, const at::Tensor& key, const at::Tensor& gate,
                      const at::Tensor& noise, double) {
  check_gate_code(query, key, gate, noise);
  return {like(true, query), like(true, key), like(true, noise)};
}

Triple gate_code(const at::Tensor& query, const at::Tensor& key, const at::Tensor& gate,
                 const at::Tensor& noise, double scale) {
  const Triple outputs = gate_code_meta(query, key, gate, noise, scale);
  const at::Tensor q = query.contiguous(), k = key.contiguous(), g = gate.contiguous(),
                   z = noise.contiguous();
  core::GateCodeParams p;
  fill(p, q, k, g, z, scale);
  p.gated_query = data(std::get<0>(outputs));
  p.gated_key = data(std::get<1>(outputs));
  p.constant = data(std::get<2>(outputs));
  code_kernels(gate.device().type()).gate_code(p, gate);
  return outputs;
}

Gradients gate_code_backward_meta(const at::Tensor& grad_query, const at::Tensor& grad_key,
                                  const at::Tensor& grad_constant, const at::Tensor& query,
                                  const at::Tensor& key, const at::Tensor& gate,
                                  const at::Tensor& noise, double, Mask mask) {
  check_gate_code(query, key, gate, noise);
  check_like(kGateCode, "grad_query", grad_query, query.sym_sizes().vec(), "gate", gate);
  check_like(kGateCode, "grad_key", grad_key, query.sym_sizes().vec(), "gate", gate);
  check_like(kGateCode, "grad_constant", grad_constant, noise.sym_sizes().vec(), "gate", gate);
  return {like(mask[0], query), like(mask[1], key), like(mask[2], gate), like(mask[3], noise)};
}

Gradients gate_code_backward(const at::Tensor& grad_query, const at::Tensor& grad_key,
                             const at::Tensor& grad_constant, const at::Tensor& query,
                             const at::Tensor& key, const at::Tensor& gate, const at::Tensor& noise,
                             double scale, Mask mask) {
  const Gradients grads = gate_code_backward_meta(grad_query, grad_key, grad_constant, query, key,
                                                  gate, noise, scale, mask);
  const at::Tensor q = query.contiguous(), k = key.contiguous(), g = gate.contiguous(),
                   z = noise.contiguous(), gq = grad_query.contiguous(), gk = grad_key.contiguous(),
                   gc = grad_constant.contiguous();
  core::GateCodeBackwardParams p;
  fill(p, q, k, g, z, scale);
  p.grad_gated_query = gq.const_data_ptr();
  p.grad_gated_key = gk.const_data_ptr();
  p.grad_constant = gc.const_data_ptr();
  p.grad_query = data(std::get<0>(grads));
  p.grad_key = data(std::get<1>(grads));
  p.grad_gate = data(std::get<2>(grads));
  p.grad_noise = data(std::get<3>(grads));
  code_kernels(gate.device().type()).gate_code_backward(p, gate);
  return grads;
}

auto gate_code_op() {
  static const auto op = find_operator<decltype(gate_code_meta)>("torch_spe::gate_code");
  return op;
}
auto gate_code_backward_op() {
  static const auto op =
      find_operator<decltype(gate_code_backward_meta)>("torch_spe::gate_code_backward");
  return op;
}

struct GateCode : torch::autograd::Function<GateCode> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx,
                                                const at::Tensor& query, const at::Tensor& key,
                                                const at::Tensor& gate, const at::Tensor& noise,
                                                double scale) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({query, key, gate, noise});
    ctx->saved_data["scale"] = scale;
    auto [gated_query, gated_key, constant] = gate_code_op().call(query, key, gate, noise, scale);
    return {gated_query, gated_key, constant};
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    auto [query, key, gate, noise] = gate_code_backward_op().call(
        grad_outputs[0], grad_outputs[1], grad_outputs[2], saved[0], saved[1], saved[2], saved[3],
        ctx->saved_data["scale"].toDouble(), wanted_gradients<4>(*ctx, saved));
    return {query, key, gate, noise, at::Tensor()};
  }
};

Triple gate_code_autograd(const at::Tensor& query, const at::Tensor& key, const at::Tensor& gate,
                          const at::Tensor& noise, double scale) {
  const auto outputs = GateCode::apply(query, key, gate, noise, scale);
  return {outputs[0], outputs[1], outputs[2]};
}

// The noise.

at::ScalarType check_noise(const char* op, const at::Tensor& seed, const c10::SymInt& num_heads,
                           const c10::SymInt& in_features, const c10::SymInt& num_pairs,
                           int64_t stream, std::optional<at::ScalarType> dtype) {
  TORCH_CHECK_TYPE(seed.scalar_type() == at::kLong, op, ": seed must be int64, got ",
                   seed.scalar_type());
  TORCH_CHECK_VALUE(seed.sym_numel().sym_eq(1).expect_true(__FILE__, __LINE__), op,
                    ": seed must have one element, got shape ", seed.sym_sizes());
  const auto check_count = [&](const char* name, const c10::SymInt& count, int64_t most) {
    TORCH_CHECK_VALUE(count >= 0 && count <= most, op, ": ", name, " must be in 0 .. ", most,
                      ", got ", count);
  };
  check_count("num_heads", num_heads, core::kMaxNoiseHeads);
  check_count("in_features", in_features, core::kMaxNoiseFeatures);
  check_count("num_pairs", num_pairs, core::kMaxNoiseRealizations);
  check_count("stream", stream, std::numeric_limits<uint32_t>::max());
  const auto type = dtype.value_or(at::kFloat);
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble, op,
                   ": dtype must be float32 or float64, got ", type);
  return type;
}

Triple phase_noise_meta(const at::Tensor& seed, c10::SymInt num_heads, c10::SymInt in_features,
                        c10::SymInt num_sines, c10::SymInt num_pairs, int64_t stream, int64_t ndim,
                        std::optional<at::ScalarType> dtype) {
  const auto type =
      check_noise(kPhaseNoise, seed, num_heads, in_features, num_pairs, stream, dtype);
  TORCH_CHECK_VALUE(num_sines >= 1 && num_sines <= core::kMaxNoiseRealizations, kPhaseNoise,
                    ": num_sines must be in 1 .. ", core::kMaxNoiseRealizations, ", got ",
                    num_sines);
  TORCH_CHECK_VALUE(ndim >= 0 && ndim < (1 << 20), kPhaseNoise, ": ndim must be in 0 .. ",
                    (1 << 20) - 1, ", got ", ndim);
  const auto options = seed.options().dtype(type);
  const Sizes sizes{num_heads, in_features, num_pairs};
  Sizes deviates = sizes;
  deviates.emplace_back(ndim);
  return {at::empty_symint(sizes, seed.options()), at::empty_symint(sizes, options),
          at::empty_symint(deviates, options)};
}

Triple phase_noise(const at::Tensor& seed, int64_t num_heads, int64_t in_features,
                   int64_t num_sines, int64_t num_pairs, int64_t stream, int64_t ndim,
                   std::optional<at::ScalarType> dtype) {
  const Triple outputs =
      phase_noise_meta(seed, num_heads, in_features, num_sines, num_pairs, stream, ndim, dtype);
  const auto& [sine, phases, deviates] = outputs;
  core::PhaseNoiseParams p;
  p.dtype = to_dtype(phases.scalar_type());
  p.num_heads = num_heads;
  p.in_features = in_features;
  p.num_sines = num_sines;
  p.num_pairs = num_pairs;
  p.ndim = ndim;
  p.stream = static_cast<uint32_t>(stream);
  p.num_threads = at::get_num_threads();
  p.device_seed = seed.const_data_ptr<int64_t>();
  p.sine = sine.mutable_data_ptr<int64_t>();
  p.phases = data(phases);
  p.deviates = data(deviates);
  code_kernels(seed.device().type()).phase_noise(p, seed);
  return outputs;
}

at::Tensor circle_noise_meta(const at::Tensor& seed, c10::SymInt num_heads, c10::SymInt in_features,
                             c10::SymInt num_pairs, int64_t stream,
                             std::optional<at::ScalarType> dtype) {
  const auto type =
      check_noise(kCircleNoise, seed, num_heads, in_features, num_pairs, stream, dtype);
  return at::empty_symint({num_heads, in_features, num_pairs * 2}, seed.options().dtype(type));
}

at::Tensor circle_noise(const at::Tensor& seed, int64_t num_heads, int64_t in_features,
                        int64_t num_pairs, int64_t stream, std::optional<at::ScalarType> dtype) {
  at::Tensor out = circle_noise_meta(seed, num_heads, in_features, num_pairs, stream, dtype);
  core::CircleNoiseParams p;
  p.dtype = to_dtype(out.scalar_type());
  p.num_heads = num_heads;
  p.in_features = in_features;
  p.num_pairs = num_pairs;
  p.stream = static_cast<uint32_t>(stream);
  p.num_threads = at::get_num_threads();
  p.device_seed = seed.const_data_ptr<int64_t>();
  p.out = data(out);
  code_kernels(seed.device().type()).circle_noise(p, seed);
  return out;
}

void register_kernels(torch::Library& m) {
  m.impl("sine_code", sine_code);
  m.impl("sine_code_backward", sine_code_backward);
  m.impl("phase_code", phase_code);
  m.impl("phase_code_backward", phase_code_backward);
  m.impl("gate_code", gate_code);
  m.impl("gate_code_backward", gate_code_backward);
  m.impl("phase_noise", phase_noise);
  m.impl("circle_noise", circle_noise);
}

TORCH_LIBRARY_IMPL(torch_spe, CPU, m) { register_kernels(m); }
#if defined(TORCH_SPE_CUDA)
TORCH_LIBRARY_IMPL(torch_spe, CUDA, m) { register_kernels(m); }
#endif
TORCH_LIBRARY_IMPL(torch_spe, Meta, m) {
  m.impl("sine_code", sine_code_meta);
  m.impl("sine_code_backward", sine_code_backward_meta);
  m.impl("phase_code", phase_code_meta);
  m.impl("phase_code_backward", phase_code_backward_meta);
  m.impl("gate_code", gate_code_meta);
  m.impl("gate_code_backward", gate_code_backward_meta);
  m.impl("phase_noise", phase_noise_meta);
  m.impl("circle_noise", circle_noise_meta);
}
TORCH_LIBRARY_IMPL(torch_spe, Autograd, m) {
  m.impl("sine_code", sine_code_autograd);
  m.impl("sine_code_backward", OnceDifferentiable<sine_code_backward_op, &kSineCode,
                                                  decltype(sine_code_backward_meta)>::call);
  m.impl("phase_code", phase_code_autograd);
  m.impl("phase_code_backward", OnceDifferentiable<phase_code_backward_op, &kPhaseCode,
                                                   decltype(phase_code_backward_meta)>::call);
  m.impl("gate_code", gate_code_autograd);
  m.impl("gate_code_backward", OnceDifferentiable<gate_code_backward_op, &kGateCode,
                                                  decltype(gate_code_backward_meta)>::call);
}

}  // namespace

CodeKernels& code_kernels(c10::DeviceType device) {
  static CodeKernels cpu = {
      [](const core::SineCodeParams& p, const at::Tensor&) { cpu::sine_code(p); },
      [](const core::SineCodeBackwardParams& p, const at::Tensor&) { cpu::sine_code_backward(p); },
      [](const core::PhaseCodeParams& p, const at::Tensor&) { cpu::phase_code(p); },
      [](const core::PhaseCodeBackwardParams& p, const at::Tensor&) {
        cpu::phase_code_backward(p);
      },
      [](const core::GateCodeParams& p, const at::Tensor&) { cpu::gate_code(p); },
      [](const core::GateCodeBackwardParams& p, const at::Tensor&) { cpu::gate_code_backward(p); },
      [](const core::PhaseNoiseParams& p, const at::Tensor&) { cpu::phase_noise(p); },
      [](const core::CircleNoiseParams& p, const at::Tensor&) { cpu::circle_noise(p); }};
#if defined(TORCH_SPE_CUDA)
  static CodeKernels cuda = code_cuda_kernels();
  if (device == c10::kCUDA) return cuda;
#endif
  (void)device;
  return cpu;
}

}  // namespace torch_spe::ops
