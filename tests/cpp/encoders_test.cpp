// The CPU kernels of the encoders, called directly, against plain loops in double: every feature
// map, storage type and gradient, odd sizes, strided x.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "core/phase.h"
#include "cpu/conv_filter.h"
#include "cpu/phasor_filter.h"
#include "cpu/rotary.h"
#include "cpu/sine_features.h"
#include "cpu/sine_filter.h"

namespace torch_spe {
namespace {

using core::DType;
using core::FeatureMap;
using Values = std::vector<double>;
using Bytes = std::vector<double>;  // memory for any type, aligned

struct Sizes {
  std::int64_t batch, length, heads, features, outputs;
  std::int64_t rows() const { return batch * length * heads; }
};

// The code of feature d in output r, code(parameters, h, d, n, r): every encoder gives
// out[b, n, h, r] = sum_d phi(x[b, n, h, d]) code[h, d, n, r].
using Code = std::function<double(const std::vector<Values>&, std::int64_t, std::int64_t,
                                  std::int64_t, std::int64_t)>;

double phi(FeatureMap map, double x) {
  if (map == FeatureMap::kElu) return x > 0 ? x + 1 : std::exp(x);
  return map == FeatureMap::kRelu ? std::max(x, 0.0) : x;
}
double phi_derivative(FeatureMap map, double x) {
  if (map == FeatureMap::kElu) return x > 0 ? 1 : std::exp(x);
  return map == FeatureMap::kRelu ? (x > 0 ? 1 : 0) : 1;
}

Values random_values(std::int64_t size, int seed, double scale = 1) {
  std::mt19937 generator(static_cast<unsigned>(seed));
  std::normal_distribution<double> normal(0, scale);
  Values values(static_cast<std::size_t>(size));
  // As exact in float as in double.
  for (double& value : values) value = static_cast<float>(normal(generator));
  return values;
}

// Calls function with a value of the storage type.
template <class Function>
auto with_type(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat64:
      return function(double{});
    case DType::kFloat16:
      return function(core::Half{});
    case DType::kBFloat16:
      return function(core::BFloat16{});
    default:
      return function(float{});
  }
}
DType accumulate_type(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

Bytes pack(DType dtype, const Values& values) {
  Bytes memory(values.size());
  with_type(dtype, [&](auto storage) {
    using Storage = decltype(storage);
    Storage* to = reinterpret_cast<Storage*>(memory.data());
    for (std::size_t i = 0; i < values.size(); ++i)
      core::store(static_cast<core::accumulate_t<Storage>>(values[i]), to + i);
  });
  return memory;
}
Values unpack(DType dtype, const Bytes& memory) {
  Values values(memory.size());
  with_type(dtype, [&](auto storage) {
    const auto* from = reinterpret_cast<const decltype(storage)*>(memory.data());
    for (std::size_t i = 0; i < values.size(); ++i)
      values[i] = static_cast<double>(core::load(from[i]));
  });
  return values;
}

void expect_near(const Values& found, const Values& expected, double tolerance, const char* what) {
  ASSERT_EQ(found.size(), expected.size()) << what;
  double largest = 1;
  for (double value : expected) largest = std::max(largest, std::abs(value));
  for (std::size_t i = 0; i < found.size(); ++i)
    ASSERT_NEAR(found[i], expected[i], tolerance * largest) << what << "[" << i << "]";
}

// What an encoder is given and what it must give.
struct Case {
  Sizes size;
  DType dtype;
  FeatureMap map;
  bool strided;
  Code code;
  std::vector<Values> parameters;

  Values x, grad_out;                      // as the kernel sees them
  Values out, grad_x;                      // [B, N, H, R], [B, N, H, D]
  std::vector<Values> grad_of_parameters;  // as the parameters
  Bytes x_memory, grad_out_memory;
  std::int64_t x_strides[4], grad_out_strides[4];

  double tolerance() const {
    switch (dtype) {
      case DType::kFloat64:
        return 1e-12;
      case DType::kFloat32:
        return 1e-5;
      case DType::kFloat16:
        return 1e-3;
      default:
        return 8e-3;
    }
  }
  double parameter_tolerance() const { return dtype == DType::kFloat64 ? 1e-7 : 2e-5; }

  void prepare() {
    const auto [batch, length, heads, features, outputs] = size;
    x = unpack(dtype, pack(dtype, random_values(size.rows() * features, 1)));
    grad_out = unpack(dtype, pack(dtype, random_values(size.rows() * outputs, 2)));
    x_memory = memory_of(x, features, x_strides);
    grad_out_memory = memory_of(grad_out, outputs, grad_out_strides);
    const Values codes = codes_of(parameters);
    out.assign(grad_out.size(), 0);
    grad_x.assign(x.size(), 0);
    Values grad_codes(codes.size());
    for (std::int64_t row = 0; row < size.rows(); ++row) {
      const std::int64_t h = row % heads, n = row / heads % length;
      for (std::int64_t d = 0; d < features; ++d) {
        const double value = x[row * features + d];
        for (std::int64_t r = 0; r < outputs; ++r) {
          const std::int64_t at = ((h * features + d) * length + n) * outputs + r;
          const double g = grad_out[row * outputs + r];
          out[row * outputs + r] += phi(map, value) * codes[at];
          grad_x[row * features + d] += phi_derivative(map, value) * g * codes[at];
          grad_codes[at] += phi(map, value) * g;
        }
      }
    }
    // The gradients of parameters by differences.
    constexpr double kStep = 1e-6;
    for (std::size_t which = 0; which < parameters.size(); ++which) {
      Values gradient(parameters[which].size());
      for (std::size_t i = 0; i < gradient.size(); ++i) {
        std::vector<Values> changed = parameters;
        changed[which][i] += kStep;
        const Values up = codes_of(changed);
        changed[which][i] -= 2 * kStep;
        const Values down = codes_of(changed);
        for (std::size_t j = 0; j < up.size(); ++j)
          gradient[i] += grad_codes[j] * (up[j] - down[j]) / (2 * kStep);
      }
      grad_of_parameters.push_back(gradient);
    }
  }

  Values codes_of(const std::vector<Values>& of) const {
    Values codes;
    for (std::int64_t h = 0; h < size.heads; ++h) {
      for (std::int64_t d = 0; d < size.features; ++d) {
        for (std::int64_t n = 0; n < size.length; ++n) {
          for (std::int64_t r = 0; r < size.outputs; ++r) codes.push_back(code(of, h, d, n, r));
        }
      }
    }
    return codes;
  }

  // [B, N, H, columns], or in memory [B, columns, H, N].
  Bytes memory_of(const Values& values, std::int64_t columns, std::int64_t strides[4]) const {
    const auto [batch, length, heads, features, outputs] = size;
    strides[0] = length * heads * columns;
    strides[1] = strided ? 1 : heads * columns;
    strides[2] = strided ? length : columns;
    strides[3] = strided ? heads * length : 1;
    Values moved(values.size());
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(values.size()); ++i) {
      moved[i / columns / heads / length * strides[0] + i / columns / heads % length * strides[1] +
            i / columns % heads * strides[2] + i % columns * strides[3]] = values[i];
    }
    return pack(dtype, moved);
  }

  template <class Params>
  void fill(Params& p) const {
    p.dtype = dtype;
    p.feature_map = map;
    p.batch = size.batch;
    p.num_heads = size.heads;
    p.in_features = size.features;
    p.num_threads = 2;
    p.x = x_memory.data();
  }
  template <class Params>
  void fill_sequence(Params& p) const {
    fill(p);
    p.length = size.length;
    for (int i = 0; i < 4; ++i) p.x_strides[i] = x_strides[i];
  }
  template <class Params>
  void fill_sequence_backward(Params& p) const {
    fill_sequence(p);
    p.grad_out = grad_out_memory.data();
    for (int i = 0; i < 4; ++i) p.grad_out_strides[i] = grad_out_strides[i];
  }
  Bytes unwritten(const Values& like) const {
    return Bytes(like.size(), std::numeric_limits<double>::quiet_NaN());
  }
  void expect_out(const Bytes& found) const {
    expect_near(unpack(dtype, found), out, tolerance(), "out");
  }
  void expect_grad_x(const Bytes& found) const {
    expect_near(unpack(dtype, found), grad_x, tolerance(), "grad_x");
  }
  void expect_gradient(const Values& found, std::size_t which, const char* what) const {
    expect_near(found, grad_of_parameters[which], parameter_tolerance(), what);
  }
};

constexpr FeatureMap kMaps[] = {FeatureMap::kIdentity, FeatureMap::kElu, FeatureMap::kRelu};
constexpr DType kTypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};

// Cases for every map and type, in turn strided, and with each of some sizes.
void for_each_case(const std::vector<Sizes>& sizes, const std::function<void(Case&)>& check) {
  int count = 0;
  for (const Sizes& size : sizes) {
    for (FeatureMap map : kMaps) {
      for (DType dtype : kTypes) {
        Case c;
        c.size = size;
        c.map = map;
        c.dtype = dtype;
        c.strided = count++ % 3 == 2;
        SCOPED_TRACE(testing::Message() << "map " << static_cast<int>(map) << " type "
                                        << static_cast<int>(dtype) << " strided " << c.strided
                                        << " batch " << size.batch << " length " << size.length);
        check(c);
      }
    }
  }
}

// The best instruction set and the baseline.
#define FOR_EACH_KERNEL(name, params) \
  for (auto* kernel : {+[](const decltype(params)& p) { cpu::name(p); }, &cpu::baseline::name})

double position_of(const std::vector<Values>& of, std::size_t positions, std::int64_t n) {
  return positions < of.size() ? of[positions][n] : 3.0 + static_cast<double>(n);
}

TEST(Encoders, SineFilter) {
  for (bool given : {false, true}) {
    for_each_case(
        {{
             1,
             67,
             2,
             3,
             5,
         },
         {3, 5, 1, 5, 6}},
        [&](Case& c) {
          constexpr std::int64_t kSines = 2;
          const auto [batch, length, heads, features, outputs] = c.size;
          c.parameters = {random_values(heads * features * kSines, 3, 0.2),
                          random_values(heads * features * 2 * kSines * outputs, 4),
                          random_values(heads * features * outputs, 5)};
          if (given) c.parameters.push_back(random_values(length, 6, 4));
          c.code = [=](const std::vector<Values>& of, std::int64_t h, std::int64_t d,
                       std::int64_t n, std::int64_t r) {
            const std::int64_t hd = h * features + d;
            double sum = of[2][hd * outputs + r];
            for (std::int64_t k = 0; k < kSines; ++k) {
              const double angle = core::kTwoPi * of[0][hd * kSines + k] * position_of(of, 3, n);
              const double* weight = of[1].data() + (hd * kSines + k) * 2 * outputs + r;
              sum += std::cos(angle) * weight[0] + std::sin(angle) * weight[outputs];
            }
            return sum;
          };
          c.prepare();
          const DType acc = accumulate_type(c.dtype);
          const Bytes weight = pack(acc, c.parameters[1]), constant = pack(acc, c.parameters[2]);
          const auto fill = [&](auto& p) {
            p.num_sines = kSines;
            p.num_realizations = outputs;
            p.ndim = 1;
            p.freqs = c.parameters[0].data();
            p.weight = weight.data();
            p.constant = constant.data();
            p.positions = given ? c.parameters[3].data() : nullptr;
            p.start = 3;
          };
          cpu::SineFilterParams p{};
          c.fill_sequence(p);
          fill(p);
          FOR_EACH_KERNEL(sine_filter_forward, p) {
            Bytes out = c.unwritten(c.out);
            p.out = out.data();
            kernel(p);
            c.expect_out(out);
          }
          cpu::SineFilterBackwardParams q{};
          c.fill_sequence_backward(q);
          fill(q);
          FOR_EACH_KERNEL(sine_filter_backward, q) {
            Bytes grad_x = c.unwritten(c.grad_x), grad_weight(weight.size()),
                  grad_constant(constant.size());
            Values grad_freqs(c.parameters[0].size()), grad_positions(given ? length : 0);
            q.grad_x = grad_x.data();
            q.grad_freqs = grad_freqs.data();
            q.grad_weight = grad_weight.data();
            q.grad_constant = grad_constant.data();
            q.grad_positions = given ? grad_positions.data() : nullptr;
            kernel(q);
            c.expect_grad_x(grad_x);
            c.expect_gradient(grad_freqs, 0, "grad_freqs");
            c.expect_gradient(unpack(acc, grad_weight), 1, "grad_weight");
            c.expect_gradient(unpack(acc, grad_constant), 2, "grad_constant");
            if (given) c.expect_gradient(grad_positions, 3, "grad_positions");
          }
        });
  }
}

TEST(Encoders, PhasorFilter) {
  for (bool given : {false, true}) {
    for_each_case({{1, 67, 2, 3, 6}, {5, 5, 2, 5, 10}}, [&](Case& c) {
      const auto [batch, length, heads, features, outputs] = c.size;
      const std::int64_t pairs = outputs / 2;
      c.parameters = {random_values(heads * features * pairs, 3, 0.2),
                      random_values(heads * features * outputs, 4),
                      random_values(heads * features * outputs, 5)};
      if (given) c.parameters.push_back(random_values(length, 6, 4));
      c.code = [=](const std::vector<Values>& of, std::int64_t h, std::int64_t d, std::int64_t n,
                   std::int64_t r) {
        const std::int64_t at = (h * features + d) * pairs + r / 2;
        const double angle = core::kTwoPi * of[0][at] * position_of(of, 3, n);
        const double re = of[1][2 * at], im = of[1][2 * at + 1];
        const double code = r % 2 == 0 ? re * std::cos(angle) - im * std::sin(angle)
                                       : re * std::sin(angle) + im * std::cos(angle);
        return code + of[2][2 * at + r % 2];
      };
      c.prepare();
      const DType acc = accumulate_type(c.dtype);
      const Bytes coefficients = pack(acc, c.parameters[1]), constant = pack(acc, c.parameters[2]);
      const auto fill = [&](auto& p) {
        p.num_pairs = pairs;
        p.ndim = 1;
        p.freqs = c.parameters[0].data();
        p.coefficients = coefficients.data();
        p.constant = constant.data();
        p.positions = given ? c.parameters[3].data() : nullptr;
        p.start = 3;
      };
      cpu::PhasorFilterParams p{};
      c.fill_sequence(p);
      fill(p);
      FOR_EACH_KERNEL(phasor_filter_forward, p) {
        Bytes out = c.unwritten(c.out);
        p.out = out.data();
        kernel(p);
        c.expect_out(out);
      }
      cpu::PhasorFilterBackwardParams q{};
      c.fill_sequence_backward(q);
      fill(q);
      FOR_EACH_KERNEL(phasor_filter_backward, q) {
        Bytes grad_x = c.unwritten(c.grad_x);
        Values grad_freqs(c.parameters[0].size()), grad_coefficients(c.parameters[1].size()),
            grad_constant(c.parameters[2].size()), grad_positions(given ? length : 0);
        q.grad_x = grad_x.data();
        q.grad_freqs = grad_freqs.data();
        q.grad_coefficients = grad_coefficients.data();
        q.grad_constant = grad_constant.data();
        q.grad_positions = given ? grad_positions.data() : nullptr;
        kernel(q);
        c.expect_grad_x(grad_x);
        c.expect_gradient(grad_freqs, 0, "grad_freqs");
        c.expect_gradient(grad_coefficients, 1, "grad_coefficients");
        c.expect_gradient(grad_constant, 2, "grad_constant");
        if (given) c.expect_gradient(grad_positions, 3, "grad_positions");
      }
    });
  }
}

TEST(Encoders, SineFeatures) {
  for (bool given : {false, true}) {
    for_each_case({{1, 67, 2, 3, 15}, {5, 5, 2, 9, 45}}, [&](Case& c) {
      constexpr std::int64_t kSines = 2;
      const auto [batch, length, heads, features, outputs] = c.size;
      const std::int64_t sines = heads * features * kSines;
      c.parameters = {random_values(sines, 3, 0.2), random_values(sines, 4),
                      random_values(sines, 5), random_values(heads * features, 6)};
      if (given) c.parameters.push_back(random_values(length, 6, 4));
      c.code = [=](const std::vector<Values>& of, std::int64_t h, std::int64_t d, std::int64_t n,
                   std::int64_t r) {
        if (r % features != d) return 0.0;
        const std::int64_t row = r / features, hd = h * features + d;
        if (row == 2 * kSines) return of[3][hd];
        const std::int64_t at = hd * kSines + row / 2;
        const double angle = core::kTwoPi * of[0][at] * position_of(of, 4, n) + of[2][at];
        return of[1][at] * (row % 2 == 0 ? std::cos(angle) : std::sin(angle));
      };
      c.prepare();
      const DType acc = accumulate_type(c.dtype);
      const Bytes amplitudes = pack(acc, c.parameters[1]), constant = pack(acc, c.parameters[3]);
      const auto fill = [&](auto& p) {
        p.num_sines = kSines;
        p.ndim = 1;
        p.freqs = c.parameters[0].data();
        p.amplitudes = amplitudes.data();
        p.offsets = c.parameters[2].data();
        p.constant = constant.data();
        p.positions = given ? c.parameters[4].data() : nullptr;
        p.start = 3;
      };
      cpu::SineFeaturesParams p{};
      c.fill_sequence(p);
      fill(p);
      FOR_EACH_KERNEL(sine_features_forward, p) {
        Bytes out = c.unwritten(c.out);
        p.out = out.data();
        kernel(p);
        c.expect_out(out);
      }
      cpu::SineFeaturesBackwardParams q{};
      c.fill_sequence_backward(q);
      fill(q);
      FOR_EACH_KERNEL(sine_features_backward, q) {
        Bytes grad_x = c.unwritten(c.grad_x);
        Values grads[4], grad_positions(given ? length : 0);
        for (int i = 0; i < 4; ++i) grads[i].resize(c.parameters[i].size());
        q.grad_x = grad_x.data();
        q.grad_freqs = grads[0].data();
        q.grad_amplitudes = grads[1].data();
        q.grad_offsets = grads[2].data();
        q.grad_constant = grads[3].data();
        q.grad_positions = given ? grad_positions.data() : nullptr;
        kernel(q);
        c.expect_grad_x(grad_x);
        for (int i = 0; i < 4; ++i) c.expect_gradient(grads[i], i, "gradient of a parameter");
        if (given) c.expect_gradient(grad_positions, 4, "grad_positions");
      }
    });
  }
}

// Noise that is given, and generated polyphase noise.
TEST(Encoders, ConvFilter) {
  for (std::int64_t stride : {0, 1, 4}) {
    for_each_case({{1, 37, 2, 3, 5}, {3, 11, 1, 5, 18}}, [&](Case& c) {
      constexpr std::int64_t kTaps = 6;
      const auto [batch, length, heads, features, outputs] = c.size;
      const std::int64_t periods = length + kTaps - 1;
      const core::NoiseParams generated{core::NoiseKind::kGaussian,       5,         nullptr, 1,
                                        {1, 1, stride == 0 ? 1 : stride}, {0, 0, -7}};
      Values noise(heads * features * periods * outputs);
      if (stride == 0) {
        noise = unpack(c.dtype, pack(c.dtype, random_values(noise.size(), 7)));
      } else {
        core::ConvNoiseParams n{DType::kFloat64, heads, features,  outputs,
                                {1, 1, periods}, 2,     generated, noise.data()};
        cpu::conv_noise(n);
      }
      c.parameters = {random_values(heads * features * kTaps, 3),
                      random_values(heads * features * outputs, 4)};
      if (stride == 0) c.parameters.push_back(noise);
      c.code = [=](const std::vector<Values>& of, std::int64_t h, std::int64_t d, std::int64_t n,
                   std::int64_t r) {
        const Values& z = of.size() > 2 ? of[2] : noise;
        const std::int64_t hd = h * features + d;
        double sum = of[1][hd * outputs + r];
        for (std::int64_t p = 0; p < kTaps; ++p)
          sum += of[0][hd * kTaps + p] * z[(hd * periods + n + p) * outputs + r];
        return sum;
      };
      c.prepare();
      const DType acc = accumulate_type(c.dtype);
      const Bytes kernel_memory = pack(acc, c.parameters[0]), constant = pack(acc, c.parameters[1]),
                  noise_memory = pack(c.dtype, noise);
      const auto grid_strides = [](const std::int64_t from[4], std::int64_t to[6]) {
        to[0] = from[0];
        to[1] = to[2] = 0;
        for (int i = 1; i < 4; ++i) to[2 + i] = from[i];
      };
      const auto fill = [&](auto& p) {
        c.fill(p);
        grid_strides(c.x_strides, p.x_strides);
        p.size[0] = p.size[1] = p.kernel_size[0] = p.kernel_size[1] = 1;
        p.size[2] = length;
        p.kernel_size[2] = kTaps;
        p.num_realizations = outputs;
        p.kernel = kernel_memory.data();
        p.constant = constant.data();
        p.generated = generated;
        p.noise = stride == 0 ? noise_memory.data() : nullptr;
        p.noise_dtype = c.dtype;
        p.noise_strides[0] = features * periods * outputs;
        p.noise_strides[1] = periods * outputs;
        p.noise_strides[2] = p.noise_strides[3] = 0;
        p.noise_strides[4] = outputs;
        p.noise_strides[5] = 1;
      };
      cpu::ConvFilterParams p{};
      fill(p);
      FOR_EACH_KERNEL(conv_filter_forward, p) {
        Bytes out = c.unwritten(c.out);
        p.out = out.data();
        kernel(p);
        c.expect_out(out);
      }
      cpu::ConvFilterBackwardParams q{};
      fill(q);
      q.grad_out = c.grad_out_memory.data();
      grid_strides(c.grad_out_strides, q.grad_out_strides);
      FOR_EACH_KERNEL(conv_filter_backward, q) {
        Bytes grad_x = c.unwritten(c.grad_x), grad_kernel(c.parameters[0].size()),
              grad_constant(c.parameters[1].size()), grad_noise(noise.size());
        q.grad_x = grad_x.data();
        q.grad_kernel = grad_kernel.data();
        q.grad_constant = grad_constant.data();
        q.grad_noise = stride == 0 ? grad_noise.data() : nullptr;
        kernel(q);
        c.expect_grad_x(grad_x);
        c.expect_gradient(unpack(acc, grad_kernel), 0, "grad_kernel");
        c.expect_gradient(unpack(acc, grad_constant), 1, "grad_constant");
        if (stride == 0) {
          expect_near(unpack(c.dtype, grad_noise), c.grad_of_parameters[2],
                      std::max(c.tolerance(), c.parameter_tolerance()), "grad_noise");
        }
      }
    });
  }
}

TEST(Encoders, Rotary) {
  for (bool given : {false, true}) {
    for_each_case(
        {{1, 67, 2, 6, 6}, {5, 9, 3, 10, 10}, {2, 1, 1, 2, 2}, {2, 17, 1, 32, 32}}, [&](Case& c) {
          const auto [batch, length, heads, features, outputs] = c.size;
          c.parameters = {random_values(heads * features / 2, 3, 0.2)};
          if (given) c.parameters.push_back(random_values(length, 6, 4));
          c.code = [=](const std::vector<Values>& of, std::int64_t h, std::int64_t d,
                       std::int64_t n, std::int64_t r) {
            if (d / 2 != r / 2) return 0.0;
            const double angle =
                core::kTwoPi * of[0][h * features / 2 + d / 2] * position_of(of, 1, n);
            if (d == r) return std::cos(angle);
            return r % 2 == 0 ? -std::sin(angle) : std::sin(angle);
          };
          c.prepare();
          const auto fill = [&](auto& p) {
            p.freqs = c.parameters[0].data();
            p.positions = given ? c.parameters[1].data() : nullptr;
            p.start = 3;
          };
          cpu::RotaryParams p{};
          c.fill_sequence(p);
          fill(p);
          FOR_EACH_KERNEL(rotary_forward, p) {
            Bytes out = c.unwritten(c.out);
            p.out = out.data();
            kernel(p);
            c.expect_out(out);
          }
          cpu::RotaryBackwardParams q{};
          c.fill_sequence_backward(q);
          fill(q);
          FOR_EACH_KERNEL(rotary_backward, q) {
            Bytes grad_x = c.unwritten(c.grad_x);
            Values grad_freqs = c.unwritten(c.parameters[0]),
                   grad_positions(given ? length : 0, std::numeric_limits<double>::quiet_NaN());
            q.grad_x = grad_x.data();
            q.grad_freqs = grad_freqs.data();
            q.grad_positions = given ? grad_positions.data() : nullptr;
            kernel(q);
            c.expect_grad_x(grad_x);
            c.expect_gradient(grad_freqs, 0, "grad_freqs");
            if (given) c.expect_gradient(grad_positions, 1, "grad_positions");
            // Every gradient can be left out.
            q.grad_freqs = q.grad_positions = nullptr;
            grad_x = c.unwritten(c.grad_x);
            q.grad_x = grad_x.data();
            kernel(q);
            c.expect_grad_x(grad_x);
            q.grad_x = nullptr;
            grad_freqs = c.unwritten(c.parameters[0]);
            q.grad_freqs = grad_freqs.data();
            kernel(q);
            c.expect_gradient(grad_freqs, 0, "grad_freqs alone");
          }
        });
  }
}

// As exact at position 10^6 as at 10, given or counted.
TEST(Encoders, RotaryIsExactFarFromTheOrigin) {
  constexpr std::int64_t kLength = 40, kFeatures = 16;
  for (double start : {10.0, 1e6, 123456789.0}) {
    Values freqs = random_values(kFeatures / 2, 1, 0.3), positions(kLength);
    std::vector<float> x(kLength * kFeatures, 1.0f);
    for (std::int64_t n = 0; n < kLength; ++n) positions[n] = start + static_cast<double>(n);
    for (bool given : {false, true}) {
      std::vector<float> out(x.size());
      cpu::RotaryParams p{};
      p.dtype = DType::kFloat32;
      p.batch = p.num_heads = p.num_threads = 1;
      p.length = kLength;
      p.in_features = kFeatures;
      p.x = x.data();
      p.x_strides[0] = p.x_strides[1] = p.x_strides[2] = kFeatures;
      p.x_strides[3] = 1;
      p.freqs = freqs.data();
      p.positions = given ? positions.data() : nullptr;
      p.start = start;
      p.out = out.data();
      cpu::rotary_forward(p);
      for (std::int64_t n = 0; n < kLength; ++n) {
        for (std::int64_t i = 0; i < kFeatures / 2; ++i) {
          const long double cycles = static_cast<long double>(freqs[i]) * positions[n];
          const double angle = core::kTwoPi * static_cast<double>(cycles - std::round(cycles));
          EXPECT_NEAR(out[n * kFeatures + 2 * i], std::cos(angle) - std::sin(angle), 1e-6);
          EXPECT_NEAR(out[n * kFeatures + 2 * i + 1], std::sin(angle) + std::cos(angle), 1e-6);
        }
      }
    }
  }
}

TEST(Encoders, RotaryTakesEmptySequences) {
  double freqs[2] = {0.1, 0.2}, grad_freqs[2] = {1, 1};
  cpu::RotaryBackwardParams p{};
  p.dtype = DType::kFloat32;
  p.batch = p.num_heads = p.num_threads = 1;
  p.in_features = 4;
  p.freqs = freqs;
  p.grad_freqs = grad_freqs;
  cpu::rotary_forward(p);
  cpu::rotary_backward(p);
  EXPECT_EQ(grad_freqs[0], 0);
  EXPECT_EQ(grad_freqs[1], 0);
}

}  // namespace
}  // namespace torch_spe
