// The kernel of the gradient of a decay with one column for all features where all tokens are seen;
// step_terms.h is for causal attention.
//
// The step of token t fades every weight of a pair with one token before t and one at or after it.
// With a set of tokens whose states move forwards (before) and one whose states move backwards
// (after), the gradient is the sum over these pairs, in a chunk
//   dg_t = sum_(i >= t) past_i + sum_(j < t) future_j + sum_(i >= t > j) M_ij + passing
//   past_i   = after i with the state of `before` at the chunk's start
//   future_j = before j with the state of `after` at the chunk's end
//   M_ij     = between_ij (Y_i Y_j + w_i w_j) X_i X_j
//   passing  = what passes over the chunk: the product of these two states.
// Nothing is subtracted, so nothing cancels, and no diagonal enters.
#pragma once

#include "states.h"

namespace torch_spe::cuda::attention {

// Reads the state that belongs to a row's chunk: that at its segment's start (end), carried over
// `passage`, joined with that of the segment's tokens before (after) it.
template <class T>
class StateReader {
 public:
  TORCH_SPE_DEVICE StateReader(const States<T>& states, const Cut& chunks, const Cut& segments,
                               std::int64_t slot, const Part& chunk, std::int64_t head,
                               const core::Passage<T>& passage)
      : features_(states.features), values_(states.values), passage_(passage) {
    const std::int64_t size = states.features * states.values;
    const std::int64_t a = slot * states.heads + head;
    const std::int64_t segment =
        segments.first_slot(chunk.sequence) + chunk.number * chunks.size / segments.size;
    const std::int64_t b = segment * states.heads + head;
    s_ = states.chunk_s + a * size;
    s_before_ = states.segment_s + b * size;
    if (states.segment_z != nullptr) {
      z_ = states.chunk_z + a * states.features;
      z_before_ = states.segment_z + b * states.features;
    }
    aligned_ = rows_are_aligned<T>(s_, values_) && rows_are_aligned<T>(s_before_, values_);
  }
  // S[r, e .. e + 3], 0 outside.
  TORCH_SPE_DEVICE void s(std::int64_t r, std::int64_t e, T (&out)[4]) const {
    if (r >= features_) {
      TORCH_SPE_UNROLL
      for (int i = 0; i < 4; ++i) out[i] = 0;
      return;
    }
    four(s_ + r * values_ + e, e, out);
    T before[4];
    four(s_before_ + r * values_ + e, e, before);
    TORCH_SPE_UNROLL
    for (int i = 0; i < 4; ++i) out[i] = core::join(passage_, r, before[i], out[i]);
  }
  // z[r], 0 outside.
  TORCH_SPE_DEVICE T z(std::int64_t r) const {
    if (r >= features_ || z_ == nullptr) return T(0);
    return core::join(passage_, r, z_before_[r], z_[r]);
  }

 private:
  TORCH_SPE_DEVICE void four(const T* from, std::int64_t e, T (&out)[4]) const {
    if (aligned_ && e + 4 <= values_) {
      struct alignas(16) Four {
        T elements[4];
      };
      const Four read = *reinterpret_cast<const Four*>(from);
      TORCH_SPE_UNROLL
      for (int i = 0; i < 4; ++i) out[i] = read.elements[i];
    } else {
      TORCH_SPE_UNROLL
      for (int i = 0; i < 4; ++i) out[i] = e + i < values_ ? from[i] : T(0);
    }
  }

  const T *s_, *s_before_, *z_ = nullptr, *z_before_ = nullptr;
  std::int64_t features_, values_;
  core::Passage<T> passage_;
  bool aligned_;
};

template <class Operand, class Decay>
struct DecayGradientShared {
  using T = core::accumulate_t<Operand>;
  static constexpr int kTokens = kChunk<Operand>;
  static constexpr int kParts = 8;  // threads that have elements of a row
  // Of factors, so that a thread each may add up rows.
  static constexpr int kFactorRow = sizeof(Operand) == 2 ? kTokens + 1 : row_of<Operand>(kTokens);
  Operand* row_x;  // [row, r or e]
  Operand* col_x;  // [column, r or e]
  Operand* state;  // [r, e]
  Operand* y;      // [row, e]
  T* z;            // [r]
  T* parts;        // [row, kParts]
  T* z_parts;      // [thread]
  T* row_weight;   // [row]
  T* col_weight;   // [column]
  double* past;    // [row]
  double* future;  // [column]
  double* sums;    // [thread]
  Between<Decay, Operand, kFactorRow> between;

  TORCH_SPE_INLINE explicit DecayGradientShared(MemoryLayout& layout)
      : row_x(layout.take<Operand>(kTokens * row_of<Operand>(kDeep))),
        col_x(layout.take<Operand>(kTokens * row_of<Operand>(kDeep))),
        state(layout.take<Operand>(kDeep * row_of<Operand>(kWide))),
        y(layout.take<Operand>(kTokens * row_of<Operand>(kWide))),
        z(layout.take<T>(kDeep)),
        parts(layout.take<T>(kTokens * kParts)),
        z_parts(layout.take<T>(kThreads)),
        row_weight(layout.take<T>(kTokens)),
        col_weight(layout.take<T>(kTokens)),
        past(layout.take<double>(kTokens)),
        future(layout.take<double>(kTokens)),
        sums(layout.take<double>(kThreads)),
        between(layout) {}
};

// Where gradients of steps go: those of tokens, or sums over chunks for a step that is the same
// everywhere.
struct StepGradients {
  double* of_tokens = nullptr;  // [B, L, H], or null
  double* of_chunks = nullptr;  // [slot, H], or null
  bool adds = false;            // to what is there
};

template <class Storage, class Operand, class Decay>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    decay_gradient_kernel(const Tokens<Storage> after, const Tokens<Storage> before,
                          const Cut chunks, const Cut segments,
                          const States<core::accumulate_t<Storage>> states_before,
                          const States<core::accumulate_t<Storage>> states_after, const Decay decay,
                          const StepGradients out) {
  using T = core::accumulate_t<Storage>;
  using Shared = DecayGradientShared<Operand, Decay>;
  constexpr int kTokens = kChunk<Operand>;
  constexpr int kPerRow = kThreads / kTokens;  // threads that share the sums over z
  using Wide = TileProduct<Operand, kTokens, kWide>;
  using Square = TileProduct<Operand, kTokens, kTokens>;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const Shared shared(layout);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t heads = states_before.heads;
  const std::int64_t features = states_before.features, values = states_before.values;
  const std::int64_t head = blockIdx.x % heads, slot = blockIdx.x / heads;
  const Part chunk(chunks, slot);
  double* const chunk_sum =
      out.of_chunks == nullptr ? nullptr : out.of_chunks + slot * heads + head;
  if (chunk.size == 0) {
    if (chunk_sum != nullptr && thread == 0 && !out.adds) *chunk_sum = 0;
    return;
  }
  const StateReader<T> state_before(states_before, chunks, segments, slot, chunk, head,
                                    decay.to_chunk(slot, head, false));
  const StateReader<T> state_after(states_after, chunks, segments, slot, chunk, head,
                                   decay.to_chunk(slot, head, true));
  if (thread < kTokens) {
    const bool inside = thread < chunk.size;
    const std::int64_t n = chunk.begin + thread;
    shared.row_weight[thread] = inside ? after.weight_of(chunk.batch, n, head) : T(0);
    shared.col_weight[thread] = inside ? before.weight_of(chunk.batch, n, head) : T(0);
  }
  shared.between.fill(decay, chunk, head, true);

  // M, in the place of the factors.
  {
    Square xs, ys;
    xs.clear();
    ys.clear();
    for (std::int64_t r0 = 0; r0 < features; r0 += kDeep) {
      __syncthreads();  // the tiles before have been used
      after.template load_x<kTokens, kDeep>(chunk, head, r0, features, shared.row_x);
      before.template load_x<kTokens, kDeep>(chunk, head, r0, features, shared.col_x);
      __syncthreads();
      xs.template multiply<kDeep, Major::kDepth, Major::kDepth>(shared.row_x, shared.col_x);
    }
    for (std::int64_t e0 = 0; e0 < values; e0 += kDeep) {
      __syncthreads();
      after.template load_y<kTokens, kDeep>(chunk, head, e0, values, shared.row_x);
      before.template load_y<kTokens, kDeep>(chunk, head, e0, values, shared.col_x);
      __syncthreads();
      ys.template multiply<kDeep, Major::kDepth, Major::kDepth>(shared.row_x, shared.col_x);
    }
    T* const m = shared.between.factors;
    ys.for_each([&](int row, int column, T value) {
      m[row * shared.between.kRow + column] *=
          value + shared.row_weight[row] * shared.col_weight[column];
    });
    xs.for_each(
        [&](int row, int column, T value) { m[row * shared.between.kRow + column] *= value; });
  }

  // What each row reads from a state, times its own Y and weight.
  const int own_row = thread / kPerRow, own_part = thread % kPerRow;
  const int own_column = Wide::kTensorCores ? thread / 32 % 2 * 4 + thread % 4 : thread % 8;
  const auto read = [&](const Tokens<Storage>& rows, const StateReader<T>& reader, const T* weights,
                        bool backwards, double* sums) {
    Wide product;
    T z_sum = 0;
    const auto own = [&](int row) { return shared.parts + row * Shared::kParts + own_column; };
    __syncthreads();  // the parts before have been used
    product.for_each_row([&](int row) {
      *own(row) = 0;
      return [](int, T) {};
    });
    for (std::int64_t e0 = 0; e0 == 0 || e0 < values; e0 += kWide) {
      product.clear();
      for (std::int64_t r0 = 0; r0 < features; r0 += kDeep) {
        __syncthreads();  // the tiles before have been used
        rows.template load_x<kTokens, kDeep>(chunk, head, r0, features, shared.row_x);
        if (values > 0) {
          load_state<kDeep, kWide>(
              shared.state, [&](int r, int e, T(&four)[4]) { reader.s(r0 + r, e0 + e, four); });
          if (r0 == 0) rows.template load_y<kTokens, kWide>(chunk, head, e0, values, shared.y);
        }
        if (e0 == 0 && thread < kDeep) shared.z[thread] = reader.z(r0 + thread);
        __syncthreads();
        if (values > 0)
          product.template multiply<kDeep, Major::kDepth, Major::kOuter>(shared.row_x,
                                                                         shared.state);
        if (e0 == 0) {
          for (int r = own_part; r < kDeep; r += kPerRow)
            z_sum += number_of(shared.row_x[own_row * row_of<Operand>(kDeep) + r]) * shared.z[r];
        }
      }
      if (values == 0) continue;
      product.for_each_row([&](int row) {
        T* const sum = own(row);
        const Operand* const y = shared.y + row * row_of<Operand>(kWide);
        return [=](int column, T value) { *sum += value * number_of(y[column]); };
      });
    }
    shared.z_parts[thread] = z_sum;
    __syncthreads();
    if (thread >= kTokens) return;
    double sum = 0;
    for (int i = 0; i < Shared::kParts; ++i)
      sum += static_cast<double>(shared.parts[thread * Shared::kParts + i]);
    for (int i = 0; i < kPerRow; ++i)
      sum += static_cast<double>(weights[thread] * shared.z_parts[thread * kPerRow + i]);
    sums[thread] = 0;
    if (thread < chunk.size) {
      const std::int64_t i = decay.index(chunk.batch, chunk.begin + thread, head);
      sums[thread] = sum * static_cast<double>(decay.reading(i, backwards));
    }
  };
  read(after, state_before, shared.row_weight, false, shared.past);
  read(before, state_after, shared.col_weight, true, shared.future);

  double passing = 0;
  const std::int64_t fours = ceil_div(values, 4);
  for (std::int64_t i = thread; i < features * fours; i += kThreads) {
    T a[4], b[4];
    state_before.s(i / fours, i % fours * 4, a);
    state_after.s(i / fours, i % fours * 4, b);
    TORCH_SPE_UNROLL
    for (int e = 0; e < 4; ++e) passing += static_cast<double>(a[e]) * static_cast<double>(b[e]);
  }
  for (std::int64_t r = thread; r < features; r += kThreads)
    passing += static_cast<double>(state_before.z(r)) * static_cast<double>(state_after.z(r));
  shared.sums[thread] = passing;
  __syncthreads();
  if (thread < kTokens) {
    double sum = 0;
    for (int i = 0; i < kThreads; ++i) sum += shared.sums[i];
    sum *= static_cast<double>(decay.over_chunk(slot, head).factor(0));
    for (int i = thread; i < kTokens; ++i) {
      sum += shared.past[i];
      for (int j = 0; j < thread; ++j)
        sum += static_cast<double>(shared.between.factors[i * shared.between.kRow + j]);
    }
    for (int j = 0; j < thread; ++j) sum += shared.future[j];
    if (out.of_tokens != nullptr && thread < chunk.size) {
      double* const to = out.of_tokens + decay.index(chunk.batch, chunk.begin + thread, head);
      *to = out.adds ? *to + sum : sum;
    }
    passing = thread < chunk.size ? sum : 0;
  }
  if (chunk_sum == nullptr) return;
  __syncthreads();  // the sums have been used
  if (thread < kTokens) shared.sums[thread] = passing;
  __syncthreads();
  if (thread > 0) return;
  double sum = 0;
  for (int i = 0; i < kTokens; ++i) sum += shared.sums[i];
  *chunk_sum = out.adds ? *chunk_sum + sum : sum;
}

template <class Operand, class Storage, class Decay, class T = core::accumulate_t<Storage>>
void make_decay_gradient(const Tokens<Storage>& after, const Tokens<Storage>& before,
                         const Cut& chunks, const Cut& segments, const States<T>& states_before,
                         const States<T>& states_after, const Decay& decay,
                         const StepGradients& out, Stream stream) {
  const std::int64_t blocks = chunks.slots() * states_before.heads;
  if (blocks == 0) return;
  MemoryLayout size;
  DecayGradientShared<Operand, Decay>{size};
  launch(decay_gradient_kernel<Storage, Operand, Decay>, grid_of(blocks), dim3(kThreads),
         size.size(), stream, after, before, chunks, segments, states_before, states_after, decay,
         out);
}

}  // namespace torch_spe::cuda::attention
