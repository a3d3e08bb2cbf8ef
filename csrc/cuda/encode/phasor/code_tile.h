// Codes of the phasor filter as operands of a product on tensor cores, in registers, at one
// consecutive position after the other, wherever their inputs and outputs are stored.
//
// A code comes from the one of the position before by a rotation in float32. The maker of a tile
// begins with another one after kPhasorRun positions at most: far more precise than the 16 bits
// that it is rounded to, also with the hardware's cosine and sine.
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

// Which codes of a head are this lane's: that of its input i in the tile. kAll: whether all exist.
template <bool kGradient, bool kAll>
struct LaneCodes {
  std::int64_t head, own_inputs, out0;  // the first of its inputs, and of its outputs

  TORCH_SPE_DEVICE std::int64_t feature(int i) const {
    return kGradient ? out0 + i % 2 : own_inputs + i;
  }
  TORCH_SPE_DEVICE std::int64_t pair(int i) const {
    return kGradient ? own_inputs / 2 + i / 2 : out0 / 2;
  }
  TORCH_SPE_DEVICE bool exists(const PhasorFilterParams& p, int i) const {
    return kAll || (feature(i) < p.in_features && pair(i) < p.num_pairs);
  }
  // The code's index in [H, D, pairs]; 0 where there is none.
  TORCH_SPE_DEVICE std::int64_t index_or_first(const PhasorFilterParams& p, int i) const {
    return exists(p, i) ? (head * p.in_features + feature(i)) * p.num_pairs + pair(i) : 0;
  }
};

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

// kConstant: whether there may be a constant, which takes registers.
template <class Storage, bool kGradient, bool kConstant>
class PhasorCodeTile {
 public:
  // From position n0 of the operator on. All is loaded before anything is computed; where there is
  // no code, the first one is.
  template <bool kAll>
  TORCH_SPE_DEVICE PhasorCodeTile(const PhasorFilterParams& p,
                                  const LaneCodes<kGradient, kAll>& own, std::int64_t n0) {
    if constexpr (kConstant) {  // first, while registers are free
      Phasor<float> constants[kProductSteps][4];
      TORCH_SPE_UNROLL
      for (int i = 0; i < kLaneInputs; ++i) {
        constants[i / 4][i % 4] = {0.0f, 0.0f};
        if (p.constant != nullptr)
          constants[i / 4][i % 4] =
              static_cast<const Phasor<float>*>(p.constant)[own.index_or_first(p, i)];
      }
      TORCH_SPE_UNROLL
      for (int i = 0; i < kLaneInputs; ++i)
        if (!own.exists(p, i)) constants[i / 4][i % 4] = {0.0f, 0.0f};
      TORCH_SPE_UNROLL
      for (int s = 0; s < kProductSteps; ++s) pack(constants[s], constants_[s]);
    }
    double freqs[kLaneInputs];
    Phasor<float> coefficients[kLaneInputs];
    TORCH_SPE_UNROLL
    for (int i = 0; i < kLaneInputs; ++i) {
      const std::int64_t index = own.index_or_first(p, i);
      freqs[i] = p.freqs[index];
      coefficients[i] = static_cast<const Phasor<float>*>(p.coefficients)[index];
    }
    TORCH_SPE_UNROLL
    for (int i = 0; i < kLaneInputs; ++i) {
      Phasor<float>& code = codes_[i / 4][i % 4];
      code.set_fast(freqs[i], p.start + static_cast<double>(n0));
      code.rotate(coefficients[i]);
      if (!own.exists(p, i)) code = {0.0f, 0.0f};
      steps_[i / 4][i % 4].set_fast(freqs[i], 1.0);
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
        if constexpr (kConstant) mma_m16n8k16<Storage>(sums[tile], constants_[s], b);
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

  Phasor<float> codes_[kProductSteps][4], steps_[kProductSteps][4];
  std::uint32_t constants_[kConstant ? kProductSteps : 1][4];
};

}  // namespace torch_spe::cuda
