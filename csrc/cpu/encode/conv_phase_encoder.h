// y += sum over features of x codes, of polyphase noise: a code takes so few products that y stays
// in registers while the features pass by.
// Included by kernels only, like simd.h.
#pragma once

#include "cpu/encode/conv_products.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

// Rows of y, of positions or of the batch, whose sums are in registers together, with so many
// vectors each.
constexpr int kPhaseSums = 4;
constexpr int kPhaseCols = kVectorBytes == 64 ? 4 : 2;

template <class T>
struct PhaseFeature {
  PhaseTaps<T> taps;
  const T* z;  // noise of the class's first row
};

template <class T>
struct PhaseEncoder {
  const PhaseFeature<T>* features;
  std::int64_t count;  // of features
  const T* x;          // [rows, B, x_ld]
  std::int64_t x_ld;
  T* y;  // [rows, B, width]
  std::int64_t batch, width;
  const ConvPlan& plan;

  // The rows of a class.
  void add(const PhaseClass& positions) const {
    PhaseEncoder part = *this;
    for (std::int64_t d = 0; d < count; d += kPhaseFeatures) {
      part.features = features + d;
      part.count = min_of(kPhaseFeatures, count - d);
      part.x = x + d;
      part.add_features(positions);
    }
  }

 private:
  void add_features(const PhaseClass& positions) const {
    for (std::int64_t m0 = 0; m0 < positions.count[0]; ++m0) {
      for (std::int64_t m1 = 0; m1 < positions.count[1]; ++m1) {
        const std::int64_t line = m0 * plan.periods[1] + m1;
        const std::int64_t row =
            positions.row + (m0 * positions.count[1] + m1) * positions.count[2];
        std::int64_t column = 0;
        for (; column + kPhaseCols * kLanes<T> <= width; column += kPhaseCols * kLanes<T>) {
          add_columns<kPhaseCols>(line * plan.periods[2], row, positions.count[2], column);
        }
        for (; column < width; column += kLanes<T>) {
          add_columns<1>(line * plan.periods[2], row, positions.count[2], column);
        }
      }
    }
  }

  template <int kCols>
  void add_columns(std::int64_t period, std::int64_t row, std::int64_t rows,
                   std::int64_t column) const {
    if (batch == 1) {
      add_block_rows<kPhaseSums, 1, kCols>(period, row, rows, column);
    } else if (batch == 2) {
      add_block_rows<kPhaseSums / 2, 2, kCols>(period, row, rows, column);
    } else {
      add_block_rows<1, kPhaseSums, kCols>(period, row, rows, column);
    }
  }

  template <int kRows, int kBatch, int kCols>
  void add_block_rows(std::int64_t period, std::int64_t row, std::int64_t rows,
                      std::int64_t column) const {
    for (std::int64_t t = 0; t < rows; t += kRows) {
      for (std::int64_t b = 0; b < batch; b += kBatch) {
        // With one row of the batch, rows of positions; otherwise those of a position or two.
        const std::int64_t valid = kBatch == 1  ? min_of(kRows, rows - t)
                                   : kRows == 1 ? min_of(kBatch, batch - b)
                                                : kBatch * min_of(kRows, rows - t);
        add_block<kRows, kBatch, kCols>((period + t) * width + column, (row + t) * batch + b, valid,
                                        column);
      }
    }
  }

  // The first `valid` of kRows * kBatch rows of y.
  template <int kRows, int kBatch, int kCols>
  void add_block(std::int64_t offset, std::int64_t row, std::int64_t valid,
                 std::int64_t column) const {
    constexpr int kSums = kRows * kBatch;
    T* to = y + row * width + column;
    Vec<T> acc[kSums][kCols];
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kCols; ++v) acc[i][v] = Vec<T>{};
    }
    for (std::int64_t d = 0; d < count; ++d) {
      const PhaseTaps<T>& taps = features[d].taps;
      const T* z = features[d].z + offset;
      const T* from = x + row * x_ld + d;
      Vec<T> factors[kSums];
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) factors[i] = Vec<T>{} + from[i * x_ld];
#pragma GCC unroll 4
      for (int v = 0; v < kCols; ++v) {
        const std::int64_t* index = taps.index + column / kLanes<T> + v;
        Vec<T> code[kRows];
#pragma GCC unroll 4
        for (int t = 0; t < kRows; ++t) code[t] = load_vec(taps.init + column + v * kLanes<T>);
        if (taps.in_line) {
          const T* noise = z + taps.offsets[0] + v * kLanes<T>;
          // A slot has the rows of the one before and one more, and loads are what takes time.
          Vec<T> seen[kRows];
#pragma GCC unroll 4
          for (int t = 0; t + 1 < kRows; ++t) seen[t + 1] = load_vec(noise + t * width);
          noise += (kRows - 1) * width;
          for (std::int64_t i = 0; i < taps.slots; ++i, index += kVecs, noise += width) {
#pragma GCC unroll 4
            for (int t = 0; t + 1 < kRows; ++t) seen[t] = seen[t + 1];
            seen[kRows - 1] = load_vec(noise);
            const Vec<T> tap = load_vec(taps.taps + *index);
#pragma GCC unroll 4
            for (int t = 0; t < kRows; ++t) code[t] += tap * seen[t];
          }
        } else {
          for (std::int64_t i = 0; i < taps.slots; ++i, index += kVecs) {
            const Vec<T> tap = load_vec(taps.taps + *index);
            const T* noise = z + taps.offsets[i] + v * kLanes<T>;
#pragma GCC unroll 4
            for (int t = 0; t < kRows; ++t) code[t] += tap * load_vec(noise + t * width);
          }
        }
#pragma GCC unroll 4
        for (int i = 0; i < kSums; ++i) acc[i][v] += factors[i] * code[i / kBatch];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) {
      if (i >= valid) break;
#pragma GCC unroll 4
      for (int v = 0; v < kCols; ++v) {
        T* at = to + i * width + v * kLanes<T>;
        store_vec(at, load_vec(at) + acc[i][v]);
      }
    }
  }
};

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
