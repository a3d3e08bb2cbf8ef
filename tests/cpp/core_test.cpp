#include <gtest/gtest.h>

#include <cmath>

#include "core/phase.h"

namespace torch_spe::core {
namespace {

TEST(Phase, IsExactFarFromTheOrigin) {
  for (double position : {0.0, 10.0, 1e6, 123456789.0}) {
    const float freq = 0.123456789f;
    const long double exact = static_cast<long double>(freq) * static_cast<long double>(position);
    const long double fraction = exact - std::round(exact);
    EXPECT_NEAR(reduce_cycles(freq, position), static_cast<double>(fraction), 1e-16);
  }
}

TEST(Phase, CosAndSinAgreeWithTheLibrary) {
  for (int i = -1000; i <= 1000; ++i) {
    const double cycles = i / 2000.0;
    float cf, sf;
    double cd, sd;
    cos_sin_cycles(cycles, &cf, &sf);
    cos_sin_cycles(cycles, &cd, &sd);
    EXPECT_NEAR(cd, std::cos(kTwoPi * cycles), 3e-16);
    EXPECT_NEAR(sd, std::sin(kTwoPi * cycles), 3e-16);
    EXPECT_NEAR(cf, std::cos(kTwoPi * cycles), 1.2e-7);
    EXPECT_NEAR(sf, std::sin(kTwoPi * cycles), 1.2e-7);
  }
}

}  // namespace
}  // namespace torch_spe::core
