// Comparisons, predicates, and moves of parts of registers.
#pragma once

#include "lanes.h"

namespace vgpu {
namespace {

// --- Predicates ---

struct Eq {
  template <class T>
  static bool f(T a, T b) {
    return a == b;
  }
};
struct Ne {
  template <class T>
  static bool f(T a, T b) {
    return (a < b) || (a > b);
  }
};
struct Lt {
  template <class T>
  static bool f(T a, T b) {
    return a < b;
  }
};
struct Le {
  template <class T>
  static bool f(T a, T b) {
    return a <= b;
  }
};
struct Gt {
  template <class T>
  static bool f(T a, T b) {
    return a > b;
  }
};
struct Ge {
  template <class T>
  static bool f(T a, T b) {
    return a >= b;
  }
};
struct Equ {
  template <class T>
  static bool f(T a, T b) {
    return !((a < b) || (a > b));
  }
};
struct Neu {
  template <class T>
  static bool f(T a, T b) {
    return !(a == b);
  }
};
struct Ltu {
  template <class T>
  static bool f(T a, T b) {
    return !(a >= b);
  }
};
struct Leu {
  template <class T>
  static bool f(T a, T b) {
    return !(a > b);
  }
};
struct Gtu {
  template <class T>
  static bool f(T a, T b) {
    return !(a <= b);
  }
};
struct Geu {
  template <class T>
  static bool f(T a, T b) {
    return !(a < b);
  }
};
struct Num {
  template <class T>
  static bool f(T a, T b) {
    return a == a && b == b;
  }
};
struct Nan {
  template <class T>
  static bool f(T a, T b) {
    return a != a || b != b;
  }
};

template <class F, class T>
void setp(Warp& w, const Inst& in) {
  const T* a = reg<T>(w, in.o[1]);
  const T* b = reg<T>(w, in.o[2]);
  alignas(64) s8 flags[kLanes];
  EACH_LANE flags[l] = static_cast<s8>(-static_cast<int>(F::f(a[l], b[l])));
  const u32 result = pack(flags);
  put_pred(w, in.o[0], result);
  if (in.o[3] != 0) put_pred(w, in.o[3], ~result);
}
template <class F, class T, class Combine>
void setp_combined(Warp& w, const Inst& in) {
  const T* a = reg<T>(w, in.o[1]);
  const T* b = reg<T>(w, in.o[2]);
  alignas(64) s8 flags[kLanes];
  EACH_LANE flags[l] = static_cast<s8>(-static_cast<int>(F::f(a[l], b[l])));
  const u32 result = pack(flags);
  const u32 other = in.flags ? ~pred(w, in.o[4]) : pred(w, in.o[4]);
  put_pred(w, in.o[0], Combine::f(result, other));
  if (in.o[3] != 0) put_pred(w, in.o[3], Combine::f(~result, other));
}

template <class F>
void pred_binary(Warp& w, const Inst& in) {
  const u32 a = pred(w, in.o[1]) ^ (in.flags & 1 ? kAll : 0u);
  const u32 b = pred(w, in.o[2]) ^ (in.flags & 2 ? kAll : 0u);
  put_pred(w, in.o[0], F::f(a, b));
}
void pred_not(Warp& w, const Inst& in) { put_pred(w, in.o[0], ~pred(w, in.o[1])); }
void pred_mov(Warp& w, const Inst& in) { put_pred(w, in.o[0], pred(w, in.o[1])); }

template <class T>
void selp(Warp& w, const Inst& in) {
  alignas(64) T t[kLanes];
  std::memcpy(t, reg<T>(w, in.o[2]), sizeof t);
  put(t, reg<T>(w, in.o[1]), pred(w, in.o[3]) ^ (in.flags ? kAll : 0u));
  if (w.active == kAll) {
    std::memcpy(reg<T>(w, in.o[0]), t, sizeof t);
  } else {
    put(reg<T>(w, in.o[0]), t, w.active);
  }
}

// --- Moves of parts ---

template <class Part, class Whole>
void split(Warp& w, const Inst& in) {  // {o1, o2, ...} = o0
  const Whole* a = reg<Whole>(w, in.o[0]);
  constexpr int kBits = sizeof(Part) * 8;
  alignas(64) Whole source[kLanes];
  std::memcpy(source, a, sizeof source);
  for (int i = 0; i < in.vector; ++i) {
    if (in.o[1 + i] == 0) continue;
    alignas(64) Part t[kLanes];
    EACH_LANE t[l] = static_cast<Part>(source[l] >> (kBits * i));
    put(reg<Part>(w, in.o[1 + i]), t, w.active);
  }
}
template <class Part, class Whole>
void join(Warp& w, const Inst& in) {  // o0 = {o1, o2, ...}
  constexpr int kBits = sizeof(Part) * 8;
  alignas(64) Whole t[kLanes] = {};
  for (int i = 0; i < in.vector; ++i) {
    const Part* a = reg<Part>(w, in.o[1 + i]);
    EACH_LANE t[l] = static_cast<Whole>(t[l] | static_cast<Whole>(a[l]) << (kBits * i));
  }
  put(reg<Whole>(w, in.o[0]), t, w.active);
}

template <class T>
void bfi(Warp& w, const Inst& in) {  // o0 = o2 with the low bits of o1 at o3, o4 bits long
  const T *a = reg<T>(w, in.o[1]), *b = reg<T>(w, in.o[2]);
  const u32 *at = reg<u32>(w, in.o[3]), *length = reg<u32>(w, in.o[4]);
  alignas(64) T t[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const u32 n = length[l] & 255u, p = at[l] & 255u;
    const T ones = n >= sizeof(T) * 8 ? static_cast<T>(~T(0)) : static_cast<T>((T(1) << n) - 1);
    const T mask = Shl::f(ones, p);
    t[l] = static_cast<T>((b[l] & ~mask) | (Shl::f(a[l], p) & mask));
  }
  put(reg<T>(w, in.o[0]), t, w.active);
}
template <class T>
void bfe(Warp& w, const Inst& in) {
  using U = std::make_unsigned_t<T>;
  const U* a = reg<U>(w, in.o[1]);
  const u32 *at = reg<u32>(w, in.o[2]), *length = reg<u32>(w, in.o[3]);
  alignas(64) U t[kLanes];
  constexpr u32 kBits = sizeof(T) * 8;
  for (int l = 0; l < kLanes; ++l) {
    const u32 n = length[l] & 255u, p = at[l] & 255u;
    U r = 0;
    U sign = 0;
    if (std::is_signed_v<T> && n > 0) sign = a[l] >> std::min(p + n - 1, kBits - 1) & 1u;
    for (u32 i = 0; i < kBits; ++i) {
      const U bit = i < n && p + i < kBits ? a[l] >> (p + i) & 1u : sign;
      r |= static_cast<U>(bit << i);
    }
    t[l] = n == 0 ? 0 : r;
  }
  put(reg<U>(w, in.o[0]), t, w.active);
}
void lop3(Warp& w, const Inst& in) {
  const u32 *a = reg<u32>(w, in.o[1]), *b = reg<u32>(w, in.o[2]), *c = reg<u32>(w, in.o[3]);
  alignas(64) u32 t[kLanes] = {};
  for (int i = 0; i < 8; ++i) {
    if ((in.imm >> i & 1) == 0) continue;
    EACH_LANE t[l] |= (i & 4 ? a[l] : ~a[l]) & (i & 2 ? b[l] : ~b[l]) & (i & 1 ? c[l] : ~c[l]);
  }
  put(reg<u32>(w, in.o[0]), t, w.active);
}

}  // namespace
}  // namespace vgpu
