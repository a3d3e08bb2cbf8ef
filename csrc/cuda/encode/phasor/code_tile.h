// Codes of the phasor filter as operands of a product on tensor cores, in registers, at one
// consecutive position after the other, wherever their inputs and outputs are stored.
//
// A code comes from the one of the position before by a rotation in float32. The maker of a tile
// begins with an exact one after kPhasorRun positions at most: far more precise than the 16 bits
// that it is rounded to.
#pragma once

#include "encode/phasor.h"
#include "phasor_filter.h"

namespace torch_spe::cuda {

constexpr int kPhasorRun = 64;

// What lane 4 g + c of a warp holds in the mma's that multiply codes [16 outputs, 64 inputs] with
// inputs [64, 8 batch rows]. The inputs of step s and the mma's indices 2c, 2c + 1, 2c + 8, 2c + 9
// are 16 c + 4 s + {0, 1, 2, 3}, so that those of a lane are contiguous; its outputs are 2 g and
// 2 g + 1 at batch rows 2 c and 2 c + 1.
//   filter:   inputs are features, outputs the real and imaginary parts of pair g
//   gradient: inputs are the real and imaginary parts of pairs, outputs features
constexpr int kProductBatch = 8;  // of the batch, in one mma
constexpr int kProductOutputs = 16;
constexpr int kProductInputs = 64;
constexpr int kProductSteps = kProductInputs / 16;
constexpr int kLaneInputs = 4 * kProductSteps;

// A code times e^(2 pi i f n), and the rotation to the next position.
struct alignas(16) RotatingCode {
  Phasor<float> code, step;
};

// Which codes of a head are this lane's: that of its input i in the tile.
template <bool kGradient>
struct LaneCodes {
  std::int64_t head, own_inputs, out0;  // the first of its inputs, and of its outputs

  // The code's index in [H, D, pairs]; false where there is none.
  TORCH_SPE_DEVICE bool find(const PhasorFilterParams& p, int i, std::int64_t* index) const {
    const std::int64_t feature = kGradient ? out0 + i % 2 : own_inputs + i;
    const std::int64_t pair = kGradient ? own_inputs / 2 + i / 2 : out0 / 2;
    *index = (head * p.in_features + feature) * p.num_pairs + pair;
    return feature < p.in_features && pair < p.num_pairs;
  }
};

template <class Storage, bool kGradient>
class PhasorCodeTile {
 public:
  // From position n0 of the operator on. `memory` is the lane's own, [kLaneInputs] every kLanes:
  // the loop that makes exact phases is not unrolled, and registers have no index.
  TORCH_SPE_DEVICE PhasorCodeTile(const PhasorFilterParams& p, const LaneCodes<kGradient>& own,
                                  std::int64_t n0, RotatingCode* memory)
      : has_constant_(p.constant != nullptr) {
    const float* const coefficients = static_cast<const float*>(p.coefficients);
    const float* const constant = static_cast<const float*>(p.constant);
    for (int i = 0; i < kLaneInputs; ++i) {
      std::int64_t index;
      RotatingCode rotating{{0.0f, 0.0f}, {}};
      if (own.find(p, i, &index)) {
        rotating.code.set(p.freqs[index], p.start + static_cast<double>(n0));
        rotating.code.rotate({coefficients[2 * index], coefficients[2 * index + 1]});
        rotating.step.set(p.freqs[index], 1.0);
      }
      memory[i * kLanes] = rotating;
    }
    TORCH_SPE_UNROLL
    for (int s = 0; s < kProductSteps; ++s) {
      Phasor<float> parts[4] = {{0.0f, 0.0f}, {0.0f, 0.0f}, {0.0f, 0.0f}, {0.0f, 0.0f}};
      TORCH_SPE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const RotatingCode rotating = memory[(4 * s + i) * kLanes];
        codes_[s][i] = rotating.code;
        steps_[s][i] = rotating.step;
        std::int64_t index;
        if (has_constant_ && own.find(p, 4 * s + i, &index))
          parts[i] = {constant[2 * index], constant[2 * index + 1]};
      }
      pack(parts, constants_[s]);
    }
  }

  // Adds the position's codes times inputs to the sums of its outputs, and rotates to the next.
  template <int kTiles>
  TORCH_SPE_DEVICE void multiply(const std::uint32_t (&inputs)[kTiles][kLaneInputs / 2],
                                 float (&sums)[kTiles][4]) {
    TORCH_SPE_UNROLL
    for (int s = 0; s < kProductSteps; ++s) {
      std::uint32_t a[4];
      pack(codes_[s], a);
      TORCH_SPE_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        const std::uint32_t b[2] = {inputs[tile][2 * s], inputs[tile][2 * s + 1]};
        mma_m16n8k16<Storage>(sums[tile], a, b);
        if (has_constant_) mma_m16n8k16<Storage>(sums[tile], constants_[s], b);
      }
      TORCH_SPE_UNROLL
      for (int i = 0; i < 4; ++i) codes_[s][i].rotate(steps_[s][i]);
    }
  }

 private:
  // A row of the operand is a real or imaginary part (filter), or a feature (gradient).
  static TORCH_SPE_DEVICE void pack(const Phasor<float> (&codes)[4], std::uint32_t (&a)[4]) {
    TORCH_SPE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Phasor<float>&first = codes[i / 2 * 2], &second = codes[i / 2 * 2 + 1];
      a[i] = kGradient    ? pack_pair<Storage>(codes[i].re, codes[i].im)
             : i % 2 == 0 ? pack_pair<Storage>(first.re, second.re)
                          : pack_pair<Storage>(first.im, second.im);
    }
  }

  bool has_constant_;
  Phasor<float> codes_[kProductSteps][4], steps_[kProductSteps][4];
  std::uint32_t constants_[kProductSteps][4];
};

}  // namespace torch_spe::cuda
