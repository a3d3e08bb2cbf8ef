// Registers of a warp's 32 lanes, and functions applied to all of them.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "../machine.h"

namespace vgpu {
namespace {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using s8 = std::int8_t;
using s16 = std::int16_t;
using s32 = std::int32_t;
using s64 = std::int64_t;

#define EACH_LANE _Pragma("GCC ivdep") for (int l = 0; l < kLanes; ++l)

template <class T>
T* reg(Warp& w, u32 offset) {
  return reinterpret_cast<T*>(w.regs + offset);
}
u32& pred(Warp& w, u32 offset) { return *reg<u32>(w, offset); }

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Writes the lanes of a mask.
template <class T>
void put(T* to, const T* from, u32 mask) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(mask), _mm512_loadu_si512(from));
    _mm512_mask_storeu_epi32(to + 16, static_cast<__mmask16>(mask >> 16),
                             _mm512_loadu_si512(from + 16));
    return;
  } else if constexpr (sizeof(T) == 8) {
    for (int i = 0; i < 4; ++i)
      _mm512_mask_storeu_epi64(to + 8 * i, static_cast<__mmask8>(mask >> (8 * i)),
                               _mm512_loadu_si512(from + 8 * i));
    return;
  } else if constexpr (sizeof(T) == 2) {
    _mm512_mask_storeu_epi16(to, mask, _mm512_loadu_si512(from));
    return;
  }
#endif
  for (int l = 0; l < kLanes; ++l) {
    if (mask >> l & 1u) to[l] = from[l];
  }
}

// Bits from 32 bytes that are 0 or -1.
u32 pack(const s8 (&flags)[kLanes]) {
#if defined(__AVX2__)
  return static_cast<u32>(
      _mm256_movemask_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(flags))));
#else
  u32 mask = 0;
  for (int l = 0; l < kLanes; ++l) mask |= static_cast<u32>(flags[l] & 1) << l;
  return mask;
#endif
}

void put_pred(Warp& w, u32 offset, u32 value) {
  u32& p = pred(w, offset);
  p = (p & ~w.active) | (value & w.active);
}

// --- Elementwise ---

template <class F, class D, class A>
void unary(Warp& w, const Inst& in) {
  D* d = reg<D>(w, in.o[0]);
  const A* a = reg<A>(w, in.o[1]);
  if (w.active == kAll) {
    EACH_LANE d[l] = F::f(a[l]);
  } else {
    alignas(64) D t[kLanes];
    EACH_LANE t[l] = F::f(a[l]);
    put(d, t, w.active);
  }
}
template <class F, class D, class A, class B>
void binary(Warp& w, const Inst& in) {
  D* d = reg<D>(w, in.o[0]);
  const A* a = reg<A>(w, in.o[1]);
  const B* b = reg<B>(w, in.o[2]);
  if (w.active == kAll) {
    EACH_LANE d[l] = F::f(a[l], b[l]);
  } else {
    alignas(64) D t[kLanes];
    EACH_LANE t[l] = F::f(a[l], b[l]);
    put(d, t, w.active);
  }
}
template <class F, class D, class A, class B, class C>
void ternary(Warp& w, const Inst& in) {
  D* d = reg<D>(w, in.o[0]);
  const A* a = reg<A>(w, in.o[1]);
  const B* b = reg<B>(w, in.o[2]);
  const C* c = reg<C>(w, in.o[3]);
  if (w.active == kAll) {
    EACH_LANE d[l] = F::f(a[l], b[l], c[l]);
  } else {
    alignas(64) D t[kLanes];
    EACH_LANE t[l] = F::f(a[l], b[l], c[l]);
    put(d, t, w.active);
  }
}

}  // namespace
}  // namespace vgpu
