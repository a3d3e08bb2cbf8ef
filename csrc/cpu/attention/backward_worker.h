// The backward pass of linear attention over segments and chunks: whole kernels, for one thread.
#pragma once

#include "row_norm.h"
#include "tiles.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

using core::LinearAttentionBackwardParams;

// The tiles and scratch memory of one thread.
template <class Storage>
class BackwardWorker {
 public:
  using T = core::accumulate_t<Storage>;

  BackwardWorker(const LinearAttentionBackwardParams& p, const StateLayout<T>& layout)
      : p_(p),
        layout_(layout),
        tiles_(p, layout),
        own_(has_own_denominator(p)),
        shares_features_(p.normalize && !own_),
        chunks_(p.causal ? min_of(kSegment, round_up(p.query_length, kChunk)) / kChunk : 1),
        queries_(kChunk * layout.feature_width),
        keys_(chunks_ * kChunk * layout.feature_width),
        values_(chunks_ * kChunk * layout.value_width),
        own_queries_(own_ ? kChunk * layout.denominator_width : 0),
        own_keys_(own_ ? chunks_ * kChunk * layout.denominator_width : 0),
        grads_(kChunk * layout.value_width),
        grad_denominators_(kChunk),
        query_scales_(kChunk),
        weights_(p.causal ? kChunk * kChunk : 0),
        out_(kChunk *
             max_of(max_of(layout.feature_width, layout.value_width), layout.denominator_width)),
        row_(max_of(layout.value_width, layout.denominator_width)),
        states_(p.causal ? chunks_ * layout.size() : 0),
        local_(layout.size()),
        grad_state_(layout.size()) {}

  void sum_keys(const Segment& segment, T* state) const {
    tiles_.sum_keys(segment, keys_, values_, denominator_keys(0), state);
  }

  // The part of the gradient of the state before a segment that its own queries have.
  void sum_queries(const Segment& segment, T* grad_state) const {
    core::set_zero(layout_.view(grad_state));
    for (std::int64_t i = segment.chunks() - 1; i >= 0; --i) {
      const Chunk chunk = segment.chunk(i);
      load_queries(chunk);
      add_queries(chunk.size, grad_state);
    }
  }

  // The gradients of a segment that starts with the state `start`, or none, and whose last state
  // has the gradient `grad_end`, or none. The gradient of its first state goes to `grad_start`,
  // unless null, which may be `grad_end`.
  void causal_segment(const Segment& segment, const T* start, const T* grad_end,
                      T* grad_start) const {
    load_segment(segment, start);
    core::set_zero(layout_.view(local_.get()));
    const std::int64_t chunks = segment.chunks();
    for (std::int64_t i = chunks - 1; i >= 0; --i) {
      const Chunk chunk = segment.chunk(i);
      const T* future = nullptr;
      if (grad_end != nullptr || i + 1 < chunks) {
        layout_.join(segment.size - i * kChunk - chunk.size, grad_end, local_, grad_state_);
        future = grad_state_;
      }
      load_queries(chunk);
      causal_chunk(chunk, i, start != nullptr || i > 0 ? states_ + i * layout_.size() : nullptr,
                   future);
      if (grad_start != nullptr || i > 0) add_queries(chunk.size, local_);
    }
    if (grad_start != nullptr) layout_.join(segment.size, grad_end, local_, grad_start);
  }

  // Without an order: the gradients of queries whose keys are all in `state`, and the part of the
  // gradient of that state that they have.
  void query_segment(const Segment& segment, const T* state, T* grad_state) const {
    core::set_zero(layout_.view(grad_state));
    for (std::int64_t i = 0; i < segment.chunks(); ++i) {
      const Chunk chunk = segment.chunk(i);
      load_queries(chunk);
      if (p_.grad_q != nullptr) {
        add_query_gradient(chunk.size, state, T(0));
        store_query_gradient(chunk);
      }
      if (p_.grad_denominator_q != nullptr) own_query_gradient(chunk, nullptr, state);
      add_queries(chunk.size, grad_state);
    }
  }

  // Without an order: the gradients of keys, given that of the state that all are in.
  void key_segment(const Segment& segment, const T* grad_state) const {
    for (std::int64_t i = 0; i < segment.chunks(); ++i) {
      const Chunk chunk = segment.chunk(i);
      tiles_.load_keys(chunk, keys_);
      tiles_.load_values(chunk, values_);
      if (p_.grad_k != nullptr) {
        add_key_gradient(chunk.size, values_, grad_state, T(0));
        store_key_gradient(chunk, keys_);
      }
      if (p_.grad_v != nullptr) {
        gemm(Op::kPlain, Op::kPlain, chunk.size, layout_.values, layout_.features, keys_,
             layout_.feature_width, grad_state, layout_.value_width, T(0), out_,
             layout_.value_width);
        store_value_gradient(chunk);
      }
      if (p_.grad_denominator_k != nullptr) {
        tiles_.load_denominator_keys(chunk, own_keys_);
        own_key_gradient(chunk, own_keys_, grad_state);
      }
    }
  }

 private:
  T* denominator_keys(std::int64_t token) const {
    return own_ ? own_keys_ + token * layout_.denominator_width
                : keys_ + token * layout_.feature_width;
  }

  // The queries of a chunk, and what its outputs' gradients leave: the gradients of the numerators
  // and of the denominators. Rows with a query scale have queries times that, the rest through it.
  void load_queries(const Chunk& chunk) const {
    tiles_.load_queries(chunk, queries_, layout_.feature_width);
    if (own_) tiles_.load_denominator_queries(chunk, own_queries_);
    const Strided<Storage> grad_out(p_.grad_out, p_.grad_out_strides, layout_.values);
    const Strided<Storage> result(p_.result, p_.result_strides, layout_.values);
    const std::int64_t width = layout_.value_width;
    set_zero(row_.get(), width);
    for (std::int64_t t = 0; t < chunk.size; ++t) {
      T* grad = grads_ + t * width;
      grad_out.prefetch(chunk, t);
      load_row(grad_out.row(chunk, t), grad_out.strides[3], layout_.values, grad);
      set_zero(grad + layout_.values, width - layout_.values);
      grad_denominators_[t] = 0;
      query_scales_[t] = 1;
      if (!divides_rows(p_)) continue;
      result.prefetch(chunk, t);
      load_row(result.row(chunk, t), result.strides[3], layout_.values, row_.get());
      const T divisor = *contiguous_row(p_, static_cast<const T*>(p_.saved_row_divisor),
                                        p_.query_length, 1, chunk, t);
      const T scale = query_scale_of(divisor);
      grad_denominators_[t] = divide_gradient<T>(p_, row_, divisor, scale, width, grad);
      if (scale == 1) continue;
      query_scales_[t] = scale;
      for (std::int64_t r = 0; r < layout_.features; ++r)
        queries_[t * layout_.feature_width + r] *= scale;
      if (!own_) continue;
      for (std::int64_t f = 0; f < layout_.denominator_features; ++f)
        own_queries_[t * layout_.denominator_width + f] *= scale;
    }
  }

  // Joins the gradient of a state with the sums over a chunk of queries: S += queries^T grads, z +=
  // the sum of grad_denominators psi(dq).
  void add_queries(std::int64_t size, T* grad_state) const {
    core::carry(Passage{size}, layout_.view(grad_state));
    gemm(Op::kTransposed, Op::kPlain, layout_.features, layout_.values, size, queries_,
         layout_.feature_width, grads_, layout_.value_width, T(1), grad_state, layout_.value_width);
    if (!p_.normalize) return;
    const std::int64_t width = layout_.denominator_width;
    const T* queries = own_ ? own_queries_ : queries_;
    T* grad_z = grad_state + layout_.z_offset();
    for (std::int64_t t = 0; t < size; ++t) {
      for (std::int64_t f = 0; f < width; ++f)
        grad_z[f] += grad_denominators_[t] * queries[t * width + f];
    }
  }

  // Keys, values and, where gradients of queries are wanted, the states before each chunk.
  void load_segment(const Segment& segment, const T* start) const {
    const bool wants_states = p_.grad_q != nullptr || p_.grad_denominator_q != nullptr;
    core::set_zero(layout_.view(local_.get()));
    for (std::int64_t i = 0; i < segment.chunks(); ++i) {
      const Chunk chunk = segment.chunk(i);
      const std::int64_t n = i * kChunk;
      T *keys = keys_ + n * layout_.feature_width, *values = values_ + n * layout_.value_width;
      tiles_.load_keys(chunk, keys);
      tiles_.load_values(chunk, values);
      if (own_) tiles_.load_denominator_keys(chunk, denominator_keys(n));
      if (!wants_states) continue;
      layout_.join(n, start, local_, states_ + i * layout_.size());
      if (chunk.rest > chunk.size)
        tiles_.add_keys(chunk.size, keys, values, denominator_keys(n), local_);
    }
  }

  // The gradients of chunk i of a segment, given the state before it and the gradient of the state
  // after it, or none.
  void causal_chunk(const Chunk& chunk, std::int64_t i, const T* past, const T* future) const {
    const std::int64_t n = i * kChunk, size = chunk.size;
    const std::int64_t rw = layout_.feature_width, vw = layout_.value_width;
    const T *keys = keys_ + n * rw, *values = values_ + n * vw;
    if (p_.grad_q != nullptr || p_.grad_k != nullptr) {
      gemm(Op::kPlain, Op::kTransposed, size, size, layout_.values, grads_, vw, values, vw, T(0),
           weights_, kChunk);
      if (shares_features_) {
        for (std::int64_t t = 0; t < size; ++t) {
          for (std::int64_t m = 0; m < size; ++m) weights_[t * kChunk + m] += grad_denominators_[t];
        }
      }
      tiles_.keep_lower_triangle(size, weights_, kChunk);
    }
    if (p_.grad_q != nullptr) {
      gemm(Op::kPlain, Op::kPlain, size, layout_.features, size, weights_, kChunk, keys, rw, T(0),
           out_, rw);
      if (past != nullptr) add_query_gradient(size, past, T(1));
      store_query_gradient(chunk);
    }
    if (p_.grad_k != nullptr) {
      gemm(Op::kTransposed, Op::kPlain, size, layout_.features, size, weights_, kChunk, queries_,
           rw, T(0), out_, rw);
      if (future != nullptr) add_key_gradient(size, values, future, T(1));
      store_key_gradient(chunk, keys);
    }
    if (p_.grad_v != nullptr) {
      gemm(Op::kPlain, Op::kTransposed, size, size, layout_.features, queries_, rw, keys, rw, T(0),
           weights_, kChunk);
      tiles_.keep_lower_triangle(size, weights_, kChunk);
      gemm(Op::kTransposed, Op::kPlain, size, layout_.values, size, weights_, kChunk, grads_, vw,
           T(0), out_, vw);
      if (future != nullptr) {
        gemm(Op::kPlain, Op::kPlain, size, layout_.values, layout_.features, keys, rw, future, vw,
             T(1), out_, vw);
      }
      store_value_gradient(chunk);
    }
    if (p_.grad_denominator_q != nullptr) own_query_gradient(chunk, denominator_keys(n), past);
    if (p_.grad_denominator_k != nullptr) own_key_gradient(chunk, denominator_keys(n), future);
  }

  // out = beta out + grads S^T, and grad_denominators z where the denominator has these features.
  void add_query_gradient(std::int64_t size, const T* state, T beta) const {
    gemm(Op::kPlain, Op::kTransposed, size, layout_.features, layout_.values, grads_,
         layout_.value_width, state, layout_.value_width, beta, out_, layout_.feature_width);
    if (!shares_features_) return;
    const T* z = state + layout_.z_offset();
    for (std::int64_t t = 0; t < size; ++t) {
      T* row = out_ + t * layout_.feature_width;
      for (std::int64_t r = 0; r < layout_.features; ++r) row[r] += grad_denominators_[t] * z[r];
    }
  }
  // out = beta out + values grad_S^T, and grad_z where the denominator has these features.
  void add_key_gradient(std::int64_t size, const T* values, const T* grad_state, T beta) const {
    gemm(Op::kPlain, Op::kTransposed, size, layout_.features, layout_.values, values,
         layout_.value_width, grad_state, layout_.value_width, beta, out_, layout_.feature_width);
    if (own_) return;
    const T* grad_z = grad_state + layout_.z_offset();
    for (std::int64_t t = 0; t < size; ++t) {
      T* row = out_ + t * layout_.feature_width;
      for (std::int64_t r = 0; r < layout_.features; ++r) row[r] += grad_z[r];
    }
  }

  // The gradients of the denominator's own queries: grad_denominator_t z_t, z_t being that of
  // `state` (or none) plus the keys up to t (or none).
  void own_query_gradient(const Chunk& chunk, const T* keys, const T* state) const {
    const std::int64_t width = layout_.denominator_width;
    set_zero(row_.get(), width);
    for (std::int64_t t = 0; t < chunk.size; ++t) {
      T* row = out_ + t * width;
      const T* z = state == nullptr ? nullptr : state + layout_.z_offset();
      for (std::int64_t f = 0; f < width; ++f) {
        if (keys != nullptr) row_[f] += keys[t * width + f];
        row[f] = grad_denominators_[t] * (z == nullptr ? row_[f] : row_[f] + z[f]);
      }
    }
    store_features(chunk, p_.denominator_feature_map, layout_.denominator_features, width,
                   own_queries_, p_.query_length, false, p_.grad_denominator_q);
  }
  // Those of its keys: the gradient of z in `grad_state` (or none) plus, when causal, that of the
  // queries from t on.
  void own_key_gradient(const Chunk& chunk, const T* keys, const T* grad_state) const {
    const std::int64_t width = layout_.denominator_width;
    set_zero(row_.get(), width);
    const T* grad_z = grad_state == nullptr ? nullptr : grad_state + layout_.z_offset();
    for (std::int64_t t = chunk.size - 1; t >= 0; --t) {
      T* row = out_ + t * width;
      for (std::int64_t f = 0; f < width; ++f) {
        if (p_.causal) row_[f] += grad_denominators_[t] * own_queries_[t * width + f];
        row[f] = grad_z == nullptr ? row_[f] : row_[f] + grad_z[f];
      }
    }
    store_features(chunk, p_.denominator_feature_map, layout_.denominator_features, width, keys,
                   p_.key_length, true, p_.grad_denominator_k);
  }

  void store_query_gradient(const Chunk& chunk) const {
    store_features(chunk, p_.feature_map, layout_.features, layout_.feature_width, queries_,
                   p_.query_length, false, p_.grad_q);
  }
  void store_key_gradient(const Chunk& chunk, const T* keys) const {
    store_features(chunk, p_.feature_map, layout_.features, layout_.feature_width, keys,
                   p_.key_length, true, p_.grad_k);
  }
  // Stores the rows of out_ times the derivative of the feature map, given the tile of features;
  // queries and their gradients leave their scale behind.
  void store_features(const Chunk& chunk, FeatureMap feature_map, std::int64_t columns,
                      std::int64_t width, const T* features, std::int64_t length, bool are_keys,
                      void* grad) const {
    with_feature_map(feature_map, [&](auto map) {
      for (std::int64_t t = 0; t < chunk.size; ++t) {
        T* row = out_ + t * width;
        if (are_keys && is_padding(p_, chunk, t)) set_zero(row, columns);
        const T* phi = features + t * width;
        const T scale = are_keys ? T(1) : query_scales_[t], inverse = 1 / scale;
        Storage* to = contiguous_row(p_, static_cast<Storage*>(grad), length, columns, chunk, t);
        for (std::int64_t c = 0; c < columns; ++c) {
          core::store(scale * row[c] * core::feature_map_derivative<map.value>(inverse * phi[c]),
                      to + c);
        }
      }
    });
  }
  void store_value_gradient(const Chunk& chunk) const {
    for (std::int64_t t = 0; t < chunk.size; ++t) {
      T* row = out_ + t * layout_.value_width;
      if (is_padding(p_, chunk, t)) set_zero(row, layout_.values);
      store_row(row, 1, layout_.values,
                contiguous_row(p_, static_cast<Storage*>(p_.grad_v), p_.key_length, layout_.values,
                               chunk, t));
    }
  }

  const LinearAttentionBackwardParams& p_;
  const StateLayout<T>& layout_;
  const AttentionTiles<Storage> tiles_;
  const bool own_;              // the denominator has features of its own
  const bool shares_features_;  // there is a denominator, of the features of the numerator
  const std::int64_t chunks_;
  Workspace<T> queries_;            // [chunk, R]
  Workspace<T> keys_;               // [chunks, chunk, R]
  Workspace<T> values_;             // [chunks, chunk, E]
  Workspace<T> own_queries_;        // [chunk, F], of the denominator
  Workspace<T> own_keys_;           // [chunks, chunk, F], of the denominator
  Workspace<T> grads_;              // [chunk, E]
  Workspace<T> grad_denominators_;  // [chunk]
  Workspace<T> query_scales_;       // [chunk]
  Workspace<T> weights_;            // [chunk, chunk]
  Workspace<T> out_;                // [chunk, R], [chunk, E] or [chunk, F]
  Workspace<T> row_;                // [E] or [F]
  Workspace<T> states_;             // [chunks], states
  Workspace<T> local_;              // state, or its gradient, of the segment alone
  Workspace<T> grad_state_;
};

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
