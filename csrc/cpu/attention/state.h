// The states of segments: their layout in memory, the way in and out, and scans through core::join.
#pragma once

#include "decay.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

// Sizes rounded up to whole cache lines.
template <class T>
TORCH_SPE_INLINE std::int64_t padded(std::int64_t size) {
  return round_up(size, 64 / static_cast<std::int64_t>(sizeof(T)));
}

template <class T>
TORCH_SPE_INLINE void set_zero(T* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] = 0;
}

// S [R, E] followed by z [F], rows and z padded to cache lines, and S to as many rows; padding is
// zero, so that whole vectors may be multiplied.
template <class T>
struct StateLayout {
  std::int64_t features, values, denominator_features;         // R, E, F
  std::int64_t feature_width, value_width, denominator_width;  // padded

  explicit StateLayout(const LinearAttentionParams& p)
      : features(p.num_realizations),
        values(p.value_features),
        denominator_features(p.denominator_features > 0 ? p.denominator_features
                                                        : p.num_realizations),
        feature_width(padded<T>(features)),
        value_width(padded<T>(values)),
        denominator_width(padded<T>(denominator_features)) {}

  std::int64_t z_offset() const { return feature_width * value_width; }
  std::int64_t size() const { return z_offset() + denominator_width; }

  // With its padding; of no tokens where `state` is null.
  template <class U>
  core::StateView<U> view(U* state) const {
    return view(state, state == nullptr ? nullptr : state + z_offset());
  }
  template <class U>
  core::StateView<U> view(U* s, U* z) const {
    return {s, z, feature_width, value_width, denominator_width, value_width};
  }
  // As tensors of the caller hold it: contiguous, without padding.
  template <class U>
  core::StateView<U> tensor_view(U* s, U* z, std::int64_t row) const {
    return {s + row * features * values,
            z + row * denominator_features,
            features,
            values,
            denominator_features,
            values};
  }

  // The state of `row` in tensors s [S, H, R, E] and z [S, H, F], and whether there is one.
  bool import(const void* s, const void* z, std::int64_t row, T* state) const {
    if (s == nullptr) return false;
    const core::StateView<const T> from =
        tensor_view(static_cast<const T*>(s), static_cast<const T*>(z), row);
    core::set_zero(view(state));
    for (std::int64_t r = 0; r < features; ++r) {
      for (std::int64_t e = 0; e < values; ++e) state[r * value_width + e] = from.s[r * values + e];
    }
    for (std::int64_t f = 0; f < denominator_features; ++f) state[z_offset() + f] = from.z[f];
    return true;
  }
  // Each of s and z may be null.
  void export_to(const T* state, std::int64_t row, void* s, void* z) const {
    if (s != nullptr) {
      T* const to = static_cast<T*>(s) + row * features * values;
      for (std::int64_t r = 0; r < features; ++r) {
        for (std::int64_t e = 0; e < values; ++e) to[r * values + e] = state[r * value_width + e];
      }
    }
    if (z != nullptr) {
      T* const to = static_cast<T*>(z) + row * denominator_features;
      for (std::int64_t f = 0; f < denominator_features; ++f) to[f] = state[z_offset() + f];
    }
  }

  // to = from, or the state of no tokens where that is null.
  void copy(const T* from, T* to) const {
    for (std::int64_t i = 0; i < size(); ++i) to[i] = from == nullptr ? T(0) : from[i];
  }

  // out = first (null for the state of no tokens) joined with second, over whose tokens it passes.
  void join(const Passage<T>& passage, const T* first, const T* second, T* out) const {
    core::join(passage, view(first), view(second), view(out));
  }
};

// A state for each segment.
template <class T>
class SegmentStates {
 public:
  // Without memory, and without use, where they are not needed.
  SegmentStates(const StateLayout<T>& layout, const Segments& segments, bool is_needed = true)
      : layout_(layout),
        segments_(segments),
        data_(is_needed ? segments.total() * layout.size() : 0) {}

  T* operator[](std::int64_t slot) const { return data_ + slot * layout_.size(); }

  // Each segment's place holds the sums over the segment before it, and then the state before it,
  // which s and z (or null) start. The first place of a row is filled when there is an initial one.
  void scan_forward(std::int64_t row, const void* s, const void* z, Decay<T>& decay) const {
    const bool has_initial = layout_.import(s, z, row, (*this)[segments_.first_slot(row)]);
    for (std::int64_t i = has_initial ? 1 : 2; i < segments_.count(row); ++i) {
      const Segment before = segments_.of_row(row, i - 1);
      layout_.join(decay.over(before), (*this)[before.slot], (*this)[before.slot + 1],
                   (*this)[before.slot + 1]);
    }
  }

  // Each segment's place holds the sums over the segment after it, and then the gradient of the
  // state after it, which s and z (or null) start at the end.
  void scan_backward(std::int64_t row, const void* s, const void* z, Decay<T>& decay) const {
    const std::int64_t count = segments_.count(row);
    const bool has_final =
        layout_.import(s, z, row, (*this)[segments_.first_slot(row) + count - 1]);
    for (std::int64_t i = count - (has_final ? 1 : 2); i > 0; --i) {
      const Segment after = segments_.of_row(row, i);
      layout_.join(decay.over(after), (*this)[after.slot], (*this)[after.slot - 1],
                   (*this)[after.slot - 1]);
    }
  }

  // total = the state in s and z (or null) joined with the sums over the row's segments in order.
  void total(std::int64_t row, const void* s, const void* z, Decay<T>& decay, T* total) const {
    const T* first = layout_.import(s, z, row, total) ? total : nullptr;
    for (std::int64_t i = 0; i < segments_.count(row); ++i) {
      const Segment segment = segments_.of_row(row, i);
      layout_.join(decay.over(segment), first, (*this)[segment.slot], total);
      first = total;
    }
  }

 private:
  const StateLayout<T>& layout_;
  const Segments& segments_;
  Workspace<T> data_;  // [slot], states
};

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
