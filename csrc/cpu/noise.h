// Lines of generated noise, with the lanes of vectors as indices. The values are those of
// core/noise.h to the last bit.
#pragma once

#include "core/noise.h"
#include "simd.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace torch_spe::cpu::TORCH_SPE_ISA {

// Two vectors side by side: the generator is a long chain of dependent instructions, and two chains
// keep the processor twice as busy.
template <class V>
struct Twice {
  V a, b;
};
#define TORCH_SPE_TWICE(op)                                                        \
  template <class V>                                                               \
  TORCH_SPE_INLINE Twice<V> operator op(const Twice<V>& x, const Twice<V>& y) {    \
    return {x.a op y.a, x.b op y.b};                                               \
  }                                                                                \
  template <class V, class Number>                                                 \
  TORCH_SPE_INLINE Twice<V> operator op(const Twice<V>& x, const Number& number) { \
    return {x.a op number, x.b op number};                                         \
  }
TORCH_SPE_TWICE(^)
TORCH_SPE_TWICE(&)
TORCH_SPE_TWICE(+)
TORCH_SPE_TWICE(-)
TORCH_SPE_TWICE(*)
TORCH_SPE_TWICE(<<)
TORCH_SPE_TWICE(>>)
#undef TORCH_SPE_TWICE
TORCH_SPE_INLINE Twice<Vec<std::uint32_t>> operator-(std::uint32_t number,
                                                     const Twice<Vec<std::uint32_t>>& x) {
  return {number - x.a, number - x.b};
}

TORCH_SPE_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  for (std::int64_t i = 0; i < kLanes<float>; ++i) a[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return a;
#endif
}
TORCH_SPE_INLINE Vec<float> square_root(Vec<float> value) {
#if defined(__AVX512F__)
  // The zero-masking form with a full mask, here and below: the plain one raises a false warning
  // with some compilers.
  return _mm512_maskz_sqrt_ps(0xffff, value);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(value);
#else
  for (std::int64_t i = 0; i < kLanes<float>; ++i) value[i] = __builtin_sqrtf(value[i]);
  return value;
#endif
}
// Products of the lower halves of 64 bits each.
TORCH_SPE_INLINE Vec<std::uint64_t> multiply_halves(Vec<std::uint64_t> a, std::uint32_t b) {
#if defined(__AVX512F__)
  const Vec<std::uint64_t> factor = Vec<std::uint64_t>{} + b;
  return (Vec<std::uint64_t>)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)factor);
#elif defined(__AVX2__)
  return (Vec<std::uint64_t>)_mm256_mul_epu32((__m256i)a, (__m256i)(Vec<std::uint64_t>{} + b));
#else
  return (a & 0xffffffffu) * b;
#endif
}

// For core::normal_pair.
struct TwiceNumbers {
  using Word = Twice<Vec<std::uint32_t>>;
  using Int = Twice<Vec<std::int32_t>>;
  using Float = Twice<Vec<float>>;

  TORCH_SPE_INLINE static Float fma(const Float& x, const Float& y, const Float& z) {
    return {cpu::TORCH_SPE_ISA::fma(x.a, y.a, z.a), cpu::TORCH_SPE_ISA::fma(x.b, y.b, z.b)};
  }
  TORCH_SPE_INLINE static Float sqrt(const Float& x) {
    return {square_root(x.a), square_root(x.b)};
  }
  TORCH_SPE_INLINE static Float of(float value) {
    return {Vec<float>{} + value, Vec<float>{} + value};
  }
  TORCH_SPE_INLINE static Float to_float(const Int& x) {
    return {__builtin_convertvector(x.a, Vec<float>), __builtin_convertvector(x.b, Vec<float>)};
  }
  TORCH_SPE_INLINE static Int to_int(const Word& x) {
    return {(Vec<std::int32_t>)x.a, (Vec<std::int32_t>)x.b};
  }
  TORCH_SPE_INLINE static Word to_word(const Int& x) {
    return {(Vec<std::uint32_t>)x.a, (Vec<std::uint32_t>)x.b};
  }
  TORCH_SPE_INLINE static Word bits(const Float& x) {
    return {(Vec<std::uint32_t>)x.a, (Vec<std::uint32_t>)x.b};
  }
  TORCH_SPE_INLINE static Float from_bits(const Word& x) {
    return {(Vec<float>)x.a, (Vec<float>)x.b};
  }
};

// For core::philox: words are the lower halves of 64 bits, whatever stands in the upper ones, so
// that the lower half of a product needs no instruction.
struct HalfNumbers {
  using Word = Twice<Vec<std::uint64_t>>;

  TORCH_SPE_INLINE static void multiply(const Word& a, std::uint32_t b, Word* high, Word* low) {
    *low = {multiply_halves(a.a, b), multiply_halves(a.b, b)};
    *high = *low >> 32;
  }
};

struct VectorNumbers {
  using Word = Vec<std::uint32_t>;
};

// A call of the generator in each lane.
TORCH_SPE_INLINE core::Words<VectorNumbers> philox(const core::Words<VectorNumbers>& counter,
                                                   std::uint64_t key) {
  using Half = Vec<std::uint64_t>;
  core::Words<HalfNumbers> halves;
  for (int i = 0; i < 4; ++i) {
    const Half word = (Half)counter.word[i];
    halves.word[i] = {word, word >> 32};
  }
  halves = core::philox<HalfNumbers>(halves, key);
  core::Words<VectorNumbers> words;
  for (int i = 0; i < 4; ++i) {
    const auto& [even, odd] = halves.word[i];
    words.word[i] = (Vec<std::uint32_t>)((even & 0xffffffffu) | odd << 32);
  }
  return words;
}

// Within each 128 bits: a0 b0 a1 b1, and a2 b2 a3 b3.
TORCH_SPE_INLINE void interleave(Vec<float> a, Vec<float> b, Vec<float>* low, Vec<float>* high) {
#if defined(__AVX512F__)
  *low = _mm512_maskz_unpacklo_ps(0xffff, a, b);
  *high = _mm512_maskz_unpackhi_ps(0xffff, a, b);
#elif defined(__AVX2__)
  *low = _mm256_unpacklo_ps(a, b);
  *high = _mm256_unpackhi_ps(a, b);
#else
  *low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  *high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}
// The same with pairs: a0 a1 b0 b1, and a2 a3 b2 b3.
TORCH_SPE_INLINE void interleave_pairs(Vec<float> a, Vec<float> b, Vec<float>* low,
                                       Vec<float>* high) {
#if defined(__AVX512F__)
  *low = (Vec<float>)_mm512_maskz_unpacklo_pd(0xff, (__m512d)a, (__m512d)b);
  *high = (Vec<float>)_mm512_maskz_unpackhi_pd(0xff, (__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  *low = (Vec<float>)_mm256_unpacklo_pd((__m256d)a, (__m256d)b);
  *high = (Vec<float>)_mm256_unpackhi_pd((__m256d)a, (__m256d)b);
#else
  *low = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  *high = __builtin_shufflevector(a, b, 2, 3, 6, 7);
#endif
}

// A line of noise: one head and feature, consecutive periods along the last dimension, and `width`
// realizations from a first one on.
struct NoiseLine {
  core::NoiseKind kind;
  std::uint64_t seed;
  int ndim;
  std::int64_t head, feature;
  std::int64_t period[3];  // of the first row
  std::int64_t count;      // rows
  std::int64_t first;      // realization, a multiple of width
  std::int64_t width;      // realizations, a multiple of 4, at most 128
};

// Numbers that fill_normals may write beyond the end of the line.
constexpr std::int64_t kNoiseSlack = 4 * kLanes<float>;

TORCH_SPE_INLINE std::uint64_t position_of_row(const NoiseLine& line, std::int64_t row) {
  return core::noise_position(line.ndim, line.period[0], line.period[1], line.period[2] + row);
}

// out[i * width + r], Gaussian. Calls of Philox are numbered along the line, kLanes of them at a
// time, and sorted into the lanes so that a transposition within 128 bits puts the normals in
// order.
TORCH_SPE_INLINE void fill_normals(const NoiseLine& line, float* out) {
  using Word = Vec<std::uint32_t>;
  constexpr std::int64_t kCalls = kLanes<float>, kGroups = kCalls / 4;
  const std::int64_t per_row = line.width / 4;
  const std::uint32_t block =
      core::noise_block(static_cast<std::uint32_t>(line.kind), line.ndim, line.first / 4);
  const Word source = Word{} + core::noise_source(line.head, line.feature);
  std::uint32_t low[kCalls], high[kCalls], blocks[kCalls];
  for (std::int64_t call = 0; call < line.count * per_row; call += kCalls) {
    core::Words<VectorNumbers> counter;
    if (per_row == kCalls && call > 0) {  // a row at a time: only the position changes
      const std::uint64_t position = position_of_row(line, call / kCalls);
      counter = {{Word{} + static_cast<std::uint32_t>(position),
                  Word{} + static_cast<std::uint32_t>(position >> 32), source, load_vec(blocks)}};
    } else {
      for (std::int64_t lane = 0; lane < kCalls; ++lane) {
        const std::int64_t index = call + lane % 4 * kGroups + lane / 4;
        const std::uint64_t position = position_of_row(line, index / per_row);
        low[lane] = static_cast<std::uint32_t>(position);
        high[lane] = static_cast<std::uint32_t>(position >> 32);
        blocks[lane] = block + static_cast<std::uint32_t>(index % per_row);
      }
      counter = {{load_vec(low), load_vec(high), source, load_vec(blocks)}};
    }
    const core::Words<VectorNumbers> words = philox(counter, line.seed);
    Twice<Vec<float>> cosine, sine;
    core::normal_pair<TwiceNumbers>({words.word[0], words.word[2]}, {words.word[1], words.word[3]},
                                    &cosine, &sine);
    Vec<float> z0, z1, z2, z3, a, b, c, d;
    interleave(cosine.a, sine.a, &a, &b);
    interleave(cosine.b, sine.b, &c, &d);
    interleave_pairs(a, c, &z0, &z1);
    interleave_pairs(b, d, &z2, &z3);
    float* to = out + call * 4;
    store_vec(to, z0);
    store_vec(to + kCalls, z1);
    store_vec(to + 2 * kCalls, z2);
    store_vec(to + 3 * kCalls, z3);
  }
}

// out[i * width + r], signs. A call of Philox for each row, kLanes rows at a time; then a bit for
// each lane of a vector.
template <class T, class Bits>
TORCH_SPE_INLINE void fill_signs_as(const NoiseLine& line, T* out) {
  using Word = Vec<std::uint32_t>;
  constexpr std::int64_t kCalls = kLanes<float>;
  constexpr Bits kSign = Bits{1} << (8 * sizeof(T) - 1);
  const std::uint32_t block =
      core::noise_block(static_cast<std::uint32_t>(line.kind), line.ndim, line.first / 128);
  const Word source = Word{} + core::noise_source(line.head, line.feature);
  Bits lane_bits[kLanes<T>];
  for (std::int64_t lane = 0; lane < kLanes<T>; ++lane) lane_bits[lane] = Bits{1} << lane;
  const Vec<Bits> lanes = load_vec(lane_bits);
  for (std::int64_t row = 0; row < line.count; row += kCalls) {
    std::uint32_t low[kCalls], high[kCalls];
    for (std::int64_t i = 0; i < kCalls; ++i) {
      const std::uint64_t position = position_of_row(line, row + i);
      low[i] = static_cast<std::uint32_t>(position);
      high[i] = static_cast<std::uint32_t>(position >> 32);
    }
    const core::Words<VectorNumbers> words =
        philox({{load_vec(low), load_vec(high), source, Word{} + block}}, line.seed);
    std::uint32_t word[4][kCalls];
    for (int i = 0; i < 4; ++i) store_vec(word[i], words.word[i]);
    for (std::int64_t i = 0; i < min_of(kCalls, line.count - row); ++i) {
      for (std::int64_t r = 0; r < line.width; r += kLanes<T>) {
        const std::int64_t bit = line.first % 128 + r;
        const Bits bits = word[bit / 32][i] >> (bit % 32);
        const Vec<Bits> negative = (Vec<Bits>)(((Vec<Bits>{} + bits) & lanes) != 0);
        store_vec(out + (row + i) * line.width + r,
                  (Vec<T>)((Vec<Bits>)(Vec<T>{} + T(1)) | (negative & kSign)));
      }
    }
  }
}
TORCH_SPE_INLINE void fill_signs(const NoiseLine& line, float* out) {
  fill_signs_as<float, std::uint32_t>(line, out);
}
TORCH_SPE_INLINE void fill_signs(const NoiseLine& line, double* out) {
  fill_signs_as<double, std::uint64_t>(line, out);
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
