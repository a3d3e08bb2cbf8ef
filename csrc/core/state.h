// The state of linear attention and its algebra, for every device.
//
// What some tokens leave for the queries that may see them is
//   S = sum_m phi(k_m) v_m^T   [R, E]
//   z = sum_m psi(k_m)         [F]
// and the gradient of a state has the same form, with queries in place of keys, gradients of the
// numerators in place of values, and gradients of the denominators as weights of z. A state can be
// set to zero, joined with another, stepped over a token and applied to a query; the sums over a
// chunk of tokens, and what a chunk of queries reads, are matrix products of each device.
//
// What happens to a state while tokens pass, a decay, and that two states then add up, is decided
// in `carry` and `join` and nowhere else: every scan, sum over segments, initial state and transfer
// between ranks goes through them.
#pragma once

#include <cstdint>

#include "platform.h"

namespace torch_spe::core {

// What lies between two states that are joined: the tokens of the second one, over which the first
// one is carried. In a backward pass the first one is the gradient that comes from behind them.
template <class T>
struct Passage {
  const T* factors = nullptr;  // exp of the sum of the tokens' log_decay, or null without a decay
  std::int64_t stride = 0;     // 1 where features have factors of their own, 0 for one factor

  TORCH_SPE_INLINE bool fades() const { return factors != nullptr; }
  TORCH_SPE_INLINE T factor(std::int64_t feature) const { return factors[feature * stride]; }
};

// What becomes of an element of S or z that belongs to a feature.
template <class T>
TORCH_SPE_INLINE T carry(const Passage<T>& passage, std::int64_t feature, T element) {
  return passage.fades() ? passage.factor(feature) * element : element;
}

// An element of S or z: `first` is carried over the tokens of `second`, then they are added.
template <class T>
TORCH_SPE_INLINE T join(const Passage<T>& passage, std::int64_t feature, T first, T second) {
  return carry(passage, feature, first) + second;
}

// The elements of a state are shared by a team; a member has those at first, first + count, ...
// This is the team of one; a block of CUDA threads has {threadIdx.x, blockDim.x}.
struct Alone {
  static constexpr std::int64_t first = 0, count = 1;
};

// A state in memory. T may be const. Rows of S that are padded may count as longer ones; then
// nothing lies between them, and loops run over all of S at once.
template <class T>
struct StateView {
  T* s;  // [R, E], rows `stride` apart; null for a state of no tokens
  T* z;  // [F]
  std::int64_t features, values, denominator_features;  // R, E, F
  std::int64_t stride;
};

// What a loop over S runs over: its rows, or one long row.
template <class T>
TORCH_SPE_INLINE std::int64_t loop_rows(const StateView<T>& state) {
  return state.stride == state.values ? 1 : state.features;
}
template <class T>
TORCH_SPE_INLINE std::int64_t loop_columns(const StateView<T>& state) {
  return state.stride == state.values ? state.features * state.values : state.values;
}

// The state of no tokens.
template <class T, class Team = Alone>
TORCH_SPE_INLINE void set_zero(const StateView<T>& state, const Team& team = Team{}) {
  for (std::int64_t r = 0; r < loop_rows(state); ++r) {
    for (std::int64_t e = team.first; e < loop_columns(state); e += team.count)
      state.s[r * state.stride + e] = T(0);
  }
  for (std::int64_t f = team.first; f < state.denominator_features; f += team.count)
    state.z[f] = T(0);
}

// Carries a state over the tokens of a chunk whose sums a matrix product then adds to it: together
// that is a join.
template <class T, class Team = Alone>
TORCH_SPE_INLINE void carry(const Passage<T>& passage, const StateView<T>& state,
                            const Team& team = Team{}) {
  if (!passage.fades()) return;
  for (std::int64_t r = 0; r < state.features; ++r) {
    const T factor = passage.factor(r);
    T* const row = state.s + r * state.stride;
    for (std::int64_t e = team.first; e < state.values; e += team.count) row[e] *= factor;
  }
  for (std::int64_t f = team.first; f < state.denominator_features; f += team.count)
    state.z[f] *= passage.factor(f);
}

// out = first joined with second, which may be the same memory as out, and so may first. The first
// one may be the state of no tokens (s null). All have the same sizes and, where loops run over one
// long row, the same stride.
template <class T, class First, class Second, class Team = Alone>
TORCH_SPE_INLINE void join(const Passage<T>& passage, const StateView<First>& first,
                           const StateView<Second>& second, const StateView<T>& out,
                           const Team& team = Team{}) {
  const bool none = first.s == nullptr, fades = passage.fades();
  const std::int64_t rows = fades ? out.features : loop_rows(out);
  const std::int64_t columns = fades ? out.values : loop_columns(out);
  for (std::int64_t r = 0; r < rows; ++r) {
    const Second* const b = second.s + r * second.stride;
    T* const to = out.s + r * out.stride;
    if (none) {
      for (std::int64_t e = team.first; e < columns; e += team.count) to[e] = b[e];
    } else if (fades) {
      const First* const a = first.s + r * first.stride;
      const T factor = passage.factor(r);
      for (std::int64_t e = team.first; e < columns; e += team.count) to[e] = factor * a[e] + b[e];
    } else {
      const First* const a = first.s + r * first.stride;
      for (std::int64_t e = team.first; e < columns; e += team.count) to[e] = a[e] + b[e];
    }
  }
  for (std::int64_t f = team.first; f < out.denominator_features; f += team.count)
    out.z[f] = none ? T(second.z[f]) : join(passage, f, T(first.z[f]), T(second.z[f]));
}

// A step over one token, row r of S: it becomes to = join(from, phi(k)_r v) and is applied to the
// token's query, out += phi(q)_r to, while it is at hand. `from` is null where there is no state
// before, `to` where none is wanted after.
template <class T, class Team = Alone>
TORCH_SPE_INLINE void step_row(const Passage<T>& passage, std::int64_t r, T key, const T* v,
                               T query, const T* from, std::int64_t values, T* to, T* out,
                               const Team& team = Team{}) {
  const T factor = passage.fades() ? passage.factor(r) : T(1);
  for (std::int64_t e = team.first; e < values; e += team.count) {
    const T added = key * v[e];
    const T state = from == nullptr ? added : factor * from[e] + added;
    if (to != nullptr) to[e] = state;
    out[e] += query * state;
  }
}

}  // namespace torch_spe::core
