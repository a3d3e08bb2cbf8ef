// What the rows of the output are divided by, and the gradients of the rows before the division.
// Holds the kernel that makes the factors of the backward pass.
#pragma once

#include <cmath>

#include "tiles.h"

namespace torch_spe::cuda::attention {

TORCH_SPE_DEVICE float square_root(float x) { return sqrtf(x); }
TORCH_SPE_DEVICE double square_root(double x) { return sqrt(x); }

// value / divisor = value * scale * inverse, divided once for many values. The scale is 1 but for
// tiny divisors, whose own reciprocal could overflow. Dividing by 0 gives 0.
template <class T>
struct Quotient {
  T scale, inverse;

  TORCH_SPE_DEVICE explicit Quotient(T divisor) {
    constexpr T kTiny = sizeof(T) == 8 ? T(0x1p-900) : T(0x1p-100f);
    constexpr T kScale = sizeof(T) == 8 ? T(0x1p512) : T(0x1p64f);
    scale = (divisor < T(0) ? -divisor : divisor) < kTiny ? kScale : T(1);
    inverse = divisor == T(0) ? T(0) : T(1) / (divisor * scale);
  }
};

// What becomes of rows.
enum class Divide {
  kNot,
  kByDenominator,  // plus eps, which the kernel makes
  kByGiven,        // what an earlier kernel has made
  kByRms,          // the root of the mean square plus eps, of rows of one tile
  kSumSquares,     // nothing: only the squares of a tile are added up
  kBySquares,      // as by the root, from these sums
};

template <class T>
struct RowDivision {
  Divide by = Divide::kNot;
  T eps = 0;
  T* divisor = nullptr;   // [B, N, H], read if given, otherwise written unless null
  T* squares = nullptr;   // [tile, B, N, H], sums of squares of rows of more than one tile
  std::int64_t rows = 0;  // B N H

  TORCH_SPE_DEVICE bool writes(int tile) const {
    return tile == 0 && divisor != nullptr && by != Divide::kByGiven && by != Divide::kSumSquares;
  }
};

// Of a row in the backward pass, from the gradient of its output dy, its output y and the divisor
// d. The gradients before the division would overflow for tiny divisors where those of keys, values
// and states do not: they are taken divided by `scale`, and features of queries multiplied by it.
template <class T>
struct alignas(4 * sizeof(T)) RowFactors {
  T scale;
  T inverse;  // 1 / (d scale)
  T weight;   // gradient of the denominator, -(dy . y) / (d scale); 0 for a norm
  T mean;     // of dy y, for a norm: dy - mean y is divided

  // The gradient before the norm.
  TORCH_SPE_DEVICE T before_norm(T grad, T result) const {
    return (grad - mean * result) * inverse;
  }
};

template <class Storage>
struct RowGradients {
  using T = core::accumulate_t<Storage>;
  std::int64_t batch, length, heads, values;  // B, N, H, E
  const Storage* grad;                        // [B, N, H, E]
  const Storage* result;                      // [B, N, H, E]
  std::int64_t grad_strides[4], result_strides[4];
  const T* divisor;  // [B, N, H]
  bool norm;
  bool aligned;            // all rows can be read 16 bytes at once
  RowFactors<T>* factors;  // [B, N, H]
  // [B, N, H, E] or null: the gradients before the division, for a norm. `inverse` is then 1.
  Storage* divided;

  static constexpr int kRows = 64;             // of a block
  static constexpr int kParts = 8;             // of a row
  static constexpr int kPartRow = kParts + 1;  // in shared memory
};

// Eight threads add up a row, and divide it.
template <class Storage>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    row_factors_kernel(const RowGradients<Storage> p) {
  using T = core::accumulate_t<Storage>;
  using Rows = RowGradients<Storage>;
  constexpr int kVector = Vector<Storage>::kSize;
  TORCH_SPE_SHARED_MEMORY(memory);
  T* const parts = reinterpret_cast<T*>(memory);  // [kRows, kPartRow]
  const int thread = static_cast<int>(threadIdx.x), part = thread % Rows::kParts;
  const std::int64_t tiles = ceil_div(p.length, Rows::kRows), block = blockIdx.x;
  const std::int64_t head = block / tiles % p.heads, batch = block / tiles / p.heads;
  const std::int64_t n0 = block % tiles * Rows::kRows;
  const int count = static_cast<int>(min_of(Rows::kRows, p.length - n0));
  const Storage* const grads =
      p.grad + batch * p.grad_strides[0] + n0 * p.grad_strides[1] + head * p.grad_strides[2];
  const Storage* const results = p.result + batch * p.result_strides[0] + n0 * p.result_strides[1] +
                                 head * p.result_strides[2];
  for (int row = thread / Rows::kParts; row < count; row += kThreads / Rows::kParts) {
    const Storage* const grad = grads + row * p.grad_strides[1];
    const Storage* const result = results + row * p.result_strides[1];
    T sum = 0;
    if (p.aligned) {
      for (std::int64_t e = part * kVector; e < p.values; e += Rows::kParts * kVector) {
        const auto a = *reinterpret_cast<const Vector<Storage>*>(grad + e);
        const auto b = *reinterpret_cast<const Vector<Storage>*>(result + e);
        TORCH_SPE_UNROLL
        for (int i = 0; i < kVector; ++i) sum += read(a.values[i]) * read(b.values[i]);
      }
    } else {
      for (std::int64_t e = part; e < p.values; e += Rows::kParts)
        sum += read(grad[e * p.grad_strides[3]]) * read(result[e * p.result_strides[3]]);
    }
    parts[row * Rows::kPartRow + part] = sum;
  }
  __syncthreads();
  RowFactors<T> own = {};
  if (thread < count) {
    T sum = 0;
    for (int i = 0; i < Rows::kParts; ++i) sum += parts[thread * Rows::kPartRow + i];
    const std::int64_t i = (batch * p.length + n0 + thread) * p.heads + head;
    const Quotient<T> quotient(p.divisor[i]);
    own = {quotient.scale, quotient.inverse, p.norm ? T(0) : -sum * quotient.inverse,
           p.norm ? sum / static_cast<T>(p.values) : T(0)};
    p.factors[i] = own;
    if (p.divided != nullptr) p.factors[i].inverse = T(1);
  }
  if (p.divided == nullptr) return;
  __syncthreads();
  if (thread < count) {
    parts[2 * thread] = own.mean;
    parts[2 * thread + 1] = own.inverse;
  }
  __syncthreads();
  Storage* const divided = p.divided + ((batch * p.length + n0) * p.heads + head) * p.values;
  for (int row = thread / Rows::kParts; row < count; row += kThreads / Rows::kParts) {
    const Storage* const grad = grads + row * p.grad_strides[1];
    const Storage* const result = results + row * p.result_strides[1];
    Storage* const to = divided + row * p.heads * p.values;
    own.mean = parts[2 * row];
    own.inverse = parts[2 * row + 1];
    if (p.aligned) {
      for (std::int64_t e = part * kVector; e < p.values; e += Rows::kParts * kVector) {
        auto a = *reinterpret_cast<const Vector<Storage>*>(grad + e);
        const auto b = *reinterpret_cast<const Vector<Storage>*>(result + e);
        TORCH_SPE_UNROLL
        for (int i = 0; i < kVector; ++i)
          write(own.before_norm(read(a.values[i]), read(b.values[i])), a.values + i);
        *reinterpret_cast<Vector<Storage>*>(to + e) = a;
      }
    } else {
      for (std::int64_t e = part; e < p.values; e += Rows::kParts) {
        const T y = read(result[e * p.result_strides[3]]);
        write(own.before_norm(read(grad[e * p.grad_strides[3]]), y), to + e);
      }
    }
  }
}

template <class Storage>
void make_row_factors(const RowGradients<Storage>& p, Stream stream) {
  using Rows = RowGradients<Storage>;
  const std::int64_t blocks = p.batch * p.heads * ceil_div(p.length, Rows::kRows);
  if (blocks == 0) return;
  launch(row_factors_kernel<Storage>, grid_of(blocks), dim3(kThreads),
         Rows::kRows * Rows::kPartRow * sizeof(core::accumulate_t<Storage>), stream, p);
}

}  // namespace torch_spe::cuda::attention
