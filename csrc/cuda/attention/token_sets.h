// The sets of tokens that the passes of linear attention go over, from the operator's parameters.
#pragma once

#include "linear_attention.h"
#include "tokens.h"

namespace torch_spe::cuda::attention {

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

template <class Storage>
class TokenSets {
 public:
  using T = core::accumulate_t<Storage>;

  explicit TokenSets(const LinearAttentionParams& p) : p_(p) {}

  // Queries of a backward pass, of which there are none, become as many as keys and are all zero:
  // `zero` is memory on the device that holds it. A gradient then fades on its way over the keys.
  void replace_queries(const std::uint64_t* zero) {
    zero_ = zero;
    has_zeros_ = true;
  }

  bool has_zeros() const { return has_zeros_; }
  bool has_own_denominator() const { return p_.has_own_denominator; }
  bool divides() const { return (p_.normalize || p_.rms_norm) && p_.query_length > 0; }
  // Elements of the gradients before the division, where these are made once for all kernels: of a
  // norm, but for float16, whose range they leave.
  std::int64_t divided_size() const {
    const bool keeps = divides() && p_.rms_norm && !std::is_same_v<Storage, core::Half>;
    return keeps ? rows() * p_.value_features : 0;
  }
  // Whether queries of the backward pass come with factors. Divisors of at least the root of eps
  // are not scaled: where the gradients before the division are made once, nothing is left to be
  // multiplied by.
  bool has_factors() const { return divides() && (divided_size() == 0 || p_.eps < 1e-50); }
  std::int64_t batch() const { return p_.cu_seqlens == nullptr ? p_.num_sequences : 1; }
  std::int64_t rows() const { return batch() * p_.query_length * p_.num_heads; }
  // What becomes of rows; divisors go to `scratch` where nobody wants to keep them.
  RowDivision<T> division(T* scratch) const {
    RowDivision<T> division;
    division.eps = static_cast<T>(p_.eps);
    division.divisor = p_.row_divisor == nullptr ? scratch : static_cast<T*>(p_.row_divisor);
    if (p_.normalize) division.by = Divide::kByDenominator;
    if (p_.rms_norm) division.by = Divide::kByRms;
    return division;
  }

  // Queries may be none where there are keys, packed or not: they have no bounds then.
  Cut cut(std::int64_t length, std::int64_t size) const {
    return {length == 0 ? nullptr : p_.cu_seqlens, p_.num_sequences, length, size};
  }

  Tokens<Storage> keys() const {
    return as_keys(tokens(p_.k, p_.k_strides, p_.v, p_.v_strides, p_.key_length, p_.feature_map));
  }
  Tokens<Storage> queries() const {
    return tokens(p_.q, p_.q_strides, nullptr, kNone, p_.query_length, p_.feature_map);
  }
  Tokens<Storage> denominator_keys() const {
    return as_keys(tokens(p_.denominator_k, p_.denominator_k_strides, nullptr, kNone, p_.key_length,
                          p_.denominator_feature_map));
  }
  Tokens<Storage> denominator_queries() const {
    return tokens(p_.denominator_q, p_.denominator_q_strides, nullptr, kNone, p_.query_length,
                  p_.denominator_feature_map);
  }

  // Queries of a backward pass. `factors` [B, N, H] are those of rows that were divided, and
  // `divided` [B, N, H, E], or null, the gradients before the division.
  Tokens<Storage> queries(const LinearAttentionBackwardParams& p, const RowFactors<T>* factors,
                          const Storage* divided) const {
    if (has_zeros_) return zeros();
    Tokens<Storage> all =
        tokens(p.q, p.q_strides, p.grad_out, p.grad_out_strides, p.query_length, p.feature_map);
    if (!divides()) return all;
    if (has_factors()) all.factors = factors;
    all.weighted = p.normalize && !has_own_denominator();
    if (divided != nullptr) {
      const std::int64_t row = p.num_heads * p.value_features;
      const std::int64_t strides[4] = {p.query_length * row, row, p.value_features, 1};
      all.y = divided;
      for (int i = 0; i < 4; ++i) all.y_strides[i] = strides[i];
      all.y_aligned = is_aligned<Storage>(divided, strides);
    } else if (p.rms_norm) {
      all.result = static_cast<const Storage*>(p.result);
      for (int i = 0; i < 4; ++i) all.result_strides[i] = p.result_strides[i];
    }
    return all;
  }
  Tokens<Storage> denominator_queries(const RowFactors<T>* factors) const {
    if (has_zeros_) return zeros();
    Tokens<Storage> all = denominator_queries();
    all.factors = factors;
    all.weighted = factors != nullptr;
    return all;
  }

  // The factors, and the gradients before the division where `divided` is not null.
  void make_factors(const LinearAttentionBackwardParams& p, RowFactors<T>* factors,
                    Storage* divided, Stream stream) const {
    RowGradients<Storage> rows;
    rows.batch = batch();
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
    rows.factors = factors;
    rows.divided = divided;
    make_row_factors(rows, stream);
  }

 private:
  static constexpr std::int64_t kNone[4] = {0, 0, 0, 0};

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
  Tokens<Storage> zeros() const {
    Tokens<Storage> zeros =
        tokens(zero_, kNone, zero_, kNone, p_.key_length, core::FeatureMap::kIdentity);
    zeros.x_aligned = zeros.y_aligned = false;
    return zeros;
  }

  const LinearAttentionParams& p_;
  const std::uint64_t* zero_ = nullptr;
  bool has_zeros_ = false;
};

}  // namespace torch_spe::cuda::attention
