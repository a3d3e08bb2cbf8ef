// The convolution filter with polyphase noise along one dimension, for 16-bit storage: on tensor
// cores.
//
// Take a feature and a group of s realizations, one of each class. At every position just one of
// them has noise, so that their noise is one stream. Going on by one position and to the next class
// at once, a code keeps its taps, and goes on by one along the stream. A diagonal is such a
// sequence of codes: at position n diagonal i of a group stands for the realization of class (i +
// n) mod s.
//
// A warp follows 16 diagonals (forward) or features (gradient of x) over some positions with the
// codes' taps in registers. Two taps of a code, s apart, times two numbers of the stream are a pair
// of operands; the other operand of the tensor cores is the pair (x, x), for 8 batch rows or more.
#pragma once

#include "core/conv_filter.h"
#include "normals.h"
#include "tiles.h"

namespace torch_spe::cuda {

using core::ConvFilterBackwardParams;
using core::ConvFilterParams;

constexpr int kPolyphaseRows = 64;  // of a block: 16 for each warp
constexpr int kTileRows = 128;      // of positions and batch rows, whose sums a warp holds at once

// What a block holds in shared memory.
struct PolyphasePlan {
  int stride, taps, pairs;  // s, P, pairs of taps of a code
  int features, diagonals;  // at once
  int groups;               // of s diagonals, that these lie in
  int all_groups;           // of the realizations
  int positions;            // noise is made for so many at once
  int words, stream;        // of a stream: in use, and in all
  int columns, row;         // of the tile of x or of grad_out: in use, and in all
  int batch, pass;          // rows of the batch and positions of a tile
  bool has_constant;

  // Number of banks that a stream begins after the one of feature 0 and of the same phase: so that
  // the codes of a warp's 32 lanes lie in different ones.
  int feature_banks, feature_step;

  TORCH_SPE_INLINE PolyphasePlan(const ConvFilterParams& p, int features, int diagonals,
                                 int positions, int batch)
      : stride(static_cast<int>(p.generated.stride[2])),
        taps(static_cast<int>(p.kernel_size[2])),
        pairs((taps + 2 * stride - 1) / (2 * stride)),
        features(features),
        diagonals(diagonals),
        all_groups(static_cast<int>(ceil_div(p.num_realizations, stride))),
        positions(positions),
        batch(batch),
        pass(kTileRows / batch),
        has_constant(p.constant != nullptr) {
    groups = stride % diagonals == 0   ? 1
             : diagonals % stride == 0 ? diagonals / stride
                                       : (diagonals - 2) / stride + 2;
    if (groups > all_groups) groups = all_groups;
    words = positions + stride - 1 + 2 * (pairs - 1) * stride;
    stream = (words + 31 + 31) / 32 * 32;
  }
  TORCH_SPE_INLINE std::int64_t diagonal_tiles() const {
    return ceil_div(std::int64_t{all_groups} * stride, diagonals);
  }
  TORCH_SPE_INLINE void set_columns(int count) {
    columns = (count + 7) / 8 * 8;
    row = columns < kPolyphaseRows ? kPolyphaseRows : columns;
    row += row % 16 == 0 ? 8 : 16;
  }
};

// The noise of some features and diagonals.
struct StreamShared {
  std::uint32_t* words;  // [feature, group, position]: the number there, and the one s later
  std::int64_t* period;  // of the stream's first number, for each feature
  int *origin, *phase;   // of that number within its period, and of position 0
  int* begin;            // of the streams of a feature
  int *group, *index;    // of each diagonal; a group that is not there has number plan.groups

  TORCH_SPE_INLINE StreamShared(Carver& carver, const PolyphasePlan& plan)
      : words(carver.take<std::uint32_t>(std::int64_t{plan.features} * plan.groups * plan.stream)),
        period(carver.take<std::int64_t>(plan.features)),
        origin(carver.take<int>(plan.features)),
        phase(carver.take<int>(plan.features)),
        begin(carver.take<int>(plan.features)),
        group(carver.take<int>(plan.diagonals)),
        index(carver.take<int>(plan.diagonals)) {}
};

template <class Storage>
struct PolyphaseShared : StreamShared {
  std::uint32_t* taps;  // [feature, pair, phase]
  Storage* constant;    // [feature, group, class], over the factor of the noise
  Storage* tile;        // [position, batch row, column] of x or grad_out

  TORCH_SPE_INLINE PolyphaseShared(Carver& carver, const PolyphasePlan& plan)
      : StreamShared(carver, plan),
        taps(carver.take<std::uint32_t>(std::int64_t{plan.features} * plan.pairs * plan.stride)),
        constant(plan.has_constant
                     ? carver.take<Storage>(std::int64_t{plan.features} * plan.groups * plan.stride)
                     : nullptr),
        tile(carver.take<Storage>(std::int64_t{kTileRows} * plan.row)) {}
};

template <class Storage>
class Streams {
 public:
  TORCH_SPE_DEVICE Streams(const ConvFilterParams& p, const PolyphasePlan& plan,
                           const StreamShared& shared, std::int64_t head)
      : p_(p),
        plan_(plan),
        shared_(shared),
        head_(head),
        seed_(static_cast<std::uint64_t>(*p.generated.device_seed)) {}

  // Makes the streams of features and diagonals from the given ones on, from position n on. Has a
  // barrier, and needs another one before the streams are used.
  TORCH_SPE_DEVICE void make(std::int64_t feature, std::int64_t diagonal, std::int64_t n) {
    const int s = plan_.stride;
    const std::int64_t group = diagonal / s;
    for (int i = static_cast<int>(threadIdx.x); i < plan_.features; i += kThreads) {
      std::int64_t shift[3] = {0, 0, 0};
      core::noise_shift(seed_, p_.generated.ndim, head_, feature + i, p_.generated.stride, shift);
      const std::int64_t first = p_.generated.start[2] + shift[2];
      const std::int64_t period = core::floor_divide(first + n, s);
      shared_.period[i] = period;
      shared_.origin[i] = static_cast<int>(first + n - period * s);
      const int phase = static_cast<int>(core::floor_modulo(first, s));
      shared_.phase[i] = phase;
      shared_.begin[i] = i * plan_.groups * plan_.stream +
                         (phase + i / plan_.feature_step * plan_.feature_banks) % 32;
    }
    for (int i = static_cast<int>(threadIdx.x); i < plan_.diagonals; i += kThreads) {
      const int index = static_cast<int>(diagonal - group * s) + i;
      shared_.index[i] = index % s;
      shared_.group[i] = static_cast<int>(min_of(index / s, plan_.groups));
    }
    __syncthreads();
    if (p_.generated.kind == core::NoiseKind::kGaussian) {
      fill<4>(feature, group);
    } else {
      fill<32>(feature, group);
    }
  }

  // Where the streams of a feature begin, and where a code with the class of position 0 would be.
  struct Feature {
    int begin, phase;
  };
  TORCH_SPE_DEVICE Feature feature(int i) const { return {shared_.begin[i], shared_.phase[i]}; }
  // Where a stream begins after that of the first group, and the index within the group.
  struct Diagonal {
    int begin, index;
  };
  TORCH_SPE_DEVICE Diagonal diagonal(int i) const {
    return {group(i) * plan_.stream, shared_.index[i]};
  }
  // The number of the first tap of a code; its first word is that far from where the stream begins.
  TORCH_SPE_DEVICE int tap(Feature feature, Diagonal diagonal) const {
    const int lag = diagonal.index - feature.phase;
    return lag < 0 ? lag + plan_.stride : lag;
  }
  // The group of a diagonal, or another one if it is not there.
  TORCH_SPE_DEVICE int group(int diagonal) const {
    return static_cast<int>(min_of(shared_.group[diagonal], plan_.groups - 1));
  }

 private:
  // Noise of kRun realizations of one period: 4 normals, or 32 signs.
  template <int kRun>
  TORCH_SPE_DEVICE void make_run(std::int64_t feature, std::int64_t period, std::int64_t r,
                                 std::uint32_t* signs, float (&normals)[4]) const {
    const core::NoiseParams& noise = p_.generated;
    const std::uint64_t position = core::noise_position(1, 0, 0, period);
    const auto words = core::philox<core::ScalarNumbers>(
        {{static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(position >> 32),
          core::noise_source(head_, feature),
          core::noise_block(static_cast<std::uint32_t>(noise.kind), 1,
                            r / core::realizations_of_block(noise.kind))}},
        seed_);
    if constexpr (kRun == 4) {
      normals_of<Storage>(words, normals);
    } else {
      *signs = core::word_of(words, r % 128 / 32);
    }
  }

  // A thread makes the numbers of kRun realizations of a feature, for one period after the other.
  template <int kRun>
  TORCH_SPE_DEVICE void fill(std::int64_t feature, std::int64_t first_group) const {
    const int s = plan_.stride;
    const std::int64_t begin = first_group * s, end = begin + std::int64_t{plan_.groups} * s;
    const std::int64_t first_run = begin / kRun;
    const int runs = static_cast<int>(ceil_div(end, kRun) - first_run);
    const std::uint32_t ones = pack_pair<Storage>(1.0f, 1.0f);
    for (int i = static_cast<int>(threadIdx.x); i < plan_.features * runs; i += kThreads) {
      const int d = i / runs;
      const std::int64_t r = (first_run + i % runs) * kRun;
      const bool inside = feature + d < p_.in_features;
      const int real = static_cast<int>(inside ? max_of(0, min_of(kRun, p_.num_realizations - r))
                                               : 0);  // that exist
      const int from = static_cast<int>(max_of(0, begin - r));
      const int to = static_cast<int>(min_of(kRun, end - r));
      const int index = static_cast<int>(r + from - begin), first_class = index % s;
      std::uint32_t* const out = shared_.words + shared_.begin[d] + index / s * plan_.stream;
      const std::int64_t period = shared_.period[d];
      const int origin = shared_.origin[d];
      std::uint32_t signs = 0, next_signs = 0;
      float normals[4] = {}, next_normals[4] = {};
      for (int j = -1; j * s - origin < plan_.words; ++j) {
        signs = next_signs;
        TORCH_SPE_UNROLL
        for (int e = 0; e < 4; ++e) normals[e] = next_normals[e];
        if (real > 0) make_run<kRun>(feature + d, period + j + 1, r, &next_signs, next_normals);
        if (j < 0) continue;
        // One stretch for each group that the run has realizations of.
        int c = first_class, next = to;
        std::uint32_t* stream = out;
        for (int e = from; e < to; e = next, c = 0, stream += plan_.stream) {
          next = static_cast<int>(min_of(to, e + s - c));
          const int u = j * s - origin + c - e;  // of number 0 of the run
          const int first = static_cast<int>(max_of(e, -u));
          const int last = static_cast<int>(min_of(next, plan_.words - u));
          if constexpr (kRun == 4) {
            TORCH_SPE_UNROLL
            for (int k = 0; k < kRun; ++k) {
              if (k >= first && k < last)
                stream[u + k] = k < real ? pack_pair<Storage>(normals[k], next_normals[k]) : 0u;
            }
          } else {
            const int last_real = static_cast<int>(min_of(last, real));
            // The signs of number k in the highest bits of both halves.
            std::uint32_t low = rotate(signs, first + 17), high = rotate(next_signs, first + 1);
            for (int k = first; k < last_real; ++k) {
              stream[u + k] = ones ^ (low & 0x8000u) ^ (high & 0x80000000u);
              low = rotate(low, 1);
              high = rotate(high, 1);
            }
            for (int k = static_cast<int>(max_of(first, real)); k < last; ++k) stream[u + k] = 0;
          }
        }
      }
    }
  }

  TORCH_SPE_DEVICE static std::uint32_t rotate(std::uint32_t bits, int right) {
    return bits >> (right & 31) | bits << (-right & 31);
  }

  const ConvFilterParams& p_;
  const PolyphasePlan& plan_;
  const StreamShared& shared_;
  const std::int64_t head_;
  const std::uint64_t seed_;
};

// Copies rows of `columns` numbers to shared memory: number `at(column)` of row(i), zero where it
// is not below `count`, or the row is null. `aligned` rows can be read 8 numbers at once. The copy
// may go on until copy_async_wait.
template <class Storage, class Row, class At>
TORCH_SPE_DEVICE void copy_rows(Storage* out, int row_stride, int rows, int columns,
                                std::int64_t count, std::int64_t stride, bool aligned,
                                const Row& row, const At& at) {
  const int step = aligned ? 8 : 1, pieces = columns / step;
  const int width = pieces < kThreads ? pieces : kThreads, height = kThreads / width;
  const int first = static_cast<int>(threadIdx.x) / width;
  if (first >= height) return;
  for (int piece = static_cast<int>(threadIdx.x) % width; piece < pieces; piece += width) {
    const int column = piece * step;
    const std::int64_t index = at(column);
    for (int i = first; i < rows; i += height) {
      const Storage* const from = row(i);
      Storage* const to = out + i * row_stride + column;
      if (aligned && from != nullptr && index + 8 <= count) {
        copy_async16(to, from + index);
      } else {
        for (int e = 0; e < step; ++e) {
          to[e].bits = from != nullptr && index + e < count ? from[(index + e) * stride].bits
                                                            : std::uint16_t(0);
        }
      }
    }
  }
}

template <class Storage>
struct alignas(8) Four {
  Storage values[4];
};

// Going on by one position; the index within its group of a diagonal's realization.
TORCH_SPE_DEVICE int next_turn(int turn, int stride) { return turn + 1 == stride ? 0 : turn + 1; }
TORCH_SPE_DEVICE int turned_index(int index, int turn, int stride) {
  return index + turn < stride ? index + turn : index + turn - stride;
}

// The column in a tile of grad_out of a diagonal's first realization.
TORCH_SPE_DEVICE int column_of(const StreamShared& shared, const PolyphasePlan& plan,
                               int diagonal) {
  const int group = shared.group[diagonal];
  return group * (plan.stride + plan.pass) + (group < plan.groups ? shared.index[diagonal] : 0);
}

// The realization in a column of a tile of grad_out, or `none`. A group has s + pass columns, so
// that a diagonal finds its realization of position t of the tile t columns after the first; a
// group that is not there has `pass` zeros.
TORCH_SPE_DEVICE std::int64_t realization_of(const PolyphasePlan& plan, int column,
                                             std::int64_t first_group, int turn,
                                             std::int64_t none) {
  const int width = plan.stride + plan.pass, group = column / width;
  if (group >= plan.groups) return none;
  return (first_group + group) * plan.stride + (column - group * width + turn) % plan.stride;
}

// x times codes, summed over features; or, for the gradient of x, grad_out (here p.x) times codes,
// summed over realizations. A block makes some positions of kPolyphaseRows diagonals or features.
template <class Storage, bool kGradient, int kBatchTiles>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    polyphase_kernel(const ConvFilterParams p, const PolyphasePlan plan) {
  constexpr int kBatch = 8 * kBatchTiles, kPass = kTileRows / kBatch;
  TORCH_SPE_SHARED_MEMORY(memory);
  Carver carver(memory);
  const PolyphaseShared<Storage> shared(carver, plan);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32, group = thread % 32 / 4, member = thread % 4;
  const int s = plan.stride, depth = kGradient ? plan.diagonals : plan.features;
  const std::int64_t diagonals = std::int64_t{plan.all_groups} * s, length = p.size[2];
  const std::int64_t row_count = kGradient ? p.in_features : diagonals;
  const std::int64_t sum_count = kGradient ? diagonals : p.in_features;
  const std::int64_t row_tiles = ceil_div(row_count, kPolyphaseRows);
  const std::int64_t batch_tiles = ceil_div(p.batch, kBatch);
  std::int64_t block = blockIdx.x;
  const std::int64_t row0 = block % row_tiles * kPolyphaseRows;
  block /= row_tiles;
  const std::int64_t head = block % p.num_heads;
  block /= p.num_heads;
  const std::int64_t b0 = block % batch_tiles * kBatch;
  const std::int64_t tile0 = block / batch_tiles * plan.positions;
  const Storage* const in = static_cast<const Storage*>(p.x) + head * p.x_strides[4];
  const std::int64_t in_columns = kGradient ? p.num_realizations : p.in_features;
  const std::int64_t out_columns = kGradient ? p.in_features : p.num_realizations;
  const bool aligned = is_aligned<Storage>(p.x, p.x_strides) && (!kGradient || s % 8 == 0);
  const float factor = __builtin_sqrtf(static_cast<float>(s));
  Streams<Storage> streams(p, plan, shared, head);

  // Rows of the product that this lane holds numbers of.
  int rows[2], row_index[2];
  TORCH_SPE_UNROLL
  for (int e = 0; e < 2; ++e) {
    rows[e] = warp * 16 + (kGradient ? 2 * group + e : group + 8 * e);
    row_index[e] = static_cast<int>((row0 + rows[e]) % s);  // of a diagonal in its group
  }

  for (int pass = 0; pass < plan.positions && tile0 + pass < length; pass += kPass) {
    const std::int64_t n0 = tile0 + pass;
    const int turn = static_cast<int>(n0 % s);  // of the diagonals
    float sums[kPass][kBatchTiles][4];
    TORCH_SPE_UNROLL
    for (int t = 0; t < kPass; ++t) {
      TORCH_SPE_UNROLL
      for (int i = 0; i < kBatchTiles; ++i) {
        TORCH_SPE_UNROLL
        for (int e = 0; e < 4; ++e) sums[t][i][e] = 0;
      }
    }

    for (std::int64_t sum0 = 0; sum0 < sum_count; sum0 += depth) {
      const std::int64_t d0 = kGradient ? row0 : sum0, diagonal0 = kGradient ? sum0 : row0;
      const std::int64_t group0 = diagonal0 / s;
      __syncthreads();  // shared memory has been used
      if (pass == 0 || sum_count > depth) {
        streams.make(d0, diagonal0, n0);
        const float* const kernel =
            static_cast<const float*>(p.kernel) + (head * p.in_features + d0) * plan.taps;
        for (int d = warp; d < plan.features; d += kThreads / 32) {
          const int count = d0 + d < p.in_features ? plan.taps : 0;
          const float* const from = kernel + d * plan.taps;
          std::uint32_t* to = shared.taps + d * plan.pairs * s;
          for (int pair = 0; pair < 2 * s * plan.pairs; pair += 2 * s, to += s) {
            for (int i = thread % 32; i < s; i += 32) {
              const int tap = pair + i;
              to[i] = pack_pair<Storage>(tap < count ? from[tap] : 0.0f,
                                         tap + s < count ? from[tap + s] : 0.0f);
            }
          }
        }
        if (plan.has_constant) {
          const int per_feature = plan.groups * s;
          for (int i = thread; i < plan.features * per_feature; i += kThreads) {
            const std::int64_t d = d0 + i / per_feature, r = group0 * s + i % per_feature;
            const float value =
                d < p.in_features && r < p.num_realizations
                    ? static_cast<const float*>(
                          p.constant)[(head * p.in_features + d) * p.num_realizations + r]
                    : 0.0f;
            write(value / factor, shared.constant + i);
          }
        }
      }
      copy_rows(
          shared.tile, plan.row, kTileRows, plan.columns, in_columns, p.x_strides[5], aligned,
          [&](int i) -> const Storage* {
            const std::int64_t b = b0 + i % kBatch, n = n0 + i / kBatch;
            if (b >= p.batch || n >= length) return nullptr;
            return in + b * p.x_strides[0] + n * p.x_strides[3];
          },
          [&](int column) -> std::int64_t {
            if constexpr (!kGradient) return sum0 + column;
            return realization_of(plan, column, group0, turn, in_columns);
          });
      copy_async_wait();
      __syncthreads();

      // A lane has two rows and 4 of 16 summands, two in each product.
      typename Streams<Storage>::Feature features[4];
      typename Streams<Storage>::Diagonal lines[4];
      TORCH_SPE_UNROLL
      for (int e = 0; e < 2; ++e) {
        if constexpr (kGradient) {
          features[e] = streams.feature(rows[e]);
        } else {
          lines[e] = streams.diagonal(rows[e]);
        }
      }
      for (int i0 = 0; i0 < depth; i0 += 16) {
        const Storage* tile[4];
        int words[4][2], taps[4][2];
        const int summand0 = i0 + (kGradient ? member : 4 * member);
        constexpr int kStep = kGradient ? 4 : 1;
        TORCH_SPE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int summand = summand0 + kStep * i;
          tile[i] = shared.tile + group * plan.row +
                    (kGradient ? column_of(shared, plan, summand) : summand0);
          if constexpr (kGradient) {
            lines[i] = streams.diagonal(summand);
          } else {
            features[i] = streams.feature(summand);
          }
          TORCH_SPE_UNROLL
          for (int e = 0; e < 2; ++e) {
            const auto feature = features[kGradient ? e : i];
            const auto line = lines[kGradient ? i : e];
            const int tap = streams.tap(feature, line);
            words[i][e] = feature.begin + line.begin + tap + (sum_count > depth ? 0 : pass);
            taps[i][e] = (kGradient ? rows[e] : summand) * plan.pairs * s + tap;
          }
        }
        // code(t, index of its realization after that of its diagonal, summand, row)
        const auto multiply = [&](const auto& code) {
          int turned = turn;
          TORCH_SPE_UNROLL
          for (int t = 0; t < kPass; ++t, turned = next_turn(turned, s)) {
            std::uint32_t twice[kBatchTiles][4];  // (x, x) of the 4 summands
            TORCH_SPE_UNROLL
            for (int j = 0; j < kBatchTiles; ++j) {
              const int at = (t * kBatch + 8 * j) * plan.row;
              if constexpr (kGradient) {
                TORCH_SPE_UNROLL
                for (int i = 0; i < 4; ++i) twice[j][i] = low_twice(tile[i][at + t].bits);
              } else {
                const auto four = *reinterpret_cast<const Four<Storage>*>(tile[0] + at);
                std::uint32_t pairs[2];
                __builtin_memcpy(pairs, &four, sizeof(pairs));
                TORCH_SPE_UNROLL
                for (int i = 0; i < 4; ++i)
                  twice[j][i] = i % 2 == 0 ? low_twice(pairs[i / 2]) : high_twice(pairs[i / 2]);
              }
            }
            TORCH_SPE_UNROLL
            for (int i = 0; i < 4; i += 2) {
              const std::uint32_t a[4] = {code(t, turned, i, 0), code(t, turned, i, 1),
                                          code(t, turned, i + 1, 0), code(t, turned, i + 1, 1)};
              TORCH_SPE_UNROLL
              for (int j = 0; j < kBatchTiles; ++j) {
                const std::uint32_t b[2] = {twice[j][i], twice[j][i + 1]};
                mma_m16n8k16<Storage>(sums[t][j], a, b);
              }
            }
          }
        };
        for (int pair = 0; pair < plan.pairs; ++pair) {
          std::uint32_t factors[4][2];
          TORCH_SPE_UNROLL
          for (int i = 0; i < 4; ++i) {
            TORCH_SPE_UNROLL
            for (int e = 0; e < 2; ++e) factors[i][e] = shared.taps[taps[i][e] + pair * s];
          }
          multiply([&](int t, int, int i, int e) {
            return multiply_pairs<Storage>(shared.words[words[i][e] + 2 * s * pair + t],
                                           factors[i][e]);
          });
        }
        if (plan.has_constant) {
          multiply([&](int, int turned, int i, int e) -> std::uint32_t {
            const int summand = summand0 + kStep * i;
            const int d = kGradient ? rows[e] : summand, diagonal = kGradient ? summand : rows[e];
            return shared
                .constant[(d * plan.groups + streams.group(diagonal)) * s +
                          turned_index(shared.index[diagonal], turned, s)]
                .bits;
          });
        }
      }
    }

    // The sums go through shared memory; where the block has all realizations of its groups, it
    // brings them into order there.
    const bool ordered = kGradient || kPolyphaseRows % s == 0;
    __syncthreads();  // the tile has been used
    int turned = turn;
    TORCH_SPE_UNROLL
    for (int t = 0; t < kPass; ++t, turned = next_turn(turned, s)) {
      TORCH_SPE_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int column = kGradient || !ordered
                               ? rows[e]
                               : rows[e] - row_index[e] + turned_index(row_index[e], turned, s);
        TORCH_SPE_UNROLL
        for (int j = 0; j < kBatchTiles; ++j) {
          TORCH_SPE_UNROLL
          for (int i = 0; i < 2; ++i)
            write(sums[t][j][2 * e + i] * factor,
                  shared.tile + (t * kBatch + 8 * j + 2 * member + i) * plan.row + column);
        }
      }
    }
    __syncthreads();
    const bool vectors =
        ordered && out_columns % 8 == 0 && reinterpret_cast<std::uintptr_t>(p.out) % 16 == 0;
    const int column = thread % (kPolyphaseRows / 8) * 8;
    for (int m = thread / (kPolyphaseRows / 8); m < kTileRows;
         m += kThreads / (kPolyphaseRows / 8)) {
      const std::int64_t b = b0 + m % kBatch, n = n0 + m / kBatch;
      if (b >= p.batch || n >= length) continue;
      const Storage* const from = shared.tile + m * plan.row + column;
      Storage* const to =
          static_cast<Storage*>(p.out) + ((b * length + n) * p.num_heads + head) * out_columns;
      if (vectors && row0 + column < out_columns) {
        *reinterpret_cast<Vector<Storage>*>(to + row0 + column) =
            *reinterpret_cast<const Vector<Storage>*>(from);
        continue;
      }
      for (int e = 0; e < 8; ++e) {
        std::int64_t index = row0 + column + e;
        if (!ordered)
          index += (shared.index[column + e] + turn + m / kBatch) % s - shared.index[column + e];
        if (index < out_columns) to[index] = from[e];
      }
    }
  }
}

// Whether the kernels here may take the noise.
inline bool is_polyphase_line(const ConvFilterParams& p) {
  const core::NoiseParams& noise = p.generated;
  const std::int64_t s = noise.stride[2];
  return p.noise == nullptr && noise.ndim == 1 && s > 1 && s <= 1024 && p.kernel_size[2] <= 8192 &&
         s <= 4 * p.num_realizations && p.num_realizations <= (1 << 20) && p.batch > 0 &&
         p.in_features > 0 && p.size[2] > 0;
}

// Calls function(plan) with the first of plans for some number of features and diagonals and some
// number of positions, `make(depth, positions)`, of which `Shared` is small enough. Returns whether
// there is one.
template <class Shared, class Make, class Function>
bool choose_plan(std::int64_t sums, const Make& make, const Function& function) {
  for (const int depth : {64, 32, 16}) {
    if (depth > 16 && depth >= 2 * sums) continue;
    for (const int positions : {64, 32, 16, 8}) {
      const PolyphasePlan plan = make(depth, positions);
      if (positions < plan.pass) continue;
      if (positions > plan.pass && sums > depth) continue;  // noise is made again for each depth
      Carver size;
      Shared{size, plan};
      if (static_cast<std::int64_t>(size.size()) > kMostShared) continue;
      function(plan, size.size());
      return true;
    }
  }
  return false;
}

// For the gradient of the kernel: products of 16 features each, and columns of a tile of x.
constexpr int kUnrolled = 4;  // positions
constexpr int kTiles = 2, kFeatures = 16 * kTiles, kFeatureRow = kFeatures + 8;

template <class Storage>
struct PolyphaseTapsShared : StreamShared {
  Storage *x, *grad;  // [position, batch row, column]

  TORCH_SPE_INLINE PolyphaseTapsShared(Carver& carver, const PolyphasePlan& plan)
      : StreamShared(carver, plan),
        x(carver.take<Storage>(std::int64_t{kTileRows} * kFeatureRow)),
        grad(carver.take<Storage>(std::int64_t{kTileRows} * plan.row)) {}
};

// Gradient of the kernel. A block takes kFeatures features, kPolyphaseRows diagonals and a segment
// of the positions. The gradients of codes, products of x and grad_out summed over the batch, are
// made on tensor cores; a lane adds each, times the stream, to sums of its taps.
template <class Storage, int kBatchTiles>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    polyphase_taps_kernel(const ConvFilterBackwardParams p, const PolyphasePlan plan,
                          std::int64_t segments, double* parts) {  // [segment, group, H, D, P]
  constexpr int kBatch = 8 * kBatchTiles, kPass = kTileRows / kBatch;
  TORCH_SPE_SHARED_MEMORY(memory);
  Carver carver(memory);
  const PolyphaseTapsShared<Storage> shared(carver, plan);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int group = lane / 4, member = lane % 4, s = plan.stride;
  const std::int64_t diagonals = std::int64_t{plan.all_groups} * s, length = p.size[2];
  const std::int64_t diagonal_tiles = ceil_div(diagonals, kPolyphaseRows);
  const std::int64_t feature_tiles = ceil_div(p.in_features, kFeatures);
  std::int64_t block = blockIdx.x;
  const std::int64_t segment = block % segments;
  block /= segments;
  const std::int64_t diagonal0 = block % diagonal_tiles * kPolyphaseRows;
  block /= diagonal_tiles;
  const std::int64_t d0 = block % feature_tiles * kFeatures, head = block / feature_tiles;
  const std::int64_t tiles = ceil_div(length, plan.positions);
  const std::int64_t first_tile = segment * ceil_div(tiles, segments);
  const std::int64_t end_tile = min_of(tiles, first_tile + ceil_div(tiles, segments));
  const Storage* const x =
      static_cast<const Storage*>(p.x) + head * p.x_strides[4] + d0 * p.x_strides[5];
  const Storage* const grad =
      static_cast<const Storage*>(p.grad_out) + head * p.grad_out_strides[4];
  const bool x_aligned = is_aligned<Storage>(p.x, p.x_strides);
  const bool grad_aligned = is_aligned<Storage>(p.grad_out, p.grad_out_strides) && s % 8 == 0;
  const double factor = __builtin_sqrt(static_cast<double>(s));
  Streams<Storage> streams(p, plan, shared, head);
  // The lane's codes: of feature tile i, diagonal tile j and number e of the product, these are.
  const int warp_diagonal = thread / 32 * 16;
  const auto feature_of = [&](int i, int e) { return 16 * i + group + 8 * (e / 2); };
  const auto diagonal_of = [&](int j, int e) {
    return warp_diagonal + 8 * j + member + 4 * (e % 2);
  };

  for (int pair = 0; pair < plan.pairs; ++pair) {
    float sums[kTiles][2][4][2];
    for (std::int64_t tile = first_tile; tile < end_tile; ++tile) {
      const std::int64_t tile0 = tile * plan.positions;
      TORCH_SPE_UNROLL
      for (int i = 0; i < kTiles * 16; ++i) sums[i / 16][i / 8 % 2][i / 2 % 4][i % 2] = 0;
      __syncthreads();  // the streams before have been used
      streams.make(d0, diagonal0, tile0);
      __syncthreads();
      int words[kTiles][2][4];
      TORCH_SPE_UNROLL
      for (int i = 0; i < kTiles * 8; ++i) {
        const auto feature = streams.feature(feature_of(i / 8, i % 4));
        const auto line = streams.diagonal(diagonal_of(i / 4 % 2, i % 4));
        words[i / 8][i / 4 % 2][i % 4] =
            feature.begin + line.begin + streams.tap(feature, line) + 2 * s * pair;
      }
      for (std::int64_t b0 = 0; b0 < p.batch; b0 += kBatch) {
        for (int pass = 0; pass < plan.positions && tile0 + pass < length; pass += kPass) {
          const std::int64_t n0 = tile0 + pass;
          const int turn = static_cast<int>(n0 % s);
          const auto row = [&](const Storage* data, const std::int64_t (&strides)[6], int i) {
            const std::int64_t b = b0 + i % kBatch, n = n0 + i / kBatch;
            return b < p.batch && n < length ? data + b * strides[0] + n * strides[3] : nullptr;
          };
          __syncthreads();  // the tiles have been used
          copy_rows(
              shared.x, kFeatureRow, kTileRows, kFeatures, p.in_features - d0, p.x_strides[5],
              x_aligned, [&](int i) { return row(x, p.x_strides, i); },
              [&](int column) -> std::int64_t { return column; });
          copy_rows(
              shared.grad, plan.row, kTileRows, plan.columns, p.num_realizations,
              p.grad_out_strides[5], grad_aligned,
              [&](int i) { return row(grad, p.grad_out_strides, i); },
              [&](int column) {
                return realization_of(plan, column, diagonal0 / s, turn, p.num_realizations);
              });
          copy_async_wait();
          __syncthreads();
          const Storage* columns[2];  // number `group` of a product's columns
          TORCH_SPE_UNROLL
          for (int j = 0; j < 2; ++j)
            columns[j] =
                shared.grad + 2 * member * plan.row +
                column_of(shared, plan, warp_diagonal + 8 * j + group / 2 + 4 * (group % 2));
          int at[kTiles][2][4];
          TORCH_SPE_UNROLL
          for (int i = 0; i < kTiles * 8; ++i)
            at[i / 8][i / 4 % 2][i % 4] = words[i / 8][i / 4 % 2][i % 4] + pass;
          for (int t0 = 0; t0 < kPass; t0 += kUnrolled) {
            TORCH_SPE_UNROLL
            for (int step = 0; step < kUnrolled; ++step) {
              const int t = t0 + step;
              std::uint32_t a[kTiles][4] = {}, b[2][2] = {};
              if constexpr (kBatchTiles == 1) {
                TORCH_SPE_UNROLL
                for (int i = 0; i < kTiles; i += 2) {
                  std::uint32_t four[4];
                  ldmatrix_x4<true>(four, shared.x + (t * kBatch + lane % 8) * kFeatureRow +
                                              16 * i + lane / 8 * 8);
                  TORCH_SPE_UNROLL
                  for (int e = 0; e < 4; ++e) a[i + e / 2][e % 2] = four[e];
                }
              } else {
                TORCH_SPE_UNROLL
                for (int i = 0; i < kTiles; ++i)
                  ldmatrix_x4<true>(
                      a[i], shared.x + (t * kBatch + lane % 8 + lane / 16 * 8) * kFeatureRow +
                                16 * i + lane / 8 % 2 * 8);
              }
              TORCH_SPE_UNROLL
              for (int j = 0; j < 2; ++j) {
                TORCH_SPE_UNROLL
                for (int k = 0; k < kBatchTiles; ++k) {
                  const Storage* const pair_at = columns[j] + (t * kBatch + 8 * k) * plan.row + t;
                  b[j][k] = join_halves(pair_at[0].bits, pair_at[plan.row].bits);
                }
              }
              TORCH_SPE_UNROLL
              for (int i = 0; i < kTiles; ++i) {
                TORCH_SPE_UNROLL
                for (int j = 0; j < 2; ++j) {
                  float codes[4] = {};
                  mma_m16n8k16<Storage>(codes, a[i], b[j]);
                  TORCH_SPE_UNROLL
                  for (int e = 0; e < 4; ++e) {
                    const std::uint32_t word = shared.words[at[i][j][e] + step];
                    const Storage low{static_cast<std::uint16_t>(word)};
                    const Storage high{static_cast<std::uint16_t>(word >> 16)};
                    sums[i][j][e][0] += codes[e] * read(low);
                    sums[i][j][e][1] += codes[e] * read(high);
                  }
                }
              }
            }
            TORCH_SPE_UNROLL
            for (int i = 0; i < kTiles * 8; ++i) at[i / 8][i / 4 % 2][i % 4] += kUnrolled;
          }
        }
      }
      // Every tap of a group is one lane's.
      TORCH_SPE_UNROLL
      for (int i = 0; i < kTiles * 8; ++i) {
        const int local = feature_of(i / 8, i % 4), line = diagonal_of(i / 4 % 2, i % 4);
        const std::int64_t d = d0 + local, diagonal = diagonal0 + line;
        if (d >= p.in_features || diagonal >= diagonals) continue;
        const int tap = streams.tap(streams.feature(local), streams.diagonal(line)) + 2 * s * pair;
        double* const part =
            parts +
            (((segment * plan.all_groups + diagonal / s) * p.num_heads + head) * p.in_features +
             d) *
                plan.taps;
        TORCH_SPE_UNROLL
        for (int k = 0; k < 2; ++k) {
          if (tap + k * s >= plan.taps) continue;
          const double before = tile == first_tile ? 0.0 : part[tap + k * s];
          part[tap + k * s] =
              before + factor * static_cast<double>(sums[i / 8][i / 4 % 2][i % 4][k]);
        }
      }
    }
  }
}

// Starts the kernel, unless it is not made for these arguments.
template <class Storage, bool kGradient>
bool launch_polyphase(const ConvFilterParams& p, Stream stream) {
  if (!is_polyphase_line(p)) return false;
  const std::int64_t s = p.generated.stride[2], diagonals = ceil_div(p.num_realizations, s) * s;
  return choose_plan<PolyphaseShared<Storage>>(
      kGradient ? diagonals : p.in_features,
      [&](int depth, int positions) {
        PolyphasePlan plan(p, kGradient ? kPolyphaseRows : depth,
                           kGradient ? depth : kPolyphaseRows, positions, p.batch > 8 ? 16 : 8);
        plan.set_columns(kGradient ? plan.groups * (plan.stride + plan.pass) + plan.pass : depth);
        plan.feature_step = kGradient ? 2 : 4;
        plan.feature_banks = kGradient ? 4 : 8;
        return plan;
      },
      [&](const PolyphasePlan& plan, std::size_t shared_bytes) {
        const std::int64_t blocks =
            ceil_div(kGradient ? p.in_features : diagonals, kPolyphaseRows) * p.num_heads *
            ceil_div(p.batch, plan.batch) * ceil_div(p.size[2], plan.positions);
        launch(plan.batch > 8 ? polyphase_kernel<Storage, kGradient, 2>
                              : polyphase_kernel<Storage, kGradient, 1>,
               grid_of(blocks), dim3(kThreads), shared_bytes, stream, p, plan);
      });
}

// The gradient of x is the filter of grad_out, with features and realizations exchanged.
template <class Storage>
bool launch_polyphase_gradient(const ConvFilterBackwardParams& p, Stream stream) {
  ConvFilterParams exchanged = p;
  exchanged.x = p.grad_out;
  for (int i = 0; i < 6; ++i) exchanged.x_strides[i] = p.grad_out_strides[i];
  exchanged.out = p.grad_x;
  return launch_polyphase<Storage, true>(exchanged, stream);
}

// How the gradient of the kernel is made, if it `fits`, with segments of the positions.
struct PolyphaseTaps {
  bool fits = false;
  PolyphasePlan plan;
  std::int64_t blocks = 0, segments = 0;  // blocks of a segment
  std::size_t shared_bytes = 0;

  explicit PolyphaseTaps(const ConvFilterBackwardParams& p) : plan(make_plan(p, 64)) {
    if ((p.dtype != core::DType::kFloat16 && p.dtype != core::DType::kBFloat16) ||
        !is_polyphase_line(p))
      return;
    for (const int positions : {64, 32, 16}) {
      plan = make_plan(p, positions);
      Carver size;
      PolyphaseTapsShared<core::Half>{size, plan};
      shared_bytes = size.size();
      fits = static_cast<std::int64_t>(shared_bytes) <= kMostShared;
      if (fits) break;
    }
    blocks = p.num_heads * ceil_div(p.in_features, kFeatures) * plan.diagonal_tiles();
    const std::int64_t count = ceil_div(p.size[2], plan.positions);
    segments = min_of(count, ceil_div(kWantedBlocks, max_of(1, blocks)));
    segments = ceil_div(count, ceil_div(count, segments));  // none is empty
  }
  std::int64_t parts() const { return segments * plan.all_groups; }

 private:
  static PolyphasePlan make_plan(const ConvFilterBackwardParams& p, int positions) {
    PolyphasePlan plan(p, kFeatures, kPolyphaseRows, positions, p.batch > 8 ? 16 : 8);
    plan.set_columns(plan.groups * (plan.stride + plan.pass) + plan.pass);
    plan.feature_step = 1;
    plan.feature_banks = 4;
    return plan;
  }
};

template <class Storage>
void launch_polyphase_taps(const ConvFilterBackwardParams& p, const PolyphaseTaps& taps,
                           double* parts, Stream stream) {
  launch(
      taps.plan.batch > 8 ? polyphase_taps_kernel<Storage, 2> : polyphase_taps_kernel<Storage, 1>,
      grid_of(taps.blocks * taps.segments), dim3(kThreads), taps.shared_bytes, stream, p, taps.plan,
      taps.segments, parts);
}

}  // namespace torch_spe::cuda
