// Feature maps phi where kernels load x, and phi' where they store its gradient. The map is chosen
// at run time, by branches that all threads take alike: kernels are not compiled for each map.
#pragma once

#include "core/feature_map.h"
#include "primitives.h"

namespace torch_spe::cuda {

using core::FeatureMap;

// elu(x) + 1 for tensors of a storage type; for 16 bits the hardware's exponential is precise
// enough.
template <class Storage, class T>
TORCH_SPE_DEVICE T map_elu(T x) {
  if constexpr (sizeof(Storage) == 2) {
    return (x < T(0) ? T(0) : x) + fast_exp(x > T(0) ? T(0) : x);
  } else {
    return core::apply_feature_map<FeatureMap::kElu>(x);
  }
}

// phi(x) for tensors of a storage type.
template <class Storage, class T>
TORCH_SPE_DEVICE T map_feature(FeatureMap map, T x) {
  if (map == FeatureMap::kIdentity) return x;
  if (map == FeatureMap::kRelu) return core::apply_feature_map<FeatureMap::kRelu>(x);
  return map_elu<Storage>(x);
}

// The same, for 16 bits without branches: less in all where most maps are elu + 1.
template <class Storage, class T>
TORCH_SPE_DEVICE T select_feature(FeatureMap map, T x) {
  if constexpr (sizeof(Storage) == 2) {
    const T elu = map_elu<Storage>(x), relu = core::apply_feature_map<FeatureMap::kRelu>(x);
    return map == FeatureMap::kElu ? elu : map == FeatureMap::kRelu ? relu : x;
  } else {
    return map_feature<Storage>(map, x);
  }
}

// phi(x) of an element of a tensor.
template <class Storage>
TORCH_SPE_DEVICE core::accumulate_t<Storage> read_feature(FeatureMap map, Storage x) {
  return map_feature<Storage>(map, read(x));
}

// The gradient of x from that of phi(x), given phi(x).
template <class T>
TORCH_SPE_DEVICE T gradient_of_input(FeatureMap map, T gradient, T phi) {
  if (map == FeatureMap::kRelu)
    return gradient * core::feature_map_derivative<FeatureMap::kRelu>(phi);
  return gradient * core::feature_map_derivative<FeatureMap::kElu>(phi);
}

// The same, given where x is, which is not read for the identity.
template <class Storage, class T>
TORCH_SPE_DEVICE T gradient_of_input_at(FeatureMap map, T gradient, const Storage* x) {
  if (map == FeatureMap::kIdentity) return gradient;
  return gradient_of_input(map, gradient, read_feature(map, *x));
}

// elu + 1 of two elements of 16 bits in a register.
template <class Storage>
TORCH_SPE_DEVICE void map_elu_pair(std::uint32_t pair, float* low, float* high) {
  const std::uint32_t negative = negative_halves(pair);
  float low_positive, high_positive;
  unpack_pair<Storage>(pair & negative, low, high);
  unpack_pair<Storage>(pair & ~negative, &low_positive, &high_positive);
  *low = fast_exp(*low) + low_positive;
  *high = fast_exp(*high) + high_positive;
}
// max(x, 0) of both, NaN where x is.
TORCH_SPE_DEVICE std::uint32_t map_relu_pair(std::uint32_t pair) {
  return pair & ~negative_halves(pair);
}

// phi of two elements of 16 bits in a register, rounded to 16 bits again.
template <class Storage>
TORCH_SPE_DEVICE std::uint32_t map_feature_pair(FeatureMap map, std::uint32_t pair) {
  if (map == FeatureMap::kIdentity) return pair;
  float low, high;
  unpack_pair<Storage>(pair, &low, &high);
  return pack_pair<Storage>(map_feature<Storage>(map, low), map_feature<Storage>(map, high));
}

// phi of 8 elements of 16 bits in shared memory, at a multiple of 16 bytes, in place.
template <class Storage>
TORCH_SPE_DEVICE void map_eight_features(FeatureMap map, Storage* x) {
  struct alignas(16) Pairs {
    std::uint32_t of[4];
  };
  Pairs pairs = *reinterpret_cast<const Pairs*>(x);
  TORCH_SPE_UNROLL
  for (int i = 0; i < 4; ++i) pairs.of[i] = map_feature_pair<Storage>(map, pairs.of[i]);
  *reinterpret_cast<Pairs*>(x) = pairs;
}
template <class Storage>
TORCH_SPE_DEVICE void map_one_feature(FeatureMap map, Storage* x) {
  write(read_feature(map, *x), x);
}

}  // namespace torch_spe::cuda
