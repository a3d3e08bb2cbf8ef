// Vectors of the instruction set that this file is being compiled for, and aligned workspace.
// Included by kernels only: everything stands in the namespace of the instruction set.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "core/dtype.h"
#include "core/platform.h"

#if !defined(TORCH_SPE_ISA)
#error "TORCH_SPE_ISA must name the instruction set this file is compiled for"
#endif

namespace torch_spe::cpu::TORCH_SPE_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr std::int64_t kLanes = kVectorBytes / static_cast<std::int64_t>(sizeof(T));

template <class T>
TORCH_SPE_INLINE Vec<T> load_vec(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}
template <class T>
TORCH_SPE_INLINE void store_vec(T* p, Vec<T> value) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = value;
}

template <class T>
TORCH_SPE_INLINE T sum_lanes(Vec<T> value) {
  T lanes[kLanes<T>];
  store_vec(lanes, value);
  for (std::int64_t half = kLanes<T> / 2; half > 0; half /= 2) {
    for (std::int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// Two rows of sums become one: blocks of kBlock lanes, taken in turn as even and odd, are added.
template <class T, int kBlock, int kOdd, std::size_t... kLane>
TORCH_SPE_INLINE Vec<T> gather_blocks(Vec<T> a, Vec<T> b, std::index_sequence<kLane...>) {
  constexpr int kHalf = static_cast<int>(kLanes<T>) / 2;
  return __builtin_shufflevector(
      a, b,
      (static_cast<int>(kLane) < kHalf ? 0 : 2 * kHalf) +
          (2 * (static_cast<int>(kLane) % kHalf / kBlock) + kOdd) * kBlock +
          static_cast<int>(kLane) % kBlock...);
}

// Lane i of the result is the sum of the lanes of values[i]: a tree of additions for all rows at
// once.
template <class T, int kCount = static_cast<int>(kLanes<T>)>
TORCH_SPE_INLINE Vec<T> sum_rows(const Vec<T>* values) {
  if constexpr (kCount == 1) {
    return values[0];
  } else {
    using Lanes = std::make_index_sequence<static_cast<std::size_t>(kLanes<T>)>;
    constexpr int kBlock = static_cast<int>(kLanes<T>) / kCount;
    const Vec<T> a = sum_rows<T, kCount / 2>(values);
    const Vec<T> b = sum_rows<T, kCount / 2>(values + kCount / 2);
    return gather_blocks<T, kBlock, 0>(a, b, Lanes{}) + gather_blocks<T, kBlock, 1>(a, b, Lanes{});
  }
}

TORCH_SPE_INLINE std::int64_t round_up(std::int64_t n, std::int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
TORCH_SPE_INLINE std::int64_t min_of(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
TORCH_SPE_INLINE std::int64_t max_of(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// Calls `function` with a value of the storage type.
template <class Function>
TORCH_SPE_INLINE void visit_storage(core::DType dtype, const Function& function) {
  switch (dtype) {
    case core::DType::kFloat32:
      return function(float{});
    case core::DType::kFloat64:
      return function(double{});
    case core::DType::kFloat16:
      return function(core::Half{});
    case core::DType::kBFloat16:
      return function(core::BFloat16{});
  }
}

// A row of `n` values with a stride, converted to the type of computation.
template <class Storage, class T>
TORCH_SPE_INLINE void load_row(const Storage* in, std::int64_t stride, std::int64_t n, T* out) {
  if (stride == 1) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = core::load(in[i]);
  } else {
    for (std::int64_t i = 0; i < n; ++i) out[i] = core::load(in[i * stride]);
  }
}
template <class T, class Storage>
TORCH_SPE_INLINE void store_row(const T* in, std::int64_t stride, std::int64_t n, Storage* out) {
  if (stride == 1) {
    for (std::int64_t i = 0; i < n; ++i) core::store(in[i], out + i);
  } else {
    for (std::int64_t i = 0; i < n; ++i) core::store(in[i], out + i * stride);
  }
}

// Length of rows of `size` values that fill an odd number of cache lines: a column of such rows
// then spreads over the whole level 1 cache.
template <class T>
TORCH_SPE_INLINE std::int64_t odd_lines(std::int64_t size) {
  constexpr std::int64_t line = 64 / static_cast<std::int64_t>(sizeof(T));
  return ((size + line - 1) / line | 1) * line;
}

// Scratch memory of one thread, aligned to a cache line. With TORCH_SPE_POISON in the environment
// it starts out as NaN, so that a read before the first write shows.
template <class T>
class Workspace {
 public:
  explicit Workspace(std::int64_t size) {
    const std::size_t bytes = static_cast<std::size_t>(round_up(max_of(size, 1) * sizeof(T), 64));
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    // Thrown exceptions cannot leave a parallel region; there is nothing to be done without scratch
    // memory.
    if (data_ == nullptr) std::abort();
    if (std::getenv("TORCH_SPE_POISON") != nullptr)
      std::memset(static_cast<void*>(data_), 0xff, bytes);
  }
  ~Workspace() { std::free(data_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  T* get() const { return data_; }
  operator T*() const { return data_; }

 private:
  T* data_;
};

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
