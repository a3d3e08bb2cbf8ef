// Kernel of the phasor filter and of its gradient by x for 16-bit storage at consecutive positions,
// on tensor cores: at every position a product of codes, which each lane makes in registers, with
// the rows of the batch.
//
// A code comes from the one of the position before by a rotation in float32, and is exact again
// after kPhasorRun positions at most: far more precise than the 16 bits that it is rounded to.
#pragma once

#include "encode/phasor.h"
#include "phasor_filter.h"

namespace torch_spe::cuda {

constexpr int kPhasorRun = 64;
constexpr int kProductBatch = 8;  // of the batch, in one mma

// What lane 4 g + c of a warp holds in the mma's that multiply codes [16 outputs, 64 inputs] with
// inputs [64, 8 batch rows]. The inputs of step s and the mma's indices 2c, 2c + 1, 2c + 8, 2c + 9
// are 16 c + 4 s + {0, 1, 2, 3}, so that those of a lane are contiguous; its outputs are 2 g and
// 2 g + 1 at batch rows 2 c and 2 c + 1.
//   filter:   inputs are features, outputs the real and imaginary parts of pair g
//   gradient: inputs are the real and imaginary parts of pairs, outputs features
constexpr int kProductOutputs = 16;
constexpr int kProductInputs = 64;
constexpr int kProductSteps = kProductInputs / 16;
constexpr int kLaneInputs = 4 * kProductSteps;

// 16 values of an aligned row in pairs.
template <class Storage>
TORCH_SPE_DEVICE void load_whole_pairs(const Storage* row, std::uint32_t (&out)[kLaneInputs / 2]) {
  struct alignas(16) Words {
    std::uint32_t words[4];
  };
  TORCH_SPE_UNROLL
  for (int i = 0; i < 2; ++i) {
    const Words four = reinterpret_cast<const Words*>(row)[i];
    TORCH_SPE_UNROLL
    for (int e = 0; e < 4; ++e) out[4 * i + e] = four.words[e];
  }
}

// The same of any row, zero from `count` on.
template <class Storage>
TORCH_SPE_DEVICE void load_pairs(const Storage* row, std::int64_t count, std::int64_t stride,
                                 bool aligned, std::uint32_t (&out)[kLaneInputs / 2]) {
  if (aligned && count >= kLaneInputs) return load_whole_pairs(row, out);
  TORCH_SPE_UNROLL
  for (int i = 0; i < kLaneInputs / 2; ++i) {
    const std::uint32_t low = 2 * i < count ? row[2 * i * stride].bits : 0u;
    const std::uint32_t high = 2 * i + 1 < count ? row[(2 * i + 1) * stride].bits : 0u;
    out[i] = low | high << 16;
  }
}

// A code times e^(2 pi i f n), and the rotation to the next position.
struct alignas(16) RotatingCode {
  Phasor<float> code, step;
};

template <int kTiles>
struct PhasorProductShared {
  // Where inputs come in several parts, runs are shorter and sums are kept from part to part.
  static constexpr int kShortRun = 16;
  RotatingCode* codes;  // [warp, code, lane]
  float* sums;          // [warp, position, sum, lane]

  TORCH_SPE_INLINE PhasorProductShared(MemoryLayout& layout, std::int64_t inputs)
      : codes(layout.take<RotatingCode>(kWarps * kLaneInputs * kLanes)),
        sums(inputs <= kProductInputs
                 ? nullptr
                 : layout.take<float>(kWarps * kShortRun * kTiles * 4 * kLanes)) {}
};

// Warps, each with 16 outputs of one head, a run of positions and 8 kTiles batch rows.
template <bool kGradient, int kTiles>
struct PhasorProductUnits {
  std::int64_t inputs, outputs, run, output_tiles, runs, batch_tiles, count;

  TORCH_SPE_INLINE explicit PhasorProductUnits(const PhasorFilterParams& p)
      : inputs(kGradient ? 2 * p.num_pairs : p.in_features),
        outputs(kGradient ? p.in_features : 2 * p.num_pairs),
        run(inputs <= kProductInputs ? kPhasorRun : PhasorProductShared<kTiles>::kShortRun),
        output_tiles(ceil_div(outputs, kProductOutputs)),
        runs(ceil_div(p.length, run)),
        batch_tiles(ceil_div(p.batch, kProductBatch * kTiles)),
        count(output_tiles * runs * batch_tiles * p.num_heads) {}
};

// Outputs out0 and out0 + 1 of this lane's batch rows, at one position after the other.
template <bool kGradient, int kTiles, class Storage>
class PhasorOutputs {
 public:
  TORCH_SPE_DEVICE PhasorOutputs(const PhasorFilterBackwardParams& p,
                                 const PhasorProductUnits<kGradient, kTiles>& units,
                                 std::int64_t b0, std::int64_t n0, std::int64_t head,
                                 std::int64_t out0)
      : map_(kGradient ? p.feature_map : FeatureMap::kIdentity),
        step_(p.num_heads * units.outputs),
        x_step_(p.x_strides[1]),
        x_feature_(p.x_strides[3]) {
    TORCH_SPE_UNROLL
    for (int i = 0; i < 2 * kTiles; ++i) {
      const std::int64_t b =
          b0 + i / 2 * kProductBatch + 2 * (static_cast<int>(threadIdx.x) % 4) + i % 2;
      inside_[i] = b < p.batch;
      to_[i] = static_cast<Storage*>(kGradient ? p.grad_x : p.out) +
               ((b * p.length + n0) * p.num_heads + head) * units.outputs + out0;
      if constexpr (kGradient)
        x_[i] = static_cast<const Storage*>(p.x) + b * p.x_strides[0] + n0 * p.x_strides[1] +
                head * p.x_strides[2] + out0 * p.x_strides[3];
    }
  }
  TORCH_SPE_DEVICE void store(const float (&sums)[kTiles][4]) {
    TORCH_SPE_UNROLL
    for (int i = 0; i < 2 * kTiles; ++i) {
      float first = sums[i / 2][i % 2], second = sums[i / 2][2 + i % 2];
      if constexpr (kGradient) {
        if (map_ != FeatureMap::kIdentity) {
          if (inside_[i]) {
            first = gradient_of_input_at(map_, first, x_[i]);
            second = gradient_of_input_at(map_, second, x_[i] + x_feature_);
          }
          x_[i] += x_step_;
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
};

template <class Storage, bool kGradient, int kTiles>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    phasor_product_kernel(const PhasorFilterBackwardParams p) {
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const PhasorProductUnits<kGradient, kTiles> units(p);
  const PhasorProductShared<kTiles> shared(layout, units.inputs);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  const int group = lane / 4, member = lane % 4;
  const std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * kWarps + warp;
  if (unit >= units.count) return;
  const std::int64_t out0 = unit % units.output_tiles * kProductOutputs + 2 * group;
  const std::int64_t n0 = unit / units.output_tiles % units.runs * units.run;
  const std::int64_t b0 =
      unit / units.output_tiles / units.runs % units.batch_tiles * (kProductBatch * kTiles);
  const std::int64_t head = unit / units.output_tiles / units.runs / units.batch_tiles;
  const int count = static_cast<int>(min_of(units.run, p.length - n0));

  const Storage* const input = static_cast<const Storage*>(kGradient ? p.grad_out : p.x);
  const std::int64_t* const strides = kGradient ? p.grad_out_strides : p.x_strides;
  const bool aligned = strides[3] == 1 && rows_are_aligned<Storage>(input, strides[0]) &&
                       rows_are_aligned<Storage>(input, strides[1]) &&
                       rows_are_aligned<Storage>(input, strides[2]);
  const float* const coefficients = static_cast<const float*>(p.coefficients);
  const float* const constant = static_cast<const float*>(p.constant);
  RotatingCode* const own_codes = shared.codes + warp * kLaneInputs * kLanes + lane;
  float* const own_sums = shared.sums == nullptr
                              ? nullptr
                              : shared.sums + warp * units.run * kTiles * 4 * kLanes + lane;

  for (std::int64_t in0 = 0; in0 < units.inputs; in0 += kProductInputs) {
    const std::int64_t own_inputs = in0 + member * kLaneInputs;
    // The feature and pair of this lane's i-th code, and whether there is such a one.
    const auto find_code = [&](int i, std::int64_t* index) {
      const std::int64_t feature = kGradient ? out0 + i % 2 : own_inputs + i;
      const std::int64_t pair = kGradient ? own_inputs / 2 + i / 2 : out0 / 2;
      *index = (head * p.in_features + feature) * p.num_pairs + pair;
      return feature < p.in_features && pair < p.num_pairs;
    };
    // A row of A is a real or imaginary part (filter), or a feature (gradient).
    const auto fragment = [&](const Phasor<float>(&codes)[4], std::uint32_t (&a)[4]) {
      TORCH_SPE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Phasor<float>&first = codes[i / 2 * 2], &second = codes[i / 2 * 2 + 1];
        a[i] = kGradient    ? pack_pair<Storage>(codes[i].re, codes[i].im)
               : i % 2 == 0 ? pack_pair<Storage>(first.re, second.re)
                            : pack_pair<Storage>(first.im, second.im);
      }
    };

    for (int i = 0; i < kLaneInputs; ++i) {
      std::int64_t index;
      RotatingCode rotating{{0.0f, 0.0f}, {}};
      if (find_code(i, &index)) {
        rotating.code.set(p.freqs[index], p.start + static_cast<double>(n0));
        rotating.code.rotate({coefficients[2 * index], coefficients[2 * index + 1]});
        rotating.step.set(p.freqs[index], 1.0);
      }
      own_codes[i * kLanes] = rotating;
    }
    Phasor<float> codes[kProductSteps][4], steps[kProductSteps][4];
    std::uint32_t constants[kProductSteps][4] = {};
    TORCH_SPE_UNROLL
    for (int s = 0; s < kProductSteps; ++s) {
      Phasor<float> parts[4] = {{0.0f, 0.0f}, {0.0f, 0.0f}, {0.0f, 0.0f}, {0.0f, 0.0f}};
      TORCH_SPE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const RotatingCode rotating = own_codes[(4 * s + i) * kLanes];
        codes[s][i] = rotating.code;
        steps[s][i] = rotating.step;
        std::int64_t index;
        if (constant != nullptr && find_code(4 * s + i, &index))
          parts[i] = {constant[2 * index], constant[2 * index + 1]};
      }
      fragment(parts, constants[s]);
    }

    // Adds a position's codes times inputs to the sums of its outputs, and rotates to the next.
    const auto multiply = [&](const std::uint32_t (&inputs)[kTiles][kLaneInputs / 2],
                              float (&sums)[kTiles][4]) {
      TORCH_SPE_UNROLL
      for (int s = 0; s < kProductSteps; ++s) {
        std::uint32_t a[4];
        fragment(codes[s], a);
        TORCH_SPE_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
          const std::uint32_t b[2] = {inputs[tile][2 * s], inputs[tile][2 * s + 1]};
          mma_m16n8k16<Storage>(sums[tile], a, b);
          if (constant != nullptr) mma_m16n8k16<Storage>(sums[tile], constants[s], b);
        }
        TORCH_SPE_UNROLL
        for (int i = 0; i < 4; ++i) codes[s][i].rotate(steps[s][i]);
      }
    };
    const auto map = [&](std::uint32_t (&inputs)[kTiles][kLaneInputs / 2]) {
      if constexpr (!kGradient) {
        if (p.feature_map == FeatureMap::kIdentity) return;
        TORCH_SPE_UNROLL
        for (int i = 0; i < kTiles * kLaneInputs / 2; ++i) {
          std::uint32_t& pair = inputs[i / (kLaneInputs / 2)][i % (kLaneInputs / 2)];
          pair = map_feature_pair<Storage>(p.feature_map, pair);
        }
      }
    };

    const Storage* row[kTiles];
    std::int64_t inside[kTiles];  // values of the row that belong to this lane
    TORCH_SPE_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      const std::int64_t b = b0 + tile * kProductBatch + group;
      row[tile] =
          input + b * strides[0] + n0 * strides[1] + head * strides[2] + own_inputs * strides[3];
      inside[tile] = b < p.batch ? units.inputs - own_inputs : 0;
    }
    // Whole rows that need no checks, the common case: addresses advance from position to position.
    if (aligned && units.inputs == kProductInputs && units.outputs % kProductOutputs == 0) {
      PhasorOutputs<kGradient, kTiles, Storage> outputs(p, units, b0, n0, head, out0);
      const std::int64_t step = strides[1];
      const auto load = [&](bool more, std::uint32_t (&inputs)[kTiles][kLaneInputs / 2]) {
        TORCH_SPE_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
          if (inside[tile] > 0 && more) {
            load_whole_pairs(row[tile], inputs[tile]);
          } else {
            TORCH_SPE_UNROLL
            for (std::uint32_t& pair : inputs[tile]) pair = 0;
          }
          row[tile] += step;
        }
      };
      const auto make = [&](std::uint32_t (&inputs)[kTiles][kLaneInputs / 2]) {
        float sums[kTiles][4] = {};
        map(inputs);
        multiply(inputs, sums);
        outputs.store(sums);
      };
      std::uint32_t even[kTiles][kLaneInputs / 2], odd[kTiles][kLaneInputs / 2];
      load(true, even);
      for (int t = 0; t < count; t += 2) {
        load(t + 1 < count, odd);
        make(even);
        if (t + 1 == count) break;
        load(t + 2 < count, even);
        make(odd);
      }
      return;
    }

    std::uint32_t next[kTiles][kLaneInputs / 2];
    TORCH_SPE_UNROLL
    for (int tile = 0; tile < kTiles; ++tile)
      load_pairs(row[tile], inside[tile], strides[3], aligned, next[tile]);
    for (int t = 0; t < count; ++t) {
      std::uint32_t inputs[kTiles][kLaneInputs / 2];
      TORCH_SPE_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        TORCH_SPE_UNROLL
        for (int i = 0; i < kLaneInputs / 2; ++i) inputs[tile][i] = next[tile][i];
        row[tile] += strides[1];
        load_pairs(row[tile], t + 1 < count ? inside[tile] : 0, strides[3], aligned, next[tile]);
      }
      map(inputs);
      float sums[kTiles][4];
      TORCH_SPE_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        TORCH_SPE_UNROLL
        for (int e = 0; e < 4; ++e)
          sums[tile][e] = in0 == 0 ? 0.0f : own_sums[((t * kTiles + tile) * 4 + e) * kLanes];
      }
      multiply(inputs, sums);
      if (in0 + kProductInputs < units.inputs) {
        TORCH_SPE_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
          TORCH_SPE_UNROLL
          for (int e = 0; e < 4; ++e)
            own_sums[((t * kTiles + tile) * 4 + e) * kLanes] = sums[tile][e];
        }
        continue;
      }
      TORCH_SPE_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        TORCH_SPE_UNROLL
        for (int e = 0; e < 2; ++e) {
          const std::int64_t b = b0 + tile * kProductBatch + 2 * member + e;
          if (b >= p.batch) continue;
          Storage* const to = static_cast<Storage*>(kGradient ? p.grad_x : p.out) +
                              ((b * p.length + n0 + t) * p.num_heads + head) * units.outputs + out0;
          float first = sums[tile][e], second = sums[tile][2 + e];
          if constexpr (kGradient) {
            if (p.feature_map != FeatureMap::kIdentity) {
              const Storage* const x = static_cast<const Storage*>(p.x) + b * p.x_strides[0] +
                                       (n0 + t) * p.x_strides[1] + head * p.x_strides[2] +
                                       out0 * p.x_strides[3];
              if (out0 < units.outputs) first = gradient_of_input_at(p.feature_map, first, x);
              if (out0 + 1 < units.outputs)
                second = gradient_of_input_at(p.feature_map, second, x + p.x_strides[3]);
            }
          }
          if (units.outputs % 2 == 0) {
            if (out0 < units.outputs)
              *reinterpret_cast<std::uint32_t*>(to) = pack_pair<Storage>(first, second);
          } else {
            if (out0 < units.outputs) write(first, to);
            if (out0 + 1 < units.outputs) write(second, to + 1);
          }
        }
      }
    }
  }
}

}  // namespace torch_spe::cuda
