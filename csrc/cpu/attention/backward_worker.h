// The backward pass of linear attention over segments and chunks: whole kernels, for one thread.
#pragma once

#include "fading_gradients.h"
#include "row_norm.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

// The states, or none, around a segment: what its tokens see, and the gradients of what they leave.
template <class T>
struct SegmentContext {
  const T* start;     // of the keys before it
  const T* grad_end;  // the gradient of the state of the keys up to its end
  T* grad_start;      // where that of `start` goes, unless null; may be grad_end
  // Where keys after a query fade as well.
  const T* after;        // of the keys after it
  const T* grad_before;  // the gradient, from the queries before it, of the state from its start on
  double* step_sums;     // [columns], for gradients of a constant decay, or null
};

// The tiles and scratch memory of one thread.
template <class Storage>
class BackwardWorker {
 public:
  using T = core::accumulate_t<Storage>;

  BackwardWorker(const LinearAttentionBackwardParams& p, const StateLayout<T>& layout,
                 Decay<T>& decay, const SumsOfEncoders<T>& sums)
      : p_(p),
        layout_(layout),
        decay_(decay),
        tiles_(p, layout, decay),
        query_gradients_(p.grad_q_sines != nullptr, tiles_.query_encoder(), p.grad_q_sines,
                         sums.queries()),
        key_gradients_(p.grad_k_sines != nullptr, tiles_.key_encoder(), p.grad_k_sines,
                       sums.keys()),
        own_(p.has_own_denominator),
        shares_features_(p.normalize && !own_),
        is_ordered_(p.causal || decay.fades()),
        both_ways_(decay.fades() && !p.causal && p.query_length > 0),
        fading_(p, layout, decay, tiles_.ahead(), shares_features_),
        chunk_(chunk_size(p)),
        chunks_(is_ordered_ ? min_of(kChunksOfSegment, (p.key_length + chunk_ - 1) / chunk_) : 1),
        queries_(chunk_ * layout.feature_width),
        keys_(chunks_ * chunk_ * layout.feature_width),
        values_(chunks_ * chunk_ * layout.value_width),
        own_queries_(own_ ? chunk_ * layout.denominator_width : 0),
        own_keys_(own_ ? chunks_ * chunk_ * layout.denominator_width : 0),
        grads_(chunk_ * layout.value_width),
        grad_denominators_(chunk_),
        query_scales_(chunk_),
        weights_(is_ordered_ ? chunk_ * chunk_ : 0),
        columns_(max_of(layout.feature_width, layout.value_width) * chunk_),
        state_columns_(layout.value_width * layout.feature_width),
        out_(chunk_ *
             max_of(max_of(layout.feature_width, layout.value_width), layout.denominator_width)),
        row_(max_of(layout.value_width, layout.denominator_width)),
        states_(is_ordered_ ? chunks_ * layout.size() : 0),
        query_states_(both_ways_ ? chunks_ * layout.size() : 0),
        local_(layout.size()),
        grad_state_(layout.size()),
        later_(both_ways_ ? layout.size() : 0),
        grad_queries_(decay.fades() ? chunk_ * layout.feature_width : 0),
        grad_keys_(decay.fades() ? chunk_ * layout.feature_width : 0),
        grad_values_(decay.fades() ? chunk_ * layout.value_width : 0),
        grad_own_queries_(decay.fades() ? own_queries_size() : 0),
        grad_own_keys_(decay.fades() ? own_queries_size() : 0) {}

  void sum_keys(Way way, const Segment& segment, T* state) const {
    tiles_.sum_keys(way, segment, keys_, values_, denominator_keys(0), state);
  }

  // The part of the gradient of a state before a segment, or after it, that its own queries have.
  void sum_queries(Way way, const Segment& segment, T* grad_state) const {
    core::set_zero(layout_.view(grad_state));
    const std::int64_t chunks = segment.chunks();
    for (std::int64_t i = 0; i < chunks; ++i) {
      const Chunk chunk = segment.chunk(way == Way::kToEnd ? i : chunks - 1 - i);
      tiles_.ahead().start();
      if (i + 1 < chunks)
        ask_for_queries(segment.chunk(way == Way::kToEnd ? i + 1 : chunks - 2 - i));
      decay_.load(chunk);
      load_queries(chunk);
      add_queries(way, chunk.size, grad_state);
    }
  }

  // The gradients of a segment whose queries see the keys in order.
  void ordered_segment(const Segment& segment, const SegmentContext<T>& context) const {
    load_segment(segment, context);
    core::set_zero(layout_.view(local_.get()));
    const std::int64_t chunks = segment.chunks();
    bool has_later = context.after != nullptr;
    if (both_ways_) layout_.copy(context.after, later_);
    decay_.reset();
    for (std::int64_t i = chunks - 1; i >= 0; --i) {
      const Chunk chunk = segment.chunk(i);
      const T* future = nullptr;
      if (context.grad_end != nullptr || i + 1 < chunks) {
        layout_.join(decay_.passed(), context.grad_end, local_, grad_state_);
        future = grad_state_;
      }
      tiles_.ahead().start();
      if (i > 0) {
        const Chunk next = segment.chunk(i - 1);
        ask_for_queries(next);
        ask_for_gradients(next);
      }
      decay_.load(chunk);
      load_queries(chunk);
      const T* past = context.start != nullptr || i > 0 ? states_ + i * layout_.size() : nullptr;
      if (decay_.fades()) {
        const bool has_before = both_ways_ && (context.grad_before != nullptr || i > 0);
        fading_chunk(chunk, i, past, future,
                     has_before ? query_states_ + i * layout_.size() : nullptr,
                     both_ways_ && has_later ? later_.get() : nullptr, context.step_sums);
      } else {
        causal_chunk(chunk, i, past, future);
      }
      if (context.grad_start != nullptr || i > 0) add_queries(Way::kToStart, chunk.size, local_);
      if (both_ways_ && i > 0) {
        const std::int64_t n = i * chunk_;
        tiles_.add_keys(Way::kToStart, chunk.size, keys_ + n * layout_.feature_width,
                        values_ + n * layout_.value_width, denominator_keys(n), later_);
        has_later = true;
      }
      decay_.pass();
    }
    if (context.grad_start != nullptr)
      layout_.join(decay_.over(segment), context.grad_end, local_, context.grad_start);
  }

  // Without an order: the gradients of queries whose keys are all in `state`, and the part of the
  // gradient of that state that they have.
  void query_segment(const Segment& segment, const T* state, T* grad_state) const {
    core::set_zero(layout_.view(grad_state));
    if (p_.grad_q != nullptr) transpose_state(state);
    for (std::int64_t i = 0; i < segment.chunks(); ++i) {
      const Chunk chunk = segment.chunk(i);
      tiles_.ahead().start();
      if (const Chunk next = segment.next(chunk); next.size > 0) {
        ask_for_queries(next);
        tiles_.ask_for_rows(next, p_.grad_q, p_.query_length, row_features(p_));
      }
      load_queries(chunk);
      if (p_.grad_q != nullptr) {
        add_query_gradient(chunk.size, state, T(0));
        store_query_gradient(chunk, out_);
      }
      if (p_.grad_denominator_q != nullptr) own_query_gradient(chunk, nullptr, state);
      add_queries(Way::kToStart, chunk.size, grad_state);
    }
  }

  // Without an order: the gradients of keys, given that of the state that all are in.
  void key_segment(const Segment& segment, const T* grad_state) const {
    if (p_.grad_k != nullptr) transpose_state(grad_state);
    for (std::int64_t i = 0; i < segment.chunks(); ++i) {
      const Chunk chunk = segment.chunk(i);
      tiles_.ahead().start();
      if (const Chunk next = segment.next(chunk); next.size > 0) {
        tiles_.ask_for_keys(next);
        tiles_.ask_for_rows(next, p_.grad_k, p_.key_length, row_features(p_));
        tiles_.ask_for_rows(next, p_.grad_v, p_.key_length, layout_.values);
      }
      tiles_.load_keys(chunk, keys_);
      tiles_.load_values(chunk, values_);
      if (p_.grad_k != nullptr) {
        add_key_gradient(chunk.size, values_, grad_state, T(0));
        store_key_gradient(chunk, keys_, out_);
      }
      if (p_.grad_v != nullptr) {
        tiles_.multiply(chunk.size, layout_.value_width, layout_.features,
                        plain<T>(keys_, layout_.feature_width), grad_state, layout_.value_width,
                        T(0), out_.get(), layout_.value_width);
        store_value_gradient(chunk, out_);
      }
      if (p_.grad_denominator_k != nullptr) {
        tiles_.load_denominator_keys(chunk, own_keys_);
        own_key_gradient(chunk, own_keys_, grad_state);
      }
    }
  }

 private:
  std::int64_t own_queries_size() const { return own_ ? chunk_ * layout_.denominator_width : 0; }
  bool wants_steps() const { return p_.grad_log_decay != nullptr; }

  T* denominator_keys(std::int64_t token) const {
    return own_ ? own_keys_ + token * layout_.denominator_width
                : keys_ + token * layout_.feature_width;
  }

  // What load_queries reads.
  void ask_for_queries(const Chunk& chunk) const {
    if (p_.query_length == 0) return;
    tiles_.ask_for_queries(chunk);
    Strided<Storage>(p_.grad_out, p_.grad_out_strides, layout_.values).ask(chunk, tiles_.ahead());
    if (divides_rows(p_))
      Strided<Storage>(p_.result, p_.result_strides, layout_.values).ask(chunk, tiles_.ahead());
  }
  // What is written where queries see the keys in order.
  void ask_for_gradients(const Chunk& chunk) const {
    if (p_.query_length > 0)
      tiles_.ask_for_rows(chunk, p_.grad_q, p_.query_length, row_features(p_));
    tiles_.ask_for_rows(chunk, p_.grad_k, p_.key_length, row_features(p_));
    tiles_.ask_for_rows(chunk, p_.grad_v, p_.key_length, layout_.values);
  }

  // The queries of a chunk, and what its outputs' gradients leave: the gradients of the numerators
  // and of the denominators. Rows with a query scale have queries times that, the rest through it.
  void load_queries(const Chunk& chunk) const {
    if (p_.query_length == 0) return load_no_queries(chunk.size);
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

  // For the state of keys alone.
  void load_no_queries(std::int64_t size) const {
    set_zero(queries_.get(), size * layout_.feature_width);
    set_zero(grads_.get(), size * layout_.value_width);
    if (own_) set_zero(own_queries_.get(), size * layout_.denominator_width);
    set_zero(grad_denominators_.get(), size);
    for (std::int64_t t = 0; t < size; ++t) query_scales_[t] = 1;
  }

  // Joins the gradient of a state with the sums over a chunk of queries: S += queries^T grads, z +=
  // the sum of grad_denominators psi(dq).
  void add_queries(Way way, std::int64_t size, T* grad_state) const {
    tiles_.add_to_state(way, size, queries_, grads_, own_ ? own_queries_.get() : nullptr,
                        grad_denominators_, grad_state);
  }

  // Keys, values and, where gradients need them, the states before each chunk.
  void load_segment(const Segment& segment, const SegmentContext<T>& context) const {
    const bool wants_states =
        p_.grad_q != nullptr || p_.grad_denominator_q != nullptr || wants_steps();
    core::set_zero(layout_.view(local_.get()));
    decay_.reset();
    for (std::int64_t i = 0; i < segment.chunks(); ++i) {
      const Chunk chunk = segment.chunk(i);
      const std::int64_t n = i * chunk_;
      T *keys = keys_ + n * layout_.feature_width, *values = values_ + n * layout_.value_width;
      tiles_.ahead().start();
      if (const Chunk next = segment.next(chunk); next.size > 0) {
        tiles_.ask_for_keys(next);
      } else {
        ask_for_queries(chunk);
        ask_for_gradients(chunk);
      }
      tiles_.load_keys(chunk, keys);
      tiles_.load_values(chunk, values);
      if (own_) tiles_.load_denominator_keys(chunk, denominator_keys(n));
      decay_.load(chunk);
      if (both_ways_) {
        T* const state = query_states_ + i * layout_.size();
        if (i == 0) layout_.copy(context.grad_before, state);
        if (chunk.rest > chunk.size) {
          layout_.copy(state, state + layout_.size());
          load_queries(chunk);
          add_queries(Way::kToEnd, chunk.size, state + layout_.size());
        }
      }
      if (!wants_states) continue;
      layout_.join(decay_.passed(), context.start, local_, states_ + i * layout_.size());
      if (chunk.rest > chunk.size)
        tiles_.add_keys(Way::kToEnd, chunk.size, keys, values, denominator_keys(n), local_);
      decay_.pass();
    }
  }

  // The same as causal_chunk where attention fades, before a query and, given the states on the
  // other side, after it: the gradient, from the queries before the chunk, of the state that
  // reaches back from its start, and the state of the keys after it.
  void fading_chunk(const Chunk& chunk, std::int64_t i, const T* past, const T* future,
                    const T* grad_before, const T* after, double* step_sums) const {
    const std::int64_t n = i * chunk_, size = chunk.size;
    const std::int64_t rw = layout_.feature_width, vw = layout_.value_width;
    const bool wants_queries = p_.grad_q != nullptr || wants_steps();
    const bool wants_keys = p_.grad_k != nullptr || wants_steps();
    const bool wants_values = p_.grad_v != nullptr;
    const FadingTokens<T> queries{queries_, grads_, grad_denominators_,
                                  wants_queries ? grad_queries_.get() : nullptr, nullptr};
    const FadingTokens<T> keys{keys_ + n * rw, values_ + n * vw, nullptr,
                               wants_keys ? grad_keys_.get() : nullptr,
                               wants_values ? grad_values_.get() : nullptr};
    fading_.clear();
    fading_.add_pairs(size, true, queries, keys, past, future);
    if (both_ways_) fading_.add_pairs(size, false, keys, queries, grad_before, after);
    fading_.add_diagonal(size, queries, keys);
    const bool wants_own = own_ && (p_.grad_denominator_q != nullptr ||
                                    p_.grad_denominator_k != nullptr || wants_steps());
    if (wants_own) fading_denominators(size, n, past, future, grad_before, after);
    if (wants_steps()) fading_.store_steps(chunk, step_sums);
    if (p_.grad_q != nullptr) store_query_gradient(chunk, grad_queries_);
    if (p_.grad_k != nullptr) store_key_gradient(chunk, keys.x, grad_keys_);
    if (p_.grad_v != nullptr) store_value_gradient(chunk, grad_values_);
    if (p_.grad_denominator_q != nullptr) store_own_query_gradient(chunk, grad_own_queries_);
    if (p_.grad_denominator_k != nullptr)
      store_own_key_gradient(chunk, denominator_keys(n), grad_own_keys_);
  }
  void fading_denominators(std::int64_t size, std::int64_t n, const T* past, const T* future,
                           const T* grad_before, const T* after) const {
    const auto z = [&](const T* state) {
      return state == nullptr ? nullptr : state + layout_.z_offset();
    };
    set_zero(grad_own_queries_.get(), size * layout_.denominator_width);
    set_zero(grad_own_keys_.get(), size * layout_.denominator_width);
    const FadingTokens<T> queries{own_queries_, nullptr, grad_denominators_, grad_own_queries_,
                                  nullptr};
    const FadingTokens<T> keys{denominator_keys(n), nullptr, nullptr, grad_own_keys_, nullptr};
    fading_.add_denominator_pairs(size, queries, keys, z(past), z(future));
    if (both_ways_) fading_.add_denominator_pairs(size, keys, queries, z(grad_before), z(after));
    fading_.add_denominator_diagonal(size, queries, keys);
  }

  // The gradients of chunk i of a segment, given the state before it and the gradient of the state
  // after it, or none.
  void causal_chunk(const Chunk& chunk, std::int64_t i, const T* past, const T* future) const {
    const std::int64_t n = i * chunk_, size = chunk.size;
    const std::int64_t rw = layout_.feature_width, vw = layout_.value_width;
    const T *keys = keys_ + n * rw, *values = values_ + n * vw;
    if (p_.grad_q != nullptr || p_.grad_k != nullptr) {
      transpose(size, layout_.values, values, vw, columns_.get(), chunk_);
      tiles_.multiply(size, size, layout_.values, plain<T>(grads_, vw), columns_.get(), chunk_,
                      T(0), weights_.get(), chunk_, Skip::kUpperOfC);
      if (shares_features_) {
        for (std::int64_t t = 0; t < size; ++t) {
          for (std::int64_t m = 0; m <= t; ++m) weights_[t * chunk_ + m] += grad_denominators_[t];
        }
      }
      tiles_.keep_lower_triangle(size, weights_, chunk_);
    }
    if (p_.grad_q != nullptr) {
      tiles_.multiply(size, rw, size, plain<T>(weights_, chunk_), keys, rw, T(0), out_.get(), rw,
                      Skip::kUpperOfA);
      if (past != nullptr) {
        transpose_state(past);
        add_query_gradient(size, past, T(1));
      }
      store_query_gradient(chunk, out_);
    }
    if (p_.grad_k != nullptr) {
      tiles_.multiply(size, rw, size, transposed<T>(weights_, chunk_), queries_.get(), rw, T(0),
                      out_.get(), rw, Skip::kLowerOfA);
      if (future != nullptr) {
        transpose_state(future);
        add_key_gradient(size, values, future, T(1));
      }
      store_key_gradient(chunk, keys, out_);
    }
    if (p_.grad_v != nullptr) {
      transpose(size, layout_.features, keys, rw, columns_.get(), chunk_);
      tiles_.multiply(size, size, layout_.features, plain<T>(queries_, rw), columns_.get(), chunk_,
                      T(0), weights_.get(), chunk_, Skip::kUpperOfC);
      tiles_.keep_lower_triangle(size, weights_, chunk_);
      tiles_.multiply(size, vw, size, transposed<T>(weights_, chunk_), grads_.get(), vw, T(0),
                      out_.get(), vw, Skip::kLowerOfA);
      if (future != nullptr) {
        tiles_.multiply(size, vw, layout_.features, plain(keys, rw), future, vw, T(1), out_.get(),
                        vw);
      }
      store_value_gradient(chunk, out_);
    }
    if (p_.grad_denominator_q != nullptr) own_query_gradient(chunk, denominator_keys(n), past);
    if (p_.grad_denominator_k != nullptr) own_key_gradient(chunk, denominator_keys(n), future);
  }

  // For the gradients below, which read a state by its columns.
  void transpose_state(const T* state) const {
    transpose(layout_.features, layout_.values, state, layout_.value_width, state_columns_.get(),
              layout_.feature_width);
  }
  // out = beta out + grads S^T, and grad_denominators z where the denominator has these features.
  void add_query_gradient(std::int64_t size, const T* state, T beta) const {
    tiles_.multiply(size, layout_.feature_width, layout_.values,
                    plain<T>(grads_, layout_.value_width), state_columns_.get(),
                    layout_.feature_width, beta, out_.get(), layout_.feature_width);
    if (!shares_features_) return;
    const T* z = state + layout_.z_offset();
    for (std::int64_t t = 0; t < size; ++t) {
      T* row = out_ + t * layout_.feature_width;
      for (std::int64_t r = 0; r < layout_.features; ++r) row[r] += grad_denominators_[t] * z[r];
    }
  }
  // out = beta out + values grad_S^T, and grad_z where the denominator has these features.
  void add_key_gradient(std::int64_t size, const T* values, const T* grad_state, T beta) const {
    tiles_.multiply(size, layout_.feature_width, layout_.values, plain(values, layout_.value_width),
                    state_columns_.get(), layout_.feature_width, beta, out_.get(),
                    layout_.feature_width);
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
    store_own_query_gradient(chunk, out_);
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
    store_own_key_gradient(chunk, keys, out_);
  }

  void store_query_gradient(const Chunk& chunk, T* rows) const {
    store_features(chunk, p_.feature_map, layout_.features, layout_.feature_width, queries_, rows,
                   p_.query_length, false, p_.grad_q, query_gradients_.get());
  }
  void store_key_gradient(const Chunk& chunk, const T* keys, T* rows) const {
    store_features(chunk, p_.feature_map, layout_.features, layout_.feature_width, keys, rows,
                   p_.key_length, true, p_.grad_k, key_gradients_.get());
  }
  void store_own_query_gradient(const Chunk& chunk, T* rows) const {
    store_features(chunk, p_.denominator_feature_map, layout_.denominator_features,
                   layout_.denominator_width, own_queries_, rows, p_.query_length, false,
                   p_.grad_denominator_q);
  }
  void store_own_key_gradient(const Chunk& chunk, const T* keys, T* rows) const {
    store_features(chunk, p_.denominator_feature_map, layout_.denominator_features,
                   layout_.denominator_width, keys, rows, p_.key_length, true,
                   p_.grad_denominator_k);
  }
  // Stores rows of gradients times the derivative of the feature map, given the tile of features;
  // queries and their gradients leave their scale behind. Those of encoded rows go through their
  // encoder.
  void store_features(const Chunk& chunk, FeatureMap feature_map, std::int64_t columns,
                      std::int64_t width, const T* features, T* rows, std::int64_t length,
                      bool are_keys, void* grad,
                      EncodedGradients<Storage>* encoder = nullptr) const {
    with_feature_map(feature_map, [&](auto map) {
      for (std::int64_t t = 0; t < chunk.size; ++t) {
        T* row = rows + t * width;
        if (are_keys && is_padding(p_, chunk, t)) set_zero(row, columns);
        const T* phi = features + t * width;
        const T scale = are_keys ? T(1) : query_scales_[t], inverse = 1 / scale;
        const auto store_to = [&](auto* to) {
          for (std::int64_t c = 0; c < columns; ++c) {
            core::store(scale * row[c] * core::feature_map_derivative<map.value>(inverse * phi[c]),
                        to + c);
          }
        };
        if (encoder != nullptr) {
          store_to(row);
        } else {
          store_to(contiguous_row(p_, static_cast<Storage*>(grad), length, columns, chunk, t));
        }
      }
    });
    if (encoder != nullptr) encoder->add(chunk, rows, width);
  }
  void store_value_gradient(const Chunk& chunk, T* rows) const {
    for (std::int64_t t = 0; t < chunk.size; ++t) {
      T* row = rows + t * layout_.value_width;
      if (is_padding(p_, chunk, t)) set_zero(row, layout_.values);
      store_row(row, 1, layout_.values,
                contiguous_row(p_, static_cast<Storage*>(p_.grad_v), p_.key_length, layout_.values,
                               chunk, t));
    }
  }

  const LinearAttentionBackwardParams& p_;
  const StateLayout<T>& layout_;
  Decay<T>& decay_;
  const AttentionTiles<Storage> tiles_;
  const Maybe<EncodedGradients<Storage>> query_gradients_, key_gradients_;
  const bool own_;              // the denominator has features of its own
  const bool shares_features_;  // there is a denominator, of the features of the numerator
  const bool is_ordered_;       // queries see the keys in order
  const bool both_ways_;        // and those after them, in the reverse order
  const FadingGradients<T> fading_;
  const std::int64_t chunk_;        // tokens of a chunk
  const std::int64_t chunks_;       // that are held at once
  Workspace<T> queries_;            // [chunk, R]
  Workspace<T> keys_;               // [chunks, chunk, R]
  Workspace<T> values_;             // [chunks, chunk, E]
  Workspace<T> own_queries_;        // [chunk, F], of the denominator
  Workspace<T> own_keys_;           // [chunks, chunk, F], of the denominator
  Workspace<T> grads_;              // [chunk, E]
  Workspace<T> grad_denominators_;  // [chunk]
  Workspace<T> query_scales_;       // [chunk]
  Workspace<T> weights_;            // [chunk, chunk]
  Workspace<T> columns_;            // [R, chunk] or [E, chunk], keys or values
  Workspace<T> state_columns_;      // [E, R], a state
  Workspace<T> out_;                // [chunk, R], [chunk, E] or [chunk, F]
  Workspace<T> row_;                // [E] or [F]
  Workspace<T> states_;             // [chunks], states before each chunk
  Workspace<T> query_states_;       // [chunks], gradients, from the queries before each chunk
  Workspace<T> local_;              // state, or its gradient, of the segment alone
  Workspace<T> grad_state_;
  Workspace<T> later_;                             // state of the keys after a chunk
  Workspace<T> grad_queries_, grad_keys_;          // [chunk, R]
  Workspace<T> grad_values_;                       // [chunk, E]
  Workspace<T> grad_own_queries_, grad_own_keys_;  // [chunk, F]
};

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
