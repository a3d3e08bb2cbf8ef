// Microkernels of the convolution filter: codes from noise and taps, and the gradients of taps.
// Included by kernels only, like simd.h.
#pragma once

#include "cpu/encode/conv_geometry.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

// Positions whose dense codes are made together: with kVecs vectors each, they fill the registers
// and leave some for a row of noise and a tap. (Seven, with taps read from memory, were 10 %
// slower.)
constexpr int kDenseRows = kVectorBytes == 64 ? 6 : 3;
// Rows beyond the end of the noise that blocks of rows may reach.
constexpr std::int64_t kWindowSlack = kSplit * kDenseRows;
constexpr int kPhaseRows = kVectorBytes == 64 ? 4 : 2;
// Taps of dense and of polyphase noise whose gradients are made together.
// (33, as kernels of 128 taps are split into, are three times eleven.)
constexpr int kDenseTaps = kVectorBytes == 64 ? 11 : 8;
constexpr int kPhaseTaps = 2;
// Zeros on either side of a row of the kernel, so that vectors and blocks may reach over its ends.
constexpr std::int64_t kPad = 16;
static_assert(kPad >= kLanes<float> && kPad >= kDenseRows);

// Codes of kRows consecutive positions and kCols vectors of realizations from dense noise:
// acc[t] = init + sum_o sum_j kernel_o[j - t] z[offset_o + j], a product with a Toeplitz matrix
// that is read from the kernel's rows [o, kPad zeros, taps, kPad zeros].
template <class T>
struct DenseTaps {
  static constexpr int kRows = kDenseRows;
  const T* kernel;
  const T* init;                // [width]
  std::int64_t taps;            // of the last dimension
  std::int64_t rows;            // of the kernel
  std::int64_t kernel_ld;       // between them
  const std::int64_t* offsets;  // [rows], of their noise, in steps
  std::int64_t step;            // between positions of the noise

  template <int kRows, int kCols>
  TORCH_SPE_INLINE void block(const T* z, std::int64_t, std::int64_t column,
                              Vec<T> (&acc)[kRows][kCols]) const {
    for (int t = 0; t < kRows; ++t) {
      for (int v = 0; v < kCols; ++v) acc[t][v] = load_vec(init + column + v * kLanes<T>);
    }
    for (std::int64_t o = 0; o < rows; ++o) {
      const T* k = kernel + o * kernel_ld + kPad;
      const T* row = z + offsets[o] * step + column;
      if (taps < kRows) {
        for (const T* end = k + taps + kRows - 1; k < end; ++k, row += step) {
          add_products<0, kRows>(k, row, acc);
        }
        continue;
      }
      // Without the products with zeros at both ends.
      add_first_products(k, row, acc, std::make_index_sequence<kRows - 1>());
      k += kRows - 1;
      row += (kRows - 1) * step;
      for (const T* end = k + taps - (kRows - 1); k < end; ++k, row += step) {
        add_products<0, kRows>(k, row, acc);
      }
      add_last_products(k, row, acc, std::make_index_sequence<kRows - 1>());
    }
  }

 private:
  // Those of one row of the noise with the codes [kBegin, kEnd).
  template <int kBegin, int kEnd, int kRows, int kCols>
  TORCH_SPE_INLINE static void add_products(const T* k, const T* row, Vec<T> (&acc)[kRows][kCols]) {
    // A tap is loaded anew at each step: a broadcast from memory takes no unit that the products
    // want, one from a register does.
    asm("" : "+r"(k));
    Vec<T> c[kCols];
    for (int v = 0; v < kCols; ++v) c[v] = load_vec(row + v * kLanes<T>);
    for (int t = kBegin; t < kEnd; ++t) {
      const T tap = k[-t];
      for (int v = 0; v < kCols; ++v) acc[t][v] += tap * c[v];
    }
  }
  template <int kRows, int kCols, std::size_t... kStep>
  TORCH_SPE_INLINE void add_first_products([[maybe_unused]] const T* k,
                                           [[maybe_unused]] const T* row,
                                           Vec<T> (&acc)[kRows][kCols],
                                           std::index_sequence<kStep...>) const {
    (add_products<0, static_cast<int>(kStep) + 1>(k + kStep, row + kStep * step, acc), ...);
  }
  template <int kRows, int kCols, std::size_t... kStep>
  TORCH_SPE_INLINE void add_last_products([[maybe_unused]] const T* k,
                                          [[maybe_unused]] const T* row,
                                          Vec<T> (&acc)[kRows][kCols],
                                          std::index_sequence<kStep...>) const {
    (add_products<static_cast<int>(kStep) + 1, kRows>(k + kStep, row + kStep * step, acc), ...);
  }
};

// The same from polyphase noise: a sum over slots of taps * z[row + offset]. A slot has taps of its
// own for every realization, and their vectors stand where `index` says.
template <class T>
struct PhaseTaps {
  static constexpr int kRows = kPhaseRows;
  const T* taps;
  const T* init;                // [width]
  std::int64_t slots;           //
  const std::int64_t* index;    // [slots, kVecs]
  const std::int64_t* offsets;  // [slots]
  bool in_line;                 // slot by slot one row further; there is a slot then

  template <int kRows, int kCols>
  TORCH_SPE_INLINE void block(const T* z, std::int64_t width, std::int64_t column,
                              Vec<T> (&acc)[kRows][kCols]) const {
    for (int t = 0; t < kRows; ++t) {
      for (int v = 0; v < kCols; ++v) acc[t][v] = load_vec(init + column + v * kLanes<T>);
    }
    const std::int64_t* from = index + column / kLanes<T>;
    for (std::int64_t i = 0; i < slots; ++i, from += kVecs) {
      const T* row = z + offsets[i] + column;
      for (int v = 0; v < kCols; ++v) {
        const Vec<T> tap = load_vec(taps + from[v]);
        for (int t = 0; t < kRows; ++t) {
          acc[t][v] += tap * load_vec(row + t * width + v * kLanes<T>);
        }
      }
    }
  }
};

// The codes of `count` consecutive rows, given to `consume(row, valid, column, codes)` in blocks of
// which the first `valid` rows count.
template <int kCols, class T, class Taps, class Consumer>
TORCH_SPE_INLINE void make_columns(Taps taps, const T* z, std::int64_t width, std::int64_t column,
                                   std::int64_t row, std::int64_t count, Consumer consume) {
  for (std::int64_t t = 0; t < count; t += Taps::kRows) {
    if (count - t > 1) {
      Vec<T> acc[Taps::kRows][kCols];
      taps.block(z + t * width, width, column, acc);
      consume(row + t, min_of(Taps::kRows, count - t), column, acc);
    } else {
      Vec<T> acc[1][kCols];
      taps.block(z + t * width, width, column, acc);
      consume(row + t, 1, column, acc);
    }
  }
}

// The same from parts, of `count` rows and `lead` before them. `taps` has the kernel of the first
// part; the others follow at a distance.
template <int kCols, class T, class Consumer>
TORCH_SPE_INLINE void make_split_columns(const DenseTaps<T>& taps, std::int64_t kernel_distance,
                                         const SplitRows<T>& z, std::int64_t column,
                                         std::int64_t lead, std::int64_t count, Consumer consume) {
  const T zeros[kWidth<T>] = {};
  const std::int64_t part_rows = (lead + count + kSplit - 1) / kSplit;
  for (std::int64_t t0 = 0; t0 < part_rows; t0 += kDenseRows) {
    Vec<T> parts[kDenseRows][kCols][kSplitParts];
    for (int i = 0; i < kSplitParts; ++i) {
      DenseTaps<T> part = taps;
      part.kernel += i * kernel_distance;
      part.step = z.step(kNoiseParts[i]);
      if (i > 0) part.init = zeros;
      Vec<T> acc[kDenseRows][kCols];  // in registers, which `parts` is not
      part.block(z.part(kNoiseParts[i]) + t0 * part.step, z.width, column, acc);
      for (int t = 0; t < kDenseRows; ++t) {
        for (int v = 0; v < kCols; ++v) parts[t][v][i] = acc[t][v];
      }
    }
    for (std::int64_t t = 0; t < min_of(kDenseRows, part_rows - t0); ++t) {
      Vec<T> codes[kSplit][kCols];
      for (int v = 0; v < kCols; ++v) {
        Vec<T> joined[kSplit];
        join_codes(parts[t][v], joined);
        for (int i = 0; i < kSplit; ++i) codes[i][v] = joined[i];
      }
      const std::int64_t row = kSplit * (t0 + t) - lead;
      if (row < 0) {
        for (int i = 0; i + lead < kSplit; ++i) {
          for (int v = 0; v < kCols; ++v) codes[i][v] = codes[i + lead][v];
        }
        consume(0, min_of(kSplit - lead, count), column, codes);
      } else {
        consume(row, min_of(kSplit, count - row), column, codes);
      }
    }
  }
}

template <class T, class Consumer>
void make_split_codes(const DenseTaps<T>& taps, std::int64_t kernel_distance, const SplitRows<T>& z,
                      std::int64_t lead, std::int64_t count, Consumer consume) {
  if (z.width == kWidth<T>) {
    make_split_columns<kVecs>(taps, kernel_distance, z, 0, lead, count, consume);
  } else {
    for (std::int64_t column = 0; column < z.width; column += kLanes<T>) {
      make_split_columns<1>(taps, kernel_distance, z, column, lead, count, consume);
    }
  }
}

template <class T, class Taps, class Consumer>
void make_codes(Taps taps, const T* z, std::int64_t width, std::int64_t row, std::int64_t count,
                Consumer consume) {
  if (width == kWidth<T>) {
    make_columns<kVecs>(taps, z, width, 0, row, count, consume);
  } else {
    for (std::int64_t column = 0; column < width; column += kLanes<T>) {
      make_columns<1>(taps, z, width, column, row, count, consume);
    }
  }
}

// sums[i] += sum over kRows consecutive rows of g * z[row + i], one vector wide.
template <int kTaps, int kRows, class T>
TORCH_SPE_INLINE void correlate_rows(const T* g, std::int64_t g_step, const T* z,
                                     std::int64_t z_step, Vec<T> (&sums)[kTaps]) {
  Vec<T> grad[kRows];
  for (int t = 0; t < kRows; ++t) grad[t] = load_vec(g + t * g_step);
#pragma GCC unroll 32
  for (int j = 0; j < kTaps + kRows - 1; ++j, z += z_step) {
    const Vec<T> noise = load_vec(z);
    for (int t = 0; t < kRows; ++t) {
      if (j >= t && j - t < kTaps) sums[j - t] += grad[t] * noise;
    }
  }
}
template <int kTaps, class T>
TORCH_SPE_INLINE void correlate_dense(const T* g, std::int64_t g_step, const T* z,
                                      std::int64_t z_step, std::int64_t count,
                                      Vec<T> (&sums)[kTaps]) {
  std::int64_t t = 0;
  for (; t + 4 <= count; t += 4)
    correlate_rows<kTaps, 4>(g + t * g_step, g_step, z + t * z_step, z_step, sums);
  for (; t < count; ++t)
    correlate_rows<kTaps, 1>(g + t * g_step, g_step, z + t * z_step, z_step, sums);
}

// sums[i][v] += sum over rows of g * z[row + offsets[i]].
template <int kTaps, int kCols, class T>
TORCH_SPE_INLINE void correlate_slots(const T* g, const T* z, const std::int64_t* offsets,
                                      std::int64_t width, std::int64_t count,
                                      Vec<T> (&sums)[kTaps][kCols]) {
  const T* rows[kTaps];
  for (int i = 0; i < kTaps; ++i) rows[i] = z + offsets[i];
  for (std::int64_t t = 0; t < count * width; t += width) {
    for (int v = 0; v < kCols; ++v) {
      const Vec<T> grad = load_vec(g + t + v * kLanes<T>);
      for (int i = 0; i < kTaps; ++i) sums[i][v] += grad * load_vec(rows[i] + t + v * kLanes<T>);
    }
  }
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
