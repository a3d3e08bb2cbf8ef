// Linear attention, backward: what is done in which order and shared among threads.
#include "backward_worker.h"
#include "linear_attention.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {
namespace {

template <class Storage>
void backward_causal(const LinearAttentionBackwardParams& p) {
  using T = core::accumulate_t<Storage>;
  const Segments segments(p, p.query_length);
  const StateLayout<T> layout(p);
  const bool wants_states = p.grad_q != nullptr || p.grad_denominator_q != nullptr;
  const bool wants_initial = p.grad_initial_s != nullptr || p.grad_initial_z != nullptr;
  const bool has_initial = p.initial_s != nullptr, has_final = p.grad_final_s != nullptr;
  const bool shares = segments.worth_sharing_rows();
  const SegmentStates<T> states(layout, segments);  // before each segment
  const SegmentStates<T> grads(layout, segments);   // of the states after each segment

  // The gradients of a segment, and that of the state before it for the segment before it, unless
  // that is known already.
  const auto run = [&](const BackwardWorker<Storage>& worker, std::int64_t slot, bool is_known) {
    const Segment segment = segments.of_slot(slot);
    T* grad_start = nullptr;
    if (segment.first && wants_initial) grad_start = grads[slot];
    if (!segment.first && !is_known) grad_start = grads[slot - 1];
    worker.causal_segment(segment, segment.first && !has_initial ? nullptr : states[slot],
                          segment.last && !has_final ? nullptr : grads[slot], grad_start);
    if (segment.first && wants_initial)
      layout.export_to(grads[slot], segment.row, p.grad_initial_s, p.grad_initial_z);
  };

#pragma omp parallel num_threads(p.num_threads)
  {
    const BackwardWorker<Storage> worker(p, layout);
    if (!shares) {
#pragma omp for schedule(dynamic)
      for (std::int64_t row = 0; row < segments.rows(); ++row) {
        const std::int64_t begin = segments.first_slot(row), end = begin + segments.count(row);
        if (wants_states) {
          for (std::int64_t slot = begin; slot + 1 < end; ++slot)
            worker.sum_keys(segments.of_slot(slot), states[slot + 1]);
          states.scan_forward(row, p.initial_s, p.initial_z);
        }
        layout.import(p.grad_final_s, p.grad_final_z, row, grads[end - 1]);
        for (std::int64_t slot = end - 1; slot >= begin; --slot) run(worker, slot, false);
      }
    } else {
#pragma omp for schedule(dynamic)
      for (std::int64_t slot = 0; slot < segments.total(); ++slot) {
        const Segment segment = segments.of_slot(slot);
        if (!segment.last && wants_states) worker.sum_keys(segment, states[slot + 1]);
        if (!segment.first) worker.sum_queries(segment, grads[slot - 1]);
      }
#pragma omp for schedule(static)
      for (std::int64_t row = 0; row < segments.rows(); ++row) {
        if (wants_states) states.scan_forward(row, p.initial_s, p.initial_z);
        grads.scan_backward(row, p.grad_final_s, p.grad_final_z);
      }
#pragma omp for schedule(dynamic)
      for (std::int64_t slot = 0; slot < segments.total(); ++slot) run(worker, slot, true);
    }
  }
}

template <class Storage>
void backward_full(const LinearAttentionBackwardParams& p) {
  using T = core::accumulate_t<Storage>;
  const Segments queries(p, p.query_length), keys(p, p.key_length);
  const StateLayout<T> layout(p);
  const bool wants_queries = p.grad_q != nullptr || p.grad_denominator_q != nullptr;
  const bool wants_keys =
      p.grad_k != nullptr || p.grad_v != nullptr || p.grad_denominator_k != nullptr;
  const SegmentStates<T> key_sums(layout, keys), query_sums(layout, queries);
  Workspace<T> states(keys.rows() * layout.size()), grads(keys.rows() * layout.size());
#pragma omp parallel num_threads(p.num_threads)
  {
    const BackwardWorker<Storage> worker(p, layout);
    if (wants_queries) {
#pragma omp for schedule(dynamic)
      for (std::int64_t slot = 0; slot < keys.total(); ++slot)
        worker.sum_keys(keys.of_slot(slot), key_sums[slot]);
#pragma omp for schedule(static)
      for (std::int64_t row = 0; row < keys.rows(); ++row)
        key_sums.total(row, p.initial_s, p.initial_z, states + row * layout.size());
    }
#pragma omp for schedule(dynamic)
    for (std::int64_t slot = 0; slot < queries.total(); ++slot) {
      const Segment segment = queries.of_slot(slot);
      worker.query_segment(segment, states + segment.row * layout.size(), query_sums[slot]);
    }
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < keys.rows(); ++row) {
      T* grad = grads + row * layout.size();
      query_sums.total(row, p.grad_final_s, p.grad_final_z, grad);
      layout.export_to(grad, row, p.grad_initial_s, p.grad_initial_z);
    }
    if (wants_keys) {
#pragma omp for schedule(dynamic)
      for (std::int64_t slot = 0; slot < keys.total(); ++slot) {
        const Segment segment = keys.of_slot(slot);
        worker.key_segment(segment, grads + segment.row * layout.size());
      }
    }
  }
}

}  // namespace

void linear_attention_backward(const LinearAttentionBackwardParams& p) {
  visit_storage(p.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    p.causal ? backward_causal<Storage>(p) : backward_full<Storage>(p);
  });
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
