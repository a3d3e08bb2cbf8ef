#include "core/noise.h"

#include <ATen/core/PhiloxRNGEngine.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_spe/torch_spe.h>

#include <cmath>
#include <set>

namespace torch_spe::core {
namespace {

using Block = Words<ScalarNumbers>;

// The known answers that come with the authors' implementation (Random123, kat_vectors).
TEST(Philox, GivesThePublishedAnswers) {
  struct Answer {
    Block counter;
    std::uint64_t key;
    Block expected;
  };
  const Answer answers[] = {
      {{{0, 0, 0, 0}}, 0, {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}}},
      {{{0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu}},
       0xffffffffffffffffu,
       {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}}},
      {{{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}},
       0x299f31d0a4093822u,
       {{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}}}};
  for (const Answer& answer : answers) {
    const Block words = philox<ScalarNumbers>(answer.counter, answer.key);
    for (int i = 0; i < 4; ++i) EXPECT_EQ(words.word[i], answer.expected.word[i]);
  }
}

TEST(Philox, AgreesWithPyTorchs) {
  for (std::uint64_t seed : {0ull, 1ull, 0x123456789abcdef0ull}) {
    for (std::uint64_t sequence : {0ull, 7ull, 0xfedcba9876543210ull}) {
      for (std::uint64_t offset : {0ull, 0xffffffffull, 0x100000000ull, 0x8000000000000001ull}) {
        at::philox_engine engine(seed, sequence, 0);
        engine.set_offset(offset);
        const Block words = philox<ScalarNumbers>(
            {{static_cast<std::uint32_t>(offset), static_cast<std::uint32_t>(offset >> 32),
              static_cast<std::uint32_t>(sequence), static_cast<std::uint32_t>(sequence >> 32)}},
            seed);
        for (int i = 0; i < 4; ++i) EXPECT_EQ(words.word[i], engine());
      }
    }
  }
}

TEST(Normals, AgreeWithTheLibrarysLogarithmAndCosine) {
  const std::uint32_t samples[] = {0u,          1u,          2u,          3u,          0x7fffffffu,
                                   0x80000000u, 0x3fffffffu, 0xc0000000u, 0xdeadbeefu, 0x12345678u,
                                   0xfffffffeu, 0xffffffffu, 0xb504f333u, 0x5a827999u};
  for (std::uint32_t w0 : samples) {
    for (std::uint32_t w1 : samples) {
      float z0, z1;
      normal_pair<ScalarNumbers>(w0, w1, &z0, &z1);
      const double u = static_cast<float>(w0 >> 1) + 0.5f;
      const double radius = std::sqrt(-2 * std::log(u / 2147483648.0));
      const double turn = (w1 >> 30) + 0.125 * ((static_cast<std::int32_t>(w1 << 2) >> 9) * 2 + 1) *
                                           std::ldexp(4.0, -23);
      EXPECT_NEAR(z0, radius * std::cos(turn * M_PI_2), 2e-6) << w0 << " " << w1;
      EXPECT_NEAR(z1, radius * std::sin(turn * M_PI_2), 2e-6) << w0 << " " << w1;
    }
  }
}

// Every index has a counter of its own, also at the borders of the words.
TEST(Noise, CountersDoNotCollide) {
  const std::int64_t corner = std::int64_t{1} << 32;
  const std::int64_t line[] = {-corner - 1, -corner,    -1,         0,
                               1,           127,        128,        corner - 1,
                               corner,      corner + 1, 2 * corner, std::int64_t{1} << 60};
  std::set<std::uint64_t> positions;
  for (std::int64_t n : line) positions.insert(noise_position(1, 0, 0, n));
  EXPECT_EQ(positions.size(), std::size(line));
  positions.clear();
  const std::int64_t plane[] = {-(corner / 2), -1, 0, 1, corner / 2 - 1};
  for (std::int64_t i : plane) {
    for (std::int64_t j : plane) positions.insert(noise_position(2, 0, i, j));
  }
  EXPECT_EQ(positions.size(), std::size(plane) * std::size(plane));
  positions.clear();
  const std::int64_t space[] = {-(1 << 20), -1, 0, 1, (1 << 20) - 1};
  for (std::int64_t i : space) {
    for (std::int64_t j : space) {
      for (std::int64_t k : space) positions.insert(noise_position(3, i, j, k));
    }
  }
  EXPECT_EQ(positions.size(), std::size(space) * std::size(space) * std::size(space));
  EXPECT_NE(noise_source(1, 0), noise_source(0, 1));
  EXPECT_NE(noise_source(0, kMaxNoiseFeatures - 1), noise_source(1, 0));
  std::set<std::uint32_t> blocks;
  for (std::uint32_t purpose : {0u, 1u, 2u}) {
    for (int ndim : {1, 2, 3}) {
      for (std::int64_t block : {std::int64_t{0}, std::int64_t{1}, kMaxNoiseRealizations / 4 - 1}) {
        blocks.insert(noise_block(purpose, ndim, block));
      }
    }
  }
  EXPECT_EQ(blocks.size(), 27u);
}

// What the vectorized generator gives is what the scalar one says.
TEST(Noise, OperatorGivesTheValuesOfTheIndices) {
  const std::uint64_t seed = 0x9e3779b97f4a7c15ull;
  const auto seed_tensor = torch::tensor({static_cast<std::int64_t>(seed)});
  for (const char* kind : {"gaussian", "rademacher"}) {
    const NoiseKind which =
        std::string(kind) == "gaussian" ? NoiseKind::kGaussian : NoiseKind::kRademacher;
    for (std::int64_t real : {1, 5, 16, 70, 130}) {
      for (std::int64_t start : {std::int64_t{-3}, (std::int64_t{1} << 32) - 3}) {
        const auto line = conv_noise(seed_tensor, 2, 3, {7}, real, kind, {}, {start});
        const auto z = line.accessor<float, 4>();
        for (int h = 0; h < 2; ++h) {
          for (int d = 0; d < 3; ++d) {
            for (int n = 0; n < 7; ++n) {
              for (int r = 0; r < real; ++r) {
                ASSERT_EQ(z[h][d][n][r], noise_value(which, seed, 1, 0, 0, start + n, h, d, r));
              }
            }
          }
        }
      }
      const auto plane = conv_noise(seed_tensor, 1, 2, {2, 3}, real, kind, {}, {-1, -2});
      const auto z2 = plane.accessor<float, 5>();
      const auto space = conv_noise(seed_tensor, 1, 1, {2, 2, 3}, real, kind, {}, {-1, 5, -2});
      const auto z3 = space.accessor<float, 6>();
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 3; ++j) {
          for (int r = 0; r < real; ++r) {
            ASSERT_EQ(z2[0][1][i][j][r], noise_value(which, seed, 2, 0, i - 1, j - 2, 0, 1, r));
            ASSERT_EQ(z3[0][0][1][i][j][r], noise_value(which, seed, 3, 0, i + 5, j - 2, 0, 0, r));
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace torch_spe::core
