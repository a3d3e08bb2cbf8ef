// White noise from a counter: every number is a function of a seed and of its index alone, so it
// need not be stored, and is the same in the backward pass, in any tiling, on any device.
//
// The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as
// 1, 2, 3", 2011). Its key is the 64-bit seed. Its counter is
//   words 0, 1  the position: one 64-bit integer in one dimension, two of 32 bits in two (word 0
//               the last one), three of 21 bits in three (the last one in the lowest bits), all in
//               two's complement;
//   word 2      head * 2^16 + feature;
//   word 3      the block of realizations in the lowest 24 bits, the number of dimensions in the
//               next 4, the purpose (NoiseKind, or one of those below it) in the highest 4.
// A block is 4 realizations of Gaussian noise, one from each word (a pair of words makes a pair of
// normals), or 128 of Rademacher noise, one from each bit, the lowest first; a set bit is -1.
//
// Everything here is computed with integers, and with float32 additions, products, fused
// multiply-adds and square roots, all of which round correctly everywhere; no plain product meets a
// plain sum that a compiler could fuse. So Gaussian noise too is the same to the last bit on every
// machine.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "platform.h"

namespace torch_spe::core {

enum class NoiseKind : std::uint32_t { kGaussian = 0, kRademacher = 1 };
constexpr std::uint32_t kShiftPurpose = 2, kPhasePurpose = 3;  // the latter: core/codes.h

// Limits of the index.
constexpr std::int64_t kMaxNoiseHeads = 1 << 16;
constexpr std::int64_t kMaxNoiseFeatures = 1 << 16;
constexpr std::int64_t kMaxNoiseRealizations = std::int64_t{1} << 26;
// Positions lie in [-2^(bits-1), 2^(bits-1)).
TORCH_SPE_INLINE int noise_position_bits(int ndim) { return ndim == 1 ? 62 : ndim == 2 ? 32 : 21; }

TORCH_SPE_INLINE std::int64_t realizations_of_block(NoiseKind kind) {
  return kind == NoiseKind::kGaussian ? 4 : 128;
}

TORCH_SPE_INLINE std::uint64_t noise_position(int ndim, std::int64_t i0, std::int64_t i1,
                                              std::int64_t i2) {
  const auto u0 = static_cast<std::uint64_t>(i0), u1 = static_cast<std::uint64_t>(i1),
             u2 = static_cast<std::uint64_t>(i2);
  if (ndim == 1) return u2;
  if (ndim == 2) return (u1 << 32) | (u2 & 0xffffffffu);
  return (u0 & 0x1fffffu) << 42 | (u1 & 0x1fffffu) << 21 | (u2 & 0x1fffffu);
}
TORCH_SPE_INLINE std::uint32_t noise_source(std::int64_t head, std::int64_t feature) {
  return static_cast<std::uint32_t>(head << 16 | feature);
}
TORCH_SPE_INLINE std::uint32_t noise_block(std::uint32_t purpose, int ndim, std::int64_t block) {
  return purpose << 28 | static_cast<std::uint32_t>(ndim) << 24 | static_cast<std::uint32_t>(block);
}

// What the generator needs of the type that it computes with: here one number, in cpu/noise.h a
// vector of them.
struct ScalarNumbers {
  using Word = std::uint32_t;
  using Int = std::int32_t;
  using Float = float;

  TORCH_SPE_INLINE static void multiply(Word a, std::uint32_t b, Word* high, Word* low) {
#if defined(__CUDA_ARCH__)
    std::uint64_t product;  // nvcc would also multiply b with the upper half of a, which is 0
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
#else
    const std::uint64_t product = static_cast<std::uint64_t>(a) * b;
#endif
    *high = static_cast<Word>(product >> 32);
    *low = static_cast<Word>(product);
  }
  TORCH_SPE_INLINE static Float of(float value) { return value; }
  TORCH_SPE_INLINE static Float to_float(Int value) { return static_cast<float>(value); }
  TORCH_SPE_INLINE static Int to_int(Word value) { return static_cast<Int>(value); }
  TORCH_SPE_INLINE static Word to_word(Int value) { return static_cast<Word>(value); }
  TORCH_SPE_INLINE static Word bits(Float value) { return float_to_bits(value); }
  TORCH_SPE_INLINE static Float from_bits(Word bits) { return bits_to_float(bits); }
  TORCH_SPE_INLINE static Float fma(Float a, Float b, Float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
  }
  TORCH_SPE_INLINE static Float sqrt(Float value) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(value);
#else
    return __builtin_sqrtf(value);
#endif
  }
};

template <class Numbers>
struct Words {
  typename Numbers::Word word[4];
};

// Word i; a GPU would put an array that is indexed by a variable into memory.
TORCH_SPE_INLINE std::uint32_t word_of(const Words<ScalarNumbers>& words, std::int64_t i) {
  return i == 0 ? words.word[0] : i == 1 ? words.word[1] : i == 2 ? words.word[2] : words.word[3];
}

template <class Numbers>
TORCH_SPE_INLINE Words<Numbers> philox(Words<Numbers> counter, std::uint64_t key) {
  using Word = typename Numbers::Word;
  std::uint32_t key0 = static_cast<std::uint32_t>(key);
  std::uint32_t key1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    Word high0, low0, high1, low1;
    Numbers::multiply(counter.word[0], 0xd2511f53u, &high0, &low0);
    Numbers::multiply(counter.word[2], 0xcd9e8d57u, &high1, &low1);
    counter = {{high1 ^ counter.word[1] ^ key0, low1, high0 ^ counter.word[3] ^ key1, low0}};
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return counter;
}

// Two independent normals from two words, by the method of Box and Muller: radius sqrt(-2 ln u)
// with u in (0, 1] from 31 bits of the first, so that normals reach 6.66, and the angle from 25
// bits of the second. Polynomials from the Cephes library (S. Moshier), logf and sinf/cosf.
template <class Numbers>
TORCH_SPE_INLINE void normal_pair(typename Numbers::Word w0, typename Numbers::Word w1,
                                  typename Numbers::Float* z0, typename Numbers::Float* z1) {
  using Word = typename Numbers::Word;
  using Int = typename Numbers::Int;
  using Float = typename Numbers::Float;

  // 2^31 u = 2^exponent * mantissa with the mantissa in [sqrt(1/2), sqrt(2)).
  const Word u = Numbers::bits(Numbers::to_float(Numbers::to_int(w0 >> 1)) + Numbers::of(0.5f));
  const Int exponent = Numbers::to_int(u - 0x3f3504f3u) >> 23;
  const Float f = Numbers::from_bits(u - (Numbers::to_word(exponent) << 23)) - Numbers::of(1.0f);
  Float p = Numbers::of(7.0376836292e-2f);
  p = Numbers::fma(p, f, Numbers::of(-1.1514610310e-1f));
  p = Numbers::fma(p, f, Numbers::of(1.1676998740e-1f));
  p = Numbers::fma(p, f, Numbers::of(-1.2420140846e-1f));
  p = Numbers::fma(p, f, Numbers::of(1.4249322787e-1f));
  p = Numbers::fma(p, f, Numbers::of(-1.6668057665e-1f));
  p = Numbers::fma(p, f, Numbers::of(2.0000714765e-1f));
  p = Numbers::fma(p, f, Numbers::of(-2.4999993993e-1f));
  p = Numbers::fma(p, f, Numbers::of(3.3333331174e-1f));
  const Float square = f * f;
  const Float tail = Numbers::fma(Numbers::of(-0.5f), square, p * (f * square));
  const Float log_u =
      Numbers::fma(Numbers::to_float(exponent - 31), Numbers::of(0.693147180559945f), f + tail);
  const Float radius = Numbers::sqrt(Numbers::of(-2.0f) * log_u);

  // A quarter turn from the two highest bits; within it an odd multiple of 2^-23 of an eighth.
  const Float odd = Numbers::to_float((Numbers::to_int(w1 << 2) >> 9) * 2 + 1);
  const Float angle = odd * Numbers::of(9.36267571e-8f);  // pi/4 * 2^-23
  const Float angle2 = angle * angle;
  Float s = Numbers::of(-1.9515295891e-4f);
  s = Numbers::fma(s, angle2, Numbers::of(8.3321608736e-3f));
  s = Numbers::fma(s, angle2, Numbers::of(-1.6666654611e-1f));
  s = Numbers::fma(s, angle2 * angle, angle);
  Float c = Numbers::of(2.443315711809948e-5f);
  c = Numbers::fma(c, angle2, Numbers::of(-1.388731625493765e-3f));
  c = Numbers::fma(c, angle2, Numbers::of(4.166664568298827e-2f));
  c = Numbers::fma(c, angle2 * angle2, Numbers::fma(Numbers::of(-0.5f), angle2, Numbers::of(1.0f)));
  const Word quarter = w1 >> 30;
  const Word cos_bits = Numbers::bits(radius * c), sin_bits = Numbers::bits(radius * s);
  const Word swap = (cos_bits ^ sin_bits) & (0u - (quarter & 1u));
  *z0 = Numbers::from_bits((cos_bits ^ swap) ^ (((quarter + 1u) & 2u) << 30));
  *z1 = Numbers::from_bits((sin_bits ^ swap) ^ ((quarter & 2u) << 30));
}

// The noise of one index; i0 and i1 are 0 in fewer dimensions.
TORCH_SPE_INLINE float noise_value(NoiseKind kind, std::uint64_t seed, int ndim, std::int64_t i0,
                                   std::int64_t i1, std::int64_t i2, std::int64_t head,
                                   std::int64_t feature, std::int64_t realization) {
  const std::uint64_t position = noise_position(ndim, i0, i1, i2);
  const std::int64_t block = realization / realizations_of_block(kind);
  const Words<ScalarNumbers> words = philox<ScalarNumbers>(
      {{static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(position >> 32),
        noise_source(head, feature), noise_block(static_cast<std::uint32_t>(kind), ndim, block)}},
      seed);
  if (kind == NoiseKind::kRademacher) {
    const std::int64_t bit = realization % 128;
    return (word_of(words, bit / 32) >> (bit % 32) & 1u) != 0 ? -1.0f : 1.0f;
  }
  const std::int64_t pair = realization % 4 / 2;
  float z0, z1;
  normal_pair<ScalarNumbers>(word_of(words, 2 * pair), word_of(words, 2 * pair + 1), &z0, &z1);
  return realization % 2 == 0 ? z0 : z1;
}

// Polyphase noise has strides s0, s1, s2, one for each dimension. Along a dimension, a realization
// of class c has noise at the positions j with (j + shift) mod s == c only: one in each period
// floor((j + shift) / s), and the noise there, times the square root of s0 s1 s2, is that of the
// index with periods in place of positions. Realization r has the classes r mod s2,
// (r / s2) mod s1 and (r / (s1 s2)) mod s0. Dense noise has strides of 1, and positions are
// periods.
//
// The shift of a head and feature, in [0, s) in each dimension.
TORCH_SPE_INLINE void noise_shift(std::uint64_t seed, int ndim, std::int64_t head,
                                  std::int64_t feature, const std::int64_t stride[3],
                                  std::int64_t shift[3]) {
  const Words<ScalarNumbers> words = philox<ScalarNumbers>(
      {{0, 0, noise_source(head, feature), noise_block(kShiftPurpose, ndim, 0)}}, seed);
  for (int i = 0; i < 3; ++i) {
    shift[i] = static_cast<std::int64_t>(
        static_cast<std::uint64_t>(words.word[i]) * static_cast<std::uint64_t>(stride[i]) >> 32);
  }
}

TORCH_SPE_INLINE std::int64_t floor_divide(std::int64_t a, std::int64_t b) {
  return a / b - (a % b != 0 && (a < 0) != (b < 0) ? 1 : 0);
}
TORCH_SPE_INLINE std::int64_t floor_modulo(std::int64_t a, std::int64_t b) {
  return a - floor_divide(a, b) * b;
}

}  // namespace torch_spe::core
