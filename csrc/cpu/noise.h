// Lines of generated noise, with the lanes of vectors as indices. The numbers are those of
// core/noise.h to the last bit.
#pragma once

#include "core/noise.h"
#include "simd.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace torch_spe::cpu::TORCH_SPE_ISA {

struct VectorNumbers {
  using Word = Vec<std::uint32_t>;
  using Int = Vec<std::int32_t>;
  using Float = Vec<float>;
  using Pair = Vec<std::uint64_t>;

#if defined(__AVX512F__)
  TORCH_SPE_INLINE static void multiply(Word a, std::uint32_t b, Word* high, Word* low) {
    // Zero-masking forms with a full mask: the plain ones raise false warnings with some compilers.
    const __m512i factor = (__m512i)(Word{} + b);
    const Pair even = (Pair)_mm512_maskz_mul_epu32(0xff, (__m512i)a, factor);
    const Pair odd = (Pair)_mm512_maskz_mul_epu32(0xff, (__m512i)((Pair)a >> 32), factor);
    *high = (Word)_mm512_mask_blend_epi32(0xaaaa, (__m512i)(even >> 32), (__m512i)odd);
    *low = (Word)_mm512_mask_blend_epi32(0xaaaa, (__m512i)even, (__m512i)(odd << 32));
  }
  TORCH_SPE_INLINE static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  TORCH_SPE_INLINE static Float sqrt(Float value) { return _mm512_maskz_sqrt_ps(0xffff, value); }
#elif defined(__AVX2__)
  TORCH_SPE_INLINE static void multiply(Word a, std::uint32_t b, Word* high, Word* low) {
    const __m256i factor = (__m256i)(Word{} + b);
    const Pair even = (Pair)_mm256_mul_epu32((__m256i)a, factor);
    const Pair odd = (Pair)_mm256_mul_epu32((__m256i)((Pair)a >> 32), factor);
    *high = (Word)_mm256_blend_epi32((__m256i)(even >> 32), (__m256i)odd, 0xaa);
    *low = (Word)_mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0xaa);
  }
  TORCH_SPE_INLINE static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  TORCH_SPE_INLINE static Float sqrt(Float value) { return _mm256_sqrt_ps(value); }
#else
  TORCH_SPE_INLINE static void multiply(Word a, std::uint32_t b, Word* high, Word* low) {
    for (std::int64_t i = 0; i < kLanes<float>; ++i) {
      const std::uint64_t product = static_cast<std::uint64_t>(a[i]) * b;
      (*high)[i] = static_cast<std::uint32_t>(product >> 32);
      (*low)[i] = static_cast<std::uint32_t>(product);
    }
  }
  TORCH_SPE_INLINE static Float fma(Float a, Float b, Float c) {
    for (std::int64_t i = 0; i < kLanes<float>; ++i) a[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return a;
  }
  TORCH_SPE_INLINE static Float sqrt(Float value) {
    for (std::int64_t i = 0; i < kLanes<float>; ++i) value[i] = __builtin_sqrtf(value[i]);
    return value;
  }
#endif
  TORCH_SPE_INLINE static Float of(float value) { return Float{} + value; }
  TORCH_SPE_INLINE static Float to_float(Int value) {
    return __builtin_convertvector(value, Float);
  }
  TORCH_SPE_INLINE static Int to_int(Word value) { return (Int)value; }
  TORCH_SPE_INLINE static Word to_word(Int value) { return (Word)value; }
  TORCH_SPE_INLINE static Word bits(Float value) { return (Word)value; }
  TORCH_SPE_INLINE static Float from_bits(Word bits) { return (Float)bits; }
};

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
    const core::Words<VectorNumbers> words = core::philox<VectorNumbers>(counter, line.seed);
    Vec<float> z0, z1, z2, z3, a, b, c, d;
    core::normal_pair<VectorNumbers>(words.word[0], words.word[1], &z0, &z1);
    core::normal_pair<VectorNumbers>(words.word[2], words.word[3], &z2, &z3);
    interleave(z0, z1, &a, &b);
    interleave(z2, z3, &c, &d);
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
    const core::Words<VectorNumbers> words = core::philox<VectorNumbers>(
        {{load_vec(low), load_vec(high), source, Word{} + block}}, line.seed);
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
