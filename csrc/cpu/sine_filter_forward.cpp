#include "encode/one_position.h"
#include "encode/sine_products.h"
#include "encode/sine_tiles.h"
#include "sine_filter.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {
namespace {

// The output of one head at the positions of a tile.
//
// With one batch row it is a matrix product, (x (.) basis) W, over all features and rows of the
// basis. With more, the codes basis W are made once for the batch and multiplied with every x.
template <class Storage>
class SineFilterEncoder {
  using T = core::accumulate_t<Storage>;

 public:
  explicit SineFilterEncoder(const SineFilterParams& p)
      : p_(p),
        rows_(num_basis_rows(p)),
        width_(round_up(p.num_realizations, kLanes<T>)),
        group_(p.batch == 1 ? group_size<T>(p, kSineTile, kOneRowCodeTileBytes)
                            : group_size<T>(p, kCodePositions, kCodeTileBytes)),
        basis_of_(p),
        weights_(p.in_features * rows_ * width_),
        basis_(group_ * rows_ * kSineTile),
        code_(p.batch == 1 ? 0 : kCodePositions * code_stride<T>(group_, width_)),
        x_(kSineTile * p.batch * p.in_features),
        columns_(p.batch == 1 ? kSineTile * p.in_features : 0),
        y_(kSineTile * p.batch * width_) {}

  void run(std::int64_t head, std::int64_t n0) {
    const std::int64_t size = min_of(kSineTile, p_.length - n0);
    if (head != head_of_weights_) load_weights(p_, head, 0, p_.in_features, width_, weights_.get());
    head_of_weights_ = head;
    load_x<Storage>(p_, head, n0, size, 0, p_.in_features, x_.get());
    if (p_.batch == 1) {
      one_row(head, n0, size);
    } else {
      many_rows(head, n0, size);
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
  void one_row(std::int64_t head, std::int64_t n0, std::int64_t size) {
    for (std::int64_t d = 0; d < p_.in_features; ++d) {
      for (std::int64_t t = 0; t < size; ++t)
        columns_[d * kSineTile + t] = x_[t * p_.in_features + d];
    }
    for (std::int64_t d0 = 0; d0 < p_.in_features; d0 += group_) {
      const std::int64_t count = min_of(group_, p_.in_features - d0);
      basis_of_.fill(head, n0, size, d0, count, basis_, columns_ + d0 * kSineTile);
      multiply(size, width_, count * rows_, transposed<T>(basis_, kSineTile),
               weights_ + d0 * rows_ * width_, width_, d0 == 0 ? T(0) : T(1), y_.get(), width_);
    }
  }

  void many_rows(std::int64_t head, std::int64_t n0, std::int64_t size) {
    for (std::int64_t i = 0; i < size * p_.batch * width_; ++i) y_[i] = 0;
    for (std::int64_t d0 = 0; d0 < p_.in_features; d0 += group_) {
      const std::int64_t count = min_of(group_, p_.in_features - d0);
      const std::int64_t stride = code_stride<T>(count, width_);
      basis_of_.fill(head, n0, size, d0, count, basis_);
      for (std::int64_t t0 = 0; t0 < size; t0 += kCodePositions) {
        const std::int64_t positions = min_of(kCodePositions, size - t0);
        for (std::int64_t d = 0; d < count; ++d) {
          code_tile(positions, width_, rows_, basis_ + d * rows_ * kSineTile + t0,
                    weights_ + (d0 + d) * rows_ * width_, code_ + d * width_, stride);
        }
        for (std::int64_t t = 0; t < positions; ++t) {
          const std::int64_t row = (t0 + t) * p_.batch;
          contract(p_.batch, count, width_, x_ + row * p_.in_features + d0, p_.in_features,
                   code_ + t * stride, y_ + row * width_);
        }
      }
    }
  }

  const SineFilterParams& p_;
  const std::int64_t rows_, width_, group_;
  SineBasis<T> basis_of_;
  Workspace<T> weights_;  // [d, j, r], of a head
  Workspace<T> basis_;    // [d, j, t], of a group of features
  Workspace<T> code_;     // [t, d, r]
  Workspace<T> x_;        // [t, b, d]
  Workspace<T> columns_;  // [d, t]
  Workspace<T> y_;        // [t, b, r]
  std::int64_t head_of_weights_ = -1;
};

template <class Storage>
void sine_filter_forward_of(const SineFilterParams& p) {
  if (p.length == 1 && p.batch == 1 && p.ndim == 1) return encode_sines_of_one_position<Storage>(p);
  const std::int64_t tiles = (p.length + kSineTile - 1) / kSineTile;
#pragma omp parallel num_threads(p.num_threads)
  {
    SineFilterEncoder<Storage> encoder(p);
#pragma omp for schedule(static)
    for (std::int64_t task = 0; task < p.num_heads * tiles; ++task) {
      encoder.run(task / tiles, task % tiles * kSineTile);
    }
  }
}

}  // namespace

void sine_filter_forward(const SineFilterParams& p) {
  visit_storage(p.dtype, [&](auto storage) { sine_filter_forward_of<decltype(storage)>(p); });
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
