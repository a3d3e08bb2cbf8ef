// Normal noise for tensors of 16 bits, which round it anyway: that of core/noise.h to some 18 bits,
// from the hardware's logarithm, root, cosine and sine.
#pragma once

#include "core/noise.h"
#include "core/phase.h"
#include "primitives.h"

namespace torch_spe::cuda {

TORCH_SPE_DEVICE void fast_normal_pair(std::uint32_t w0, std::uint32_t w1, float* z0, float* z1) {
  // As in core::normal_pair: u in (0, 1] from 31 bits, and the angle as quarter turns and an odd
  // part of them between -1/2 and 1/2.
  const float u = core::ScalarNumbers::fma(static_cast<float>(w0 >> 1), 0x1p-31f, 0x1p-32f);
  // -2 ln u, unless rounding leaves something below 0.
  const float radius = fast_sqrt(__builtin_fabsf(-1.38629436111989f * fast_log2(u)));
  const std::uint32_t turn = w1 - 2 * (w1 & 0x20000000u);
  float c, s;
  fast_cos_sin(core::angle_of(turn), &c, &s);
  *z0 = radius * c;
  *z1 = radius * s;
}

// The four normals of a block of the generator, for values of a type.
template <class Number>
TORCH_SPE_DEVICE void normals_of(const core::Words<core::ScalarNumbers>& words, float (&z)[4]) {
  if constexpr (sizeof(Number) == 2) {
    fast_normal_pair(words.word[0], words.word[1], z, z + 1);
    fast_normal_pair(words.word[2], words.word[3], z + 2, z + 3);
  } else {
    core::normal_pair<core::ScalarNumbers>(words.word[0], words.word[1], z, z + 1);
    core::normal_pair<core::ScalarNumbers>(words.word[2], words.word[3], z + 2, z + 3);
  }
}

}  // namespace torch_spe::cuda
