// The primitives of csrc/cuda/primitives.h in plain C++, with the layouts of fragments that the PTX
// manual documents.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/dtype.h"
#include "cuda_emulation.h"

namespace torch_spe::cuda {

inline float to_float(core::Half value) { return core::load(value); }
inline float to_float(core::BFloat16 value) { return core::load(value); }
inline void from_float(float value, core::Half* out) { core::store(value, out); }
inline void from_float(float value, core::BFloat16* out) { core::store(value, out); }

template <class T>
std::uint32_t pack_pair(float low, float high) {
  T pair[2];
  core::store(low, &pair[0]);
  core::store(high, &pair[1]);
  return pair[0].bits | static_cast<std::uint32_t>(pair[1].bits) << 16;
}

inline std::uint32_t low_twice(std::uint32_t pair) { return (pair & 0xffffu) * 0x10001u; }
inline std::uint32_t high_twice(std::uint32_t pair) { return (pair >> 16) * 0x10001u; }
inline std::uint32_t join_halves(std::uint16_t low, std::uint16_t high) {
  return low | static_cast<std::uint32_t>(high) << 16;
}

template <class T>
void unpack_pair(std::uint32_t pair, float* low, float* high) {
  T value;
  value.bits = static_cast<std::uint16_t>(pair);
  *low = core::load(value);
  value.bits = static_cast<std::uint16_t>(pair >> 16);
  *high = core::load(value);
}

inline std::uint32_t negative_halves(std::uint32_t pair) {
  return (pair & 0x8000u ? 0xffffu : 0u) | (pair & 0x80000000u ? 0xffff0000u : 0u);
}

template <class T>
std::uint32_t multiply_pairs(std::uint32_t a, std::uint32_t b) {
  float a_low, a_high, b_low, b_high;
  unpack_pair<T>(a, &a_low, &a_high);
  unpack_pair<T>(b, &b_low, &b_high);
  return pack_pair<T>(a_low * b_low, a_high * b_high);
}

template <class T>
T shuffle_xor(T value, int offset) {
  struct Lane {
    T value;
    int offset;
  } lane = {value, offset};
  cuda_emulation::rendezvous(
      0xffffffffu, &lane,
      [](void* const(&arguments)[32]) {
        T values[32];
        for (int i = 0; i < 32; ++i) values[i] = static_cast<Lane*>(arguments[i])->value;
        for (int i = 0; i < 32; ++i) {
          Lane* const own = static_cast<Lane*>(arguments[i]);
          own->value = values[(i ^ own->offset) % 32];
        }
      },
      __FILE__, __LINE__);
  return lane.value;
}

inline void fast_cos_sin(float angle, float* cos_out, float* sin_out) {
  *cos_out = std::cos(angle);
  *sin_out = std::sin(angle);
}

inline float fast_log2(float x) { return std::log2(x); }
inline float fast_sqrt(float x) { return std::sqrt(x); }

inline float fast_exp(float x) { return std::exp(x); }

namespace emulated {

struct Ldmatrix {
  std::uint32_t* out;
  const void* row;
};

inline std::uint16_t bits_at(const void* row, int column) {
  std::uint16_t bits;
  std::memcpy(&bits, static_cast<const std::uint16_t*>(row) + column, sizeof(bits));
  return bits;
}

template <bool kTranspose>
void ldmatrix_x4(void* const (&arguments)[32]) {
  const auto of = [&](int lane) { return static_cast<Ldmatrix*>(arguments[lane]); };
  for (int lane = 0; lane < 32; ++lane) {
    if (reinterpret_cast<std::uintptr_t>(of(lane)->row) % 16 != 0)
      cuda_emulation::fail("ldmatrix: the row of lane " + std::to_string(lane) +
                           " is not aligned to 16 bytes");
  }
  // Lanes 8 i .. 8 i + 7 bring the rows of matrix i; a lane gets two neighbours of row lane / 4,
  // or of the transpose.
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      std::uint32_t pair = 0;
      for (int e = 0; e < 2; ++e) {
        const int row = lane / 4, column = lane % 4 * 2 + e;
        const std::uint16_t bits = kTranspose ? bits_at(of(8 * i + column)->row, row)
                                              : bits_at(of(8 * i + row)->row, column);
        pair |= static_cast<std::uint32_t>(bits) << (16 * e);
      }
      of(lane)->out[i] = pair;
    }
  }
}

struct Mma {
  float* d;
  const std::uint32_t* a;
  const std::uint32_t* b;
};

template <class T>
void mma_m16n8k16(void* const (&arguments)[32]) {
  const auto element = [](const std::uint32_t* registers, int i) {
    T value;
    value.bits = static_cast<std::uint16_t>(registers[i / 2] >> (16 * (i % 2)));
    return core::load(value);
  };
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& own = *static_cast<Mma*>(arguments[lane]);
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = group + (i % 4 >= 2 ? 8 : 0), column = member * 2 + i % 2 + (i >= 4 ? 8 : 0);
      a[row][column] = element(own.a, i);
    }
    for (int i = 0; i < 4; ++i) b[member * 2 + i % 2 + (i >= 2 ? 8 : 0)][group] = element(own.b, i);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& own = *static_cast<Mma*>(arguments[lane]);
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = group + (i >= 2 ? 8 : 0), column = member * 2 + i % 2;
      float sum = own.d[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      own.d[i] = sum;
    }
  }
}

struct MmaTf32 {
  float* d;
  const std::uint32_t* a;
  const std::uint32_t* b;
};

inline void mma_m16n8k8_tf32(void* const (&arguments)[32]) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaTf32& own = *static_cast<MmaTf32*>(arguments[lane]);
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 4; ++i)
      a[group + (i % 2) * 8][member + (i / 2) * 4] = core::bits_to_float(own.a[i]);
    for (int i = 0; i < 2; ++i) b[member + i * 4][group] = core::bits_to_float(own.b[i]);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const MmaTf32& own = *static_cast<MmaTf32*>(arguments[lane]);
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = group + (i >= 2 ? 8 : 0), column = member * 2 + i % 2;
      float sum = own.d[i];
      for (int k = 0; k < 8; ++k) sum += a[row][k] * b[k][column];
      own.d[i] = sum;
    }
  }
}

}  // namespace emulated

template <bool kTranspose>
void ldmatrix_x4(std::uint32_t (&out)[4], const void* row) {
  emulated::Ldmatrix argument{out, row};
  cuda_emulation::rendezvous(0xffffffffu, &argument, emulated::ldmatrix_x4<kTranspose>, __FILE__,
                             __LINE__);
}

inline void copy_async16(void* shared, const void* global) {
  cuda_emulation::copy_async(shared, global, 16);
}
inline int thread_read_again() { return static_cast<int>(threadIdx.x); }
inline int read_again(int value) { return value; }
inline std::int64_t read_again(std::int64_t value) { return value; }
inline float read_again(float value) { return value; }
inline double read_again(double value) { return value; }
inline void copy_async_wait() { cuda_emulation::copy_async_wait(); }

template <class T>
void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  emulated::Mma argument{d, a, b};
  cuda_emulation::rendezvous(0xffffffffu, &argument, emulated::mma_m16n8k16<T>, __FILE__, __LINE__);
}

template <class T>
void mma_m16n8k8(float (&d)[4], const std::uint32_t (&a)[2], std::uint32_t b) {
  mma_m16n8k16<T>(d, {a[0], a[1], 0, 0}, {b, 0});
}

inline std::uint32_t to_tf32(float value) {
  // To nearest, ties away from zero, on the 10 bits of mantissa that are left.
  return (core::float_to_bits(value) + 0x1000u) & 0xffffe000u;
}

inline void mma_m16n8k8_tf32(float (&d)[4], const std::uint32_t (&a)[4],
                             const std::uint32_t (&b)[2]) {
  emulated::MmaTf32 argument{d, a, b};
  cuda_emulation::rendezvous(0xffffffffu, &argument, emulated::mma_m16n8k8_tf32, __FILE__,
                             __LINE__);
}

}  // namespace torch_spe::cuda
