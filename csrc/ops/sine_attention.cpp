// The operator torch_spe::sine_attention: sine_features of queries and keys, and linear_attention
// of these. CPU kernels encode where attention loads; elsewhere both kernels run one after the
// other, and again in the backward pass: encoded queries and keys are never kept.
#include "linear_attention.h"
#include "sine_features.h"

namespace torch_spe::ops {
namespace {

struct SineAttention : Operator {
  static constexpr const char* kName = "sine_attention";
  static constexpr const char* kSchema =
      "sine_attention(Tensor q, Tensor k, Tensor v, Tensor freqs, Tensor amplitudes, "
      "Tensor? offsets=None, Tensor? constant=None, Scalar start=0, str feature_map='identity', "
      "str encoded_feature_map='identity', bool causal=False, bool normalize=True, "
      "float eps=1e-6, Tensor? key_padding_mask=None, Tensor? denominator_q=None, "
      "Tensor? denominator_k=None, str denominator_feature_map='identity', bool rms_norm=False, "
      "Tensor? log_decay=None) -> (Tensor out, Tensor divisor)";
  static constexpr const char* kDoc =
      "Linear attention [B, N, H, E] of queries q [B, N, H, D] and keys k [B, M, H, D] that are "
      "encoded with the cosine and sine of every frequency, and values v [B, M, H, E]; what each "
      "row was divided by.";
  static constexpr const char* kDecayForms = "[H] or [B, N, H]";
  static constexpr std::array kGradients{"q",
                                         "k",
                                         "v",
                                         "freqs",
                                         "amplitudes",
                                         "offsets",
                                         "constant",
                                         "denominator_q",
                                         "denominator_k",
                                         "log_decay"};
  static constexpr std::array kData{"q", "k", "v", "denominator_q", "denominator_k"};
  static constexpr std::array kSaved{"out", "divisor"};

  struct Arguments : LinearAttention::Arguments {
    at::Tensor freqs;         // [H, D, K]
    at::Tensor amplitudes;    // [H, D, K]
    OptionalTensor offsets;   // [H, D, K], of queries
    OptionalTensor constant;  // [H, D]
    c10::Scalar start = 0;
    std::string map_before;  // of x, before it is encoded

    auto fields() {
      return std::tie(q, k, v, freqs, amplitudes, offsets, constant, start, map_before, feature_map,
                      causal, normalize, eps, key_padding_mask, denominator_q, denominator_k,
                      denominator_feature_map, rms_norm, log_decay);
    }
    // Of the encoders of q and k.
    SineFeatures::Arguments query_encoder() const { return encoder(q, offsets); }
    SineFeatures::Arguments key_encoder() const { return encoder(k, std::nullopt); }

   private:
    SineFeatures::Arguments encoder(const at::Tensor& x, const OptionalTensor& x_offsets) const {
      SineFeatures::Arguments a;
      a.x = x;
      a.freqs = freqs;
      a.amplitudes = amplitudes;
      a.offsets = x_offsets;
      a.constant = constant;
      a.start = start;
      a.feature_map = map_before;
      return a;
    }
  };

  static bool is_differentiable(const Arguments&, std::size_t) { return true; }
  static bool keeps_outputs(const Arguments& a) { return a.divides(); }

  static void check(const Arguments& a) {
    TORCH_CHECK_VALUE(a.freqs.dim() == 3, kName,
                      ": freqs must have 3 dimensions [H, D, K], got shape ", a.freqs.sym_sizes());
    if (a.log_decay.has_value()) {
      const int64_t dim = a.log_decay->dim();
      TORCH_CHECK_VALUE(dim == 1 || dim == 3, kName, ": log_decay must have the shape ",
                        kDecayForms, ", got shape ", a.log_decay->sym_sizes());
    }
    to_feature_map(kName, "feature_map", a.map_before);
    to_feature_map(kName, "encoded_feature_map", a.feature_map);
    LinearAttention::check(a, kName, "D", kDecayForms);
    SineFeatures::check_tables(a.query_encoder(), kName, "q");
    check_positions(kName, std::nullopt, a.start, a.freqs, a.q);
  }

  static void check_values(const Arguments& a) {
    check_decay_values(kName, a);
    check_finite(kName, "freqs", a.freqs);
    SineFeatures::check_finite_tables(a.query_encoder(), kName);
  }

  static TensorSpecs results(const Arguments& a) {
    const TensorSpecs all = LinearAttention::results(a);
    return {all[0], all[3]};
  }

  // Whether kernels encode where they load: those of the CPU, where there is anything to encode.
  static bool encodes_tiles(const Arguments& a) {
    return slot_of(a.q.device().type()) == Slot::kCpu && a.q.numel() > 0 && a.k.numel() > 0;
  }

  // Makes parameters of attention those of encoded queries and keys.
  static void encode_tiles(core::LinearAttentionParams& p, const core::SineFeaturesParams& q,
                           const core::SineFeaturesParams& k, const Arguments& a) {
    p.q_sines = &q;
    p.k_sines = &k;
    p.num_realizations = SineFeatures::width(a.query_encoder()).expect_int();
    if (!a.denominator_k.has_value()) p.denominator_features = p.num_realizations;
  }

  static at::Tensor encode(const SineFeatures::Arguments& a) {
    const TensorSpec spec = SineFeatures::results(a)[0];
    const at::Tensor out = at::empty_symint(spec.sizes, spec.options);
    SineFeatures::forward(a, {out});
    return out;
  }

  static void forward(const Arguments& a, const Tensors& outputs) {
    const Tensors all{outputs[0], at::Tensor(), at::Tensor(), outputs[1]};
    LinearAttention::Arguments attention = a;
    if (!encodes_tiles(a)) {
      attention.q = encode(a.query_encoder());
      attention.k = encode(a.key_encoder());
      return LinearAttention::forward(attention, all);
    }
    core::SineFeaturesParams q, k;
    core::LinearAttentionParams p;
    KernelTensors kept;
    SineFeatures::fill(q, a.query_encoder(), TableType::kAccumulate, kept);
    SineFeatures::fill(k, a.key_encoder(), TableType::kAccumulate, kept);
    LinearAttention::fill(p, attention, kept);
    encode_tiles(p, q, k, a);
    LinearAttention::run(p, attention, all);
  }

  static void check_backward(const BackwardCall<SineAttention>& b) {
    LinearAttention::check_rows(b.arguments, b.grads[0], b.saved[0], b.saved[1], kName);
  }

  // Gradients in the order of kGradients.
  enum {
    kQ,
    kK,
    kV,
    kFreqs,
    kAmplitudes,
    kOffsets,
    kConstant,
    kDenominatorQ,
    kDenominatorK,
    kDecay
  };

  // The gradient of an encoder's output leads to those of x and of the tables.
  static BackwardCall<SineFeatures> encoder_call(const BackwardCall<SineAttention>& b, bool of_q) {
    const Arguments& a = b.arguments;
    BackwardCall<SineFeatures> call;
    call.arguments = of_q ? a.query_encoder() : a.key_encoder();
    call.inputs = {of_q ? a.q : a.k,   b.inputs[kFreqs],    b.inputs[kAmplitudes],
                   b.inputs[kOffsets], b.inputs[kConstant], at::Tensor()};
    call.wanted = {b.wanted[of_q ? kQ : kK],   b.wanted[kFreqs],    b.wanted[kAmplitudes],
                   of_q && b.wanted[kOffsets], b.wanted[kConstant], false};
    return call;
  }

  static void backward(BackwardCall<SineAttention>& b) {
    const Arguments& a = b.arguments;
    BackwardCall<SineFeatures> queries = encoder_call(b, true), keys = encoder_call(b, false);
    const auto any = [](const auto& wanted) {
      return std::any_of(wanted.begin(), wanted.end(), [](bool w) { return w; });
    };
    BackwardCall<LinearAttention> attention;
    attention.arguments = a;
    attention.grads = {b.grads[0]};
    attention.saved = b.saved;
    attention.wanted = {
        any(queries.wanted),     any(keys.wanted),        b.wanted[kV],    false, false,
        b.wanted[kDenominatorQ], b.wanted[kDenominatorK], b.wanted[kDecay]};
    const bool encodes = encodes_tiles(a);
    if (!encodes) {
      attention.arguments.q = encode(queries.arguments);
      attention.arguments.k = encode(keys.arguments);
    }
    attention.inputs = {attention.arguments.q,
                        attention.arguments.k,
                        a.v,
                        at::Tensor(),
                        at::Tensor(),
                        b.inputs[kDenominatorQ],
                        b.inputs[kDenominatorK],
                        b.inputs[kDecay]};
    if (encodes) {
      backward_in_tiles(a, attention, queries, keys);
    } else {
      LinearAttention::backward(attention);
      const auto finish = [](BackwardCall<SineFeatures>& call, at::Tensor& grad) {
        if (!grad.defined()) return;
        call.grads = {std::exchange(grad, at::Tensor())};
        SineFeatures::backward(call);
      };
      finish(queries, attention.results[0]);
      finish(keys, attention.results[1]);
    }
    const auto add = [](const at::Tensor& x, const at::Tensor& y) {
      return x.defined() && y.defined() ? x + y : x.defined() ? x : y;
    };
    b.results = {queries.results[0], keys.results[0], attention.results[2]};
    for (std::size_t i = 1; i < 5; ++i)
      b.results[kFreqs + i - 1] = add(queries.results[i], keys.results[i]);
    for (std::size_t i = 0; i < 3; ++i) b.results[kDenominatorQ + i] = attention.results[5 + i];
  }

  static void backward_in_tiles(const Arguments& a, BackwardCall<LinearAttention>& attention,
                                BackwardCall<SineFeatures>& queries,
                                BackwardCall<SineFeatures>& keys) {
    core::LinearAttentionBackwardParams p;
    core::SineFeaturesBackwardParams q, k;
    KernelTensors kept;
    LinearAttention::fill_backward(p, attention, kept);
    const auto fill = [&](core::SineFeaturesBackwardParams& of, BackwardCall<SineFeatures>& call,
                          void* grad_x) {
      SineFeatures::fill(of, call.arguments, TableType::kAccumulate, kept);
      of.grad_out = nullptr;
      of.grad_x = grad_x;
      of.grad_freqs = call.double_gradient("freqs");
      of.grad_positions = nullptr;
      SineFeatures::set_table_gradients(of, call);
    };
    fill(q, queries, p.grad_q);
    fill(k, keys, p.grad_k);
    encode_tiles(p, q, k, a);
    if (p.grad_q != nullptr) p.grad_q_sines = &q;
    if (p.grad_k != nullptr) p.grad_k_sines = &k;
    kernel_of<core::LinearAttentionBackwardParams>(a.q.device().type())(p, a.q);
    if (queries.wanted[0]) queries.results[0] = attention.results[0];
    if (keys.wanted[0]) keys.results[0] = attention.results[1];
  }
};

const Registration<SineAttention> registration;

}  // namespace
}  // namespace torch_spe::ops
