// How the convolution filter cuts up the grid of positions, the realizations and its work.
// Included by kernels only, like simd.h.
#pragma once

#include "core/conv_filter.h"
#include "cpu/encode/conv_split.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

// Realizations that are handled together: kVecs vectors.
constexpr int kVecs = 4;
template <class T>
constexpr std::int64_t kWidth = kVecs * kLanes<T>;
constexpr std::int64_t kMaxRows = 2048;             // positions of a chunk, in all batch rows x 4
constexpr std::int64_t kSplitRows = 1024;           // with sums of noise and gradients in the cache
constexpr std::int64_t kMinRows = 256;              // the noise beyond a chunk's end is made twice
constexpr std::int64_t kWindowBytes = 1024 * 1024;  // noise of a group of features
constexpr std::int64_t kMinSplitTaps = 32;          // fewer are not split

// Features of polyphase noise that pass by at a time: the noise of more does not stay in the
// nearest cache while it serves the rows of a class.
constexpr std::int64_t kPhaseFeatures = 4;

// A part of the grid of positions.
struct GridBox {
  std::int64_t begin[3], size[3];

  std::int64_t rows() const { return size[0] * size[1] * size[2]; }
};

// The positions of a box fall into classes of equal residues modulo the strides. Tiles hold their
// rows class by class, so that along the last dimension, at consecutive rows, every feature's codes
// need the same taps and consecutive periods of the noise.
struct PhaseClass {
  std::int64_t residue[3], count[3];
  std::int64_t row;  // the first one in the tiles

  std::int64_t rows() const { return count[0] * count[1] * count[2]; }
};

template <class Function>
TORCH_SPE_INLINE void for_each_class(const GridBox& box, const std::int64_t stride[3],
                                     const Function& function) {
  PhaseClass c;
  c.row = 0;
  for (c.residue[0] = 0; c.residue[0] < min_of(stride[0], box.size[0]); ++c.residue[0]) {
    for (c.residue[1] = 0; c.residue[1] < min_of(stride[1], box.size[1]); ++c.residue[1]) {
      for (c.residue[2] = 0; c.residue[2] < min_of(stride[2], box.size[2]); ++c.residue[2]) {
        for (int i = 0; i < 3; ++i) {
          c.count[i] = (box.size[i] - c.residue[i] + stride[i] - 1) / stride[i];
        }
        function(c);
        c.row += c.rows();
      }
    }
  }
}

// Calls function(row, i0, i1, i2) for the rows of a tile and their positions in the grid.
template <class Function>
TORCH_SPE_INLINE void for_each_row(const GridBox& box, const std::int64_t stride[3],
                                   const Function& function) {
  for_each_class(box, stride, [&](const PhaseClass& c) {
    std::int64_t row = c.row;
    for (std::int64_t m0 = 0; m0 < c.count[0]; ++m0) {
      for (std::int64_t m1 = 0; m1 < c.count[1]; ++m1) {
        for (std::int64_t m2 = 0; m2 < c.count[2]; ++m2) {
          function(row++, box.begin[0] + c.residue[0] + m0 * stride[0],
                   box.begin[1] + c.residue[1] + m1 * stride[1],
                   box.begin[2] + c.residue[2] + m2 * stride[2]);
        }
      }
    }
  });
}

// How the work is cut up.
struct ConvPlan {
  int axis;                 // the grid is cut into chunks along its first dimension
  std::int64_t length;      // of a chunk along the axis
  std::int64_t chunks;      //
  std::int64_t blocks;      // of realizations
  std::int64_t periods[3];  // of noise that the codes of a chunk need
  std::int64_t group;       // features whose noise is held together
  // Along the last dimension, of the parts of conv_split.h, or of the only one.
  std::int64_t parts, part_taps, part_periods;
  std::int64_t lead;  // positions of the first four before the first row

  bool split() const { return parts > 1; }
  std::int64_t part_rows(std::int64_t rows) const { return (lead + rows + kSplit - 1) / kSplit; }
  std::int64_t windows() const { return periods[0] * periods[1] * periods[2]; }

  GridBox chunk(const core::ConvFilterParams& p, std::int64_t index) const {
    GridBox box{{0, 0, 0}, {p.size[0], p.size[1], p.size[2]}};
    box.begin[axis] = index * length;
    box.size[axis] = min_of(length, p.size[axis] - box.begin[axis]);
    return box;
  }
};

template <class T>
ConvPlan make_conv_plan(const core::ConvFilterParams& p, std::int64_t rows) {
  ConvPlan plan;
  const int ndim = p.generated.ndim;
  plan.axis = 3 - ndim;
  const std::int64_t others = p.size[0] * p.size[1] * p.size[2] / p.size[plan.axis];
  plan.length = min_of(p.size[plan.axis], max_of(1, round_up(rows, kSplit) / others));
  plan.chunks = (p.size[plan.axis] + plan.length - 1) / plan.length;
  plan.blocks = (p.num_realizations + kWidth<T> - 1) / kWidth<T>;
  for (int i = 0; i < 3; ++i) {
    const std::int64_t length = i == plan.axis ? plan.length : p.size[i];
    const std::int64_t stride = p.generated.stride[i];
    plan.periods[i] = (length + p.kernel_size[i] - 2 + stride - 1) / stride + 1;
  }
  plan.parts = 1;
  plan.part_taps = p.kernel_size[2];
  plan.part_periods = plan.periods[2];
  plan.lead = 0;
  // Nothing in how a code is summed may depend on the chunk, or piece of a sequence, that it is in:
  // fours begin at multiples of four, and there is noise for whole ones.
  const std::int64_t (&s)[3] = p.generated.stride;
  if (s[0] * s[1] * s[2] == 1 && p.kernel_size[2] >= kMinSplitTaps && ndim == 1) {
    if (p.noise == nullptr) plan.lead = core::floor_modulo(p.generated.start[2], kSplit);
    plan.parts = kSplitParts;
    plan.part_taps = (p.kernel_size[2] + kSplit - 1) / kSplit + 1;
    plan.part_periods = plan.part_rows(plan.length) + plan.part_taps - 1;
    plan.periods[2] = kSplit * plan.part_periods;
  }
  const std::int64_t bytes = plan.windows() * kWidth<T> * static_cast<std::int64_t>(sizeof(T));
  plan.group = kWindowBytes / bytes;
  // Polyphase codes are added up in groups of so many features.
  if (s[0] * s[1] * s[2] > 1) plan.group = round_up(max_of(1, plan.group), kPhaseFeatures);
  plan.group = max_of(1, min_of(p.in_features, plan.group));
  return plan;
}

// Whole vectors, and whole blocks of the generator's realizations.
template <class T>
std::int64_t block_width(std::int64_t num_realizations, std::int64_t first) {
  return min_of(kWidth<T>, round_up(num_realizations - first, max_of(4, kLanes<T>)));
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
