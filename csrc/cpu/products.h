// Products of small matrices in the cache: whole kernels, with the sums of a block in registers.
//
// Elements of A are read one at a time, so that A may lie in either order; rows of B and C are read
// as vectors, so a B that is to be transposed is copied first. Sums are in the order of k, whatever
// the block. Included by kernels only, like simd.h.
#pragma once

#include "cpu/simd.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

// Rows and vectors of C whose sums fill the registers and leave some for a row of B.
constexpr int kProductRows = 6;
constexpr int kProductVectors = kVectorBytes == 64 ? 4 : 2;

// A factor A [m, k] as it stands in memory, and what its rows are multiplied by.
template <class T>
struct LeftFactor {
  const T* data;
  std::int64_t row_stride, column_stride;
  const T* row_factors = nullptr;  // [m], or null for 1

  // null leaves the rows as they are.
  TORCH_SPE_INLINE LeftFactor times(const T* factors) const {
    return {data, row_stride, column_stride, factors};
  }
};
template <class T>
TORCH_SPE_INLINE LeftFactor<T> plain(const T* data, std::int64_t ld) {
  return {data, ld, 1};
}
template <class T>
TORCH_SPE_INLINE LeftFactor<T> transposed(const T* data, std::int64_t ld) {
  return {data, 1, ld};
}

// What is known of a product, and skipped. Elements of A that are left out beyond whole blocks are
// multiplied, so they must be 0; elements of C that are left out may be written or not.
enum class Skip {
  kNothing,
  kUpperOfA,  // A[i, j] = 0 for j > i
  kLowerOfA,  // A[i, j] = 0 for j < i
  kUpperOfC,  // C[i, j] is not wanted for j > i
};

// Loops over the block are unrolled by name: GCC keeps sums that it has not unrolled all loops over
// in memory, which costs as much as ten rows of B.
template <class T, int kRows, int kVectors>
void multiply_block(const LeftFactor<T>& a, std::int64_t k, const T* b, std::int64_t ldb, T beta,
                    T* c, std::int64_t ldc) {
  Vec<T> sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[i][v] = Vec<T>{};
  }
  const T* left = a.data;
  const std::int64_t row_stride = a.row_stride, column_stride = a.column_stride;
  for (std::int64_t j = 0; j < k; ++j, left += column_stride, b += ldb) {
    Vec<T> right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) right[v] = load_vec(b + v * kLanes<T>);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const T factor = left[i * row_stride];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[i][v] += factor * right[v];
    }
  }
  if (a.row_factors != nullptr) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[i][v] *= a.row_factors[i];
    }
  }
  if (beta != 0) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[i][v] += beta * load_vec(c + i * ldc + v * kLanes<T>);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store_vec(c + i * ldc + v * kLanes<T>, sums[i][v]);
  }
}

// The first `rows` rows, at most kRows, of a block.
template <class T, int kVectors, int kRows = kProductRows>
TORCH_SPE_INLINE void multiply_rows(std::int64_t rows, const LeftFactor<T>& a, std::int64_t k,
                                    const T* b, std::int64_t ldb, T beta, T* c, std::int64_t ldc) {
  if (rows == kRows) return multiply_block<T, kRows, kVectors>(a, k, b, ldb, beta, c, ldc);
  if constexpr (kRows > 1) multiply_rows<T, kVectors, kRows - 1>(rows, a, k, b, ldb, beta, c, ldc);
}

struct NothingElse {
  TORCH_SPE_INLINE void operator()() const {}
};

// C = A B + beta C, row-major: A is [m, k], B [k, n] and C [m, n], rows of B and C `ldb` and `ldc`
// apart. n is rounded up to whole vectors: rows of B and C are that long. With beta = 0, C is not
// read. After each block `other` is called.
template <class T, class Other = NothingElse>
void multiply(std::int64_t m, std::int64_t n, std::int64_t k, const LeftFactor<T>& a, const T* b,
              std::int64_t ldb, T beta, T* c, std::int64_t ldc, Skip skip = Skip::kNothing,
              Other&& other = {}) {
  constexpr std::int64_t kWidth = kProductVectors * kLanes<T>;
  // Columns outside: a block of them of B stays in the nearest cache.
  for (std::int64_t first = 0; first < n; first += kWidth) {
    for (std::int64_t row = 0; row < m; row += kProductRows) {
      const std::int64_t rows = min_of(kProductRows, m - row);
      const std::int64_t begin = skip == Skip::kLowerOfA ? min_of(row, k) : 0;
      const std::int64_t end = skip == Skip::kUpperOfA ? min_of(k, row + rows) : k;
      const LeftFactor<T> left{a.data + row * a.row_stride + begin * a.column_stride, a.row_stride,
                               a.column_stride,
                               a.row_factors == nullptr ? nullptr : a.row_factors + row};
      std::int64_t last = min_of(n, first + kWidth);
      if (skip == Skip::kUpperOfC) last = min_of(last, row + rows);
      for (std::int64_t column = first; column < last;) {
        const T* const right = b + begin * ldb + column;
        T* const to = c + row * ldc + column;
        std::int64_t vectors = kProductVectors;
        while (vectors > 1 && column + (vectors - 1) * kLanes<T> >= last) vectors /= 2;
        if (vectors == kProductVectors) {
          multiply_rows<T, kProductVectors>(rows, left, end - begin, right, ldb, beta, to, ldc);
        } else if (vectors == 2) {
          multiply_rows<T, 2>(rows, left, end - begin, right, ldb, beta, to, ldc);
        } else {
          multiply_rows<T, 1>(rows, left, end - begin, right, ldb, beta, to, ldc);
        }
        column += vectors * kLanes<T>;
        other();
      }
    }
  }
}

// One of two rows into which the elements of a and b, taken in turn, are laid.
template <class T, int kSecond, std::size_t... kLane>
TORCH_SPE_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b, std::index_sequence<kLane...>) {
  constexpr int kHalf = static_cast<int>(kLanes<T>) / 2;
  return __builtin_shufflevector(
      a, b,
      kSecond * kHalf + static_cast<int>(kLane) / 2 + static_cast<int>(kLane) % 2 * 2 * kHalf...);
}

// A square of whole vectors. Laying rows i and i + half into rows 2i and 2i + 1, as often as half
// can be halved, transposes it.
template <class T>
TORCH_SPE_INLINE void transpose_square(const T* in, std::int64_t ld_in, T* out,
                                       std::int64_t ld_out) {
  constexpr int kSize = static_cast<int>(kLanes<T>);
  using Lanes = std::make_index_sequence<static_cast<std::size_t>(kSize)>;
  Vec<T> rows[kSize];
  for (int i = 0; i < kSize; ++i) rows[i] = load_vec(in + i * ld_in);
  for (int step = 1; step < kSize; step *= 2) {
    Vec<T> next[kSize];
    for (int i = 0; i < kSize / 2; ++i) {
      next[2 * i] = interleave<T, 0>(rows[i], rows[i + kSize / 2], Lanes{});
      next[2 * i + 1] = interleave<T, 1>(rows[i], rows[i + kSize / 2], Lanes{});
    }
    for (int i = 0; i < kSize; ++i) rows[i] = next[i];
  }
  for (int i = 0; i < kSize; ++i) store_vec(out + i * ld_out, rows[i]);
}

// out [columns, rows] = in [rows, columns] transposed, both sizes rounded up to whole vectors: rows
// of `in` and `out` are that long, and there are as many.
template <class T>
void transpose(std::int64_t rows, std::int64_t columns, const T* in, std::int64_t ld_in, T* out,
               std::int64_t ld_out) {
  for (std::int64_t c = 0; c < columns; c += kLanes<T>) {
    for (std::int64_t r = 0; r < rows; r += kLanes<T>)
      transpose_square(in + r * ld_in + c, ld_in, out + c * ld_out + r, ld_out);
  }
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
