#include "encode/sine_products.h"
#include "encode/sine_tiles.h"
#include "sine_filter.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {
namespace {

// basis[d, j, t] *= x[t, d]: what the weights of one batch row multiply.
template <class T>
void scale_basis(const T* x, std::int64_t size, std::int64_t count, std::int64_t rows, T* basis) {
  T column[kSineTile];
  for (std::int64_t d = 0; d < count; ++d) {
    for (std::int64_t t = 0; t < size; ++t) column[t] = x[t * count + d];
    for (std::int64_t j = 0; j < rows; ++j, basis += kSineTile) {
      for (std::int64_t t = 0; t < kSineTile; ++t) basis[t] *= column[t];
    }
  }
}

// Gradients for one head and a group of features, over all positions. Features share nothing but
// grad_positions, for which every task has a part of its own, so nothing is added up between
// threads and no result depends on their order.
//
// With one batch row, U = W g^T gives dx_d = sum_j basis_dj U_dj and the gradient of the basis, x_d
// U_dj. With more, the gradient of the code, sum_b x[b] g[b], is made once for the batch and goes
// through basis and W.
template <class Storage>
class SineFilterGradient {
  using T = core::accumulate_t<Storage>;

 public:
  SineFilterGradient(const SineFilterBackwardParams& p, std::int64_t group)
      : p_(p),
        rows_(num_basis_rows(p)),
        width_(round_up(p.num_realizations, kLanes<T>)),
        basis_of_(p),
        weights_(group * rows_ * width_),
        grad_weights_(group * rows_ * width_),
        basis_(group * rows_ * kSineTile),
        grad_basis_(group * rows_ * kSineTile),
        x_(kSineTile * p.batch * group),
        grad_x_(kSineTile * p.batch * group),
        g_(kSineTile * p.batch * width_),
        columns_(width_ * kSineTile),
        code_(p.batch == 1 ? 0 : kSineTile * code_stride<T>(group, width_)),
        positions_(p.ndim * kSineTile) {}

  void run(std::int64_t head, std::int64_t d0, std::int64_t count, double* grad_positions) {
    head_ = head;
    d0_ = d0;
    count_ = count;
    grad_positions_ = grad_positions;
    load_weights(p_, head, d0, count, width_, weights_.get());
    const std::int64_t size = count * rows_ * width_;
    for (std::int64_t i = 0; i < size; ++i) grad_weights_[i] = 0;
    for (n0_ = 0; n0_ < p_.length; n0_ += kSineTile) {
      size_ = min_of(kSineTile, p_.length - n0_);
      basis_of_.fill(head_, n0_, size_, d0_, count_, basis_);
      load_x<Storage>(p_, head_, n0_, size_, d0_, count_, x_.get());
      load_g();
      if (p_.batch == 1) {
        tile_of_one_row();
      } else {
        tile_of_many_rows();
      }
      if (p_.grad_x != nullptr) store_grad_x();
    }
    store_grad_weights();
  }

 private:
  bool wants_phases() const { return p_.grad_freqs != nullptr || grad_positions_ != nullptr; }

  // The gradient of the output as [t, b, r], zero beyond R.
  void load_g() {
    const auto& strides = p_.grad_out_strides;
    const Storage* g =
        static_cast<const Storage*>(p_.grad_out) + n0_ * strides[1] + head_ * strides[2];
    T* row = g_;
    for (std::int64_t t = 0; t < size_; ++t) {
      for (std::int64_t b = 0; b < p_.batch; ++b, row += width_) {
        prefetch_later_row(p_, g, strides, size_, b, t, p_.num_realizations);
        load_row(g + b * strides[0] + t * strides[1], strides[3], p_.num_realizations, row);
        for (std::int64_t r = p_.num_realizations; r < width_; ++r) row[r] = 0;
      }
    }
  }

  bool wants_weights() const { return p_.grad_weight != nullptr || p_.grad_constant != nullptr; }

  void store_grad_weights() {
    const std::int64_t realizations = p_.num_realizations, sine_rows = 2 * p_.num_sines;
    const std::int64_t first = head_ * p_.in_features + d0_;
    T* grad_weight = static_cast<T*>(p_.grad_weight);
    T* grad_constant = static_cast<T*>(p_.grad_constant);
    if (grad_weight != nullptr) grad_weight += first * sine_rows * realizations;
    if (grad_constant != nullptr) grad_constant += first * realizations;
    const T* grad = grad_weights_;
    for (std::int64_t d = 0; d < count_; ++d) {
      for (std::int64_t j = 0; j < rows_; ++j, grad += width_) {
        T*& to = j < sine_rows ? grad_weight : grad_constant;
        if (to == nullptr) continue;
        store_row(grad, 1, realizations, to);
        to += realizations;
      }
    }
  }

  void store_grad_x() {
    Storage* grad_x = static_cast<Storage*>(p_.grad_x);
    with_feature_map(p_.feature_map, [&](auto map) {
      scale_by_derivative<map.value>(x_.get(), size_ * p_.batch * count_, grad_x_.get());
    });
    for (std::int64_t t = 0; t < size_; ++t) {
      for (std::int64_t b = 0; b < p_.batch; ++b) {
        store_row(
            grad_x_ + (t * p_.batch + b) * count_, 1, count_,
            grad_x + ((b * p_.length + n0_ + t) * p_.num_heads + head_) * p_.in_features + d0_);
      }
    }
  }

  void tile_of_one_row() {
    if (p_.grad_x == nullptr && !wants_phases()) {
      scale_basis(x_.get(), size_, count_, rows_, basis_.get());
    } else {
      multiply_by_columns(count_ * rows_, weights_, g_, width_, grad_basis_);
      load_positions();
      for (std::int64_t d = 0; d < count_; ++d) {
        T column[kSineTile], sum[kSineTile];
        for (std::int64_t t = 0; t < size_; ++t) {
          column[t] = x_[t * count_ + d];
          sum[t] = 0;
        }
        for (std::int64_t j = d * rows_; j < (d + 1) * rows_; ++j) {
          T* basis = basis_ + j * kSineTile;
          const T* u = grad_basis_ + j * kSineTile;
          for (std::int64_t t = 0; t < size_; ++t) {
            sum[t] += basis[t] * u[t];
            basis[t] *= column[t];
          }
        }
        for (std::int64_t t = 0; t < size_; ++t) grad_x_[t * count_ + d] = sum[t];
        if (wants_phases()) add_phase_gradients(d);
      }
    }
    if (!wants_weights()) return;
    multiply(count_ * rows_, width_, size_, plain<T>(basis_, kSineTile), g_.get(), width_, T(1),
             grad_weights_.get(), width_);
  }

  // out[j, t] = sum_r weights[j, r] rows[t, r], for `count` rows j. What `rows` has beyond the
  // tile's size goes into columns that nobody reads.
  void multiply_by_columns(std::int64_t count, const T* weights, const T* rows, std::int64_t ld,
                           T* out) const {
    transpose(size_, width_, rows, ld, columns_.get(), kSineTile);
    multiply(count, size_, p_.num_realizations, plain(weights, width_), columns_.get(), kSineTile,
             T(0), out, kSineTile);
  }

  void tile_of_many_rows() {
    const std::int64_t batch = p_.batch;
    const std::int64_t stride = code_stride<T>(count_, width_);
    if (p_.grad_x != nullptr) {
      for (std::int64_t d = 0; d < count_; ++d) {
        code_tile(size_, width_, rows_, basis_ + d * rows_ * kSineTile,
                  weights_ + d * rows_ * width_, code_ + d * width_, stride);
      }
      for (std::int64_t t = 0; t < size_; ++t) {
        dot<T>(batch, count_, width_, g_ + t * batch * width_, code_ + t * stride,
               grad_x_ + t * batch * count_);
      }
    }
    if (!wants_weights() && !wants_phases()) return;
    // The codes have been used: their tile now takes their gradient.
    for (std::int64_t t = 0; t < size_; ++t) {
      outer(batch, count_, width_, x_ + t * batch * count_, g_ + t * batch * width_,
            code_ + t * stride);
    }
    for (std::int64_t d = 0; d < count_; ++d) {
      const T* grad_code = code_ + d * width_;
      if (wants_weights()) {
        multiply(rows_, width_, size_, plain(basis_ + d * rows_ * kSineTile, kSineTile), grad_code,
                 stride, T(1), grad_weights_ + d * rows_ * width_, width_);
      }
      if (wants_phases()) {
        multiply_by_columns(rows_, weights_ + d * rows_ * width_, grad_code, stride,
                            grad_basis_ + d * rows_ * kSineTile);
      }
    }
    if (!wants_phases()) return;
    load_positions();
    for (std::int64_t d = 0; d < count_; ++d) add_phase_gradients(d);
  }

  // For the sines of a feature. The phase of sine k, in cycles, is freq . position: its derivative
  // is 2 pi (cos . dB_sin - sin . dB_cos). Either the basis or its gradient is scaled by x. Sums
  // over positions are kept in double: the terms grow with the position.
  void add_phase_gradients(std::int64_t d) {
    for (std::int64_t k = 0; k < p_.num_sines; ++k) {
      const T* cos_row = basis_ + (d * rows_ + 2 * k) * kSineTile;
      const T* sin_row = cos_row + kSineTile;
      const T* grad_cos = grad_basis_ + (d * rows_ + 2 * k) * kSineTile;
      const T* grad_sin = grad_cos + kSineTile;
      T grad_phase[kSineTile];
      for (std::int64_t t = 0; t < size_; ++t) {
        grad_phase[t] = cos_row[t] * grad_sin[t] - sin_row[t] * grad_cos[t];
      }
      for (std::int64_t t = size_; t < kSineTile; ++t) grad_phase[t] = 0;
      const std::int64_t dk = ((head_ * p_.in_features + d0_ + d) * p_.num_sines + k) * p_.ndim;
      for (std::int64_t i = 0; i < p_.ndim; ++i) {
        if (p_.grad_freqs != nullptr) {
          double sums[kLanes<double>] = {};
          for (std::int64_t t = 0; t < kSineTile; t += kLanes<double>) {
            for (std::int64_t l = 0; l < kLanes<double>; ++l) {
              sums[l] += static_cast<double>(grad_phase[t + l]) * positions_[i * kSineTile + t + l];
            }
          }
          p_.grad_freqs[dk + i] += core::kTwoPi * sum_lanes<double>(load_vec(sums));
        }
        if (grad_positions_ != nullptr) {
          for (std::int64_t t = 0; t < size_; ++t) {
            grad_positions_[(n0_ + t) * p_.ndim + i] +=
                core::kTwoPi * grad_phase[t] * p_.freqs[dk + i];
          }
        }
      }
    }
  }

  // Positions of the tile as [ndim, t], zero beyond its size.
  void load_positions() {
    for (std::int64_t i = 0; i < p_.ndim; ++i) {
      double* row = positions_ + i * kSineTile;
      for (std::int64_t t = 0; t < kSineTile; ++t) {
        if (t >= size_) {
          row[t] = 0;
        } else if (p_.positions == nullptr) {
          row[t] = p_.start + static_cast<double>(n0_ + t);
        } else {
          row[t] = p_.positions[(n0_ + t) * p_.ndim + i];
        }
      }
    }
  }

  const SineFilterBackwardParams& p_;
  const std::int64_t rows_, width_;
  SineBasis<T> basis_of_;
  Workspace<T> weights_, grad_weights_;  // [d, j, r]
  Workspace<T> basis_, grad_basis_;      // [d, j, t]
  Workspace<T> x_, grad_x_;              // [t, b, d]
  Workspace<T> g_;                       // [t, b, r]
  Workspace<T> columns_;                 // [r, t]
  Workspace<T> code_;                    // [t, d, r]
  Workspace<double> positions_;          // [ndim, t]
  // The task and the tile at hand.
  std::int64_t head_, d0_, count_, n0_, size_;
  double* grad_positions_;
};

template <class Storage>
void sine_filter_backward_of(const SineFilterBackwardParams& p) {
  // Small enough groups that a single head keeps several threads busy, of one size: a last one of a
  // single feature would read the whole gradient of the output for it.
  using T = core::accumulate_t<Storage>;
  const std::int64_t fitting =
      p.batch == 1 ? one_row_group_size<T>(p) : group_size<T>(p, kSineTile, grad_code_tile_bytes());
  const std::int64_t most = max_of(1, min_of(fitting, p.num_heads * p.in_features / 16));
  const std::int64_t groups = (p.in_features + most - 1) / most;
  const std::int64_t group = (p.in_features + groups - 1) / groups;
  const std::int64_t tasks = p.num_heads * groups;
  const std::int64_t positions = p.grad_positions == nullptr ? 0 : p.length * p.ndim;
  Workspace<double> partial(tasks * positions);
  for (std::int64_t i = 0; i < tasks * positions; ++i) partial[i] = 0;

#pragma omp parallel num_threads(p.num_threads)
  {
    SineFilterGradient<Storage> gradient(p, group);
#pragma omp for schedule(static)
    for (std::int64_t task = 0; task < tasks; ++task) {
      const std::int64_t d0 = task % groups * group;
      gradient.run(task / groups, d0, min_of(group, p.in_features - d0),
                   positions > 0 ? partial + task * positions : nullptr);
    }
  }
  for (std::int64_t task = 0; task < tasks; ++task) {
    for (std::int64_t i = 0; i < positions; ++i)
      p.grad_positions[i] += partial[task * positions + i];
  }
}

}  // namespace

void sine_filter_backward(const SineFilterBackwardParams& p) {
  visit_storage(p.dtype, [&](auto storage) { sine_filter_backward_of<decltype(storage)>(p); });
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
