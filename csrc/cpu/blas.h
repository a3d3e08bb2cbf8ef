// Matrix products from the BLAS inside libtorch_cpu (MKL, OpenBLAS or Accelerate), through its
// Fortran interface.
#pragma once

#include <cstdint>

#include "core/platform.h"

extern "C" {
void sgemm_(const char* trans_a, const char* trans_b, const int* m, const int* n, const int* k,
            const float* alpha, const float* a, const int* lda, const float* b, const int* ldb,
            const float* beta, float* c, const int* ldc);
void dgemm_(const char* trans_a, const char* trans_b, const int* m, const int* n, const int* k,
            const double* alpha, const double* a, const int* lda, const double* b, const int* ldb,
            const double* beta, double* c, const int* ldc);
}

namespace torch_spe::cpu {

enum class Op : char { kPlain = 'N', kTransposed = 'T' };

// C = op(A) op(B) + beta C, row-major: op(A) is [m, k], op(B) is [k, n], C is [m, n]; ld is the
// distance between rows as stored. Within a parallel region each thread's product runs on that
// thread alone.
TORCH_SPE_INLINE void gemm(Op op_a, Op op_b, std::int64_t m, std::int64_t n, std::int64_t k,
                           const float* a, std::int64_t lda, const float* b, std::int64_t ldb,
                           float beta, float* c, std::int64_t ldc) {
  // Column-major BLAS sees the transposes: C^T = op(B)^T op(A)^T.
  const char ta = static_cast<char>(op_b), tb = static_cast<char>(op_a);
  const int im = static_cast<int>(n), in = static_cast<int>(m), ik = static_cast<int>(k);
  const int ia = static_cast<int>(ldb), ib = static_cast<int>(lda), ic = static_cast<int>(ldc);
  const float alpha = 1;
  sgemm_(&ta, &tb, &im, &in, &ik, &alpha, b, &ia, a, &ib, &beta, c, &ic);
}
TORCH_SPE_INLINE void gemm(Op op_a, Op op_b, std::int64_t m, std::int64_t n, std::int64_t k,
                           const double* a, std::int64_t lda, const double* b, std::int64_t ldb,
                           double beta, double* c, std::int64_t ldc) {
  const char ta = static_cast<char>(op_b), tb = static_cast<char>(op_a);
  const int im = static_cast<int>(n), in = static_cast<int>(m), ik = static_cast<int>(k);
  const int ia = static_cast<int>(ldb), ib = static_cast<int>(lda), ic = static_cast<int>(ldc);
  const double alpha = 1;
  dgemm_(&ta, &tb, &im, &in, &ik, &alpha, b, &ia, a, &ib, &beta, c, &ic);
}

}  // namespace torch_spe::cpu
