// Codes of the convolution filter, feature by feature, and the gradient of the kernel.
// Included by kernels only, like simd.h.
#pragma once

#include "cpu/encode/conv_tables.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

// Scratch memory of one thread for the slots of polyphase noise, of several features.
template <class T>
struct ConvSlots {
  ConvSlots(const ConvTables<T>& tables, std::int64_t features)
      : max_slots(tables.dense() ? 0 : tables.max_slots()),
        taps(tables.contiguous() ? 0 : features * max_slots * kWidth<T>),
        index(features * max_slots * kVecs),
        offsets(features * max_slots),
        lags(features * max_slots * 3) {}

  std::int64_t max_slots;
  Workspace<T> taps;                // [slots, kWidth], unless they stand in the kernel so
  Workspace<std::int64_t> index;    // [slots, kVecs]
  Workspace<std::int64_t> offsets;  // [slots]
  Workspace<std::int64_t> lags;     // [slots, 3]
};

// The codes of a feature at a class of positions, for the realizations, noise and box in the
// tables. Valid until the tables are loaded or the slots are used again.
template <class T>
class ConvFeatureCodes {
 public:
  ConvFeatureCodes(const ConvTables<T>& tables, const ConvSlots<T>& scratch, std::int64_t place,
                   std::int64_t d, const PhaseClass& positions)
      : tables_(tables),
        p_(tables.params()),
        plan_(tables.plan()),
        dense_(tables.dense()),
        width_(tables.width()),
        kernel_rows_(tables.kernel_rows()),
        kernel_ld_(tables.kernel_ld()),
        kernel_(tables.kernel(d)),
        constants_(tables.constants(d)),
        noise_(tables.noise(d)),
        sums_(tables.sums(d)),
        slot_taps_(tables.contiguous() ? nullptr
                                       : scratch.taps + place * scratch.max_slots * kWidth<T>),
        slot_index_(scratch.index + place * scratch.max_slots * kVecs),
        slot_offsets_(scratch.offsets + place * scratch.max_slots),
        slot_lags_(scratch.lags + place * scratch.max_slots * 3),
        class_(positions) {
    std::int64_t phase[3];
    for (int i = 0; i < 3; ++i) {
      const std::int64_t stride = p_.generated.stride[i];
      phase[i] = tables.phases(d)[i] + positions.residue[i];  // less than twice the stride
      period_[i] = phase[i] >= stride ? 1 : 0;
      phase[i] -= period_[i] * stride;
    }
    if (!dense_) make_slots(phase);
  }

  // Gives the codes of the class to consume(row, valid, column, codes).
  template <class Consumer>
  TORCH_SPE_INLINE void make(Consumer consume) const {
    const T* init = constants_;
    const DenseTaps<T> dense{
        kernel_, init, plan_.part_taps, kernel_rows_, kernel_ld_, tables_.dense_offsets(), width_};
    const PhaseTaps<T> phase = phase_taps();
    for_each_run([&](std::int64_t row, const T* z, std::int64_t count) {
      if (plan_.split()) {
        make_split_codes(dense, kernel_rows_ * kernel_ld_, split_rows(z), plan_.lead, count,
                         consume);
      } else if (dense_) {
        make_codes(dense, z, width_, row, count, consume);
      } else {
        make_codes(phase, z, width_, row, count, consume);
      }
    });
  }

  // Polyphase noise: the taps, and the noise of the class's first row.
  PhaseTaps<T> phase_taps() const {
    bool in_line = slots_ > 0;
    for (std::int64_t i = 1; i < slots_; ++i)
      in_line = in_line && slot_offsets_[i] == slot_offsets_[i - 1] + width_;
    return {tables_.contiguous() ? kernel_ : slot_taps_,
            constants_,
            slots_,
            slot_index_,
            slot_offsets_,
            in_line};
  }
  const T* first_noise() const {
    return noise_ +
           ((period_[0] * plan_.periods[1] + period_[1]) * plan_.periods[2] + period_[2]) * width_;
  }

  // Adds the gradient of the kernel, laid out as its copy and not yet times the square root of the
  // strides, given that of the codes, [rows, width], with its sums if they are split.
  void add_kernel_gradient(const SplitRows<T>& grad_codes, T* grad_kernel) const {
    const T* grad_code = grad_codes.rows;
    if (!dense_) {
      std::int64_t slot = 0;
      for (; slot + kPhaseTaps <= slots_; slot += kPhaseTaps) {
        add_slots<kPhaseTaps>(grad_code, slot, grad_kernel);
      }
      for (; slot < slots_; ++slot) add_slots<1>(grad_code, slot, grad_kernel);
      return;
    }
    for (int part = 0; part < plan_.parts; ++part) {
      for (std::int64_t o = 0; o < kernel_rows_; ++o) {
        T* row = grad_kernel + (part * kernel_rows_ + o) * kernel_ld_ + kPad;
        for (std::int64_t column = 0; column < width_; column += kLanes<T>) {
          std::int64_t tap = 0;
          for (; tap + kDenseTaps <= plan_.part_taps; tap += kDenseTaps) {
            add_dense_taps<kDenseTaps>(grad_codes, part, column, o, tap, row);
          }
          for (; tap < plan_.part_taps; ++tap) {
            add_dense_taps<1>(grad_codes, part, column, o, tap, row);
          }
        }
      }
    }
  }

 private:
  // A line of the noise with its sums.
  SplitRows<T> split_rows(const T* z) const {
    return {z, sums_ + (z - noise_) / kSplit, width_, tables_.sums_size()};
  }

  // Calls function(row, z, count) for runs of rows of the class along the last dimension, with the
  // noise of their first period.
  template <class Function>
  TORCH_SPE_INLINE void for_each_run(const Function& function) const {
    const T* z = noise_;
    for (std::int64_t m0 = 0; m0 < class_.count[0]; ++m0) {
      for (std::int64_t m1 = 0; m1 < class_.count[1]; ++m1) {
        const std::int64_t line = (period_[0] + m0) * plan_.periods[1] + period_[1] + m1;
        function(class_.row + (m0 * class_.count[1] + m1) * class_.count[2],
                 z + (line * plan_.periods[2] + period_[2]) * width_, class_.count[2]);
      }
    }
  }

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
  // The slots in which any realization has a tap in the kernel. In slot e of a dimension class c
  // has the tap c - phase + e s, on the noise of e periods after the row's.
  void make_slots(const std::int64_t phase[3]) {
    const std::int64_t (&s)[3] = p_.generated.stride;
    const std::int64_t (&size)[3] = p_.kernel_size;
    slots_ = 0;
    for (std::int64_t e0 = 0; e0 * s[0] < size[0] + phase[0]; ++e0) {
      for (std::int64_t e1 = 0; e1 * s[1] < size[1] + phase[1]; ++e1) {
        for (std::int64_t e2 = 0; e2 * s[2] < size[2] + phase[2]; ++e2) {
          const std::int64_t lag[3] = {e0 * s[0] - phase[0], e1 * s[1] - phase[1],
                                       e2 * s[2] - phase[2]};
          if (!make_taps(lag)) continue;
          for (int i = 0; i < 3; ++i) slot_lags_[slots_ * 3 + i] = lag[i];
          slot_offsets_[slots_] = ((e0 * plan_.periods[1] + e1) * plan_.periods[2] + e2) * width_;
          ++slots_;
        }
      }
    }
  }

  // The taps of a slot; false if none lies in the kernel.
  bool make_taps(const std::int64_t lag[3]) {
    if (tables_.in_a_line()) return make_taps_in_a_line(lag[2]);
    bool any = false;
    std::int64_t index[kVecs] = {};
    for (int v = 0; v * kLanes<T> < width_; ++v) {
      const std::int64_t* classes = tables_.classes(v * kLanes<T>);
      if (tables_.contiguous()) {
        any |= tap_index(lag, classes, kLanes<T>, &index[v]);
        continue;
      }
      index[v] = slots_ * kWidth<T> + v * kLanes<T>;
      for (std::int64_t lane = 0; lane < kLanes<T>; ++lane) {
        std::int64_t from;
        any |= tap_index(lag, classes + lane * 3, 1, &from);
        slot_taps_[index[v] + lane] = kernel_[from];
      }
    }
    for (int v = 0; v < kVecs; ++v) slot_index_[slots_ * kVecs + v] = index[v];
    return any;
  }

  // The same along one dimension, where all taps of a vector stand in the kernel one after the
  // other.
  bool make_taps_in_a_line(std::int64_t lag) {
    bool any = false;
    for (int v = 0; v < kVecs; ++v) {
      std::int64_t& index = slot_index_[slots_ * kVecs + v];
      index = 0;
      if (v * kLanes<T> >= width_) continue;
      const std::int64_t tap = tables_.classes(v * kLanes<T>)[2] + lag;
      if (tap + kLanes<T> <= 0 || tap >= p_.kernel_size[2]) continue;
      index = kPad + tap;
      any = true;
    }
    return any;
  }

  template <int kTaps>
  void add_dense_taps(const SplitRows<T>& grad_codes, int part, std::int64_t column,
                      std::int64_t row, std::int64_t tap, T* grad_kernel) const {
    Vec<T> sums[kTaps] = {};
    const std::int64_t offset = tables_.dense_offsets()[row] + tap;
    for_each_run([&](std::int64_t first, const T* z, std::int64_t count) {
      if (plan_.split()) {
        const SplitRows<T> noise = split_rows(z);
        const int of_noise = kNoiseParts[part], of_codes = kCodeParts[part];
        const std::int64_t z_step = noise.step(of_noise), g_step = grad_codes.step(of_codes);
        correlate_dense(grad_codes.part(of_codes) + column, g_step,
                        noise.part(of_noise) + offset * z_step + column, z_step,
                        plan_.part_rows(count), sums);
      } else {
        correlate_dense(grad_codes.rows + first * width_ + column, width_,
                        z + offset * width_ + column, width_, count, sums);
      }
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
      correlate_slots(grad_code + first * width_ + column, z + column, slot_offsets_ + slot, width_,
                      count, sums);
    });
    for (int i = 0; i < kTaps; ++i) {
      const std::int64_t* lag = slot_lags_ + (slot + i) * 3;
      for (int v = 0; v < kCols; ++v) {
        const std::int64_t* classes = tables_.classes(column + v * kLanes<T>);
        std::int64_t index;
        if (tables_.contiguous()) {
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

  const ConvTables<T>& tables_;
  const core::ConvFilterParams& p_;
  const ConvPlan& plan_;
  const bool dense_;
  const std::int64_t width_, kernel_rows_, kernel_ld_;
  const T* const kernel_;     // [P0 P1, kPad + P2 + kPad]
  const T* const constants_;  // [width]
  const T* const noise_;      // [periods, width]
  const T* const sums_;       // of the noise
  T* const slot_taps_;        // in the scratch memory
  std::int64_t* const slot_index_;
  std::int64_t* const slot_offsets_;
  std::int64_t* const slot_lags_;
  const PhaseClass class_;
  std::int64_t period_[3];  // of the class's first row, from the window's
  std::int64_t slots_ = 0;
};

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
