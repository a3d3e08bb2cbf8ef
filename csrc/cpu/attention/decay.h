// What queries, keys, weights and states are multiplied by where attention fades with the lag.
//
// In a chunk, with a_t = exp(g_t) <= 1 the factor of the step to token t, a query at t sees a state
// from before the chunk faded by from_start_t = a_0 ... a_t, and a key at t reaches the chunk's end
// faded by to_end_t = a_(t+1) ... a_last; between two tokens lies the product of the steps in
// between. All are products of factors at most 1, never quotients or differences of sums: steps may
// be -inf, and of every size side by side.
//
// One column of factors serves all features, or there is a column for each; then the products of
// queries and keys fade feature by feature, chunks are short, and their weights are made by steps
// from token to token.
#pragma once

#include "core/feature_map.h"
#include "core/state.h"
#include "segments.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

using core::Passage;

// Which way the tokens' states go: that of the keys before a query, or that of those after it.
enum class Way { kToEnd, kToStart };
TORCH_SPE_INLINE Way opposite(Way way) { return way == Way::kToEnd ? Way::kToStart : Way::kToEnd; }

template <class T>
class Decay {
 public:
  // `feature_width` is the length of padded rows of features.
  Decay(const LinearAttentionParams& p, std::int64_t feature_width)
      : p_(p),
        columns_(p.decay_features),
        stride_(columns_ > 1 ? 1 : 0),
        width_(columns_ > 1 ? feature_width : columns_),
        rows_(columns_ == 0 ? 0 : chunk_size(p)),
        doubles_(2 * columns_),
        factors_(columns_ == 1 ? rows_ : 0),
        steps_(width_ * rows_),
        from_start_(width_ * rows_),
        to_end_(width_ * rows_),
        between_(columns_ == 1 ? rows_ * rows_ : 0),
        total_(width_),
        totals_(width_),
        passed_(width_),
        passed_factors_(width_),
        segment_(width_),
        running_(columns_ > 1 ? rows_ * width_ : 0) {
    for (std::int64_t i = 0; i < width_ * rows_; ++i) steps_[i] = from_start_[i] = to_end_[i] = 1;
    for (std::int64_t i = 0; i < width_; ++i) {
      segment_[i] = total_[i] = 1;
      totals_[i] = 1;
    }
  }

  bool fades() const { return columns_ > 0; }
  bool per_feature() const { return columns_ > 1; }
  std::int64_t width() const { return width_; }  // of rows of factors, padded

  // Makes the factors of a chunk; those of the last one are kept while they are the same.
  void load(const Chunk& chunk) {
    if (!fades() || chunk.size == 0) return;
    const std::int64_t batch = p_.log_decay_strides[0] == 0 ? 0 : chunk.batch;
    const bool is_constant = p_.log_decay_strides[1] == 0;
    if (is_constant && batch == batch_ && chunk.head == head_ && chunk.size == size_) return;
    batch_ = batch;
    head_ = chunk.head;
    size_ = chunk.size;
    per_feature() ? load_features(chunk) : load_column(chunk);
  }

  // Of the chunk that is loaded.
  const T* step(std::int64_t t) const { return steps_ + t * width_; }
  const T* from_start(std::int64_t t) const { return from_start_ + t * width_; }
  const T* to_end(std::int64_t t) const { return to_end_ + t * width_; }
  // What a token's part of a state that goes this way is multiplied by, at the chunk's last token
  // or before its first.
  const T* sent(Way way, std::int64_t t) const {
    return way == Way::kToEnd ? to_end(t) : from_start(t);
  }
  // The same for all tokens where features fade alike; else null.
  const T* sent_column(Way way) const { return fades() && !per_feature() ? sent(way, 0) : nullptr; }
  const T* received_column(Way way) const { return sent_column(opposite(way)); }
  std::int64_t stride() const { return stride_; }
  Passage<T> passage() const { return of(total_); }

  // Over chunks one after the other: reset, then `pass` after each.
  void reset() {
    for (std::int64_t c = 0; c < width_; ++c) {
      passed_[c] = 1;
      passed_factors_[c] = 1;
    }
  }
  void pass() {
    for (std::int64_t c = 0; c < width_; ++c) {
      passed_[c] *= totals_[c];
      passed_factors_[c] = static_cast<T>(passed_[c]);
    }
  }
  Passage<T> passed() const { return of(passed_factors_); }

  // Over a whole segment, whose chunks need not be loaded.
  Passage<T> over(const Segment& segment) {
    if (!fades()) return {};
    double *const sums = doubles_, *const steps = doubles_ + columns_;
    for (std::int64_t c = 0; c < columns_; ++c) sums[c] = 0;
    const bool is_constant = p_.log_decay_strides[1] == 0;
    const std::int64_t rows = is_constant ? min_of(1, segment.size) : segment.size;
    for (std::int64_t t = 0; t < rows; ++t) {
      read_steps(segment.batch, segment.begin + t, segment.head, steps);
      for (std::int64_t c = 0; c < columns_; ++c) sums[c] += steps[c];
    }
    const double times = is_constant && segment.size > 0 ? static_cast<double>(segment.size) : 1;
    for (std::int64_t c = 0; c < columns_; ++c)
      segment_[c] = static_cast<T>(core::exp_nonpositive(sums[c] * times));
    return of(segment_);
  }

  // out = in times the factors of each token, for rows of `n` elements. Without a decay, `in`.
  const T* send(Way way, std::int64_t size, const T* in, std::int64_t n, T* out) const {
    if (!fades()) return in;
    for (std::int64_t t = 0; t < size; ++t) scale_row(sent(way, t), in + t * n, n, out + t * n);
    return out;
  }
  // Rows that see a state from before the chunk, or after it.
  void receive(Way way, std::int64_t t, const T* in, std::int64_t n, T* out) const {
    scale_row(sent(opposite(way), t), in, n, out);
  }

  // Weights of a later token t and an earlier one m that are products of both; others become 0.
  // One column only.
  void fade_weights(std::int64_t size, bool strict, T* weights, std::int64_t ld) const {
    make_between();
    for (std::int64_t t = 0; t < size; ++t) {
      T* const row = weights + t * ld;
      const T* const factors = between_ + t * rows_;
      const T own = strict ? T(0) : row[t];
      for (std::int64_t m = 0; m < t; m += kLanes<T>)
        store_vec(row + m, load_vec(row + m) * load_vec(factors + m));
      row[t] = own;
      for (std::int64_t m = t + 1; m < size; ++m) row[m] = 0;
    }
  }
  // The same, and for earlier t and later m too; nothing becomes 0.
  void fade_weights_both_ways(std::int64_t size, T* weights, std::int64_t ld) const {
    make_between();
    for (std::int64_t t = 0; t < size; ++t) {
      for (std::int64_t m = 0; m < t; ++m) {
        weights[t * ld + m] *= between_[t * rows_ + m];
        weights[m * ld + t] *= between_[t * rows_ + m];
      }
    }
  }

  // With a column for each feature: weights[t, m] of later and earlier rows, m < t, and m = t
  // unless strict; the rest of the square is 0.
  void make_weights(std::int64_t size, bool strict, const T* later, std::int64_t ld_later,
                    const T* earlier, std::int64_t ld_earlier, T* weights, std::int64_t ld) const {
    for (std::int64_t t = 0; t < size; ++t) {
      const T *const factors = step(t), *const own = later + t * ld_later;
      T* const row = weights + t * ld;
      for (std::int64_t m = 0; m < t; ++m) {
        T* const faded = running_ + m * width_;
        Vec<T> sum = {};
        for (std::int64_t r = 0; r < width_; r += kLanes<T>) {
          const Vec<T> x = load_vec(faded + r) * load_vec(factors + r);
          store_vec(faded + r, x);
          sum += x * load_vec(own + r);
        }
        row[m] = sum_lanes<T>(sum);
      }
      T* const faded = running_ + t * width_;
      Vec<T> sum = {};
      for (std::int64_t r = 0; r < width_; r += kLanes<T>) {
        const Vec<T> x = load_vec(earlier + t * ld_earlier + r);
        store_vec(faded + r, x);
        sum += x * load_vec(own + r);
      }
      row[t] = strict ? T(0) : sum_lanes<T>(sum);
      for (std::int64_t m = t + 1; m < size; ++m) row[m] = 0;
    }
  }
  // out[t] = sum over m < t of weights[t, m] earlier[m], faded; rows are `width` apart.
  void sum_earlier(std::int64_t size, const T* weights, std::int64_t ld, const T* earlier,
                   T* out) const {
    for (std::int64_t t = 0; t < size; ++t) {
      const T* const factors = step(t);
      T* const to = out + t * width_;
      for (std::int64_t r = 0; r < width_; ++r) to[r] = 0;
      for (std::int64_t m = 0; m < t; ++m) {
        const T weight = weights[t * ld + m];
        T* const faded = running_ + m * width_;
        for (std::int64_t r = 0; r < width_; ++r) {
          faded[r] *= factors[r];
          to[r] += weight * faded[r];
        }
      }
      for (std::int64_t r = 0; r < width_; ++r) running_[t * width_ + r] = earlier[t * width_ + r];
    }
  }
  // out[m] = sum over t > m of weights[t, m] later[t], faded.
  void sum_later(std::int64_t size, const T* weights, std::int64_t ld, const T* later,
                 T* out) const {
    for (std::int64_t m = size - 1; m >= 0; --m) {
      T* const to = out + m * width_;
      for (std::int64_t r = 0; r < width_; ++r) to[r] = 0;
      for (std::int64_t t = m + 1; t < size; ++t) {
        const T weight = weights[t * ld + m];
        const T* const factors = step(m + 1);
        T* const faded = running_ + t * width_;
        for (std::int64_t r = 0; r < width_; ++r) {
          faded[r] *= factors[r];
          to[r] += weight * faded[r];
        }
      }
      for (std::int64_t r = 0; r < width_; ++r) running_[m * width_ + r] = later[m * width_ + r];
    }
  }

 private:
  Passage<T> of(const T* factors) const {
    return fades() ? Passage<T>{factors, stride_} : Passage<T>{};
  }
  // The steps to a token, [columns].
  template <class U>
  TORCH_SPE_INLINE void read_steps(std::int64_t batch, std::int64_t token, std::int64_t head,
                                   U* out) const {
    const std::int64_t* strides = p_.log_decay_strides;
    const std::int64_t first = batch * strides[0] + token * strides[1] + head * strides[2];
    if (p_.log_decay_dtype == core::DType::kFloat64) {
      const double* from = static_cast<const double*>(p_.log_decay) + first;
      for (std::int64_t c = 0; c < columns_; ++c) out[c] = static_cast<U>(from[c * strides[3]]);
    } else {
      const float* from = static_cast<const float*>(p_.log_decay) + first;
      for (std::int64_t c = 0; c < columns_; ++c) out[c] = static_cast<U>(from[c * strides[3]]);
    }
  }
  // Subnormal factors, which some processors are slow with, count as 0.
  static T round(double factor) {
    return factor < 0x1p-126 && sizeof(T) == 4 ? T(0) : static_cast<T>(factor);
  }

  TORCH_SPE_INLINE void scale_row(const T* factors, const T* in, std::int64_t n, T* out) const {
    if (stride_ == 0) {
      const T factor = *factors;
      for (std::int64_t i = 0; i < n; ++i) out[i] = factor * in[i];
    } else {
      for (std::int64_t i = 0; i < n; ++i) out[i] = factors[i] * in[i];
    }
  }

  // In double: chains of products keep steps of every size.
  void load_column(const Chunk& chunk) {
    const std::int64_t size = chunk.size;
    double* const a = factors_;
    for (std::int64_t t = 0; t < size; ++t)
      read_steps(chunk.batch, chunk.begin + t, chunk.head, a + t);
    for (std::int64_t t = 0; t < size; ++t) a[t] = core::exp_nonpositive(a[t]);
    double product = 1;
    for (std::int64_t t = 0; t < size; ++t) {
      product *= a[t];
      steps_[t] = static_cast<T>(a[t]);
      from_start_[t] = round(product);
    }
    totals_[0] = product;
    total_[0] = round(product);
    product = 1;
    for (std::int64_t t = size - 1; t >= 0; --t) {
      to_end_[t] = round(product);
      product *= a[t];
    }
    has_between_ = false;
  }
  // Of the chunk that is loaded, when they are first asked for: sums of keys do without.
  void make_between() const {
    if (has_between_) return;
    has_between_ = true;
    double row[kChunk] = {};  // up to token t
    for (std::int64_t t = 0; t < size_; ++t) {
      T* const to = between_ + t * rows_;
      const std::int64_t whole = round_up(t, kLanes<T>);
      for (std::int64_t m = 0; m < whole; ++m) {
        row[m] *= factors_[t];
        to[m] = round(row[m]);
      }
      row[t] = 1;
    }
  }

  void load_features(const Chunk& chunk) {
    const std::int64_t size = chunk.size, last = (size - 1) * width_;
    for (std::int64_t t = 0; t < size; ++t) {
      T *const row = steps_ + t * width_, *const sums = from_start_ + t * width_;
      read_steps(chunk.batch, chunk.begin + t, chunk.head, row);
      for (std::int64_t r = 0; r < columns_; ++r)
        sums[r] = t == 0 ? row[r] : sums[r - width_] + row[r];
    }
    for (std::int64_t r = 0; r < columns_; ++r) to_end_[last + r] = 0;
    for (std::int64_t t = size - 2; t >= 0; --t) {
      T* const sums = to_end_ + t * width_;
      for (std::int64_t r = 0; r < columns_; ++r)
        sums[r] = sums[r + width_] + steps_[(t + 1) * width_ + r];
    }
    T* const factors[] = {steps_, from_start_, to_end_};
    for (T* const all : factors) {
      for (std::int64_t t = 0; t < size; ++t) {
        T* const row = all + t * width_;
        for (std::int64_t r = 0; r < columns_; ++r) row[r] = core::exp_nonpositive(row[r]);
      }
    }
    for (std::int64_t r = 0; r < columns_; ++r) {
      total_[r] = from_start_[last + r];
      totals_[r] = total_[r];
    }
  }

  const LinearAttentionParams& p_;
  const std::int64_t columns_;  // 0 without a decay
  const std::int64_t stride_;   // between the factors of a row
  const std::int64_t width_;
  const std::int64_t rows_;                          // tokens of a chunk
  std::int64_t batch_ = -1, head_ = -1, size_ = -1;  // of the chunk that is loaded
  Workspace<double> doubles_;                        // [2 * columns]
  Workspace<double> factors_;                        // [chunk], of one column
  Workspace<T> steps_, from_start_, to_end_;         // [chunk, width]
  Workspace<T> between_;                             // [chunk, chunk], below the diagonal
  mutable bool has_between_ = false;                 // of the chunk that is loaded
  Workspace<T> total_;                               // [width]
  Workspace<double> totals_, passed_;                // [width]
  Workspace<T> passed_factors_, segment_;            // [width]
  Workspace<T> running_;                             // [chunk, width]
};

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
