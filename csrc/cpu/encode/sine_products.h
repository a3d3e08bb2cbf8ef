// Products of the sine filter with the rows of a batch, position by position.
// Included by kernels only, like simd.h.
#pragma once

#include "cpu/encode/sine_basis.h"
#include "cpu/products.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

// The codes of one feature at `size` positions, code[t, r] = sum_j basis[j, t] weight[j, r]; rows
// of weights and codes are padded to `width`.
template <class T>
void code_tile(std::int64_t size, std::int64_t width, std::int64_t rows, const T* basis,
               const T* weight, T* code, std::int64_t ldc) {
  multiply(size, width, rows, transposed(basis, kSineTile), weight, width, T(0), code, ldc);
}

// y[b, r] += sum_d x[b, d] code[d, r] at a position.
template <class T>
void contract(std::int64_t batch, std::int64_t count, std::int64_t width, const T* x,
              std::int64_t ldx, const T* code, T* y) {
  multiply(batch, width, count, plain(x, ldx), code, width, T(1), y, width);
}

// code[d, r] = sum_b x[b, d] g[b, r]: the gradient of the codes at a position.
template <class T>
void outer(std::int64_t batch, std::int64_t count, std::int64_t width, const T* x, const T* g,
           T* code) {
  multiply(count, width, batch, transposed(x, count), g, width, T(0), code, width);
}

// Sums that dot_block keeps in registers, beside a vector of each row: whole vectors of outputs.
constexpr int kDotSums = kVectorBytes == 64 ? 16 : 8;

// out[b, d] = sum_r g[b, r] code[d, r] for kRows rows b and kCols features d, at most kDotSums in
// all; width is a multiple of the lanes.
template <int kRows, int kCols, class T>
TORCH_SPE_INLINE void dot_block(std::int64_t width, const T* g, const T* code, T* out,
                                std::int64_t ldo) {
  Vec<T> acc[kDotSums];
#pragma GCC unroll 16
  for (int i = 0; i < kDotSums; ++i) acc[i] = Vec<T>{};
  for (std::int64_t r = 0; r < width; r += kLanes<T>) {
    Vec<T> c[kCols];
#pragma GCC unroll 8
    for (int d = 0; d < kCols; ++d) c[d] = load_vec(code + d * width + r);
#pragma GCC unroll 8
    for (int b = 0; b < kRows; ++b) {
      const Vec<T> row = load_vec(g + b * width + r);
#pragma GCC unroll 8
      for (int d = 0; d < kCols; ++d) acc[b * kCols + d] += row * c[d];
    }
  }
  T sums[kDotSums];
#pragma GCC unroll 16
  for (int i = 0; i < kRows * kCols; i += static_cast<int>(kLanes<T>)) {
    store_vec(sums + i, sum_rows<T>(acc + i));
  }
  for (int b = 0; b < kRows; ++b) {
    for (int d = 0; d < kCols; ++d) out[b * ldo + d] = sums[b * kCols + d];
  }
}

template <int kRows, class T>
TORCH_SPE_INLINE void dot_rows(std::int64_t count, std::int64_t width, const T* g, const T* code,
                               T* out) {
  constexpr int kCols = kDotSums / kRows < 8 ? kDotSums / kRows : 8;
  std::int64_t d = 0;
  for (; d + kCols <= count; d += kCols) {
    dot_block<kRows, kCols>(width, g, code + d * width, out + d, count);
  }
  for (; d < count; ++d) dot_block<kRows, 1>(width, g, code + d * width, out + d, count);
}

// out[b, d] = sum_r g[b, r] code[d, r] at a position; what lies beyond R in a row must be zero in
// both.
template <class T>
void dot(std::int64_t batch, std::int64_t count, std::int64_t width, const T* g, const T* code,
         T* out) {
  std::int64_t b = 0;
  for (; b + 4 <= batch; b += 4) dot_rows<4>(count, width, g + b * width, code, out + b * count);
  for (; b + 2 <= batch; b += 2) dot_rows<2>(count, width, g + b * width, code, out + b * count);
  for (; b < batch; ++b) dot_rows<1>(count, width, g + b * width, code, out + b * count);
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
