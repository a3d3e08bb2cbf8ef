// Queries and keys play the same part in each other's gradients, so the kernels are written for two
// "sides". Each token of a side has features X, values Y and a weight w:
//   keys:    X = phi(k), Y = v,           w = 1
//   queries: X = phi(q), Y = grad_num,    w = grad_den
// where grad_num and grad_den are the gradients of numerator and denominator. A side's state is
// S = sum X^T Y and z = sum X w, over the tokens before a chunk (keys) or after it (queries) when
// causal, over all otherwise. With rows on one side and columns on the other, every result is
//   values:   X_row S + mask(X_row X_col^T) Y_col
//             (out before division, grad_v)
//   features: Y_row S^T + w_row z + mask(Y_row Y_col^T + w_row w_col) X_col
//             (gradients of phi)
// with the masked product over the row's own chunk, when causal.
#include "device_for.h"
#include "linear_attention.h"
#include "tiles.h"

namespace torch_spe::cuda {
namespace {

using core::FeatureMap;

template <class Operand>
constexpr int kChunk = sizeof(Operand) == 8 ? 32 : 64;  // tokens of a tile, and between two states
constexpr int kWide = 64;                               // features or values of a tile of results
constexpr int kDeep = 32;                               // of those that are summed over

// Tokens between two states that are added up one after the other; states of segments are made in
// parallel.
template <class Operand>
constexpr std::int64_t kSegment = kChunksOfSegment * kChunk<Operand>;

// phi(x) of numbers of a storage type; for 16 bits the hardware's exponential is precise enough.
template <class Storage, class T>
TORCH_SPE_DEVICE T feature_map(FeatureMap map, T x) {
  if constexpr (sizeof(Storage) == 2) {  // without branches
    const T positive = x < T(0) ? T(0) : x, decayed = fast_exp(x > T(0) ? T(0) : x);
    const T elu = positive + decayed;
    return map == FeatureMap::kElu ? elu : map == FeatureMap::kRelu ? positive : x;
  }
  switch (map) {
    case FeatureMap::kElu:
      return core::apply_feature_map<FeatureMap::kElu>(x);
    case FeatureMap::kRelu:
      return core::apply_feature_map<FeatureMap::kRelu>(x);
    case FeatureMap::kIdentity:
      break;
  }
  return x;
}

// phi'(x), given phi(x).
template <class T>
TORCH_SPE_DEVICE T feature_map_derivative(FeatureMap map, T phi) {
  switch (map) {
    case FeatureMap::kElu:
      return core::feature_map_derivative<FeatureMap::kElu>(phi);
    case FeatureMap::kRelu:
      return core::feature_map_derivative<FeatureMap::kRelu>(phi);
    case FeatureMap::kIdentity:
      break;
  }
  return T(1);
}

// The tokens of the sequences, cut into pieces of `size`. Pieces have slots in order of the
// sequences. Packed sequences, whose bounds only the device knows, leave some slots empty: sequence
// s starts at slot cu_seqlens[s] / size + s, which leaves room for every piece before it.
struct Pieces {
  const std::int64_t* bounds;  // of packed sequences, or null
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

// A piece of a sequence.
struct Piece {
  std::int64_t sequence, batch;
  std::int64_t number;  // within the sequence
  std::int64_t begin;   // position of its first token in the batch row
  int size;             // tokens; 0 for an empty slot

  TORCH_SPE_DEVICE Piece(const Pieces& pieces, std::int64_t slot)
      : sequence(pieces.sequence_of(slot)),
        batch(pieces.bounds == nullptr ? sequence : 0),
        number(slot - pieces.first_slot(sequence)),
        begin(pieces.begin(sequence) + number * pieces.size),
        size(static_cast<int>(
            max_of(0, min_of(pieces.size, pieces.length_of(sequence) - number * pieces.size)))) {}
};

template <class Storage>
struct Side {
  using T = core::accumulate_t<Storage>;
  const Storage* x = nullptr;  // [B, L, H, R]: q or k
  const Storage* y = nullptr;  // [B, L, H, E]: v, or the gradient of out
  std::int64_t x_strides[4] = {}, y_strides[4] = {};
  FeatureMap map = FeatureMap::kIdentity;
  const T* scale = nullptr;   // [B, L, H], factors of y, or null for 1
  const T* weight = nullptr;  // [B, L, H]: w, or null for constant_weight
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
    return weight == nullptr ? constant_weight : weight[index(batch, n, head)];
  }

  // X of a chunk's tokens, features [r0, r0 + kColumns) of `count`.
  template <int kRows, int kColumns, class Operand>
  TORCH_SPE_DEVICE void load_x(const Piece& chunk, std::int64_t head, std::int64_t r0,
                               std::int64_t count, Operand* out) const {
    const Storage* const base =
        x + chunk.batch * x_strides[0] + head * x_strides[2] + r0 * x_strides[3];
    load_tile<kRows, kColumns, Storage>(
        out, count - r0, x_strides[3], x_aligned,
        [&](int row) {
          return row < chunk.size && !is_padding(chunk.batch, chunk.begin + row)
                     ? base + (chunk.begin + row) * x_strides[1]
                     : nullptr;
        },
        [&](int, T value) { return feature_map<Storage>(map, value); });
  }

  // Y of a chunk's tokens, values [e0, e0 + kColumns) of `count`.
  template <int kRows, int kColumns, class Operand>
  TORCH_SPE_DEVICE void load_y(const Piece& chunk, std::int64_t head, std::int64_t e0,
                               std::int64_t count, Operand* out) const {
    const Storage* const base =
        y + chunk.batch * y_strides[0] + head * y_strides[2] + e0 * y_strides[3];
    load_tile<kRows, kColumns, Storage>(
        out, count - e0, y_strides[3], y_aligned,
        [&](int row) {
          return row < chunk.size && !is_padding(chunk.batch, chunk.begin + row)
                     ? base + (chunk.begin + row) * y_strides[1]
                     : nullptr;
        },
        [&](int row, T value) {
          return scale == nullptr ? value
                                  : value * scale[index(chunk.batch, chunk.begin + row, head)];
        });
  }
};

// Sizes, and the states of a side as its scratch memory holds them.
template <class T>
struct States {
  std::int64_t heads = 0, real = 0, values = 0;  // H, R, E
  // Before (after) each chunk since its segment's start (end); when causal.
  T* chunk_s = nullptr;  // [slot, H, R, E]
  T* chunk_z = nullptr;  // [slot, H, R]
  // Sums of each segment, then the state at its start (end), initial state included.
  T* segment_s = nullptr;  // [slot, H, R, E]
  T* segment_z = nullptr;  // [slot, H, R]
  // Of the whole sequence, initial state included.
  const T* total_s = nullptr;  // [S, H, R, E]
  const T* total_z = nullptr;  // [S, H, R]
};

// Reads the state that belongs to a row's chunk: a sum of two.
template <class T>
struct StateReader {
  const T *s_first, *s_second, *z_first, *z_second;
  std::int64_t real, values;
  bool aligned;

  TORCH_SPE_DEVICE StateReader(const States<T>& states, bool causal, const Pieces& chunks,
                               const Pieces& segments, std::int64_t slot, const Piece& chunk,
                               std::int64_t head)
      : real(states.real), values(states.values) {
    const std::int64_t size = states.real * states.values;
    if (causal) {
      const std::int64_t a = slot * states.heads + head;
      const std::int64_t segment =
          segments.first_slot(chunk.sequence) + chunk.number * chunks.size / segments.size;
      const std::int64_t b = segment * states.heads + head;
      s_first = states.chunk_s + a * size;
      z_first = states.chunk_z + a * states.real;
      s_second = states.segment_s + b * size;
      z_second = states.segment_z + b * states.real;
    } else {
      const std::int64_t a = chunk.sequence * states.heads + head;
      s_first = states.total_s + a * size;
      z_first = states.total_z + a * states.real;
      s_second = z_second = nullptr;
    }
    aligned = rows_are_aligned<T>(s_first, values) && rows_are_aligned<T>(s_second, values);
  }
  // S[r, e .. e + 3], 0 outside.
  TORCH_SPE_DEVICE void s(std::int64_t r, std::int64_t e, T (&out)[4]) const {
    TORCH_SPE_UNROLL
    for (int i = 0; i < 4; ++i) out[i] = 0;
    if (r < real) {
      add(s_first + r * values + e, e, out);
      if (s_second != nullptr) add(s_second + r * values + e, e, out);
    }
  }
  TORCH_SPE_DEVICE T z(std::int64_t r) const {
    return z_second == nullptr ? z_first[r] : z_first[r] + z_second[r];
  }

 private:
  TORCH_SPE_DEVICE void add(const T* from, std::int64_t e, T (&out)[4]) const {
    if (aligned && e + 4 <= values) {
      struct alignas(16) Four {
        T numbers[4];
      };
      const Four four = *reinterpret_cast<const Four*>(from);
      TORCH_SPE_UNROLL
      for (int i = 0; i < 4; ++i) out[i] += four.numbers[i];
    } else {
      TORCH_SPE_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (e + i < values) out[i] += from[i];
      }
    }
  }
};

// Fills a tile of a state with operands; numbers(row, column, out) gives four of a row.
template <int kRows, int kColumns, class Operand, class Numbers>
TORCH_SPE_DEVICE void load_state(Operand* out, const Numbers& numbers) {
  constexpr int kRow = row_of<Operand>(kColumns), kFours = kColumns / 4;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kFours; i += kThreads) {
    core::accumulate_t<Operand> four[4];
    numbers(i / kFours, i % kFours * 4, four);
    write_operands(four, out + i / kFours * kRow + i % kFours * 4);
  }
}

// The states of one side: a block adds up a tile of S over a segment and, when causal, writes what
// it has before each chunk.
template <class Operand>
struct StateShared {
  using T = core::accumulate_t<Operand>;
  Operand* x;  // [token, r]
  Operand* y;  // [token, e]
  T* weight;   // [token]

  TORCH_SPE_INLINE explicit StateShared(Carver& carver)
      : x(carver.take<Operand>(kChunk<Operand> * row_of<Operand>(kWide))),
        y(carver.take<Operand>(kChunk<Operand> * row_of<Operand>(kWide))),
        weight(carver.take<T>(kChunk<Operand>)) {}
};

template <class Storage, class Operand>
__global__ void __launch_bounds__(kThreads)
    state_kernel(const Side<Storage> side, const Pieces chunks, const Pieces segments, bool causal,
                 bool backwards, const States<core::accumulate_t<Storage>> states) {
  using T = core::accumulate_t<Storage>;
  constexpr int kTokens = kChunk<Operand>;
  TORCH_SPE_SHARED_MEMORY(memory);
  Carver carver(memory);
  const StateShared<Operand> shared(carver);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t real = states.real, values = states.values;
  const std::int64_t tiles_r = ceil_div(real, kWide), tiles_e = ceil_div(values, kWide);
  const std::int64_t block = blockIdx.x;
  const std::int64_t e0 = block % tiles_e * kWide;
  const std::int64_t r0 = block / tiles_e % tiles_r * kWide;
  const std::int64_t head = block / tiles_e / tiles_r % states.heads;
  const std::int64_t segment_slot = block / tiles_e / tiles_r / states.heads;
  const Piece segment(segments, segment_slot);
  if (segment.size == 0) return;
  const int count = static_cast<int>(ceil_div(segment.size, kTokens));
  const std::int64_t first_slot =
      chunks.first_slot(segment.sequence) + segment.number * (segments.size / kTokens);

  TileProduct<Operand, kWide, kWide> product;
  product.clear();
  T z = 0;  // of feature r0 + thread
  const bool owns_z = e0 == 0 && thread < kWide && r0 + thread < real;
  const auto write_state = [&](std::int64_t slot, T* s_out, T* z_out) {
    T* const s = s_out + (slot * states.heads + head) * real * values;
    product.for_each([&](int row, int column, T value) {
      if (r0 + row < real && e0 + column < values) s[(r0 + row) * values + e0 + column] = value;
    });
    if (owns_z) z_out[(slot * states.heads + head) * real + r0 + thread] = z;
  };

  for (int i = 0; i < count; ++i) {
    const std::int64_t slot = first_slot + (backwards ? count - 1 - i : i);
    const Piece chunk(chunks, slot);
    if (causal) write_state(slot, states.chunk_s, states.chunk_z);
    __syncthreads();  // the tiles before have been used
    side.template load_x<kTokens, kWide>(chunk, head, r0, real, shared.x);
    side.template load_y<kTokens, kWide>(chunk, head, e0, values, shared.y);
    if (thread < kTokens) {
      shared.weight[thread] =
          thread < chunk.size ? side.weight_of(chunk.batch, chunk.begin + thread, head) : T(0);
    }
    __syncthreads();
    product.template multiply<kTokens, Major::kOuter, Major::kOuter>(shared.x, shared.y);
    if (owns_z) {
      for (int t = 0; t < kTokens; ++t)
        z += number_of(shared.x[t * row_of<Operand>(kWide) + thread]) * shared.weight[t];
    }
  }
  write_state(segment_slot, states.segment_s, states.segment_z);
}

// Replaces the sums of segments by the state at each one's start (end, backwards), for each number
// of the states separately, and writes the total.
template <class T>
struct Scan {
  Pieces segments;
  std::int64_t numbers;
  bool backwards;
  const T* initial;  // [S, numbers], or null
  T* sums;           // [slot, numbers]
  T* total;          // [S, numbers]

  TORCH_SPE_DEVICE void operator()(std::int64_t i) const {
    const std::int64_t sequence = i / numbers, number = i % numbers;
    const std::int64_t count = ceil_div(segments.length_of(sequence), segments.size);
    T* const own = sums + segments.first_slot(sequence) * numbers + number;
    T state = initial == nullptr ? T(0) : initial[i];
    for (std::int64_t j = 0; j < count; ++j) {
      T* const entry = own + (backwards ? count - 1 - j : j) * numbers;
      const T sum = *entry;
      *entry = state;
      state += sum;
    }
    total[i] = state;
  }
};

// What becomes of the values of a row.
enum class Result {
  kOutput,        // divided by the denominator
  kGradient,      // grad_v
  kDenominators,  // none: only 1 / (denominator + eps) and the denominator's gradient
};

template <class Operand>
struct ValuesShared {
  using T = core::accumulate_t<Operand>;
  static constexpr int kTokens = kChunk<Operand>;
  Operand* row_x;    // [row, r]
  Operand* col_x;    // [column, r]
  Operand* state;    // [r, e]
  Operand* weights;  // [row, column]
  Operand* col_y;    // [column, e]
  T* z;              // [r]
  T* parts;          // [thread], of sums over a row

  TORCH_SPE_INLINE explicit ValuesShared(Carver& carver)
      : row_x(carver.take<Operand>(kTokens * row_of<Operand>(kDeep))),
        col_x(carver.take<Operand>(kTokens * row_of<Operand>(kDeep))),
        state(carver.take<Operand>(kDeep * row_of<Operand>(kWide))),
        weights(carver.take<Operand>(kTokens * row_of<Operand>(kTokens))),
        col_y(carver.take<Operand>(kTokens * row_of<Operand>(kWide))),
        z(carver.take<T>(kDeep)),
        parts(carver.take<T>(kThreads)) {}
};

template <class T>
struct Normalization {
  bool wanted = false;
  T eps = 0;
  // For kDenominators:
  const void* result = nullptr;  // out, [B, N, H, E] of the storage type, strided
  std::int64_t result_strides[4] = {};
  T* scale = nullptr;  // [B, N, H]: 1 / (denominator + eps)
  T* grad = nullptr;   // [B, N, H]: gradient of the denominator
};

template <class Storage, class Operand, Result kResult>
__global__ void __launch_bounds__(kThreads)
    values_kernel(const Side<Storage> rows, const Side<Storage> columns, const Pieces chunks,
                  const Pieces segments, bool causal, bool columns_follow,
                  const States<core::accumulate_t<Storage>> states,
                  const Normalization<core::accumulate_t<Storage>> normalization, Storage* out) {
  using T = core::accumulate_t<Storage>;
  constexpr int kTokens = kChunk<Operand>;
  constexpr int kPerRow = kThreads / kTokens;  // threads that share the sums over a row
  constexpr bool kMakesValues = kResult != Result::kDenominators;
  TORCH_SPE_SHARED_MEMORY(memory);
  Carver carver(memory);
  const ValuesShared<Operand> shared(carver);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t real = states.real, values = states.values;
  const std::int64_t tiles = kMakesValues ? ceil_div(values, kWide) : 1;
  const std::int64_t block = blockIdx.x;
  const std::int64_t e0 = block % tiles * kWide;
  const std::int64_t head = block / tiles % states.heads;
  const std::int64_t slot = block / tiles / states.heads;
  const Piece chunk(chunks, slot);
  if (chunk.size == 0) return;
  const StateReader<T> reader(states, causal, chunks, segments, slot, chunk, head);
  const bool normalize = kResult != Result::kGradient && normalization.wanted;

  TileProduct<Operand, kTokens, kWide> product;
  TileProduct<Operand, kTokens, kTokens> weights;
  product.clear();
  weights.clear();
  T denominator = 0;  // the part of row thread / kPerRow that this thread adds up
  const int own_row = thread / kPerRow, part = thread % kPerRow;
  for (std::int64_t r0 = 0; r0 < real; r0 += kDeep) {
    __syncthreads();  // the tiles before have been used
    rows.template load_x<kTokens, kDeep>(chunk, head, r0, real, shared.row_x);
    if (causal) columns.template load_x<kTokens, kDeep>(chunk, head, r0, real, shared.col_x);
    if constexpr (kMakesValues) {
      load_state<kDeep, kWide>(shared.state,
                               [&](int r, int e, T(&out)[4]) { reader.s(r0 + r, e0 + e, out); });
    }
    if (normalize && thread < kDeep)
      shared.z[thread] = r0 + thread < real ? reader.z(r0 + thread) : T(0);
    __syncthreads();
    if constexpr (kMakesValues) {
      product.template multiply<kDeep, Major::kDepth, Major::kOuter>(shared.row_x, shared.state);
    }
    if (causal) {
      weights.template multiply<kDeep, Major::kDepth, Major::kDepth>(shared.row_x, shared.col_x);
    }
    if (normalize) {
      for (int r = part; r < kDeep; r += kPerRow)
        denominator += number_of(shared.row_x[own_row * row_of<Operand>(kDeep) + r]) * shared.z[r];
    }
  }
  if (causal) {
    weights.for_each([&](int row, int column, T value) {
      const bool seen = columns_follow ? column >= row : column <= row;
      write(seen ? value : T(0), shared.weights + row * row_of<Operand>(kTokens) + column);
    });
    if constexpr (kMakesValues)
      columns.template load_y<kTokens, kWide>(chunk, head, e0, values, shared.col_y);
    __syncthreads();
    if constexpr (kMakesValues) {
      product.template multiply<kTokens, Major::kDepth, Major::kOuter>(shared.weights,
                                                                       shared.col_y);
    }
    if (normalize) {
      for (int column = part; column < kTokens; column += kPerRow)
        denominator += number_of(shared.weights[own_row * row_of<Operand>(kTokens) + column]);
    }
  }
  const auto row_sum = [&](int row) {
    T sum = 0;
    for (int i = 0; i < kPerRow; ++i) sum += shared.parts[row * kPerRow + i];
    return sum;
  };
  // 1 / (denominator + eps); 0 where that is 1 / 0.
  const auto scale_of = [&](int row) {
    const T sum = row_sum(row) + normalization.eps;
    return sum == T(0) ? T(0) : T(1) / sum;
  };
  if (normalize) {
    shared.parts[thread] = denominator;
    __syncthreads();
  }
  if constexpr (kMakesValues) {
    product.for_each([&](int row, int column, T value) {
      if (row >= chunk.size || e0 + column >= values) return;
      write(normalize ? value * scale_of(row) : value,
            out + rows.index(chunk.batch, chunk.begin + row, head) * values + e0 + column);
    });
  } else {
    const T scale = scale_of(own_row);
    __syncthreads();  // the parts have been read
    T sum = 0;        // of grad_out . out
    if (own_row < chunk.size) {
      const std::int64_t n = chunk.begin + own_row;
      const auto& strides = normalization.result_strides;
      const Storage* const result = static_cast<const Storage*>(normalization.result) +
                                    chunk.batch * strides[0] + n * strides[1] + head * strides[2];
      const Storage* const grad = rows.y + chunk.batch * rows.y_strides[0] + n * rows.y_strides[1] +
                                  head * rows.y_strides[2];
      for (std::int64_t e = part; e < values; e += kPerRow)
        sum += read(grad[e * rows.y_strides[3]]) * read(result[e * strides[3]]);
    }
    shared.parts[thread] = sum;
    __syncthreads();
    if (own_row < chunk.size && part == 0) {
      const std::int64_t i = rows.index(chunk.batch, chunk.begin + own_row, head);
      normalization.scale[i] = scale;
      normalization.grad[i] = -scale * row_sum(own_row);
    }
  }
}

template <class Operand>
struct FeaturesShared {
  using T = core::accumulate_t<Operand>;
  static constexpr int kTokens = kChunk<Operand>;
  Operand* row_y;    // [row, e]
  Operand* col_y;    // [column, e]
  Operand* state;    // [r, e]
  Operand* weights;  // [row, column]
  Operand* col_x;    // [column, r]
  T* row_weight;     // [row]
  T* col_weight;     // [column]
  T* z;              // [r]

  TORCH_SPE_INLINE explicit FeaturesShared(Carver& carver)
      : row_y(carver.take<Operand>(kTokens * row_of<Operand>(kDeep))),
        col_y(carver.take<Operand>(kTokens * row_of<Operand>(kDeep))),
        state(carver.take<Operand>(kWide * row_of<Operand>(kDeep))),
        weights(carver.take<Operand>(kTokens * row_of<Operand>(kTokens))),
        col_x(carver.take<Operand>(kTokens * row_of<Operand>(kWide))),
        row_weight(carver.take<T>(kTokens)),
        col_weight(carver.take<T>(kTokens)),
        z(carver.take<T>(kWide)) {}
};

template <class Storage, class Operand>
__global__ void __launch_bounds__(kThreads)
    features_kernel(const Side<Storage> rows, const Side<Storage> columns, const Pieces chunks,
                    const Pieces segments, bool causal, bool columns_follow,
                    const States<core::accumulate_t<Storage>> states, Storage* grad) {
  using T = core::accumulate_t<Storage>;
  constexpr int kTokens = kChunk<Operand>;
  TORCH_SPE_SHARED_MEMORY(memory);
  Carver carver(memory);
  const FeaturesShared<Operand> shared(carver);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t real = states.real, values = states.values;
  const std::int64_t tiles = ceil_div(real, kWide);
  const std::int64_t block = blockIdx.x;
  const std::int64_t r0 = block % tiles * kWide;
  const std::int64_t head = block / tiles % states.heads;
  const std::int64_t slot = block / tiles / states.heads;
  const Piece chunk(chunks, slot);
  if (chunk.size == 0) return;
  const StateReader<T> reader(states, causal, chunks, segments, slot, chunk, head);

  if (thread < kTokens) {
    const bool inside = thread < chunk.size;
    const std::int64_t n = chunk.begin + thread;
    shared.row_weight[thread] = inside ? rows.weight_of(chunk.batch, n, head) : T(0);
    shared.col_weight[thread] = inside && causal ? columns.weight_of(chunk.batch, n, head) : T(0);
  } else if (thread - kTokens < kWide) {
    const std::int64_t r = r0 + thread - kTokens;
    shared.z[thread - kTokens] = r < real ? reader.z(r) : T(0);
  }
  TileProduct<Operand, kTokens, kWide> product;
  TileProduct<Operand, kTokens, kTokens> weights;
  product.clear();
  weights.clear();
  for (std::int64_t e0 = 0; e0 < values; e0 += kDeep) {
    __syncthreads();  // the tiles before have been used
    rows.template load_y<kTokens, kDeep>(chunk, head, e0, values, shared.row_y);
    if (causal) columns.template load_y<kTokens, kDeep>(chunk, head, e0, values, shared.col_y);
    load_state<kWide, kDeep>(shared.state,
                             [&](int r, int e, T(&out)[4]) { reader.s(r0 + r, e0 + e, out); });
    __syncthreads();
    product.template multiply<kDeep, Major::kDepth, Major::kDepth>(shared.row_y, shared.state);
    if (causal) {
      weights.template multiply<kDeep, Major::kDepth, Major::kDepth>(shared.row_y, shared.col_y);
    }
  }
  if (causal) {
    weights.for_each([&](int row, int column, T value) {
      const bool seen = columns_follow ? column >= row : column <= row;
      write(seen ? value + shared.row_weight[row] * shared.col_weight[column] : T(0),
            shared.weights + row * row_of<Operand>(kTokens) + column);
    });
    columns.template load_x<kTokens, kWide>(chunk, head, r0, real, shared.col_x);
    __syncthreads();
    product.template multiply<kTokens, Major::kDepth, Major::kOuter>(shared.weights, shared.col_x);
  }
  product.for_each([&](int row, int column, T value) {
    const std::int64_t n = chunk.begin + row, r = r0 + column;
    if (row >= chunk.size || r >= real) return;
    T result = 0;
    if (!rows.is_padding(chunk.batch, n)) {
      const T x = read(rows.x[chunk.batch * rows.x_strides[0] + n * rows.x_strides[1] +
                              head * rows.x_strides[2] + r * rows.x_strides[3]]);
      result = (value + shared.row_weight[row] * shared.z[column]) *
               feature_map_derivative(rows.map, feature_map<Storage>(rows.map, x));
    }
    write(result, grad + rows.index(chunk.batch, n, head) * real + r);
  });
}

// The scratch memory of one pass, and its launches.
template <class Storage, class Operand>
class Pass {
 public:
  using T = core::accumulate_t<Storage>;
  std::size_t workspace_size = 0;

  Pass(const LinearAttentionParams& p, bool backward, void* workspace, Stream stream)
      : p_(p), stream_(stream) {
    Carver carver(static_cast<unsigned char*>(workspace));
    const std::int64_t numbers = p.num_heads * p.num_realizations * p.value_features;
    const std::int64_t features = p.num_heads * p.num_realizations;
    const std::int64_t length = max_of(p.query_length, p.key_length);
    states_.heads = p.num_heads;
    states_.real = p.num_realizations;
    states_.values = p.value_features;
    if (p.causal) {
      const std::int64_t slots = pieces(length, kChunk<Operand>).slots();
      states_.chunk_s = carver.take<T>(slots * numbers);
      states_.chunk_z = carver.take<T>(slots * features);
    }
    const std::int64_t slots = pieces(length, kSegment<Operand>).slots();
    states_.segment_s = carver.take<T>(slots * numbers);
    states_.segment_z = carver.take<T>(slots * features);
    own_total_s_ = carver.take<T>(p.num_sequences * numbers);
    own_total_z_ = carver.take<T>(p.num_sequences * features);
    if (backward && p.normalize) {
      const std::int64_t batch = p.cu_seqlens == nullptr ? p.num_sequences : 1;
      scale_ = carver.take<T>(batch * p.query_length * p.num_heads);
      grad_denominator_ = carver.take<T>(batch * p.query_length * p.num_heads);
    }
    workspace_size = carver.size();
  }

  void forward() {
    make_states(keys(), false, p_.initial_s, p_.initial_z, p_.final_s, p_.final_z);
    Normalization<T> normalization;
    normalization.wanted = p_.normalize;
    normalization.eps = static_cast<T>(p_.eps);
    values<Result::kOutput>(queries(nullptr, {0, 0, 0, 0}), keys(), false, normalization, p_.out);
  }

  void backward(const LinearAttentionBackwardParams& p) {
    const Side<Storage> key_side = keys();
    Side<Storage> query_side = queries(p.grad_out, p.grad_out_strides);
    if (p.normalize || p.grad_q != nullptr)
      make_states(key_side, false, p.initial_s, p.initial_z, nullptr, nullptr);
    if (p.normalize) {
      Normalization<T> normalization;
      normalization.wanted = true;
      normalization.eps = static_cast<T>(p.eps);
      normalization.result = p.result;
      for (int i = 0; i < 4; ++i) normalization.result_strides[i] = p.result_strides[i];
      normalization.scale = scale_;
      normalization.grad = grad_denominator_;
      values<Result::kDenominators>(query_side, key_side, false, normalization, nullptr);
      query_side.scale = scale_;
      query_side.weight = grad_denominator_;
    }
    if (p.grad_q != nullptr) features(query_side, key_side, false, p.grad_q);
    if (p.grad_k == nullptr && p.grad_v == nullptr && p.grad_initial_s == nullptr &&
        p.grad_initial_z == nullptr)
      return;
    make_states(query_side, true, p.grad_final_s, p.grad_final_z, p.grad_initial_s,
                p.grad_initial_z);
    if (p.grad_k != nullptr) features(key_side, query_side, true, p.grad_k);
    if (p.grad_v != nullptr)
      values<Result::kGradient>(key_side, query_side, true, Normalization<T>{}, p.grad_v);
  }

 private:
  Pieces pieces(std::int64_t length, std::int64_t size) const {
    return {p_.cu_seqlens, p_.num_sequences, length, size};
  }

  Side<Storage> side(const void* x, const std::int64_t (&x_strides)[4], const void* y,
                     const std::int64_t (&y_strides)[4], std::int64_t length) const {
    Side<Storage> side;
    side.x = static_cast<const Storage*>(x);
    side.y = static_cast<const Storage*>(y);
    for (int i = 0; i < 4; ++i) {
      side.x_strides[i] = x_strides[i];
      side.y_strides[i] = y_strides[i];
    }
    side.map = p_.feature_map;
    side.length = length;
    side.heads = p_.num_heads;
    side.x_aligned = is_aligned<Storage>(x, x_strides);
    side.y_aligned = is_aligned<Storage>(y, y_strides);
    return side;
  }
  Side<Storage> keys() const {
    Side<Storage> keys = side(p_.k, p_.k_strides, p_.v, p_.v_strides, p_.key_length);
    keys.constant_weight = 1;
    keys.padding = p_.key_padding_mask;
    return keys;
  }
  Side<Storage> queries(const void* grad_out, const std::int64_t (&strides)[4]) const {
    return side(p_.q, p_.q_strides, grad_out, strides, p_.query_length);
  }

  // The states of a side, and their totals where wanted (null, or [S, H, R, E] and [S, H, R]).
  void make_states(const Side<Storage>& side, bool backwards, const void* initial_s,
                   const void* initial_z, void* total_s, void* total_z) {
    const Pieces chunks = pieces(side.length, kChunk<Operand>);
    const Pieces segments = pieces(side.length, kSegment<Operand>);
    const std::int64_t tiles =
        ceil_div(p_.num_realizations, kWide) * ceil_div(p_.value_features, kWide);
    const std::int64_t blocks = segments.slots() * p_.num_heads * tiles;
    if (blocks > 0) {
      Carver size;
      StateShared<Operand>{size};
      launch(state_kernel<Storage, Operand>, grid_of(blocks), dim3(kThreads), size.size(), stream_,
             side, chunks, segments, p_.causal, backwards, states_);
    }
    T* const s = total_s == nullptr ? own_total_s_ : static_cast<T*>(total_s);
    T* const z = total_z == nullptr ? own_total_z_ : static_cast<T*>(total_z);
    const std::int64_t numbers = p_.num_heads * p_.num_realizations * p_.value_features;
    const std::int64_t features = p_.num_heads * p_.num_realizations;
    scan(segments, numbers, backwards, initial_s, states_.segment_s, s);
    scan(segments, features, backwards, initial_z, states_.segment_z, z);
    states_.total_s = s;
    states_.total_z = z;
  }

  void scan(const Pieces& segments, std::int64_t numbers, bool backwards, const void* initial,
            T* sums, T* total) const {
    for_each_index(
        p_.num_sequences * numbers,
        Scan<T>{segments, numbers, backwards, static_cast<const T*>(initial), sums, total},
        stream_);
  }

  template <Result kResult>
  void values(const Side<Storage>& rows, const Side<Storage>& columns, bool columns_follow,
              const Normalization<T>& normalization, void* out) const {
    const Pieces chunks = pieces(rows.length, kChunk<Operand>);
    const std::int64_t tiles =
        kResult == Result::kDenominators ? 1 : ceil_div(p_.value_features, kWide);
    const std::int64_t blocks = chunks.slots() * p_.num_heads * tiles;
    if (blocks == 0) return;
    Carver size;
    ValuesShared<Operand>{size};
    launch(values_kernel<Storage, Operand, kResult>, grid_of(blocks), dim3(kThreads), size.size(),
           stream_, rows, columns, chunks, pieces(columns.length, kSegment<Operand>), p_.causal,
           columns_follow, states_, normalization, static_cast<Storage*>(out));
  }

  void features(const Side<Storage>& rows, const Side<Storage>& columns, bool columns_follow,
                void* grad) const {
    const Pieces chunks = pieces(rows.length, kChunk<Operand>);
    const std::int64_t blocks =
        chunks.slots() * p_.num_heads * ceil_div(p_.num_realizations, kWide);
    if (blocks == 0) return;
    Carver size;
    FeaturesShared<Operand>{size};
    launch(features_kernel<Storage, Operand>, grid_of(blocks), dim3(kThreads), size.size(), stream_,
           rows, columns, chunks, pieces(columns.length, kSegment<Operand>), p_.causal,
           columns_follow, states_, static_cast<Storage*>(grad));
  }

  const LinearAttentionParams& p_;
  Stream stream_;
  States<T> states_;
  T *own_total_s_, *own_total_z_;
  T *scale_ = nullptr, *grad_denominator_ = nullptr;
};

// Calls function(storage, operand). float16 goes through products as tf32, which has as many bits
// of mantissa: states and products of features can be larger than float16's range, gradients
// divided by denominators (about N R) smaller.
template <class Function>
void visit_types(core::DType dtype, bool allow_tf32, const Function& function) {
  visit_operands(dtype, allow_tf32, [&](auto storage, auto operand) {
    if constexpr (std::is_same_v<decltype(storage), core::Half>) {
      function(storage, Tf32{});
    } else {
      function(storage, operand);
    }
  });
}

// The same size whether tf32 is allowed or not: chunks of both are equally long.
std::size_t workspace_size(const LinearAttentionParams& p, bool backward) {
  std::size_t size = 0;
  visit_types(p.dtype, false, [&](auto storage, auto operand) {
    size =
        Pass<decltype(storage), decltype(operand)>(p, backward, nullptr, Stream{}).workspace_size;
  });
  return size;
}

}  // namespace

std::size_t linear_attention_forward_workspace(const LinearAttentionParams& p) {
  return workspace_size(p, false);
}

std::size_t linear_attention_backward_workspace(const LinearAttentionBackwardParams& p) {
  return workspace_size(p, true);
}

void linear_attention_forward(const LinearAttentionParams& p, void* workspace, bool allow_tf32,
                              Stream stream) {
  visit_types(p.dtype, allow_tf32, [&](auto storage, auto operand) {
    Pass<decltype(storage), decltype(operand)>(p, false, workspace, stream).forward();
  });
}

void linear_attention_backward(const LinearAttentionBackwardParams& p, void* workspace,
                               bool allow_tf32, Stream stream) {
  visit_types(p.dtype, allow_tf32, [&](auto storage, auto operand) {
    Pass<decltype(storage), decltype(operand)>(p, true, workspace, stream).backward(p);
  });
}

}  // namespace torch_spe::cuda
