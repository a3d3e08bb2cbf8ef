#include "conv_filter.h"

#include "noise.h"
#include "simd.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {
namespace {

// Realizations that are handled together: kVecs vectors.
constexpr int kVecs = 4;
template <class T>
constexpr std::int64_t kWidth = kVecs * kLanes<T>;
// Positions whose dense codes are made together: with kVecs vectors each, they fill the registers
// and leave room for a row of noise and a tap. (Seven, with taps read from memory, were 10 %
// slower.)
constexpr int kDenseRows = kVectorBytes == 64 ? 6 : 3;
constexpr int kPhaseRows = kVectorBytes == 64 ? 4 : 2;
// Taps of dense and of polyphase noise whose gradients are made together.
constexpr int kDenseTaps = kVectorBytes == 64 ? 16 : 8;
constexpr int kPhaseTaps = 2;
// Zeros on either side of a row of the kernel, so that vectors and blocks may reach over its ends.
constexpr std::int64_t kPad = 16;
static_assert(kPad >= kLanes<float> && kPad >= kDenseRows);

constexpr std::int64_t kMaxRows = 2048;             // positions of a chunk, in all batch rows x 4
constexpr std::int64_t kMinRows = 256;              // the noise beyond a chunk's end is made twice
constexpr std::int64_t kWindowBytes = 1024 * 1024;  // noise of a group of features

// A part of the grid of positions.
struct Box {
  std::int64_t begin[3], size[3];

  std::int64_t rows() const { return size[0] * size[1] * size[2]; }
};

// The positions of a box fall into classes of equal residues modulo the strides. Tiles hold their
// rows class by class, so that along the last dimension, at consecutive rows, every feature's codes
// need the same taps and consecutive periods of the noise.
struct PhaseClass {
  std::int64_t residue[3], count[3];
  std::int64_t row;  // the first one in the tiles

  std::int64_t rows() const { return count[0] * count[1] * count[2]; }
};

template <class Function>
TORCH_SPE_INLINE void for_each_class(const Box& box, const std::int64_t stride[3],
                                     const Function& function) {
  PhaseClass c;
  c.row = 0;
  for (c.residue[0] = 0; c.residue[0] < min_of(stride[0], box.size[0]); ++c.residue[0]) {
    for (c.residue[1] = 0; c.residue[1] < min_of(stride[1], box.size[1]); ++c.residue[1]) {
      for (c.residue[2] = 0; c.residue[2] < min_of(stride[2], box.size[2]); ++c.residue[2]) {
        for (int i = 0; i < 3; ++i) {
          c.count[i] = (box.size[i] - c.residue[i] + stride[i] - 1) / stride[i];
        }
        function(c);
        c.row += c.rows();
      }
    }
  }
}

// Calls function(row, i0, i1, i2) for the rows of a tile and their positions in the grid.
template <class Function>
TORCH_SPE_INLINE void for_each_row(const Box& box, const std::int64_t stride[3],
                                   const Function& function) {
  for_each_class(box, stride, [&](const PhaseClass& c) {
    std::int64_t row = c.row;
    for (std::int64_t m0 = 0; m0 < c.count[0]; ++m0) {
      for (std::int64_t m1 = 0; m1 < c.count[1]; ++m1) {
        for (std::int64_t m2 = 0; m2 < c.count[2]; ++m2) {
          function(row++, box.begin[0] + c.residue[0] + m0 * stride[0],
                   box.begin[1] + c.residue[1] + m1 * stride[1],
                   box.begin[2] + c.residue[2] + m2 * stride[2]);
        }
      }
    }
  });
}

// How the work is cut up.
struct Plan {
  int axis;                 // the grid is cut into chunks along its first dimension
  std::int64_t length;      // of a chunk along the axis
  std::int64_t chunks;      //
  std::int64_t blocks;      // of realizations
  std::int64_t periods[3];  // of noise that the codes of a chunk need
  std::int64_t group;       // features whose noise is held together

  std::int64_t windows() const { return periods[0] * periods[1] * periods[2]; }

  Box chunk(const ConvFilterParams& p, std::int64_t index) const {
    Box box{{0, 0, 0}, {p.size[0], p.size[1], p.size[2]}};
    box.begin[axis] = index * length;
    box.size[axis] = min_of(length, p.size[axis] - box.begin[axis]);
    return box;
  }
};

template <class T>
Plan make_plan(const ConvFilterParams& p, std::int64_t rows) {
  Plan plan;
  const int ndim = p.generated.ndim;
  plan.axis = 3 - ndim;
  const std::int64_t others = p.size[0] * p.size[1] * p.size[2] / p.size[plan.axis];
  plan.length = min_of(p.size[plan.axis], max_of(1, rows / others));
  plan.chunks = (p.size[plan.axis] + plan.length - 1) / plan.length;
  plan.blocks = (p.num_realizations + kWidth<T> - 1) / kWidth<T>;
  for (int i = 0; i < 3; ++i) {
    const std::int64_t length = i == plan.axis ? plan.length : p.size[i];
    const std::int64_t stride = p.generated.stride[i];
    plan.periods[i] = (length + p.kernel_size[i] - 2 + stride - 1) / stride + 1;
  }
  const std::int64_t bytes = plan.windows() * kWidth<T> * static_cast<std::int64_t>(sizeof(T));
  plan.group = max_of(1, min_of(p.in_features, kWindowBytes / bytes));
  return plan;
}

// The noise that the codes of one feature in a box need, [periods, width], from the generator or
// from a tensor.
template <class T>
class Window {
 public:
  Window(const ConvFilterParams& p, const Plan& plan)
      : p_(p),
        plan_(plan),
        line_(sizeof(T) == sizeof(float) ? 0 : plan.periods[2] * kWidth<T> + kNoiseSlack) {}

  static std::int64_t size(const Plan& plan) {
    return plan.windows() * kWidth<T> + max_of(kNoiseSlack, kDenseRows * kWidth<T>);
  }

  void fill(const Box& box, std::int64_t head, std::int64_t feature, const std::int64_t shift[3],
            std::int64_t first, std::int64_t width, T* out) const {
    const std::int64_t (&periods)[3] = plan_.periods;
    if (p_.noise == nullptr) {
      const NoiseParams& g = p_.generated;
      NoiseLine line{g.kind, g.seed, g.ndim, head, feature, {}, periods[2], first, width};
      std::int64_t origin[3];
      for (int i = 0; i < 3; ++i) {
        origin[i] = core::floor_divide(g.start[i] + box.begin[i] + shift[i], g.stride[i]);
      }
      line.period[2] = origin[2];
      for (std::int64_t i0 = 0; i0 < periods[0]; ++i0) {
        for (std::int64_t i1 = 0; i1 < periods[1]; ++i1) {
          line.period[0] = origin[0] + i0;
          line.period[1] = origin[1] + i1;
          fill_line(line, out + (i0 * periods[1] + i1) * periods[2] * width);
        }
      }
    } else {
      visit_storage(p_.noise_dtype, [&](auto storage) {
        load_tensor<decltype(storage)>(box, head, feature, first, width, out);
      });
    }
    // Blocks of rows may reach over the end.
    T* end = out + plan_.windows() * width;
    for (std::int64_t i = 0; i < (kDenseRows - 1) * width; ++i) end[i] = 0;
  }

 private:
  void fill_line(const NoiseLine& line, T* out) const {
    if (line.kind == core::NoiseKind::kRademacher) {
      fill_signs(line, out);
    } else if constexpr (sizeof(T) == sizeof(float)) {
      fill_normals(line, out);
    } else {
      fill_normals(line, line_);
      for (std::int64_t i = 0; i < line.count * line.width; ++i) out[i] = line_[i];
    }
  }

  template <class Storage>
  void load_tensor(const Box& box, std::int64_t head, std::int64_t feature, std::int64_t first,
                   std::int64_t width, T* out) const {
    const auto& s = p_.noise_strides;
    const Storage* noise =
        static_cast<const Storage*>(p_.noise) + head * s[0] + feature * s[1] + first * s[5];
    const std::int64_t real = min_of(width, p_.num_realizations - first);
    const std::int64_t (&periods)[3] = plan_.periods;
    std::int64_t available[3];
    for (int i = 0; i < 3; ++i) available[i] = box.size[i] + p_.kernel_size[i] - 1;
    for (std::int64_t i0 = 0; i0 < periods[0]; ++i0) {
      for (std::int64_t i1 = 0; i1 < periods[1]; ++i1) {
        for (std::int64_t i2 = 0; i2 < periods[2]; ++i2) {
          T* row = out + ((i0 * periods[1] + i1) * periods[2] + i2) * width;
          const bool inside = i0 < available[0] && i1 < available[1] && i2 < available[2];
          if (inside) {
            load_row(noise + (box.begin[0] + i0) * s[2] + (box.begin[1] + i1) * s[3] +
                         (box.begin[2] + i2) * s[4],
                     s[5], real, row);
          }
          for (std::int64_t r = inside ? real : 0; r < width; ++r) row[r] = 0;
        }
      }
    }
  }

  const ConvFilterParams& p_;
  const Plan& plan_;
  Workspace<float> line_;
};

// Codes of kRows consecutive positions and kCols vectors of realizations from dense noise:
// acc[t] = init + sum_o sum_j kernel_o[j - t] z[offset_o + j], a product with a Toeplitz matrix
// that is read from the kernel's rows [o, kPad zeros, taps, kPad zeros].
template <class T>
struct DenseTaps {
  static constexpr int kRows = kDenseRows;
  const T* kernel;
  const T* init;                // [width]
  std::int64_t taps;            // of the last dimension
  std::int64_t rows;            // of the kernel
  std::int64_t kernel_ld;       // between them
  const std::int64_t* offsets;  // [rows], of their noise

  template <int kRows, int kCols>
  TORCH_SPE_INLINE void block(const T* z, std::int64_t width, std::int64_t column,
                              Vec<T> (&acc)[kRows][kCols]) const {
    for (int t = 0; t < kRows; ++t) {
      for (int v = 0; v < kCols; ++v) acc[t][v] = load_vec(init + column + v * kLanes<T>);
    }
    for (std::int64_t o = 0; o < rows; ++o) {
      const T* k = kernel + o * kernel_ld + kPad;
      const T* row = z + offsets[o] + column;
      for (const T* end = k + taps + kRows - 1; k < end; ++k, row += width) {
        Vec<T> c[kCols];
        for (int v = 0; v < kCols; ++v) c[v] = load_vec(row + v * kLanes<T>);
        for (int t = 0; t < kRows; ++t) {
          const T tap = k[-t];
          for (int v = 0; v < kCols; ++v) acc[t][v] += tap * c[v];
        }
      }
    }
  }
};

// The same from polyphase noise: a sum over slots of taps * z[row + offset]. A slot has taps of its
// own for every realization, and their vectors stand where `index` says.
template <class T>
struct PhaseTaps {
  static constexpr int kRows = kPhaseRows;
  const T* taps;
  const T* init;                // [width]
  std::int64_t slots;           //
  const std::int64_t* index;    // [slots, kVecs]
  const std::int64_t* offsets;  // [slots]

  template <int kRows, int kCols>
  TORCH_SPE_INLINE void block(const T* z, std::int64_t width, std::int64_t column,
                              Vec<T> (&acc)[kRows][kCols]) const {
    for (int t = 0; t < kRows; ++t) {
      for (int v = 0; v < kCols; ++v) acc[t][v] = load_vec(init + column + v * kLanes<T>);
    }
    const std::int64_t* from = index + column / kLanes<T>;
    for (std::int64_t i = 0; i < slots; ++i, from += kVecs) {
      const T* row = z + offsets[i] + column;
      for (int v = 0; v < kCols; ++v) {
        const Vec<T> tap = load_vec(taps + from[v]);
        for (int t = 0; t < kRows; ++t) {
          acc[t][v] += tap * load_vec(row + t * width + v * kLanes<T>);
        }
      }
    }
  }
};

// The codes of `count` consecutive rows, given to `consume(row, valid, column, codes)` in blocks of
// which the first `valid` rows count.
template <int kCols, class T, class Taps, class Consumer>
TORCH_SPE_INLINE void make_columns(Taps taps, const T* z, std::int64_t width, std::int64_t column,
                                   std::int64_t row, std::int64_t count, Consumer consume) {
  for (std::int64_t t = 0; t < count; t += Taps::kRows) {
    if (count - t > 1) {
      Vec<T> acc[Taps::kRows][kCols];
      taps.block(z + t * width, width, column, acc);
      consume(row + t, min_of(Taps::kRows, count - t), column, acc);
    } else {
      Vec<T> acc[1][kCols];
      taps.block(z + t * width, width, column, acc);
      consume(row + t, 1, column, acc);
    }
  }
}

template <class T, class Taps, class Consumer>
void make_codes(Taps taps, const T* z, std::int64_t width, std::int64_t row, std::int64_t count,
                Consumer consume) {
  if (width == kWidth<T>) {
    make_columns<kVecs>(taps, z, width, 0, row, count, consume);
  } else {
    for (std::int64_t column = 0; column < width; column += kLanes<T>) {
      make_columns<1>(taps, z, width, column, row, count, consume);
    }
  }
}

// sums[i] += sum over kRows consecutive rows of g * z[row + i], one vector wide.
template <int kTaps, int kRows, class T>
TORCH_SPE_INLINE void correlate_rows(const T* g, const T* z, std::int64_t width,
                                     Vec<T> (&sums)[kTaps]) {
  Vec<T> grad[kRows];
  for (int t = 0; t < kRows; ++t) grad[t] = load_vec(g + t * width);
#pragma GCC unroll 32
  for (int j = 0; j < kTaps + kRows - 1; ++j, z += width) {
    const Vec<T> noise = load_vec(z);
    for (int t = 0; t < kRows; ++t) {
      if (j >= t && j - t < kTaps) sums[j - t] += grad[t] * noise;
    }
  }
}
template <int kTaps, class T>
TORCH_SPE_INLINE void correlate_dense(const T* g, const T* z, std::int64_t width,
                                      std::int64_t count, Vec<T> (&sums)[kTaps]) {
  std::int64_t t = 0;
  for (; t + 4 <= count; t += 4)
    correlate_rows<kTaps, 4>(g + t * width, z + t * width, width, sums);
  for (; t < count; ++t) correlate_rows<kTaps, 1>(g + t * width, z + t * width, width, sums);
}

// sums[i][v] += sum over rows of g * z[row + offsets[i]].
template <int kTaps, int kCols, class T>
TORCH_SPE_INLINE void correlate_slots(const T* g, const T* z, const std::int64_t* offsets,
                                      std::int64_t width, std::int64_t count,
                                      Vec<T> (&sums)[kTaps][kCols]) {
  const T* rows[kTaps];
  for (int i = 0; i < kTaps; ++i) rows[i] = z + offsets[i];
  for (std::int64_t t = 0; t < count * width; t += width) {
    for (int v = 0; v < kCols; ++v) {
      const Vec<T> grad = load_vec(g + t + v * kLanes<T>);
      for (int i = 0; i < kTaps; ++i) sums[i][v] += grad * load_vec(rows[i] + t + v * kLanes<T>);
    }
  }
}

// Codes of the features of a head, for the realizations [first, first + width).
template <class T>
class Codes {
 public:
  Codes(const ConvFilterParams& p, const Plan& plan)
      : p_(p),
        plan_(plan),
        dense_(p.generated.stride[0] * p.generated.stride[1] * p.generated.stride[2] == 1),
        kernel_rows_(p.kernel_size[0] * p.kernel_size[1]),
        kernel_ld_(p.kernel_size[2] + 2 * kPad),
        max_slots_(count_slots()),
        window_(p, plan),
        kernels_(p.in_features * kernel_rows_ * kernel_ld_),
        constants_(p.in_features * kWidth<T>),
        shifts_(p.in_features * 3),
        phases_(p.in_features * 3),
        windows_(plan.group * Window<T>::size(plan)),
        dense_offsets_(kernel_rows_),
        taps_(dense_ || contiguous() ? 0 : max_slots_ * kWidth<T>),
        index_(dense_ ? 0 : max_slots_ * kVecs),
        offsets_(dense_ ? 0 : max_slots_),
        lags_(dense_ ? 0 : max_slots_ * 3),
        classes_(kWidth<T> * 3) {}

  std::int64_t kernel_rows() const { return kernel_rows_; }
  std::int64_t kernel_ld() const { return kernel_ld_; }
  std::int64_t kernel_size() const { return kernel_rows_ * kernel_ld_; }

  // Copies of the kernels between zeros, times the square root of the strides.
  void set_head(std::int64_t head) {
    if (head == head_) return;
    head_ = head;
    const T* kernel =
        static_cast<const T*>(p_.kernel) + head * p_.in_features * kernel_rows_ * p_.kernel_size[2];
    const T scale = noise_scale();
    for (std::int64_t row = 0; row < p_.in_features * kernel_rows_; ++row) {
      T* to = kernels_ + row * kernel_ld_;
      for (std::int64_t i = 0; i < kPad; ++i) to[i] = to[kernel_ld_ - 1 - i] = 0;
      for (std::int64_t i = 0; i < p_.kernel_size[2]; ++i) {
        to[kPad + i] = kernel[row * p_.kernel_size[2] + i] * scale;
      }
    }
    for (std::int64_t d = 0; d < p_.in_features; ++d) {
      if (dense_) {
        for (int i = 0; i < 3; ++i) shifts_[d * 3 + i] = 0;
      } else {
        core::noise_shift(p_.generated.seed, p_.generated.ndim, head, d, p_.generated.stride,
                          shifts_ + d * 3);
      }
    }
    first_ = -1;
  }

  T noise_scale() const {
    const std::int64_t (&s)[3] = p_.generated.stride;
    return static_cast<T>(__builtin_sqrt(static_cast<double>(s[0] * s[1] * s[2])));
  }

  void set_realizations(std::int64_t first, std::int64_t width) {
    if (first == first_) return;
    first_ = first;
    width_ = width;
    const T* constant = static_cast<const T*>(p_.constant);
    for (std::int64_t d = 0; d < p_.in_features; ++d) {
      for (std::int64_t r = 0; r < width; ++r) {
        const bool given = constant != nullptr && first + r < p_.num_realizations;
        constants_[d * kWidth<T> + r] =
            given ? constant[(head_ * p_.in_features + d) * p_.num_realizations + first + r] : T(0);
      }
    }
    const std::int64_t (&s)[3] = p_.generated.stride;
    for (std::int64_t r = 0; r < width; ++r) {
      classes_[r * 3 + 2] = (first + r) % s[2];
      classes_[r * 3 + 1] = (first + r) / s[2] % s[1];
      classes_[r * 3 + 0] = (first + r) / s[2] / s[1] % s[0];
    }
    for (std::int64_t o = 0; o < kernel_rows_; ++o) {
      dense_offsets_[o] = (o / p_.kernel_size[1] * plan_.periods[1] + o % p_.kernel_size[1]) *
                          plan_.periods[2] * width;
    }
  }

  // Makes the noise of the features [d0, d0 + count), count <= plan.group.
  void set_noise(const Box& box, std::int64_t d0, std::int64_t count) {
    box_ = box;
    d0_ = d0;
    const NoiseParams& g = p_.generated;
    for (std::int64_t d = d0; d < d0 + count; ++d) {
      window_.fill(box, head_, d, shifts_ + d * 3, first_, width_, noise(d));
      for (int i = 0; i < 3; ++i) {
        phases_[d * 3 + i] =
            core::floor_modulo(g.start[i] + box.begin[i] + shifts_[d * 3 + i], g.stride[i]);
      }
    }
  }

  // Chooses a feature of those and a class of positions.
  void set_feature(std::int64_t d, const PhaseClass& positions) {
    d_ = d;
    class_ = positions;
    std::int64_t phase[3];
    for (int i = 0; i < 3; ++i) {
      const std::int64_t stride = p_.generated.stride[i];
      phase[i] = phases_[d * 3 + i] + positions.residue[i];  // less than twice the stride
      period_[i] = phase[i] >= stride ? 1 : 0;
      phase[i] -= period_[i] * stride;
    }
    if (!dense_) set_slots(phase);
  }

  // Calls function(row, z, count) for runs of rows of the class along the last dimension, with the
  // noise of their first period.
  template <class Function>
  TORCH_SPE_INLINE void for_each_run(const Function& function) const {
    const T* z = noise(d_);
    for (std::int64_t m0 = 0; m0 < class_.count[0]; ++m0) {
      for (std::int64_t m1 = 0; m1 < class_.count[1]; ++m1) {
        const std::int64_t line = (period_[0] + m0) * plan_.periods[1] + period_[1] + m1;
        function(class_.row + (m0 * class_.count[1] + m1) * class_.count[2],
                 z + (line * plan_.periods[2] + period_[2]) * width_, class_.count[2]);
      }
    }
  }

  // Gives the codes of the class to consume(row, valid, column, codes).
  template <class Consumer>
  TORCH_SPE_INLINE void make(Consumer consume) const {
    const T* init = constants_ + d_ * kWidth<T>;
    const DenseTaps<T> dense{kernel(),     init,       p_.kernel_size[2],
                             kernel_rows_, kernel_ld_, dense_offsets_};
    const PhaseTaps<T> phase{contiguous() ? kernel() : taps_.get(), init, slots_, index_, offsets_};
    for_each_run([&](std::int64_t row, const T* z, std::int64_t count) {
      if (dense_) {
        make_codes(dense, z, width_, row, count, consume);
      } else {
        make_codes(phase, z, width_, row, count, consume);
      }
    });
  }

  // Adds the gradient of the kernel, laid out as its copy and not yet times the square root of the
  // strides, given that of the codes, [rows, width].
  void add_kernel_gradient(const T* grad_code, T* grad_kernel) const {
    if (!dense_) {
      std::int64_t slot = 0;
      for (; slot + kPhaseTaps <= slots_; slot += kPhaseTaps) {
        add_slots<kPhaseTaps>(grad_code, slot, grad_kernel);
      }
      for (; slot < slots_; ++slot) add_slots<1>(grad_code, slot, grad_kernel);
      return;
    }
    for (std::int64_t column = 0; column < width_; column += kLanes<T>) {
      for (std::int64_t o = 0; o < kernel_rows_; ++o) {
        T* row = grad_kernel + o * kernel_ld_ + kPad;
        std::int64_t tap = 0;
        for (; tap + kDenseTaps <= p_.kernel_size[2]; tap += kDenseTaps) {
          add_dense_taps<kDenseTaps>(grad_code, column, o, tap, row);
        }
        for (; tap < p_.kernel_size[2]; ++tap) add_dense_taps<1>(grad_code, column, o, tap, row);
      }
    }
  }

 private:
  std::int64_t count_slots() const {
    std::int64_t slots = 1;
    for (int i = 0; i < 3; ++i) {
      const std::int64_t stride = p_.generated.stride[i];
      slots *= (p_.kernel_size[i] - 1 + stride - 1) / stride + 1;
    }
    return slots;
  }

  T* noise(std::int64_t d) const { return windows_ + (d - d0_) * Window<T>::size(plan_); }
  const T* kernel() const { return kernels_ + d_ * kernel_size(); }

  // Where the tap of a class stands in the padded kernel, if it reaches there with `lanes` more.
  TORCH_SPE_INLINE bool tap_index(const std::int64_t lag[3], const std::int64_t classes[3],
                                  std::int64_t lanes, std::int64_t* index) const {
    const std::int64_t p0 = classes[0] + lag[0], p1 = classes[1] + lag[1], p2 = classes[2] + lag[2];
    const std::int64_t (&size)[3] = p_.kernel_size;
    *index = 0;
    if (p0 < 0 || p0 >= size[0] || p1 < 0 || p1 >= size[1] || p2 + lanes <= 0 || p2 >= size[2]) {
      return false;
    }
    *index = (p0 * size[1] + p1) * kernel_ld_ + kPad + p2;
    return true;
  }
  // Whether the classes of the realizations of a vector are consecutive.
  bool contiguous() const { return p_.generated.stride[2] % kLanes<T> == 0; }

  // The slots in which any realization has a tap in the kernel. In slot e of a dimension class c
  // has the tap c - phase + e s, on the noise of e periods after the row's.
  void set_slots(const std::int64_t phase[3]) {
    const std::int64_t (&s)[3] = p_.generated.stride;
    const std::int64_t (&size)[3] = p_.kernel_size;
    slots_ = 0;
    for (std::int64_t e0 = 0; e0 * s[0] < size[0] + phase[0]; ++e0) {
      for (std::int64_t e1 = 0; e1 * s[1] < size[1] + phase[1]; ++e1) {
        for (std::int64_t e2 = 0; e2 * s[2] < size[2] + phase[2]; ++e2) {
          const std::int64_t lag[3] = {e0 * s[0] - phase[0], e1 * s[1] - phase[1],
                                       e2 * s[2] - phase[2]};
          if (!set_taps(lag)) continue;
          for (int i = 0; i < 3; ++i) lags_[slots_ * 3 + i] = lag[i];
          offsets_[slots_] = ((e0 * plan_.periods[1] + e1) * plan_.periods[2] + e2) * width_;
          ++slots_;
        }
      }
    }
  }

  // The taps of a slot; false if none lies in the kernel.
  bool set_taps(const std::int64_t lag[3]) {
    bool any = false;
    std::int64_t index[kVecs] = {};
    for (int v = 0; v * kLanes<T> < width_; ++v) {
      const std::int64_t* classes = classes_ + v * kLanes<T> * 3;
      if (contiguous()) {
        any |= tap_index(lag, classes, kLanes<T>, &index[v]);
        continue;
      }
      index[v] = slots_ * kWidth<T> + v * kLanes<T>;
      for (std::int64_t lane = 0; lane < kLanes<T>; ++lane) {
        std::int64_t from;
        any |= tap_index(lag, classes + lane * 3, 1, &from);
        taps_[index[v] + lane] = kernel()[from];
      }
    }
    for (int v = 0; v < kVecs; ++v) index_[slots_ * kVecs + v] = index[v];
    return any;
  }

  template <int kTaps>
  void add_dense_taps(const T* grad_code, std::int64_t column, std::int64_t row, std::int64_t tap,
                      T* grad_kernel) const {
    Vec<T> sums[kTaps] = {};
    const std::int64_t offset = dense_offsets_[row] + tap * width_ + column;
    for_each_run([&](std::int64_t first, const T* z, std::int64_t count) {
      correlate_dense(grad_code + first * width_ + column, z + offset, width_, count, sums);
    });
    for (int i = 0; i < kTaps; ++i) grad_kernel[tap + i] += sum_lanes<T>(sums[i]);
  }

  template <int kTaps>
  void add_slots(const T* grad_code, std::int64_t slot, T* grad_kernel) const {
    if (width_ == kWidth<T>) {
      add_slot_columns<kTaps, kVecs>(grad_code, 0, slot, grad_kernel);
    } else {
      for (std::int64_t column = 0; column < width_; column += kLanes<T>) {
        add_slot_columns<kTaps, 1>(grad_code, column, slot, grad_kernel);
      }
    }
  }

  template <int kTaps, int kCols>
  void add_slot_columns(const T* grad_code, std::int64_t column, std::int64_t slot,
                        T* grad_kernel) const {
    Vec<T> sums[kTaps][kCols] = {};
    for_each_run([&](std::int64_t first, const T* z, std::int64_t count) {
      correlate_slots(grad_code + first * width_ + column, z + column, offsets_ + slot, width_,
                      count, sums);
    });
    for (int i = 0; i < kTaps; ++i) {
      const std::int64_t* lag = lags_ + (slot + i) * 3;
      for (int v = 0; v < kCols; ++v) {
        const std::int64_t* classes = classes_ + (column + v * kLanes<T>)*3;
        std::int64_t index;
        if (contiguous()) {
          if (!tap_index(lag, classes, kLanes<T>, &index)) continue;
          store_vec(grad_kernel + index, load_vec(grad_kernel + index) + sums[i][v]);
        } else {
          for (std::int64_t lane = 0; lane < kLanes<T>; ++lane) {
            if (!tap_index(lag, classes + lane * 3, 1, &index)) continue;
            grad_kernel[index] += sums[i][v][lane];
          }
        }
      }
    }
  }

  const ConvFilterParams& p_;
  const Plan& plan_;
  const bool dense_;
  const std::int64_t kernel_rows_, kernel_ld_, max_slots_;
  Window<T> window_;
  Workspace<T> kernels_;            // [D, P0 P1, kPad + P2 + kPad]
  Workspace<T> constants_;          // [D, kWidth]
  Workspace<std::int64_t> shifts_;  // [D, 3]
  Workspace<std::int64_t> phases_;  // [D, 3], of the box's first position
  Workspace<T> windows_;            // [group, periods, width]
  Workspace<std::int64_t> dense_offsets_;
  Workspace<T> taps_;                // [slots, kWidth], unless they stand in the kernel so
  Workspace<std::int64_t> index_;    // [slots, kVecs]
  Workspace<std::int64_t> offsets_;  // [slots]
  Workspace<std::int64_t> lags_;     // [slots, 3]
  Workspace<std::int64_t> classes_;  // [kWidth, 3]
  std::int64_t slots_ = 0;
  // What is at hand.
  std::int64_t head_ = -1, first_ = -1, width_ = 0, d0_ = 0, d_ = 0;
  Box box_;
  PhaseClass class_;
  std::int64_t period_[3];  // of the class's first row, from the window's
};

// Whole vectors, and whole blocks of the generator's realizations.
template <class T>
std::int64_t block_width(std::int64_t num_realizations, std::int64_t first) {
  return min_of(kWidth<T>, round_up(num_realizations - first, max_of(4, kLanes<T>)));
}

TORCH_SPE_INLINE std::int64_t offset_of(const std::int64_t* strides, std::int64_t i0,
                                        std::int64_t i1, std::int64_t i2) {
  return i0 * strides[1] + i1 * strides[2] + i2 * strides[3];
}

// Tile [rows, B, width] of the columns [first, first + count) of a tensor [B, *size, H, columns],
// zero from `count` on.
template <class Storage, class T>
void load_tile(const ConvFilterParams& p, const Box& box, const void* tensor,
               const std::int64_t* strides, std::int64_t head, std::int64_t first,
               std::int64_t count, std::int64_t width, T* tile) {
  const Storage* from =
      static_cast<const Storage*>(tensor) + head * strides[4] + first * strides[5];
  for_each_row(box, p.generated.stride,
               [&](std::int64_t row, std::int64_t i0, std::int64_t i1, std::int64_t i2) {
                 for (std::int64_t b = 0; b < p.batch; ++b) {
                   T* to = tile + (row * p.batch + b) * width;
                   load_row(from + b * strides[0] + offset_of(strides, i0, i1, i2), strides[5],
                            count, to);
                   for (std::int64_t i = count; i < width; ++i) to[i] = 0;
                 }
               });
}

// The same as [count, ld], where a column's numbers stand together, row by row.
template <class Storage, class T>
void load_columns(const ConvFilterParams& p, const Box& box, const void* tensor,
                  const std::int64_t* strides, std::int64_t head, std::int64_t first,
                  std::int64_t count, std::int64_t ld, T* tile) {
  const Storage* from =
      static_cast<const Storage*>(tensor) + head * strides[4] + first * strides[5];
  for_each_row(box, p.generated.stride,
               [&](std::int64_t row, std::int64_t i0, std::int64_t i1, std::int64_t i2) {
                 for (std::int64_t b = 0; b < p.batch; ++b) {
                   const Storage* token = from + b * strides[0] + offset_of(strides, i0, i1, i2);
                   T* to = tile + row * p.batch + b;
                   for (std::int64_t i = 0; i < count; ++i) {
                     to[i * ld] = core::load(token[i * strides[5]]);
                   }
                 }
               });
}

// Where the columns [first, first + count) of a token stand in a contiguous [B, *size, H, columns].
template <class Storage>
Storage* token_of(const ConvFilterParams& p, void* tensor, std::int64_t b, std::int64_t i0,
                  std::int64_t i1, std::int64_t i2, std::int64_t head, std::int64_t columns) {
  const std::int64_t n = ((b * p.size[0] + i0) * p.size[1] + i1) * p.size[2] + i2;
  return static_cast<Storage*>(tensor) + (n * p.num_heads + head) * columns;
}

template <class Storage, class T>
void store_tile(const ConvFilterParams& p, const Box& box, const T* tile, std::int64_t head,
                std::int64_t first, std::int64_t count, std::int64_t width, std::int64_t columns,
                void* tensor) {
  for_each_row(box, p.generated.stride,
               [&](std::int64_t row, std::int64_t i0, std::int64_t i1, std::int64_t i2) {
                 for (std::int64_t b = 0; b < p.batch; ++b) {
                   store_row(tile + (row * p.batch + b) * width, 1, count,
                             token_of<Storage>(p, tensor, b, i0, i1, i2, head, columns) + first);
                 }
               });
}

template <class Storage, class T>
void store_columns(const ConvFilterParams& p, const Box& box, const T* tile, std::int64_t head,
                   std::int64_t first, std::int64_t count, std::int64_t ld, std::int64_t columns,
                   void* tensor) {
  for_each_row(box, p.generated.stride,
               [&](std::int64_t row, std::int64_t i0, std::int64_t i1, std::int64_t i2) {
                 for (std::int64_t b = 0; b < p.batch; ++b) {
                   Storage* token =
                       token_of<Storage>(p, tensor, b, i0, i1, i2, head, columns) + first;
                   for (std::int64_t i = 0; i < count; ++i) {
                     core::store(tile[i * ld + row * p.batch + b], token + i);
                   }
                 }
               });
}

// Distance of columns: off the powers of two, which would meet in the same sets of the cache, and
// with room for a vector beyond the last row.
template <class T>
std::int64_t column_distance(const ConvFilterParams& p, const Plan& plan) {
  return round_up(plan.chunk(p, 0).rows() * p.batch, kLanes<T>) + kLanes<T>;
}

// y += x codes, for one feature. The consumers hold all that they need, by value: vectors stored
// may alias anything that is read through a pointer.
template <class T>
struct AddEncoded {
  const T* x;  // [rows, B]
  T* y;        // [rows, B, width]
  std::int64_t batch, width;

  template <int kRows, int kCols>
  TORCH_SPE_INLINE void operator()(std::int64_t row, std::int64_t valid, std::int64_t column,
                                   const Vec<T> (&codes)[kRows][kCols]) const {
    const T* from = x + row * batch;
    T* to = y + row * batch * width + column;
    for (int t = 0; t < kRows; ++t) {
      if (t >= valid) break;
      for (std::int64_t b = 0; b < batch; ++b, ++from, to += width) {
        for (int v = 0; v < kCols; ++v) {
          store_vec(to + v * kLanes<T>, load_vec(to + v * kLanes<T>) + *from * codes[t][v]);
        }
      }
    }
  }
};

// partial[row, b] += codes * grad_out, of which the sum over the lanes is the gradient of x, for
// one feature. The first column starts the sums.
template <class T>
struct AddGradX {
  const T* g;  // [rows, B, width]
  T* partial;  // [rows, B, lanes]
  std::int64_t batch, width;

  template <int kRows, int kCols>
  TORCH_SPE_INLINE void operator()(std::int64_t row, std::int64_t valid, std::int64_t column,
                                   const Vec<T> (&codes)[kRows][kCols]) const {
    const T* from = g + row * batch * width + column;
    T* to = partial + row * batch * kLanes<T>;
    for (int t = 0; t < kRows; ++t) {
      if (t >= valid) break;
      for (std::int64_t b = 0; b < batch; ++b, from += width, to += kLanes<T>) {
        Vec<T> sum = column == 0 ? Vec<T>{} : load_vec(to);
        for (int v = 0; v < kCols; ++v) sum += load_vec(from + v * kLanes<T>) * codes[t][v];
        store_vec(to, sum);
      }
    }
  }
};

// Stores values of the first `count` columns in rows of a tensor.
template <class T, class Storage>
struct StoreRows {
  Storage* out;
  std::int64_t ld, count;

  template <int kRows, int kCols>
  TORCH_SPE_INLINE void operator()(std::int64_t row, std::int64_t valid, std::int64_t column,
                                   const Vec<T> (&values)[kRows][kCols]) const {
    for (int t = 0; t < kRows; ++t) {
      if (t >= valid) break;
      T buffer[kCols * kLanes<T>];
      for (int v = 0; v < kCols; ++v) store_vec(buffer + v * kLanes<T>, values[t][v]);
      store_row(buffer, 1, min_of(kCols * kLanes<T>, count - column),
                out + (row + t) * ld + column);
    }
  }
};

// out = sum_d x_d codes_d
template <class Storage>
class Forward {
  using T = core::accumulate_t<Storage>;

 public:
  Forward(const ConvFilterParams& p, const Plan& plan)
      : p_(p),
        plan_(plan),
        ld_(column_distance<T>(p, plan)),
        codes_(p, plan),
        x_(p.in_features * ld_),
        y_(plan.chunk(p, 0).rows() * p.batch * kWidth<T>) {}

  void run(std::int64_t head, std::int64_t first, std::int64_t chunk) {
    const Box box = plan_.chunk(p_, chunk);
    const std::int64_t width = block_width<T>(p_.num_realizations, first),
                       features = p_.in_features;
    load_columns<Storage>(p_, box, p_.x, p_.x_strides, head, 0, features, ld_, x_.get());
    for (std::int64_t i = 0; i < box.rows() * p_.batch * width; ++i) y_[i] = 0;
    codes_.set_head(head);
    codes_.set_realizations(first, width);
    for (std::int64_t d0 = 0; d0 < features; d0 += plan_.group) {
      const std::int64_t d1 = min_of(d0 + plan_.group, features);
      codes_.set_noise(box, d0, d1 - d0);
      for_each_class(box, p_.generated.stride, [&](const PhaseClass& positions) {
        for (std::int64_t d = d0; d < d1; ++d) {
          codes_.set_feature(d, positions);
          codes_.make(AddEncoded<T>{x_ + d * ld_, y_, p_.batch, width});
        }
      });
    }
    store_tile<Storage>(p_, box, y_.get(), head, first, min_of(width, p_.num_realizations - first),
                        width, p_.num_realizations, p_.out);
  }

 private:
  const ConvFilterParams& p_;
  const Plan& plan_;
  const std::int64_t ld_;
  Codes<T> codes_;
  Workspace<T> x_;  // [D, rows, B], ld_ apart
  Workspace<T> y_;  // [rows, B, width]
};

template <class Storage>
void forward(const ConvFilterParams& p) {
  using T = core::accumulate_t<Storage>;
  // Fewer rows for large batches, and where there would be too little work for all threads. The
  // results do not depend on it.
  std::int64_t rows = max_of(kMinRows, min_of(kMaxRows, 4 * kMaxRows / p.batch));
  Plan plan = make_plan<T>(p, rows);
  while (rows > kMinRows && p.num_heads * plan.blocks * plan.chunks < 4 * p.num_threads) {
    rows /= 2;
    plan = make_plan<T>(p, rows);
  }
#pragma omp parallel num_threads(p.num_threads)
  {
    Forward<Storage> worker(p, plan);
#pragma omp for schedule(static)
    for (std::int64_t task = 0; task < p.num_heads * plan.blocks * plan.chunks; ++task) {
      const std::int64_t block = task / plan.chunks % plan.blocks;
      worker.run(task / plan.chunks / plan.blocks, block * kWidth<T>, task % plan.chunks);
    }
  }
}

// Gradients for one head and a group of features, over all positions: features share nothing, so
// nothing is added up between threads and no result depends on their order.
template <class Storage>
class Backward {
  using T = core::accumulate_t<Storage>;

 public:
  Backward(const ConvFilterBackwardParams& p, const Plan& plan)
      : p_(p),
        plan_(plan),
        ld_(column_distance<T>(p, plan)),
        codes_(p, plan),
        x_(plan.group * ld_),
        grad_x_(plan.group * ld_),
        g_(plan.chunk(p, 0).rows() * p.batch * kWidth<T>),
        grad_code_(plan.chunk(p, 0).rows() * kWidth<T>),
        partial_((plan.chunk(p, 0).rows() * p.batch + kLanes<T>)*kLanes<T>),
        grad_kernel_(plan.group * codes_.kernel_size()) {
    for (int i = 0; i < 3; ++i) {
      noise_size_[i] = p.size[i] + p.kernel_size[i] - 1;
      padded_size_[i] = p.size[i] + 2 * (p.kernel_size[i] - 1);
    }
  }

  void run(std::int64_t head, std::int64_t d0, std::int64_t count) {
    head_ = head;
    d0_ = d0;
    count_ = count;
    codes_.set_head(head);
    for (std::int64_t i = 0; i < count * codes_.kernel_size(); ++i) grad_kernel_[i] = 0;
    for (std::int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
      box_ = plan_.chunk(p_, chunk);
      load_columns<Storage>(p_, box_, p_.x, p_.x_strides, head, d0, count, ld_, x_.get());
      for (std::int64_t i = 0; i < count * ld_; ++i) grad_x_[i] = 0;
      for (std::int64_t block = 0; block < plan_.blocks; ++block) run_block(block * kWidth<T>);
      if (p_.grad_x != nullptr) {
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
    load_tile<Storage>(p_, box_, p_.grad_out, p_.grad_out_strides, head_, first,
                       min_of(width_, p_.num_realizations - first), width_, g_.get());
    codes_.set_realizations(first, width_);
    codes_.set_noise(box_, d0_, count_);
    for_each_class(box_, p_.generated.stride, [&](const PhaseClass& positions) {
      for (std::int64_t d = 0; d < count_; ++d) {
        codes_.set_feature(d0_ + d, positions);
        if (p_.grad_x != nullptr) {
          codes_.make(AddGradX<T>{g_, partial_, p_.batch, width_});
          add_grad_x(d, positions);
        }
        if (p_.grad_kernel == nullptr && p_.grad_constant == nullptr && p_.grad_noise == nullptr) {
          continue;
        }
        make_grad_code(d, positions);
        if (p_.grad_kernel != nullptr) {
          codes_.add_kernel_gradient(grad_code_, grad_kernel_ + d * codes_.kernel_size());
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
    const std::int64_t rows = codes_.kernel_rows(), ld = codes_.kernel_ld();
    const T* kernel = static_cast<const T*>(p_.kernel) +
                      (head_ * p_.in_features + d0_ + d) * rows * p_.kernel_size[2];
    Workspace<T> flipped(rows * ld);
    Workspace<std::int64_t> offsets(rows);
    for (std::int64_t i = 0; i < rows * ld; ++i) flipped[i] = 0;
    for (std::int64_t o = 0; o < rows; ++o) {
      for (std::int64_t i = 0; i < p_.kernel_size[2]; ++i) {
        flipped[o * ld + kPad + i] = kernel[(rows - o) * p_.kernel_size[2] - 1 - i];
      }
      offsets[o] = (o / p_.kernel_size[1] * padded_size_[1] + o % p_.kernel_size[1]) *
                   padded_size_[2] * width_;
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
      const DenseTaps<T> taps{flipped, zeros, p_.kernel_size[2], rows, ld, offsets};
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
    const std::int64_t taps = p_.kernel_size[2], rows = codes_.kernel_rows();
    T* grad = static_cast<T*>(p_.grad_kernel) + (head_ * p_.in_features + d0_) * rows * taps;
    const T scale = codes_.noise_scale();
    for (std::int64_t row = 0; row < count_ * rows; ++row) {
      for (std::int64_t i = 0; i < taps; ++i) {
        grad[row * taps + i] = grad_kernel_[row * codes_.kernel_ld() + kPad + i] * scale;
      }
    }
  }

  const ConvFilterBackwardParams& p_;
  const Plan& plan_;
  const std::int64_t ld_;
  Codes<T> codes_;
  Workspace<T> x_, grad_x_;   // [count, rows, B], ld_ apart
  Workspace<T> g_;            // [rows, B, width]
  Workspace<T> grad_code_;    // [rows, width], of one feature
  Workspace<T> partial_;      // [rows, B, lanes], of one feature
  Workspace<T> grad_kernel_;  // [count, P0 P1, kPad + P2 + kPad]
  std::int64_t noise_size_[3], padded_size_[3];
  // The task and the tile at hand.
  std::int64_t head_, d0_, count_, first_, width_;
  Box box_;
};

template <class Storage>
void backward(const ConvFilterBackwardParams& p) {
  using T = core::accumulate_t<Storage>;
  const std::int64_t all = p.size[0] * p.size[1] * p.size[2];
  const std::int64_t rows = max_of(kMinRows, min_of(kMaxRows, 4 * kMaxRows / p.batch));
  Plan plan = make_plan<T>(p, p.grad_noise != nullptr ? all : rows);
  // Small enough groups that a single head keeps several threads busy.
  plan.group = max_of(1, min_of(plan.group, p.num_heads * p.in_features / 16));
  const std::int64_t groups = (p.in_features + plan.group - 1) / plan.group;
#pragma omp parallel num_threads(p.num_threads)
  {
    Backward<Storage> worker(p, plan);
#pragma omp for schedule(static)
    for (std::int64_t task = 0; task < p.num_heads * groups; ++task) {
      const std::int64_t d0 = task % groups * plan.group;
      worker.run(task / groups, d0, min_of(plan.group, p.in_features - d0));
    }
  }
}

// The noise itself. One feature and one line of positions at a time.
template <class Storage>
void materialize(const ConvNoiseParams& p) {
  using T = core::accumulate_t<Storage>;
  const NoiseParams& g = p.generated;
  const std::int64_t (&s)[3] = g.stride;
  const std::int64_t classes = s[0] * s[1] * s[2];
  const T scale = static_cast<T>(__builtin_sqrt(static_cast<double>(classes)));
  const std::int64_t length = p.size[0] * p.size[1] * p.size[2];
  Storage* out = static_cast<Storage*>(p.out);
#pragma omp parallel for schedule(static) num_threads(p.num_threads)
  for (std::int64_t source = 0; source < p.num_heads * p.in_features; ++source) {
    const std::int64_t head = source / p.in_features, feature = source % p.in_features;
    std::int64_t shift[3] = {0, 0, 0};
    if (classes > 1) core::noise_shift(g.seed, g.ndim, head, feature, s, shift);
    const std::int64_t from = g.start[2] + shift[2];
    const std::int64_t period = core::floor_divide(from, s[2]);
    const std::int64_t periods = core::floor_divide(from + p.size[2] - 1, s[2]) - period + 1;
    Workspace<float> line(periods * kWidth<float> + kNoiseSlack);
    for (std::int64_t n = 0; n < length; n += p.size[2]) {
      const std::int64_t j0 = g.start[0] + shift[0] + n / p.size[2] / p.size[1];
      const std::int64_t j1 = g.start[1] + shift[1] + n / p.size[2] % p.size[1];
      for (std::int64_t first = 0; first < p.num_realizations; first += kWidth<float>) {
        const std::int64_t width = block_width<float>(p.num_realizations, first);
        const NoiseLine what{
            g.kind,  g.seed,  g.ndim,
            head,    feature, {core::floor_divide(j0, s[0]), core::floor_divide(j1, s[1]), period},
            periods, first,   width};
        if (g.kind == core::NoiseKind::kRademacher) {
          fill_signs(what, line.get());
        } else {
          fill_normals(what, line);
        }
        for (std::int64_t i = 0; i < p.size[2]; ++i) {
          const std::int64_t row = core::floor_divide(from + i, s[2]) - period;
          const std::int64_t here =
              (core::floor_modulo(j0, s[0]) * s[1] + core::floor_modulo(j1, s[1])) * s[2] +
              core::floor_modulo(from + i, s[2]);
          const std::int64_t end = min_of(first + width, p.num_realizations);
          Storage* to = out + (source * length + n + i) * p.num_realizations;
          for (std::int64_t r = first; r < end; ++r) core::store(T(0), to + r);
          for (std::int64_t r = first + core::floor_modulo(here - first, classes); r < end;
               r += classes) {
            core::store(static_cast<T>(line[row * width + r - first]) * scale, to + r);
          }
        }
      }
    }
  }
}

}  // namespace

void conv_filter_forward(const ConvFilterParams& p) {
  visit_storage(p.dtype, [&](auto storage) { forward<decltype(storage)>(p); });
}

void conv_filter_backward(const ConvFilterBackwardParams& p) {
  visit_storage(p.dtype, [&](auto storage) { backward<decltype(storage)>(p); });
}

void conv_noise(const ConvNoiseParams& p) {
  visit_storage(p.dtype, [&](auto storage) { materialize<decltype(storage)>(p); });
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
