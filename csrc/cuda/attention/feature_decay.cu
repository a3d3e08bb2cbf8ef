// What calls the kernels of a decay per feature, and their scratch memory.
#include "feature_decay.h"
#include "feature_gradients.h"
#include "state_sums.h"
#include "token_sets.h"

namespace torch_spe::cuda::attention {
namespace {

// The states of a set of tokens, moving forwards and backwards.
template <class T>
struct StatesOfBothWays {
  States<T> forwards, backwards;
};

template <class Storage, class Operand>
class FeatureDecayPass {
 public:
  using T = core::accumulate_t<Storage>;
  std::size_t workspace_size = 0;

  FeatureDecayPass(const LinearAttentionParams& p, bool backward, bool wants_steps, bool sums_steps,
                   void* workspace, Stream stream)
      : p_(p),
        // A state of keys alone is that of a causal pass.
        both_ways_(!p.causal && p.query_length > 0),
        sets_(p),
        stream_(stream) {
    MemoryLayout layout(static_cast<unsigned char*>(workspace));
    // First: they are aligned to more than a layout does.
    if (backward && sets_.divides()) factors_ = layout.take<RowFactors<T>>(sets_.rows());
    if (backward && sets_.divided_size() > 0) divided_ = layout.take<Storage>(sets_.divided_size());
    zero_ = layout.take<std::uint64_t>(1);
    if (backward && p.query_length == 0) sets_.replace_queries(zero_);
    take_decay(layout);
    const bool own = sets_.has_own_denominator();
    take_states(layout, p.value_features, !own, backward, &keys_, &queries_);
    if (own) take_states(layout, 0, true, backward, &denominator_keys_, &denominator_queries_);
    if (!backward && own && p.row_divisor == nullptr) divisor_ = layout.take<T>(sets_.rows());
    if (sums_steps)
      chunk_steps_ = layout.take<double>(chunks().slots() * p.num_heads * p.num_realizations);
    if (wants_steps && both_ways_)
      first_way_ = layout.take<T>(sets_.batch() * p.key_length * p.num_heads * p.num_realizations);
    workspace_size = layout.size();
  }

  void forward() {
    make_decay_factors(decay_, segments(), zero_, stream_);
    const bool own = sets_.has_own_denominator(), has_rows = p_.query_length > 0;
    make(sets_.keys(), false, p_.initial_s, own ? nullptr : p_.initial_z, p_.final_s,
         own ? nullptr : p_.final_z, &keys_);
    if (own) {
      make(sets_.denominator_keys(), false, nullptr, p_.initial_z, nullptr, p_.final_z,
           &denominator_keys_);
    }
    if (!has_rows) return;
    RowDivision<T> division = sets_.division(divisor_);
    if (own) {
      values(sets_.denominator_queries(), sets_.denominator_keys(), false, denominator_keys_,
             division, nullptr);
      division.by = Divide::kByGiven;
    }
    values(sets_.queries(), sets_.keys(), false, keys_, division, p_.out);
  }

  void backward(const LinearAttentionBackwardParams& p) {
    make_decay_factors(decay_, segments(), zero_, stream_);
    const bool own = sets_.has_own_denominator();
    if (sets_.divides()) sets_.make_factors(p, factors_, divided_, stream_);
    const Tokens<Storage> queries = sets_.queries(p, factors_, divided_), keys = sets_.keys();
    make(keys, false, p.initial_s, own ? nullptr : p.initial_z, nullptr, nullptr, &keys_);
    make(queries, true, p.grad_final_s, own ? nullptr : p.grad_final_z, p.grad_initial_s,
         own ? nullptr : p.grad_initial_z, &queries_);
    if (p.grad_v != nullptr) values(keys, queries, true, queries_, RowDivision<T>{}, p.grad_v);
    features(p, queries, keys, queries_, keys_, p.grad_q, p.grad_k, false);
    if (own) {
      const Tokens<Storage> own_queries = sets_.denominator_queries(factors_);
      const Tokens<Storage> own_keys = sets_.denominator_keys();
      make(own_keys, false, nullptr, p.initial_z, nullptr, nullptr, &denominator_keys_);
      make(own_queries, true, nullptr, p.grad_final_z, nullptr, p.grad_initial_z,
           &denominator_queries_);
      features(p, own_queries, own_keys, denominator_queries_, denominator_keys_,
               p.grad_denominator_q, p.grad_denominator_k, true);
    }
    if (chunk_steps_ != nullptr) {
      write_decay_gradient(chunk_steps_, chunks().slots(), p.num_heads * p.num_realizations, true,
                           p.log_decay_dtype, p.grad_log_decay, stream_);
    }
  }

 private:
  Cut chunks() const { return sets_.cut(p_.key_length, kChunk<Operand>); }
  Cut segments() const {
    const std::int64_t tiles =
        ceil_div(p_.num_realizations, kWide) * max_of(1, ceil_div(p_.value_features, kWide));
    return sets_.cut(p_.key_length,
                     segment_size<Operand>(sets_.batch() * p_.num_heads * tiles, p_.key_length));
  }

  void take_decay(MemoryLayout& layout) {
    decay_.steps.data = p_.log_decay;
    decay_.steps.is_double = p_.log_decay_dtype == core::DType::kFloat64;
    for (int i = 0; i < 4; ++i) decay_.steps.strides[i] = p_.log_decay_strides[i];
    decay_.chunks = chunks();
    decay_.heads = p_.num_heads;
    decay_.features = p_.num_realizations;
    decay_.width = ceil_div(p_.num_realizations, kWide) * kWide;
    const std::int64_t columns = p_.num_heads * decay_.width;
    const std::int64_t size = decay_.chunks.slots() * columns;
    decay_.over_subs = layout.take<T>(kSubs * size);
    decay_.sums = layout.take<double>(size);
    decay_.over_chunks = layout.take<T>(size);
    decay_.before_chunks = layout.take<T>(size);
    decay_.after_chunks = layout.take<T>(size);
    decay_.over_segments = layout.take<T>(segments().slots() * columns);
  }

  States<T> take_states(MemoryLayout& layout, std::int64_t values, bool has_z) const {
    States<T> states;
    states.heads = p_.num_heads;
    states.features = p_.num_realizations;
    states.values = values;
    const std::int64_t size_z = p_.num_heads * states.features, size_s = size_z * values;
    states.segment_s = layout.take<T>(segments().slots() * size_s);
    if (has_z) states.segment_z = layout.take<T>(segments().slots() * size_z);
    if (p_.query_length == 0 && !sets_.has_zeros()) return states;  // nobody reads those of chunks
    states.chunk_s = layout.take<T>(chunks().slots() * size_s);
    if (has_z) states.chunk_z = layout.take<T>(chunks().slots() * size_z);
    return states;
  }
  void take_states(MemoryLayout& layout, std::int64_t values, bool has_z, bool backward,
                   StatesOfBothWays<T>* keys, StatesOfBothWays<T>* queries) const {
    // Of states that nobody makes, sizes are read.
    keys->forwards = keys->backwards = take_states(layout, values, has_z);
    if (both_ways_) keys->backwards = take_states(layout, values, has_z);
    if (!backward) return;
    queries->forwards = queries->backwards = take_states(layout, values, has_z);
    if (both_ways_) queries->forwards = take_states(layout, values, has_z);
  }

  // Makes the states of tokens: those of keys move forwards and, where all tokens are seen,
  // backwards too, those of queries the other way round. The first ones begin with initial states,
  // and their totals are written where wanted.
  void make(const Tokens<Storage>& tokens, bool backwards, const void* initial_s,
            const void* initial_z, void* total_s, void* total_z, StatesOfBothWays<T>* both) const {
    States<T>& first = backwards ? both->backwards : both->forwards;
    first.total_s = static_cast<T*>(total_s);
    first.total_z = static_cast<T*>(total_z);
    const auto make_one = [&](bool back, const void* s, const void* z, const States<T>& states) {
      make_states<Operand>(tokens, decay_.chunks, segments(), states.chunk_s != nullptr, back,
                           static_cast<const T*>(s), static_cast<const T*>(z), states, decay_,
                           stream_);
    };
    make_one(backwards, initial_s, initial_z, first);
    if (both_ways_)
      make_one(!backwards, nullptr, nullptr, backwards ? both->forwards : both->backwards);
  }

  // What rows see of tokens that come before (after) them, or of all.
  SeenStates<T> seen(bool after, const StatesOfBothWays<T>& states) const {
    return {!after || both_ways_, after || both_ways_, states.forwards, states.backwards};
  }
  void values(const Tokens<Storage>& rows, const Tokens<Storage>& columns, bool after,
              const StatesOfBothWays<T>& states, const RowDivision<T>& division, void* out) const {
    make_feature_values<Operand>(rows, columns, segments(), seen(after, states), division,
                                 static_cast<Storage*>(out), decay_, stream_);
  }
  void features(const LinearAttentionBackwardParams& p, const Tokens<Storage>& queries,
                const Tokens<Storage>& keys, const StatesOfBothWays<T>& query_states,
                const StatesOfBothWays<T>& key_states, void* grad_q, void* grad_k,
                bool adds) const {
    FeatureGradients<Storage> grads;
    grads.queries = static_cast<Storage*>(grad_q);
    grads.keys = static_cast<Storage*>(grad_k);
    grads.steps.of_chunks = chunk_steps_;
    if (chunk_steps_ == nullptr) grads.steps.of_tokens = p.grad_log_decay;
    grads.steps.is_double = p.log_decay_dtype == core::DType::kFloat64;
    grads.steps.adds = adds;
    grads.first_way = first_way_;
    if (grad_q == nullptr && grad_k == nullptr && !grads.steps.wanted()) return;
    make_feature_gradients<Operand>(queries, keys, segments(), seen(false, key_states),
                                    seen(true, query_states), grads, decay_, stream_);
  }

  const LinearAttentionParams& p_;
  bool both_ways_;
  std::uint64_t* zero_ = nullptr;
  TokenSets<Storage> sets_;
  Stream stream_;
  FeatureDecay<T> decay_;
  StatesOfBothWays<T> keys_, queries_;
  StatesOfBothWays<T> denominator_keys_, denominator_queries_;
  RowFactors<T>* factors_ = nullptr;  // [B, N, H]
  Storage* divided_ = nullptr;        // [B, N, H, E], of a norm
  T* divisor_ = nullptr;              // [B, N, H]
  double* chunk_steps_ = nullptr;     // [slot, H, R], of steps that are the same everywhere
  T* first_way_ = nullptr;            // [B, M, H, R]
};

// Calls function with the pass for the parameters, whose memory is laid out from `workspace` on.
template <class Function>
void visit_pass(const LinearAttentionParams& p, void* workspace, bool allow_tf32, Stream stream,
                const Function& function) {
  visit_types(p.dtype, allow_tf32, [&](auto storage, auto operand) {
    FeatureDecayPass<decltype(storage), decltype(operand)> pass(p, false, false, false, workspace,
                                                                stream);
    function(pass);
  });
}
template <class Function>
void visit_pass(const LinearAttentionBackwardParams& p, void* workspace, bool allow_tf32,
                Stream stream, const Function& function) {
  const bool wants_steps = p.grad_log_decay != nullptr;
  visit_types(p.dtype, allow_tf32, [&](auto storage, auto operand) {
    FeatureDecayPass<decltype(storage), decltype(operand)> pass(
        p, true, wants_steps, wants_steps && p.constant_decay, workspace, stream);
    function(pass);
  });
}

// The same size whether tf32 is allowed or not: chunks of both are equally long.
template <class Params>
std::size_t workspace_size(const Params& p) {
  std::size_t size = 0;
  visit_pass(p, nullptr, false, Stream{}, [&](const auto& pass) { size = pass.workspace_size; });
  return size;
}

}  // namespace

std::size_t feature_decay_forward_workspace(const LinearAttentionParams& p) {
  return workspace_size(p);
}

std::size_t feature_decay_backward_workspace(const LinearAttentionBackwardParams& p) {
  return workspace_size(p);
}

void feature_decay_forward(const LinearAttentionParams& p, void* workspace, bool allow_tf32,
                           Stream stream) {
  visit_pass(p, workspace, allow_tf32, stream, [](auto& pass) { pass.forward(); });
}

void feature_decay_backward(const LinearAttentionBackwardParams& p, void* workspace,
                            bool allow_tf32, Stream stream) {
  visit_pass(p, workspace, allow_tf32, stream, [&](auto& pass) { pass.backward(p); });
}

}  // namespace torch_spe::cuda::attention
