// The gradients of a chunk of tokens where attention fades with the lag.
//
// Queries and keys play the same part in each other's gradients, so everything is written for a
// later and an earlier set of tokens: queries and keys for what a query has from keys before it,
// keys and queries, where attention is not causal, for what it has from keys after it. A token has
// features x, values y and a weight w:
//   keys:    x = phi(k), y = v,          w = 1
//   queries: x = phi(q), y = grad_sums,  w = grad_denominator
// With P_tm = f_tm (y_t . y_m + w_t w_m) for a token t of the later set and m < t of the earlier
// one, f_tm being what fades between the two, `before` the state of the earlier set before the
// chunk and `after` that of the later set behind it, the gradients are
//   dx_t = sum_m P_tm x_m + from_start_t (before.s y_t + w_t before.z)
//   dx_m = sum_t P_tm x_t + to_end_m     (after.s y_m + w_m after.z)
// (where features fade apart, f is inside the products of x). The gradient of step u is the sum of
// what every pair that it lies between contributes to the loss:
//   dg_u = sum_(t >= u) x_t dx_t - [sum_(m >= u) x_m dx_m, with tokens of the chunk alone]
//          + sum_(m < u) [x_m dx_m, with `after` alone] + total <before, after>.
// A token paired with itself contributes nothing and is left out of these sums: their difference
// would be lost in its size when attention fades fast. Of a step that leaves nothing it is 0.
#pragma once

#include "tiles.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

using core::LinearAttentionBackwardParams;

template <class T>
struct FadingTokens {
  const T* x;       // [chunk, R]
  const T* y;       // [chunk, E]
  const T* weight;  // [chunk], of queries; null for keys
  T* grad_x;        // [chunk, R], or null where nobody wants it
  T* grad_y;        // [chunk, E], of keys, or null where nobody wants it
};

template <class T>
class FadingGradients {
 public:
  FadingGradients(const LinearAttentionBackwardParams& p, const StateLayout<T>& layout,
                  const Decay<T>& decay, RowsAhead& ahead, bool shares_features)
      : p_(p),
        layout_(layout),
        decay_(decay),
        ahead_(ahead),
        shares_features_(shares_features),
        own_(p.has_own_denominator),
        rows_(decay.fades() ? chunk_size(p) : 0),
        width_(decay.width()),
        weights_(rows_ * rows_),
        columns_(rows_ * max_of(layout.feature_width, layout.value_width)),
        state_columns_(rows_ > 0 ? layout.value_width * layout.feature_width : 0),
        part_(rows_ * layout.feature_width),
        sent_(decay.per_feature() ? rows_ * layout.feature_width : 0),
        strict_(layout.denominator_width),
        running_(layout.denominator_width),
        terms_(rows_ * width_),
        later_terms_(rows_ * width_),
        steps_(width_),
        sums_(width_),
        step_(width_) {}

  // Starts a chunk.
  void clear() const {
    set_zero(terms_.get(), rows_ * width_);
    set_zero(later_terms_.get(), rows_ * width_);
    set_zero(steps_.get(), width_);
  }

  // Adds the gradients of both sets, given `before` and `after`, or null for states of no tokens.
  // The first call of a chunk overwrites what stands in the tiles of gradients.
  void add_pairs(std::int64_t size, bool is_first, const FadingTokens<T>& later,
                 const FadingTokens<T>& earlier, const T* before, const T* after) const {
    if (later.grad_x != nullptr || earlier.grad_x != nullptr)
      add_feature_gradients(size, is_first, later, earlier, before, after);
    if (later.grad_y != nullptr || earlier.grad_y != nullptr)
      add_value_gradients(size, is_first ? T(0) : T(1), later, earlier, before, after);
    if (wants_steps() && before != nullptr && after != nullptr) add_states(before, after);
  }

  // Adds what each token has from itself.
  void add_diagonal(std::int64_t size, const FadingTokens<T>& queries,
                    const FadingTokens<T>& keys) const {
    const std::int64_t rw = layout_.feature_width, vw = layout_.value_width;
    for (std::int64_t t = 0; t < size; ++t) {
      const T *const q = queries.x + t * rw, *const k = keys.x + t * rw;
      T weight = dot<T>(queries.y + t * vw, keys.y + t * vw, vw);
      if (shares_features_) weight += queries.weight[t];
      if (queries.grad_x != nullptr) add_multiple(weight, k, rw, queries.grad_x + t * rw);
      if (keys.grad_x != nullptr) add_multiple(weight, q, rw, keys.grad_x + t * rw);
      if (keys.grad_y != nullptr)
        add_multiple(dot<T>(q, k, rw), queries.y + t * vw, vw, keys.grad_y + t * vw);
    }
  }

  // The same as add_pairs for features of the denominator's own: y is nothing, the states are z.
  void add_denominator_pairs(std::int64_t size, const FadingTokens<T>& later,
                             const FadingTokens<T>& earlier, const T* before,
                             const T* after) const {
    const std::int64_t width = layout_.denominator_width, stride = decay_.stride();
    set_zero(running_.get(), width);
    for (std::int64_t t = 0; t < size; ++t) {
      const T *const step = decay_.step(t), *const from_start = decay_.from_start(t);
      const T w = weight_of(later, t);
      for (std::int64_t f = 0; f < width; ++f) {
        strict_[f] = step[f * stride] * running_[f];
        running_[f] = strict_[f] + weight_of(earlier, t) * earlier.x[t * width + f];
        if (before != nullptr) strict_[f] += from_start[f * stride] * before[f];
        strict_[f] *= w;
        later.grad_x[t * width + f] += strict_[f];
      }
      add_term(later.x + t * width, strict_, width, T(1), terms_ + t * width_);
    }
    set_zero(running_.get(), width);
    for (std::int64_t t = size - 1; t >= 0; --t) {
      const T *const step = decay_.step(t), *const to_end = decay_.to_end(t);
      const T w = weight_of(earlier, t);
      T* const grad = earlier.grad_x + t * width;
      // running_ is faded down to t already.
      for (std::int64_t f = 0; f < width; ++f) {
        strict_[f] = w * running_[f];
        grad[f] += strict_[f];
      }
      add_term(earlier.x + t * width, strict_, width, T(-1), terms_ + t * width_);
      for (std::int64_t f = 0; f < width; ++f)
        running_[f] =
            step[f * stride] * (running_[f] + weight_of(later, t) * later.x[t * width + f]);
      if (after == nullptr) continue;
      for (std::int64_t f = 0; f < width; ++f) {
        strict_[f] = w * to_end[f * stride] * after[f];
        grad[f] += strict_[f];
      }
      add_term(earlier.x + t * width, strict_, width, T(1), later_terms_ + t * width_);
    }
  }
  void add_denominator_diagonal(std::int64_t size, const FadingTokens<T>& queries,
                                const FadingTokens<T>& keys) const {
    const std::int64_t width = layout_.denominator_width;
    for (std::int64_t t = 0; t < size; ++t) {
      const T weight = queries.weight[t];
      add_multiple(weight, keys.x + t * width, width, queries.grad_x + t * width);
      add_multiple(weight, queries.x + t * width, width, keys.grad_x + t * width);
    }
  }

  // Ends a chunk: writes the gradients of its steps, or adds them up in `sums` [columns] where the
  // decay is the same for all tokens. Sums over the tokens before a step are taken from the start:
  // as a difference of sums they would be lost in the last key's share, which is nearly all of them
  // when attention fades fast.
  void store_steps(const Chunk& chunk, double* sums) const {
    const std::int64_t columns = p_.decay_features;
    set_zero(sums_.get(), columns);
    for (std::int64_t t = 0; t < chunk.size; ++t) {
      for (std::int64_t c = 0; c < columns; ++c) {
        T& term = later_terms_[t * width_ + c];
        const T own = term;
        term = static_cast<T>(sums_[c]);
        sums_[c] += own;
      }
    }
    for (std::int64_t c = 0; c < columns; ++c) sums_[c] = steps_[c];
    for (std::int64_t t = chunk.size - 1; t >= 0; --t) {
      for (std::int64_t c = 0; c < columns; ++c) {
        sums_[c] += terms_[t * width_ + c];
        // Exactly 0 where nothing is left after the step, as the derivative of exp(-inf) is:
        // rounding would leave something of terms that cancel.
        step_[c] = decay_.step(t)[c] == T(0) ? 0 : sums_[c] + later_terms_[t * width_ + c];
      }
      if (sums != nullptr) {
        for (std::int64_t c = 0; c < columns; ++c) sums[c] += step_[c];
        continue;
      }
      store_doubles(
          p_, step_, columns,
          ((chunk.batch * p_.key_length + chunk.begin + t) * p_.num_heads + chunk.head) * columns);
    }
  }

  // Writes gradients of log_decay from element `first` on.
  static void store_doubles(const LinearAttentionBackwardParams& p, const double* values,
                            std::int64_t count, std::int64_t first) {
    for (std::int64_t c = 0; c < count; ++c) {
      if (p.log_decay_dtype == core::DType::kFloat64) {
        static_cast<double*>(p.grad_log_decay)[first + c] = values[c];
      } else {
        static_cast<float*>(p.grad_log_decay)[first + c] = static_cast<float>(values[c]);
      }
    }
  }

 private:
  bool wants_steps() const { return p_.grad_log_decay != nullptr; }

  // A product of tiles. Meanwhile rows of the chunk that comes next are asked for.
  void product(std::int64_t m, std::int64_t n, std::int64_t k, const LeftFactor<T>& a, const T* b,
               std::int64_t ldb, T beta, T* c, std::int64_t ldc, Skip skip = Skip::kNothing) const {
    multiply(m, n, k, a, b, ldb, beta, c, ldc, skip, ahead_);
  }

  static T weight_of(const FadingTokens<T>& tokens, std::int64_t t) {
    return tokens.weight == nullptr ? T(1) : tokens.weight[t];
  }
  static void add_multiple(T factor, const T* in, std::int64_t n, T* out) {
    for (std::int64_t i = 0; i < n; ++i) out[i] += factor * in[i];
  }

  // What a row of features and its gradient contribute to the gradient of steps.
  void add_term(const T* x, const T* grad, std::int64_t n, T sign, T* term) const {
    if (!wants_steps()) return;
    if (decay_.per_feature()) {
      for (std::int64_t i = 0; i < n; ++i) term[i] += sign * x[i] * grad[i];
    } else {
      *term += sign * dot<T>(x, grad, n);
    }
  }
  // grad += part, unless they are the same, for features x of a chunk.
  void add_part(std::int64_t size, const T* x, const T* part, T sign, T* terms, T* grad) const {
    const std::int64_t rw = layout_.feature_width;
    for (std::int64_t t = 0; t < size; ++t) {
      const T* const row = part + t * rw;
      add_term(x + t * rw, row, rw, sign, terms + t * width_);
      if (part == grad) continue;
      for (std::int64_t r = 0; r < rw; ++r) grad[t * rw + r] += row[r];
    }
  }

  // part = beta part + what tokens have from a state that has come this way to the chunk. Where
  // features fade apart, beta is 0.
  void read_state(Way way, std::int64_t size, const FadingTokens<T>& tokens, const T* state, T beta,
                  T* part) const {
    const std::int64_t rw = layout_.feature_width, vw = layout_.value_width;
    const T* const factors = decay_.received_column(way);
    transpose(layout_.features, layout_.values, state, vw, state_columns_.get(), rw);
    product(size, rw, layout_.values, plain(tokens.y, vw).times(factors), state_columns_.get(), rw,
            beta, part, rw);
    const T* const z = state + layout_.z_offset();
    const bool has_z = tokens.weight == nullptr ? !own_ : shares_features_;
    for (std::int64_t t = 0; t < size; ++t) {
      T* const row = part + t * rw;
      const T factor = factors == nullptr ? T(1) : factors[t];
      // What the transposed state has beyond R is not known.
      for (std::int64_t r = layout_.features; r < rw; ++r) row[r] = 0;
      if (has_z) add_multiple(factor * weight_of(tokens, t), z, layout_.features, row);
      if (decay_.per_feature()) decay_.receive(way, t, row, rw, row);
    }
  }

  void add_feature_gradients(std::int64_t size, bool is_first, const FadingTokens<T>& later,
                             const FadingTokens<T>& earlier, const T* before,
                             const T* after) const {
    const std::int64_t rw = layout_.feature_width, vw = layout_.value_width, ld = rows_;
    transpose(size, layout_.values, earlier.y, vw, columns_.get(), ld);
    product(size, size, layout_.values, plain(later.y, vw), columns_.get(), ld, T(0),
            weights_.get(), ld, Skip::kUpperOfC);
    if (shares_features_) {
      for (std::int64_t t = 0; t < size; ++t) {
        for (std::int64_t m = 0; m < t; ++m)
          weights_[t * ld + m] += weight_of(later, t) * weight_of(earlier, m);
      }
    }
    if (!decay_.per_feature()) decay_.fade_weights(size, true, weights_, ld);
    if (later.grad_x != nullptr) {
      T* const part = is_first ? later.grad_x : part_.get();
      if (decay_.per_feature()) {
        decay_.sum_earlier(size, weights_, ld, earlier.x, part);
      } else {
        product(size, rw, size, plain<T>(weights_, ld), earlier.x, rw, T(0), part, rw,
                Skip::kUpperOfA);
        if (before != nullptr) read_state(Way::kToEnd, size, later, before, T(1), part);
      }
      add_part(size, later.x, part, T(1), terms_, later.grad_x);
      if (before != nullptr && decay_.per_feature()) {
        read_state(Way::kToEnd, size, later, before, T(0), part_);
        add_part(size, later.x, part_, T(1), terms_, later.grad_x);
      }
    }
    if (earlier.grad_x == nullptr) return;
    T* const part = is_first ? earlier.grad_x : part_.get();
    if (decay_.per_feature()) {
      decay_.sum_later(size, weights_, ld, later.x, part);
    } else {
      product(size, rw, size, transposed<T>(weights_, ld), later.x, rw, T(0), part, rw,
              Skip::kLowerOfA);
    }
    add_part(size, earlier.x, part, T(-1), terms_, earlier.grad_x);
    if (after != nullptr) {
      read_state(Way::kToStart, size, earlier, after, T(0), part_);
      add_part(size, earlier.x, part_, T(1), later_terms_, earlier.grad_x);
    }
  }

  void add_value_gradients(std::int64_t size, T beta, const FadingTokens<T>& later,
                           const FadingTokens<T>& earlier, const T* before, const T* after) const {
    const std::int64_t rw = layout_.feature_width, vw = layout_.value_width, ld = rows_;
    if (decay_.per_feature()) {
      decay_.make_weights(size, true, later.x, rw, earlier.x, rw, weights_, ld);
    } else {
      transpose(size, layout_.features, earlier.x, rw, columns_.get(), ld);
      product(size, size, layout_.features, plain(later.x, rw), columns_.get(), ld, T(0),
              weights_.get(), ld, Skip::kUpperOfC);
      decay_.fade_weights(size, true, weights_, ld);
    }
    const bool of_later = later.grad_y != nullptr;
    T* const grad = of_later ? later.grad_y : earlier.grad_y;
    product(size, vw, size, of_later ? plain<T>(weights_, ld) : transposed<T>(weights_, ld),
            of_later ? earlier.y : later.y, vw, beta, grad, vw,
            of_later ? Skip::kUpperOfA : Skip::kLowerOfA);
    const T* const state = of_later ? before : after;
    if (state == nullptr) return;
    // Keys see the state as they would pass into one that goes the other way.
    const Way way = of_later ? Way::kToStart : Way::kToEnd;
    const T* x = of_later ? later.x : earlier.x;
    if (decay_.per_feature()) x = decay_.send(way, size, x, rw, sent_);
    product(size, vw, layout_.features, plain(x, rw).times(decay_.sent_column(way)), state, vw,
            T(1), grad, vw);
  }

  // total <before, after>, over E and, with one column, over R.
  void add_states(const T* before, const T* after) const {
    const Passage<T> passage = decay_.passage();
    const std::int64_t vw = layout_.value_width, z = layout_.z_offset();
    for (std::int64_t r = 0; r < layout_.features; ++r) {
      const T product = dot<T>(before + r * vw, after + r * vw, vw);
      steps_[r * decay_.stride()] += passage.factor(r) * product;
    }
    for (std::int64_t f = 0; f < layout_.denominator_features; ++f)
      steps_[f * decay_.stride()] += passage.factor(f) * before[z + f] * after[z + f];
  }

  const LinearAttentionBackwardParams& p_;
  const StateLayout<T>& layout_;
  const Decay<T>& decay_;
  RowsAhead& ahead_;
  const bool shares_features_, own_;
  const std::int64_t rows_;           // tokens of a chunk
  const std::int64_t width_;          // of a row of terms
  Workspace<T> weights_;              // [chunk, chunk]
  Workspace<T> columns_;              // [R, chunk] or [E, chunk], of earlier tokens
  Workspace<T> state_columns_;        // [E, R], a state
  Workspace<T> part_, sent_;          // [chunk, R]
  Workspace<T> strict_, running_;     // [F]
  Workspace<T> terms_, later_terms_;  // [chunk, 1 or R]
  Workspace<T> steps_;                // [1 or R]
  Workspace<double> sums_, step_;     // [1 or R]
};

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
