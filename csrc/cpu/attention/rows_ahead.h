// Rows of the next chunk, asked for while the products of the chunk at hand run.
//
// The rows of a head lie apart, so the machine's own prefetching does not follow them, and a chunk
// that is loaded all at once waits for memory, which is idle during the products: that took half of
// the time of a long sequence. Nothing here changes a result.
#pragma once

#include "cpu/prefetch.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {

class RowsAhead {
 public:
  // Starts a chunk. What was asked for in the one before decides how much is asked for at a time.
  void start() {
    per_call_ = calls_ == 0 ? kFirstRows : (rows_ + calls_ - 1) / calls_;
    rows_ = calls_ = sets_ = set_ = row_ = 0;
  }

  // Rows of `columns` values, `stride` values apart, that will be read or written. Null adds none.
  template <class Storage>
  void add(const Storage* first, std::int64_t stride, std::int64_t rows, std::int64_t columns) {
    if (first == nullptr || sets_ == kMaxSets) return;
    constexpr std::int64_t size = static_cast<std::int64_t>(sizeof(Storage));
    sets_of_rows_[sets_++] = {reinterpret_cast<const char*>(first), stride * size, rows,
                              columns * size};
    rows_ += rows;
  }

  // Asks for some of them; products call it after each block. Inlined always: GCC drops calls of a
  // function that does nothing but prefetch.
  TORCH_SPE_INLINE void operator()() {
    ++calls_;
    for (std::int64_t i = 0; i < per_call_ && set_ < sets_; ++i) {
      const Rows& rows = sets_of_rows_[set_];
      prefetch_near(rows.first + row_ * rows.stride, 1, rows.bytes);
      if (++row_ == rows.count) ++set_, row_ = 0;
    }
  }

 private:
  struct Rows {
    const char* first;
    std::int64_t stride, count, bytes;
  };
  static constexpr std::int64_t kMaxSets = 8, kFirstRows = 4;

  Rows sets_of_rows_[kMaxSets];
  std::int64_t sets_ = 0, set_ = 0, row_ = 0;  // row_ of set_ is the next
  std::int64_t rows_ = 0, calls_ = 0, per_call_ = kFirstRows;
};

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
