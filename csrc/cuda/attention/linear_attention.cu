// What calls the kernels of linear attention, forward and backward, and their scratch memory.
#include "features.h"
#include "linear_attention.h"
#include "values.h"

namespace torch_spe::cuda {
namespace {

using attention::Cut;
using attention::Divide;
using attention::Result;
using attention::RowDivision;
using attention::RowFactors;
using attention::States;
using attention::Tokens;

// The scratch memory of one pass, and its launches.
template <class Storage, class Operand>
class AttentionPass {
 public:
  using T = core::accumulate_t<Storage>;
  std::size_t workspace_size = 0;

  AttentionPass(const LinearAttentionParams& p, bool backward, void* workspace, Stream stream)
      : p_(p),
        has_own_denominator_(p.normalize && p.denominator_k != nullptr),
        batch_(p.cu_seqlens == nullptr ? p.num_sequences : 1),
        stream_(stream) {
    MemoryLayout layout(static_cast<unsigned char*>(workspace));
    sums_ = take(layout, p.num_realizations, p.value_features, !has_own_denominator_);
    if (has_own_denominator_) denominators_ = take(layout, p.denominator_features, 0, true);
    const std::int64_t rows = batch_ * p.query_length * p.num_heads;
    if (backward && divides()) factors_ = layout.take<RowFactors<T>>(rows);
    if (!backward && has_own_denominator_ && p.row_divisor == nullptr)
      divisor_ = layout.take<T>(rows);
    workspace_size = layout.size();
  }

  void forward() {
    const bool own = has_own_denominator_;
    const States<T> sums = make_states(keys(), false, p_.initial_s, own ? nullptr : p_.initial_z,
                                       p_.final_s, own ? nullptr : p_.final_z, sums_);
    RowDivision<T> division;
    division.eps = static_cast<T>(p_.eps);
    division.divisor = p_.row_divisor == nullptr ? divisor_ : static_cast<T*>(p_.row_divisor);
    if (p_.normalize) division.by = Divide::kByDenominator;
    if (p_.rms_norm) division.by = Divide::kByRms;
    if (own) {
      const States<T> denominators = make_states(denominator_keys(), false, nullptr, p_.initial_z,
                                                 nullptr, p_.final_z, denominators_);
      values<Result::kDivisor>(denominator_queries(), denominator_keys(), false, denominators,
                               division, nullptr);
      division.by = Divide::kByGiven;
    }
    const Tokens<Storage> all_queries = queries(nullptr, {0, 0, 0, 0});
    if (p_.rms_norm) {
      values<Result::kRms>(all_queries, keys(), false, sums, division, p_.out);
    } else {
      values<Result::kOutput>(all_queries, keys(), false, sums, division, p_.out);
    }
  }

  void backward(const LinearAttentionBackwardParams& p) {
    const bool own = has_own_denominator_;
    Tokens<Storage> all_queries = queries(p.grad_out, p.grad_out_strides);
    if (divides()) {
      make_factors(p);
      all_queries.factors = factors_;
      all_queries.weighted = p.normalize && !own;
      if (p.rms_norm) {
        all_queries.result = static_cast<const Storage*>(p.result);
        for (int i = 0; i < 4; ++i) all_queries.result_strides[i] = p.result_strides[i];
      }
    }
    if (p.grad_q != nullptr) {
      const States<T> states = make_states(keys(), false, p.initial_s, own ? nullptr : p.initial_z,
                                           nullptr, nullptr, sums_);
      features(all_queries, keys(), false, states, p.grad_q);
    }
    void* const grad_initial_z = own ? nullptr : p.grad_initial_z;
    if (p.grad_k != nullptr || p.grad_v != nullptr || p.grad_initial_s != nullptr ||
        grad_initial_z != nullptr) {
      const States<T> states =
          make_states(all_queries, true, p.grad_final_s, own ? nullptr : p.grad_final_z,
                      p.grad_initial_s, grad_initial_z, sums_);
      if (p.grad_k != nullptr) features(keys(), all_queries, true, states, p.grad_k);
      if (p.grad_v != nullptr)
        values<Result::kOutput>(keys(), all_queries, true, states, RowDivision<T>{}, p.grad_v);
    }
    if (own) backward_of_denominators(p);
  }

 private:
  bool divides() const { return (p_.normalize || p_.rms_norm) && p_.query_length > 0; }

  // Queries may be none where there are keys, packed or not: they have no bounds then.
  Cut cut(std::int64_t length, std::int64_t size) const {
    return {length == 0 ? nullptr : p_.cu_seqlens, p_.num_sequences, length, size};
  }

  // Memory for states [features, values] of all heads, with z or without.
  States<T> take(MemoryLayout& layout, std::int64_t features, std::int64_t values, bool has_z) {
    States<T> states;
    states.heads = p_.num_heads;
    states.features = features;
    states.values = values;
    const std::int64_t size_z = p_.num_heads * features, size_s = size_z * values;
    const std::int64_t length = max_of(p_.query_length, p_.key_length);
    if (p_.causal) {
      const std::int64_t slots = cut(length, attention::kChunk<Operand>).slots();
      states.chunk_s = layout.take<T>(slots * size_s);
      if (has_z) states.chunk_z = layout.take<T>(slots * size_z);
    }
    const std::int64_t slots = cut(length, attention::kSegment<Operand>).slots();
    states.segment_s = layout.take<T>(slots * size_s);
    states.total_s = layout.take<T>(p_.num_sequences * size_s);
    if (has_z) {
      states.segment_z = layout.take<T>(slots * size_z);
      states.total_z = layout.take<T>(p_.num_sequences * size_z);
    }
    return states;
  }

  Tokens<Storage> tokens(const void* x, const std::int64_t (&x_strides)[4], const void* y,
                         const std::int64_t (&y_strides)[4], std::int64_t length,
                         core::FeatureMap map) const {
    Tokens<Storage> tokens;
    tokens.x = static_cast<const Storage*>(x);
    tokens.y = static_cast<const Storage*>(y);
    for (int i = 0; i < 4; ++i) {
      tokens.x_strides[i] = x_strides[i];
      tokens.y_strides[i] = y_strides[i];
    }
    tokens.map = map;
    tokens.length = length;
    tokens.heads = p_.num_heads;
    tokens.x_aligned = is_aligned<Storage>(x, x_strides);
    tokens.y_aligned = is_aligned<Storage>(y, y_strides);
    return tokens;
  }
  Tokens<Storage> as_keys(Tokens<Storage> tokens) const {
    tokens.constant_weight = 1;
    tokens.padding = p_.key_padding_mask;
    return tokens;
  }
  Tokens<Storage> keys() const {
    return as_keys(tokens(p_.k, p_.k_strides, p_.v, p_.v_strides, p_.key_length, p_.feature_map));
  }
  Tokens<Storage> queries(const void* grad_out, const std::int64_t (&strides)[4]) const {
    return tokens(p_.q, p_.q_strides, grad_out, strides, p_.query_length, p_.feature_map);
  }
  Tokens<Storage> denominator_keys() const {
    return as_keys(tokens(p_.denominator_k, p_.denominator_k_strides, nullptr, {0, 0, 0, 0},
                          p_.key_length, p_.denominator_feature_map));
  }
  Tokens<Storage> denominator_queries() const {
    return tokens(p_.denominator_q, p_.denominator_q_strides, nullptr, {0, 0, 0, 0},
                  p_.query_length, p_.denominator_feature_map);
  }

  void make_factors(const LinearAttentionBackwardParams& p) const {
    attention::RowGradients<Storage> rows;
    rows.batch = batch_;
    rows.length = p.query_length;
    rows.heads = p.num_heads;
    rows.values = p.value_features;
    rows.grad = static_cast<const Storage*>(p.grad_out);
    rows.result = static_cast<const Storage*>(p.result);
    for (int i = 0; i < 4; ++i) {
      rows.grad_strides[i] = p.grad_out_strides[i];
      rows.result_strides[i] = p.result_strides[i];
    }
    rows.divisor = static_cast<const T*>(p.saved_row_divisor);
    rows.norm = p.rms_norm;
    rows.aligned = is_aligned<Storage>(p.grad_out, p.grad_out_strides) &&
                   is_aligned<Storage>(p.result, p.result_strides) &&
                   p.value_features % Vector<Storage>::kSize == 0;
    rows.factors = factors_;
    attention::make_row_factors(rows, stream_);
  }

  void backward_of_denominators(const LinearAttentionBackwardParams& p) const {
    Tokens<Storage> all_queries = denominator_queries();
    all_queries.factors = factors_;
    all_queries.weighted = factors_ != nullptr;
    if (p.grad_denominator_q != nullptr) {
      const States<T> states = make_states(denominator_keys(), false, nullptr, p.initial_z, nullptr,
                                           nullptr, denominators_);
      features(all_queries, denominator_keys(), false, states, p.grad_denominator_q);
    }
    if (p.grad_denominator_k == nullptr && p.grad_initial_z == nullptr) return;
    const States<T> states = make_states(all_queries, true, nullptr, p.grad_final_z, nullptr,
                                         p.grad_initial_z, denominators_);
    if (p.grad_denominator_k != nullptr)
      features(denominator_keys(), all_queries, true, states, p.grad_denominator_k);
  }

  // The states of tokens; totals go to `total_s` [S, H, R, E] and `total_z` [S, H, R] or, where
  // these are null, to scratch memory.
  States<T> make_states(const Tokens<Storage>& tokens, bool backwards, const void* initial_s,
                        const void* initial_z, void* total_s, void* total_z,
                        States<T> states) const {
    if (total_s != nullptr) states.total_s = static_cast<T*>(total_s);
    if (total_z != nullptr) states.total_z = static_cast<T*>(total_z);
    attention::make_states<Operand>(tokens, chunks(tokens), segments(tokens), p_.causal, backwards,
                                    static_cast<const T*>(initial_s),
                                    static_cast<const T*>(initial_z), states, stream_);
    return states;
  }

  template <Result kResult>
  void values(const Tokens<Storage>& rows, const Tokens<Storage>& columns, bool columns_follow,
              const States<T>& states, const RowDivision<T>& division, void* out) const {
    attention::make_values<Operand, kResult>(rows, columns, chunks(rows), segments(columns),
                                             p_.causal, columns_follow, states, division,
                                             static_cast<Storage*>(out), stream_);
  }
  void features(const Tokens<Storage>& rows, const Tokens<Storage>& columns, bool columns_follow,
                const States<T>& states, void* grad) const {
    attention::make_features<Operand>(rows, columns, chunks(rows), segments(columns), p_.causal,
                                      columns_follow, states, static_cast<Storage*>(grad), stream_);
  }
  Cut chunks(const Tokens<Storage>& tokens) const {
    return cut(tokens.length, attention::kChunk<Operand>);
  }
  Cut segments(const Tokens<Storage>& tokens) const {
    return cut(tokens.length, attention::kSegment<Operand>);
  }

  const LinearAttentionParams& p_;
  bool has_own_denominator_;
  std::int64_t batch_;
  Stream stream_;
  States<T> sums_, denominators_;
  RowFactors<T>* factors_ = nullptr;  // [B, N, H]
  T* divisor_ = nullptr;              // [B, N, H]
};

// Calls function(storage, operand). float16 goes through products as tf32, which has as many bits
// of mantissa: states and products of features can be larger than float16's range, gradients
// divided by denominators (about N R) smaller.
template <class Function>
void visit_types(core::DType dtype, bool allow_tf32, const Function& function) {
  visit_operands(dtype, allow_tf32, [&](auto storage, auto operand) {
    if constexpr (std::is_same_v<decltype(storage), core::Half>) {
      function(storage, Tf32{});
    } else {
      function(storage, operand);
    }
  });
}

// The same size whether tf32 is allowed or not: chunks of both are equally long.
std::size_t workspace_size(const LinearAttentionParams& p, bool backward) {
  std::size_t size = 0;
  visit_types(p.dtype, false, [&](auto storage, auto operand) {
    size = AttentionPass<decltype(storage), decltype(operand)>(p, backward, nullptr, Stream{})
               .workspace_size;
  });
  return size;
}

}  // namespace

std::size_t linear_attention_forward_workspace(const LinearAttentionParams& p) {
  return workspace_size(p, false);
}

std::size_t linear_attention_backward_workspace(const LinearAttentionBackwardParams& p) {
  return workspace_size(p, true);
}

void linear_attention_forward(const LinearAttentionParams& p, void* workspace, bool allow_tf32,
                              Stream stream) {
  visit_types(p.dtype, allow_tf32, [&](auto storage, auto operand) {
    AttentionPass<decltype(storage), decltype(operand)>(p, false, workspace, stream).forward();
  });
}

void linear_attention_backward(const LinearAttentionBackwardParams& p, void* workspace,
                               bool allow_tf32, Stream stream) {
  visit_types(p.dtype, allow_tf32, [&](auto storage, auto operand) {
    AttentionPass<decltype(storage), decltype(operand)>(p, true, workspace, stream).backward(p);
  });
}

}  // namespace torch_spe::cuda
