// The CPU kernels of linear attention against the plain recurrence in double; gradients in double
// against finite differences of that recurrence, other types against those in double.
#include <gtest/gtest.h>

#include "attention_cases.h"

namespace {

using namespace attention_cases;

double largest(const Values& values) {
  double maximum = 0;
  for (double value : values) maximum = std::max(maximum, std::abs(value));
  return maximum;
}

void expect_near(const Values& got, const Values& expected, double tolerance, const char* what) {
  ASSERT_EQ(got.size(), expected.size()) << what;
  const double limit = tolerance * std::max(1.0, largest(expected));
  for (std::size_t i = 0; i < got.size(); ++i) {
    // Written so that NaN fails.
    if (!(std::abs(got[i] - expected[i]) <= limit)) {
      FAIL() << what << "[" << i << "]: " << got[i] << " instead of " << expected[i] << ", limit "
             << limit;
    }
  }
}

Values random_values(std::size_t size, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  Values values(size);
  for (double& value : values) value = normal(generator);
  return values;
}

double product(const Values& a, const Values& b) {
  double sum = 0;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) sum += a[i] * b[i];
  return sum;
}

Result random_gradients(const Case& c, DType dtype, const Result& like) {
  Result grads;
  const auto random = [](DType type, const Values& values, unsigned seed) {
    return Array(type, random_values(values.size(), seed)).values();
  };
  grads.out = random(dtype, like.out, 11);
  if (!c.state && c.threads > 2) return grads;  // no gradients of final states
  grads.s = random(accumulate_type(dtype), like.s, 12);
  grads.z = random(accumulate_type(dtype), like.z, 13);
  return grads;
}

void check_forward(const Case& c, DType dtype, double tolerance) {
  SCOPED_TRACE(c.name());
  const Tensors inputs = make_inputs(c, dtype);
  const Result expected = plain_forward(c, inputs), got = run(c, dtype, inputs).result;
  expect_near(got.out, expected.out, tolerance, "out");
  const double wide = dtype == DType::kFloat64 ? 1e-11 : 1e-4;
  expect_near(got.divisor, expected.divisor, wide, "row_divisor");
  expect_near(got.s, expected.s, wide, "s");
  expect_near(got.z, expected.z, wide, "z");
}

// Every input's gradient in double, along a random direction.
void check_gradients(const Case& c) {
  SCOPED_TRACE(c.name());
  const Tensors inputs = make_inputs(c, DType::kFloat64);
  const Result grads = random_gradients(c, DType::kFloat64, plain_forward(c, inputs));
  const Kernels got = run(c, DType::kFloat64, inputs, &grads);
  const auto loss = [&](const Tensors& at) {
    const Result result = plain_forward(c, at);
    return product(result.out, grads.out) + product(result.s, grads.s) + product(result.z, grads.z);
  };
  const double step = 1e-5;
  for (int i = 0; i < kInputs; ++i) {
    if (inputs[i].empty()) continue;
    const Values direction = random_values(inputs[i].size(), 20 + i);
    Tensors ahead = inputs, behind = inputs;
    for (std::size_t j = 0; j < direction.size(); ++j) {
      ahead[i][j] += step * direction[j];
      behind[i][j] -= step * direction[j];
    }
    const double expected = (loss(ahead) - loss(behind)) / (2 * step);
    const double found = product(got.gradients[i], direction);
    const double size = std::sqrt(product(got.gradients[i], got.gradients[i])) + 1;
    EXPECT_NEAR(found, expected, 1e-6 * size) << "input " << i;
  }
}

// Gradients in another type against those in double for the same inputs.
void check_low_precision(const Case& c, DType dtype, double tolerance) {
  SCOPED_TRACE(c.name());
  const Tensors inputs = make_inputs(c, dtype);
  const Result grads = random_gradients(c, dtype, plain_forward(c, inputs));
  const Kernels expected = run(c, DType::kFloat64, inputs, &grads);
  const Kernels got = run(c, dtype, inputs, &grads);
  for (int i = 0; i < kInputs; ++i) {
    SCOPED_TRACE("input " + std::to_string(i));
    expect_near(got.gradients[i], expected.gradients[i], tolerance, "gradient");
  }
}

// Cases of every kind: norms and denominators, order, masks, states, packed sequences.
std::vector<Case> kinds_of(std::int64_t length) {
  std::vector<Case> cases;
  for (int kind = 0; kind < 4; ++kind) {
    for (int flags = 0; flags < 16; ++flags) {
      Case c;
      c.query_length = c.key_length = length;
      c.normalize = kind == 1 || kind == 3;
      c.rms_norm = kind == 2;
      c.own_features = kind == 3 ? 9 : 0;
      c.causal = (flags & 1) != 0;
      c.masked = (flags & 2) != 0;
      c.state = (flags & 4) != 0;
      if ((flags & 8) != 0) {
        c.batch = 1;
        c.bounds = {0, 0, length / 3, length / 3, length};
      }
      c.order = static_cast<Order>((kind + flags) % 3);
      c.feature_map = static_cast<FeatureMap>((kind + flags / 2) % 3);
      cases.push_back(c);
    }
  }
  return cases;
}

const std::int64_t kLengths[] = {0, 1, 63, 64, 65, 1000};

TEST(AttentionKernels, Float64AgreesWithTheRecurrence) {
  for (std::int64_t length : kLengths)
    for (const Case& c : kinds_of(length)) check_forward(c, DType::kFloat64, 1e-11);
}

TEST(AttentionKernels, OtherTypesAgreeWithTheRecurrence) {
  for (std::int64_t length : kLengths) {
    for (const Case& c : kinds_of(length)) {
      check_forward(c, DType::kFloat32, 1e-4);
      check_forward(c, DType::kFloat16, 1e-3);
      check_forward(c, DType::kBFloat16, 8e-3);
    }
  }
}

TEST(AttentionKernels, GradientsAgreeWithFiniteDifferences) {
  for (std::int64_t length : {0, 1, 64, 150})
    for (const Case& c : kinds_of(length)) check_gradients(c);
}

TEST(AttentionKernels, GradientsOfOtherTypes) {
  for (std::int64_t length : {1, 65, 1000}) {
    for (const Case& c : kinds_of(length)) {
      check_low_precision(c, DType::kFloat32, 1e-3);
      check_low_precision(c, DType::kFloat16, 1e-2);
      check_low_precision(c, DType::kBFloat16, 5e-2);
    }
  }
}

// Several segments; threads that share a row and threads that do not; with and without gradients of
// the final states.
TEST(AttentionKernels, LongSequences) {
  for (int kind = 0; kind < 8; ++kind) {
    for (int threads : {1, 2, 3}) {
      Case c;
      c.batch = c.heads = 1;
      c.query_length = c.key_length = 2100;
      c.threads = threads;
      c.causal = kind < 4;
      c.normalize = kind % 4 == 1 || kind % 4 == 3;
      c.rms_norm = kind % 4 == 2;
      c.own_features = kind % 4 == 3 ? 17 : 0;
      c.features = 3;
      c.state = threads == 1;
      check_forward(c, DType::kFloat64, 1e-11);
      check_gradients(c);
    }
  }
}

TEST(AttentionKernels, ResultsDoNotDependOnTheNumberOfThreads) {
  for (int kind = 0; kind < 4; ++kind) {
    Case c;
    c.batch = c.heads = 1;
    c.query_length = c.key_length = 3000;
    c.normalize = kind == 1 || kind == 3;
    c.rms_norm = kind == 2;
    c.own_features = kind == 3 ? 9 : 0;
    c.state = true;
    const Tensors inputs = make_inputs(c, DType::kFloat32);
    const Result grads = random_gradients(c, DType::kFloat32, plain_forward(c, inputs));
    c.threads = 1;
    const Kernels one = run(c, DType::kFloat32, inputs, &grads);
    c.threads = 4;
    const Kernels four = run(c, DType::kFloat32, inputs, &grads);
    EXPECT_EQ(one.result.out, four.result.out);
    EXPECT_EQ(one.result.s, four.result.s);
    EXPECT_EQ(one.result.z, four.result.z);
    EXPECT_EQ(one.gradients, four.gradients);
  }
}

TEST(AttentionKernels, SizesOfFeatures) {
  for (std::int64_t features : {1, 33}) {
    for (std::int64_t values : {1, 17}) {
      for (std::int64_t own : {0, 1, 3, 65}) {
        Case c;
        c.features = features;
        c.values = values;
        c.own_features = own;
        c.normalize = true;
        c.state = true;
        c.query_length = c.key_length = 130;
        check_forward(c, DType::kFloat64, 1e-11);
        check_gradients(c);
        c.causal = false;
        c.key_length = 77;
        check_forward(c, DType::kFloat64, 1e-11);
        check_gradients(c);
      }
    }
  }
}

TEST(AttentionKernels, GradientsThatAreNotWantedAreNotWritten) {
  for (bool causal : {false, true}) {
    Case c;
    c.causal = causal;
    c.normalize = c.state = true;
    c.own_features = 3;
    c.query_length = c.key_length = 100;
    const Tensors inputs = make_inputs(c, DType::kFloat64);
    const Result grads = random_gradients(c, DType::kFloat64, plain_forward(c, inputs));
    const Kernels all = run(c, DType::kFloat64, inputs, &grads);
    for (int i = 0; i < kInputs; ++i) {
      const Kernels one = run(c, DType::kFloat64, inputs, &grads, 1u << i);
      EXPECT_EQ(one.gradients[i], all.gradients[i]) << i;
    }
  }
}

TEST(AttentionKernels, KeysAlone) {
  for (std::int64_t length : {0, 1, 65, 2100}) {
    for (int flags = 0; flags < 16; ++flags) {
      Case c;
      c.causal = false;
      c.query_length = 0;
      c.key_length = length;
      c.masked = (flags & 1) != 0;
      c.state = (flags & 2) != 0;
      c.own_features = (flags & 4) != 0 ? 9 : 0;
      c.normalize = (flags & 4) != 0;
      if ((flags & 8) != 0) {
        c.batch = 1;
        c.bounds = {0, 0, length / 3, length / 3, length};
      }
      check_forward(c, DType::kFloat64, 1e-11);
      check_gradients(c);
    }
  }
}

// One token with a state, which has a kernel of its own.
TEST(AttentionKernels, OnePositionIsAStepOfTheRecurrence) {
  for (int kind = 0; kind < 4; ++kind) {
    for (bool masked : {false, true}) {
      Case c;
      c.batch = 5;
      c.query_length = c.key_length = 1;
      c.features = 65;
      c.values = 33;
      c.state = true;
      c.masked = masked;
      c.causal = !masked;
      c.normalize = kind == 1 || kind == 3;
      c.rms_norm = kind == 2;
      c.own_features = kind == 3 ? 9 : 0;
      check_forward(c, DType::kFloat64, 1e-12);
      check_forward(c, DType::kFloat32, 1e-5);
      check_forward(c, DType::kBFloat16, 8e-3);
      check_gradients(c);
    }
  }
}

// Whose reciprocals overflow; so would the gradients of the numerators.
TEST(AttentionKernels, TinyDenominators) {
  for (bool own : {false, true}) {
    for (double scale : {3e-20, 3e-16}) {
      Case c;
      c.batch = c.heads = c.features = c.values = 1;
      c.query_length = c.key_length = 3;
      c.normalize = true;
      c.own_features = own ? 1 : 0;
      c.feature_map = FeatureMap::kIdentity;
      c.eps = 0;
      Tensors inputs = {Values(3, scale), Values(3, scale), {1, 2, 3}, {}, {}, {}, {}};
      if (own) inputs[3] = inputs[4] = Values(3, scale);
      const Result grads = {{1, 1, 1}, {}, {0}, {0}};
      const Kernels got = run(c, DType::kFloat32, inputs, &grads);
      expect_near(got.result.out, {1, 1.5, 2}, 1e-5, "out");
      expect_near(got.gradients[2], {1 + 1 / 2. + 1 / 3., 1 / 2. + 1 / 3., 1 / 3.}, 1e-5, "grad_v");
      const Kernels expected = run(c, DType::kFloat64, inputs, &grads);
      for (int i : {0, 1, 3, 4}) {
        const double size =
            std::max(largest(expected.gradients[1]), largest(expected.gradients[4]));
        expect_near(got.gradients[i], expected.gradients[i], 2e-5 * std::max(size, 1.), "grad");
        for (double value : got.gradients[i]) EXPECT_TRUE(std::isfinite(value));
      }
    }
  }
}

TEST(AttentionKernels, ADivisorOfZeroGivesZero) {
  for (bool rms_norm : {false, true}) {
    Case c;
    c.normalize = !rms_norm;
    c.rms_norm = rms_norm;
    c.feature_map = FeatureMap::kRelu;
    c.eps = 0;
    c.query_length = c.key_length = 70;
    Tensors inputs = make_inputs(c, DType::kFloat32);
    for (double& value : inputs[0]) value = -1;
    const Result grads = random_gradients(c, DType::kFloat32, plain_forward(c, inputs));
    const Kernels got = run(c, DType::kFloat32, inputs, &grads);
    EXPECT_EQ(largest(got.result.out), 0);
    EXPECT_EQ(largest(got.result.divisor), 0);
    EXPECT_EQ(largest(got.gradients[0]), 0);
    for (const Values& gradient : got.gradients)
      for (double value : gradient) EXPECT_TRUE(std::isfinite(value));
  }
}

}  // namespace
