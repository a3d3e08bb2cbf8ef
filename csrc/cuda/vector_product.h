// Products of a tile in shared memory and a vector, by a block of 128 threads: beside those of
// tile_product.h for the sums that linear attention divides by.
#pragma once

#include "tile_product.h"

namespace torch_spe::cuda {

// A vector in shared memory. Of 16 bits it is split into two, the rounded elements and what they
// lack, so that products are as precise as with float32.
template <class Operand>
class VectorOperand {
 public:
  using T = core::accumulate_t<Operand>;
  static constexpr bool kSplit = sizeof(Operand) == 2;

  TORCH_SPE_INLINE VectorOperand(MemoryLayout& layout, int size) : size_(size) {
    if constexpr (kSplit) {
      elements_ = layout.take<Operand>(2 * size);
    } else {
      elements_ = layout.take<T>(size);
    }
  }
  TORCH_SPE_DEVICE void set(int i, T value) const {
    if constexpr (kSplit) {
      write(value, elements_ + i);
      write(value - read(elements_[i]), elements_ + size_ + i);
    } else {
      elements_[i] = value;
    }
  }
  // An element as an operand of tile_product.h holds it: rounded, and nothing of what it lacks.
  TORCH_SPE_DEVICE void set_rounded(int i, T value) const {
    if constexpr (kSplit) {
      write(value, elements_ + i);
      write(T(0), elements_ + size_ + i);
    } else {
      Operand rounded;
      write(value, &rounded);
      elements_[i] = number_of(rounded);
    }
  }
  TORCH_SPE_DEVICE T at(int i) const {
    if constexpr (kSplit) {
      return read(elements_[i]) + read(elements_[size_ + i]);
    } else {
      return elements_[i];
    }
  }
  // The fragment of mma for rows k0 .. k0 + 15: both parts of the vector are its first columns.
  TORCH_SPE_DEVICE void fragment(int k0, std::uint32_t (&out)[2]) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, column = lane / 4;
    const Operand* const from = elements_ + (column == 1 ? size_ : 0) + k0 + lane % 4 * 2;
    out[0] = column < 2 ? *reinterpret_cast<const std::uint32_t*>(from) : 0u;
    out[1] = column < 2 ? *reinterpret_cast<const std::uint32_t*>(from + 8) : 0u;
  }

 private:
  std::conditional_t<kSplit, Operand*, T*> elements_;
  int size_;
};

// D += A v with A [kM, kK] and D [kM] in registers, each element at one thread.
template <class Operand, int kM>
class VectorProduct {
 public:
  using T = core::accumulate_t<Operand>;
  static constexpr bool kTensorCores = sizeof(Operand) == 2;

  TORCH_SPE_DEVICE void clear() {
    TORCH_SPE_UNROLL
    for (T& sum : sums_) sum = 0;
  }

  template <int kK, Major kA>
  TORCH_SPE_DEVICE void multiply(const Operand* a, const VectorOperand<Operand>& v) {
    constexpr int kRow = row_of<Operand>(kA == Major::kDepth ? kK : kM);
    const int thread = static_cast<int>(threadIdx.x);
    if constexpr (kTensorCores) {
      static_assert(kM == 64);
      const int lane = thread % 32, m0 = thread / 32 * 16;
      TORCH_SPE_UNROLL
      for (int k0 = 0; k0 < kK; k0 += 16) {
        std::uint32_t fa[4], fv[2];
        if constexpr (kA == Major::kDepth) {
          ldmatrix_x4<false>(fa, a + (m0 + lane % 16) * kRow + k0 + lane / 16 * 8);
        } else {
          ldmatrix_x4<true>(fa, a + (k0 + lane % 8 + lane / 16 * 8) * kRow + m0 + lane / 8 % 2 * 8);
        }
        v.fragment(k0, fv);
        mma_m16n8k16<Operand>(sums_, fa, fv);
      }
    } else if (thread < kM) {
      for (int k = 0; k < kK; ++k)
        sums_[0] +=
            number_of(kA == Major::kDepth ? a[thread * kRow + k] : a[k * kRow + thread]) * v.at(k);
    }
  }

  // Calls function(row, element) for the elements of this thread.
  template <class Function>
  TORCH_SPE_DEVICE void for_each(const Function& function) {
    const int thread = static_cast<int>(threadIdx.x);
    if constexpr (kTensorCores) {
      if (thread % 4 != 0) return;
      const int row = thread / 32 * 16 + thread % 32 / 4;
      TORCH_SPE_UNROLL
      for (int i = 0; i < 2; ++i) {
        sums_[2 * i] += sums_[2 * i + 1];
        sums_[2 * i + 1] = 0;
        function(row + 8 * i, sums_[2 * i]);
      }
    } else if (thread < kM) {
      function(thread, sums_[0]);
    }
  }

 private:
  T sums_[kTensorCores ? 4 : 1];
};

}  // namespace torch_spe::cuda
