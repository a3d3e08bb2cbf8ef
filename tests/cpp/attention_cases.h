// Cases of linear attention for the tests of its kernels: inputs, the plain recurrence in double,
// and calls of the CPU kernels on memory of every type and layout.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/attention/linear_attention.h"

namespace attention_cases {

using torch_spe::core::DType;
using torch_spe::core::FeatureMap;
using torch_spe::core::LinearAttentionBackwardParams;
using torch_spe::core::LinearAttentionParams;
using Values = std::vector<double>;

inline std::size_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}
inline DType accumulate_type(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// Elements of a storage type, with a double's interface. NaN at first.
class Array {
 public:
  Array(DType dtype, std::int64_t size)
      : dtype_(dtype), bytes_(static_cast<std::size_t>(size) * size_of(dtype), 0xff) {}
  Array(DType dtype, const Values& values) : Array(dtype, std::ssize(values)) {
    for (std::size_t i = 0; i < values.size(); ++i) set(i, values[i]);
  }

  void* data() { return bytes_.data(); }
  void set(std::size_t i, double value) {
    unsigned char* to = bytes_.data() + i * size_of(dtype_);
    switch (dtype_) {
      case DType::kFloat64:
        return write(value, to);
      case DType::kFloat32:
        return write(static_cast<float>(value), to);
      case DType::kFloat16:
        return convert<torch_spe::core::Half>(value, to);
      case DType::kBFloat16:
        return convert<torch_spe::core::BFloat16>(value, to);
    }
  }
  double get(std::size_t i) const {
    const unsigned char* from = bytes_.data() + i * size_of(dtype_);
    switch (dtype_) {
      case DType::kFloat64:
        return read<double>(from);
      case DType::kFloat32:
        return read<float>(from);
      case DType::kFloat16:
        return torch_spe::core::load(read<torch_spe::core::Half>(from));
      case DType::kBFloat16:
        break;
    }
    return torch_spe::core::load(read<torch_spe::core::BFloat16>(from));
  }
  Values values() const {
    Values all(bytes_.size() / size_of(dtype_));
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = get(i);
    return all;
  }

 private:
  template <class T>
  static void write(T value, unsigned char* to) {
    std::memcpy(to, &value, sizeof(value));
  }
  template <class T>
  static T read(const unsigned char* from) {
    T value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
  template <class T>
  static void convert(double value, unsigned char* to) {
    T stored;
    torch_spe::core::store(static_cast<float>(value), &stored);
    write(stored, to);
  }

  DType dtype_;
  std::vector<unsigned char> bytes_;
};

enum class Order { kContiguous, kHeadsFirst, kApart };

struct Case {
  std::int64_t batch = 2, query_length = 65, key_length = 65, heads = 3;
  std::int64_t features = 5, values = 7, own_features = 0;  // R, E, F of an own denominator
  bool causal = true, normalize = false, rms_norm = false, masked = false, state = false;
  std::vector<std::int64_t> bounds = {};
  FeatureMap feature_map = FeatureMap::kElu;
  Order order = Order::kContiguous;
  int threads = 2;
  double eps = 1;

  std::int64_t sequences() const { return bounds.empty() ? batch : std::ssize(bounds) - 1; }
  std::int64_t denominator_features() const { return own_features > 0 ? own_features : features; }
  std::string name() const {
    std::string text = "N " + std::to_string(query_length) + " M " + std::to_string(key_length);
    text += " R " + std::to_string(features) + " E " + std::to_string(values) + " F " +
            std::to_string(own_features) + " map " + std::to_string(static_cast<int>(feature_map)) +
            " order " + std::to_string(static_cast<int>(order));
    for (const auto& [flag, word] : {std::pair{causal, " causal"},
                                     {normalize, " normalize"},
                                     {rms_norm, " rms_norm"},
                                     {masked, " masked"},
                                     {state, " state"},
                                     {!bounds.empty(), " packed"}})
      if (flag) text += word;
    return text;
  }
};

// Inputs, outputs or gradients in the order q, k, v, denominator_q, denominator_k, s, z.
constexpr int kInputs = 7;
using Tensors = std::vector<Values>;

inline std::vector<std::int64_t> sizes_of(const Case& c) {
  const std::int64_t q = c.batch * c.query_length * c.heads, k = c.batch * c.key_length * c.heads;
  const std::int64_t states = c.state ? c.sequences() * c.heads : 0;
  return {q * c.features,
          k * c.features,
          k * c.values,
          q * c.own_features,
          k * c.own_features,
          states * c.features * c.values,
          states * c.denominator_features()};
}

inline Tensors make_inputs(const Case& c, DType dtype, unsigned seed = 0) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  Tensors inputs;
  int index = 0;
  for (std::int64_t size : sizes_of(c)) {
    Values values(static_cast<std::size_t>(size));
    for (double& value : values) {
      value = normal(generator);
      if (index == 6 || (index != 2 && index != 5 && c.feature_map == FeatureMap::kIdentity))
        value = std::exp(0.5 * value);           // denominators must not come near 0
      if (std::abs(value) < 0.01) value = 0.01;  // nor finite differences the kink of relu
    }
    inputs.push_back(Array(index < 5 ? dtype : accumulate_type(dtype), values).values());
    ++index;
  }
  return inputs;
}

inline std::vector<char> make_mask(const Case& c) {
  std::mt19937 generator(7);
  std::vector<char> mask(static_cast<std::size_t>(c.masked ? c.batch * c.key_length : 0));
  for (char& entry : mask) entry = generator() % 10 < 3;
  return mask;
}

inline double map(FeatureMap feature_map, double x) {
  if (feature_map == FeatureMap::kElu) return x > 0 ? x + 1 : std::exp(x);
  return feature_map == FeatureMap::kRelu && x < 0 ? 0 : x;
}

struct Result {
  Values out, divisor, s, z;
};

// The recurrence, token by token.
inline Result plain_forward(const Case& c, const Tensors& inputs) {
  const auto &q = inputs[0], &k = inputs[1], &v = inputs[2];
  const bool own = c.own_features > 0;
  const auto &dq = own ? inputs[3] : q, &dk = own ? inputs[4] : k;
  const FeatureMap psi = own ? FeatureMap::kRelu : c.feature_map;
  const std::int64_t R = c.features, E = c.values, F = c.denominator_features(), H = c.heads;
  const std::vector<char> mask = make_mask(c);
  Result result;
  result.out.resize(static_cast<std::size_t>(c.batch * c.query_length * H * E));
  result.divisor.resize(static_cast<std::size_t>(c.batch * c.query_length * H), 1);
  for (std::int64_t row = 0; row < c.sequences() * H; ++row) {
    const std::int64_t sequence = row / H, head = row % H;
    const std::int64_t batch = c.bounds.empty() ? sequence : 0;
    const std::int64_t first = c.bounds.empty() ? 0 : c.bounds[sequence];
    const std::int64_t end = c.bounds.empty() ? c.key_length : c.bounds[sequence + 1];
    Values s(R * E), z(F);
    if (c.state) {
      std::copy_n(inputs[5].begin() + row * R * E, R * E, s.begin());
      std::copy_n(inputs[6].begin() + row * F, F, z.begin());
    }
    const auto add = [&](std::int64_t m) {
      const std::int64_t token = (batch * c.key_length + m) * H + head;
      if (c.masked && mask[batch * c.key_length + m]) return;
      for (std::int64_t r = 0; r < R; ++r) {
        for (std::int64_t e = 0; e < E; ++e)
          s[r * E + e] += map(c.feature_map, k[token * R + r]) * v[token * E + e];
      }
      for (std::int64_t f = 0; f < F; ++f) z[f] += map(psi, dk[token * F + f]);
    };
    const auto read = [&](std::int64_t n) {
      const std::int64_t token = (batch * c.query_length + n) * H + head;
      double denominator = c.eps, square = 0;
      for (std::int64_t f = 0; f < F; ++f) denominator += map(psi, dq[token * F + f]) * z[f];
      for (std::int64_t e = 0; e < E; ++e) {
        double sum = 0;
        for (std::int64_t r = 0; r < R; ++r)
          sum += map(c.feature_map, q[token * R + r]) * s[r * E + e];
        result.out[token * E + e] = sum;
        square += sum * sum;
      }
      double& divisor = result.divisor[token];
      if (c.normalize) divisor = denominator;
      if (c.rms_norm) divisor = std::sqrt(square / static_cast<double>(E) + c.eps);
      for (std::int64_t e = 0; e < E; ++e) {
        double& value = result.out[token * E + e];
        value = divisor == 0 ? 0 : value / divisor;
      }
    };
    for (std::int64_t m = first; m < end; ++m) {
      add(m);
      if (c.causal) read(m);
    }
    if (!c.causal && c.query_length > 0) {
      const std::int64_t last = c.bounds.empty() ? c.query_length : end;
      for (std::int64_t n = first; n < last; ++n) read(n);
    }
    result.s.insert(result.s.end(), s.begin(), s.end());
    result.z.insert(result.z.end(), z.begin(), z.end());
  }
  return result;
}

// A tensor [B, L, H, C] in memory as the case wants it.
class Strided {
 public:
  Strided(DType dtype, const Values& values, std::int64_t batch, std::int64_t length,
          std::int64_t heads, std::int64_t columns, Order order)
      : array_(dtype, order == Order::kApart ? 2 * std::ssize(values) : std::ssize(values)) {
    const bool heads_first = order == Order::kHeadsFirst;
    const std::int64_t step = order == Order::kApart ? 2 : 1;
    strides_[3] = step;
    strides_[2] = step * (heads_first ? length * columns : columns);
    strides_[1] = step * (heads_first ? columns : heads * columns);
    strides_[0] = step * length * heads * columns;
    std::size_t i = 0;
    for (std::int64_t b = 0; b < batch; ++b)
      for (std::int64_t n = 0; n < length; ++n)
        for (std::int64_t h = 0; h < heads; ++h)
          for (std::int64_t x = 0; x < columns; ++x)
            array_.set(static_cast<std::size_t>(b * strides_[0] + n * strides_[1] +
                                                h * strides_[2] + x * strides_[3]),
                       values[i++]);
  }

  void give(const void*& data, std::int64_t (&strides)[4]) {
    data = array_.data();
    std::copy_n(strides_, 4, strides);
  }

 private:
  Array array_;
  std::int64_t strides_[4];
};

// The kernels' results, and their gradients for gradients of out, s and z.
struct Kernels {
  Result result;
  Tensors gradients;
};

inline Kernels run(const Case& c, DType dtype, const Tensors& inputs, const Result* grads = nullptr,
                   unsigned wanted = ~0u) {
  setenv("TORCH_SPE_POISON", "1", 1);
  const DType wide = accumulate_type(dtype);
  const std::int64_t B = c.batch, N = c.query_length, M = c.key_length, H = c.heads;
  const std::int64_t states = c.sequences() * H;
  const auto strided = [&](const Values& values, std::int64_t length, std::int64_t columns) {
    return Strided(dtype, values, B, length, H, columns, c.order);
  };
  Strided q = strided(inputs[0], N, c.features), k = strided(inputs[1], M, c.features),
          v = strided(inputs[2], M, c.values), dq = strided(inputs[3], N, c.own_features),
          dk = strided(inputs[4], M, c.own_features);
  Array initial_s(wide, inputs[5]), initial_z(wide, inputs[6]);
  Array out(dtype, B * N * H * c.values), divisor(wide, B * N * H);
  Array final_s(wide, states * c.features * c.values),
      final_z(wide, states * c.denominator_features());
  const std::vector<char> mask = make_mask(c);

  LinearAttentionBackwardParams p{};
  p.dtype = dtype;
  p.feature_map = c.feature_map;
  p.causal = c.causal;
  p.normalize = c.normalize;
  p.rms_norm = c.rms_norm;
  p.eps = c.eps;
  p.num_sequences = c.sequences();
  p.num_heads = H;
  p.query_length = N;
  p.key_length = M;
  p.num_realizations = c.features;
  p.value_features = c.values;
  p.num_threads = c.threads;
  p.cu_seqlens = c.bounds.empty() ? nullptr : c.bounds.data();
  p.key_padding_mask = c.masked ? reinterpret_cast<const bool*>(mask.data()) : nullptr;
  q.give(p.q, p.q_strides);
  k.give(p.k, p.k_strides);
  v.give(p.v, p.v_strides);
  p.denominator_features = c.denominator_features();
  p.has_own_denominator = c.own_features > 0;
  if (p.has_own_denominator) {
    dq.give(p.denominator_q, p.denominator_q_strides);
    dk.give(p.denominator_k, p.denominator_k_strides);
    p.denominator_feature_map = FeatureMap::kRelu;
  }
  p.initial_s = c.state ? initial_s.data() : nullptr;
  p.initial_z = c.state ? initial_z.data() : nullptr;
  p.out = out.data();
  p.row_divisor = c.normalize || c.rms_norm ? divisor.data() : nullptr;
  p.final_s = final_s.data();
  p.final_z = final_z.data();
  if (N == 0) p.q = p.denominator_q = p.out = nullptr;
  torch_spe::cpu::linear_attention_forward(p);
  Kernels found;
  found.result = {out.values(), p.row_divisor == nullptr ? Values(B * N * H, 1) : divisor.values(),
                  final_s.values(), final_z.values()};
  if (grads == nullptr) return found;

  Strided result = strided(found.result.out, N, c.values);
  Strided grad_out = strided(grads->out, N, c.values);
  Array grad_s(wide, grads->s), grad_z(wide, grads->z);
  result.give(p.result, p.result_strides);
  grad_out.give(p.grad_out, p.grad_out_strides);
  p.saved_row_divisor = p.row_divisor;
  if (!grads->s.empty()) {
    p.grad_final_s = grad_s.data();
    p.grad_final_z = grad_z.data();
  }
  std::vector<Array> gradients;
  int index = 0;
  for (std::int64_t size : sizes_of(c)) gradients.emplace_back(index++ < 5 ? dtype : wide, size);
  const auto give = [&](int i) {
    return (wanted >> i & 1) != 0 ? gradients[static_cast<std::size_t>(i)].data() : nullptr;
  };
  p.grad_q = N > 0 ? give(0) : nullptr;
  p.grad_k = give(1);
  p.grad_v = give(2);
  if (p.has_own_denominator) {
    p.grad_denominator_q = N > 0 ? give(3) : nullptr;
    p.grad_denominator_k = give(4);
  }
  if (c.state) {
    p.grad_initial_s = give(5);
    p.grad_initial_z = give(6);
  }
  torch_spe::cpu::linear_attention_backward(p);
  for (const Array& gradient : gradients) found.gradients.push_back(gradient.values());
  return found;
}

}  // namespace attention_cases
