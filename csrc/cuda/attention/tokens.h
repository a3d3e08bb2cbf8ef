// The tokens that kernels of linear attention read: sequences cut into chunks, and the queries or
// keys of a chunk with what belongs to them.
//
// Queries and keys play the same part in each other's gradients, so the kernels are written for two
// sets of tokens. Each token has features X, values Y and a weight w:
//   keys:    X = phi(k), Y = v,         w = 1
//   queries: X = phi(q), Y = grad_sums, w = grad_den
// where grad_sums and grad_den are the gradients of numerators and denominator. The state of a set
// is S = sum X^T Y and z = sum X w, over the tokens before a chunk (keys) or after it (queries)
// when causal, over all otherwise. With rows of one set and columns of the other, every result is
//   values:   X_row S + mask(X_row X_col^T) Y_col
//             (out before division, grad_v)
//   features: Y_row S^T + w_row z + mask(Y_row Y_col^T + w_row w_col) X_col
//             (gradients of phi)
// with the masked product over the row's own chunk, when causal. A denominator with features of its
// own is a pair of sets without values: z, w and X are those of the denominator there, and
// numerators have no weights.
#pragma once

#include "core/linear_attention.h"
#include "row_division.h"
#include "vector_product.h"

namespace torch_spe::cuda::attention {

template <class Operand>
constexpr int kChunk = sizeof(Operand) == 8 ? 32 : 64;  // tokens of a tile, and between two states
constexpr int kWide = 64;                               // features or values of a tile of results
constexpr int kDeep = 32;                               // of those that are summed over

// Tokens of a segment, when `rows` tiles of results have each of `length` tokens. Segments are made
// in parallel, as many as the device has places for `walking` blocks; the tokens of all but the
// last one are read once more, for the states in which segments start.
template <class Operand>
TORCH_SPE_INLINE std::int64_t segment_size(std::int64_t rows, std::int64_t length,
                                           std::int64_t walking = kWalkingBlocks) {
  constexpr std::int64_t kLeastChunks = 2;
  const std::int64_t segments = max_of(1, walking / max_of(1, rows));
  const std::int64_t chunks = ceil_div(length, kChunk<Operand>);
  return kChunk<Operand> * max_of(kLeastChunks, ceil_div(chunks, segments));
}

// The tokens of the sequences, cut into parts of `size`: chunks or segments. Parts have slots in
// order of the sequences. Packed sequences, whose bounds only the device knows, leave some slots
// empty: sequence s starts at slot cu_seqlens[s] / size + s, so that every part before it fits.
struct Cut {
  const std::int64_t* bounds;  // [sequences + 1] of packed sequences, or null
  std::int64_t sequences, length, size;

  TORCH_SPE_INLINE std::int64_t per_sequence() const { return ceil_div(length, size); }
  TORCH_SPE_INLINE std::int64_t slots() const {
    return bounds == nullptr ? sequences * per_sequence() : length / size + sequences;
  }
  TORCH_SPE_DEVICE std::int64_t first_slot(std::int64_t sequence) const {
    return bounds == nullptr ? sequence * per_sequence() : bounds[sequence] / size + sequence;
  }
  TORCH_SPE_DEVICE std::int64_t begin(std::int64_t sequence) const {
    return bounds == nullptr ? 0 : bounds[sequence];
  }
  TORCH_SPE_DEVICE std::int64_t length_of(std::int64_t sequence) const {
    return bounds == nullptr ? length : bounds[sequence + 1] - bounds[sequence];
  }
  // Whether no part comes after this one, or before it if backwards.
  TORCH_SPE_DEVICE bool is_last(std::int64_t sequence, std::int64_t number, bool backwards) const {
    return backwards ? number == 0 : (number + 1) * size >= length_of(sequence);
  }
  TORCH_SPE_DEVICE std::int64_t sequence_of(std::int64_t slot) const {
    if (bounds == nullptr) return slot / per_sequence();
    std::int64_t low = 0, high = sequences - 1;  // the last sequence that starts at or before slot
    while (low < high) {
      const std::int64_t middle = (low + high + 1) / 2;
      if (first_slot(middle) <= slot) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

// A chunk or segment of a sequence.
struct Part {
  std::int64_t sequence, batch;
  std::int64_t number;  // within the sequence
  std::int64_t begin;   // position of its first token in the batch row
  int size;             // tokens; 0 for an empty slot

  TORCH_SPE_DEVICE Part(const Cut& cut, std::int64_t slot)
      : sequence(cut.sequence_of(slot)),
        batch(cut.bounds == nullptr ? sequence : 0),
        number(slot - cut.first_slot(sequence)),
        begin(cut.begin(sequence) + number * cut.size),
        size(static_cast<int>(
            max_of(0, min_of(cut.size, cut.length_of(sequence) - number * cut.size)))) {}
};

// The factor of tokens that are not faded.
struct Unfaded {
  template <class T>
  TORCH_SPE_DEVICE T factor(int) const {
    return T(1);
  }
};

// Queries or keys.
template <class Storage>
struct Tokens {
  using T = core::accumulate_t<Storage>;
  const Storage* x = nullptr;       // [B, L, H, R]: q or k
  const Storage* y = nullptr;       // [B, L, H, E]: v, or the gradient of out
  const Storage* result = nullptr;  // [B, L, H, E]: out, where gradients of a norm need it, or null
  std::int64_t x_strides[4] = {}, y_strides[4] = {}, result_strides[4] = {};
  core::FeatureMap map = core::FeatureMap::kIdentity;
  // How X and Y are scaled, and the weights; null for keys and rows that were not divided.
  const RowFactors<T>* factors = nullptr;  // [B, L, H]
  bool weighted = false;                   // w is that of `factors`, else constant_weight
  T constant_weight = 0;
  const bool* padding = nullptr;  // [B, L], true where X and Y are 0, or null
  std::int64_t length = 0, heads = 0;
  bool x_aligned = false, y_aligned = false;

  TORCH_SPE_DEVICE bool is_padding(std::int64_t batch, std::int64_t n) const {
    return padding != nullptr && padding[batch * length + n];
  }
  TORCH_SPE_DEVICE std::int64_t index(std::int64_t batch, std::int64_t n, std::int64_t head) const {
    return (batch * length + n) * heads + head;
  }
  TORCH_SPE_DEVICE T weight_of(std::int64_t batch, std::int64_t n, std::int64_t head) const {
    return weighted ? factors[index(batch, n, head)].weight : constant_weight;
  }
  TORCH_SPE_DEVICE T scale_of(std::int64_t batch, std::int64_t n, std::int64_t head) const {
    return factors == nullptr ? T(1) : factors[index(batch, n, head)].scale;
  }

  // One element of X or Y.
  TORCH_SPE_DEVICE T x_at(std::int64_t batch, std::int64_t n, std::int64_t head,
                          std::int64_t r) const {
    if (is_padding(batch, n)) return T(0);
    const T value =
        read(x[batch * x_strides[0] + n * x_strides[1] + head * x_strides[2] + r * x_strides[3]]);
    return map_feature<Storage>(map, value) * scale_of(batch, n, head);
  }
  TORCH_SPE_DEVICE T y_at(std::int64_t batch, std::int64_t n, std::int64_t head,
                          std::int64_t e) const {
    if (is_padding(batch, n)) return T(0);
    const T value =
        read(y[batch * y_strides[0] + n * y_strides[1] + head * y_strides[2] + e * y_strides[3]]);
    if (factors == nullptr) return value;
    const RowFactors<T> own = factors[index(batch, n, head)];
    if (result == nullptr) return value * own.inverse;
    return own.before_norm(value, read(result[batch * result_strides[0] + n * result_strides[1] +
                                              head * result_strides[2] + e * result_strides[3]]));
  }

  // X of a chunk's tokens, features [r0, r0 + kColumns) of `count`, each token times its factor in
  // `fade`.
  template <int kRows, int kColumns, class Operand, class Fade = Unfaded>
  TORCH_SPE_DEVICE void load_x(const Part& chunk, std::int64_t head, std::int64_t r0,
                               std::int64_t count, Operand* out, const Fade& fade = Fade{}) const {
    const Storage* const base =
        x + chunk.batch * x_strides[0] + head * x_strides[2] + r0 * x_strides[3];
    const RowFactors<T>* const own = factors_of(chunk, head);
    const int own_stride = static_cast<int>(heads);
    const auto factor = [&](int row) {
      const T faded = fade.template factor<T>(row);
      return own == nullptr ? faded : own[row * own_stride].scale * faded;
    };
    if constexpr (std::is_same_v<Operand, Storage> && sizeof(Storage) == 2) {
      if (has_whole_x<kRows, kColumns>(chunk, r0, count)) {
        map_pairs(factor, [&](const auto& make) {
          load_whole<kRows, kColumns>(base + chunk.begin * x_strides[1], x_strides[1], out, make);
        });
        return;
      }
    }
    load_tile<kRows, kColumns, Storage>(
        out, count - r0, x_strides[3], x_aligned,
        [&](int row) {
          return row < chunk.size && !is_padding(chunk.batch, chunk.begin + row)
                     ? base + (chunk.begin + row) * x_strides[1]
                     : nullptr;
        },
        [&](int row, T value) { return map_feature<Storage>(map, value) * factor(row); });
  }

  // x of a chunk's tokens as it is, features [r0, r0 + kColumns) of `count`; the copy may go on
  // until copy_async_wait.
  template <int kRows, int kColumns>
  TORCH_SPE_DEVICE void copy_x(const Part& chunk, std::int64_t head, std::int64_t r0,
                               std::int64_t count, Storage* out) const {
    const Storage* const base = x + chunk.batch * x_strides[0] + chunk.begin * x_strides[1] +
                                head * x_strides[2] + r0 * x_strides[3];
    if constexpr (sizeof(Storage) == 2) {
      if (has_whole_x<kRows, kColumns>(chunk, r0, count))
        return copy_whole<kRows, kColumns>(base, x_strides[1], out);
    }
    copy_tile<kRows, kColumns, Storage>(out, count - r0, x_strides[3], x_aligned, [&](int row) {
      return row < chunk.size ? base + row * x_strides[1] : nullptr;
    });
  }

  // What load_x makes, in two parts: a whole tile is copied until copy_async_wait, after which
  // finish_x, before a barrier, maps what the thread itself has copied; any other tile is loaded
  // at once.
  template <int kRows, int kColumns>
  TORCH_SPE_DEVICE void begin_x(const Part& chunk, std::int64_t head, std::int64_t r0,
                                std::int64_t count, Storage* out) const {
    if (has_whole_x<kRows, kColumns>(chunk, r0, count)) {
      copy_whole<kRows, kColumns>(x + chunk.batch * x_strides[0] + chunk.begin * x_strides[1] +
                                      head * x_strides[2] + r0 * x_strides[3],
                                  x_strides[1], out);
    } else {
      load_x<kRows, kColumns>(chunk, head, r0, count, out);
    }
  }
  template <int kRows, int kColumns>
  TORCH_SPE_DEVICE void finish_x(const Part& chunk, std::int64_t head, std::int64_t r0,
                                 std::int64_t count, Storage* out) const {
    finish_x<kRows, kColumns>(chunk, r0, count, out, factors_of(chunk, head),
                              static_cast<int>(heads));
  }
  // The same with the factors of the chunk's tokens, `stride` apart, or null.
  template <int kRows, int kColumns>
  TORCH_SPE_DEVICE void finish_x(const Part& chunk, std::int64_t r0, std::int64_t count,
                                 Storage* out, const RowFactors<T>* own, int stride = 1) const {
    if (!has_whole_x<kRows, kColumns>(chunk, r0, count)) return;
    if (map == core::FeatureMap::kIdentity && own == nullptr) return;
    const auto change = [&](const auto& make) { change_whole<kRows, kColumns>(out, make); };
    if (own == nullptr) {  // the factor 1 costs nothing then
      map_pairs([](int) { return T(1); }, change);
    } else {
      map_pairs([&](int row) { return own[row * stride].scale; }, change);
    }
  }

  // Y of a chunk's tokens, values [e0, e0 + kColumns) of `count`.
  template <int kRows, int kColumns, class Operand>
  TORCH_SPE_DEVICE void load_y(const Part& chunk, std::int64_t head, std::int64_t e0,
                               std::int64_t count, Operand* out) const {
    const Storage* const base =
        y + chunk.batch * y_strides[0] + head * y_strides[2] + e0 * y_strides[3];
    const RowFactors<T>* const own = factors_of(chunk, head);
    if (result != nullptr) {
      const Storage* const base_of_result =
          result + chunk.batch * result_strides[0] + head * result_strides[2];
      TORCH_SPE_UNROLL_TWICE
      for (int i = static_cast<int>(threadIdx.x); i < kRows * kColumns; i += kThreads) {
        const int row = i / kColumns, column = i % kColumns;
        T value = 0;
        if (row < chunk.size && e0 + column < count) {
          const std::int64_t n = chunk.begin + row;
          const RowFactors<T> factor = own[row * heads];
          value = factor.before_norm(
              read(base[n * y_strides[1] + column * y_strides[3]]),
              read(base_of_result[n * result_strides[1] + (e0 + column) * result_strides[3]]));
        }
        write(value, out + row * row_of<Operand>(kColumns) + column);
      }
      return;
    }
    if constexpr (std::is_same_v<Operand, Storage> && sizeof(Storage) == 2) {
      if (has_whole_y<kRows, kColumns>(chunk, e0, count)) {
        load_whole<kRows, kColumns>(base + chunk.begin * y_strides[1], y_strides[1], out,
                                    divided_pairs(own, static_cast<int>(heads)));
        return;
      }
    }
    load_tile<kRows, kColumns, Storage>(
        out, count - e0, y_strides[3], y_aligned,
        [&](int row) {
          return row < chunk.size && !is_padding(chunk.batch, chunk.begin + row)
                     ? base + (chunk.begin + row) * y_strides[1]
                     : nullptr;
        },
        [&](int row, T value) {
          return own == nullptr ? value : value * own[row * heads].inverse;
        });
  }

  // What load_y makes, in the same two parts.
  template <int kRows, int kColumns>
  TORCH_SPE_DEVICE void begin_y(const Part& chunk, std::int64_t head, std::int64_t e0,
                                std::int64_t count, Storage* out) const {
    if (result == nullptr && has_whole_y<kRows, kColumns>(chunk, e0, count)) {
      copy_whole<kRows, kColumns>(y + chunk.batch * y_strides[0] + chunk.begin * y_strides[1] +
                                      head * y_strides[2] + e0 * y_strides[3],
                                  y_strides[1], out);
    } else {
      load_y<kRows, kColumns>(chunk, head, e0, count, out);
    }
  }
  template <int kRows, int kColumns>
  TORCH_SPE_DEVICE void finish_y(const Part& chunk, std::int64_t head, std::int64_t e0,
                                 std::int64_t count, Storage* out) const {
    finish_y<kRows, kColumns>(chunk, e0, count, out, factors_of(chunk, head),
                              static_cast<int>(heads));
  }
  template <int kRows, int kColumns>
  TORCH_SPE_DEVICE void finish_y(const Part& chunk, std::int64_t e0, std::int64_t count,
                                 Storage* out, const RowFactors<T>* own, int stride = 1) const {
    if (own == nullptr || result != nullptr || !has_whole_y<kRows, kColumns>(chunk, e0, count))
      return;
    change_whole<kRows, kColumns>(out, divided_pairs(own, stride));
  }

 private:
  TORCH_SPE_DEVICE const RowFactors<T>* factors_of(const Part& chunk, std::int64_t head) const {
    return factors == nullptr ? nullptr : factors + index(chunk.batch, chunk.begin, head);
  }

  // Whether nothing of a chunk's tile is zero for being padding or behind the end, and rows can be
  // read 16 bytes at once.
  template <int kRows, int kColumns>
  TORCH_SPE_DEVICE bool has_whole_x(const Part& chunk, std::int64_t r0, std::int64_t count) const {
    return chunk.size == kRows && padding == nullptr && x_aligned && r0 + kColumns <= count;
  }
  template <int kRows, int kColumns>
  TORCH_SPE_DEVICE bool has_whole_y(const Part& chunk, std::int64_t e0, std::int64_t count) const {
    return chunk.size == kRows && padding == nullptr && y_aligned && e0 + kColumns <= count;
  }

  // Calls call(make) with what maps the pairs of a row and multiplies them by factor(row).
  template <class Factor, class Call>
  TORCH_SPE_DEVICE void map_pairs(const Factor& factor, const Call& call) const {
    if (map == core::FeatureMap::kElu) {
      call([&](int row, auto& pairs) {
        const T times = factor(row);
        TORCH_SPE_UNROLL
        for (std::uint32_t& pair : pairs) {
          T low, high;
          map_elu_pair<Storage>(pair, &low, &high);
          pair = pack_pair<Storage>(low * times, high * times);
        }
      });
    } else {
      const bool is_relu = map == core::FeatureMap::kRelu;
      call([&](int row, auto& pairs) {
        const T times = factor(row);
        TORCH_SPE_UNROLL
        for (std::uint32_t& pair : pairs)
          pair = multiply_pair(is_relu ? map_relu_pair(pair) : pair, times);
      });
    }
  }
  // What divides the pairs of a row, given the factors of the first one.
  TORCH_SPE_DEVICE static auto divided_pairs(const RowFactors<T>* own, int stride) {
    return [own, stride](int row, auto& pairs) {
      if (own == nullptr) return;
      const T inverse = own[row * stride].inverse;
      TORCH_SPE_UNROLL
      for (std::uint32_t& pair : pairs) pair = multiply_pair(pair, inverse);
    };
  }

  // A whole tile of 16-bit elements as threads share it, 8 of a row at once.
  struct alignas(16) Eight {
    std::uint32_t pairs[4];
  };
  template <int kRows, int kColumns>
  struct Whole {
    static constexpr int kVectors = kColumns / 8, kStep = kThreads / kVectors;
    static constexpr int kCount = kRows / kStep, kRow = row_of<Storage>(kColumns);
    static_assert(kRows % kStep == 0);
    const int thread = thread_read_again();
    const int row = thread / kVectors, column = thread % kVectors * 8;
  };
  // Loads a whole tile; make(row, pairs) replaces its elements.
  template <int kRows, int kColumns, class Make>
  TORCH_SPE_DEVICE static void load_whole(const Storage* from, std::int64_t stride, Storage* out,
                                          const Make& make) {
    using Shares = Whole<kRows, kColumns>;
    const Shares own;
    Eight eights[Shares::kCount];
    from += own.row * stride + own.column;
    TORCH_SPE_UNROLL
    for (int i = 0; i < Shares::kCount; ++i, from += Shares::kStep * stride)
      eights[i] = *reinterpret_cast<const Eight*>(from);
    out += own.row * Shares::kRow + own.column;
    TORCH_SPE_UNROLL
    for (int i = 0; i < Shares::kCount; ++i) {
      make(own.row + i * Shares::kStep, eights[i].pairs);
      *reinterpret_cast<Eight*>(out + i * Shares::kStep * Shares::kRow) = eights[i];
    }
  }
  // Starts to copy a whole tile, and changes what the thread has copied.
  template <int kRows, int kColumns>
  TORCH_SPE_DEVICE static void copy_whole(const Storage* from, std::int64_t stride, Storage* out) {
    using Shares = Whole<kRows, kColumns>;
    const Shares own;
    from += own.row * stride + own.column;
    out += own.row * Shares::kRow + own.column;
    TORCH_SPE_UNROLL
    for (int i = 0; i < Shares::kCount; ++i, from += Shares::kStep * stride)
      copy_async16(out + i * Shares::kStep * Shares::kRow, from);
  }
  template <int kRows, int kColumns, class Make>
  TORCH_SPE_DEVICE static void change_whole(Storage* out, const Make& make) {
    using Shares = Whole<kRows, kColumns>;
    const Shares own;
    out += own.row * Shares::kRow + own.column;
    TORCH_SPE_UNROLL
    for (int i = 0; i < Shares::kCount; ++i) {
      Eight& eight = *reinterpret_cast<Eight*>(out + i * Shares::kStep * Shares::kRow);
      Eight changed = eight;
      make(own.row + i * Shares::kStep, changed.pairs);
      eight = changed;
    }
  }
  TORCH_SPE_DEVICE static std::uint32_t multiply_pair(std::uint32_t pair, float factor) {
    float low, high;
    unpack_pair<Storage>(pair, &low, &high);
    return pack_pair<Storage>(low * factor, high * factor);
  }
};

}  // namespace torch_spe::cuda::attention
