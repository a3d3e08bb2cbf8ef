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
        sums_weights_(p.normalize && decay.fades() && !has_own_denominator(p)),
        left_width_(layout.feature_width + (p.causal || both_ways_ ? kChunk : 0)),
        own_size_(has_own_denominator(p) ? kChunk * layout.denominator_width : 0),
        left_(kChunk * left_width_),
        right_((layout.feature_width + kChunk) * layout.value_width),
        keys_(kChunk * layout.feature_width),
        own_queries_(own_size_),
        own_keys_(own_size_),
        out_(kChunk * layout.value_width),
        divisors_(kChunk),
        z_(layout.denominator_width),
        local_(layout.size()),
        later_(both_ways_ ? kChunksOfSegment * layout.size() : 0),
        seen_(both_ways_ ? kChunk * layout.feature_width : 0),
        reversed_(both_ways_ && decay.per_feature() ? kChunk * kChunk : 0) {
    // What products leave beyond E is never written again.
    set_zero(out_.get(), kChunk * layout.value_width);
  }

  void sum_keys(Way way, const Segment& segment, T* state) const {
    tiles_.sum_keys(way, segment, keys_, right_, denominator_keys(), state);
  }

  // The outputs of a segment whose queries see the keys in order: it starts with the state `start`,
  // or none, and the state after it goes to `end`, unless null, which may be `start`. Where keys
  // after a query fade as well, `after` is the state, or none, of those after the segment.
  //
  // [queries, weights] and [S; values] stand side by side, so that past and present take one
  // product.
  void ordered_segment(const Segment& segment, const T* start, T* end, const T* after) const {
    const std::int64_t width = layout_.feature_width;
    T* values = right_ + layout_.z_offset();
    if (both_ways_) sum_later(segment, after);
    core::set_zero(layout_.view(local_.get()));
    decay_.reset();
    for (std::int64_t i = 0; i < segment.chunks(); ++i) {
      const Chunk chunk = segment.chunk(i);
      const bool has_past = start != nullptr || i > 0;
      if (has_past) {
        core::join(decay_.passed(), layout_.view(start), layout_.view(local_.get()),
                   layout_.view(right_.get(), z_.get()));
      }
      decay_.load(chunk);
      load(chunk);
      tiles_.load_keys(chunk, keys_);
      if (own_size_ > 0) tiles_.load_denominator_keys(chunk, own_keys_);
      tiles_.load_values(chunk, values);
      make_weights(chunk.size, left_ + width);
      const T* const z = has_past ? z_.get() : nullptr;
      if (!sums_weights_) denominators(chunk, z);
      const T* later = nullptr;
      if (both_ways_ && (after != nullptr || i + 1 < segment.chunks())) {
        later = later_ + i * layout_.size();
        receive(Way::kToStart, chunk.size, seen_, width);
      }
      if (both_ways_ && !sums_weights_)
        add_later_denominators(chunk, later == nullptr ? nullptr : later + layout_.z_offset());
      if (decay_.fades() && has_past) receive(Way::kToEnd, chunk.size, left_, left_width_);
      if (sums_weights_) sum_weights(chunk.size, z, later);
      const std::int64_t skip = has_past ? 0 : width;
      gemm(Op::kPlain, Op::kPlain, chunk.size, layout_.values, width + chunk.size - skip,
           left_ + skip, left_width_, right_ + skip * layout_.value_width, layout_.value_width,
           T(0), out_, layout_.value_width);
      if (later != nullptr) {
        gemm(Op::kPlain, Op::kPlain, chunk.size, layout_.values, layout_.features, seen_, width,
             later, layout_.value_width, T(1), out_, layout_.value_width);
      }
      store(chunk);
      if (end != nullptr || chunk.rest > chunk.size)
        tiles_.add_keys(Way::kToEnd, chunk.size, keys_, values, denominator_keys(), local_);
      decay_.pass();
    }
    if (end != nullptr) layout_.join(decay_.over(segment), start, local_, end);
  }

  // The outputs of a segment of queries when all keys are in `state`.
  void query_segment(const Segment& segment, const T* state) const {
    for (std::int64_t i = 0; i < segment.chunks(); ++i) {
      const Chunk chunk = segment.chunk(i);
      load(chunk);
      denominators(chunk, state + layout_.z_offset());
      gemm(Op::kPlain, Op::kPlain, chunk.size, layout_.values, layout_.features, left_, left_width_,
           state, layout_.value_width, T(0), out_, layout_.value_width);
      store(chunk);
    }
  }

 private:
  T* denominator_keys() const { return own_size_ > 0 ? own_keys_.get() : keys_.get(); }

  void load(const Chunk& chunk) const {
    tiles_.load_queries(chunk, left_, left_width_);
    if (own_size_ > 0) tiles_.load_denominator_queries(chunk, own_queries_);
  }
  void denominators(const Chunk& chunk, const T* z) const {
    if (!p_.normalize) return;
    const bool own = own_size_ > 0;
    tiles_.denominators(chunk.size, own ? own_queries_ : left_,
                        own ? layout_.denominator_width : left_width_, denominator_keys(), z,
                        divisors_);
  }

  void add_later_denominators(const Chunk& chunk, const T* z) const {
    if (!p_.normalize) return;
    const bool own = own_size_ > 0;
    tiles_.add_later_denominators(chunk.size, own ? own_queries_ : left_,
                                  own ? layout_.denominator_width : left_width_, denominator_keys(),
                                  z, divisors_);
  }

  // The products of the queries and keys of a chunk, as far as they count.
  void make_weights(std::int64_t size, T* weights) const {
    const std::int64_t width = layout_.feature_width;
    if (decay_.per_feature()) {
      decay_.make_weights(size, false, left_, left_width_, keys_, width, weights, left_width_);
      if (!both_ways_) return;
      decay_.make_weights(size, true, keys_, width, left_, left_width_, reversed_, kChunk);
      for (std::int64_t t = 0; t < size; ++t) {
        for (std::int64_t m = t + 1; m < size; ++m)
          weights[t * left_width_ + m] = reversed_[m * kChunk + t];
      }
      return;
    }
    gemm(Op::kPlain, Op::kTransposed, size, size, layout_.features, left_, left_width_, keys_,
         width, T(0), weights, left_width_);
    if (both_ways_) {
      decay_.fade_weights_both_ways(size, weights, left_width_);
    } else if (decay_.fades()) {
      decay_.fade_weights(size, false, weights, left_width_);
    } else {
      tiles_.keep_lower_triangle(size, weights, left_width_);
    }
  }

  // The denominators, where these have the features of the numerators and fade: the sums of the
  // rows of weights, and what the queries, as they see the states, have from z and from `later` (or
  // null).
  void sum_weights(std::int64_t size, const T* z, const T* later) const {
    const std::int64_t width = layout_.feature_width;
    for (std::int64_t t = 0; t < size; ++t) {
      const T* const queries = left_ + t * left_width_;
      T sum = sum_row<T>(queries + width, size) + static_cast<T>(p_.eps);
      if (z != nullptr) sum += dot<T>(queries, z, width);
      if (later != nullptr) sum += dot<T>(seen_ + t * width, later + layout_.z_offset(), width);
      divisors_[t] = sum;
    }
  }

  // Queries as they see a state that has come this way to the chunk.
  void receive(Way way, std::int64_t size, T* out, std::int64_t ld) const {
    for (std::int64_t t = 0; t < size; ++t)
      decay_.receive(way, t, left_ + t * left_width_, layout_.feature_width, out + t * ld);
  }

  // later_[i] = the state of the keys after chunk i, in the segment and in `after` (or none).
  void sum_later(const Segment& segment, const T* after) const {
    T* const values = right_ + layout_.z_offset();
    for (std::int64_t i = segment.chunks() - 1; i >= 0; --i) {
      T *const state = later_ + i * layout_.size(), *const next = state + layout_.size();
      if (i + 1 == segment.chunks()) {
        layout_.copy(after, state);
        continue;
      }
      const Chunk chunk = segment.chunk(i + 1);
      decay_.load(chunk);
      tiles_.load_keys(chunk, keys_);
      tiles_.load_values(chunk, values);
      if (own_size_ > 0) tiles_.load_denominator_keys(chunk, own_keys_);
      layout_.copy(next, state);
      tiles_.add_keys(Way::kToStart, chunk.size, keys_, values, denominator_keys(), state);
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
  const bool both_ways_;     // keys fade with the lag before and after a query
  const bool sums_weights_;  // for the denominators
  const std::int64_t left_width_;
  const std::int64_t own_size_;  // of a tile of the denominator's own features
  Workspace<T> left_;            // [chunk, R + chunk]: queries, weights
  Workspace<T> right_;           // [R + chunk, E]: S, values
  Workspace<T> keys_;            // [chunk, R]
  Workspace<T> own_queries_;     // [chunk, F], of the denominator
  Workspace<T> own_keys_;        // [chunk, F], of the denominator
  Workspace<T> out_;             // [chunk, E]
  Workspace<T> divisors_;        // [chunk]
  Workspace<T> z_;               // [F]
  Workspace<T> local_;           // state of the segment's own keys
  Workspace<T> later_;           // [chunks], states of the keys after each chunk
  Workspace<T> seen_;            // [chunk, R], queries as they see such a state
  Workspace<T> reversed_;        // [chunk, chunk], weights of later keys
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
    for (std::int64_t slot = 0; slot < segments.total(); ++slot) {
      const Segment segment = segments.of_slot(slot);
      if (!segment.last) worker.sum_keys(Way::kToEnd, segment, states[slot + 1]);
      if (both_ways && !segment.first) worker.sum_keys(Way::kToStart, segment, later[slot - 1]);
    }
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < segments.rows(); ++row) {
      states.scan_forward(row, p.initial_s, p.initial_z, decay);
      if (both_ways) later.scan_backward(row, nullptr, nullptr, decay);
    }
#pragma omp for schedule(dynamic)
    for (std::int64_t slot = 0; slot < segments.total(); ++slot) {
      const Segment segment = segments.of_slot(slot);
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
#pragma omp parallel num_threads(p.num_threads)
    {
      Decay<T> decay(p, layout.feature_width);
      const ForwardWorker<Storage> worker(p, layout, decay);
      Workspace<T> state(layout.size());
#pragma omp for schedule(dynamic)
      for (std::int64_t row = 0; row < segments.rows(); ++row) {
        bool has_state = layout.import(p.initial_s, p.initial_z, row, state);
        for (std::int64_t i = 0; i < segments.count(row); ++i) {
          const Segment segment = segments.of_row(row, i);
          worker.ordered_segment(segment, has_state ? state.get() : nullptr,
                                 wants_final || !segment.last ? state.get() : nullptr, nullptr);
          has_state = true;
        }
        if (wants_final) layout.export_to(state, row, p.final_s, p.final_z);
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
    for (std::int64_t slot = 0; slot < keys.total(); ++slot)
      worker.sum_keys(Way::kToEnd, keys.of_slot(slot), sums[slot]);
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < keys.rows(); ++row) {
      T* state = states + row * layout.size();
      sums.total(row, p.initial_s, p.initial_z, decay, state);
      layout.export_to(state, row, p.final_s, p.final_z);
    }
#pragma omp for schedule(dynamic)
    for (std::int64_t slot = 0; slot < queries.total(); ++slot) {
      const Segment segment = queries.of_slot(slot);
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
