#include "sine_filter.h"

#include "blas.h"
#include "core/phase.h"
#include "simd.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {
namespace {

constexpr std::int64_t kTile = 64;                   // positions
constexpr std::int64_t kCodeTileBytes = 256 * 1024;  // a tile of codes stays in the level 2 cache
constexpr std::int64_t kOneRowBytes = 512 * 1024;    // see one_row_group_size
constexpr std::int64_t kProductRows = 42;            // of the basis, see gemm_in_pieces

// Rows J of the basis of a feature: cos and sin of each sine, then 1 if there is a constant.
std::int64_t num_rows(const SineFilterParams& p) {
  return 2 * p.num_sines + (p.constant != nullptr ? 1 : 0);
}

// The basis of the features [d0, d0 + count) at the positions [n0, n0 + size): basis[d][j][t], rows
// of kTile; the rows of a feature may be scaled by a column of x.
//
// At consecutive positions the phase of a tile is the exact phase of its first position turned by t
// steps; the turns of 0 .. kTile - 1 steps are computed once for a head, exactly too, so that every
// value is one complex product away from exact phases, wherever the tile lies.
template <class T>
class Basis {
 public:
  explicit Basis(const SineFilterParams& p)
      : p_(p),
        steps_(p.positions == nullptr ? p.in_features * p.num_sines * 2 * kTile : 0),
        cos_first_(p.in_features * p.num_sines),
        sin_first_(p.in_features * p.num_sines) {
    for (T& one : ones_) one = 1;
  }

  void set_head(std::int64_t head) {
    if (head == head_) return;
    head_ = head;
    if (p_.positions != nullptr) return;
    for (std::int64_t dk = 0; dk < p_.in_features * p_.num_sines; ++dk) {
      const double freq = freqs()[dk];
      T* cos_row = steps_ + dk * 2 * kTile;
      T* sin_row = cos_row + kTile;
      for (std::int64_t t = 0; t < kTile; ++t) {
        core::cos_sin_cycles(core::reduce_cycles(freq, static_cast<double>(t)), cos_row + t,
                             sin_row + t);
      }
    }
  }

  // `columns`, if given, is [d][t].
  void fill(std::int64_t n0, std::int64_t size, std::int64_t d0, std::int64_t count, T* basis,
            const T* columns = nullptr) {
    const std::int64_t rows = num_rows(p_);
    if (p_.positions == nullptr) {
      first_phases(p_.start + static_cast<double>(n0), count * p_.num_sines,
                   freqs() + d0 * p_.num_sines, cos_first_.get(), sin_first_.get());
    }
    for (std::int64_t d = 0; d < count; ++d) {
      const T* scale = columns == nullptr ? ones_ : columns + d * kTile;
      for (std::int64_t k = 0; k < p_.num_sines; ++k) {
        T* cos_row = basis + (d * rows + 2 * k) * kTile;
        if (p_.positions == nullptr) {
          turn(d * p_.num_sines + k, (d0 + d) * p_.num_sines + k, scale, cos_row, cos_row + kTile);
        } else {
          at_positions(n0, size, (d0 + d) * p_.num_sines + k, scale, cos_row, cos_row + kTile);
        }
      }
      if (p_.constant != nullptr) {
        T* row = basis + (d * rows + rows - 1) * kTile;
        for (std::int64_t t = 0; t < kTile; ++t) row[t] = scale[t];
      }
    }
  }

 private:
  const double* freqs() const { return p_.freqs + head_ * p_.in_features * p_.num_sines * p_.ndim; }

  // Exact phases of `count` sines at one position.
  static void first_phases(double position, std::int64_t count, const double* __restrict freq,
                           T* __restrict cos_first, T* __restrict sin_first) {
    for (std::int64_t i = 0; i < count; ++i) {
      core::cos_sin_cycles(core::reduce_cycles(freq[i], position), cos_first + i, sin_first + i);
    }
  }

  // The first phase of the tile, turned by 0 .. kTile - 1 steps.
  void turn(std::int64_t i, std::int64_t dk, const T* __restrict scale, T* __restrict cos_row,
            T* __restrict sin_row) const {
    const T c = cos_first_[i], s = sin_first_[i];
    const T* __restrict cos_step = steps_ + dk * 2 * kTile;
    const T* __restrict sin_step = cos_step + kTile;
    for (std::int64_t t = 0; t < kTile; ++t) {
      cos_row[t] = (c * cos_step[t] - s * sin_step[t]) * scale[t];
      sin_row[t] = (s * cos_step[t] + c * sin_step[t]) * scale[t];
    }
  }

  void at_positions(std::int64_t n0, std::int64_t size, std::int64_t dk, const T* scale, T* cos_row,
                    T* sin_row) const {
    const double* freq = freqs() + dk * p_.ndim;
    const double* position = p_.positions + n0 * p_.ndim;
    double cycles[kTile];
    for (std::int64_t t = 0; t < size; ++t)
      cycles[t] = core::reduce_cycles(freq[0], position[t * p_.ndim]);
    for (std::int64_t i = 1; i < p_.ndim; ++i) {
      for (std::int64_t t = 0; t < size; ++t) {
        cycles[t] =
            core::wrap_cycles(cycles[t] + core::reduce_cycles(freq[i], position[t * p_.ndim + i]));
      }
    }
    for (std::int64_t t = 0; t < size; ++t)
      core::cos_sin_cycles(cycles[t], cos_row + t, sin_row + t);
    for (std::int64_t t = 0; t < size; ++t) {
      cos_row[t] *= scale[t];
      sin_row[t] *= scale[t];
    }
  }

  const SineFilterParams& p_;
  Workspace<T> steps_;                  // [D, K, 2, kTile]
  Workspace<T> cos_first_, sin_first_;  // [D, K], at the first position of the tile
  T ones_[kTile];
  std::int64_t head_ = -1;
};

// Numbers from one position to the next in a tile of codes: a cache line more than the codes of its
// features, since rows a power of two apart would share a few cache sets.
template <class T>
std::int64_t code_stride(std::int64_t count, std::int64_t width) {
  return count * width + 64 / static_cast<std::int64_t>(sizeof(T));
}

// Features whose codes at kTile positions fit the cache.
template <class T>
std::int64_t group_size(const SineFilterParams& p) {
  const std::int64_t width = round_up(p.num_realizations, kLanes<T>);
  const std::int64_t bytes = kTile * width * static_cast<std::int64_t>(sizeof(T));
  return max_of(1, min_of(p.in_features, kCodeTileBytes / bytes));
}

// Features whose weights, their gradients, basis and its gradient fit the cache in the backward
// pass of a single row.
template <class T>
std::int64_t one_row_group_size(const SineFilterParams& p) {
  const std::int64_t numbers = 2 * num_rows(p) * (p.num_realizations + kTile);
  const std::int64_t bytes = numbers * static_cast<std::int64_t>(sizeof(T));
  return max_of(1, min_of(p.in_features, kOneRowBytes / bytes));
}

// The weights of the features [d0, d0 + count) of a head as [d, j, r], the constant as their last
// row.
template <class T>
void load_weights(const SineFilterParams& p, std::int64_t head, std::int64_t d0, std::int64_t count,
                  T* weights) {
  const std::int64_t real = p.num_realizations, sine_rows = 2 * p.num_sines * real;
  const std::int64_t first = head * p.in_features + d0;
  const T* weight = static_cast<const T*>(p.weight) + first * sine_rows;
  const T* constant = static_cast<const T*>(p.constant);
  for (std::int64_t d = 0; d < count; ++d) {
    std::memcpy(weights, weight + d * sine_rows, sine_rows * sizeof(T));
    weights += sine_rows;
    if (constant == nullptr) continue;
    std::memcpy(weights, constant + (first + d) * real, real * sizeof(T));
    weights += real;
  }
}

struct Sizes {
  std::int64_t m, n, k;
};

// C = op(A) B + beta C, as `gemm`, in pieces of some size. Of larger factors MKL makes copies
// first, even within one thread: with 64 x 64 x 63 numbers, where 64 x 64 x 42 took two thirds of
// the time.
template <class T>
void gemm_in_pieces(Op op_a, const Sizes& size, const Sizes& piece, const T* a, std::int64_t lda,
                    const T* b, std::int64_t ldb, T beta, T* c, std::int64_t ldc) {
  for (std::int64_t i = 0; i < size.m; i += piece.m) {
    for (std::int64_t j = 0; j < size.n; j += piece.n) {
      for (std::int64_t l = 0; l < size.k; l += piece.k) {
        gemm(op_a, Op::kPlain, min_of(piece.m, size.m - i), min_of(piece.n, size.n - j),
             min_of(piece.k, size.k - l), a + (op_a == Op::kPlain ? i * lda + l : l * lda + i), lda,
             b + l * ldb + j, ldb, l == 0 ? beta : T(1), c + i * ldc + j, ldc);
      }
    }
  }
}

// The codes of one feature, code[t, r] = sum_j basis[j, t] weight[j, r], and zero for r in [R,
// width).
template <class T>
void code_tile(std::int64_t size, std::int64_t real, std::int64_t width, std::int64_t rows,
               const T* basis, const T* weight, T* code, std::int64_t ldc) {
  gemm(Op::kTransposed, Op::kPlain, size, real, rows, basis, kTile, weight, real, T(0), code, ldc);
  if (real == width) return;
  for (std::int64_t t = 0; t < size; ++t) {
    for (std::int64_t r = real; r < width; ++r) code[t * ldc + r] = 0;
  }
}

// y[b, r] += sum_d x[b, d] code[d, r] for kRows rows b and kVecs vectors of r.
template <int kRows, int kVecs, class T>
TORCH_SPE_INLINE void contract_block(std::int64_t count, const T* x, std::int64_t ldx,
                                     const T* code, std::int64_t ldc, T* y, std::int64_t ldy) {
  Vec<T> acc[kRows][kVecs];
  for (int b = 0; b < kRows; ++b) {
    for (int v = 0; v < kVecs; ++v) acc[b][v] = load_vec(y + b * ldy + v * kLanes<T>);
  }
  for (std::int64_t d = 0; d < count; ++d) {
    Vec<T> c[kVecs];
    for (int v = 0; v < kVecs; ++v) c[v] = load_vec(code + d * ldc + v * kLanes<T>);
    for (int b = 0; b < kRows; ++b) {
      const T scale = x[b * ldx + d];
      for (int v = 0; v < kVecs; ++v) acc[b][v] += scale * c[v];
    }
  }
  for (int b = 0; b < kRows; ++b) {
    for (int v = 0; v < kVecs; ++v) store_vec(y + b * ldy + v * kLanes<T>, acc[b][v]);
  }
}

template <int kRows, class T>
TORCH_SPE_INLINE void contract_rows(std::int64_t count, std::int64_t width, const T* x,
                                    std::int64_t ldx, const T* code, std::int64_t ldc, T* y,
                                    std::int64_t ldy) {
  std::int64_t r = 0;
  for (; r + 4 * kLanes<T> <= width; r += 4 * kLanes<T>)
    contract_block<kRows, 4>(count, x, ldx, code + r, ldc, y + r, ldy);
  for (; r < width; r += kLanes<T>)
    contract_block<kRows, 1>(count, x, ldx, code + r, ldc, y + r, ldy);
}

// y[b, r] += sum_d x[b, d] code[d, r]; width is a multiple of the lanes.
template <class T>
void contract(std::int64_t batch, std::int64_t count, std::int64_t width, const T* x,
              std::int64_t ldx, const T* code, T* y) {
  std::int64_t b = 0;
  for (; b + 4 <= batch; b += 4)
    contract_rows<4>(count, width, x + b * ldx, ldx, code, width, y + b * width, width);
  for (; b < batch; ++b)
    contract_rows<1>(count, width, x + b * ldx, ldx, code, width, y + b * width, width);
}

// x at a tile of positions, for one head and a group of features, as [t, b, d].
template <class Storage, class T>
void load_x(const SineFilterParams& p, std::int64_t head, std::int64_t n0, std::int64_t size,
            std::int64_t d0, std::int64_t count, T* tile) {
  const auto& strides = p.x_strides;
  const Storage* x =
      static_cast<const Storage*>(p.x) + n0 * strides[1] + head * strides[2] + d0 * strides[3];
  for (std::int64_t t = 0; t < size; ++t) {
    for (std::int64_t b = 0; b < p.batch; ++b, tile += count) {
      load_row(x + b * strides[0] + t * strides[1], strides[3], count, tile);
    }
  }
}

// basis[d, j, t] *= x[t, d]: what the weights of one batch row multiply.
template <class T>
void scale_basis(const T* x, std::int64_t size, std::int64_t count, std::int64_t rows, T* basis) {
  T column[kTile];
  for (std::int64_t d = 0; d < count; ++d) {
    for (std::int64_t t = 0; t < size; ++t) column[t] = x[t * count + d];
    for (std::int64_t j = 0; j < rows; ++j, basis += kTile) {
      for (std::int64_t t = 0; t < kTile; ++t) basis[t] *= column[t];
    }
  }
}

// The output of one head at the positions of a tile.
//
// With one batch row it is a matrix product, (x (.) basis) W, over all features and rows of the
// basis. With more, the codes basis W are made once for the batch and multiplied with every x.
template <class Storage>
class Forward {
  using T = core::accumulate_t<Storage>;

 public:
  explicit Forward(const SineFilterParams& p)
      : p_(p),
        rows_(num_rows(p)),
        width_(round_up(p.num_realizations, kLanes<T>)),
        group_(group_size<T>(p)),
        basis_of_(p),
        weights_(p.in_features * rows_ * p.num_realizations),
        basis_(group_ * rows_ * kTile),
        code_(p.batch == 1 ? 0 : kTile * code_stride<T>(group_, width_)),
        x_(kTile * p.batch * p.in_features),
        columns_(p.batch == 1 ? kTile * p.in_features : 0),
        y_(kTile * p.batch * width_) {}

  void run(std::int64_t head, std::int64_t n0) {
    const std::int64_t size = min_of(kTile, p_.length - n0);
    basis_of_.set_head(head);
    if (head != head_) load_weights(p_, head, 0, p_.in_features, weights_.get());
    head_ = head;
    load_x<Storage>(p_, head, n0, size, 0, p_.in_features, x_.get());
    if (p_.batch == 1) {
      one_row(n0, size);
    } else {
      many_rows(n0, size);
    }
    Storage* out = static_cast<Storage*>(p_.out);
    for (std::int64_t b = 0; b < p_.batch; ++b) {
      for (std::int64_t t = 0; t < size; ++t) {
        store_row(y_ + (t * p_.batch + b) * width_, 1, p_.num_realizations,
                  out + ((b * p_.length + n0 + t) * p_.num_heads + head) * p_.num_realizations);
      }
    }
  }

 private:
  void one_row(std::int64_t n0, std::int64_t size) {
    const std::int64_t real = p_.num_realizations;
    for (std::int64_t d = 0; d < p_.in_features; ++d) {
      for (std::int64_t t = 0; t < size; ++t) columns_[d * kTile + t] = x_[t * p_.in_features + d];
    }
    for (std::int64_t d0 = 0; d0 < p_.in_features; d0 += group_) {
      const std::int64_t count = min_of(group_, p_.in_features - d0);
      basis_of_.fill(n0, size, d0, count, basis_, columns_ + d0 * kTile);
      gemm_in_pieces(Op::kTransposed, {size, real, count * rows_}, {kTile, kTile, kProductRows},
                     basis_.get(), kTile, weights_ + d0 * rows_ * real, real, d0 == 0 ? T(0) : T(1),
                     y_.get(), width_);
    }
  }

  void many_rows(std::int64_t n0, std::int64_t size) {
    for (std::int64_t i = 0; i < size * p_.batch * width_; ++i) y_[i] = 0;
    for (std::int64_t d0 = 0; d0 < p_.in_features; d0 += group_) {
      const std::int64_t count = min_of(group_, p_.in_features - d0);
      const std::int64_t stride = code_stride<T>(count, width_);
      basis_of_.fill(n0, size, d0, count, basis_);
      for (std::int64_t d = 0; d < count; ++d) {
        code_tile(size, p_.num_realizations, width_, rows_, basis_ + d * rows_ * kTile,
                  weights_ + (d0 + d) * rows_ * p_.num_realizations, code_ + d * width_, stride);
      }
      for (std::int64_t t = 0; t < size; ++t) {
        contract(p_.batch, count, width_, x_ + t * p_.batch * p_.in_features + d0, p_.in_features,
                 code_ + t * stride, y_ + t * p_.batch * width_);
      }
    }
  }

  const SineFilterParams& p_;
  const std::int64_t rows_, width_, group_;
  Basis<T> basis_of_;
  Workspace<T> weights_;  // [d, j, r], of a head
  Workspace<T> basis_;    // [d, j, t], of a group of features
  Workspace<T> code_;     // [t, d, r]
  Workspace<T> x_;        // [t, b, d]
  Workspace<T> columns_;  // [d, t]
  Workspace<T> y_;        // [t, b, r]
  std::int64_t head_ = -1;
};

template <class Storage>
void forward(const SineFilterParams& p) {
  const std::int64_t tiles = (p.length + kTile - 1) / kTile;
#pragma omp parallel num_threads(p.num_threads)
  {
    Forward<Storage> worker(p);
#pragma omp for schedule(static)
    for (std::int64_t task = 0; task < p.num_heads * tiles; ++task) {
      worker.run(task / tiles, task % tiles * kTile);
    }
  }
}

// out[b, d] = sum_r g[b, r] code[d, r] for kRows rows b and kCols features d, at most 16 in all;
// width is a multiple of the lanes.
template <int kRows, int kCols, class T>
TORCH_SPE_INLINE void dot_block(std::int64_t width, const T* g, const T* code, T* out,
                                std::int64_t ldo) {
  Vec<T> acc[16] = {};
  for (std::int64_t r = 0; r < width; r += kLanes<T>) {
    Vec<T> c[kCols];
    for (int d = 0; d < kCols; ++d) c[d] = load_vec(code + d * width + r);
    for (int b = 0; b < kRows; ++b) {
      const Vec<T> row = load_vec(g + b * width + r);
      for (int d = 0; d < kCols; ++d) acc[b * kCols + d] += row * c[d];
    }
  }
  T sums[16];
  for (int i = 0; i < kRows * kCols; i += static_cast<int>(kLanes<T>)) {
    store_vec(sums + i, sum_rows<T>(acc + i));
  }
  for (int b = 0; b < kRows; ++b) {
    for (int d = 0; d < kCols; ++d) out[b * ldo + d] = sums[b * kCols + d];
  }
}

template <int kRows, class T>
TORCH_SPE_INLINE void dot_rows(std::int64_t count, std::int64_t width, const T* g, const T* code,
                               T* out) {
  constexpr int kCols = 16 / kRows < 8 ? 16 / kRows : 8;
  std::int64_t d = 0;
  for (; d + kCols <= count; d += kCols) {
    dot_block<kRows, kCols>(width, g, code + d * width, out + d, count);
  }
  for (; d < count; ++d) dot_block<kRows, 1>(width, g, code + d * width, out + d, count);
}

// out[b, d] = sum_r g[b, r] code[d, r]; what lies beyond R in a row must be zero in both.
template <class T>
void dot(std::int64_t batch, std::int64_t count, std::int64_t width, const T* g, const T* code,
         T* out) {
  std::int64_t b = 0;
  for (; b + 4 <= batch; b += 4) dot_rows<4>(count, width, g + b * width, code, out + b * count);
  for (; b + 2 <= batch; b += 2) dot_rows<2>(count, width, g + b * width, code, out + b * count);
  for (; b < batch; ++b) dot_rows<1>(count, width, g + b * width, code, out + b * count);
}

// code[d, r] = sum_b x[b, d] g[b, r] for kCols features d and kVecs vectors of r.
template <int kCols, int kVecs, class T>
TORCH_SPE_INLINE void outer_block(std::int64_t batch, const T* x, std::int64_t ldx, const T* g,
                                  std::int64_t width, T* code) {
  Vec<T> acc[kCols][kVecs] = {};
  for (std::int64_t b = 0; b < batch; ++b) {
    Vec<T> row[kVecs];
    for (int v = 0; v < kVecs; ++v) row[v] = load_vec(g + b * width + v * kLanes<T>);
    for (int d = 0; d < kCols; ++d) {
      for (int v = 0; v < kVecs; ++v) acc[d][v] += x[b * ldx + d] * row[v];
    }
  }
  for (int d = 0; d < kCols; ++d) {
    for (int v = 0; v < kVecs; ++v) store_vec(code + d * width + v * kLanes<T>, acc[d][v]);
  }
}

template <int kCols, class T>
TORCH_SPE_INLINE void outer_columns(std::int64_t batch, std::int64_t width, const T* x,
                                    std::int64_t ldx, const T* g, T* code) {
  std::int64_t r = 0;
  for (; r + 4 * kLanes<T> <= width; r += 4 * kLanes<T>) {
    outer_block<kCols, 4>(batch, x, ldx, g + r, width, code + r);
  }
  for (; r < width; r += kLanes<T>) outer_block<kCols, 1>(batch, x, ldx, g + r, width, code + r);
}

// code[d, r] = sum_b x[b, d] g[b, r]: the gradient of the codes at one position.
template <class T>
void outer(std::int64_t batch, std::int64_t count, std::int64_t width, const T* x, const T* g,
           T* code) {
  std::int64_t d = 0;
  for (; d + 4 <= count; d += 4) outer_columns<4>(batch, width, x + d, count, g, code + d * width);
  for (; d < count; ++d) outer_columns<1>(batch, width, x + d, count, g, code + d * width);
}

// Gradients for one head and a group of features, over all positions. Features share nothing but
// grad_positions, for which every task has a part of its own, so nothing is added up between
// threads and no result depends on their order.
//
// With one batch row, U = W g^T gives dx_d = sum_j basis_dj U_dj and the gradient of the basis, x_d
// U_dj. With more, the gradient of the code, sum_b x[b] g[b], is made once for the batch and goes
// through basis and W.
template <class Storage>
class Backward {
  using T = core::accumulate_t<Storage>;

 public:
  Backward(const SineFilterBackwardParams& p, std::int64_t group)
      : p_(p),
        rows_(num_rows(p)),
        width_(round_up(p.num_realizations, kLanes<T>)),
        basis_of_(p),
        weights_(group * rows_ * p.num_realizations),
        grad_weights_(group * rows_ * p.num_realizations),
        basis_(group * rows_ * kTile),
        grad_basis_(group * rows_ * kTile),
        x_(kTile * p.batch * group),
        grad_x_(kTile * p.batch * group),
        g_(kTile * p.batch * width_),
        g_columns_(p.batch == 1 ? p.num_realizations * kTile : 0),
        code_(p.batch == 1 ? 0 : kTile * code_stride<T>(group, width_)),
        positions_(p.ndim * kTile) {}

  void run(std::int64_t head, std::int64_t d0, std::int64_t count, double* grad_positions) {
    head_ = head;
    d0_ = d0;
    count_ = count;
    grad_positions_ = grad_positions;
    load_weights(p_, head, d0, count, weights_.get());
    const std::int64_t size = count * rows_ * p_.num_realizations;
    for (std::int64_t i = 0; i < size; ++i) grad_weights_[i] = 0;
    basis_of_.set_head(head);
    for (n0_ = 0; n0_ < p_.length; n0_ += kTile) {
      size_ = min_of(kTile, p_.length - n0_);
      basis_of_.fill(n0_, size_, d0_, count_, basis_);
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
        load_row(g + b * strides[0] + t * strides[1], strides[3], p_.num_realizations, row);
        for (std::int64_t r = p_.num_realizations; r < width_; ++r) row[r] = 0;
      }
    }
  }

  bool wants_weights() const { return p_.grad_weight != nullptr || p_.grad_constant != nullptr; }

  void store_grad_weights() {
    const std::int64_t real = p_.num_realizations, sine_rows = 2 * p_.num_sines * real;
    const std::int64_t first = head_ * p_.in_features + d0_;
    for (std::int64_t d = 0; d < count_; ++d) {
      const T* grad = grad_weights_ + d * rows_ * real;
      if (p_.grad_weight != nullptr) {
        std::memcpy(static_cast<T*>(p_.grad_weight) + (first + d) * sine_rows, grad,
                    sine_rows * sizeof(T));
      }
      if (p_.grad_constant != nullptr) {
        std::memcpy(static_cast<T*>(p_.grad_constant) + (first + d) * real, grad + sine_rows,
                    real * sizeof(T));
      }
    }
  }

  void store_grad_x() {
    Storage* grad_x = static_cast<Storage*>(p_.grad_x);
    for (std::int64_t t = 0; t < size_; ++t) {
      for (std::int64_t b = 0; b < p_.batch; ++b) {
        store_row(
            grad_x_ + (t * p_.batch + b) * count_, 1, count_,
            grad_x + ((b * p_.length + n0_ + t) * p_.num_heads + head_) * p_.in_features + d0_);
      }
    }
  }

  void tile_of_one_row() {
    const std::int64_t real = p_.num_realizations;
    if (p_.grad_x == nullptr && !wants_phases()) {
      scale_basis(x_.get(), size_, count_, rows_, basis_.get());
    } else {
      for (std::int64_t r = 0; r < real; ++r) {
        for (std::int64_t t = 0; t < size_; ++t) g_columns_[r * kTile + t] = g_[t * width_ + r];
      }
      gemm_in_pieces(Op::kPlain, {count_ * rows_, size_, real}, {kProductRows, kTile, kTile},
                     weights_.get(), real, g_columns_.get(), kTile, T(0), grad_basis_.get(), kTile);
      load_positions();
      for (std::int64_t d = 0; d < count_; ++d) {
        T column[kTile], sum[kTile];
        for (std::int64_t t = 0; t < size_; ++t) {
          column[t] = x_[t * count_ + d];
          sum[t] = 0;
        }
        for (std::int64_t j = d * rows_; j < (d + 1) * rows_; ++j) {
          T* basis = basis_ + j * kTile;
          const T* u = grad_basis_ + j * kTile;
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
    gemm_in_pieces(Op::kPlain, {count_ * rows_, real, size_}, {kProductRows, kTile, kTile},
                   basis_.get(), kTile, g_.get(), width_, T(1), grad_weights_.get(), real);
  }

  void tile_of_many_rows() {
    const std::int64_t real = p_.num_realizations, batch = p_.batch;
    const std::int64_t stride = code_stride<T>(count_, width_);
    if (p_.grad_x != nullptr) {
      for (std::int64_t d = 0; d < count_; ++d) {
        code_tile(size_, real, width_, rows_, basis_ + d * rows_ * kTile,
                  weights_ + d * rows_ * real, code_ + d * width_, stride);
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
        gemm(Op::kPlain, Op::kPlain, rows_, real, size_, basis_ + d * rows_ * kTile, kTile,
             grad_code, stride, T(1), grad_weights_ + d * rows_ * real, real);
      }
      if (wants_phases()) {
        gemm(Op::kPlain, Op::kTransposed, rows_, size_, real, weights_ + d * rows_ * real, real,
             grad_code, stride, T(0), grad_basis_ + d * rows_ * kTile, kTile);
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
      const T* cos_row = basis_ + (d * rows_ + 2 * k) * kTile;
      const T* sin_row = cos_row + kTile;
      const T* grad_cos = grad_basis_ + (d * rows_ + 2 * k) * kTile;
      const T* grad_sin = grad_cos + kTile;
      T grad_phase[kTile];
      for (std::int64_t t = 0; t < size_; ++t) {
        grad_phase[t] = cos_row[t] * grad_sin[t] - sin_row[t] * grad_cos[t];
      }
      for (std::int64_t t = size_; t < kTile; ++t) grad_phase[t] = 0;
      const std::int64_t dk = ((head_ * p_.in_features + d0_ + d) * p_.num_sines + k) * p_.ndim;
      for (std::int64_t i = 0; i < p_.ndim; ++i) {
        if (p_.grad_freqs != nullptr) {
          double sums[kLanes<double>] = {};
          for (std::int64_t t = 0; t < kTile; t += kLanes<double>) {
            for (std::int64_t l = 0; l < kLanes<double>; ++l) {
              sums[l] += static_cast<double>(grad_phase[t + l]) * positions_[i * kTile + t + l];
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
      double* row = positions_ + i * kTile;
      for (std::int64_t t = 0; t < kTile; ++t) {
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
  Basis<T> basis_of_;
  Workspace<T> weights_, grad_weights_;  // [d, j, r]
  Workspace<T> basis_, grad_basis_;      // [d, j, t]
  Workspace<T> x_, grad_x_;              // [t, b, d]
  Workspace<T> g_;                       // [t, b, r]
  Workspace<T> g_columns_;               // [r, t]
  Workspace<T> code_;                    // [t, d, r]
  Workspace<double> positions_;          // [ndim, t]
  // The task and the tile at hand.
  std::int64_t head_, d0_, count_, n0_, size_;
  double* grad_positions_;
};

template <class Storage>
void backward(const SineFilterBackwardParams& p) {
  // Small enough groups that a single head keeps several threads busy.
  using T = core::accumulate_t<Storage>;
  const std::int64_t fitting = p.batch == 1 ? one_row_group_size<T>(p) : group_size<T>(p);
  const std::int64_t group = max_of(1, min_of(fitting, p.num_heads * p.in_features / 16));
  const std::int64_t groups = (p.in_features + group - 1) / group;
  const std::int64_t tasks = p.num_heads * groups;
  const std::int64_t positions = p.grad_positions == nullptr ? 0 : p.length * p.ndim;
  Workspace<double> partial(tasks * positions);
  for (std::int64_t i = 0; i < tasks * positions; ++i) partial[i] = 0;

#pragma omp parallel num_threads(p.num_threads)
  {
    Backward<Storage> worker(p, group);
#pragma omp for schedule(static)
    for (std::int64_t task = 0; task < tasks; ++task) {
      const std::int64_t d0 = task % groups * group;
      worker.run(task / groups, d0, min_of(group, p.in_features - d0),
                 positions > 0 ? partial + task * positions : nullptr);
    }
  }
  for (std::int64_t task = 0; task < tasks; ++task) {
    for (std::int64_t i = 0; i < positions; ++i)
      p.grad_positions[i] += partial[task * positions + i];
  }
}

}  // namespace

void sine_filter_forward(const SineFilterParams& p) {
  visit_storage(p.dtype, [&](auto storage) { forward<decltype(storage)>(p); });
}

void sine_filter_backward(const SineFilterBackwardParams& p) {
  visit_storage(p.dtype, [&](auto storage) { backward<decltype(storage)>(p); });
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
