// Linear attention, forward.
#include "linear_attention.h"
#include "one_position.h"
#include "row_norm.h"
#include "tiles.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {
namespace {

// The tiles and scratch memory of one thread.
template <class Storage>
class ForwardWorker {
 public:
  using T = core::accumulate_t<Storage>;

  ForwardWorker(const LinearAttentionParams& p, const StateLayout<T>& layout, Decay<T>& decay)
      : p_(p),
        layout_(layout),
        decay_(decay),
        tiles_(p, layout, decay),
        both_ways_(!p.causal && decay.fades()),
        is_ordered_(p.causal || both_ways_),
        sums_weights_(p.normalize && decay.fades() && !p.has_own_denominator),
        own_size_(p.has_own_denominator ? kChunk * layout.denominator_width : 0),
        queries_(kChunk * layout.feature_width),
        keys_(kChunk * layout.feature_width),
        columns_(is_ordered_ ? layout.feature_width * kChunk : 0),
        values_(kChunk * layout.value_width),
        weights_(is_ordered_ ? kChunk * kChunk : 0),
        own_queries_(own_size_),
        own_keys_(own_size_),
        out_(kChunk * layout.value_width),
        divisors_(kChunk),
        local_(layout.size()),
        state_(is_ordered_ ? layout.size() : 0),
        later_(both_ways_ ? kChunksOfSegment * layout.size() : 0),
        seen_before_(decay.per_feature() ? kChunk * layout.feature_width : 0),
        seen_after_(decay.per_feature() && both_ways_ ? kChunk * layout.feature_width : 0),
        reversed_(both_ways_ && decay.per_feature() ? kChunk * kChunk : 0) {}

  void sum_keys(Way way, const Segment& segment, T* state) const {
    tiles_.sum_keys(way, segment, keys_, values_, denominator_keys(), state);
  }

  // The outputs of a segment whose queries see the keys in order: it starts with the state `start`,
  // or none, and the state after it goes to `end`, unless null, which may be `start`. Where keys
  // after a query fade as well, `after` is the state, or none, of those after the segment.
  void ordered_segment(const Segment& segment, const T* start, T* end, const T* after) const {
    if (both_ways_) sum_later(segment, after);
    core::set_zero(layout_.view(local_.get()));
    decay_.reset();
    for (std::int64_t i = 0; i < segment.chunks(); ++i) {
      const Chunk chunk = segment.chunk(i);
      const T* const past = state_before(i, start);
      tiles_.ahead().start();
      if (const Chunk next = segment.next(chunk); next.size > 0) {
        tiles_.ask_for_queries(next);
        tiles_.ask_for_keys(next);
        tiles_.ask_for_rows(next, p_.out, p_.query_length, layout_.values);
      }
      decay_.load(chunk);
      load(chunk);
      tiles_.load_keys(chunk, keys_);
      if (own_size_ > 0) tiles_.load_denominator_keys(chunk, own_keys_);
      tiles_.load_values(chunk, values_);
      make_weights(chunk.size);
      const T* const z = past == nullptr ? nullptr : past + layout_.z_offset();
      if (!sums_weights_) denominators(chunk, z);
      const T* later = nullptr;
      if (both_ways_ && (after != nullptr || i + 1 < segment.chunks())) {
        later = later_ + i * layout_.size();
        receive(Way::kToStart, chunk.size, seen_after_);
      }
      if (both_ways_ && !sums_weights_)
        add_later_denominators(chunk, later == nullptr ? nullptr : later + layout_.z_offset());
      if (past != nullptr) receive(Way::kToEnd, chunk.size, seen_before_);
      if (sums_weights_) sum_weights(chunk.size, z, later);
      tiles_.multiply(chunk.size, layout_.value_width, chunk.size, plain<T>(weights_, kChunk),
                      values_.get(), layout_.value_width, T(0), out_.get(), layout_.value_width,
                      both_ways_ ? Skip::kNothing : Skip::kUpperOfA);
      if (past != nullptr) read_state(Way::kToEnd, chunk.size, seen_before_, past);
      if (later != nullptr) read_state(Way::kToStart, chunk.size, seen_after_, later);
      store(chunk);
      if (end != nullptr || chunk.rest > chunk.size)
        tiles_.add_keys(Way::kToEnd, chunk.size, keys_, values_, denominator_keys(), local_);
      decay_.pass();
    }
    if (end != nullptr) layout_.join(decay_.over(segment), start, local_, end);
  }

  // The outputs of a segment of queries when all keys are in `state`.
  void query_segment(const Segment& segment, const T* state) const {
    for (std::int64_t i = 0; i < segment.chunks(); ++i) {
      const Chunk chunk = segment.chunk(i);
      tiles_.ahead().start();
      if (const Chunk next = segment.next(chunk); next.size > 0) {
        tiles_.ask_for_queries(next);
        tiles_.ask_for_rows(next, p_.out, p_.query_length, layout_.values);
      }
      load(chunk);
      denominators(chunk, state + layout_.z_offset());
      tiles_.multiply(chunk.size, layout_.value_width, layout_.features,
                      plain<T>(queries_, layout_.feature_width), state, layout_.value_width, T(0),
                      out_.get(), layout_.value_width);
      store(chunk);
    }
  }

 private:
  T* denominator_keys() const { return own_size_ > 0 ? own_keys_.get() : keys_.get(); }

  void load(const Chunk& chunk) const {
    tiles_.load_queries(chunk, queries_, layout_.feature_width);
    if (own_size_ > 0) tiles_.load_denominator_queries(chunk, own_queries_);
  }
  void denominators(const Chunk& chunk, const T* z) const {
    if (!p_.normalize) return;
    const bool own = own_size_ > 0;
    tiles_.denominators(chunk.size, own ? own_queries_ : queries_,
                        own ? layout_.denominator_width : layout_.feature_width, denominator_keys(),
                        z, divisors_);
  }

  void add_later_denominators(const Chunk& chunk, const T* z) const {
    if (!p_.normalize) return;
    const bool own = own_size_ > 0;
    tiles_.add_later_denominators(chunk.size, own ? own_queries_ : queries_,
                                  own ? layout_.denominator_width : layout_.feature_width,
                                  denominator_keys(), z, divisors_);
  }

  // The state of the keys before chunk i of a segment, or null where there are none.
  const T* state_before(std::int64_t i, const T* start) const {
    if (start == nullptr) return i == 0 ? nullptr : local_.get();
    layout_.join(decay_.passed(), start, local_, state_);
    return state_;
  }

  // The products of the queries and keys of a chunk, as far as they count.
  void make_weights(std::int64_t size) const {
    const std::int64_t width = layout_.feature_width;
    if (decay_.per_feature()) {
      decay_.make_weights(size, false, queries_, width, keys_, width, weights_, kChunk);
      if (!both_ways_) return;
      decay_.make_weights(size, true, keys_, width, queries_, width, reversed_, kChunk);
      for (std::int64_t t = 0; t < size; ++t) {
        for (std::int64_t m = t + 1; m < size; ++m)
          weights_[t * kChunk + m] = reversed_[m * kChunk + t];
      }
      return;
    }
    transpose<T>(size, layout_.features, keys_, width, columns_, kChunk);
    tiles_.multiply(size, size, layout_.features, plain<T>(queries_, width), columns_.get(), kChunk,
                    T(0), weights_.get(), kChunk, both_ways_ ? Skip::kNothing : Skip::kUpperOfC);
    if (both_ways_) {
      decay_.fade_weights_both_ways(size, weights_, kChunk);
    } else if (decay_.fades()) {
      decay_.fade_weights(size, false, weights_, kChunk);
    } else {
      tiles_.keep_lower_triangle(size, weights_, kChunk);
    }
  }

  // The denominators, where these have the features of the numerators and fade: the sums of the
  // rows of weights, and what the queries, as they see the states, have from z and from `later` (or
  // null).
  void sum_weights(std::int64_t size, const T* z, const T* later) const {
    for (std::int64_t t = 0; t < size; ++t) {
      T sum = sum_row<T>(weights_ + t * kChunk, size) + static_cast<T>(p_.eps);
      if (z != nullptr) sum += seen_product(Way::kToEnd, t, seen_before_, z);
      if (later != nullptr)
        sum += seen_product(Way::kToStart, t, seen_after_, later + layout_.z_offset());
      divisors_[t] = sum;
    }
  }

  // Queries as they see a state that has come this way to the chunk, where features fade apart;
  // else their factors are those of whole rows.
  void receive(Way way, std::int64_t size, T* out) const {
    if (!decay_.per_feature()) return;
    const std::int64_t width = layout_.feature_width;
    for (std::int64_t t = 0; t < size; ++t)
      decay_.receive(way, t, queries_ + t * width, width, out + t * width);
  }
  T seen_product(Way way, std::int64_t t, const T* seen, const T* z) const {
    const std::int64_t width = layout_.feature_width;
    if (decay_.per_feature()) return dot<T>(seen + t * width, z, width);
    return decay_.received_column(way)[t] * dot<T>(queries_ + t * width, z, width);
  }
  // out += what queries have from such a state.
  void read_state(Way way, std::int64_t size, const T* seen, const T* state) const {
    const T* const queries = decay_.per_feature() ? seen : queries_.get();
    tiles_.multiply(size, layout_.value_width, layout_.features,
                    plain(queries, layout_.feature_width).times(decay_.received_column(way)), state,
                    layout_.value_width, T(1), out_.get(), layout_.value_width);
  }

  // later_[i] = the state of the keys after chunk i, in the segment and in `after` (or none).
  void sum_later(const Segment& segment, const T* after) const {
    for (std::int64_t i = segment.chunks() - 1; i >= 0; --i) {
      T *const state = later_ + i * layout_.size(), *const next = state + layout_.size();
      if (i + 1 == segment.chunks()) {
        layout_.copy(after, state);
        continue;
      }
      const Chunk chunk = segment.chunk(i + 1);
      decay_.load(chunk);
      tiles_.load_keys(chunk, keys_);
      tiles_.load_values(chunk, values_);
      if (own_size_ > 0) tiles_.load_denominator_keys(chunk, own_keys_);
      layout_.copy(next, state);
      tiles_.add_keys(Way::kToStart, chunk.size, keys_, values_, denominator_keys(), state);
    }
  }

  void store(const Chunk& chunk) const {
    for (std::int64_t t = 0; t < chunk.size; ++t) {
      const T divisor =
          row_divisor(p_, out_ + t * layout_.value_width, layout_.value_width, divisors_[t]);
      store_divided(p_, chunk, t, out_ + t * layout_.value_width, divisor,
                    static_cast<Storage*>(p_.out));
    }
  }

  const LinearAttentionParams& p_;
  const StateLayout<T>& layout_;
  Decay<T>& decay_;
  const AttentionTiles<Storage> tiles_;
  const bool both_ways_;         // keys fade with the lag before and after a query
  const bool is_ordered_;        // there are chunks of weights
  const bool sums_weights_;      // for the denominators
  const std::int64_t own_size_;  // of a tile of the denominator's own features
  Workspace<T> queries_;         // [chunk, R]
  Workspace<T> keys_;            // [chunk, R]
  Workspace<T> columns_;         // [R, chunk], keys
  Workspace<T> values_;          // [chunk, E]
  Workspace<T> weights_;         // [chunk, chunk]
  Workspace<T> own_queries_;     // [chunk, F], of the denominator
  Workspace<T> own_keys_;        // [chunk, F], of the denominator
  Workspace<T> out_;             // [chunk, E]
  Workspace<T> divisors_;        // [chunk]
  Workspace<T> local_;           // state of the segment's own keys
  Workspace<T> state_;           // state before a chunk
  Workspace<T> later_;           // [chunks], states of the keys after each chunk
  // [chunk, R], queries as they see states on both sides, where features fade apart.
  Workspace<T> seen_before_, seen_after_;
  Workspace<T> reversed_;  // [chunk, chunk], weights of later keys
};

// Segments in parallel, once their states are known.
template <class Storage, class T>
void forward_in_segments(const LinearAttentionParams& p, const StateLayout<T>& layout,
                         const Segments& segments) {
  const bool wants_final = p.final_s != nullptr || p.final_z != nullptr;
  const bool has_initial = p.initial_s != nullptr, both_ways = !p.causal;
  const SegmentStates<T> states(layout, segments);            // before each segment
  const SegmentStates<T> later(layout, segments, both_ways);  // after each segment
#pragma omp parallel num_threads(p.num_threads)
  {
    Decay<T> decay(p, layout.feature_width);
    const ForwardWorker<Storage> worker(p, layout, decay);
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < segments.total(); ++i) {
      const Segment segment = segments.in_order(i);
      const std::int64_t slot = segment.slot;
      if (!segment.last) worker.sum_keys(Way::kToEnd, segment, states[slot + 1]);
      if (both_ways && !segment.first) worker.sum_keys(Way::kToStart, segment, later[slot - 1]);
    }
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < segments.rows(); ++row) {
      states.scan_forward(row, p.initial_s, p.initial_z, decay);
      if (both_ways) later.scan_backward(row, nullptr, nullptr, decay);
    }
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < segments.total(); ++i) {
      const Segment segment = segments.in_order(i);
      const std::int64_t slot = segment.slot;
      const bool ends = wants_final && segment.last;
      worker.ordered_segment(segment, !segment.first || has_initial ? states[slot] : nullptr,
                             ends ? states[slot] : nullptr,
                             both_ways && !segment.last ? later[slot] : nullptr);
      if (ends) layout.export_to(states[slot], segment.row, p.final_s, p.final_z);
    }
  }
}

template <class Storage>
void forward_ordered(const LinearAttentionParams& p) {
  using T = core::accumulate_t<Storage>;
  const Segments segments(p, p.query_length);
  const StateLayout<T> layout(p);
  const bool wants_final = p.final_s != nullptr || p.final_z != nullptr;
  if (p.causal && !segments.worth_sharing_rows()) {
    const std::int64_t rows = segments.rows_of_task();
    const bool has_initial = p.initial_s != nullptr;
#pragma omp parallel num_threads(p.num_threads)
    {
      Decay<T> decay(p, layout.feature_width);
      const ForwardWorker<Storage> worker(p, layout, decay);
      Workspace<T> states(rows * layout.size());
#pragma omp for schedule(dynamic)
      for (std::int64_t first = 0; first < segments.rows(); first += rows) {
        for (std::int64_t r = 0; r < rows; ++r)
          layout.import(p.initial_s, p.initial_z, first + r, states + r * layout.size());
        for (std::int64_t i = 0; i < segments.count(first); ++i) {
          for (std::int64_t r = 0; r < rows; ++r) {
            const Segment segment = segments.of_row(first + r, i);
            T* const state = states + r * layout.size();
            worker.ordered_segment(segment, i > 0 || has_initial ? state : nullptr,
                                   wants_final || !segment.last ? state : nullptr, nullptr);
          }
        }
        for (std::int64_t r = 0; r < rows && wants_final; ++r)
          layout.export_to(states + r * layout.size(), first + r, p.final_s, p.final_z);
      }
    }
    return;
  }

  forward_in_segments<Storage>(p, layout, segments);
}

// Every query sees every key: all keys are in one state.
template <class Storage>
void forward_full(const LinearAttentionParams& p) {
  using T = core::accumulate_t<Storage>;
  const Segments queries(p, p.query_length), keys(p, p.key_length);
  const StateLayout<T> layout(p);
  const SegmentStates<T> sums(layout, keys);
  Workspace<T> states(keys.rows() * layout.size());
#pragma omp parallel num_threads(p.num_threads)
  {
    Decay<T> decay(p, layout.feature_width);
    const ForwardWorker<Storage> worker(p, layout, decay);
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < keys.total(); ++i) {
      const Segment segment = keys.in_order(i);
      worker.sum_keys(Way::kToEnd, segment, sums[segment.slot]);
    }
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < keys.rows(); ++row) {
      T* state = states + row * layout.size();
      sums.total(row, p.initial_s, p.initial_z, decay, state);
      layout.export_to(state, row, p.final_s, p.final_z);
    }
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < queries.total(); ++i) {
      const Segment segment = queries.in_order(i);
      worker.query_segment(segment, states + segment.row * layout.size());
    }
  }
}

}  // namespace

void linear_attention_forward(const LinearAttentionParams& p) {
  // Only with a state: without one, a token alone gets what it gets among packed sequences, bit for
  // bit.
  if (p.query_length == 1 && p.key_length == 1 && p.initial_s != nullptr && p.cu_seqlens == nullptr)
    return linear_attention_one_position(p);
  visit_storage(p.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    const bool is_ordered = p.causal || (p.decay_features > 0 && p.query_length > 0);
    is_ordered ? forward_ordered<Storage>(p) : forward_full<Storage>(p);
  });
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
