// Accesses to global, shared and parameter memory, and asynchronous copies.
#pragma once

#include "control.h"

namespace vgpu {
namespace {

// --- Memory ---

// Addresses of the lanes: register and offset.
void addresses(Warp& w, const Inst& in, u64 (&out)[kLanes]) {
  const u64* a = reg<u64>(w, in.o[0]);
  const u64 offset = static_cast<u64>(static_cast<s64>(in.imm));
  EACH_LANE out[l] = a[l] + offset;
}
void addresses(Warp& w, const Inst& in, u32 (&out)[kLanes]) {
  const u32* a = reg<u32>(w, in.o[0]);
  const u32 offset = static_cast<u32>(in.imm);
  EACH_LANE out[l] = a[l] + offset;
}

template <class M, class D>
void load_global(Warp& w, const Inst& in) {
  if (w.active == 0) return;
  alignas(64) u64 a[kLanes];
  addresses(w, in, a);
  w.block->check_global(w, in, a, static_cast<u32>(sizeof(M)) * in.vector, false);
  for (int v = 0; v < in.vector; ++v) {
    D* d = reg<D>(w, in.o[1 + v]);
    for (u32 m = w.active; m != 0; m &= m - 1) {
      const int l = __builtin_ctz(m);
      M number;
      std::memcpy(&number,
                  reinterpret_cast<const void*>(a[l] + sizeof(M) * static_cast<unsigned>(v)),
                  sizeof number);
      d[l] = static_cast<D>(number);
    }
  }
}
template <class M, class S>
void store_global(Warp& w, const Inst& in) {
  if (w.active == 0) return;
  alignas(64) u64 a[kLanes];
  addresses(w, in, a);
  w.block->check_global(w, in, a, static_cast<u32>(sizeof(M)) * in.vector, true);
  for (int v = 0; v < in.vector; ++v) {
    const S* s = reg<S>(w, in.o[1 + v]);
    for (u32 m = w.active; m != 0; m &= m - 1) {
      const int l = __builtin_ctz(m);
      const M number = static_cast<M>(s[l]);
      std::memcpy(reinterpret_cast<void*>(a[l] + sizeof(M) * static_cast<unsigned>(v)), &number,
                  sizeof number);
    }
  }
}
template <class M, class D>
void load_shared(Warp& w, const Inst& in) {
  if (w.active == 0) return;
  alignas(64) u32 a[kLanes];
  addresses(w, in, a);
  w.block->check_shared(w, in, a, static_cast<u32>(sizeof(M)) * in.vector, false);
  const u8* base = w.block->shared - kSharedBase;
  for (int v = 0; v < in.vector; ++v) {
    D* d = reg<D>(w, in.o[1 + v]);
    for (u32 m = w.active; m != 0; m &= m - 1) {
      const int l = __builtin_ctz(m);
      M number;
      std::memcpy(&number, base + a[l] + sizeof(M) * static_cast<unsigned>(v), sizeof number);
      d[l] = static_cast<D>(number);
    }
  }
}
template <class M, class S>
void store_shared(Warp& w, const Inst& in) {
  if (w.active == 0) return;
  alignas(64) u32 a[kLanes];
  addresses(w, in, a);
  w.block->check_shared(w, in, a, static_cast<u32>(sizeof(M)) * in.vector, true);
  u8* base = w.block->shared - kSharedBase;
  for (int v = 0; v < in.vector; ++v) {
    const S* s = reg<S>(w, in.o[1 + v]);
    for (u32 m = w.active; m != 0; m &= m - 1) {
      const int l = __builtin_ctz(m);
      const M number = static_cast<M>(s[l]);
      std::memcpy(base + a[l] + sizeof(M) * static_cast<unsigned>(v), &number, sizeof number);
    }
  }
}
template <class M, class D>
void load_param(Warp& w, const Inst& in) {
  const u64* a = reg<u64>(w, in.o[0]);
  const u32 bytes = static_cast<u32>(sizeof(M)) * in.vector;
  for (u32 m = w.active; m != 0; m &= m - 1) {
    const int l = __builtin_ctz(m);
    const u64 at = a[l] + static_cast<u64>(static_cast<s64>(in.imm));
    if (at + bytes > w.block->kernel->parameter_bytes)
      w.block->fail(w, w.pc - 1, "a read beyond the parameters");
    if (at % bytes != 0) w.block->fail(w, w.pc - 1, "a misaligned read of parameters");
    for (int v = 0; v < in.vector; ++v) {
      M number;
      std::memcpy(&number, w.block->params + at + sizeof(M) * static_cast<unsigned>(v),
                  sizeof number);
      reg<D>(w, in.o[1 + v])[l] = static_cast<D>(number);
    }
  }
}

// cp.async: the bytes stay where they are until the lane waits.
void copy_async(Warp& w, const Inst& in) {
  if (w.active == 0) return;
  alignas(64) u32 to[kLanes];
  alignas(64) u64 from[kLanes];
  addresses(w, in, to);
  const u64* g = reg<u64>(w, in.o[1]);
  EACH_LANE from[l] = g[l] + static_cast<u64>(static_cast<s64>(static_cast<s32>(in.target)));
  const u32* size = in.o[2] != 0 ? reg<u32>(w, in.o[2]) : nullptr;
  Inst global = in;
  const u32 lanes = w.active;
  if (size != nullptr) {  // copies of no bytes read nothing
    for (u32 m = lanes; m != 0; m &= m - 1) {
      if (size[__builtin_ctz(m)] == 0) w.active &= ~(1u << __builtin_ctz(m));
    }
  }
  if (w.active != 0) w.block->check_global(w, global, from, in.bytes, false);
  w.active = lanes;
  w.block->check_shared(w, in, to, in.bytes, true);
  for (u32 m = w.active; m != 0; m &= m - 1) {
    const int l = __builtin_ctz(m);
    const u8 bytes = size != nullptr ? static_cast<u8>(size[l]) : in.bytes;
    w.copies[l].push_back({to[l], from[l], in.bytes, bytes, w.copy_group, w.pc - 1});
    if (w.block->opt.races) {
      for (u32 i = 0; i < in.bytes; i += 2)
        w.block->worker->shadow[(to[l] - kSharedBase + i) / 2].copy_epoch = w.block->first_epoch;
    }
  }
}
void copy_commit(Warp& w, const Inst&) { ++w.copy_group; }
void copy_wait(Warp& w, const Inst& in) {
  for (u32 m = w.active; m != 0; m &= m - 1) {
    const int l = __builtin_ctz(m);
    w.block->finish_copies(w, l, static_cast<u32>(in.imm));
  }
}

void to_generic_shared(Warp& w, const Inst& in) {
  const u64* a = reg<u64>(w, in.o[1]);
  alignas(64) u64 t[kLanes];
  EACH_LANE t[l] = in.flags ? a[l] - kSharedWindow : a[l] + kSharedWindow;
  put(reg<u64>(w, in.o[0]), t, w.active);
}

}  // namespace
}  // namespace vgpu
