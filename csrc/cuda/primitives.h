// Warp-wide operations and conversions of the hardware; the only place with PTX. Every lane of a
// warp must call a warp operation.
//
// Fragments of mma (PTX manual, "Matrix fragments for mma.m16n8k16"), lane = 4 g + c, with two
// values in a register, the lower first:
//   A [16, 16]: a[0] row g,     columns 2c, 2c + 1    a[2] row g,     columns 2c + 8, 2c + 9
//               a[1] row g + 8, columns 2c, 2c + 1    a[3] row g + 8, columns 2c + 8, 2c + 9
//   B [16, 8]:  b[0] rows 2c, 2c + 1, column g        b[1] rows 2c + 8, 2c + 9, column g
//   D [16, 8]:  d[0], d[1] row g, columns 2c, 2c + 1  d[2], d[3] row g + 8, columns 2c, 2c + 1
// and of mma.m16n8k8 for tf32, one number in a register:
//   A [16, 8]:  a[0] (g, c)  a[1] (g + 8, c)  a[2] (g, c + 4)  a[3] (g + 8, c + 4)
//   B [8, 8]:   b[0] (c, g)  b[1] (c + 4, g)
#pragma once

#include "runtime.h"

#if defined(TORCH_SPE_CUDA_EMULATION)
#include "emulated_primitives.h"
#else

namespace torch_spe::cuda {

__device__ __forceinline__ float to_float(core::Half value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}
__device__ __forceinline__ float to_float(core::BFloat16 value) { return core::load(value); }
__device__ __forceinline__ void from_float(float value, core::Half* out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(value));
}
__device__ __forceinline__ void from_float(float value, core::BFloat16* out) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(value));
}

// threadIdx.x, read again wherever it is asked for: what is computed from it is not kept in
// registers through a long loop.
__device__ __forceinline__ int thread_read_again() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// The value, as if it were read again: products with it are not kept either.
__device__ __forceinline__ int read_again(int value) {
  int result;
  asm volatile("mov.u32 %0, %1;" : "=r"(result) : "r"(value));
  return result;
}
__device__ __forceinline__ std::int64_t read_again(std::int64_t value) {
  std::int64_t result;
  asm volatile("mov.u64 %0, %1;" : "=l"(result) : "l"(value));
  return result;
}

__device__ __forceinline__ float read_again(float value) {
  float result;
  asm volatile("mov.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
__device__ __forceinline__ double read_again(double value) {
  double result;
  asm volatile("mov.f64 %0, %1;" : "=d"(result) : "d"(value));
  return result;
}

// Two values rounded into the halves of a register, the first one into the lower half, as
// fragments of mma hold them.
template <class T>
__device__ __forceinline__ std::uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ std::uint32_t pack_pair<core::Half>(float low, float high) {
  std::uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
template <>
__device__ __forceinline__ std::uint32_t pack_pair<core::BFloat16>(float low, float high) {
  std::uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// The two values of a register.
template <class T>
__device__ __forceinline__ void unpack_pair(std::uint32_t pair, float* low, float* high) {
  T value;
  value.bits = static_cast<std::uint16_t>(pair);
  *low = to_float(value);
  value.bits = static_cast<std::uint16_t>(pair >> 16);
  *high = to_float(value);
}

// The lower, or higher, half of a register in both halves.
__device__ __forceinline__ std::uint32_t low_twice(std::uint32_t pair) {
  return __byte_perm(pair, 0u, 0x1010u);
}
__device__ __forceinline__ std::uint32_t high_twice(std::uint32_t pair) {
  return __byte_perm(pair, 0u, 0x3232u);
}
__device__ __forceinline__ std::uint32_t join_halves(std::uint16_t low, std::uint16_t high) {
  return __byte_perm(low, high, 0x5410u);
}

// All bits of a half of the register where its sign is set, none elsewhere.
__device__ __forceinline__ std::uint32_t negative_halves(std::uint32_t pair) {
  std::uint32_t result;  // The selector's highest bit takes the sign of a byte in place of it.
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(result) : "r"(pair));
  return result;
}

// Products of the values in two registers, half by half.
template <class T>
__device__ __forceinline__ std::uint32_t multiply_pairs(std::uint32_t a, std::uint32_t b);
template <>
__device__ __forceinline__ std::uint32_t multiply_pairs<core::Half>(std::uint32_t a,
                                                                    std::uint32_t b) {
  std::uint32_t result;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
template <>
__device__ __forceinline__ std::uint32_t multiply_pairs<core::BFloat16>(std::uint32_t a,
                                                                        std::uint32_t b) {
  std::uint32_t result;  // Before compute capability 9.0 there is only a fused multiply-add: + -0.
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(0x80008000u));
  return result;
}

// The value of lane `lane ^ offset`.
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int offset) {
  return __shfl_xor_sync(0xffffffffu, value, offset);
}

// Cosine and sine of an angle in [-pi, pi], to 20 bits.
__device__ __forceinline__ void fast_cos_sin(float angle, float* cos_out, float* sin_out) {
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(*cos_out) : "f"(angle));
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(*sin_out) : "f"(angle));
}

// The logarithm to base 2 of x in (0, 1], and the root, to some 22 bits.
__device__ __forceinline__ float fast_log2(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ __forceinline__ float fast_sqrt(float x) {
  float result;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// e^x, to some 22 bits; what would be subnormal is 0.
__device__ __forceinline__ float fast_exp(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504088896341f));
  return result;
}

// Four 8 x 8 matrices of 16-bit values from shared memory. Lanes 8 i .. 8 i + 7 give the addresses
// (multiples of 16 bytes) of the rows of matrix i; lane 4 g + c receives the columns 2c, 2c + 1 of
// row g of each, or of its transpose.
template <bool kTranspose>
__device__ __forceinline__ void ldmatrix_x4(std::uint32_t (&out)[4], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  }
}

// Starts to copy 16 aligned bytes from global to shared memory; there after the copying thread's
// copy_async_wait, for the other threads after a barrier that follows it.
__device__ __forceinline__ void copy_async16(void* shared, const void* global) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// d += A B.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const std::uint32_t (&a)[4],
                                             const std::uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<core::Half>(float (&d)[4], const std::uint32_t (&a)[4],
                                                         const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<core::BFloat16>(float (&d)[4],
                                                             const std::uint32_t (&a)[4],
                                                             const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same for a depth of 8: of the fragments above, registers a[0], a[1] and b[0].
template <class T>
__device__ __forceinline__ void mma_m16n8k8(float (&d)[4], const std::uint32_t (&a)[2],
                                            std::uint32_t b);
template <>
__device__ __forceinline__ void mma_m16n8k8<core::Half>(float (&d)[4], const std::uint32_t (&a)[2],
                                                        std::uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}
template <>
__device__ __forceinline__ void mma_m16n8k8<core::BFloat16>(float (&d)[4],
                                                            const std::uint32_t (&a)[2],
                                                            std::uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

__device__ __forceinline__ std::uint32_t to_tf32(float value) {
  std::uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
  return result;
}

// d += A B of tf32 values.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const std::uint32_t (&a)[4],
                                                 const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace torch_spe::cuda
#endif

namespace torch_spe::cuda {

// The sum over the lanes of a warp, in every lane.
template <class T>
TORCH_SPE_DEVICE T warp_sum(T value) {
  for (int offset = 16; offset > 0; offset /= 2) value += shuffle_xor(value, offset);
  return value;
}

// The sum over lanes 4 g .. 4 g + 3, in each of them.
template <class T>
TORCH_SPE_DEVICE T quad_sum(T value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

// Storage to the type of computation, and back.
TORCH_SPE_DEVICE float read(float value) { return value; }
TORCH_SPE_DEVICE double read(double value) { return value; }
TORCH_SPE_DEVICE float read(core::Half value) { return to_float(value); }
TORCH_SPE_DEVICE float read(core::BFloat16 value) { return to_float(value); }
TORCH_SPE_DEVICE void write(float value, float* out) { *out = value; }
TORCH_SPE_DEVICE void write(double value, double* out) { *out = value; }
TORCH_SPE_DEVICE void write(float value, core::Half* out) { from_float(value, out); }
TORCH_SPE_DEVICE void write(float value, core::BFloat16* out) { from_float(value, out); }

}  // namespace torch_spe::cuda
