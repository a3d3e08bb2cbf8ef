// The noise of the polyphase kernels in shared memory, see polyphase_plan.h.
#pragma once

#include "encode/conv/polyphase_plan.h"
#include "normals.h"

namespace torch_spe::cuda {

// The noise of some features and diagonals.
struct NoiseStreamsShared {
  std::uint32_t* words;  // [feature, group, position]: the number there, and the one s later
  std::int64_t* period;  // of the stream's first number, for each feature
  int *origin, *phase;   // of that number within its period, and of position 0
  int* begin;            // of the streams of a feature
  int *group, *index;    // of each diagonal; a group that is not there has number plan.groups

  TORCH_SPE_INLINE NoiseStreamsShared(MemoryLayout& layout, const PolyphasePlan& plan)
      : words(layout.take<std::uint32_t>(std::int64_t{plan.features} * plan.groups * plan.stream)),
        period(layout.take<std::int64_t>(plan.features)),
        origin(layout.take<int>(plan.features)),
        phase(layout.take<int>(plan.features)),
        begin(layout.take<int>(plan.features)),
        group(layout.take<int>(plan.diagonals)),
        index(layout.take<int>(plan.diagonals)) {}
};

template <class Storage>
class NoiseStreams {
 public:
  TORCH_SPE_DEVICE NoiseStreams(const ConvFilterParams& p, const PolyphasePlan& plan,
                                const NoiseStreamsShared& shared, std::int64_t head)
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

  // A thread makes the values of kRun realizations of a feature, for one period after the other.
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
      const int realizations = static_cast<int>(
          inside ? max_of(0, min_of(kRun, p_.num_realizations - r)) : 0);  // that exist
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
        if (realizations > 0)
          make_run<kRun>(feature + d, period + j + 1, r, &next_signs, next_normals);
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
                stream[u + k] =
                    k < realizations ? pack_pair<Storage>(normals[k], next_normals[k]) : 0u;
            }
          } else {
            const int last_there = static_cast<int>(min_of(last, realizations));
            // The signs of number k in the highest bits of both halves.
            std::uint32_t low = rotate(signs, first + 17), high = rotate(next_signs, first + 1);
            for (int k = first; k < last_there; ++k) {
              stream[u + k] = ones ^ (low & 0x8000u) ^ (high & 0x80000000u);
              low = rotate(low, 1);
              high = rotate(high, 1);
            }
            for (int k = static_cast<int>(max_of(first, realizations)); k < last; ++k)
              stream[u + k] = 0;
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
  const NoiseStreamsShared& shared_;
  const std::int64_t head_;
  const std::uint64_t seed_;
};

// Copies rows of `columns` values to shared memory: number `at(column)` of row(i), zero where it
// is not below `count`, or the row is null. `aligned` rows can be read 8 values at once. The copy
// may go on until copy_async_wait.
template <class Storage, class Row, class At>
TORCH_SPE_DEVICE void copy_polyphase_rows(Storage* out, int row_stride, int rows, int columns,
                                          std::int64_t count, std::int64_t stride, bool aligned,
                                          const Row& row, const At& at) {
  const int step = aligned ? 8 : 1, pieces = columns / step;
  const int width = pieces < kThreads ? pieces : kThreads, height = kThreads / width;
  const int first = static_cast<int>(threadIdx.x) / width;
  if (first >= height) return;
  for (int piece = static_cast<int>(threadIdx.x) % width; piece < pieces; piece += width) {
    const int column = piece * step;
    const std::int64_t index = at(column);
    const bool whole = aligned && index + 8 <= count;
    Storage* to = out + first * row_stride + column;
    for (int i = first; i < rows; i += height, to += height * row_stride) {
      const Storage* const from = row(i);
      if (whole && from != nullptr) {
        copy_async16(to, from + index);
      } else if (aligned && (from == nullptr || index >= count)) {
        *reinterpret_cast<Vector<Storage>*>(to) = {};
      } else {
        for (int e = 0; e < step; ++e) {
          to[e].bits = from != nullptr && index + e < count ? from[(index + e) * stride].bits
                                                            : std::uint16_t(0);
        }
      }
    }
  }
}

// Puts phi in the place of what this thread has copied with copy_polyphase_rows, between
// copy_async_wait and the barrier that follows it.
template <class Storage>
TORCH_SPE_DEVICE void map_polyphase_rows(FeatureMap map, Storage* rows_begin, int row_stride,
                                         int rows, int columns, bool aligned) {
  if (map == FeatureMap::kIdentity) return;
  const int step = aligned ? 8 : 1, pieces = columns / step;
  const int width = pieces < kThreads ? pieces : kThreads, height = kThreads / width;
  const int first = static_cast<int>(threadIdx.x) / width;
  if (first >= height) return;
  TORCH_SPE_KEEP_LOOP
  for (int piece = static_cast<int>(threadIdx.x) % width; piece < pieces; piece += width) {
    TORCH_SPE_KEEP_LOOP
    for (int i = first; i < rows; i += height) {
      Storage* const own = rows_begin + i * row_stride + piece * step;
      if (aligned) {
        map_eight_features(map, own);
      } else {
        map_one_feature(map, own);
      }
    }
  }
}

// Going on by one position; the index within its group of a diagonal's realization.
TORCH_SPE_DEVICE int next_turn(int turn, int stride) { return turn + 1 == stride ? 0 : turn + 1; }
TORCH_SPE_DEVICE int rotated_index(int index, int turn, int stride) {
  return index + turn < stride ? index + turn : index + turn - stride;
}

// The column in a tile of grad_out of a diagonal's first realization.
TORCH_SPE_DEVICE int column_of(const NoiseStreamsShared& shared, const PolyphasePlan& plan,
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

}  // namespace torch_spe::cuda
