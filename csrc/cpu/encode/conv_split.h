// A filter of many taps as nine filters of a quarter of the taps at a quarter of the positions:
// nine sixteenths of the products (the fast FIR algorithm, twice). With even and odd positions and
// taps,
//   y_even = k_even (z_even + z_odd) + (k_odd - k_even) z_odd
//   y_odd  = k_even (z_even + z_odd) + (k_odd' - k_even) z_even,   k_odd'[q] = k_odd[q - 1]
// are three filters instead of four, and each of them is split again in the same way. Nothing but
// the sums of rows is made from the noise; single rows are used where they stand. For the gradient
// of the taps the codes' gradient has the same sums.
// Included by kernels only, like simd.h.
#pragma once

#include "cpu/simd.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

constexpr int kSplit = 4;       // positions, or taps, that go to one index of the parts
constexpr int kSplitParts = 9;  //
constexpr int kSplitSums = 5;   // of rows 0 to 3: of all, 0 + 1, 2 + 3, 0 + 2, 1 + 3

// What each part is made from: a row of four, or, from kSplit on, a sum of rows.
constexpr int kNoiseParts[kSplitParts] = {4, 6, 5, 8, 3, 1, 7, 2, 0};
constexpr int kCodeParts[kSplitParts] = {4, 5, 6, 7, 0, 2, 8, 1, 3};

// Rows with the sums of each four of them.
template <class T>
struct SplitRows {
  const T* rows;
  const T* sums;
  std::int64_t width, distance;  // between rows, between sums

  TORCH_SPE_INLINE const T* part(int index) const {
    return index < kSplit ? rows + index * width : sums + (index - kSplit) * distance;
  }
  TORCH_SPE_INLINE std::int64_t step(int index) const {
    return index < kSplit ? kSplit * width : width;
  }
};

// The sums of `count` times four rows.
template <class T>
void add_rows(const T* rows, std::int64_t count, std::int64_t width, std::int64_t distance,
              T* sums) {
  for (std::int64_t i = 0; i < count; ++i, rows += kSplit * width, sums += width) {
    for (std::int64_t r = 0; r < width; r += kLanes<T>) {
      Vec<T> row[kSplit];
      for (int j = 0; j < kSplit; ++j) row[j] = load_vec(rows + j * width + r);
      const Vec<T> first = row[0] + row[1], second = row[2] + row[3];
      store_vec(sums + r, first + second);
      store_vec(sums + distance + r, first);
      store_vec(sums + 2 * distance + r, second);
      store_vec(sums + 3 * distance + r, row[0] + row[2]);
      store_vec(sums + 4 * distance + r, row[1] + row[3]);
    }
  }
}

// The taps of the parts at an index, one more than there are fours of taps, and in join_taps the
// gradient of four taps from that of the parts, `distance` apart.
template <class T>
void split_taps(const T* taps, std::int64_t count, std::int64_t index, std::int64_t distance,
                T* parts) {
  const auto tap = [&](std::int64_t i) { return i >= 0 && i < count ? taps[i] : T(0); };
  const auto half = [&](int part, std::int64_t i) {
    const T even = tap(2 * i);
    return part == 0 ? even : tap(2 * i + (part == 1 ? 1 : -1)) - even;
  };
  for (int i = 0; i < 3; ++i) {
    const T even = half(i, 2 * index);
    parts[3 * i * distance] = even;
    parts[(3 * i + 1) * distance] = half(i, 2 * index + 1) - even;
    parts[(3 * i + 2) * distance] = half(i, 2 * index - 1) - even;
  }
}
template <class T>
void join_taps(const T* parts, std::int64_t distance, std::int64_t index, T (&taps)[kSplit]) {
  const auto half = [&](int part, std::int64_t i) {
    const T* at = parts + 3 * part * distance + i / 2;
    return i % 2 == 0 ? at[0] - at[distance] - at[2 * distance]
                      : at[distance] + at[2 * distance + 1];
  };
  for (int j = 0; j < 2; ++j) {
    const std::int64_t i = 2 * index + j;
    taps[2 * j] = half(0, i) - half(1, i) - half(2, i);
    taps[2 * j + 1] = half(1, i) + half(2, i + 1);
  }
}

// Codes from those of the parts.
template <class V>
TORCH_SPE_INLINE void join_codes(const V (&parts)[kSplitParts], V (&codes)[kSplit]) {
  for (int j = 0; j < 2; ++j) {
    const V both = parts[0] + parts[1 + j];
    codes[2 * j] = both + (parts[3] + parts[4 + j]);
    codes[2 * j + 1] = both + (parts[6] + parts[7 + j]);
  }
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
