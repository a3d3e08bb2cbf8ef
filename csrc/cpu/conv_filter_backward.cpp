#include "conv_filter.h"
#include "encode/conv_codes.h"
#include "encode/conv_tiles.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {
namespace {

// Gradients for one head and a group of features, over all positions: features share nothing, so
// nothing is added up between threads and no result depends on their order.
template <class Storage>
class ConvFilterGradient {
  using T = core::accumulate_t<Storage>;

 public:
  ConvFilterGradient(const ConvFilterBackwardParams& p, const ConvPlan& plan)
      : p_(p),
        plan_(plan),
        ld_(column_distance<T>(p, plan)),
        tables_(p, plan),
        slots_(tables_, 1),
        x_(plan.group * ld_),
        grad_x_(plan.group * ld_),
        g_(plan.chunk(p, 0).rows() * p.batch * kWidth<T>),
        led_((plan.chunk(p, 0).rows() + 2 * kSplit) * kWidth<T>),
        sums_size_(plan.part_rows(plan.chunk(p, 0).rows()) * kWidth<T>),
        sums_(plan.split() ? kSplitSums * sums_size_ : 0),
        partial_((plan.chunk(p, 0).rows() * p.batch + kLanes<T>)*kLanes<T>),
        grad_kernel_(plan.group * tables_.kernel_size()) {
    for (int i = 0; i < 3; ++i) {
      noise_size_[i] = p.size[i] + p.kernel_size[i] - 1;
      padded_size_[i] = p.size[i] + 2 * (p.kernel_size[i] - 1);
    }
  }

  void run(std::int64_t head, std::int64_t d0, std::int64_t count) {
    head_ = head;
    d0_ = d0;
    count_ = count;
    for (std::int64_t i = 0; i < count * tables_.kernel_size(); ++i) grad_kernel_[i] = 0;
    for (std::int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
      box_ = plan_.chunk(p_, chunk);
      load_columns<Storage>(p_, box_, p_.x, p_.x_strides, head, d0, count, ld_, x_.get());
      const std::int64_t rows = box_.rows() * p_.batch;
      map_columns(p_.feature_map, count, rows, ld_, x_.get());
      for (std::int64_t i = 0; i < count * ld_; ++i) grad_x_[i] = 0;
      for (std::int64_t block = 0; block < plan_.blocks; ++block) run_block(block * kWidth<T>);
      if (p_.grad_x != nullptr) {
        scale_columns_by_derivative(p_.feature_map, count, rows, ld_, x_.get(), grad_x_.get());
        store_columns<Storage>(p_, box_, grad_x_.get(), head, d0, count, ld_, p_.in_features,
                               p_.grad_x);
      }
    }
    if (p_.grad_kernel != nullptr) store_grad_kernel();
  }

 private:
  void run_block(std::int64_t first) {
    first_ = first;
    width_ = block_width<T>(p_.num_realizations, first);
    grad_code_ = led_ + plan_.lead * width_;
    load_tile<Storage>(p_, box_, p_.grad_out, p_.grad_out_strides, head_, first,
                       min_of(width_, p_.num_realizations - first), width_, g_.get());
    tables_.load(box_, head_, first, d0_, count_);
    for_each_class(box_, p_.generated.stride, [&](const PhaseClass& positions) {
      for (std::int64_t d = 0; d < count_; ++d) {
        const ConvFeatureCodes<T> codes(tables_, slots_, 0, d0_ + d, positions);
        if (p_.grad_x != nullptr) {
          codes.make(AddGradX<T>{g_, partial_, p_.batch, width_});
          add_grad_x(d, positions);
        }
        if (p_.grad_kernel == nullptr && p_.grad_constant == nullptr && p_.grad_noise == nullptr) {
          continue;
        }
        make_grad_code(d, positions);
        if (p_.grad_kernel != nullptr) {
          codes.add_kernel_gradient({led_, sums_, width_, sums_size_},
                                    grad_kernel_ + d * tables_.kernel_size());
        }
        if (p_.grad_constant != nullptr) add_grad_constant(d, positions);
        if (p_.grad_noise != nullptr) store_grad_noise(d);
      }
    });
  }

  void add_grad_x(std::int64_t d, const PhaseClass& positions) {
    const std::int64_t begin = positions.row * p_.batch;
    const std::int64_t end = begin + positions.rows() * p_.batch;
    const T* partial = partial_;
    T* grad_x = grad_x_ + d * ld_;
    for (std::int64_t i = begin; i < end; i += kLanes<T>) {
      Vec<T> rows[kLanes<T>];
      for (std::int64_t j = 0; j < kLanes<T>; ++j) {
        rows[j] = load_vec(partial + (i + j) * kLanes<T>);
      }
      const Vec<T> sums = load_vec(grad_x + i) + sum_rows<T>(rows);
      if (i + kLanes<T> <= end) {
        store_vec(grad_x + i, sums);
      } else {
        for (std::int64_t j = 0; j < end - i; ++j) grad_x[i + j] = sums[j];
      }
    }
  }

  // grad_code[row, r] = sum_b x[row, b] g[row, b, r]
  void make_grad_code(std::int64_t d, const PhaseClass& positions) {
    const std::int64_t batch = p_.batch, width = width_;
    const T* x = x_ + d * ld_ + positions.row * batch;
    const T* g = g_ + positions.row * batch * width;
    T* out = grad_code_ + positions.row * width;
    for (std::int64_t row = 0; row < positions.rows(); ++row) {
      for (std::int64_t r = 0; r < width; r += kLanes<T>) {
        Vec<T> sum = {};
        for (std::int64_t b = 0; b < batch; ++b) {
          sum += x[b] * load_vec(g + b * width + r);
        }
        store_vec(out + r, sum);
      }
      x += batch;
      g += batch * width;
      out += width;
    }
    if (!plan_.split()) return;
    for (std::int64_t i = 0; i < plan_.lead * width; ++i) led_[i] = 0;
    for (std::int64_t i = 0; i < kSplit * width; ++i) out[i] = 0;
    add_rows(led_.get(), plan_.part_rows(positions.rows()), width, sums_size_, sums_.get());
  }

  void add_grad_constant(std::int64_t d, const PhaseClass& positions) {
    T* grad = static_cast<T*>(p_.grad_constant) +
              (head_ * p_.in_features + d0_ + d) * p_.num_realizations + first_;
    T sums[kWidth<T>] = {};
    for (std::int64_t row = positions.row; row < positions.row + positions.rows(); ++row) {
      for (std::int64_t r = 0; r < width_; ++r) sums[r] += grad_code_[row * width_ + r];
    }
    for (std::int64_t r = 0; r < min_of(width_, p_.num_realizations - first_); ++r) {
      grad[r] += sums[r];
    }
  }

  // The gradient of given noise is the codes' gradient, with P - 1 zeros on every side, filtered
  // with the kernel back to front. The chunk is the whole grid then.
  void store_grad_noise(std::int64_t d) {
    const std::int64_t rows = tables_.kernel_rows(), ld = p_.kernel_size[2] + 2 * kPad;
    const T* kernel = static_cast<const T*>(p_.kernel) +
                      (head_ * p_.in_features + d0_ + d) * rows * p_.kernel_size[2];
    Workspace<T> flipped(rows * ld);
    Workspace<std::int64_t> offsets(rows);
    for (std::int64_t i = 0; i < rows * ld; ++i) flipped[i] = 0;
    for (std::int64_t o = 0; o < rows; ++o) {
      for (std::int64_t i = 0; i < p_.kernel_size[2]; ++i) {
        flipped[o * ld + kPad + i] = kernel[(rows - o) * p_.kernel_size[2] - 1 - i];
      }
      offsets[o] =
          (o / p_.kernel_size[1] * padded_size_[1] + o % p_.kernel_size[1]) * padded_size_[2];
    }
    const std::int64_t size =
        (padded_size_[0] * padded_size_[1] * padded_size_[2] + kDenseRows) * width_;
    Workspace<T> padded(size);
    for (std::int64_t i = 0; i < size; ++i) padded[i] = 0;
    for_each_row(box_, p_.generated.stride,
                 [&](std::int64_t row, std::int64_t i0, std::int64_t i1, std::int64_t i2) {
                   const std::int64_t to = ((i0 + p_.kernel_size[0] - 1) * padded_size_[1] + i1 +
                                            p_.kernel_size[1] - 1) *
                                               padded_size_[2] +
                                           i2 + p_.kernel_size[2] - 1;
                   for (std::int64_t r = 0; r < width_; ++r) {
                     padded[to * width_ + r] = grad_code_[row * width_ + r];
                   }
                 });
    const auto store = [&](auto storage) {
      using NoiseStorage = decltype(storage);
      NoiseStorage* grad = static_cast<NoiseStorage*>(p_.grad_noise) +
                           (head_ * p_.in_features + d0_ + d) * noise_size_[0] * noise_size_[1] *
                               noise_size_[2] * p_.num_realizations +
                           first_;
      const T zeros[kWidth<T>] = {};
      const DenseTaps<T> taps{flipped, zeros, p_.kernel_size[2], rows, ld, offsets, width_};
      for (std::int64_t i0 = 0; i0 < noise_size_[0]; ++i0) {
        for (std::int64_t i1 = 0; i1 < noise_size_[1]; ++i1) {
          const T* line = padded + (i0 * padded_size_[1] + i1) * padded_size_[2] * width_;
          make_codes(
              taps, line, width_, (i0 * noise_size_[1] + i1) * noise_size_[2], noise_size_[2],
              StoreRows<T, NoiseStorage>{grad, p_.num_realizations, p_.num_realizations - first_});
        }
      }
    };
    // Of the type of x, or of the one that it is computed in.
    if (p_.noise_dtype == p_.dtype) {
      store(Storage{});
    } else {
      store(T{});
    }
  }

  void store_grad_kernel() {
    const std::int64_t taps = p_.kernel_size[2], rows = tables_.kernel_rows();
    T* grad = static_cast<T*>(p_.grad_kernel) + (head_ * p_.in_features + d0_) * rows * taps;
    const T scale = tables_.noise_scale();
    const std::int64_t ld = tables_.kernel_ld();
    for (std::int64_t row = 0; row < count_ * rows; ++row) {
      const T* from = grad_kernel_ + row / rows * tables_.kernel_size() + row % rows * ld + kPad;
      if (!plan_.split()) {
        for (std::int64_t i = 0; i < taps; ++i) grad[row * taps + i] = from[i] * scale;
        continue;
      }
      for (std::int64_t i = 0; i < taps; i += kSplit) {
        T joined[kSplit];
        join_taps(from, rows * ld, i / kSplit, joined);
        for (std::int64_t j = 0; j < min_of(kSplit, taps - i); ++j) {
          grad[row * taps + i + j] = joined[j];
        }
      }
    }
  }

  const ConvFilterBackwardParams& p_;
  const ConvPlan& plan_;
  const std::int64_t ld_;
  ConvTables<T> tables_;
  ConvSlots<T> slots_;
  Workspace<T> x_, grad_x_;  // [count, rows, B], ld_ apart
  Workspace<T> g_;           // [rows, B, width]
  Workspace<T> led_;         // [lead + rows + kSplit, width], of one feature: between zeros,
  T* grad_code_;             // [rows, width]
  const std::int64_t sums_size_;
  Workspace<T> sums_;         // [sums, rows / 4, width], of them
  Workspace<T> partial_;      // [rows, B, lanes], of one feature
  Workspace<T> grad_kernel_;  // [count, parts, P0 P1, kPad + part_taps + kPad]
  std::int64_t noise_size_[3], padded_size_[3];
  // The task and the tile at hand.
  std::int64_t head_, d0_, count_, first_, width_;
  GridBox box_;
};

template <class Storage>
void conv_filter_backward_of(const ConvFilterBackwardParams& p) {
  using T = core::accumulate_t<Storage>;
  const std::int64_t all = p.size[0] * p.size[1] * p.size[2];
  const std::int64_t rows = max_of(kMinRows, min_of(kMaxRows, 4 * kMaxRows / p.batch));
  ConvPlan plan = make_conv_plan<T>(p, p.grad_noise != nullptr ? all : rows);
  if (plan.split() && p.grad_noise == nullptr) {
    plan = make_conv_plan<T>(p, min_of(rows, kSplitRows));
  }
  // Small enough groups that a single head keeps several threads busy.
  plan.group = max_of(1, min_of(plan.group, p.num_heads * p.in_features / 16));
  const std::int64_t groups = (p.in_features + plan.group - 1) / plan.group;
#pragma omp parallel num_threads(p.num_threads)
  {
    ConvFilterGradient<Storage> gradient(p, plan);
#pragma omp for schedule(static)
    for (std::int64_t task = 0; task < p.num_heads * groups; ++task) {
      const std::int64_t d0 = task % groups * plan.group;
      gradient.run(task / groups, d0, min_of(plan.group, p.in_features - d0));
    }
  }
}

}  // namespace

void conv_filter_backward(const ConvFilterBackwardParams& p) {
  visit_storage(p.dtype, [&](auto storage) { conv_filter_backward_of<decltype(storage)>(p); });
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
