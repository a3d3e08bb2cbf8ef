// What calls the kernels of linear attention, forward and backward, and their scratch memory.
#include "decay_gradient.h"
#include "feature_decay.h"
#include "features.h"
#include "linear_attention.h"
#include "state_sums.h"
#include "token_sets.h"
#include "values.h"
#include "warp_features.h"

namespace torch_spe::cuda {
namespace {

using attention::ColumnDecay;
using attention::Cut;
using attention::Divide;
using attention::NoDecay;
using attention::OtherDirection;
using attention::RowDivision;
using attention::RowFactors;
using attention::States;
using attention::StepGradients;
using attention::StepTerms;
using attention::Tokens;
using attention::TokenSets;
using attention::Walk;

// The states that rows read: from one direction and, with a decay where all tokens are seen, from
// the other.
template <class T>
struct TwoStates {
  States<T> states, others;
};

struct PassOptions {
  bool backward = false;
  bool wants_decay = false;  // its gradient
  // Whether z, the sums of denominators, can be other than zero or is wanted.
  bool wants_z = true;

  PassOptions() = default;
  explicit PassOptions(const LinearAttentionBackwardParams& p)
      : backward(true),
        wants_decay(p.grad_log_decay != nullptr),
        wants_z(p.normalize || p.grad_final_z != nullptr || p.grad_initial_z != nullptr) {}
};

// The scratch memory of one pass, and its launches.
template <class Storage, class Operand, class Decay>
class AttentionPass {
 public:
  using T = core::accumulate_t<Storage>;
  static constexpr bool kFades = Decay::kFades;
  // Whether there are walks of warps.
  static constexpr bool kHasWarps = std::is_same_v<Operand, Storage> && sizeof(Operand) == 2;
  std::size_t workspace_size = 0;

  AttentionPass(const LinearAttentionParams& p, const PassOptions& options, void* workspace,
                Stream stream)
      : p_(p),
        // A state of keys alone is that of a causal pass.
        causal_(p.causal || (kFades && p.query_length == 0)),
        wants_terms_(options.wants_decay && causal_),
        wants_chunks_(options.wants_decay && !causal_),
        backward_(options.backward),
        sets_(p),
        stream_(stream) {
    const bool backward = options.backward, wants_decay = options.wants_decay;
    is_divided_ = options.wants_z || sets_.has_factors();
    const std::int64_t most = is_divided_ ? 1 : attention::kMostTiles;
    by_warps_ = kHasWarps && backward && (causal_ || !kFades) && !(is_divided_ && wants_decay) &&
                p.value_features > 0 && p.value_features <= attention::kWide &&
                p.num_realizations <= most * attention::kWide;
    // With one tile of features the walk of keys makes the gradients of values too.
    values_too_ = by_warps_ && p.num_realizations <= attention::kWide;
    MemoryLayout layout(static_cast<unsigned char*>(workspace));
    // First: they are aligned to more than a layout does.
    if (backward && sets_.divides()) factors_ = layout.take<RowFactors<T>>(sets_.rows());
    if (backward && sets_.divided_size() > 0) divided_ = layout.take<Storage>(sets_.divided_size());
    const bool own = sets_.has_own_denominator();
    has_z_ = !own && options.wants_z;
    keys_ = take(layout, p.num_realizations, p.value_features, has_z_);
    if (own) denominator_keys_ = take(layout, p.denominator_features, 0, true);
    queries_ = keys_;
    denominator_queries_ = denominator_keys_;
    if constexpr (kFades) take_decay(layout, backward, wants_decay);
    if (!backward && own && p.row_divisor == nullptr) divisor_ = layout.take<T>(sets_.rows());
    if (!backward && p.rms_norm && p.value_features > attention::kWide)
      squares_ = layout.take<T>(sets_.rows() * ceil_div(p.value_features, attention::kWide));
    if (kFades && !causal_) {
      // Of queries and of keys, which are as many.
      const std::int64_t rows = sets_.batch() * p.key_length * p.num_heads;
      const std::int64_t columns =
          max_of(p.value_features,
                 backward ? max_of(p.num_realizations, own ? p.denominator_features : 0) : 0);
      other_.sums = layout.take<T>(rows * columns);
      other_.denominators = layout.take<T>(rows);
    }
    workspace_size = layout.size();
  }

  void forward() {
    make_decay_factors();
    const bool own = sets_.has_own_denominator();
    const TwoStates<T> sums =
        make_states(sets_.keys(), false, p_.initial_s, own ? nullptr : p_.initial_z, p_.final_s,
                    own ? nullptr : p_.final_z, keys_);
    RowDivision<T> division = sets_.division(divisor_);
    if (own) {
      const TwoStates<T> denominators =
          make_states(sets_.denominator_keys(), false, nullptr, p_.initial_z, nullptr, p_.final_z,
                      denominator_keys_);
      values(sets_.denominator_queries(), sets_.denominator_keys(), false, denominators, division,
             nullptr);
      division.by = Divide::kByGiven;
    }
    if (squares_ != nullptr) {
      division.squares = squares_;
      division.rows = sets_.rows();
      division.by = Divide::kSumSquares;
      values(sets_.queries(), sets_.keys(), false, sums, division, p_.out);
      division.by = Divide::kBySquares;
    }
    values(sets_.queries(), sets_.keys(), false, sums, division, p_.out);
  }

  void backward(const LinearAttentionBackwardParams& p) {
    make_decay_factors();
    const bool own = sets_.has_own_denominator(), wants_decay = kFades && p.grad_log_decay;
    if (sets_.divides()) sets_.make_factors(p, factors_, divided_, stream_);
    const Tokens<Storage> queries = sets_.queries(p, factors_, divided_), keys = sets_.keys();
    TwoStates<T> key_states;
    if (p.grad_q != nullptr || wants_decay) {
      key_states = make_states(keys, false, p.initial_s, own ? nullptr : p.initial_z, nullptr,
                               nullptr, keys_);
      if (p.grad_q != nullptr || wants_terms_) features(queries, keys, false, key_states, p.grad_q);
    }
    void* const grad_initial_z = own ? nullptr : p.grad_initial_z;
    if (p.grad_k != nullptr || p.grad_v != nullptr || p.grad_initial_s != nullptr ||
        grad_initial_z != nullptr || wants_decay) {
      const TwoStates<T> states =
          make_states(queries, true, p.grad_final_s, own ? nullptr : p.grad_final_z,
                      p.grad_initial_s, grad_initial_z, queries_);
      void* const grad_v = values_too_ ? p.grad_v : nullptr;
      if (p.grad_k != nullptr || grad_v != nullptr || wants_terms_)
        features(keys, queries, true, states, p.grad_k, grad_v);
      if (p.grad_v != nullptr && !values_too_)
        values(keys, queries, true, states, RowDivision<T>{}, p.grad_v);
    }
    if constexpr (kFades) {
      if (wants_decay) decay_gradient(p, queries, keys, keys_, queries_, false);
    }
    if (own) backward_of_denominators(p);
    if constexpr (kFades) {
      if (wants_decay) {
        attention::write_decay_gradient(
            step_gradients_,
            p.constant_decay ? cut_of_keys().slots() : sets_.batch() * p.key_length, p.num_heads,
            p.constant_decay, p.log_decay_dtype, p.grad_log_decay, stream_);
      }
    }
  }

 private:
  // Memory for states [features, values] of all heads, with z or without.
  States<T> take_states(MemoryLayout& layout, std::int64_t features, std::int64_t values,
                        bool has_z) const {
    States<T> states;
    states.heads = p_.num_heads;
    states.features = features;
    states.values = values;
    const std::int64_t size_z = p_.num_heads * features, size_s = size_z * values;
    const std::int64_t slots =
        max_of(segments(p_.query_length).slots(), segments(p_.key_length).slots());
    if (wants_chunks_) {
      const std::int64_t chunk_slots = cut_of_keys().slots();
      states.chunk_s = layout.take<T>(chunk_slots * size_s);
      if (has_z) states.chunk_z = layout.take<T>(chunk_slots * size_z);
    }
    states.segment_s = layout.take<T>(slots * size_s);
    if (has_z) states.segment_z = layout.take<T>(slots * size_z);
    if (!moves()) {
      states.total_s = layout.take<T>(p_.num_sequences * size_s);
      if (has_z) states.total_z = layout.take<T>(p_.num_sequences * size_z);
    }
    if (features > attention::kWide || (backward_ && values > attention::kWide)) {
      states.walk_s = layout.take<T>(slots * size_s);
      if (has_z) states.walk_z = layout.take<T>(slots * size_z * max_of(1, tiles_of_values()));
    }
    return states;
  }
  TwoStates<T> take(MemoryLayout& layout, std::int64_t features, std::int64_t values,
                    bool has_z) const {
    TwoStates<T> two;
    two.states = take_states(layout, features, values, has_z);
    if (kFades && !causal_) two.others = take_states(layout, features, values, has_z);
    return two;
  }

  void take_decay(MemoryLayout& layout, bool backward, bool wants_gradient) {
    zero_ = layout.take<std::uint64_t>(1);
    if (backward && p_.query_length == 0) sets_.replace_queries(zero_);
    decay_.steps.data = p_.log_decay;
    decay_.steps.is_double = p_.log_decay_dtype == core::DType::kFloat64;
    for (int i = 0; i < 4; ++i) decay_.steps.strides[i] = p_.log_decay_strides[i];
    decay_.length = p_.key_length;
    decay_.heads = p_.num_heads;
    const std::int64_t tokens = sets_.batch() * p_.key_length * p_.num_heads;
    const std::int64_t slots = cut_of_keys().slots() * p_.num_heads;
    decay_.from_start = layout.take<T>(tokens);
    decay_.to_end = layout.take<T>(tokens);
    decay_.sums = layout.take<double>(slots);
    decay_.over_chunks = layout.take<T>(slots);
    if (wants_chunks_) {
      decay_.before_chunks = layout.take<T>(slots);
      decay_.after_chunks = layout.take<T>(slots);
    }
    decay_.over_segments = layout.take<T>(segments(p_.key_length).slots() * p_.num_heads);
    if (!wants_gradient) return;
    const bool own = sets_.has_own_denominator();
    step_gradients_ = layout.take<double>(max_of(tokens, slots));
    if (wants_terms_) {
      const std::int64_t tiles = ceil_div(
          max_of(p_.num_realizations, own ? p_.denominator_features : 0), attention::kWide);
      const std::int64_t size_z = slots * p_.num_realizations;
      terms_.terms = layout.take<T>(tiles * StepTerms<T>::kParts * tokens);
      terms_.later_terms = layout.take<T>(tiles * StepTerms<T>::kParts * tokens);
      terms_.passing = layout.take<T>(tiles * StepTerms<T>::kWarps * slots);
      terms_.s = layout.take<T>(by_warps_ ? StepTerms<T>::rounded_size(slots * tiles)
                                          : size_z * p_.value_features);
      terms_.z = layout.take<T>(own ? slots * p_.denominator_features : size_z);
      terms_.rows = tokens;
      terms_.length = p_.key_length;
      terms_.slots = slots;
      terms_.of_warps = by_warps_;
    } else {
      // The states of keys and of queries.
      queries_ = take(layout, p_.num_realizations, p_.value_features, has_z_);
      if (own) denominator_queries_ = take(layout, p_.denominator_features, 0, true);
    }
  }
  void make_decay_factors() const {
    if constexpr (kFades) {
      attention::make_decay_factors(decay_, cut_of_keys(), segments(p_.key_length), zero_, stream_);
    }
  }

  void backward_of_denominators(const LinearAttentionBackwardParams& p) {
    const Tokens<Storage> queries = sets_.denominator_queries(factors_);
    const Tokens<Storage> keys = sets_.denominator_keys();
    const bool wants_decay = kFades && p.grad_log_decay != nullptr;
    if (p.grad_denominator_q != nullptr || wants_decay) {
      const TwoStates<T> states =
          make_states(keys, false, nullptr, p.initial_z, nullptr, nullptr, denominator_keys_);
      if (p.grad_denominator_q != nullptr || wants_terms_)
        features(queries, keys, false, states, p.grad_denominator_q);
    }
    if (p.grad_denominator_k != nullptr || p.grad_initial_z != nullptr || wants_decay) {
      const TwoStates<T> states = make_states(queries, true, nullptr, p.grad_final_z, nullptr,
                                              p.grad_initial_z, denominator_queries_);
      if (p.grad_denominator_k != nullptr || wants_terms_)
        features(keys, queries, true, states, p.grad_denominator_k);
    }
    if constexpr (kFades) {
      if (wants_decay)
        decay_gradient(p, queries, keys, denominator_keys_, denominator_queries_, true);
    }
  }

  // Adds up the gradients of the steps, of pairs in both directions where all tokens are seen.
  void decay_gradient(const LinearAttentionBackwardParams& p, const Tokens<Storage>& queries,
                      const Tokens<Storage>& keys, const TwoStates<T>& key_states,
                      const TwoStates<T>& query_states, bool adds) {
    StepGradients out;
    (p.constant_decay ? out.of_chunks : out.of_tokens) = step_gradients_;
    out.adds = adds;
    if (wants_terms_) {
      attention::make_step_gradients(terms_, key_states.states.features, chunks(keys), decay_, out,
                                     stream_);
      return;
    }
    attention::make_decay_gradient<Operand>(queries, keys, chunks(keys), segments(keys.length),
                                            key_states.states, query_states.states, decay_, out,
                                            stream_);
    out.adds = true;
    attention::make_decay_gradient<Operand>(keys, queries, chunks(keys), segments(keys.length),
                                            query_states.others, key_states.others, decay_, out,
                                            stream_);
  }

  // The states of tokens; totals go to `total_s` [S, H, R, E] and `total_z` [S, H, R] or, where
  // these are null, to scratch memory.
  TwoStates<T> make_states(const Tokens<Storage>& tokens, bool backwards, const void* initial_s,
                           const void* initial_z, void* total_s, void* total_z,
                           TwoStates<T> two) const {
    if (total_s != nullptr) two.states.total_s = static_cast<T*>(total_s);
    if (total_z != nullptr) two.states.total_z = static_cast<T*>(total_z);
    const auto make = [&](bool back, const void* s, const void* z, const States<T>& states) {
      attention::make_states<Operand>(tokens, chunks(tokens), segments(tokens.length),
                                      wants_chunks_, back, static_cast<const T*>(s),
                                      static_cast<const T*>(z), states, decay_, stream_);
    };
    make(backwards, initial_s, initial_z, two.states);
    if (kFades && !causal_) make(!backwards, nullptr, nullptr, two.others);
    return two;
  }

  // Walks through the rows: make(walk, states, other). Where all are seen with a decay, twice.
  template <class Make>
  void walk_through(const Tokens<Storage>& rows, bool columns_follow, const TwoStates<T>& two,
                    const Make& make) const {
    Walk walk = whole_walk(rows, columns_follow);
    OtherDirection<T> other = other_;
    if (kFades && !causal_) {
      walk.backwards = !columns_follow;
      walk.within = false;
      other.writes = true;
      make(walk, two.others, other);
      walk = whole_walk(rows, columns_follow);
      other.writes = false;
    }
    make(walk, two.states, other);
  }
  Walk whole_walk(const Tokens<Storage>& rows, bool columns_follow) const {
    Walk walk{segments(rows.length), chunks(rows)};
    walk.moves = walk.within = moves();
    walk.masked = causal_;
    walk.backwards = columns_follow;
    return walk;
  }
  void values(const Tokens<Storage>& rows, const Tokens<Storage>& columns, bool columns_follow,
              const TwoStates<T>& two, const RowDivision<T>& division, void* out) const {
    walk_through(rows, columns_follow, two,
                 [&](const Walk& walk, const States<T>& states, const OtherDirection<T>& other) {
                   attention::make_values<Operand>(rows, columns, walk, states, other, division,
                                                   static_cast<Storage*>(out), decay_, stream_);
                 });
  }
  void features(const Tokens<Storage>& rows, const Tokens<Storage>& columns, bool columns_follow,
                const TwoStates<T>& two, void* grad, void* grad_values = nullptr) const {
    walk_through(rows, columns_follow, two,
                 [&](const Walk& walk, const States<T>& states, const OtherDirection<T>& other) {
                   [[maybe_unused]] Storage* const of_values = static_cast<Storage*>(grad_values);
                   StepTerms<T> terms = terms_;
                   terms.of_keys = columns_follow;
                   if constexpr (kHasWarps) {
                     if (by_warps_ && states.values > 0)
                       return attention::make_warp_features(
                           rows, columns, walk, states, terms, is_divided_,
                           static_cast<Storage*>(grad), of_values, decay_, stream_);
                   }
                   attention::make_features<Operand>(rows, columns, walk, states, other, terms,
                                                     static_cast<Storage*>(grad), decay_, stream_);
                 });
  }
  bool moves() const { return causal_ || kFades; }
  std::int64_t tiles_of_values() const { return ceil_div(p_.value_features, attention::kWide); }
  Cut cut_of_keys() const { return sets_.cut(p_.key_length, attention::kChunk<Operand>); }
  Cut chunks(const Tokens<Storage>& tokens) const {
    return sets_.cut(tokens.length, attention::kChunk<Operand>);
  }
  Cut segments(std::int64_t length) const {
    const std::int64_t rows = sets_.batch() * p_.num_heads * max_of(1, tiles_of_values());
    // warp_values_kernel with one tile; what makes the rows that read a total has two blocks.
    const bool is_small =
        kHasWarps && moves() && !backward_ && p_.num_realizations <= attention::kWide;
    const std::int64_t places =
        is_small ? kWalkingBlocks * attention::kBlocksOfWarps / kLeastBlocks : kWalkingBlocks;
    return sets_.cut(length, attention::segment_size<Operand>(rows, length, places));
  }

  const LinearAttentionParams& p_;
  bool causal_;
  // The gradient of a decay is made from what walks leave, or from states of chunks.
  bool wants_terms_, wants_chunks_;
  bool backward_;
  bool by_warps_ = false;    // features' gradients are those of warp_features.h
  bool is_divided_ = false;  // there, with weights or factors of rows
  bool values_too_ = false;  // and those of values
  bool has_z_ = false;       // states have z
  std::uint64_t* zero_ = nullptr;
  TokenSets<Storage> sets_;
  Stream stream_;
  Decay decay_;
  TwoStates<T> keys_, denominator_keys_;
  TwoStates<T> queries_, denominator_queries_;  // in the same memory, unless both are wanted
  RowFactors<T>* factors_ = nullptr;            // [B, N, H]
  Storage* divided_ = nullptr;                  // [B, N, H, E], of a norm
  T* divisor_ = nullptr;                        // [B, N, H]
  T* squares_ = nullptr;                        // [tile, B, N, H], sums
  OtherDirection<T> other_;
  StepTerms<T> terms_;
  double* step_gradients_ = nullptr;  // [B, M, H], or [slot, H] of chunks
};

// Calls function with the pass for the parameters, whose memory is laid out from `workspace` on.
template <class Function>
void visit_pass(const LinearAttentionParams& p, const PassOptions& options, void* workspace,
                bool allow_tf32, Stream stream, const Function& function) {
  attention::visit_types(p.dtype, allow_tf32, [&](auto storage, auto operand) {
    using Storage = decltype(storage);
    using Operand = decltype(operand);
    using T = core::accumulate_t<Storage>;
    const auto call = [&](auto decay) {
      AttentionPass<Storage, Operand, decltype(decay)> pass(p, options, workspace, stream);
      function(pass);
    };
    if (p.decay_features > 0) {
      call(ColumnDecay<T>{});
    } else {
      call(NoDecay<T>{});
    }
  });
}

bool fades_per_feature(const LinearAttentionParams& p) { return p.decay_features > 1; }

// The same size whether tf32 is allowed or not: chunks of both are equally long.
std::size_t workspace_size(const LinearAttentionParams& p, const PassOptions& options) {
  std::size_t size = 0;
  visit_pass(p, options, nullptr, false, Stream{},
             [&](const auto& pass) { size = pass.workspace_size; });
  return size;
}

}  // namespace

std::size_t linear_attention_forward_workspace(const LinearAttentionParams& p) {
  if (fades_per_feature(p)) return attention::feature_decay_forward_workspace(p);
  return workspace_size(p, PassOptions{});
}

std::size_t linear_attention_backward_workspace(const LinearAttentionBackwardParams& p) {
  if (fades_per_feature(p)) return attention::feature_decay_backward_workspace(p);
  return workspace_size(p, PassOptions(p));
}

void linear_attention_forward(const LinearAttentionParams& p, void* workspace, bool allow_tf32,
                              Stream stream) {
  if (fades_per_feature(p))
    return attention::feature_decay_forward(p, workspace, allow_tf32, stream);
  visit_pass(p, PassOptions{}, workspace, allow_tf32, stream, [](auto& pass) { pass.forward(); });
}

void linear_attention_backward(const LinearAttentionBackwardParams& p, void* workspace,
                               bool allow_tf32, Stream stream) {
  if (fades_per_feature(p))
    return attention::feature_decay_backward(p, workspace, allow_tf32, stream);
  visit_pass(p, PassOptions(p), workspace, allow_tf32, stream,
             [&](auto& pass) { pass.backward(p); });
}

}  // namespace torch_spe::cuda
