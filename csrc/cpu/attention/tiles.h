// Tiles of linear attention: chunks of q, k, v and their like, loaded in the type of computation,
// and what forward and backward do with them alike.
#pragma once

#include "core/feature_map.h"
#include "cpu/products.h"
#include "cpu/rows.h"
#include "encoded_rows.h"
#include "rows_ahead.h"
#include "state.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

using core::FeatureMap;

// Rows of a chunk between prefetching and loading. Those of later chunks have been asked for
// before, or will be (rows_ahead.h).
constexpr std::int64_t kAhead = 16;

// n is a multiple of the lanes.
template <class T>
TORCH_SPE_INLINE T dot(const T* a, const T* b, std::int64_t n) {
  Vec<T> sum = {};
  for (std::int64_t i = 0; i < n; i += kLanes<T>) sum += load_vec(a + i) * load_vec(b + i);
  return sum_lanes<T>(sum);
}

template <class T>
TORCH_SPE_INLINE T sum_row(const T* a, std::int64_t n) {
  const std::int64_t whole = n - n % kLanes<T>;
  Vec<T> sums = {};
  for (std::int64_t i = 0; i < whole; i += kLanes<T>) sums += load_vec(a + i);
  T sum = sum_lanes<T>(sums);
  for (std::int64_t i = whole; i < n; ++i) sum += a[i];
  return sum;
}

// Divisors below this are divided by: their reciprocals, or what these are multiplied with, might
// overflow.
template <class T>
constexpr T kSmallDivisor = sizeof(T) == 8 ? T(0x1p-900) : T(0x1p-100f);
template <class T>
constexpr T kLargeDivisor = sizeof(T) == 8 ? T(0x1p900) : T(0x1p100f);

// out = in / divisor, or 0 where that is 0; a product where the reciprocal is harmless.
template <class T, class Storage>
TORCH_SPE_INLINE void divide_row(const T* in, T divisor, std::int64_t n, Storage* out) {
  const T magnitude = divisor < 0 ? -divisor : divisor;
  if (divisor == 0) {
    for (std::int64_t i = 0; i < n; ++i) core::store(T(0), out + i);
  } else if (magnitude >= kSmallDivisor<T> && magnitude <= kLargeDivisor<T>) {
    const T reciprocal = 1 / divisor;
    for (std::int64_t i = 0; i < n; ++i) core::store(in[i] * reciprocal, out + i);
  } else {
    for (std::int64_t i = 0; i < n; ++i) core::store(in[i] / divisor, out + i);
  }
}

// A tensor [B, L, H, C] in strides, of features or values.
template <class Storage>
struct Strided {
  const Storage* data;
  const std::int64_t* strides;
  std::int64_t columns;

  Strided(const void* tensor, const std::int64_t (&tensor_strides)[4], std::int64_t size)
      : data(static_cast<const Storage*>(tensor)), strides(tensor_strides), columns(size) {}

  // Row t of a chunk. Rows of a head lie apart, which the machine's own prefetching does not
  // follow.
  TORCH_SPE_INLINE const Storage* row(const Chunk& chunk, std::int64_t t) const {
    return data + chunk.batch * strides[0] + (chunk.begin + t) * strides[1] +
           chunk.head * strides[2];
  }
  // The rows of a chunk will be read.
  void ask(const Chunk& chunk, RowsAhead& ahead) const {
    if (data != nullptr && strides[3] == 1)
      ahead.add(row(chunk, 0), strides[1], chunk.size, columns);
  }
  // Inlined always: GCC drops calls of a function that does nothing but prefetch.
  TORCH_SPE_INLINE void prefetch(const Chunk& chunk, std::int64_t t) const {
    prefetch_near(row(chunk, min_of(t + kAhead, chunk.size - 1)), strides[3], columns);
  }
};

// Row t of a chunk in a contiguous tensor [B, length, H, columns].
template <class T>
TORCH_SPE_INLINE T* contiguous_row(const LinearAttentionParams& p, T* data, std::int64_t length,
                                   std::int64_t columns, const Chunk& chunk, std::int64_t t) {
  return data + ((chunk.batch * length + chunk.begin + t) * p.num_heads + chunk.head) * columns;
}

// Columns of q and k, and of their gradients, in memory.
TORCH_SPE_INLINE std::int64_t row_features(const LinearAttentionParams& p) {
  return p.q_sines == nullptr ? p.num_realizations : p.q_sines->in_features;
}

// Rows of tiles are padded like those of a state, with zeros; those of padding keys are zero.
template <class Storage>
class AttentionTiles {
 public:
  using T = core::accumulate_t<Storage>;

  AttentionTiles(const LinearAttentionParams& p, const StateLayout<T>& layout, Decay<T>& decay)
      : p_(p),
        layout_(layout),
        decay_(decay),
        query_encoder_(p.q_sines != nullptr, p.q_sines),
        key_encoder_(p.k_sines != nullptr, p.k_sines),
        sum_(layout.denominator_width),
        row_sum_(layout.denominator_width),
        sent_(decay.per_feature() ? kChunk * layout.feature_width : 0),
        sent_values_(decay.fades() ? kChunk * layout.value_width : 0),
        sent_denominators_(decay.per_feature() ? kChunk * layout.denominator_width : 0) {}

  // A product of tiles. Meanwhile rows of the chunk that comes next are asked for.
  void multiply(std::int64_t m, std::int64_t n, std::int64_t k, const LeftFactor<T>& a, const T* b,
                std::int64_t ldb, T beta, T* c, std::int64_t ldc,
                Skip skip = Skip::kNothing) const {
    TORCH_SPE_ISA::multiply(m, n, k, a, b, ldb, beta, c, ldc, skip, ahead_);
  }
  RowsAhead& ahead() const { return ahead_; }
  // Null where rows are in memory.
  EncodedRows<Storage>* query_encoder() const { return query_encoder_.get(); }
  EncodedRows<Storage>* key_encoder() const { return key_encoder_.get(); }
  void ask_for_queries(const Chunk& chunk) const {
    Strided<Storage>(p_.q, p_.q_strides, row_features(p_)).ask(chunk, ahead_);
    Strided<Storage>(p_.denominator_q, p_.denominator_q_strides, layout_.denominator_features)
        .ask(chunk, ahead_);
  }
  void ask_for_keys(const Chunk& chunk) const {
    Strided<Storage>(p_.k, p_.k_strides, row_features(p_)).ask(chunk, ahead_);
    Strided<Storage>(p_.v, p_.v_strides, layout_.values).ask(chunk, ahead_);
    Strided<Storage>(p_.denominator_k, p_.denominator_k_strides, layout_.denominator_features)
        .ask(chunk, ahead_);
  }
  // Rows of a contiguous tensor [B, length, H, columns], or null.
  void ask_for_rows(const Chunk& chunk, void* tensor, std::int64_t length,
                    std::int64_t columns) const {
    if (tensor == nullptr) return;
    ahead_.add(contiguous_row(p_, static_cast<Storage*>(tensor), length, columns, chunk, 0),
               p_.num_heads * columns, chunk.size, columns);
  }

  // phi(q) [chunk, R], rows `ld` apart.
  void load_queries(const Chunk& chunk, T* out, std::int64_t ld) const {
    if (query_encoder() != nullptr) return load_encoded(*query_encoder(), chunk, false, out, ld);
    load_features({p_.q, p_.q_strides, layout_.features}, p_.feature_map, chunk, false, out, ld,
                  layout_.feature_width);
  }
  // phi(k) [chunk, R].
  void load_keys(const Chunk& chunk, T* out) const {
    if (key_encoder() != nullptr)
      return load_encoded(*key_encoder(), chunk, true, out, layout_.feature_width);
    load_features({p_.k, p_.k_strides, layout_.features}, p_.feature_map, chunk, true, out,
                  layout_.feature_width, layout_.feature_width);
  }
  // psi(denominator_q), psi(denominator_k) [chunk, F].
  void load_denominator_queries(const Chunk& chunk, T* out) const {
    load_features({p_.denominator_q, p_.denominator_q_strides, layout_.denominator_features},
                  p_.denominator_feature_map, chunk, false, out, layout_.denominator_width,
                  layout_.denominator_width);
  }
  void load_denominator_keys(const Chunk& chunk, T* out) const {
    load_features({p_.denominator_k, p_.denominator_k_strides, layout_.denominator_features},
                  p_.denominator_feature_map, chunk, true, out, layout_.denominator_width,
                  layout_.denominator_width);
  }
  // v [chunk, E].
  void load_values(const Chunk& chunk, T* out) const {
    const Strided<Storage> v(p_.v, p_.v_strides, layout_.values);
    for (std::int64_t t = 0; t < chunk.size; ++t) {
      T* row = out + t * layout_.value_width;
      if (is_padding(p_, chunk, t)) {
        set_zero(row, layout_.value_width);
        continue;
      }
      v.prefetch(chunk, t);
      load_row(v.row(chunk, t), v.strides[3], v.columns, row);
      set_zero(row + v.columns, layout_.value_width - v.columns);
    }
  }

  // Joins a state that goes one way with the sums over a chunk of tokens that the decay is loaded
  // for: S += x^T y, z += the sum of weights x, or of weights own_x where that is not null. Weights
  // that are null are 1.
  void add_to_state(Way way, std::int64_t size, const T* x, const T* y, const T* own_x,
                    const T* weights, T* state) const {
    const Passage<T> passage = decay_.passage();
    // Where features fade alike, their factors are those of rows of y, and S is carried on its way
    // through the product.
    T carried = 1;
    if (decay_.per_feature()) {
      core::carry(passage, layout_.view(state));
      x = decay_.send(way, size, x, layout_.feature_width, sent_);
      if (own_x != nullptr)
        own_x = decay_.send(way, size, own_x, layout_.denominator_width, sent_denominators_);
    } else {
      carried = core::carry(passage, 0, T(1));
      y = decay_.send(way, size, y, layout_.value_width, sent_values_);
    }
    multiply(layout_.features, layout_.value_width, size, transposed(x, layout_.feature_width), y,
             layout_.value_width, carried, state, layout_.value_width);
    const T* const of_z = own_x == nullptr ? x : own_x;
    const T* const factors = decay_.sent_column(way);
    const std::int64_t width = layout_.denominator_width;
    set_zero(sum_.get(), width);
    for (std::int64_t t = 0; t < size; ++t) {
      const T weight =
          (weights == nullptr ? T(1) : weights[t]) * (factors == nullptr ? T(1) : factors[t]);
      for (std::int64_t f = 0; f < width; ++f) sum_[f] += weight * of_z[t * width + f];
    }
    T* const z = state + layout_.z_offset();
    for (std::int64_t f = 0; f < width; ++f) z[f] = carried * z[f] + sum_[f];
  }

  // The same for keys; where the denominator has no features of its own, denominator_keys is keys.
  void add_keys(Way way, std::int64_t size, const T* keys, const T* values,
                const T* denominator_keys, T* state) const {
    add_to_state(way, size, keys, values, denominator_keys == keys ? nullptr : denominator_keys,
                 nullptr, state);
  }

  // The sums over a segment of keys. The tiles are scratch memory.
  void sum_keys(Way way, const Segment& segment, T* keys, T* values, T* denominator_keys,
                T* state) const {
    core::set_zero(layout_.view(state));
    const std::int64_t chunks = segment.chunks();
    for (std::int64_t i = 0; i < chunks; ++i) {
      const Chunk chunk = segment.chunk(way == Way::kToEnd ? i : chunks - 1 - i);
      ahead_.start();
      if (i + 1 < chunks) ask_for_keys(segment.chunk(way == Way::kToEnd ? i + 1 : chunks - 2 - i));
      decay_.load(chunk);
      load_keys(chunk, keys);
      load_values(chunk, values);
      if (denominator_keys != keys) load_denominator_keys(chunk, denominator_keys);
      add_keys(way, chunk.size, keys, values, denominator_keys, state);
    }
  }

  // denominators[t] = psi(dq_t) . z_t + eps, z_t being z (or null) plus, when causal, the keys up
  // to t. Queries lie `ld` apart.
  void denominators(std::int64_t size, const T* queries, std::int64_t ld, const T* keys, const T* z,
                    T* out) const {
    const std::int64_t width = layout_.denominator_width;
    if (decay_.fades()) return fading_denominators(size, queries, ld, keys, z, out);
    set_zero(sum_.get(), width);
    for (std::int64_t t = 0; t < size; ++t) {
      const T* q = queries + t * ld;
      Vec<T> products = {};
      for (std::int64_t f = 0; f < width; f += kLanes<T>) {
        Vec<T> weight = load_vec(sum_ + f);
        if (p_.causal) {
          weight += load_vec(keys + t * width + f);
          store_vec(sum_ + f, weight);
        }
        if (z != nullptr) weight += load_vec(z + f);
        products += load_vec(q + f) * weight;
      }
      out[t] = sum_lanes<T>(products) + static_cast<T>(p_.eps);
    }
  }

  static void keep_lower_triangle(std::int64_t size, T* weights, std::int64_t ld) {
    for (std::int64_t t = 0; t < size; ++t) set_zero(weights + t * ld + t + 1, size - t - 1);
  }

  // Adds what keys after each query give, and the z (or null) of those after the chunk.
  void add_later_denominators(std::int64_t size, const T* queries, std::int64_t ld, const T* keys,
                              const T* z, T* out) const {
    const std::int64_t width = layout_.denominator_width, stride = decay_.stride();
    set_zero(sum_.get(), width);
    for (std::int64_t t = size - 1; t >= 0; --t) {
      const T *const to_end = decay_.to_end(t), *const step = decay_.step(t);
      for (std::int64_t f = 0; f < width; ++f) {
        const T weight = z == nullptr ? sum_[f] : sum_[f] + to_end[f * stride] * z[f];
        sum_[f] = (sum_[f] + keys[t * width + f]) * step[f * stride];
        row_sum_[f] = weight;
      }
      out[t] += dot<T>(queries + t * ld, row_sum_, width);
    }
  }

 private:
  void fading_denominators(std::int64_t size, const T* queries, std::int64_t ld, const T* keys,
                           const T* z, T* out) const {
    const std::int64_t width = layout_.denominator_width, stride = decay_.stride();
    set_zero(sum_.get(), width);
    for (std::int64_t t = 0; t < size; ++t) {
      const T *const from_start = decay_.from_start(t), *const step = decay_.step(t);
      for (std::int64_t f = 0; f < width; ++f) {
        sum_[f] = sum_[f] * step[f * stride] + keys[t * width + f];
        row_sum_[f] = z == nullptr ? sum_[f] : sum_[f] + from_start[f * stride] * z[f];
      }
      out[t] = dot<T>(queries + t * ld, row_sum_, width) + static_cast<T>(p_.eps);
    }
  }

  void load_features(const Strided<Storage>& x, FeatureMap feature_map, const Chunk& chunk,
                     bool are_keys, T* out, std::int64_t ld, std::int64_t width) const {
    with_feature_map(feature_map, [&](auto map) {
      for (std::int64_t t = 0; t < chunk.size; ++t) {
        T* row = out + t * ld;
        if (are_keys && is_padding(p_, chunk, t)) {
          set_zero(row, width);
          continue;
        }
        x.prefetch(chunk, t);
        load_mapped_row<map.value>(x.row(chunk, t), x.strides[3], x.columns, row);
        set_zero(row + x.columns, width - x.columns);
      }
    });
  }

  // The same of rows that sines encode.
  void load_encoded(EncodedRows<Storage>& encoder, const Chunk& chunk, bool are_keys, T* out,
                    std::int64_t ld) const {
    encoder.encode(chunk, out, ld);
    with_feature_map(p_.feature_map, [&](auto map) {
      for (std::int64_t t = 0; t < chunk.size; ++t) {
        T* row = out + t * ld;
        if (are_keys && is_padding(p_, chunk, t))
          set_zero(row, layout_.features);
        else if (map.value != FeatureMap::kIdentity)
          load_mapped_row<map.value>(row, 1, layout_.features, row);
        set_zero(row + layout_.features, layout_.feature_width - layout_.features);
      }
    });
  }

  const LinearAttentionParams& p_;
  const StateLayout<T>& layout_;
  Decay<T>& decay_;
  const Maybe<EncodedRows<Storage>> query_encoder_, key_encoder_;
  mutable RowsAhead ahead_;     // no part of any result
  Workspace<T> sum_, row_sum_;  // [F]
  // Times factors of a decay.
  Workspace<T> sent_, sent_values_, sent_denominators_;  // [chunk, R], [chunk, E] and [chunk, F]
};

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
