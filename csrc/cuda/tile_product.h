// Products of tiles in shared memory by a block of 128 threads, D += A B with A [kM, kK], B [kK,
// kN] and D in registers: on tensor cores with float32 sums for 16-bit and tf32 operands, by fused
// multiply-adds for float and double.
//
// Whoever fills the tiles sets what lies outside of the matrices to zero, so that every size works.
#pragma once

#include <type_traits>

#include "primitives.h"

namespace torch_spe::cuda {

constexpr int kThreads = 128;
// Blocks that a multiprocessor must hold of a kernel which needs many registers. Left to its own
// guess, ptxas spills some to make room for more blocks.
constexpr int kLeastBlocks = 2;

// A float32 number rounded to the tensor cores' 10 bits of mantissa.
struct Tf32 {
  std::uint32_t bits;
};
TORCH_SPE_DEVICE void write(float value, Tf32* out) { out->bits = to_tf32(value); }

// The number that an operand stands for, in the type of computation.
TORCH_SPE_DEVICE float number_of(Tf32 operand) { return core::bits_to_float(operand.bits); }
template <class Operand>
TORCH_SPE_DEVICE core::accumulate_t<Operand> number_of(Operand operand) {
  return read(operand);
}

// Which index of an operand is contiguous in shared memory: that of the sum, or the outer one.
// Numbers of a Toeplitz matrix A depend on column - row only, see toeplitz_size.
enum class Major { kDepth, kOuter, kToeplitz };

// Elements between the rows of an operand, so that the rows which a warp reads at once lie in
// different banks (and, for ldmatrix, at multiples of 16 bytes).
template <class Operand>
constexpr int kPadding = sizeof(Operand) == 2            ? 8
                         : std::is_same_v<Operand, Tf32> ? 4
                                                         : 1;
template <class Operand>
TORCH_SPE_INLINE constexpr int row_of(int contiguous) {
  return contiguous + kPadding<Operand>;
}

// A Toeplitz matrix [rows, columns] in shared memory: number i is that with column - row equal to
// i - (rows - 1). As 16-bit values are read in pairs, there are 2 copies of them, copy 1 without
// the first number.
template <class Operand>
constexpr int kToeplitzCopies = sizeof(Operand) == 2 ? 2 : 1;
template <class Operand>
TORCH_SPE_INLINE constexpr int toeplitz_copy_size(int rows, int columns) {
  // The pairs that a warp reads at once, at most 7 words of each copy, lie in different banks.
  return sizeof(Operand) == 2 ? (rows + columns) / 32 * 32 + 16 : rows + columns - 1;
}
template <class Operand>
TORCH_SPE_INLINE constexpr int toeplitz_size(int rows, int columns) {
  return kToeplitzCopies<Operand> * toeplitz_copy_size<Operand>(rows, columns);
}

template <class Operand, int kM, int kN>
class TileProduct {
 public:
  using T = core::accumulate_t<Operand>;
  static constexpr bool kTensorCores = sizeof(Operand) == 2 || std::is_same_v<Operand, Tf32>;

  TORCH_SPE_DEVICE void clear() {
    TORCH_SPE_UNROLL
    for (int i = 0; i < kCount; ++i) sum(i) = 0;
  }

  template <int kK, Major kA, Major kB>
  TORCH_SPE_DEVICE void multiply(const Operand* a, const Operand* b) {
    static_assert(kK % 16 == 0);
    if constexpr (sizeof(Operand) == 2) {
      multiply_16_bit<kK, kA, kB>(a, b);
    } else if constexpr (kTensorCores) {
      multiply_tf32<kK, kA, kB>(a, b);
    } else {
      multiply_plain<kK, kA, kB>(a, b);
    }
  }

  // Calls rows(row) for each row of which this thread holds elements, and what that returns with
  // (column, element) for each of them.
  template <class Rows>
  TORCH_SPE_DEVICE void for_each_row(const Rows& rows) {
    const int thread = static_cast<int>(threadIdx.x);
    if constexpr (kTensorCores) {
      const int lane = thread % 32, warp = thread / 32;
      const int row = warp / kWarpsN * kWarpM + lane / 4;
      const int column = warp % kWarpsN * kWarpN + lane % 4 * 2;
      TORCH_SPE_UNROLL
      for (int i = 0; i < 2 * kTilesM; ++i) {
        const auto take = rows(row + 8 * i);
        TORCH_SPE_UNROLL
        for (int j = 0; j < kTilesN; ++j) {
          TORCH_SPE_UNROLL
          for (int e = 0; e < 2; ++e)
            take(column + 8 * j + e, sums_[i / 2 * kTilesN + j][i % 2 * 2 + e]);
        }
      }
    } else {
      TORCH_SPE_UNROLL
      for (int i = 0; i < kM / 16; ++i) {
        const auto take = rows(thread / 8 + 16 * i);
        TORCH_SPE_UNROLL
        for (int j = 0; j < kN / 8; ++j) take(thread % 8 + 8 * j, sum(i * (kN / 8) + j));
      }
    }
  }

  // The same with the values of another product of the same tile: (column, element, of the other).
  template <class Rows>
  TORCH_SPE_DEVICE void for_each_row_with(TileProduct& other, const Rows& rows) {
    T others[kCount];
    int i = 0;
    other.for_each_row([&](int) { return [&](int, T element) { others[i++] = element; }; });
    i = 0;
    for_each_row([&](int row) {
      const auto take = rows(row);
      return [&others, &i, take](int column, T& element) { take(column, element, others[i++]); };
    });
  }

  // Writes the tile to shared memory, rows row_of<Out>(kN) apart: what rows(row) returns makes an
  // element of (column, value).
  template <class Out, class Rows>
  TORCH_SPE_DEVICE void store(Out* out, const Rows& rows) {
    constexpr int kRow = row_of<Out>(kN);
    if constexpr (kTensorCores && sizeof(Out) == 2) {
      const int lane = static_cast<int>(threadIdx.x) % 32;
      const int warp = static_cast<int>(threadIdx.x) / 32;
      const int row = warp / kWarpsN * kWarpM + lane / 4;
      const int column = warp % kWarpsN * kWarpN + lane % 4 * 2;
      TORCH_SPE_UNROLL
      for (int i = 0; i < 2 * kTilesM; ++i) {
        const auto make = rows(row + 8 * i);
        Out* const to = out + (row + 8 * i) * kRow + column;
        TORCH_SPE_UNROLL
        for (int j = 0; j < kTilesN; ++j) {
          const T* const pair = &sums_[i / 2 * kTilesN + j][i % 2 * 2];
          *reinterpret_cast<std::uint32_t*>(to + 8 * j) =
              pack_pair<Out>(make(column + 8 * j, pair[0]), make(column + 8 * j + 1, pair[1]));
        }
      }
    } else {
      for_each_row([&](int row) {
        const auto make = rows(row);
        Out* const to = out + row * kRow;
        return [=](int column, T value) { write(make(column, value), to + column); };
      });
    }
  }
  TORCH_SPE_DEVICE void store(Operand* out) {
    store(out, [](int) { return [](int, T value) { return value; }; });
  }

  // Calls function(row, column, value) for the values that this thread holds.
  template <class Function>
  TORCH_SPE_DEVICE void for_each(const Function& function) {
    const int thread = static_cast<int>(threadIdx.x);
    if constexpr (kTensorCores) {
      const int lane = thread % 32, warp = thread / 32;
      const int row = warp / kWarpsN * kWarpM + lane / 4;
      const int column = warp % kWarpsN * kWarpN + lane % 4 * 2;
      TORCH_SPE_UNROLL
      for (int i = 0; i < kTilesM; ++i) {
        TORCH_SPE_UNROLL
        for (int j = 0; j < kTilesN; ++j) {
          TORCH_SPE_UNROLL
          for (int e = 0; e < 4; ++e)
            function(row + 16 * i + 8 * (e / 2), column + 8 * j + e % 2, sums_[i * kTilesN + j][e]);
        }
      }
    } else {
      TORCH_SPE_UNROLL
      for (int i = 0; i < kM / 16; ++i) {
        TORCH_SPE_UNROLL
        for (int j = 0; j < kN / 8; ++j)
          function(thread / 8 + 16 * i, thread % 8 + 8 * j, sum(i * (kN / 8) + j));
      }
    }
  }

 private:
  // Four warps, side by side where the tile is wide enough.
  static constexpr int kWarpsN = kM >= 128 ? 1 : 2;
  static constexpr int kWarpsM = 4 / kWarpsN;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  static constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;
  static constexpr int kCount = kM * kN / kThreads;
  static_assert(kM % 16 == 0 && kN % 8 == 0);
  static_assert(!kTensorCores || (kWarpM % 16 == 0 && kWarpN % 16 == 0));

  template <int kK, Major kA, Major kB>
  TORCH_SPE_DEVICE void multiply_16_bit(const Operand* a, const Operand* b) {
    constexpr int kRowA = row_of<Operand>(kA == Major::kDepth ? kK : kM);
    constexpr int kRowB = row_of<Operand>(kB == Major::kDepth ? kK : kN);
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int m0 = warp / kWarpsN * kWarpM, n0 = warp % kWarpsN * kWarpN;
    // The lane's row within the 16 x 16 values that one ldmatrix brings, for each of both orders.
    const int low = lane % 8 + lane / 8 % 2 * 8, high = lane / 16 * 8;
    // Of a Toeplitz matrix, blocks of 8 x 8 values along a diagonal are the same.
    constexpr int kBlocks = kA == Major::kToeplitz ? (kWarpM + kK) / 8 - 1 : 1;
    std::uint32_t blocks[kBlocks];
    if constexpr (kA == Major::kToeplitz) {
      static_assert((kM + kK) % 32 == 0);
      const int i = kM - 1 - (m0 + lane / 4) + lane % 4 * 2, copy = i % 2;
      const Operand* const pairs = a + copy * toeplitz_copy_size<Operand>(kM, kK) + i - copy;
      TORCH_SPE_UNROLL
      for (int block = 0; block < kBlocks; ++block)
        blocks[block] = *reinterpret_cast<const std::uint32_t*>(pairs + 8 * (block + 1) - kWarpM);
    }
    TORCH_SPE_UNROLL
    for (int k0 = 0; k0 < kK; k0 += 16) {
      std::uint32_t fa[kTilesM][4], fb[kTilesN / 2][4];
      TORCH_SPE_UNROLL
      for (int i = 0; i < kTilesM; ++i) {
        if constexpr (kA == Major::kToeplitz) {
          const int block = (kWarpM + k0) / 8 - 1 - 2 * i;
          fa[i][0] = fa[i][3] = blocks[block];
          fa[i][1] = blocks[block - 1];
          fa[i][2] = blocks[block + 1];
        } else if constexpr (kA == Major::kDepth) {
          ldmatrix_x4<false>(fa[i], a + (m0 + 16 * i + low) * kRowA + k0 + high);
        } else {
          ldmatrix_x4<true>(fa[i],
                            a + (k0 + lane % 8 + high) * kRowA + m0 + 16 * i + low - lane % 8);
        }
      }
      TORCH_SPE_UNROLL
      for (int j = 0; j < kTilesN / 2; ++j) {
        if constexpr (kB == Major::kDepth) {
          ldmatrix_x4<false>(fb[j],
                             b + (n0 + 16 * j + lane % 8 + high) * kRowB + k0 + low - lane % 8);
        } else {
          ldmatrix_x4<true>(fb[j], b + (k0 + low) * kRowB + n0 + 16 * j + high);
        }
      }
      TORCH_SPE_UNROLL
      for (int i = 0; i < kTilesM; ++i) {
        TORCH_SPE_UNROLL
        for (int j = 0; j < kTilesN; ++j) {
          const std::uint32_t pair[2] = {fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]};
          mma_m16n8k16<Operand>(sums_[i * kTilesN + j], fa[i], pair);
        }
      }
    }
  }

  template <int kK, Major kA, Major kB>
  TORCH_SPE_DEVICE void multiply_tf32(const Operand* a, const Operand* b) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int group = lane / 4, member = lane % 4;
    const int m0 = warp / kWarpsN * kWarpM + group, n0 = warp % kWarpsN * kWarpN + group;
    TORCH_SPE_UNROLL
    for (int k0 = 0; k0 < kK; k0 += 8) {
      std::uint32_t fb[kTilesN][2];
      TORCH_SPE_UNROLL
      for (int j = 0; j < kTilesN; ++j) {
        TORCH_SPE_UNROLL
        for (int e = 0; e < 2; ++e)
          fb[j][e] = at_b<kK, kB>(b, k0 + member + 4 * e, n0 + 8 * j).bits;
      }
      TORCH_SPE_UNROLL
      for (int i = 0; i < kTilesM; ++i) {
        std::uint32_t fa[4];
        TORCH_SPE_UNROLL
        for (int e = 0; e < 4; ++e)
          fa[e] = at_a<kK, kA>(a, m0 + 16 * i + e % 2 * 8, k0 + member + e / 2 * 4).bits;
        TORCH_SPE_UNROLL
        for (int j = 0; j < kTilesN; ++j) mma_m16n8k8_tf32(sums_[i * kTilesN + j], fa, fb[j]);
      }
    }
  }

  template <int kK, Major kA, Major kB>
  TORCH_SPE_DEVICE void multiply_plain(const Operand* a, const Operand* b) {
    const int row = static_cast<int>(threadIdx.x) / 8, column = static_cast<int>(threadIdx.x) % 8;
    for (int k = 0; k < kK; ++k) {
      T va[kM / 16], vb[kN / 8];
      TORCH_SPE_UNROLL
      for (int i = 0; i < kM / 16; ++i) va[i] = at_a<kK, kA>(a, row + 16 * i, k);
      TORCH_SPE_UNROLL
      for (int j = 0; j < kN / 8; ++j) vb[j] = at_b<kK, kB>(b, k, column + 8 * j);
      TORCH_SPE_UNROLL
      for (int i = 0; i < kM / 16; ++i) {
        TORCH_SPE_UNROLL
        for (int j = 0; j < kN / 8; ++j) sum(i * (kN / 8) + j) += va[i] * vb[j];
      }
    }
  }

  template <int kK, Major kA>
  TORCH_SPE_DEVICE static Operand at_a(const Operand* a, int m, int k) {
    if constexpr (kA == Major::kToeplitz) return a[kM - 1 - m + k];
    return kA == Major::kDepth ? a[m * row_of<Operand>(kK) + k] : a[k * row_of<Operand>(kM) + m];
  }
  template <int kK, Major kB>
  TORCH_SPE_DEVICE static Operand at_b(const Operand* b, int k, int n) {
    return kB == Major::kDepth ? b[n * row_of<Operand>(kK) + k] : b[k * row_of<Operand>(kN) + n];
  }

  TORCH_SPE_DEVICE T& sum(int i) { return sums_[i / 4][i % 4]; }

  T sums_[kCount / 4][4];
};

}  // namespace torch_spe::cuda
