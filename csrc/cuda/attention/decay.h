// A decay with one column for all features: what the tokens, chunks and segments of the chunked
// kernels fade by. In a chunk
//   from_start_i = exp(sum of the steps from the chunk's first token to i, inclusive),
//   to_end_i     = exp(sum of the steps after i),
//   between_ij   = exp(sum of the steps between i and j), whichever comes first.
// States that move forwards take their tokens with to_end and are read with from_start, those that
// move backwards the other way round; products within a chunk are multiplied by between. All are
// sums or products of the steps themselves in double, never differences or quotients of cumulative
// ones: steps may be -infinity.
#pragma once

#include "core/state.h"
#include "device_for.h"
#include "tokens.h"

namespace torch_spe::cuda::attention {

// log_decay in memory.
struct DecaySteps {
  const void* data = nullptr;  // [B, L, H, 1 or R], strided, float or double
  bool is_double = false;
  std::int64_t strides[4] = {};

  TORCH_SPE_DEVICE std::int64_t index(std::int64_t batch, std::int64_t n, std::int64_t head,
                                      std::int64_t r) const {
    return batch * strides[0] + n * strides[1] + head * strides[2] + r * strides[3];
  }
  TORCH_SPE_DEVICE double at(std::int64_t i) const {
    return is_double ? static_cast<const double*>(data)[i]
                     : static_cast<double>(static_cast<const float*>(data)[i]);
  }
  TORCH_SPE_DEVICE double at(std::int64_t batch, std::int64_t n, std::int64_t head,
                             std::int64_t r) const {
    return at(index(batch, n, head, r));
  }
};

template <class T>
struct NoDecay {
  static constexpr bool kFades = false;

  TORCH_SPE_DEVICE core::Passage<T> over_chunk(std::int64_t, std::int64_t) const { return {}; }
  TORCH_SPE_DEVICE core::Passage<T> to_chunk(std::int64_t, std::int64_t, bool) const { return {}; }
  TORCH_SPE_DEVICE core::Passage<T> over_segment(std::int64_t, std::int64_t) const { return {}; }
  template <int kTokens, class Storage, class Operand>
  TORCH_SPE_DEVICE void load_added(const Tokens<Storage>& tokens, const Part& chunk,
                                   std::int64_t head, bool, std::int64_t r0, std::int64_t features,
                                   Operand* out) const {
    tokens.template load_x<kTokens, kWide>(chunk, head, r0, features, out);
  }
};

template <class T>
struct ColumnDecay {
  static constexpr bool kFades = true;
  DecaySteps steps;
  std::int64_t length = 0, heads = 0;
  T* from_start = nullptr;     // [B, L, H]
  T* to_end = nullptr;         // [B, L, H]
  double* sums = nullptr;      // [slot, H], of a chunk's steps
  T* over_chunks = nullptr;    // [slot, H], exp of that
  T* before_chunks = nullptr;  // [slot, H], from the segment's start to the chunk's, or null
  T* after_chunks = nullptr;   // [slot, H], from the chunk's end to the segment's, or null
  T* over_segments = nullptr;  // [segment slot, H]

  TORCH_SPE_DEVICE std::int64_t index(std::int64_t batch, std::int64_t n, std::int64_t head) const {
    return (batch * length + n) * heads + head;
  }
  // The token's factor when it reads what moves forwards (backwards).
  TORCH_SPE_DEVICE T reading(std::int64_t i, bool backwards) const {
    return backwards ? to_end[i] : from_start[i];
  }
  TORCH_SPE_DEVICE core::Passage<T> over_chunk(std::int64_t slot, std::int64_t head) const {
    return {over_chunks + slot * heads + head, 0};
  }
  // The token's factor when it is added to a state that moves forwards (backwards).
  TORCH_SPE_DEVICE T adding(std::int64_t i, bool backwards) const {
    return backwards ? from_start[i] : to_end[i];
  }
  // From the segment's start to the chunk's or, backwards, from the segment's end to the chunk's.
  TORCH_SPE_DEVICE core::Passage<T> to_chunk(std::int64_t slot, std::int64_t head,
                                             bool backwards) const {
    return {(backwards ? after_chunks : before_chunks) + slot * heads + head, 0};
  }
  TORCH_SPE_DEVICE core::Passage<T> over_segment(std::int64_t slot, std::int64_t head) const {
    return {over_segments + slot * heads + head, 0};
  }
  // X of a chunk's tokens with what they fade by when they are added to a state.
  template <int kTokens, class Storage, class Operand>
  TORCH_SPE_DEVICE void load_added(const Tokens<Storage>& tokens, const Part& chunk,
                                   std::int64_t head, bool backwards, std::int64_t r0,
                                   std::int64_t features, Operand* out) const {
    tokens.template load_x<kTokens, kWide>(
        chunk, head, r0, features, out,
        Added{(backwards ? from_start : to_end) + index(chunk.batch, chunk.begin, head),
              static_cast<int>(heads)});
  }

 private:
  struct Added {
    const T* factors;
    int stride;
    template <class>
    TORCH_SPE_DEVICE T factor(int row) const {
      return factors[row * stride];
    }
  };
};

// The factors of a chunk's tokens, and of the chunk; also the zero that stands for queries where
// there are none. A warp takes a chunk of a head, a lane two tokens.
template <class T>
__global__ void __launch_bounds__(kThreads)
    chunk_factors_kernel(const ColumnDecay<T> decay, const Cut chunks, std::uint64_t* zero) {
  static_assert(kChunk<T> <= 64);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * (kThreads / 32) + thread / 32;
  if (i == 0 && lane == 0) *zero = 0;
  if (i >= chunks.slots() * decay.heads) return;
  const std::int64_t head = i % decay.heads;
  const Part chunk(chunks, i / decay.heads);
  const auto step_to = [&](int row) {
    return row < chunk.size ? decay.steps.at(chunk.batch, chunk.begin + row, head, 0) : 0.0;
  };
  const double first = step_to(2 * lane), second = step_to(2 * lane + 1);
  double sum = first + second, before = 0, after = 0;  // of the lane, of those on either side
  TORCH_SPE_UNROLL
  for (int offset = 1; offset < 32; offset *= 2) {
    const double other = shuffle_xor(sum, offset);
    if ((lane & offset) != 0) {
      before += other;
    } else {
      after += other;
    }
    sum += other;
  }
  const auto store = [&](int row, double from_start, double to_end) {
    if (row >= chunk.size) return;
    const std::int64_t at = decay.index(chunk.batch, chunk.begin + row, head);
    decay.from_start[at] = static_cast<T>(core::exp_nonpositive(from_start));
    decay.to_end[at] = static_cast<T>(core::exp_nonpositive(to_end));
  };
  store(2 * lane, before + first, second + after);
  store(2 * lane + 1, before + first + second, after);
  if (lane != 0) return;
  decay.sums[i] = sum;
  decay.over_chunks[i] = static_cast<T>(core::exp_nonpositive(sum));
}

// What the way to each chunk of a segment fades by, from the segment's start and from its end,
// where these are not null; returns the sum of all steps. Sums of chunks and factors are `stride`
// apart.
template <class T>
TORCH_SPE_DEVICE double make_ways_to_chunks(const double* sums, std::int64_t count,
                                            std::int64_t stride, T* before, T* after) {
  constexpr int kAtOnce = 8;  // sums that are read before the first factor is written
  const auto pass = [&](std::int64_t first, std::int64_t step, T* factors) {
    double sum = 0;
    std::int64_t at = first;
    TORCH_SPE_KEEP_LOOP
    for (std::int64_t j = 0; j < count; j += kAtOnce) {
      double own[kAtOnce];
      TORCH_SPE_UNROLL
      for (int a = 0; a < kAtOnce; ++a) own[a] = j + a < count ? sums[at + a * step] : 0.0;
      TORCH_SPE_UNROLL
      for (int a = 0; a < kAtOnce; ++a, at += step) {
        if (factors != nullptr && j + a < count)
          factors[at] = static_cast<T>(core::exp_nonpositive(sum));
        sum += own[a];
      }
    }
    return sum;
  };
  if (after != nullptr) pass((count - 1) * stride, -stride, after);
  return pass(0, stride, before);
}

// The factors of a segment, and of the way from its ends to its chunks.
template <class T>
struct SegmentFactors {
  ColumnDecay<T> decay;
  Cut chunks, segments;

  TORCH_SPE_DEVICE void operator()(std::int64_t i) const {
    const Part segment(segments, i / decay.heads);
    const std::int64_t chunk =
        chunks.first_slot(segment.sequence) + segment.number * (segments.size / chunks.size);
    const std::int64_t first = chunk * decay.heads + i % decay.heads;
    const bool wanted = decay.before_chunks != nullptr;
    const double sum =
        make_ways_to_chunks(decay.sums + first, ceil_div(segment.size, chunks.size), decay.heads,
                            wanted ? decay.before_chunks + first : nullptr,
                            wanted ? decay.after_chunks + first : nullptr);
    decay.over_segments[i] = static_cast<T>(core::exp_nonpositive(sum));
  }
};

template <class T>
void make_decay_factors(const ColumnDecay<T>& decay, const Cut& chunks, const Cut& segments,
                        std::uint64_t* zero, Stream stream) {
  const std::int64_t blocks = ceil_div(chunks.slots() * decay.heads, kThreads / 32);
  if (blocks > 0)
    launch(chunk_factors_kernel<T>, grid_of(blocks), dim3(kThreads), 0, stream, decay, chunks,
           zero);
  for_each_index(segments.slots() * decay.heads, SegmentFactors<T>{decay, chunks, segments},
                 stream);
}

// The factors between the tokens of a chunk, in shared memory; nothing without a decay. They may
// lie where an operand of the same type is made of them. Rows are `kRow` apart: by default so that
// pairs which lanes hold of a product are read without conflicts.
template <class Operand>
constexpr int kRowOfFactors =
    sizeof(Operand) == 2 ? kChunk<Operand> + 8 : row_of<Operand>(kChunk<Operand>);
template <class Decay, class Operand, int kFactorRow = kRowOfFactors<Operand>>
struct Between {
  using T = core::accumulate_t<Operand>;
  static constexpr int kTokens = kChunk<Operand>;
  static constexpr bool kInPlace = sizeof(Operand) == sizeof(T);
  static constexpr int kRow = kFactorRow;
  T* factors;     // [token, token]
  double* steps;  // [token], exp of each step

  TORCH_SPE_INLINE explicit Between(MemoryLayout& layout)
      : Between(layout, layout.take<T>(Decay::kFades ? kTokens * kRow : 0)) {}
  TORCH_SPE_INLINE Between(MemoryLayout& layout, T* place)
      : factors(place), steps(layout.take<double>(Decay::kFades ? kTokens : 0)) {}
  // With the factors in the place of `weights` [token, token], if possible.
  TORCH_SPE_INLINE static Between over(MemoryLayout& layout, Operand* weights) {
    if constexpr (kInPlace) {
      return Between(layout, reinterpret_cast<T*>(weights));
    } else {
      return Between(layout);
    }
  }

  // All threads take part; a barrier must follow. One step for all tokens gives every chunk of a
  // walk the same factors, which are made for the first one.
  TORCH_SPE_DEVICE void fill(const Decay& decay, const Part& chunk, std::int64_t head,
                             bool is_first) const {
    const bool is_constant = !kInPlace && decay.steps.strides[1] == 0;
    if (is_constant && !is_first) return;
    const int own = static_cast<int>(threadIdx.x) % kTokens;
    const int part = static_cast<int>(threadIdx.x) / kTokens;
    if (part == 0) {
      steps[own] =
          own < chunk.size || is_constant
              ? core::exp_nonpositive(decay.steps.at(chunk.batch, chunk.begin + own, head, 0))
              : 1.0;
    }
    __syncthreads();
    // A column each: downwards from the diagonal, or upwards.
    double factor = 1;
    if (part == 0) {
      factors[own * kRow + own] = 1;
      for (int i = own + 1; i < kTokens; ++i) {
        factor *= steps[i];
        factors[i * kRow + own] = static_cast<T>(factor);
      }
    } else if (part == 1) {
      for (int i = own - 1; i >= 0; --i) {
        factor *= steps[i + 1];
        factors[i * kRow + own] = static_cast<T>(factor);
      }
    }
  }
};

template <class T>
struct Converted {
  const double* from;
  T* to;

  TORCH_SPE_DEVICE void operator()(std::int64_t i) const { to[i] = static_cast<T>(from[i]); }
};

// Of `count` rows of `size` doubles, writes each row or, for a step that is the same everywhere,
// their sum, in the type of log_decay.
inline void write_decay_gradient(const double* from, std::int64_t count, std::int64_t size,
                                 bool is_sum, core::DType type, void* to, Stream stream) {
  const auto write_as = [&](auto* out) {
    using T = std::remove_pointer_t<decltype(out)>;
    if (is_sum) {
      sum_parts<double, T>(from, count, size, out, stream);
    } else {
      for_each_index(count * size, Converted<T>{from, out}, stream);
    }
  };
  if (type == core::DType::kFloat64) {
    write_as(static_cast<double*>(to));
  } else {
    write_as(static_cast<float*>(to));
  }
}

}  // namespace torch_spe::cuda::attention
