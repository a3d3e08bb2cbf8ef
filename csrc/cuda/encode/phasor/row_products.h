// Kernel of the phasor filter and of its gradient by x as in products.h, for whole rows: 64 inputs
// in aligned rows, and outputs in sixteens. The warps of a block have different outputs of the same
// rows, which are copied to shared memory some positions ahead.
#pragma once

#include "encode/phasor/code_tile.h"

namespace torch_spe::cuda {

template <class Storage, int kTiles>
struct PhasorRowsShared {
  static constexpr int kRow = row_of<Storage>(kProductInputs);
  static constexpr int kBatch = kProductBatch * kTiles;
  static constexpr int kPositions = 8 / kTiles;  // of a copy
  static constexpr int kCopy = kPositions * kBatch * kRow;
  static constexpr int kVectors = kProductInputs / 8;  // of a row, 16 bytes each
  Storage* rows;                                       // [2, position, b, input]

  TORCH_SPE_INLINE explicit PhasorRowsShared(MemoryLayout& layout)
      : rows(layout.take<Storage>(2 * kCopy)) {}
};

// Whether this kernel serves.
template <class Storage, bool kGradient>
TORCH_SPE_INLINE bool has_whole_phasor_rows(const PhasorFilterBackwardParams& p) {
  const std::int64_t inputs = kGradient ? 2 * p.num_pairs : p.in_features;
  const std::int64_t outputs = kGradient ? p.in_features : 2 * p.num_pairs;
  return inputs == kProductInputs && outputs % kProductOutputs == 0 &&
         (kGradient ? is_aligned<Storage>(p.grad_out, p.grad_out_strides)
                    : is_aligned<Storage>(p.x, p.x_strides));
}

// Blocks, each with a run of positions, 8 kTiles batch rows and 16 outputs of one head a warp.
template <bool kGradient, int kTiles>
struct PhasorRowUnits {
  std::int64_t outputs, output_tiles, runs, batch_tiles, count;
  int warps;  // of a block

  TORCH_SPE_INLINE explicit PhasorRowUnits(const PhasorFilterParams& p)
      : outputs(kGradient ? p.in_features : 2 * p.num_pairs),
        runs(ceil_div(p.length, kPhasorRun)),
        batch_tiles(ceil_div(p.batch, kProductBatch * kTiles)) {
    const std::int64_t sixteens = outputs / kProductOutputs;
    warps = sixteens % 4 == 0 ? 4 : sixteens % 2 == 0 ? 2 : 1;
    output_tiles = sixteens / warps;
    count = output_tiles * runs * batch_tiles * p.num_heads;
  }
};

// Outputs out0 and out0 + 1 of this lane's batch rows, at one position after the other.
template <bool kGradient, int kTiles, class Storage>
class PhasorOutputs {
 public:
  TORCH_SPE_DEVICE PhasorOutputs(const PhasorFilterBackwardParams& p, std::int64_t outputs,
                                 std::int64_t b0, std::int64_t n0, std::int64_t head,
                                 std::int64_t out0)
      : map_(kGradient ? p.feature_map : FeatureMap::kIdentity),
        step_(p.num_heads * outputs),
        x_step_(p.x_strides[1]),
        x_feature_(p.x_strides[3]) {
    TORCH_SPE_UNROLL
    for (int i = 0; i < 2 * kTiles; ++i) {
      const std::int64_t b =
          b0 + i / 2 * kProductBatch + 2 * (static_cast<int>(threadIdx.x) % 4) + i % 2;
      inside_[i] = b < p.batch;
      to_[i] = static_cast<Storage*>(kGradient ? p.grad_x : p.out) +
               ((b * p.length + n0) * p.num_heads + head) * outputs + out0;
      if constexpr (kGradient)
        x_[i] = static_cast<const Storage*>(p.x) + (inside_[i] ? b : b0) * p.x_strides[0] +
                n0 * p.x_strides[1] + head * p.x_strides[2] + out0 * p.x_strides[3];
    }
  }
  // Loads what the next position's store() needs, before its sums are made.
  TORCH_SPE_DEVICE void prepare() {
    if constexpr (kGradient) {
      if (map_ == FeatureMap::kIdentity) return;
      TORCH_SPE_UNROLL
      for (int i = 0; i < 2 * kTiles; ++i) {
        x_pairs_[i] = join_halves(x_[i]->bits, x_[i][x_feature_].bits);
        x_[i] += x_step_;
      }
    }
  }
  TORCH_SPE_DEVICE void store(const float (&sums)[kTiles][4]) {
    TORCH_SPE_UNROLL
    for (int i = 0; i < 2 * kTiles; ++i) {
      float first = sums[i / 2][i % 2], second = sums[i / 2][2 + i % 2];
      if constexpr (kGradient) {
        if (map_ != FeatureMap::kIdentity) {
          float x[2];
          unpack_pair<Storage>(x_pairs_[i], &x[0], &x[1]);
          first = gradient_of_input(map_, first, map_feature<Storage>(map_, x[0]));
          second = gradient_of_input(map_, second, map_feature<Storage>(map_, x[1]));
        }
      }
      if (inside_[i]) *reinterpret_cast<std::uint32_t*>(to_[i]) = pack_pair<Storage>(first, second);
      to_[i] += step_;
    }
  }

 private:
  FeatureMap map_;
  std::int64_t step_, x_step_, x_feature_;
  bool inside_[2 * kTiles];
  Storage* to_[2 * kTiles];
  const Storage* x_[kGradient ? 2 * kTiles : 1];
  std::uint32_t x_pairs_[kGradient ? 2 * kTiles : 1];
};

template <class Storage, bool kGradient, bool kConstant, int kTiles>
__global__ void __launch_bounds__(kThreads, kTiles == 1 && !kConstant ? 4 : 3)
    phasor_row_product_kernel(const PhasorFilterBackwardParams p) {
  using Shared = PhasorRowsShared<Storage, kTiles>;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const Shared shared(layout);
  const PhasorRowUnits<kGradient, kTiles> units(p);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  BlockIndices block(blockIdx.x);
  const std::int64_t output_tile = block.next(units.output_tiles) * units.warps + warp;
  const std::int64_t n0 = std::int64_t{block.next(units.runs)} * kPhasorRun;
  const std::int64_t b0 = std::int64_t{block.next(units.batch_tiles)} * Shared::kBatch;
  const std::int64_t head = block.rest(), out0 = output_tile * kProductOutputs + lane / 4 * 2;
  const int count = static_cast<int>(min_of(kPhasorRun, p.length - n0));
  const int batch_left = static_cast<int>(min_of(Shared::kBatch, p.batch - b0));

  const std::int64_t* const strides = kGradient ? p.grad_out_strides : p.x_strides;
  const Storage* const input = static_cast<const Storage*>(kGradient ? p.grad_out : p.x) +
                               b0 * strides[0] + n0 * strides[1] + head * strides[2];
  // Calls function(position, batch row, column, offset in a copy) for the vectors of this thread.
  const auto for_each_own = [&](const auto& function) {
    TORCH_SPE_KEEP_LOOP
    for (int i = thread; i < Shared::kPositions * Shared::kBatch * Shared::kVectors;
         i += units.warps * kLanes) {
      const int row = i / Shared::kVectors, column = i % Shared::kVectors * 8;
      function(row / Shared::kBatch, row % Shared::kBatch, column, row * Shared::kRow + column);
    }
  };
  const auto copy = [&](int since, int buffer) {
    for_each_own([&](int t, int b, int column, int offset) {
      struct alignas(16) Zeros {
        std::uint32_t words[4];
      };
      Storage* const to = shared.rows + buffer * Shared::kCopy + offset;
      if (since + t < count && b < batch_left) {
        copy_async16(to, input + b * strides[0] + (since + t) * strides[1] + column);
      } else {
        *reinterpret_cast<Zeros*>(to) = {};
      }
    });
  };
  copy(0, 0);
  PhasorCodeTile<Storage, kGradient, kConstant> codes(
      p, LaneCodes<kGradient, true>{head, lane % 4 * kLaneInputs, out0}, n0);
  PhasorOutputs<kGradient, kTiles, Storage> outputs(p, units.outputs, b0, n0, head, out0);
  for (int since = 0, buffer = 0; since < count; since += Shared::kPositions, buffer ^= 1) {
    copy_async_wait();
    if (!kGradient && p.feature_map != FeatureMap::kIdentity) {
      for_each_own([&](int, int, int, int offset) {
        map_eight_features(p.feature_map, shared.rows + buffer * Shared::kCopy + offset);
      });
    }
    __syncthreads();  // these rows have arrived, and those before have been used
    if (since + Shared::kPositions < count) copy(since + Shared::kPositions, buffer ^ 1);
    const Storage* row =
        shared.rows + buffer * Shared::kCopy + lane / 4 * Shared::kRow + lane % 4 * kLaneInputs;
    const int end = count - since < Shared::kPositions ? count - since : Shared::kPositions;
    for (int t = 0; t < end; ++t) {
      std::uint32_t inputs[kTiles][kLaneInputs / 2];
      float sums[kTiles][4] = {};
      outputs.prepare();
      TORCH_SPE_UNROLL
      for (int tile = 0; tile < kTiles; ++tile, row += kProductBatch * Shared::kRow)
        load_whole_pairs(row, inputs[tile]);
      codes.multiply(inputs, sums);
      outputs.store(sums);
    }
  }
}

}  // namespace torch_spe::cuda
