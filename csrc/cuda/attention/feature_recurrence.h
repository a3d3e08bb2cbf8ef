// Linear attention with a decay per feature (a diagonal one), token by token: a thread goes through
// a sequence with a column or a row of the state. Right for every decay, not fast.
//
// A state has the columns of S and then that of z, whose value of a token is the token's weight.
// Moving forwards, it fades by the token's step before it takes the token; moving backwards, after
// that, on the way to the token before. A strict recurrence reads the state without the token of
// the row. States and sums are double: exp(-1e-7) rounded to float32, token after token, would be
// off by a fifth of the step.
#pragma once

#include "decay.h"

namespace torch_spe::cuda::attention {

constexpr std::int64_t kAnchor = 32;  // tokens over which gradients of steps are added up

// What both recurrences are made of: states of `columns` that `rows` read.
template <class Storage>
struct Recurrence {
  using T = core::accumulate_t<Storage>;
  Tokens<Storage> rows, columns;
  Cut chunks;                            // of kAnchor tokens
  std::int64_t heads, features, values;  // H, R, E
  bool has_z;                            // C = E + has_z columns
  bool backwards = false;
  bool strict = false;
  bool adds = false;                                   // to what `out` has
  const double* factors = nullptr;                     // [B, L, H, R], exp of the steps
  const T *initial_s = nullptr, *initial_z = nullptr;  // [S, H, R, E], [S, H, R], or null
  double* state = nullptr;                             // [S, H, C, R], scratch memory
  T *total_s = nullptr, *total_z = nullptr;            // [S, H, R, E], [S, H, R], or null
  T* out = nullptr;                                    // [B, L, H, C] or [B, L, H, R], or null

  TORCH_SPE_INLINE std::int64_t width() const { return values + (has_z ? 1 : 0); }

  TORCH_SPE_DEVICE double value(const Tokens<Storage>& tokens, std::int64_t batch, std::int64_t n,
                                std::int64_t head, std::int64_t c) const {
    return c < values ? tokens.y_at(batch, n, head, c) : tokens.weight_of(batch, n, head);
  }
  TORCH_SPE_DEVICE double initial(std::int64_t unit, std::int64_t r, std::int64_t c) const {
    if (c == values) return initial_z == nullptr ? 0.0 : initial_z[unit * features + r];
    return initial_s == nullptr ? 0.0 : initial_s[(unit * features + r) * values + c];
  }
  TORCH_SPE_DEVICE void keep_total(std::int64_t unit, std::int64_t r, std::int64_t c,
                                   double s) const {
    if (c == values) {
      if (total_z != nullptr) total_z[unit * features + r] = static_cast<T>(s);
    } else if (total_s != nullptr) {
      total_s[(unit * features + r) * values + c] = static_cast<T>(s);
    }
  }
};

// out[n, c] = sum_r X_row[n, r] S[r, c], a thread for each sequence, head and column.
template <class Storage>
struct ValuesRecurrence : Recurrence<Storage> {
  using T = core::accumulate_t<Storage>;

  TORCH_SPE_DEVICE void operator()(std::int64_t i) const {
    const std::int64_t width = this->width(), c = i % width, unit = i / width;
    const std::int64_t head = unit % this->heads, sequence = unit / this->heads;
    const std::int64_t batch = this->chunks.bounds == nullptr ? sequence : 0;
    const std::int64_t begin = this->chunks.begin(sequence);
    const std::int64_t length = this->chunks.length_of(sequence);
    double* const state = this->state + i * this->features;
    for (std::int64_t r = 0; r < this->features; ++r) state[r] = this->initial(unit, r, c);
    for (std::int64_t j = 0; j < length; ++j) {
      const std::int64_t n = begin + (this->backwards ? length - 1 - j : j);
      const std::int64_t token = this->columns.index(batch, n, head);
      const double* const factors = this->factors + token * this->features;
      const double y = this->value(this->columns, batch, n, head, c);
      double sum = 0;
      TORCH_SPE_KEEP_LOOP
      for (std::int64_t r = 0; r < this->features; ++r) {
        const double factor = factors[r];
        double s = state[r];
        if (!this->backwards) s *= factor;
        const double before = s;
        s += this->columns.x_at(batch, n, head, r) * y;
        if (this->out != nullptr)
          sum += this->rows.x_at(batch, n, head, r) * (this->strict ? before : s);
        if (this->backwards) s *= factor;
        state[r] = s;
      }
      if (this->out != nullptr) {
        T* const to = this->out + token * width + c;
        *to = static_cast<T>(this->adds ? static_cast<double>(*to) + sum : sum);
      }
    }
    for (std::int64_t r = 0; r < this->features; ++r) this->keep_total(unit, r, c, state[r]);
  }
};

// out[n, r] = sum_c Y_row[n, c] S[r, c], a thread for each sequence, head and feature.
//
// The gradient of the steps takes two of them, of rows that read what moves forwards and of those
// tokens that read what moves backwards. With x_n = X_row (out without the row's own token) and
// `ends` the states at the ends of chunks of what moves forwards,
//   dg_t = sum_(n = t .. chunk's end) (x_n of the first - x_n of the second) + ends times the state
//          that moves backwards.
template <class Storage>
struct FeaturesRecurrence : Recurrence<Storage> {
  using T = core::accumulate_t<Storage>;
  double* products = nullptr;        // [B, L, H, R], x_n: written moving forwards, then read
  double* ends = nullptr;            // [slot, H, C, R], the same
  double* step_gradients = nullptr;  // [B, L, H, R], written moving backwards, or null
  bool adds_step_gradients = false;  // to what is there

  TORCH_SPE_DEVICE double* end_of(std::int64_t sequence, std::int64_t head,
                                  std::int64_t chunk) const {
    const std::int64_t slot = this->chunks.first_slot(sequence) + chunk;
    return ends + (slot * this->heads + head) * this->width() * this->features;
  }

  TORCH_SPE_DEVICE void operator()(std::int64_t i) const {
    const std::int64_t width = this->width(), features = this->features;
    const std::int64_t r = i % features, unit = i / features;
    const std::int64_t head = unit % this->heads, sequence = unit / this->heads;
    const std::int64_t batch = this->chunks.bounds == nullptr ? sequence : 0;
    const std::int64_t begin = this->chunks.begin(sequence);
    const std::int64_t length = this->chunks.length_of(sequence);
    double* const state = this->state + unit * width * features + r;
    for (std::int64_t c = 0; c < width; ++c) state[c * features] = this->initial(unit, r, c);
    double step_gradient = 0;
    for (std::int64_t j = 0; j < length; ++j) {
      const std::int64_t position = this->backwards ? length - 1 - j : j, n = begin + position;
      const bool ends_chunk = position + 1 == length || (position + 1) % kAnchor == 0;
      double* const end =
          ends == nullptr ? nullptr : end_of(sequence, head, position / kAnchor) + r;
      if (step_gradients != nullptr && ends_chunk) {
        step_gradient = 0;
        TORCH_SPE_KEEP_LOOP
        for (std::int64_t c = 0; c < width; ++c)
          step_gradient += end[c * features] * state[c * features];
      }
      const std::int64_t token = this->columns.index(batch, n, head) * features + r;
      const double factor = this->factors[token], x = this->columns.x_at(batch, n, head, r);
      double sum = 0, own = 0;  // of what was there, and of the row's own token
      TORCH_SPE_KEEP_LOOP
      for (std::int64_t c = 0; c < width; ++c) {
        const double y_row = this->value(this->rows, batch, n, head, c);
        const double y = this->value(this->columns, batch, n, head, c);
        double s = state[c * features];
        if (!this->backwards) s *= factor;
        sum += y_row * s;
        own += y_row * y;
        s += x * y;
        if (this->backwards) s *= factor;
        state[c * features] = s;
        if (!this->backwards && ends != nullptr && ends_chunk) end[c * features] = s;
      }
      if (products != nullptr) {
        const double product = this->rows.x_at(batch, n, head, r) * sum;
        if (!this->backwards) {
          products[token] = product;
        } else {
          step_gradient += products[token] - product;
          double* const to = step_gradients + token;
          *to = adds_step_gradients ? *to + step_gradient : step_gradient;
        }
      }
      if (this->out != nullptr) {
        T* const to = this->out + token;
        if (!this->strict) sum += x * own;
        *to = static_cast<T>(this->adds ? static_cast<double>(*to) + sum : sum);
      }
    }
    for (std::int64_t c = 0; c < width; ++c) this->keep_total(unit, r, c, state[c * features]);
  }
};

// exp of all steps; also the zero that stands for queries where there are none.
struct StepFactors {
  DecaySteps steps;
  std::int64_t length, heads, features;
  std::uint64_t* zero;
  double* factors;  // [B, L, H, R]

  TORCH_SPE_DEVICE void operator()(std::int64_t i) const {
    if (i == 0) *zero = 0;
    const std::int64_t r = i % features, head = i / features % heads;
    const std::int64_t n = i / features / heads % length, batch = i / features / heads / length;
    factors[i] = core::exp_nonpositive(steps.at(batch, n, head, r));
  }
};

// What rows are divided by.
template <class T>
struct Divisors {
  const T* sums;          // [row, C], outputs before division
  const T* denominators;  // every `stride` elements, null for a norm
  std::int64_t width, stride, values;
  T eps;
  T* divisors;  // [row]

  TORCH_SPE_DEVICE void operator()(std::int64_t row) const {
    if (denominators != nullptr) {
      divisors[row] = denominators[row * stride] + eps;
      return;
    }
    T sum = 0;
    for (std::int64_t e = 0; e < values; ++e) sum += sums[row * width + e] * sums[row * width + e];
    divisors[row] = square_root(sum / static_cast<T>(values) + eps);
  }
};

// Rows in the type of the tensors, divided if there are divisors.
template <class Storage>
struct DividedRows {
  using T = core::accumulate_t<Storage>;
  const T* sums;      // [row, C]
  const T* divisors;  // [row], or null
  std::int64_t width, values;
  Storage* out;  // [row, E]

  TORCH_SPE_DEVICE void operator()(std::int64_t i) const {
    const std::int64_t row = i / values;
    T value = sums[row * width + i % values];
    if (divisors != nullptr) {
      const Quotient<T> quotient(divisors[row]);
      value = value * quotient.scale * quotient.inverse;
    }
    write(value, out + i);
  }
};

// Gradients of q or k from those of their features.
template <class Storage>
struct InputGradients {
  using T = core::accumulate_t<Storage>;
  Tokens<Storage> rows;
  std::int64_t features;
  const T* sums;  // [B, L, H, R]
  Storage* grad;  // [B, L, H, R]

  TORCH_SPE_DEVICE void operator()(std::int64_t i) const {
    const std::int64_t r = i % features, head = i / features % rows.heads;
    const std::int64_t token = i / features / rows.heads;
    const std::int64_t n = token % rows.length, batch = token / rows.length;
    // Padding, whatever it holds, has the gradient 0.
    const T scale = rows.is_padding(batch, n) ? T(0) : rows.scale_of(batch, n, head);
    const Storage* const x = rows.x + batch * rows.x_strides[0] + n * rows.x_strides[1] +
                             head * rows.x_strides[2] + r * rows.x_strides[3];
    write(scale == T(0) ? T(0) : gradient_of_input_at(rows.map, sums[i], x) * scale, grad + i);
  }
};

}  // namespace torch_spe::cuda::attention
