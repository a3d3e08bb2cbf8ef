// Products of the sine filter: codes from basis and weights, and their products with rows of the
// batch, in vectors.
// Included by kernels only, like simd.h.
#pragma once

#include "cpu/blas.h"
#include "cpu/encode/sine_basis.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

constexpr std::int64_t kProductRows = 42;  // of the basis, see gemm_in_pieces

struct GemmSizes {
  std::int64_t m, n, k;
};

// C = op(A) B + beta C, as `gemm`, in pieces of some size. Of larger factors MKL makes copies
// first, even within one thread: with 64 x 64 x 63 elements, where 64 x 64 x 42 took two thirds of
// the time.
template <class T>
void gemm_in_pieces(Op op_a, const GemmSizes& size, const GemmSizes& piece, const T* a,
                    std::int64_t lda, const T* b, std::int64_t ldb, T beta, T* c,
                    std::int64_t ldc) {
  for (std::int64_t i = 0; i < size.m; i += piece.m) {
    for (std::int64_t j = 0; j < size.n; j += piece.n) {
      for (std::int64_t l = 0; l < size.k; l += piece.k) {
        gemm(op_a, Op::kPlain, min_of(piece.m, size.m - i), min_of(piece.n, size.n - j),
             min_of(piece.k, size.k - l), a + (op_a == Op::kPlain ? i * lda + l : l * lda + i), lda,
             b + l * ldb + j, ldb, l == 0 ? beta : T(1), c + i * ldc + j, ldc);
      }
    }
  }
}

// The codes of one feature, code[t, r] = sum_j basis[j, t] weight[j, r], and zero for r in [R,
// width).
template <class T>
void code_tile(std::int64_t size, std::int64_t realizations, std::int64_t width, std::int64_t rows,
               const T* basis, const T* weight, T* code, std::int64_t ldc) {
  gemm(Op::kTransposed, Op::kPlain, size, realizations, rows, basis, kSineTile, weight,
       realizations, T(0), code, ldc);
  if (realizations == width) return;
  for (std::int64_t t = 0; t < size; ++t) {
    for (std::int64_t r = realizations; r < width; ++r) code[t * ldc + r] = 0;
  }
}

// y[b, r] += sum_d x[b, d] code[d, r] for kRows rows b and kVecs vectors of r.
template <int kRows, int kVecs, class T>
TORCH_SPE_INLINE void contract_block(std::int64_t count, const T* x, std::int64_t ldx,
                                     const T* code, std::int64_t ldc, T* y, std::int64_t ldy) {
  Vec<T> acc[kRows][kVecs];
  for (int b = 0; b < kRows; ++b) {
    for (int v = 0; v < kVecs; ++v) acc[b][v] = load_vec(y + b * ldy + v * kLanes<T>);
  }
  for (std::int64_t d = 0; d < count; ++d) {
    Vec<T> c[kVecs];
    for (int v = 0; v < kVecs; ++v) c[v] = load_vec(code + d * ldc + v * kLanes<T>);
    for (int b = 0; b < kRows; ++b) {
      const T scale = x[b * ldx + d];
      for (int v = 0; v < kVecs; ++v) acc[b][v] += scale * c[v];
    }
  }
  for (int b = 0; b < kRows; ++b) {
    for (int v = 0; v < kVecs; ++v) store_vec(y + b * ldy + v * kLanes<T>, acc[b][v]);
  }
}

template <int kRows, class T>
TORCH_SPE_INLINE void contract_rows(std::int64_t count, std::int64_t width, const T* x,
                                    std::int64_t ldx, const T* code, std::int64_t ldc, T* y,
                                    std::int64_t ldy) {
  std::int64_t r = 0;
  for (; r + 4 * kLanes<T> <= width; r += 4 * kLanes<T>)
    contract_block<kRows, 4>(count, x, ldx, code + r, ldc, y + r, ldy);
  for (; r < width; r += kLanes<T>)
    contract_block<kRows, 1>(count, x, ldx, code + r, ldc, y + r, ldy);
}

// y[b, r] += sum_d x[b, d] code[d, r]; width is a multiple of the lanes.
template <class T>
void contract(std::int64_t batch, std::int64_t count, std::int64_t width, const T* x,
              std::int64_t ldx, const T* code, T* y) {
  std::int64_t b = 0;
  for (; b + 4 <= batch; b += 4)
    contract_rows<4>(count, width, x + b * ldx, ldx, code, width, y + b * width, width);
  for (; b < batch; ++b)
    contract_rows<1>(count, width, x + b * ldx, ldx, code, width, y + b * width, width);
}

// out[b, d] = sum_r g[b, r] code[d, r] for kRows rows b and kCols features d, at most 16 in all;
// width is a multiple of the lanes.
template <int kRows, int kCols, class T>
TORCH_SPE_INLINE void dot_block(std::int64_t width, const T* g, const T* code, T* out,
                                std::int64_t ldo) {
  Vec<T> acc[16] = {};
  for (std::int64_t r = 0; r < width; r += kLanes<T>) {
    Vec<T> c[kCols];
    for (int d = 0; d < kCols; ++d) c[d] = load_vec(code + d * width + r);
    for (int b = 0; b < kRows; ++b) {
      const Vec<T> row = load_vec(g + b * width + r);
      for (int d = 0; d < kCols; ++d) acc[b * kCols + d] += row * c[d];
    }
  }
  T sums[16];
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
  constexpr int kCols = 16 / kRows < 8 ? 16 / kRows : 8;
  std::int64_t d = 0;
  for (; d + kCols <= count; d += kCols) {
    dot_block<kRows, kCols>(width, g, code + d * width, out + d, count);
  }
  for (; d < count; ++d) dot_block<kRows, 1>(width, g, code + d * width, out + d, count);
}

// out[b, d] = sum_r g[b, r] code[d, r]; what lies beyond R in a row must be zero in both.
template <class T>
void dot(std::int64_t batch, std::int64_t count, std::int64_t width, const T* g, const T* code,
         T* out) {
  std::int64_t b = 0;
  for (; b + 4 <= batch; b += 4) dot_rows<4>(count, width, g + b * width, code, out + b * count);
  for (; b + 2 <= batch; b += 2) dot_rows<2>(count, width, g + b * width, code, out + b * count);
  for (; b < batch; ++b) dot_rows<1>(count, width, g + b * width, code, out + b * count);
}

// code[d, r] = sum_b x[b, d] g[b, r] for kCols features d and kVecs vectors of r.
template <int kCols, int kVecs, class T>
TORCH_SPE_INLINE void outer_block(std::int64_t batch, const T* x, std::int64_t ldx, const T* g,
                                  std::int64_t width, T* code) {
  Vec<T> acc[kCols][kVecs] = {};
  for (std::int64_t b = 0; b < batch; ++b) {
    Vec<T> row[kVecs];
    for (int v = 0; v < kVecs; ++v) row[v] = load_vec(g + b * width + v * kLanes<T>);
    for (int d = 0; d < kCols; ++d) {
      for (int v = 0; v < kVecs; ++v) acc[d][v] += x[b * ldx + d] * row[v];
    }
  }
  for (int d = 0; d < kCols; ++d) {
    for (int v = 0; v < kVecs; ++v) store_vec(code + d * width + v * kLanes<T>, acc[d][v]);
  }
}

template <int kCols, class T>
TORCH_SPE_INLINE void outer_columns(std::int64_t batch, std::int64_t width, const T* x,
                                    std::int64_t ldx, const T* g, T* code) {
  std::int64_t r = 0;
  for (; r + 4 * kLanes<T> <= width; r += 4 * kLanes<T>) {
    outer_block<kCols, 4>(batch, x, ldx, g + r, width, code + r);
  }
  for (; r < width; r += kLanes<T>) outer_block<kCols, 1>(batch, x, ldx, g + r, width, code + r);
}

// code[d, r] = sum_b x[b, d] g[b, r]: the gradient of the codes at one position.
template <class T>
void outer(std::int64_t batch, std::int64_t count, std::int64_t width, const T* x, const T* g,
           T* code) {
  std::int64_t d = 0;
  for (; d + 4 <= count; d += 4) outer_columns<4>(batch, width, x + d, count, g, code + d * width);
  for (; d < count; ++d) outer_columns<1>(batch, width, x + d, count, g, code + d * width);
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
