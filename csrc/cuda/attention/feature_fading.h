// A decay with a factor for each feature: what chunks, segments and the tokens of a chunk fade by.
//
// A chunk has four sub-chunks. A warp has the tokens of one, a lane one feature of all of these, in
// registers: products of the steps' factors run through the tokens there. Two tokens of a
// chunk meet in the middle of the smallest block of 2, 4, 8, ... tokens that holds both, between
// its halves: with
//   heads_i = exp(sum of the steps from the middle to i, inclusive)   of the later half's tokens
//   tails_j = exp(sum of the steps after j up to the middle)          of the earlier half's
// what lies between them is heads_i tails_j, each at most 1. So products within a chunk are those
// of later tokens with their heads and earlier ones with their tails, level by level of such
// blocks, and steps may be -infinity: nothing is divided or subtracted.
#pragma once

#include <cmath>

#include "decay.h"

namespace torch_spe::cuda::attention {

constexpr int kSubs = kThreads / 32;  // sub-chunks of a chunk

// exp(step), of no more bits than operands have.
template <class Operand, class T>
TORCH_SPE_DEVICE T factor_of_step(T step) {
  if constexpr (sizeof(Operand) == 2 || std::is_same_v<Operand, Tf32>) {
    return fast_exp(step);
  } else {
    return core::exp_nonpositive(step);
  }
}

// Exchanges two sets of values in registers.
template <int kSize, class T>
TORCH_SPE_DEVICE void exchange(T (&a)[kSize], T (&b)[kSize]) {
  TORCH_SPE_UNROLL
  for (int i = 0; i < kSize; ++i) {
    const T value = a[i];
    a[i] = b[i];
    b[i] = value;
  }
}

// The sub-chunk and feature of a thread.
template <class Operand>
struct SubChunk {
  using T = core::accumulate_t<Operand>;
  static constexpr int kTokens = kChunk<Operand>, kSize = kTokens / kSubs;
  int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  int first = warp * kSize;  // of its tokens in the chunk
  std::int64_t batch, head, begin;
  int count;  // tokens

  TORCH_SPE_DEVICE SubChunk(const Part& chunk, std::int64_t of_head)
      : batch(chunk.batch),
        head(of_head),
        begin(chunk.begin + first),
        count(static_cast<int>(max_of(0, min_of(kSize, chunk.size - first)))) {}

  // X of its tokens, 0 behind the end.
  template <class Storage>
  TORCH_SPE_DEVICE void load_x(const Tokens<Storage>& tokens, std::int64_t r, std::int64_t features,
                               T (&out)[kSize]) const {
    const int end = r < features ? count : 0;
    std::uint32_t inside = (std::uint32_t(1) << end) - 1;  // the tokens, a bit each
    if (tokens.padding != nullptr) {
      TORCH_SPE_KEEP_LOOP
      for (int t = 0; t < end; ++t) {
        if (tokens.padding[batch * tokens.length + begin + t]) inside &= ~(std::uint32_t(1) << t);
      }
    }
    // What is mapped to 0.
    const T outside = tokens.map == core::FeatureMap::kElu ? -static_cast<T>(INFINITY) : T(0);
    const Storage* from = tokens.x + batch * tokens.x_strides[0] + begin * tokens.x_strides[1] +
                          head * tokens.x_strides[2] + r * tokens.x_strides[3];
    if (inside == (std::uint32_t(1) << kSize) - 1) {
      TORCH_SPE_UNROLL
      for (int t = 0; t < kSize; ++t, from += tokens.x_strides[1]) out[t] = read(*from);
    } else {
      TORCH_SPE_UNROLL
      for (int t = 0; t < kSize; ++t, from += tokens.x_strides[1])
        out[t] = (inside >> t) % 2 == 1 ? read(*from) : outside;
    }
    if (tokens.map == core::FeatureMap::kElu) {
      TORCH_SPE_UNROLL
      for (int t = 0; t < kSize; ++t) out[t] = map_elu<Storage>(out[t]);
    } else if (tokens.map == core::FeatureMap::kRelu) {
      TORCH_SPE_UNROLL
      for (int t = 0; t < kSize; ++t)
        out[t] = core::apply_feature_map<core::FeatureMap::kRelu>(out[t]);
    }
    if (tokens.factors == nullptr) return;
    const RowFactors<T>* own = tokens.factors + tokens.index(batch, begin, head);
    TORCH_SPE_UNROLL
    for (int t = 0; t < kSize; ++t, own += tokens.heads) {
      const T scale = t < count ? own->scale : T(0);
      out[t] *= scale;
    }
  }

  // The factors of the steps to its tokens, 1 behind the end.
  TORCH_SPE_DEVICE void load_factors(const DecaySteps& steps, std::int64_t r, std::int64_t features,
                                     T (&out)[kSize]) const {
    const std::int64_t first_step = batch * steps.strides[0] + begin * steps.strides[1] +
                                    head * steps.strides[2] + r * steps.strides[3];
    const int end = r < features ? count : 0;
    const auto load = [&](const auto* from) {
      from += first_step;
      if (end == kSize) {
        TORCH_SPE_UNROLL
        for (int t = 0; t < kSize; ++t, from += steps.strides[1]) out[t] = static_cast<T>(*from);
      } else {
        TORCH_SPE_UNROLL
        for (int t = 0; t < kSize; ++t, from += steps.strides[1])
          out[t] = t < end ? static_cast<T>(*from) : T(0);
      }
    };
    if (steps.is_double) {
      load(static_cast<const double*>(steps.data));
    } else {
      load(static_cast<const float*>(steps.data));
    }
    TORCH_SPE_UNROLL
    for (int t = 0; t < kSize; ++t) out[t] = factor_of_step<Operand>(out[t]);
  }

  // Calls take(token, factor) with the heads (tails) of tokens kBegin .. kBegin + kCount - 1 times
  // `times`, which lies between these and the middle. Factors are made again at every call, or they
  // would be kept in registers.
  template <int kBegin, int kCount, class Take>
  TORCH_SPE_DEVICE static void take_heads(const T (&factors)[kSize], T times, const Take& take) {
    T product = read_again(times);
    TORCH_SPE_UNROLL
    for (int t = kBegin; t < kBegin + kCount; ++t) {
      product *= factors[t];
      take(t, product);
    }
  }
  template <int kBegin, int kCount, class Take>
  TORCH_SPE_DEVICE static void take_tails(const T (&factors)[kSize], T times, const Take& take) {
    T product = read_again(times);
    TORCH_SPE_UNROLL
    for (int t = kBegin + kCount - 1; t >= kBegin; --t) {
      take(t, product);
      product *= factors[t];
    }
  }

  // Writes X with heads (tails) to a tile of operands; `out` is where the thread's first token
  // goes.
  TORCH_SPE_DEVICE static void write_heads(const T (&factors)[kSize], T times, const T (&x)[kSize],
                                           Operand* out, int row) {
    take_heads<0, kSize>(factors, times,
                         [&](int t, T factor) { write(x[t] * factor, out + t * row); });
  }
  TORCH_SPE_DEVICE static void write_tails(const T (&factors)[kSize], T times, const T (&x)[kSize],
                                           Operand* out, int row) {
    take_tails<0, kSize>(factors, times,
                         [&](int t, T factor) { write(x[t] * factor, out + t * row); });
  }
  // The levels of blocks of two sub-chunks and of four, with what tokens in the outer ones fade by
  // over the inner ones.
  TORCH_SPE_DEVICE void write_near(const T (&factors)[kSize], const T (&later)[kSize],
                                   const T (&earlier)[kSize], Operand* out, int row) const {
    if (warp % 2 == 1) {
      write_heads(factors, T(1), later, out, row);
    } else {
      write_tails(factors, T(1), earlier, out, row);
    }
  }
  TORCH_SPE_DEVICE void write_far(const T (&factors)[kSize], const T (&over_inner)[2],
                                  const T (&later)[kSize], const T (&earlier)[kSize], Operand* out,
                                  int row) const {
    if (warp >= 2) {
      write_heads(factors, warp == 3 ? over_inner[1] : T(1), later, out, row);
    } else {
      write_tails(factors, warp == 0 ? over_inner[0] : T(1), earlier, out, row);
    }
  }
  // The levels of blocks within the sub-chunk, whose halves have kSize / 2, ..., 2, 1 tokens, each
  // in a tile `tile` elements from the one before.
  template <int kHalf = kSize / 2, int kBegin = 0>
  TORCH_SPE_DEVICE static void write_within(const T (&factors)[kSize], const T (&later)[kSize],
                                            const T (&earlier)[kSize], Operand* out, int row,
                                            int tile) {
    take_tails<kBegin, kHalf>(factors, T(1),
                              [&](int t, T factor) { write(earlier[t] * factor, out + t * row); });
    take_heads<kBegin + kHalf, kHalf>(
        factors, T(1), [&](int t, T factor) { write(later[t] * factor, out + t * row); });
    if constexpr (kBegin + 2 * kHalf < kSize) {
      write_within<kHalf, kBegin + 2 * kHalf>(factors, later, earlier, out, row, tile);
    } else if constexpr (kHalf > 1) {
      write_within<kHalf / 2, 0>(factors, later, earlier, out + tile, row, tile);
    }
  }
};

template <class T>
struct FeatureDecay {
  static constexpr bool kFades = true;
  DecaySteps steps;
  Cut chunks{};
  std::int64_t heads = 0, features = 0;
  std::int64_t width = 0;      // features, and factors of 1 up to a multiple of kWide
  T* over_subs = nullptr;      // [slot, H, kSubs, width], over sub-chunks
  double* sums = nullptr;      // [slot, H, width], of a chunk's steps
  T* over_chunks = nullptr;    // [slot, H, width], exp of that
  T* before_chunks = nullptr;  // [slot, H, width], from the segment's start to the chunk's
  T* after_chunks = nullptr;   // [slot, H, width], from the chunk's end to the segment's
  T* over_segments = nullptr;  // [segment slot, H, width]

  TORCH_SPE_DEVICE core::Passage<T> over_chunk(std::int64_t slot, std::int64_t head) const {
    return {over_chunks + (slot * heads + head) * width, 1};
  }
  TORCH_SPE_DEVICE core::Passage<T> to_chunk(std::int64_t slot, std::int64_t head,
                                             bool backwards) const {
    return {(backwards ? after_chunks : before_chunks) + (slot * heads + head) * width, 1};
  }
  TORCH_SPE_DEVICE core::Passage<T> over_segment(std::int64_t slot, std::int64_t head) const {
    return {over_segments + (slot * heads + head) * width, 1};
  }
  TORCH_SPE_DEVICE const T* over_subs_of(std::int64_t slot, std::int64_t head,
                                         std::int64_t r) const {
    return over_subs + (slot * heads + head) * kSubs * width + r;
  }
  // From the chunk's start to a sub-chunk's, and from the sub-chunk's end to the chunk's.
  TORCH_SPE_DEVICE T before_sub(const T* over, int sub) const {
    T factor = 1;
    TORCH_SPE_UNROLL
    for (int i = 0; i < kSubs - 1; ++i) {
      if (i < sub) factor *= over[i * width];
    }
    return factor;
  }
  TORCH_SPE_DEVICE T after_sub(const T* over, int sub) const {
    T factor = 1;
    TORCH_SPE_UNROLL
    for (int i = kSubs - 1; i > 0; --i) {
      if (i > sub) factor *= over[i * width];
    }
    return factor;
  }

  // X of a chunk's tokens with what they fade by when they are added to a state.
  template <int kTokens, class Storage, class Operand>
  TORCH_SPE_DEVICE void load_added(const Tokens<Storage>& tokens, const Part& chunk,
                                   std::int64_t head, bool backwards, std::int64_t r0, std::int64_t,
                                   Operand* out) const {
    using Sub = SubChunk<Operand>;
    static_assert(Sub::kTokens == kTokens);
    constexpr int kRow = row_of<Operand>(kWide);
    const Sub sub(chunk, head);
    const std::int64_t slot = chunks.first_slot(chunk.sequence) + chunk.number;
    TORCH_SPE_KEEP_LOOP
    for (int column = sub.lane; column < kWide; column += 32) {
      const std::int64_t r = r0 + column;
      T x[Sub::kSize], factors[Sub::kSize];
      sub.load_x(tokens, r, features, x);
      sub.load_factors(steps, r, features, factors);
      const T* const over = over_subs_of(slot, head, r);
      Operand* const to = out + sub.first * kRow + column;
      if (backwards) {
        sub.write_heads(factors, before_sub(over, sub.warp), x, to, kRow);
      } else {
        sub.write_tails(factors, after_sub(over, sub.warp), x, to, kRow);
      }
    }
  }
};

// The factors of a chunk, of a head and feature; also the zero that stands for queries where there
// are none.
template <class T>
struct ChunkFeatureFactors {
  FeatureDecay<T> decay;
  std::uint64_t* zero;

  TORCH_SPE_DEVICE void operator()(std::int64_t i) const {
    if (i == 0) *zero = 0;
    const std::int64_t r = i % decay.width, unit = i / decay.width;
    const std::int64_t head = unit % decay.heads;
    const Part chunk(decay.chunks, unit / decay.heads);
    const int sub_size = static_cast<int>(decay.chunks.size / kSubs);
    const bool inside = r < decay.features;
    T* const over = decay.over_subs + unit * kSubs * decay.width + r;
    const std::int64_t first = decay.steps.index(chunk.batch, chunk.begin, head, r);
    const std::int64_t stride = decay.steps.strides[1];
    double sum = 0;
    // Loops are kept, or registers spill.
    TORCH_SPE_KEEP_LOOP
    for (int sub = 0; sub < kSubs; ++sub) {
      double part = 0;
      const int begin = sub * sub_size;
      const int end = inside ? static_cast<int>(min_of(chunk.size, begin + sub_size)) : 0;
      if (stride == 0 && begin < end) {
        part = decay.steps.at(first) * (end - begin);
      } else {
        TORCH_SPE_KEEP_LOOP
        for (int row = begin; row < end; ++row) part += decay.steps.at(first + row * stride);
      }
      over[sub * decay.width] = static_cast<T>(core::exp_nonpositive(part));
      sum += part;
    }
    decay.sums[i] = sum;
    decay.over_chunks[i] = static_cast<T>(core::exp_nonpositive(sum));
  }
};

// The factors of a segment, and of the way from its ends to its chunks.
template <class T>
struct SegmentFeatureFactors {
  FeatureDecay<T> decay;
  Cut segments;

  TORCH_SPE_DEVICE void operator()(std::int64_t i) const {
    const std::int64_t columns = decay.heads * decay.width;
    const Part segment(segments, i / columns);
    const Cut& chunks = decay.chunks;
    const std::int64_t chunk =
        chunks.first_slot(segment.sequence) + segment.number * (segments.size / chunks.size);
    const std::int64_t first = chunk * columns + i % columns;
    const double sum =
        make_ways_to_chunks(decay.sums + first, ceil_div(segment.size, chunks.size), columns,
                            decay.before_chunks + first, decay.after_chunks + first);
    decay.over_segments[i] = static_cast<T>(core::exp_nonpositive(sum));
  }
};

template <class T>
void make_decay_factors(const FeatureDecay<T>& decay, const Cut& segments, std::uint64_t* zero,
                        Stream stream) {
  const std::int64_t columns = decay.heads * decay.width;
  for_each_index(decay.chunks.slots() * columns, ChunkFeatureFactors<T>{decay, zero}, stream);
  for_each_index(segments.slots() * columns, SegmentFeatureFactors<T>{decay, segments}, stream);
}

}  // namespace torch_spe::cuda::attention
