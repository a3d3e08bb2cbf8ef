// Operations of tensor cores, and what loads and stores their operands.
#pragma once

#include "memory.h"

namespace vgpu {
namespace {

// ldmatrix: matrix i has its 8 rows of 16 bytes at the addresses of lanes 8 i .. 8 i + 7. Lane t
// gets row t / 4, values 2 (t % 4) and the next; of a transposed matrix the same of its columns.
void load_matrix(Warp& w, const Inst& in) {
  whole_group(w, "ldmatrix");
  if (!w.gather(w.live(), "ldmatrix")) return;
  if (w.mask != kAll) w.block->fail(w, w.pc - 1, "ldmatrix without all 32 lanes");
  alignas(64) u32 a[kLanes];
  addresses(w, in, a);
  const int count = in.vector;
  const u32 used = count == 4 ? kAll : (1u << (8 * count)) - 1u;
  w.active = used;
  w.block->check_shared(w, in, a, 16, false);
  w.active = kAll;
  const u8* base = w.block->shared - kSharedBase;
  u16 m[4][8][8];
  for (int i = 0; i < count; ++i) {
    for (int r = 0; r < 8; ++r) std::memcpy(m[i][r], base + a[8 * i + r], 16);
  }
  for (int i = 0; i < count; ++i) {
    u32* d = reg<u32>(w, in.o[1 + i]);
    for (int t = 0; t < kLanes; ++t) {
      const int r = t / 4, c = t % 4 * 2;
      const u16 low = in.flags ? m[i][c][r] : m[i][r][c];
      const u16 high = in.flags ? m[i][c + 1][r] : m[i][r][c + 1];
      d[t] = static_cast<u32>(high) << 16 | low;
    }
  }
}

// mma m16n8k16 and m16n8k8: lane t = 4 g + c of the warp holds
//   of A values (g or g + 8, 2c or 2c + 1 and those + 8), of B (2c.. and those + 8, g), of C and D
//   (g or g + 8, 2c or 2c + 1); for tf32, which has one number in a register, A (g or g + 8, c or
//   c + 4) and B (c or c + 4, g). With 16-bit values m16n8k8 has the first half of these registers.
// The sum of the products of one instruction and C is rounded to float once.
template <int kType, int kK = kType == 2 ? 8 : 16>  // 0 f16, 1 bf16, 2 tf32
void mma(Warp& w, const Inst& in) {
  whole_group(w, "mma.sync");
  if (!w.gather(w.live(), "mma.sync")) return;
  if (w.mask != kAll) w.block->fail(w, w.pc - 1, "mma.sync without all 32 lanes");
  constexpr int kA = kType != 2 && kK == 8 ? 2 : 4, kB = kA / 2;  // registers
  const u32* o = w.block->kernel->extra.data() + in.target;       // d0-3, those of A and B, c0-3
  alignas(64) double a[16][kK];
  alignas(64) double b[kK][8];
  alignas(64) double d[16][8];
  const auto number = [](u16 bits) {
    return static_cast<double>(kType == 0 ? of_f16(bits) : of_bf16(bits));
  };
  for (int i = 0; i < kA; ++i) {
    const u32* r = reg<u32>(w, o[4 + i]);
    for (int t = 0; t < kLanes; ++t) {
      const int g = t >> 2, c = t & 3, row = g + (i & 1) * 8;
      if constexpr (kType == 2) {
        a[row][c + (i >> 1) * 4] = static_cast<double>(bits_as<float>(r[t] & ~0x1fffu));
      } else {
        const int column = 2 * c + (i >> 1) * 8;
        a[row][column] = number(static_cast<u16>(r[t]));
        a[row][column + 1] = number(static_cast<u16>(r[t] >> 16));
      }
    }
  }
  for (int i = 0; i < kB; ++i) {
    const u32* r = reg<u32>(w, o[4 + kA + i]);
    for (int t = 0; t < kLanes; ++t) {
      const int g = t >> 2, c = t & 3;
      if constexpr (kType == 2) {
        b[c + i * 4][g] = static_cast<double>(bits_as<float>(r[t] & ~0x1fffu));
      } else {
        b[2 * c + i * 8][g] = number(static_cast<u16>(r[t]));
        b[2 * c + i * 8 + 1][g] = number(static_cast<u16>(r[t] >> 16));
      }
    }
  }
  for (int i = 0; i < 4; ++i) {
    const float* r = reg<float>(w, o[4 + kA + kB + i]);
    for (int t = 0; t < kLanes; ++t)
      d[(t >> 2) + (i >> 1) * 8][2 * (t & 3) + (i & 1)] = static_cast<double>(r[t]);
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kK; ++k) {
      const double x = a[row][k];
      for (int n = 0; n < 8; ++n) d[row][n] += x * b[k][n];
    }
  }
  for (int i = 0; i < 4; ++i) {
    float* r = reg<float>(w, o[i]);
    for (int t = 0; t < kLanes; ++t)
      r[t] = static_cast<float>(d[(t >> 2) + (i >> 1) * 8][2 * (t & 3) + (i & 1)]);
  }
}

// stmatrix: the inverse of ldmatrix.
void store_matrix(Warp& w, const Inst& in) {
  whole_group(w, "stmatrix");
  if (!w.gather(w.live(), "stmatrix")) return;
  if (w.mask != kAll) w.block->fail(w, w.pc - 1, "stmatrix without all 32 lanes");
  alignas(64) u32 a[kLanes];
  addresses(w, in, a);
  const int count = in.vector;
  const u32 used = count == 4 ? kAll : (1u << (8 * count)) - 1u;
  w.active = used;
  w.block->check_shared(w, in, a, 16, true);
  w.active = kAll;
  u8* base = w.block->shared - kSharedBase;
  for (int i = 0; i < count; ++i) {
    u16 m[8][8];
    const u32* s = reg<u32>(w, in.o[1 + i]);
    for (int t = 0; t < kLanes; ++t) {
      const int r = t / 4, c = t % 4 * 2;
      const u16 low = static_cast<u16>(s[t]), high = static_cast<u16>(s[t] >> 16);
      if (in.flags) {
        m[c][r] = low;
        m[c + 1][r] = high;
      } else {
        m[r][c] = low;
        m[r][c + 1] = high;
      }
    }
    for (int r = 0; r < 8; ++r) std::memcpy(base + a[8 * i + r], m[r], 16);
  }
}

// wgmma m64nNk16 of bf16: each warp of the four makes 16 rows. Operands are taken at once, not
// asynchronously. Shared memory as the matrix descriptor says.
struct MatrixDescriptor {
  u32 start, leading, stride, swizzle;
  explicit MatrixDescriptor(u64 d)
      : start(static_cast<u32>(d & 0x3fff) << 4),
        leading(static_cast<u32>(d >> 16 & 0x3fff) << 4),
        stride(static_cast<u32>(d >> 32 & 0x3fff) << 4),
        swizzle(static_cast<u32>(d >> 62 & 3)) {}
  u32 at(u32 mn, u32 k, bool transposed) const {
    const u32 width = swizzle == 1   ? 64
                      : swizzle == 2 ? 32
                      : swizzle == 3 ? 16
                                     : 8;  // values in a row
    u32 a = start;
    if (transposed) {  // mn is contiguous
      a += mn / width * leading + k / 8 * stride + k % 8 * width * 2 + mn % width * 2;
    } else {
      a += mn / 8 * stride + mn % 8 * width * 2 + k / width * leading + k % width * 2;
    }
    const u32 mask = swizzle == 1 ? 7 : swizzle == 2 ? 3 : swizzle == 3 ? 1 : 0;
    return a ^ ((a >> 7 & mask) << 4);
  }
};
void warpgroup_mma(Warp& w, const Inst& in) {
  whole_group(w, "wgmma");
  if (!w.gather(w.live(), "wgmma")) return;
  if (w.mask != kAll) w.block->fail(w, w.pc - 1, "wgmma without all 32 lanes");
  const u32* o = w.block->kernel->extra.data() + in.target;
  const u32 n = o[0];
  const bool a_shared = in.flags & 1, a_transposed = in.flags & 2, b_transposed = in.flags & 4;
  const u32* d = o + 1;
  const u32* a_regs = d + n / 2;
  const u32 b_reg = a_regs[a_shared ? 1 : 4], scale = a_regs[a_shared ? 2 : 5];
  u32 p;
  std::memcpy(&p, w.regs + scale, sizeof p);
  const u8* base = w.block->shared - kSharedBase;
  const auto number = [&](u32 at) {
    if (at < kSharedBase || at - kSharedBase + 2 > w.block->shared_bytes)
      w.block->fail(w, w.pc - 1, "wgmma reads beyond shared memory");
    u16 bits;
    std::memcpy(&bits, base + at, 2);
    return static_cast<double>(of_bf16(bits));
  };
  double a[16][16], b[16][256], sum[16][256];
  const u32 first = w.index % 4 * 16;
  if (a_shared) {
    const MatrixDescriptor m(reg<u64>(w, a_regs[0])[0]);
    for (u32 r = 0; r < 16; ++r)
      for (u32 k = 0; k < 16; ++k) a[r][k] = number(m.at(first + r, k, a_transposed));
  } else {
    for (int i = 0; i < 4; ++i) {
      const u32* r = reg<u32>(w, a_regs[i]);
      for (int t = 0; t < kLanes; ++t) {
        const int row = (t >> 2) + (i & 1) * 8, column = 2 * (t & 3) + (i >> 1) * 8;
        a[row][column] = static_cast<double>(of_bf16(static_cast<u16>(r[t])));
        a[row][column + 1] = static_cast<double>(of_bf16(static_cast<u16>(r[t] >> 16)));
      }
    }
  }
  const MatrixDescriptor m(reg<u64>(w, b_reg)[0]);
  for (u32 k = 0; k < 16; ++k)
    for (u32 j = 0; j < n; ++j) b[k][j] = number(m.at(j, k, b_transposed));
  for (u32 i = 0; i < n / 2; ++i) {
    const float* r = reg<float>(w, d[i]);
    for (u32 t = 0; t < kLanes; ++t)
      sum[(t >> 2) + (i >> 1 & 1) * 8][i / 4 * 8 + 2 * (t & 3) + (i & 1)] =
          p & 1u ? static_cast<double>(r[t]) : 0.0;
  }
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < 16; ++k) {
      const double x = a[r][k];
      for (u32 j = 0; j < n; ++j) sum[r][j] += x * b[k][j];
    }
  for (u32 i = 0; i < n / 2; ++i) {
    float* r = reg<float>(w, d[i]);
    for (u32 t = 0; t < kLanes; ++t)
      r[t] =
          static_cast<float>(sum[(t >> 2) + (i >> 1 & 1) * 8][i / 4 * 8 + 2 * (t & 3) + (i & 1)]);
  }
  if (w.block->opt.profile) {  // 128 bytes of shared memory in a pass; the four warps share B
    Counts& c = w.block->worker->counts[w.pc - 1];
    c.units += (a_shared ? 4 : 0) + n / 16;
    c.ideal += (a_shared ? 4 : 0) + n / 16;
  }
}

}  // namespace
}  // namespace vgpu
