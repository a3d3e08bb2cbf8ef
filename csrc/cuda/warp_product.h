// Products of tiles in shared memory of which every warp of a block has rows of its own: on tensor
// cores or by fused multiply-adds, as tile_product.h has it. What a warp multiplies depends on the
// warp, and a result that only its own warp reads needs no barrier.
#pragma once

#include "tile_product.h"

namespace torch_spe::cuda {

// A fragment of mma with 16 rows of a warp, from 16-bit operands in shared memory that begin at
// `a`, their rows `row_a` apart. The lane is given, so that the caller decides whether it is read
// again.
template <Major kA, class Operand>
TORCH_SPE_DEVICE void load_fragment(std::uint32_t (&out)[4], const Operand* a, int row_a,
                                    int lane) {
  // The lane's row within the 16 x 16 values that one ldmatrix brings, for each of both orders.
  const int low = lane % 16, high = lane / 16 * 8;
  if constexpr (kA == Major::kDepth) {
    ldmatrix_x4<false>(out, a + low * row_a + high);
  } else {
    ldmatrix_x4<true>(out, a + (lane % 8 + high) * row_a + low - lane % 8);
  }
}

// D [kM, kN] += A [kM, kK] B [kK, kN] of one warp; kM is 16 on tensor cores, else 8 or 16.
template <class Operand, int kM, int kN>
class WarpProduct {
 public:
  using T = core::accumulate_t<Operand>;
  static constexpr bool kTensorCores = sizeof(Operand) == 2 || std::is_same_v<Operand, Tf32>;
  static constexpr int kRows = kM / 8;  // of a thread

  TORCH_SPE_DEVICE void clear() {
    TORCH_SPE_UNROLL
    for (int i = 0; i < kN / 8; ++i) {
      TORCH_SPE_UNROLL
      for (int j = 0; j < 2 * kRows; ++j) sums_[i][j] = 0;
    }
  }

  // `a` and `b` are where the warp's operands begin, their rows `row_a` and `row_b` apart.
  template <int kK, Major kA, Major kB>
  TORCH_SPE_DEVICE void multiply(const Operand* a, int row_a, const Operand* b, int row_b) {
    if constexpr (sizeof(Operand) == 2) {
      multiply_16_bit<kK, kA, kB>(a, row_a, b, row_b);
    } else if constexpr (kTensorCores) {
      multiply_tf32<kK, kA, kB>(a, row_a, b, row_b);
    } else {
      multiply_plain<kK, kA, kB>(a, row_a, b, row_b);
    }
  }

  // The same for a depth of 16, with A in registers; `b` begins at that depth.
  template <Major kB>
  TORCH_SPE_DEVICE void multiply_fragment(const std::uint32_t (&fa)[4], const Operand* b, int row_b,
                                          int lane) {
    const int low = lane % 16, high = lane / 16 * 8;
    TORCH_SPE_UNROLL
    for (int j = 0; j < kN / 16; ++j) {
      std::uint32_t fb[4];
      if constexpr (kB == Major::kDepth) {
        ldmatrix_x4<false>(fb, b + (16 * j + lane % 8 + high) * row_b + low - lane % 8);
      } else {
        ldmatrix_x4<true>(fb, b + low * row_b + 16 * j + high);
      }
      TORCH_SPE_UNROLL
      for (int e = 0; e < 2; ++e) {
        const std::uint32_t pair[2] = {fb[2 * e], fb[2 * e + 1]};
        mma_m16n8k16<Operand>(sums_[2 * j + e], fa, pair);
      }
    }
  }
  // The result as a fragment A of the next product: sums of D and values of A are held alike.
  TORCH_SPE_DEVICE void to_fragment(std::uint32_t (&out)[4]) const {
    static_assert(kM == 16 && kN == 16);
    TORCH_SPE_UNROLL
    for (int e = 0; e < 4; ++e)
      out[e] = pack_pair<Operand>(sums_[e / 2][e % 2 * 2], sums_[e / 2][e % 2 * 2 + 1]);
  }

  // Calls rows(row) for each row of which this thread holds elements, and what that returns with
  // (column, element) for each of them. Rows are those of the block: a warp's begin at warp * kM.
  template <class Rows>
  TORCH_SPE_DEVICE void for_each_row(const Rows& rows) {
    const int thread = thread_read_again();
    const int row = thread / 32 * kM + thread % 32 / 4, column = thread % 4 * 2;
    TORCH_SPE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const auto take = rows(row + 8 * i);
      TORCH_SPE_UNROLL
      for (int j = 0; j < kN / 8; ++j) {
        TORCH_SPE_UNROLL
        for (int e = 0; e < 2; ++e) take(column + 8 * j + e, sums_[j][2 * i + e]);
      }
    }
  }
  // Calls function(i, column, element) for the elements of this thread, with the number of their
  // row among the thread's.
  template <class Function>
  TORCH_SPE_DEVICE void for_each(const Function& function) {
    const int column = thread_read_again() % 4 * 2;
    TORCH_SPE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      TORCH_SPE_UNROLL
      for (int j = 0; j < kN / 8; ++j) {
        TORCH_SPE_UNROLL
        for (int e = 0; e < 2; ++e) function(i, column + 8 * j + e, sums_[j][2 * i + e]);
      }
    }
  }

  // Calls function(i, j, pair, of the other) for the pairs of neighbouring elements of this thread,
  // in columns from 8 j on, and those of another product in the same place; for j from `first` to
  // before `end`, both known when this is compiled.
  template <class Function>
  TORCH_SPE_DEVICE void for_each_pair_with(const WarpProduct& other, const Function& function,
                                           int first = 0, int end = kN / 8) {
    TORCH_SPE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      TORCH_SPE_UNROLL
      for (int j = first; j < end; ++j) function(i, j, &sums_[j][2 * i], &other.sums_[j][2 * i]);
    }
  }

  // Writes the rows of all warps to shared memory, `stride` apart: what rows(row) returns makes an
  // element of (column, value).
  template <class Out, class Rows>
  TORCH_SPE_DEVICE void store(Out* out, const Rows& rows, int stride = row_of<Out>(kN)) {
    if constexpr (sizeof(Out) == 2) {
      const int thread = thread_read_again();
      const int row = thread / 32 * kM + thread % 32 / 4, column = thread % 4 * 2;
      TORCH_SPE_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const auto make = rows(row + 8 * i);
        Out* const to = out + (row + 8 * i) * stride + column;
        TORCH_SPE_UNROLL
        for (int j = 0; j < kN / 8; ++j) {
          *reinterpret_cast<std::uint32_t*>(to + 8 * j) = pack_pair<Out>(
              make(column + 8 * j, sums_[j][2 * i]), make(column + 8 * j + 1, sums_[j][2 * i + 1]));
        }
      }
    } else {
      for_each_row([&](int row) {
        const auto make = rows(row);
        Out* const to = out + row * stride;
        return [=](int column, T value) { write(make(column, value), to + column); };
      });
    }
  }
  TORCH_SPE_DEVICE void store(Operand* out) {
    store(out, [](int) { return [](int, T value) { return value; }; });
  }
  // Adds an element of another product to each, where function(i, column) is true.
  template <class Function>
  TORCH_SPE_DEVICE void add_where(const WarpProduct& other, const Function& function) {
    const int column = thread_read_again() % 4 * 2;
    TORCH_SPE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      TORCH_SPE_UNROLL
      for (int j = 0; j < kN / 8; ++j) {
        TORCH_SPE_UNROLL
        for (int e = 0; e < 2; ++e)
          if (function(i, column + 8 * j + e)) sums_[j][2 * i + e] += other.sums_[j][2 * i + e];
      }
    }
  }

 private:
  static_assert(kTensorCores ? kM == 16 && kN % 16 == 0 : kM % 8 == 0 && kN % 8 == 0);

  template <int kK, Major kA, Major kB>
  TORCH_SPE_DEVICE void multiply_16_bit(const Operand* a, int row_a, const Operand* b, int row_b) {
    static_assert(kK % 16 == 0);
    const int lane = thread_read_again() % 32;
    TORCH_SPE_UNROLL
    for (int k0 = 0; k0 < kK; k0 += 16) {
      std::uint32_t fa[4];
      load_fragment<kA>(fa, a + (kA == Major::kDepth ? k0 : k0 * row_a), row_a, lane);
      multiply_fragment<kB>(fa, b + (kB == Major::kDepth ? k0 : k0 * row_b), row_b, lane);
    }
  }

  template <int kK, Major kA, Major kB>
  TORCH_SPE_DEVICE void multiply_tf32(const Operand* a, int row_a, const Operand* b, int row_b) {
    static_assert(kK % 8 == 0);
    const int lane = thread_read_again() % 32, group = lane / 4, member = lane % 4;
    TORCH_SPE_UNROLL
    for (int k0 = 0; k0 < kK; k0 += 8) {
      std::uint32_t fa[4];
      TORCH_SPE_UNROLL
      for (int e = 0; e < 4; ++e)
        fa[e] = at<kA>(a, row_a, group + e % 2 * 8, k0 + member + e / 2 * 4).bits;
      TORCH_SPE_UNROLL
      for (int j = 0; j < kN / 8; ++j) {
        const std::uint32_t fb[2] = {at<kB>(b, row_b, group + 8 * j, k0 + member).bits,
                                     at<kB>(b, row_b, group + 8 * j, k0 + member + 4).bits};
        mma_m16n8k8_tf32(sums_[j], fa, fb);
      }
    }
  }

  template <int kK, Major kA, Major kB>
  TORCH_SPE_DEVICE void multiply_plain(const Operand* a, int row_a, const Operand* b, int row_b) {
    const int lane = thread_read_again() % 32, row = lane / 4, column = lane % 4 * 2;
    TORCH_SPE_UNROLL_TWICE
    for (int k = 0; k < kK; ++k) {
      T va[kRows];
      TORCH_SPE_UNROLL
      for (int i = 0; i < kRows; ++i) va[i] = at<kA>(a, row_a, row + 8 * i, k);
      TORCH_SPE_UNROLL
      for (int j = 0; j < kN / 8; ++j) {
        TORCH_SPE_UNROLL
        for (int e = 0; e < 2; ++e) {
          const T vb = at<kB>(b, row_b, column + 8 * j + e, k);
          TORCH_SPE_UNROLL
          for (int i = 0; i < kRows; ++i) sums_[j][2 * i + e] += va[i] * vb;
        }
      }
    }
  }

  // With the index of the sum, k, contiguous or the outer one.
  template <Major kMajor>
  TORCH_SPE_DEVICE static Operand at(const Operand* from, int row, int outer, int k) {
    return kMajor == Major::kDepth ? from[outer * row + k] : from[k * row + outer];
  }

  T sums_[kN / 8][2 * kRows];
};

}  // namespace torch_spe::cuda
