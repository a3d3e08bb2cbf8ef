// The convolution filter with polyphase noise along one dimension, for 16-bit storage: on tensor
// cores.
//
// Take a feature and a group of s realizations, one of each class. At every position just one of
// them has noise, so that their noise is one stream. Going on by one position and to the next class
// at once, a code keeps its taps, and goes on by one along the stream. A diagonal is such a
// sequence of codes: at position n diagonal i of a group stands for the realization of class (i +
// n) mod s.
//
// A warp follows 16 diagonals (forward) or features (gradient of x) over some positions with the
// codes' taps in registers. Two taps of a code, s apart, times two values of the stream are a pair
// of operands; the other operand of the tensor cores is the pair (x, x), for 8 batch rows or more.
#pragma once

#include "core/conv_filter.h"
#include "tiles.h"

namespace torch_spe::cuda {

constexpr int kPolyphaseRows = 64;  // of a block: 16 for each warp
// Of positions and batch rows, whose sums a warp holds at once.
constexpr int kPolyphaseTileRows = 128;

// What a block holds in shared memory.
struct PolyphasePlan {
  int stride, taps, pairs;  // s, P, pairs of taps of a code
  int features, diagonals;  // at once
  int groups;               // of s diagonals, that these lie in
  int all_groups;           // of the realizations
  int positions;            // noise is made for so many at once
  int words, stream;        // of a stream: in use, and in all
  int columns, row;         // of the tile of x or of grad_out: in use, and in all
  int batch, pass;          // rows of the batch and positions of a tile
  bool has_constant;

  // Number of banks that a stream begins after the one of feature 0 and of the same phase: so that
  // the codes of a warp's 32 lanes lie in different ones.
  int feature_banks, feature_step;

  // A block sums over `depth` features, or diagonals for the gradient of x.
  static PolyphasePlan for_forward(const ConvFilterParams& p, int depth, int positions) {
    return PolyphasePlan(p, depth, kPolyphaseRows, positions, 8, 4).with_columns(depth);
  }
  static PolyphasePlan for_input_gradient(const ConvFilterParams& p, int depth, int positions) {
    return PolyphasePlan(p, kPolyphaseRows, depth, positions, 4, 2).with_columns_of_groups();
  }
  static PolyphasePlan for_tap_gradient(const ConvFilterParams& p, int features, int positions) {
    return PolyphasePlan(p, features, kPolyphaseRows, positions, 4, 1).with_columns_of_groups();
  }

  TORCH_SPE_INLINE std::int64_t diagonal_tiles() const {
    return ceil_div(std::int64_t{all_groups} * stride, diagonals);
  }

 private:
  PolyphasePlan(const ConvFilterParams& p, int features, int diagonals, int positions,
                int feature_banks, int feature_step)
      : stride(static_cast<int>(p.generated.stride[2])),
        taps(static_cast<int>(p.kernel_size[2])),
        pairs((taps + 2 * stride - 1) / (2 * stride)),
        features(features),
        diagonals(diagonals),
        all_groups(static_cast<int>(ceil_div(p.num_realizations, stride))),
        positions(positions),
        batch(p.batch > 8 ? 16 : 8),
        pass(kPolyphaseTileRows / batch),
        has_constant(p.constant != nullptr),
        feature_banks(feature_banks),
        feature_step(feature_step) {
    groups = stride % diagonals == 0   ? 1
             : diagonals % stride == 0 ? diagonals / stride
                                       : (diagonals - 2) / stride + 2;
    if (groups > all_groups) groups = all_groups;
    words = positions + stride - 1 + 2 * (pairs - 1) * stride;
    stream = (words + 31 + 31) / 32 * 32;
  }
  PolyphasePlan with_columns(int count) const {
    PolyphasePlan plan = *this;
    plan.columns = (count + 7) / 8 * 8;
    plan.row = plan.columns < kPolyphaseRows ? kPolyphaseRows : plan.columns;
    plan.row += plan.row % 16 == 0 ? 8 : 16;
    return plan;
  }
  PolyphasePlan with_columns_of_groups() const {
    return with_columns(groups * (stride + pass) + pass);
  }
};

// Whether the kernels here may take the noise.
inline bool is_polyphase_line(const ConvFilterParams& p) {
  const core::NoiseParams& noise = p.generated;
  const std::int64_t s = noise.stride[2];
  return p.noise == nullptr && noise.ndim == 1 && s > 1 && s <= 1024 && p.kernel_size[2] <= 8192 &&
         s <= 4 * p.num_realizations && p.num_realizations <= (1 << 20) && p.batch > 0 &&
         p.in_features > 0 && p.size[2] > 0;
}

// Calls function(plan) with the first of plans for some number of features and diagonals and some
// number of positions, `make(depth, positions)`, of which `Shared` is small enough. Returns whether
// there is one.
template <class Shared, class Make, class Function>
bool choose_plan(std::int64_t sums, const Make& make, const Function& function) {
  for (const int depth : {64, 32, 16}) {
    if (depth > 16 && depth >= 2 * sums) continue;
    for (const int positions : {64, 32, 16, 8}) {
      const PolyphasePlan plan = make(depth, positions);
      if (positions < plan.pass) continue;
      if (positions > plan.pass && sums > depth) continue;  // noise is made again for each depth
      MemoryLayout size;
      Shared{size, plan};
      if (static_cast<std::int64_t>(size.size()) > kMostShared) continue;
      function(plan, size.size());
      return true;
    }
  }
  return false;
}

}  // namespace torch_spe::cuda
