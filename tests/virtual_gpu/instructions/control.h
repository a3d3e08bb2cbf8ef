// Branches, barriers and operations between the lanes of a warp.
#pragma once

#include "lanes.h"

namespace vgpu {
namespace {

// --- Control ---

void nothing(Warp&, const Inst&) {}

void branch(Warp& w, const Inst& in) {
  const u32 taken = w.active, stay = w.mask & ~taken;
  if (taken == 0) return;
  if (stay == 0) {
    w.pc = in.target;
    return;
  }
  w.groups.push_back({in.target, taken, false});
  w.mask = stay;
  w.next = std::min(w.next, in.target);
}

void leave(Warp& w, const Inst&) {
  w.exited |= w.active;
  w.mask &= ~w.active;
  for (int l = 0; l < kLanes; ++l) {
    if ((w.active >> l & 1u) && !w.copies[l].empty())
      w.block->fail(w, w.pc - 1,
                    "lane " + std::to_string(l) + " exits while asynchronous copies are under way");
  }
  if (w.mask == 0) w.reschedule();
}

// Operations of a warp under a predicate that some of the lanes here have not.
void whole_group(Warp& w, const char* what) {
  if (w.active != w.mask)
    w.block->fail(w, w.pc - 1, std::string("only some lanes of a warp execute ") + what);
}

void barrier(Warp& w, const Inst& in) {
  whole_group(w, "bar.sync");
  if (!w.gather(w.live(), "bar.sync")) return;
  const u32* id = reg<u32>(w, in.o[0]);
  if (in.o[1] != 0) {
    const u32 count = reg<u32>(w, in.o[1])[0];
    if (count != w.block->dim.count())
      w.block->fail(w, w.pc - 1, "bar.sync of only some threads is not supported");
  }
  w.state = State::kAtBarrier;
  w.barrier = id[static_cast<unsigned>(__builtin_ctz(w.mask))];
  w.barrier_pc = w.pc - 1;
  w.stop = true;
}

void warp_barrier(Warp& w, const Inst& in) {
  const u32 need = reg<u32>(w, in.o[0])[__builtin_ctz(w.active)] & w.lanes;
  whole_group(w, "bar.warp.sync");
  if ((need & w.exited) != 0)
    w.block->fail(w, w.pc - 1, "bar.warp.sync with lanes that have exited");
  if (!w.gather(need, "bar.warp.sync")) return;
  ++w.syncs;
}

// --- Warp-wide ---

enum ShuffleMode { kIdx, kUp, kDown, kBfly };

void shuffle(Warp& w, const Inst& in) {
  whole_group(w, "shfl.sync");
  const u32 first = static_cast<u32>(__builtin_ctz(w.active));
  const u32 need = reg<u32>(w, in.target)[first];
  if ((need & w.exited) != 0) w.block->fail(w, w.pc - 1, "shfl.sync with lanes that have exited");
  if ((w.active & ~need) != 0)
    w.block->fail(w, w.pc - 1, "shfl.sync: a lane is not in its own mask");
  if (!w.gather(need, "shfl.sync")) return;
  const u32 *a = reg<u32>(w, in.o[1]), *b = reg<u32>(w, in.o[2]), *c = reg<u32>(w, in.o[3]);
  alignas(64) u32 t[kLanes];
  u32 inside = 0;
  for (u32 l = 0; l < kLanes; ++l) {
    const u32 bound = c[l] & 31u, segment = c[l] >> 8 & 31u, by = b[l] & 31u;
    const u32 most = (l & segment) | (bound & ~segment), least = l & segment;
    s32 j = 0;
    bool ok = false;
    switch (in.imm) {
      case kIdx:
        j = static_cast<s32>(least | (by & ~segment));
        ok = j <= static_cast<s32>(most);
        break;
      case kUp:
        j = static_cast<s32>(l) - static_cast<s32>(by);
        ok = j >= static_cast<s32>(most);
        break;
      case kDown:
        j = static_cast<s32>(l + by);
        ok = j <= static_cast<s32>(most);
        break;
      default:
        j = static_cast<s32>(l ^ by);
        ok = j <= static_cast<s32>(most);
    }
    if (!ok) j = static_cast<s32>(l);
    if ((w.mask >> l & 1u) && !(w.mask >> j & 1u))
      w.block->fail(w, w.pc - 1, "shfl.sync reads a lane that takes no part");
    t[l] = a[j];
    inside |= static_cast<u32>(ok) << l;
  }
  put(reg<u32>(w, in.o[0]), t, w.mask);
  if (in.o[4] != 0) put_pred(w, in.o[4], inside);
}

void ballot(Warp& w, const Inst& in) {  // imm: 0 ballot, 1 any, 2 all, 3 uni
  whole_group(w, "vote.sync");
  const u32 need = reg<u32>(w, in.o[2])[__builtin_ctz(w.active)];
  if (!w.gather(need, "vote.sync")) return;
  const u32 p = (pred(w, in.o[1]) ^ (in.flags ? kAll : 0u)) & w.mask;
  if (in.imm == 0) {
    alignas(64) u32 t[kLanes];
    EACH_LANE t[l] = p;
    put(reg<u32>(w, in.o[0]), t, w.mask);
  } else {
    const bool result = in.imm == 1 ? p != 0 : in.imm == 2 ? p == w.mask : p == 0 || p == w.mask;
    put_pred(w, in.o[0], result ? kAll : 0u);
  }
}
void active_mask(Warp& w, const Inst& in) {
  alignas(64) u32 t[kLanes];
  EACH_LANE t[l] = w.active;
  put(reg<u32>(w, in.o[0]), t, w.active);
}
void reduce(Warp& w,
            const Inst& in) {  // imm: 0 add, 1 and, 2 or, 3 xor, 4 min, 5 max; flags: signed
  whole_group(w, "redux.sync");
  const u32 need = reg<u32>(w, in.o[2])[__builtin_ctz(w.active)];
  if (!w.gather(need, "redux.sync")) return;
  const u32* a = reg<u32>(w, in.o[1]);
  const int first = __builtin_ctz(w.mask);
  u32 r = a[first];
  for (int l = first + 1; l < kLanes; ++l) {
    if (!(w.mask >> l & 1u)) continue;
    const bool less = in.flags ? static_cast<s32>(a[l]) < static_cast<s32>(r) : a[l] < r;
    switch (in.imm) {
      case 0:
        r += a[l];
        break;
      case 1:
        r &= a[l];
        break;
      case 2:
        r |= a[l];
        break;
      case 3:
        r ^= a[l];
        break;
      case 4:
        r = less ? a[l] : r;
        break;
      default:
        r = less ? r : a[l];
    }
  }
  alignas(64) u32 t[kLanes];
  EACH_LANE t[l] = r;
  put(reg<u32>(w, in.o[0]), t, w.mask);
}

}  // namespace
}  // namespace vgpu
