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

  ForwardWorker(const LinearAttentionParams& p, const StateLayout<T>& layout)
      : p_(p),
        layout_(layout),
        tiles_(p, layout),
        left_width_(layout.feature_width + (p.causal ? kChunk : 0)),
        own_size_(has_own_denominator(p) ? kChunk * layout.denominator_width : 0),
        left_(kChunk * left_width_),
        right_((layout.feature_width + kChunk) * layout.value_width),
        keys_(kChunk * layout.feature_width),
        own_queries_(own_size_),
        own_keys_(own_size_),
        out_(kChunk * layout.value_width),
        divisors_(kChunk),
        z_(layout.denominator_width),
        local_(layout.size()) {
    // What products leave beyond E is never written again.
    set_zero(out_.get(), kChunk * layout.value_width);
  }

  void sum_keys(const Segment& segment, T* state) const {
    tiles_.sum_keys(segment, keys_, right_, denominator_keys(), state);
  }

  // The outputs of a segment that starts with the state `start`, or none; the state after it goes
  // to `end`, unless null, which may be `start`.
  //
  // [queries, weights] and [S; values] stand side by side, so that past and present take one
  // product.
  void causal_segment(const Segment& segment, const T* start, T* end) const {
    const std::int64_t width = layout_.feature_width;
    T* values = right_ + layout_.z_offset();
    core::set_zero(layout_.view(local_.get()));
    for (std::int64_t i = 0; i < segment.chunks(); ++i) {
      const Chunk chunk = segment.chunk(i);
      const bool has_past = start != nullptr || i > 0;
      if (has_past) {
        core::join(Passage{i * kChunk}, layout_.view(start), layout_.view(local_.get()),
                   layout_.view(right_.get(), z_.get()));
      }
      load(chunk);
      tiles_.load_keys(chunk, keys_);
      if (own_size_ > 0) tiles_.load_denominator_keys(chunk, own_keys_);
      tiles_.load_values(chunk, values);
      T* weights = left_ + width;
      gemm(Op::kPlain, Op::kTransposed, chunk.size, chunk.size, layout_.features, left_,
           left_width_, keys_, width, T(0), weights, left_width_);
      tiles_.keep_lower_triangle(chunk.size, weights, left_width_);
      denominators(chunk, has_past ? z_.get() : nullptr);
      const std::int64_t skip = has_past ? 0 : width;
      gemm(Op::kPlain, Op::kPlain, chunk.size, layout_.values, width + chunk.size - skip,
           left_ + skip, left_width_, right_ + skip * layout_.value_width, layout_.value_width,
           T(0), out_, layout_.value_width);
      store(chunk);
      if (end != nullptr || chunk.rest > chunk.size)
        tiles_.add_keys(chunk.size, keys_, values, denominator_keys(), local_);
    }
    if (end != nullptr) layout_.join(segment.size, start, local_, end);
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
  const AttentionTiles<Storage> tiles_;
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
};

template <class Storage>
void forward_causal(const LinearAttentionParams& p) {
  using T = core::accumulate_t<Storage>;
  const Segments segments(p, p.query_length);
  const StateLayout<T> layout(p);
  const bool wants_final = p.final_s != nullptr || p.final_z != nullptr;
  const bool has_initial = p.initial_s != nullptr;
  if (!segments.worth_sharing_rows()) {
#pragma omp parallel num_threads(p.num_threads)
    {
      const ForwardWorker<Storage> worker(p, layout);
      Workspace<T> state(layout.size());
#pragma omp for schedule(dynamic)
      for (std::int64_t row = 0; row < segments.rows(); ++row) {
        bool has_state = layout.import(p.initial_s, p.initial_z, row, state);
        for (std::int64_t i = 0; i < segments.count(row); ++i) {
          const Segment segment = segments.of_row(row, i);
          worker.causal_segment(segment, has_state ? state.get() : nullptr,
                                wants_final || !segment.last ? state.get() : nullptr);
          has_state = true;
        }
        if (wants_final) layout.export_to(state, row, p.final_s, p.final_z);
      }
    }
    return;
  }

  const SegmentStates<T> states(layout, segments);  // before each segment
#pragma omp parallel num_threads(p.num_threads)
  {
    const ForwardWorker<Storage> worker(p, layout);
#pragma omp for schedule(dynamic)
    for (std::int64_t slot = 0; slot < segments.total(); ++slot) {
      const Segment segment = segments.of_slot(slot);
      if (!segment.last) worker.sum_keys(segment, states[slot + 1]);
    }
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < segments.rows(); ++row)
      states.scan_forward(row, p.initial_s, p.initial_z);
#pragma omp for schedule(dynamic)
    for (std::int64_t slot = 0; slot < segments.total(); ++slot) {
      const Segment segment = segments.of_slot(slot);
      const bool ends = wants_final && segment.last;
      worker.causal_segment(segment, !segment.first || has_initial ? states[slot] : nullptr,
                            ends ? states[slot] : nullptr);
      if (ends) layout.export_to(states[slot], segment.row, p.final_s, p.final_z);
    }
  }
}

template <class Storage>
void forward_full(const LinearAttentionParams& p) {
  using T = core::accumulate_t<Storage>;
  const Segments queries(p, p.query_length), keys(p, p.key_length);
  const StateLayout<T> layout(p);
  const SegmentStates<T> sums(layout, keys);
  Workspace<T> states(keys.rows() * layout.size());
#pragma omp parallel num_threads(p.num_threads)
  {
    const ForwardWorker<Storage> worker(p, layout);
#pragma omp for schedule(dynamic)
    for (std::int64_t slot = 0; slot < keys.total(); ++slot)
      worker.sum_keys(keys.of_slot(slot), sums[slot]);
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < keys.rows(); ++row) {
      T* state = states + row * layout.size();
      sums.total(row, p.initial_s, p.initial_z, state);
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
    p.causal ? forward_causal<Storage>(p) : forward_full<Storage>(p);
  });
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
