// Kernel of the phasor filter and of its gradient by x, for every type and kind of positions.
#pragma once

#include "encode/phasor.h"
#include "phasor_filter.h"

namespace torch_spe::cuda {

// The filter (lanes are pairs, the sum is over features) and its gradient by x (lanes are features,
// the sum is over pairs). A thread keeps one lane at kThreadPositions consecutive positions and
// kBatch rows of the batch; a code comes from the one before by a rotation, and is exact every
// kThreadPositions.
constexpr int kThreadPositions = 8;
constexpr int kPhasorTilePositions = kWarps * kThreadPositions;
constexpr int kPhasorTableRows =
    16;  // features or pairs whose coefficients lie in shared memory at once

template <class T, bool kGradient, int kBatch>
struct PhasorTables {
  static constexpr int kParts = kGradient ? 2 : 1;  // real and imaginary part
  static constexpr int kRow = kLanes + 1;
  double* freqs;  // [sum, lane], first coordinates
  T* codes;       // [4, sum, lane]: coefficient and constant, real and imaginary
  T* inputs;      // [position, sum, batch, part]

  TORCH_SPE_INLINE explicit PhasorTables(MemoryLayout& layout)
      : freqs(layout.take<double>(kPhasorTableRows * kRow)),
        codes(layout.take<T>(4 * kPhasorTableRows * kRow)),
        inputs(layout.take<T>(kPhasorTilePositions * kPhasorTableRows * kBatch * kParts)) {}
};

template <class Storage, bool kGradient, int kBatch>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    phasor_codes_kernel(const PhasorFilterBackwardParams p) {
  using T = core::accumulate_t<Storage>;
  using Shared = PhasorTables<T, kGradient, kBatch>;
  constexpr int kRow = Shared::kRow, kParts = Shared::kParts;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const Shared shared(layout);
  const std::int64_t features = p.in_features, pairs = p.num_pairs;
  const std::int64_t lanes = kGradient ? features : pairs, sums = kGradient ? pairs : features;
  const std::int64_t lane_tiles = ceil_div(lanes, kLanes);
  const std::int64_t batch_tiles = ceil_div(p.batch, kBatch);
  const std::int64_t position_tiles = ceil_div(p.length, kPhasorTilePositions);
  const std::int64_t block = blockIdx.x;
  const std::int64_t lane0 = block % lane_tiles * kLanes;
  const std::int64_t b0 = block / lane_tiles % batch_tiles * kBatch;
  const std::int64_t tile0 =
      block / lane_tiles / batch_tiles % position_tiles * kPhasorTilePositions;
  const std::int64_t head = block / lane_tiles / batch_tiles / position_tiles;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  const std::int64_t n0 = tile0 + warp * kThreadPositions;
  const Storage* const input = static_cast<const Storage*>(kGradient ? p.grad_out : p.x);
  const std::int64_t* const strides = kGradient ? p.grad_out_strides : p.x_strides;
  const T* const coefficients = static_cast<const T*>(p.coefficients);
  const T* const constant = static_cast<const T*>(p.constant);

  T re[kThreadPositions][kBatch], im[kThreadPositions][kBatch];
  TORCH_SPE_UNROLL
  for (int t = 0; t < kThreadPositions; ++t) {
    TORCH_SPE_UNROLL
    for (int b = 0; b < kBatch; ++b) re[t][b] = im[t][b] = 0;
  }
  for (std::int64_t sum0 = 0; sum0 < sums; sum0 += kPhasorTableRows) {
    const int count = static_cast<int>(min_of(kPhasorTableRows, sums - sum0));
    __syncthreads();  // the tables before have been used
    for (int i = thread; i < kPhasorTableRows * kLanes; i += kThreads) {
      // Pairs are contiguous in memory.
      const int in_sum = kGradient ? i % kPhasorTableRows : i / kLanes;
      const int in_lanes = kGradient ? i / kPhasorTableRows : i % kLanes;
      const std::int64_t d = kGradient ? lane0 + in_lanes : sum0 + in_sum;
      const std::int64_t pair = kGradient ? sum0 + in_sum : lane0 + in_lanes;
      const bool inside = d < features && pair < pairs;
      const std::int64_t index = (head * features + d) * pairs + pair;
      const int to = in_sum * kRow + in_lanes;
      shared.freqs[to] = inside ? p.freqs[index * p.ndim] : 0.0;
      TORCH_SPE_UNROLL
      for (int part = 0; part < 2; ++part) {
        shared.codes[part * kPhasorTableRows * kRow + to] =
            inside ? coefficients[2 * index + part] : T(0);
        shared.codes[(2 + part) * kPhasorTableRows * kRow + to] =
            inside && constant != nullptr ? constant[2 * index + part] : T(0);
      }
    }
    for (int i = thread; i < kPhasorTilePositions * kBatch * kPhasorTableRows * kParts;
         i += kThreads) {
      const int in_sum = i % (kPhasorTableRows * kParts) / kParts, part = i % kParts;
      const int b = i / (kPhasorTableRows * kParts) % kBatch,
                t = i / (kPhasorTableRows * kParts) / kBatch;
      const bool inside = sum0 + in_sum < sums && b0 + b < p.batch && tile0 + t < p.length;
      T value = 0;
      if (inside) {
        value = read(input[(b0 + b) * strides[0] + (tile0 + t) * strides[1] + head * strides[2] +
                           ((sum0 + in_sum) * kParts + part) * strides[3]]);
        if constexpr (!kGradient) value = map_feature<Storage>(p.feature_map, value);
      }
      shared.inputs[((t * kPhasorTableRows + in_sum) * kBatch + b) * kParts + part] = value;
    }
    __syncthreads();
    for (int s = 0; s < count; ++s) {
      const int at = s * kRow + lane;
      const T cr = shared.codes[at], ci = shared.codes[kPhasorTableRows * kRow + at];
      const T kr = shared.codes[2 * kPhasorTableRows * kRow + at],
              ki = shared.codes[3 * kPhasorTableRows * kRow + at];
      Phasor<T> phasor, step;
      if (p.positions == nullptr) {
        phasor.set(shared.freqs[at], p.start + static_cast<double>(n0));
        step.set(shared.freqs[at], 1.0);
      }
      const std::int64_t d = kGradient ? lane0 + lane : sum0 + s;
      const std::int64_t pair = kGradient ? sum0 + s : lane0 + lane;
      TORCH_SPE_UNROLL
      for (int t = 0; t < kThreadPositions; ++t) {
        if (p.positions != nullptr && d < features && pair < pairs && n0 + t < p.length)
          phasor.set(p, p.freqs + ((head * features + d) * pairs + pair) * p.ndim, n0 + t);
        const T code_re = cr * phasor.re - ci * phasor.im + kr;
        const T code_im = cr * phasor.im + ci * phasor.re + ki;
        const T* const values =
            shared.inputs +
            ((warp * kThreadPositions + t) * kPhasorTableRows + s) * kBatch * kParts;
        TORCH_SPE_UNROLL
        for (int b = 0; b < kBatch; ++b) {
          if constexpr (kGradient) {
            re[t][b] += values[2 * b] * code_re + values[2 * b + 1] * code_im;
          } else {
            re[t][b] += values[b] * code_re;
            im[t][b] += values[b] * code_im;
          }
        }
        if (p.positions == nullptr) phasor.rotate(step);
      }
    }
  }
  if (lane0 + lane >= lanes) return;
  Storage* const out = static_cast<Storage*>(kGradient ? p.grad_x : p.out);
  const std::int64_t width = kGradient ? features : 2 * pairs;
  TORCH_SPE_UNROLL
  for (int t = 0; t < kThreadPositions; ++t) {
    TORCH_SPE_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      if (n0 + t >= p.length || b0 + b >= p.batch) continue;
      Storage* const row = out + (((b0 + b) * p.length + n0 + t) * p.num_heads + head) * width;
      if constexpr (kGradient) {
        const Storage* const x = static_cast<const Storage*>(p.x) + (b0 + b) * p.x_strides[0] +
                                 (n0 + t) * p.x_strides[1] + head * p.x_strides[2] +
                                 (lane0 + lane) * p.x_strides[3];
        write(gradient_of_input_at(p.feature_map, re[t][b], x), row + lane0 + lane);
      } else {
        write(re[t][b], row + 2 * (lane0 + lane));
        write(im[t][b], row + 2 * (lane0 + lane) + 1);
      }
    }
  }
}

}  // namespace torch_spe::cuda
