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
};

// How the rows are divided among lanes and blocks: a group of `lanes` lanes has a row at a time, 16
// bytes a lane, a block `positions` positions with all heads.
struct RowGroups {
  static constexpr std::int64_t kRows = 64;  // of a block, about
  int lanes;                                 // a power of two
  std::int64_t positions, blocks_of_batch;

  template <class Storage>
  explicit RowGroups(const RowGradients<Storage>& p)
      : lanes(1),
        positions(max_of(1, kRows / max_of(1, p.heads))),
        blocks_of_batch(ceil_div(p.length, positions)) {
    while (lanes < 32 && lanes * Vector<Storage>::kSize < p.values) lanes *= 2;
  }
};

// A group of lanes loads some rows before it computes anything, neighbouring heads as they lie in
// memory: what is under way together decides how long the kernel takes.
template <class Storage, bool kAligned>
__global__ void __launch_bounds__(kThreads, 8)
    row_factors_kernel(const RowGradients<Storage> p, const RowGroups rows) {
  using T = core::accumulate_t<Storage>;
  constexpr int kVector = Vector<Storage>::kSize, kAtOnce = kAligned ? 2 : 1;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  BlockIndices block(blockIdx.x);
  const std::int64_t n0 = block.next(rows.blocks_of_batch) * rows.positions;
  const std::int64_t batch = block.rest(), first_row = (batch * p.length + n0) * p.heads;
  const int heads = static_cast<int>(p.heads), lanes = rows.lanes;
  const int count = static_cast<int>(min_of(rows.positions, p.length - n0)) * heads;
  const Storage* const grads = p.grad + batch * p.grad_strides[0] + n0 * p.grad_strides[1];
  const Storage* const results = p.result + batch * p.result_strides[0] + n0 * p.result_strides[1];
  const std::int64_t column = lane % lanes * kVector, columns = lanes * kVector;
  const int groups = 32 / lanes;
  for (int begin = warp * groups * kAtOnce; begin < count; begin += kThreads / lanes * kAtOnce) {
    const auto row = [&](int i) { return begin + i * groups + lane / lanes; };
    Vector<Storage> grad[kAtOnce], result[kAtOnce];
    const auto load = [&](std::int64_t e) {
      const Storage *from[kAtOnce], *result_from[kAtOnce];
      TORCH_SPE_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = row(i) < count ? row(i) : count - 1, head = at % heads;
        from[i] = grads + at / heads * p.grad_strides[1] + head * p.grad_strides[2];
        result_from[i] = results + at / heads * p.result_strides[1] + head * p.result_strides[2];
      }
      if constexpr (kAligned) {
        const std::int64_t inside = e < p.values ? e : 0;
        TORCH_SPE_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          grad[i] = *reinterpret_cast<const Vector<Storage>*>(from[i] + inside);
          result[i] = *reinterpret_cast<const Vector<Storage>*>(result_from[i] + inside);
        }
      } else {
        TORCH_SPE_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          TORCH_SPE_UNROLL
          for (int j = 0; j < kVector; ++j) {
            const std::int64_t inside = min_of(e + j, p.values - 1);
            grad[i].values[j] = from[i][inside * p.grad_strides[3]];
            result[i].values[j] = result_from[i][inside * p.result_strides[3]];
          }
        }
      }
    };
    T divisors[kAtOnce], sums[kAtOnce] = {};
    TORCH_SPE_UNROLL
    for (int i = 0; i < kAtOnce; ++i)
      divisors[i] = p.divisor[first_row + (row(i) < count ? row(i) : count - 1)];
    for (std::int64_t e = column; e - column < p.values; e += columns) {
      load(e);
      TORCH_SPE_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        TORCH_SPE_UNROLL
        for (int j = 0; j < kVector; ++j) {
          const T product = read(grad[i].values[j]) * read(result[i].values[j]);
          sums[i] += e + (kAligned ? 0 : j) < p.values ? product : T(0);
        }
      }
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      TORCH_SPE_UNROLL
      for (int i = 0; i < kAtOnce; ++i) sums[i] += shuffle_xor(sums[i], offset);
    }
    RowFactors<T> factors[kAtOnce];
    TORCH_SPE_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const Quotient<T> quotient(divisors[i]);
      factors[i] = {quotient.scale, quotient.inverse, p.norm ? T(0) : -sums[i] * quotient.inverse,
                    p.norm ? sums[i] / static_cast<T>(p.values) : T(0)};
      if (lane % lanes != i % lanes || row(i) >= count) continue;
      RowFactors<T> own = factors[i];
      if (p.divided != nullptr) own.inverse = T(1);
      p.factors[first_row + row(i)] = own;
    }
    if (p.divided == nullptr) continue;
    for (std::int64_t e = column; e < p.values; e += columns) {
      if (p.values > columns) load(e);
      TORCH_SPE_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        if (row(i) >= count) continue;
        Storage* const to = p.divided + (first_row + row(i)) * p.values + e;
        Vector<Storage> divided;
        TORCH_SPE_UNROLL
        for (int j = 0; j < kVector; ++j)
          write(factors[i].before_norm(read(grad[i].values[j]), read(result[i].values[j])),
                divided.values + j);
        if constexpr (kAligned) {
          *reinterpret_cast<Vector<Storage>*>(to) = divided;
        } else {
          TORCH_SPE_UNROLL
          for (int j = 0; j < kVector; ++j)
            if (e + j < p.values) to[j] = divided.values[j];
        }
      }
    }
  }
}

template <class Storage>
void make_row_factors(const RowGradients<Storage>& p, Stream stream) {
  const RowGroups rows(p);
  if (p.batch * p.length * p.heads == 0) return;
  launch(p.aligned ? row_factors_kernel<Storage, true> : row_factors_kernel<Storage, false>,
         grid_of(p.batch * rows.blocks_of_batch), dim3(kThreads), 0, stream, p, rows);
}

}  // namespace torch_spe::cuda::attention
