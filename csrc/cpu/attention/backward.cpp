// Linear attention, backward: what is done in which order and shared among threads.
#include "backward_worker.h"
#include "linear_attention.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {
namespace {

// The gradient of a constant decay: what the segments have added up, in their order.
template <class T>
void store_constant_steps(const LinearAttentionBackwardParams& p, const Segments& segments,
                          const double* sums) {
  const std::int64_t columns = p.decay_features;
  Workspace<double> total(columns);
  for (std::int64_t head = 0; head < p.num_heads; ++head) {
    set_zero(total.get(), columns);
    for (std::int64_t row = head; row < segments.rows(); row += p.num_heads) {
      const double* of_row = sums + segments.first_slot(row) * columns;
      for (std::int64_t i = 0; i < segments.count(row); ++i) {
        for (std::int64_t c = 0; c < columns; ++c) total[c] += of_row[i * columns + c];
      }
    }
    FadingGradients<T>::store_doubles(p, total, columns, head * columns);
  }
}

// Queries see the keys in order: in one direction, or with a decay in both.
template <class Storage>
void backward_ordered(const LinearAttentionBackwardParams& p) {
  using T = core::accumulate_t<Storage>;
  const Segments segments(p, p.key_length);
  const StateLayout<T> layout(p);
  const SumsOfEncoders<T> sums_of_encoders(p);
  const bool wants_steps = p.grad_log_decay != nullptr;
  const bool wants_states = p.grad_q != nullptr || p.grad_denominator_q != nullptr || wants_steps;
  const bool wants_initial = p.grad_initial_s != nullptr || p.grad_initial_z != nullptr;
  const bool has_initial = p.initial_s != nullptr, has_final = p.grad_final_s != nullptr;
  const bool both_ways = !p.causal && p.query_length > 0;
  const bool shares = both_ways || segments.worth_sharing_rows();
  const SegmentStates<T> states(layout, segments);            // before each segment
  const SegmentStates<T> grads(layout, segments);             // of the states after each segment
  const SegmentStates<T> later(layout, segments, both_ways);  // after each segment
  const SegmentStates<T> grads_before(layout, segments, both_ways);  // of these, before it
  const bool sums_steps = wants_steps && p.constant_decay;
  Workspace<double> step_sums(sums_steps ? segments.total() * p.decay_features : 0);
  if (sums_steps) set_zero(step_sums.get(), segments.total() * p.decay_features);

  // The gradients of a segment, and that of the state before it for the segment before it, unless
  // that is known already.
  const auto run = [&](const BackwardWorker<Storage>& worker, const Segment& segment,
                       bool is_known) {
    const std::int64_t slot = segment.slot;
    SegmentContext<T> context{};
    context.start = segment.first && !has_initial ? nullptr : states[slot];
    context.grad_end = segment.last && !has_final ? nullptr : grads[slot];
    if (segment.first && wants_initial) context.grad_start = grads[slot];
    if (!segment.first && !is_known) context.grad_start = grads[slot - 1];
    if (both_ways && !segment.last) context.after = later[slot];
    if (both_ways && !segment.first) context.grad_before = grads_before[slot];
    if (sums_steps) context.step_sums = step_sums + slot * p.decay_features;
    worker.ordered_segment(segment, context);
    if (segment.first && wants_initial)
      layout.export_to(grads[slot], segment.row, p.grad_initial_s, p.grad_initial_z);
  };

#pragma omp parallel num_threads(p.num_threads)
  {
    Decay<T> decay(p, layout.feature_width);
    const BackwardWorker<Storage> worker(p, layout, decay, sums_of_encoders);
    if (!shares) {
      const std::int64_t rows = segments.rows_of_task();
#pragma omp for schedule(dynamic)
      for (std::int64_t first = 0; first < segments.rows(); first += rows) {
        const std::int64_t count = segments.count(first);
        for (std::int64_t i = 0; i + 1 < count && wants_states; ++i) {
          for (std::int64_t row = first; row < first + rows; ++row) {
            const Segment segment = segments.of_row(row, i);
            worker.sum_keys(Way::kToEnd, segment, states[segment.slot + 1]);
          }
        }
        for (std::int64_t row = first; row < first + rows; ++row) {
          if (wants_states) states.scan_forward(row, p.initial_s, p.initial_z, decay);
          layout.import(p.grad_final_s, p.grad_final_z, row,
                        grads[segments.first_slot(row) + count - 1]);
        }
        for (std::int64_t i = count - 1; i >= 0; --i) {
          for (std::int64_t row = first; row < first + rows; ++row)
            run(worker, segments.of_row(row, i), false);
        }
      }
    } else {
#pragma omp for schedule(dynamic)
      for (std::int64_t i = 0; i < segments.total(); ++i) {
        const Segment segment = segments.in_order(i);
        const std::int64_t slot = segment.slot;
        if (!segment.last && wants_states) worker.sum_keys(Way::kToEnd, segment, states[slot + 1]);
        if (!segment.first) worker.sum_queries(Way::kToStart, segment, grads[slot - 1]);
        if (!both_ways) continue;
        if (!segment.first) worker.sum_keys(Way::kToStart, segment, later[slot - 1]);
        if (!segment.last) worker.sum_queries(Way::kToEnd, segment, grads_before[slot + 1]);
      }
#pragma omp for schedule(static)
      for (std::int64_t row = 0; row < segments.rows(); ++row) {
        if (wants_states) states.scan_forward(row, p.initial_s, p.initial_z, decay);
        grads.scan_backward(row, p.grad_final_s, p.grad_final_z, decay);
        if (!both_ways) continue;
        later.scan_backward(row, nullptr, nullptr, decay);
        grads_before.scan_forward(row, nullptr, nullptr, decay);
      }
#pragma omp for schedule(dynamic)
      for (std::int64_t i = 0; i < segments.total(); ++i) run(worker, segments.in_order(i), true);
    }
  }
  if (sums_steps) store_constant_steps<T>(p, segments, step_sums);
  sums_of_encoders.store();
}

// Every query sees every key: all keys are in one state.
template <class Storage>
void backward_full(const LinearAttentionBackwardParams& p) {
  using T = core::accumulate_t<Storage>;
  const Segments queries(p, p.query_length), keys(p, p.key_length);
  const StateLayout<T> layout(p);
  const SumsOfEncoders<T> sums_of_encoders(p);
  const bool wants_queries = p.grad_q != nullptr || p.grad_denominator_q != nullptr;
  const bool wants_keys =
      p.grad_k != nullptr || p.grad_v != nullptr || p.grad_denominator_k != nullptr;
  const SegmentStates<T> key_sums(layout, keys), query_sums(layout, queries);
  Workspace<T> states(keys.rows() * layout.size()), grads(keys.rows() * layout.size());
#pragma omp parallel num_threads(p.num_threads)
  {
    Decay<T> decay(p, layout.feature_width);
    const BackwardWorker<Storage> worker(p, layout, decay, sums_of_encoders);
    if (wants_queries) {
#pragma omp for schedule(dynamic)
      for (std::int64_t i = 0; i < keys.total(); ++i) {
        const Segment segment = keys.in_order(i);
        worker.sum_keys(Way::kToEnd, segment, key_sums[segment.slot]);
      }
#pragma omp for schedule(static)
      for (std::int64_t row = 0; row < keys.rows(); ++row)
        key_sums.total(row, p.initial_s, p.initial_z, decay, states + row * layout.size());
    }
#pragma omp for schedule(dynamic)
    for (std::int64_t i = 0; i < queries.total(); ++i) {
      const Segment segment = queries.in_order(i);
      worker.query_segment(segment, states + segment.row * layout.size(), query_sums[segment.slot]);
    }
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < keys.rows(); ++row) {
      T* grad = grads + row * layout.size();
      query_sums.total(row, p.grad_final_s, p.grad_final_z, decay, grad);
      layout.export_to(grad, row, p.grad_initial_s, p.grad_initial_z);
    }
    if (wants_keys) {
#pragma omp for schedule(dynamic)
      for (std::int64_t i = 0; i < keys.total(); ++i) {
        const Segment segment = keys.in_order(i);
        worker.key_segment(segment, grads + segment.row * layout.size());
      }
    }
  }
  sums_of_encoders.store();
}

}  // namespace

void linear_attention_backward(const LinearAttentionBackwardParams& p) {
  visit_storage(p.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    p.causal || p.decay_features > 0 ? backward_ordered<Storage>(p) : backward_full<Storage>(p);
  });
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
