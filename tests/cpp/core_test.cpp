#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <numbers>

#include "core/codes.h"
#include "core/feature_map.h"
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
    // In double the library's own argument would be rounded by up to 2.3e-16.
    const long double angle = 2 * std::numbers::pi_v<long double> * cycles;
    EXPECT_NEAR(cd, static_cast<double>(std::cos(angle)), 3e-16);
    EXPECT_NEAR(sd, static_cast<double>(std::sin(angle)), 3e-16);
    EXPECT_NEAR(cf, std::cos(kTwoPi * cycles), 1.2e-7);
    EXPECT_NEAR(sf, std::sin(kTwoPi * cycles), 1.2e-7);
    cos_sin_fixed(fixed_phase(cycles), &cf, &sf);
    EXPECT_NEAR(cf, std::cos(kTwoPi * cycles), 1.5e-7);
    EXPECT_NEAR(sf, std::sin(kTwoPi * cycles), 1.5e-7);
  }
}

TEST(Phase, FixedPhasesStayExact) {
  for (double freq : {0.123456789, -0.4999, 1.75}) {
    for (double start : {0.0, -3.25, 1e6}) {
      FixedPhases phases;
      phases.set(freq, start);
      for (std::int64_t n : {0L, 1L, 12345L, 100000000L}) {
        const std::uint32_t expected =
            fixed_phase(reduce_cycles(freq, start + static_cast<double>(n)));
        EXPECT_LE(std::abs(static_cast<std::int32_t>(phases.at(n) - expected)), 1);
        EXPECT_LE(std::abs(static_cast<std::int32_t>(phases.at(n) + phases.short_step() -
                                                     phases.at(n + 1))),
                  1);
      }
    }
  }
}

template <class T>
void check_exp(double tolerance) {
  EXPECT_EQ(exp_nonpositive(T(0)), T(1));
  for (int i = 0; i <= 20000; ++i) {
    const T x = static_cast<T>(-i / 20000.0 * (sizeof(T) == 4 ? 87.3 : 708.3));
    const double exact = std::exp(static_cast<double>(x));
    EXPECT_NEAR(exp_nonpositive(x) / exact, 1.0, tolerance) << x;
  }
  EXPECT_EQ(exp_nonpositive(T(-1e30)), T(0));
  EXPECT_EQ(exp_nonpositive(-std::numeric_limits<T>::infinity()), T(0));
  EXPECT_TRUE(std::isnan(exp_nonpositive(std::numeric_limits<T>::quiet_NaN())));
}

TEST(FeatureMap, ExponentialAgreesWithTheLibrary) {
  check_exp<float>(2.5e-7);
  check_exp<double>(5e-16);
}

template <FeatureMap kMap>
void check_map(double (*map)(double), double (*derivative)(double)) {
  for (double x : {-800.0, -90.0, -3.0, -1e-9, 0.0, 1e-9, 0.5, 3.0, 1e6}) {
    const double phi = apply_feature_map<kMap>(x);
    EXPECT_NEAR(phi, map(x), 1e-15 * (1 + std::abs(map(x)))) << x;
    EXPECT_NEAR(feature_map_derivative<kMap>(phi), derivative(x), 1e-15) << x;
    const float narrow = apply_feature_map<kMap>(static_cast<float>(x));
    EXPECT_NEAR(narrow, map(static_cast<float>(x)), 2e-7 * (1 + std::abs(map(x)))) << x;
  }
  EXPECT_TRUE(std::isnan(apply_feature_map<kMap>(std::nanf(""))));
}

TEST(FeatureMap, MapsAndDerivatives) {
  check_map<FeatureMap::kIdentity>([](double x) { return x; }, [](double) { return 1.0; });
  check_map<FeatureMap::kRelu>([](double x) { return x > 0 ? x : 0.0; },
                               [](double x) { return x > 0 ? 1.0 : 0.0; });
  check_map<FeatureMap::kElu>([](double x) { return x >= 0 ? x + 1 : std::exp(x); },
                              [](double x) { return x >= 0 ? 1.0 : std::exp(x); });
}

TEST(Codes, SigmoidAndSoftplusAgreeWithTheLibrary) {
  for (double x : {-700.0, -40.0, -1.5, -1e-9, 0.0, 1e-9, 2.0, 40.0, 700.0}) {
    const double expected = x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x));
    EXPECT_NEAR(sigmoid(x) / expected, 1.0, 1e-15) << x;
    const double plus = std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x)));
    EXPECT_NEAR(softplus(x) / plus, 1.0, 1e-15) << x;
    const auto narrow = static_cast<float>(x);
    EXPECT_NEAR(sigmoid(narrow), expected, 2e-7) << x;
    EXPECT_NEAR(softplus(narrow), plus, 2e-7 * (1 + plus)) << x;
  }
}

TEST(Codes, QuantileInvertsTheNormalDistribution) {
  const auto distribution = [](double z) { return std::erfc(-z / std::numbers::sqrt2) / 2; };
  for (double u : {1e-10, 1e-6, 0.01, 0.075, 0.3, 0.5, 0.77, 0.925, 0.99, 1 - 1e-6}) {
    const double z = normal_quantile(u);
    EXPECT_NEAR(distribution(z) / u, 1.0, 3e-6) << u;
    EXPECT_NEAR(normal_quantile(1 - u), -z, 1e-6 * (1 + std::abs(z))) << u;
  }
}

TEST(Codes, RanksCountWhatComesBefore) {
  const std::uint32_t keys[] = {5, 3, 5, 9, 3};
  const int expected[] = {2, 0, 3, 4, 1};  // equal keys in the order of their places
  for (int i = 0; i < 5; ++i)
    EXPECT_EQ(rank_of(i, 5, [&](int j) { return keys[j]; }), expected[i]) << i;
}

}  // namespace
}  // namespace torch_spe::core
