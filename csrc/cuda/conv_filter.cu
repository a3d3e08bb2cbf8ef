// A block makes codes, sum_p kernel[p] z[n+p, r], for a tile of positions n along the last
// dimension and of realizations r, of one head and feature. The taps of the other dimensions come
// one after the other; each needs a line of noise along the last dimension, which comes in windows
// of some numbers for each realization. Dense noise is multiplied with a Toeplitz tile of the
// kernel. Of polyphase noise a window holds one number for a period, and a code adds up its few
// taps.
#include <stdexcept>
#include <string>

#include "constant_gradient.h"
#include "conv_filter.h"
#include "device_for.h"
#include "polyphase.h"
#include "tiles.h"

namespace torch_spe::cuda {
namespace {

// Realizations for which one thread makes noise: within one block of the generator.
constexpr int kGaussianGroup = 4, kSignGroup = 8;

// Positions and realizations of a tile of codes, and periods of a window.
template <bool kDenseNoise, int kNumTokens = 64, int kNumReal = 32, int kNumPeriods = 32>
struct CodeTile {
  static constexpr bool kDense = kDenseNoise;
  static constexpr int kTokens = kNumTokens, kReal = kNumReal, kWindow = kNumPeriods;
  static_assert(kReal % kSignGroup == 0 && 128 % kReal == 0);
};

// Where tensor cores make the codes, noise costs most, of which a long tile needs less: it has the
// same number of codes. Elsewhere products cost most, and a long tile multiplies more zeros.
template <class Operand, bool kDense>
using LongTile = std::conditional_t<kDense && TileProduct<Operand, 128, 16>::kTensorCores,
                                    CodeTile<kDense, 128, 16, 128>, CodeTile<kDense>>;

TORCH_SPE_INLINE std::int64_t num_periods(const core::NoiseParams& noise) {
  return noise.stride[0] * noise.stride[1] * noise.stride[2];
}

// A line of positions along the last dimension, and where the tile begins on it.
struct Place {
  std::int64_t head, d, i0, i1, n0;

  TORCH_SPE_DEVICE std::int64_t offset(const std::int64_t (&strides)[6]) const {  // of x and out
    return i0 * strides[1] + i1 * strides[2] + n0 * strides[3] + head * strides[4];
  }
};

template <int kTokens>
struct PositionTiles {
  std::int64_t size1, per_line, count;

  TORCH_SPE_INLINE PositionTiles(std::int64_t size0, std::int64_t size1, std::int64_t size2)
      : size1(size1), per_line(ceil_div(size2, kTokens)), count(size0 * size1 * per_line) {}
  TORCH_SPE_INLINE explicit PositionTiles(const ConvFilterParams& p)
      : PositionTiles(p.size[0], p.size[1], p.size[2]) {}
  TORCH_SPE_DEVICE Place place(std::int64_t tile, std::int64_t head, std::int64_t d) const {
    const std::int64_t line = tile / per_line;
    return {head, d, line / size1, line % size1, tile % per_line * kTokens};
  }
};

TORCH_SPE_DEVICE double read_as(core::DType dtype, const void* data, std::int64_t i) {
  switch (dtype) {
    case core::DType::kFloat32:
      return read(static_cast<const float*>(data)[i]);
    case core::DType::kFloat64:
      return read(static_cast<const double*>(data)[i]);
    case core::DType::kFloat16:
      return read(static_cast<const core::Half*>(data)[i]);
    case core::DType::kBFloat16:
      break;
  }
  return read(static_cast<const core::BFloat16*>(data)[i]);
}

template <class T>
TORCH_SPE_DEVICE void write_as(core::DType dtype, T value, void* data, std::int64_t i) {
  switch (dtype) {
    case core::DType::kFloat32:
      return write(static_cast<float>(value), static_cast<float*>(data) + i);
    case core::DType::kFloat64:
      return write(static_cast<double>(value), static_cast<double*>(data) + i);
    case core::DType::kFloat16:
      return write(static_cast<float>(value), static_cast<core::Half*>(data) + i);
    case core::DType::kBFloat16:
      return write(static_cast<float>(value), static_cast<core::BFloat16*>(data) + i);
  }
}

// The noise of one head and feature that a tile of positions needs, along the line of one tap of
// the other dimensions. Positions are relative to the tile's first; period q of realization r has
// its noise at position q s + class(r) - origin, with s the stride of the last dimension.
template <class Tile>
class NoiseLine {
 public:
  static constexpr bool kDense = Tile::kDense;
  static constexpr int kTokens = Tile::kTokens, kReal = Tile::kReal, kWindow = Tile::kWindow;
  std::int64_t origin = 0;
  int count;  // periods
  std::int64_t stride;

  TORCH_SPE_DEVICE NoiseLine(const ConvFilterParams& p, const Place& place, std::uint64_t seed)
      : count(static_cast<int>(min_of(kTokens, p.size[2] - place.n0) + p.kernel_size[2] - 1)),
        stride(p.generated.stride[2]),
        p_(p),
        place_(place),
        seed_(seed),
        first_period_(p.generated.start[2] + place.n0) {
    if constexpr (!kDense) {
      const core::NoiseParams& noise = p.generated;
      core::noise_shift(seed_, noise.ndim, place.head, place.d, noise.stride, shift_);
      const std::int64_t first = first_period_ + shift_[2];
      first_period_ = core::floor_divide(first, stride);
      origin = first - first_period_ * stride;
      count = static_cast<int>((origin + count - 1) / stride) + 1;
    }
  }

  // Goes to a tap of the other dimensions.
  TORCH_SPE_DEVICE void set_tap(std::int64_t tap0, std::int64_t tap1) {
    line_[0] = place_.i0 + tap0;
    line_[1] = place_.i1 + tap1;
    for (int i = 0; i < 2; ++i) {
      const std::int64_t position = p_.generated.start[i] + line_[i] + shift_[i];
      const std::int64_t s = p_.generated.stride[i];
      period_[i] = kDense ? position : core::floor_divide(position, s);
      phase_[i] = kDense ? 0 : position - period_[i] * s;
    }
  }

  // Whether realization r has noise on this line, which only polyphase noise of several dimensions
  // may lack.
  TORCH_SPE_DEVICE bool has(std::int64_t r) const {
    const std::int64_t* const s = p_.generated.stride;
    return (s[1] == 1 || r / s[2] % s[1] == phase_[1]) &&
           (s[0] == 1 || r / (s[1] * s[2]) % s[0] == phase_[0]);
  }
  TORCH_SPE_DEVICE bool has_any(std::int64_t r0) const {
    if (p_.generated.stride[0] == 1 && p_.generated.stride[1] == 1) return true;
    for (int i = 0; i < kReal; ++i) {
      if (has(r0 + i)) return true;
    }
    return false;
  }

  // out[q - first][r - r0] for kWindow periods and kReal realizations, without the factor of
  // polyphase noise; 0 where there is none, and some number beyond the last realization.
  template <class Number>
  TORCH_SPE_DEVICE void fill(int first, std::int64_t r0, Number* out) const {
    if (p_.noise != nullptr) {
      fill_given(first, r0, out);
    } else if (p_.generated.kind == core::NoiseKind::kGaussian) {
      fill_generated<core::NoiseKind::kGaussian>(first, r0, out);
    } else {
      fill_generated<core::NoiseKind::kRademacher>(first, r0, out);
    }
  }

 private:
  template <class Number>
  TORCH_SPE_DEVICE void fill_given(int first, std::int64_t r0, Number* out) const {
    const auto& strides = p_.noise_strides;
    const std::int64_t base = place_.head * strides[0] + place_.d * strides[1] +
                              line_[0] * strides[2] + line_[1] * strides[3];
    const std::int64_t length = p_.size[2] + p_.kernel_size[2] - 1;
    TORCH_SPE_KEEP_LOOP
    for (int i = static_cast<int>(threadIdx.x); i < kWindow * kReal; i += kThreads) {
      const std::int64_t j = place_.n0 + first + i / kReal, r = r0 + i % kReal;
      const bool inside = j < length && r < p_.num_realizations;
      const double value =
          inside ? read_as(p_.noise_dtype, p_.noise, base + j * strides[4] + r * strides[5]) : 0.0;
      write(static_cast<core::accumulate_t<Number>>(value),
            out + i / kReal * row_of<Number>(kReal) + i % kReal);
    }
  }

  template <core::NoiseKind kKind, class Number>
  TORCH_SPE_DEVICE void fill_generated(int first, std::int64_t r0, Number* out) const {
    const core::NoiseParams& noise = p_.generated;
    constexpr int kGroup = kKind == core::NoiseKind::kGaussian ? kGaussianGroup : kSignGroup;
    constexpr int kGroups = kReal / kGroup;
    // A thread keeps to its realizations.
    const int column = static_cast<int>(threadIdx.x) % kGroups * kGroup;
    const std::int64_t r = r0 + column;
    const std::uint32_t source = core::noise_source(place_.head, place_.d);
    const std::uint32_t block = core::noise_block(static_cast<std::uint32_t>(kKind), noise.ndim,
                                                  r / core::realizations_of_block(kKind));
    const std::uint64_t position0 =
        core::noise_position(noise.ndim, period_[0], period_[1], first_period_ + first);
    const std::uint64_t mask = core::noise_position(noise.ndim, 0, 0, -1);
    const int periods = r < p_.num_realizations ? count - first : 0;
    TORCH_SPE_KEEP_LOOP
    for (int q = static_cast<int>(threadIdx.x) / kGroups; q < kWindow; q += kThreads / kGroups) {
      float values[kGroup] = {};
      if (q < periods) {
        const std::uint64_t position =
            (position0 & ~mask) | ((position0 + static_cast<std::uint64_t>(q)) & mask);
        const auto words = core::philox<core::ScalarNumbers>(
            {{static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(position >> 32),
              source, block}},
            seed_);
        if constexpr (kKind == core::NoiseKind::kGaussian) {
          normals_of<Number>(words, values);
        } else {
          const std::uint32_t bits = core::word_of(words, r % 128 / 32) >> r % 32;
          TORCH_SPE_UNROLL
          for (int e = 0; e < kGroup; ++e) values[e] = (bits >> e & 1u) != 0 ? -1.0f : 1.0f;
        }
        if constexpr (!kDense) {
          TORCH_SPE_UNROLL
          for (int e = 0; e < kGroup; ++e) values[e] = has(r + e) ? values[e] : 0.0f;
        }
      }
      write_operands(values, out + q * row_of<Number>(kReal) + column);
    }
  }

  const ConvFilterParams& p_;
  Place place_;
  std::uint64_t seed_;
  std::int64_t shift_[3] = {0, 0, 0};
  std::int64_t first_period_;
  std::int64_t line_[2], period_[2], phase_[2];
};

// The Toeplitz tile kernel[t][i] = kernel[first + i - t] of a line of taps: what dense noise is
// multiplied with, or, mirrored, kernel[t - (first + i)].
template <class Tile, bool kMirrored, class T, class Operand>
TORCH_SPE_DEVICE void fill_toeplitz(const T* taps, std::int64_t count, std::int64_t first,
                                    Operand* out) {
  constexpr int kSize = toeplitz_copy_size<Operand>(Tile::kTokens, Tile::kWindow);
  TORCH_SPE_KEEP_LOOP
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kTokens + Tile::kWindow - 1;
       i += kThreads) {
    const std::int64_t lag = first + i - (Tile::kTokens - 1);
    const std::int64_t tap = kMirrored ? -lag : lag;
    Operand number;
    write(tap >= 0 && tap < count ? taps[tap] : T(0), &number);
    out[i] = number;
    if (kToeplitzCopies<Operand> == 2 && i > 0) out[kSize + i - 1] = number;
  }
}

TORCH_SPE_DEVICE std::uint64_t seed_of(const ConvFilterParams& p) {
  const std::int64_t* const seed = p.generated.device_seed;
  return seed == nullptr ? 0 : static_cast<std::uint64_t>(*seed);
}

template <class T>
TORCH_SPE_DEVICE const T* taps_of(const ConvFilterParams& p, const Place& place, std::int64_t tap0,
                                  std::int64_t tap1) {
  return static_cast<const T*>(p.kernel) +
         (((place.head * p.in_features + place.d) * p.kernel_size[0] + tap0) * p.kernel_size[1] +
          tap1) *
             p.kernel_size[2];
}

// Shared memory of windows of noise, one or two in turn.
template <class Storage, class Operand, class Tile>
struct CodeShared {
  using T = core::accumulate_t<Storage>;
  using Number = std::conditional_t<Tile::kDense, Operand, T>;  // of noise
  static constexpr int kNoise = Tile::kWindow * row_of<Number>(Tile::kReal);
  static constexpr int kToeplitz =
      Tile::kDense ? toeplitz_size<Operand>(Tile::kTokens, Tile::kWindow) : 0;
  Number* noise;      // [window, period, r]
  Operand* toeplitz;  // [window, token, period], of dense noise

  TORCH_SPE_INLINE CodeShared(Carver& carver, int windows)
      : noise(carver.take<Number>(windows * kNoise)),
        toeplitz(carver.take<Operand>(windows * kToeplitz)) {}
};

template <class Storage, class Operand, class Tile>
class Codes {
 public:
  using T = core::accumulate_t<Storage>;
  using Shared = CodeShared<Storage, Operand, Tile>;
  static constexpr bool kDense = Tile::kDense;
  static constexpr int kReal = Tile::kReal, kWindow = Tile::kWindow;

  TORCH_SPE_DEVICE explicit Codes(const ConvFilterParams& p)
      : p_(p), factor_(kDense ? T(1) : sqrt_of(num_periods(p.generated))), seed_(seed_of(p)) {}

  // Makes the codes of a tile and calls function(token, realization, code) for those that this
  // thread holds, constant included. Begins with a barrier.
  template <class Function>
  TORCH_SPE_DEVICE void make(const Shared& shared, const Place& place, std::int64_t r0,
                             const Function& function) {
    NoiseLine<Tile> line(p_, place, seed_);
    product_.clear();
    __syncthreads();  // whatever shared memory held has been used
    int window = 0;
    for (std::int64_t tap0 = 0; tap0 < p_.kernel_size[0]; ++tap0) {
      for (std::int64_t tap1 = 0; tap1 < p_.kernel_size[1]; ++tap1) {
        line.set_tap(tap0, tap1);
        if (!kDense && !line.has_any(r0)) continue;
        const T* const taps = taps_of<T>(p_, place, tap0, tap1);
        for (int first = 0; first < line.count; first += kWindow) {
          auto* const noise = shared.noise + window * Shared::kNoise;
          Operand* const toeplitz = shared.toeplitz + window * Shared::kToeplitz;
          line.fill(first, r0, noise);
          if constexpr (kDense)
            fill_toeplitz<Tile, false>(taps, p_.kernel_size[2], first, toeplitz);
          // One barrier is enough: a window is filled again only after the next one, which no warp
          // passes before all have used this window.
          __syncthreads();
          if constexpr (kDense) {
            product_.template multiply<kWindow, Major::kToeplitz, Major::kOuter>(toeplitz, noise);
          } else {
            add_taps(line, taps, first, r0, noise);
          }
          window = 1 - window;
        }
      }
    }
    const T* const constant =
        p_.constant == nullptr
            ? nullptr
            : static_cast<const T*>(p_.constant) +
                  (place.head * p_.in_features + place.d) * p_.num_realizations + r0;
    product_.for_each([&](int token, int r, T value) {
      const bool adds = constant != nullptr && r0 + r < p_.num_realizations;
      function(token, r, value * factor_ + (adds ? constant[r] : T(0)));
    });
  }

  // Calls function(token, realization) in the order of make.
  template <class Function>
  TORCH_SPE_DEVICE void for_each_place(const Function& function) {
    product_.for_each([&](int token, int r, T) { function(token, r); });
  }

 private:
  // Tap p of token t meets period q of realization r where q s + class(r) - origin = t + p.
  TORCH_SPE_DEVICE void add_taps(const NoiseLine<Tile>& line, const T* taps, std::int64_t first,
                                 std::int64_t r0, const T* noise) {
    const int stride = static_cast<int>(line.stride), size = static_cast<int>(p_.kernel_size[2]);
    product_.for_each([&](int token, int r, T& code) {
      const int lag =
          static_cast<int>(line.origin) + token -
          static_cast<int>(static_cast<std::uint32_t>(r0 + r) % static_cast<std::uint32_t>(stride));
      const int least = lag <= 0 ? 0 : (lag + stride - 1) / stride;
      int q = least > first ? least - static_cast<int>(first) : 0;
      for (std::int64_t tap = (first + q) * stride - lag; q < kWindow && tap < size;
           ++q, tap += stride)
        code += taps[tap] * noise[q * row_of<T>(kReal) + r];
    });
  }

  TORCH_SPE_DEVICE static T sqrt_of(std::int64_t value) {
    return static_cast<T>(__builtin_sqrt(static_cast<double>(value)));
  }

  const ConvFilterParams& p_;
  const T factor_;
  const std::uint64_t seed_;
  TileProduct<Operand, Tile::kTokens, kReal> product_;
};

// Forward: a block keeps the results of a tile and some batch rows, and goes through the features.
// Dense noise of 16-bit tensors leaves registers for more rows.
template <class Storage, bool kDense>
constexpr int kBatch = sizeof(Storage) == 8             ? 2
                       : sizeof(Storage) == 2 && kDense ? 8
                                                        : 4;

// The numbers of a token, in some batch rows.
template <class T, int kRows>
struct alignas(16) BatchRows {
  T row[kRows];
};

template <class Storage, class Operand, bool kDense>
struct ForwardShared : CodeShared<Storage, Operand, LongTile<Operand, kDense>> {
  using Tile = LongTile<Operand, kDense>;
  using Rows = BatchRows<core::accumulate_t<Storage>, kBatch<Storage, kDense>>;
  Rows* x;  // [2, token], of two features in turn

  TORCH_SPE_INLINE explicit ForwardShared(Carver& carver)
      : CodeShared<Storage, Operand, Tile>(carver, 2), x(carver.take<Rows>(2 * Tile::kTokens)) {}
};

template <class Storage, class Operand, bool kDense>
__global__ void __launch_bounds__(kThreads, kLeastBlocks) forward_kernel(const ConvFilterParams p) {
  using T = core::accumulate_t<Storage>;
  using Shared = ForwardShared<Storage, Operand, kDense>;
  using Tile = typename Shared::Tile;
  using Rows = typename Shared::Rows;
  constexpr int kTokens = Tile::kTokens, kReal = Tile::kReal;
  constexpr int kRows = kBatch<Storage, kDense>, kCount = kTokens * kReal / kThreads;
  TORCH_SPE_SHARED_MEMORY(memory);
  Carver carver(memory);
  const Shared shared(carver);
  const PositionTiles<kTokens> tiles(p);
  const std::int64_t real = p.num_realizations, real_tiles = ceil_div(real, kReal);
  const std::int64_t batch_tiles = ceil_div(p.batch, kRows);
  const std::int64_t block = blockIdx.x;
  const std::int64_t r0 = block % real_tiles * kReal;
  const std::int64_t b0 = block / real_tiles % batch_tiles * kRows;
  const std::int64_t tile = block / real_tiles / batch_tiles % tiles.count;
  Place place = tiles.place(tile, block / real_tiles / batch_tiles / tiles.count, 0);
  const Storage* const x = static_cast<const Storage*>(p.x) + place.offset(p.x_strides);

  Codes<Storage, Operand, Tile> codes(p);
  T sums[kRows][kCount];
  TORCH_SPE_UNROLL
  for (int b = 0; b < kRows; ++b) {
    TORCH_SPE_UNROLL
    for (int i = 0; i < kCount; ++i) sums[b][i] = 0;
  }
  for (place.d = 0; place.d < p.in_features; ++place.d) {
    Rows* const x_tile = shared.x + place.d % 2 * kTokens;
    TORCH_SPE_KEEP_LOOP
    for (int t = static_cast<int>(threadIdx.x); t < kTokens; t += kThreads) {
      Rows rows;
      TORCH_SPE_UNROLL
      for (int b = 0; b < kRows; ++b) {
        rows.row[b] =
            b0 + b < p.batch && place.n0 + t < p.size[2]
                ? read(x[(b0 + b) * p.x_strides[0] + t * p.x_strides[3] + place.d * p.x_strides[5]])
                : T(0);
      }
      x_tile[t] = rows;
    }
    int i = 0;
    codes.make(shared, place, r0, [&](int token, int, T code) {
      const Rows rows = x_tile[token];
      TORCH_SPE_UNROLL
      for (int b = 0; b < kRows; ++b) sums[b][i] += rows.row[b] * code;
      ++i;
    });
  }
  int i = 0;
  codes.for_each_place([&](int token, int r) {
    TORCH_SPE_UNROLL
    for (int b = 0; b < kRows; ++b) {
      if (b0 + b < p.batch && place.n0 + token < p.size[2] && r0 + r < real) {
        const std::int64_t n =
            (((b0 + b) * p.size[0] + place.i0) * p.size[1] + place.i1) * p.size[2] + place.n0 +
            token;
        write(sums[b][i],
              static_cast<Storage*>(p.out) + (n * p.num_heads + place.head) * real + r0 + r);
      }
    }
    ++i;
  });
}

// Gradient of x: a block takes a tile of one feature and some batch rows, and goes through the
// realizations.
constexpr int kDataBatch = 8;

template <class Storage, class Operand, bool kDense>
struct DataShared : CodeShared<Storage, Operand, LongTile<Operand, kDense>> {
  using Tile = LongTile<Operand, kDense>;
  static constexpr int kRow = Tile::kReal + 1;
  core::accumulate_t<Storage>* codes;  // [token, r]

  TORCH_SPE_INLINE explicit DataShared(Carver& carver)
      : CodeShared<Storage, Operand, Tile>(carver, 2),
        codes(carver.take<core::accumulate_t<Storage>>(Tile::kTokens * kRow)) {}
};

template <class Storage, class Operand, bool kDense>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    data_kernel(const ConvFilterBackwardParams p) {
  using T = core::accumulate_t<Storage>;
  using Shared = DataShared<Storage, Operand, kDense>;
  using Tile = typename Shared::Tile;
  constexpr int kTokens = Tile::kTokens, kReal = Tile::kReal;
  constexpr int kParts = kThreads / kTokens;  // of the batch rows
  constexpr int kVector = Vector<Storage>::kSize;
  TORCH_SPE_SHARED_MEMORY(memory);
  Carver carver(memory);
  const Shared shared(carver);
  const PositionTiles<kTokens> tiles(p);
  const std::int64_t real = p.num_realizations, batch_tiles = ceil_div(p.batch, kDataBatch);
  const std::int64_t block = blockIdx.x;
  const std::int64_t d = block % p.in_features;
  const std::int64_t b0 = block / p.in_features % batch_tiles * kDataBatch;
  const std::int64_t tile = block / p.in_features / batch_tiles % tiles.count;
  const Place place = tiles.place(tile, block / p.in_features / batch_tiles / tiles.count, d);
  const auto& strides = p.grad_out_strides;
  const int token = static_cast<int>(threadIdx.x) % kTokens;
  const int part = static_cast<int>(threadIdx.x) / kTokens;
  const bool inside = place.n0 + token < p.size[2];
  const bool aligned = is_aligned<Storage>(p.grad_out, strides);
  const Storage* const grad =
      static_cast<const Storage*>(p.grad_out) + place.offset(strides) + token * strides[3];

  Codes<Storage, Operand, Tile> codes(p);
  T sums[kDataBatch / kParts] = {};
  for (std::int64_t r0 = 0; r0 < real; r0 += kReal) {
    codes.make(shared, place, r0,
               [&](int t, int r, T code) { shared.codes[t * Shared::kRow + r] = code; });
    __syncthreads();
    const int count = static_cast<int>(min_of(kReal, real - r0));
    TORCH_SPE_KEEP_LOOP
    for (int r = 0; r < count; r += kVector) {
      T code[kVector];
      TORCH_SPE_UNROLL
      for (int e = 0; e < kVector; ++e) code[e] = shared.codes[token * Shared::kRow + r + e];
      TORCH_SPE_UNROLL
      for (int i = 0; i < kDataBatch / kParts; ++i) {
        const std::int64_t b = b0 + i * kParts + part;
        if (!inside || b >= p.batch) continue;
        const Storage* const from = grad + b * strides[0] + (r0 + r) * strides[5];
        Vector<Storage> numbers{};
        if (aligned && r + kVector <= count) {
          numbers = *reinterpret_cast<const Vector<Storage>*>(from);
        } else {
          TORCH_SPE_UNROLL
          for (int e = 0; e < kVector; ++e) {
            if (r + e < count) numbers.values[e] = from[e * strides[5]];
          }
        }
        TORCH_SPE_UNROLL
        for (int e = 0; e < kVector; ++e) sums[i] += read(numbers.values[e]) * code[e];
      }
    }
  }
  TORCH_SPE_UNROLL
  for (int i = 0; i < kDataBatch / kParts; ++i) {
    const std::int64_t b = b0 + i * kParts + part;
    if (!inside || b >= p.batch) continue;
    const std::int64_t n =
        ((b * p.size[0] + place.i0) * p.size[1] + place.i1) * p.size[2] + place.n0 + token;
    write(sums[i],
          static_cast<Storage*>(p.grad_x) + (n * p.num_heads + place.head) * p.in_features + d);
  }
}

// The gradients of codes, sums over the batch of x times the gradient of the output:
// out[row][r - r0] for kRows positions from place.n0 + first on, which may lie outside, and kReal
// realizations.
template <int kRows, int kReal, class Storage, class Number>
TORCH_SPE_DEVICE void fill_code_gradients(const ConvFilterBackwardParams& p, const Place& place,
                                          std::int64_t first, std::int64_t r0, Number* out) {
  using T = core::accumulate_t<Storage>;
  constexpr int kVector = Vector<Storage>::kSize, kVectors = kReal / kVector;
  const auto &x_strides = p.x_strides, &strides = p.grad_out_strides;
  const bool aligned = is_aligned<Storage>(p.grad_out, strides);
  TORCH_SPE_KEEP_LOOP
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kVectors; i += kThreads) {
    const int column = i % kVectors * kVector;
    const std::int64_t token = first + i / kVectors, r = r0 + column;
    const bool inside = place.n0 + token >= 0 && place.n0 + token < p.size[2];
    const int count = inside ? static_cast<int>(min_of(kVector, p.num_realizations - r)) : 0;
    const Storage* x = static_cast<const Storage*>(p.x) + place.offset(x_strides) +
                       token * x_strides[3] + place.d * x_strides[5];
    const Storage* grad = static_cast<const Storage*>(p.grad_out) + place.offset(strides) +
                          token * strides[3] + r * strides[5];
    T sums[kVector] = {};
    if (aligned && count == kVector) {
      for (std::int64_t b = 0; b < p.batch; ++b) {
        const T value = read(*x);
        const auto numbers = *reinterpret_cast<const Vector<Storage>*>(grad);
        TORCH_SPE_UNROLL
        for (int e = 0; e < kVector; ++e) sums[e] += value * read(numbers.values[e]);
        x += x_strides[0];
        grad += strides[0];
      }
    } else if (count > 0) {
      for (std::int64_t b = 0; b < p.batch; ++b) {
        const T value = read(*x);
        TORCH_SPE_UNROLL
        for (int e = 0; e < kVector; ++e) {
          if (e < count) sums[e] += value * read(grad[e * strides[5]]);
        }
        x += x_strides[0];
        grad += strides[0];
      }
    }
    write_operands(sums, out + i / kVectors * row_of<Number>(kReal) + column);
  }
}

// Gradient of the kernel: a block takes a segment of the tiles of one feature, and adds up its part
// of the sums in global memory, which is its own.
template <class Storage, class Operand, bool kDense>
struct KernelShared {
  using T = core::accumulate_t<Storage>;
  using Tile = CodeTile<kDense>;
  using Number = std::conditional_t<kDense, Operand, T>;
  static constexpr int kRow = Tile::kWindow + 1;
  Number* noise;  // [period, r]
  Number* grad;   // [token, r], gradients of codes
  T* products;    // [token, period], of dense noise: sums over r of gradient and noise

  TORCH_SPE_INLINE explicit KernelShared(Carver& carver)
      : noise(carver.take<Number>(Tile::kWindow * row_of<Number>(Tile::kReal))),
        grad(carver.take<Number>(Tile::kTokens * row_of<Number>(Tile::kReal))),
        products(kDense ? carver.take<T>(Tile::kTokens * kRow) : nullptr) {}
};

std::int64_t kernel_segments(const ConvFilterParams& p) {
  return num_segments(p.num_heads * p.in_features, PositionTiles<CodeTile<true>::kTokens>(p).count);
}

template <class Storage, class Operand, bool kDense>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    kernel_kernel(const ConvFilterBackwardParams p, std::int64_t segments,
                  double* parts) {  // [segment, H, D, *P]
  using T = core::accumulate_t<Storage>;
  using Shared = KernelShared<Storage, Operand, kDense>;
  using Tile = typename Shared::Tile;
  using Number = typename Shared::Number;
  constexpr int kTokens = Tile::kTokens, kReal = Tile::kReal, kWindow = Tile::kWindow;
  constexpr int kRow = row_of<Number>(kReal);
  TORCH_SPE_SHARED_MEMORY(memory);
  Carver carver(memory);
  const Shared shared(carver);
  const PositionTiles<kTokens> tiles(p);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t block = blockIdx.x;
  const std::int64_t segment = block % segments;
  const std::int64_t d = block / segments % p.in_features, head = block / segments / p.in_features;
  const std::int64_t taps = p.kernel_size[0] * p.kernel_size[1] * p.kernel_size[2];
  double* const part = parts + ((segment * p.num_heads + head) * p.in_features + d) * taps;
  for (std::int64_t i = thread; i < taps; i += kThreads) part[i] = 0;
  const double factor = __builtin_sqrt(static_cast<double>(num_periods(p.generated)));
  const std::uint64_t seed = seed_of(p);
  const std::int64_t per_segment = ceil_div(tiles.count, segments);
  const std::int64_t end_tile = min_of(tiles.count, (segment + 1) * per_segment);

  for (std::int64_t r0 = 0; r0 < p.num_realizations; r0 += kReal) {
    for (std::int64_t tile = segment * per_segment; tile < end_tile; ++tile) {
      const Place place = tiles.place(tile, head, d);
      __syncthreads();  // the gradients before have been used
      fill_code_gradients<kTokens, kReal, Storage>(p, place, 0, r0, shared.grad);
      NoiseLine<Tile> line(p, place, seed);
      for (std::int64_t tap0 = 0; tap0 < p.kernel_size[0]; ++tap0) {
        for (std::int64_t tap1 = 0; tap1 < p.kernel_size[1]; ++tap1) {
          line.set_tap(tap0, tap1);
          if (!kDense && !line.has_any(r0)) continue;
          double* const sums = part + (tap0 * p.kernel_size[1] + tap1) * p.kernel_size[2];
          for (int first = 0; first < line.count; first += kWindow) {
            line.fill(first, r0, shared.noise);
            __syncthreads();
            if constexpr (kDense) {
              TileProduct<Operand, kTokens, kWindow> product;
              product.clear();
              product.template multiply<kReal, Major::kDepth, Major::kDepth>(shared.grad,
                                                                             shared.noise);
              product.for_each([&](int token, int period, T value) {
                shared.products[token * Shared::kRow + period] = value;
              });
              __syncthreads();
              // A tap is a diagonal.
              const int least = thread < kTokens ? kTokens - 1 - thread : 0;  // token
              const std::int64_t tap = first + thread - (kTokens - 1);
              if (tap >= 0 && tap < p.kernel_size[2]) {
                T sum = 0;
                for (int token = least; token < kTokens; ++token) {
                  const int period = token + thread - (kTokens - 1);
                  if (period < kWindow) sum += shared.products[token * Shared::kRow + period];
                }
                sums[tap] += static_cast<double>(sum);
              }
            } else {
              for (std::int64_t tap = thread; tap < p.kernel_size[2]; tap += kThreads) {
                std::int64_t period = (line.origin + tap) / line.stride;
                std::int64_t phase = (line.origin + tap) % line.stride;
                T sum = 0;
                for (int token = 0; token < kTokens; ++token) {
                  if (period >= first && period < first + kWindow) {
                    // The realizations of the class, which are the stride apart.
                    std::int64_t r = core::floor_modulo(phase - r0, line.stride);
                    for (; r < kReal; r += line.stride)
                      sum +=
                          shared.grad[token * kRow + r] * shared.noise[(period - first) * kRow + r];
                  }
                  if (++phase == line.stride) {
                    phase = 0;
                    ++period;
                  }
                }
                sums[tap] += factor * static_cast<double>(sum);
              }
            }
            // Dense noise was last used before the barrier above, products are before the next one.
            if (!kDense) __syncthreads();  // the window has been used
          }
        }
      }
    }
  }
}

// Gradient of given noise, grad_z[j, r] = sum_p kernel[p] gradient of code[j - p, r]: a block takes
// a tile of its positions.
template <class Storage, class Operand>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    noise_gradient_kernel(const ConvFilterBackwardParams p) {
  using T = core::accumulate_t<Storage>;
  TORCH_SPE_SHARED_MEMORY(memory);
  Carver carver(memory);
  using Tile = CodeTile<true>;
  constexpr int kTokens = Tile::kTokens, kReal = Tile::kReal, kWindow = Tile::kWindow;
  const CodeShared<Storage, Operand, Tile> shared(carver, 1);
  const std::int64_t size0 = p.size[0] + p.kernel_size[0] - 1;
  const std::int64_t size1 = p.size[1] + p.kernel_size[1] - 1;
  const std::int64_t size2 = p.size[2] + p.kernel_size[2] - 1;
  const PositionTiles<kTokens> tiles(size0, size1, size2);
  const std::int64_t real = p.num_realizations, real_tiles = ceil_div(real, kReal);
  const std::int64_t block = blockIdx.x;
  const std::int64_t r0 = block % real_tiles * kReal;
  const std::int64_t tile = block / real_tiles % tiles.count;
  const std::int64_t feature = block / real_tiles / tiles.count;
  const Place noise = tiles.place(tile, feature / p.in_features, feature % p.in_features);

  TileProduct<Operand, kTokens, kReal> product;
  product.clear();
  for (std::int64_t tap0 = 0; tap0 < p.kernel_size[0]; ++tap0) {
    for (std::int64_t tap1 = 0; tap1 < p.kernel_size[1]; ++tap1) {
      Place place = noise;
      place.i0 -= tap0;
      place.i1 -= tap1;
      place.n0 = 0;
      if (place.i0 < 0 || place.i0 >= p.size[0] || place.i1 < 0 || place.i1 >= p.size[1]) continue;
      const T* const taps = taps_of<T>(p, place, tap0, tap1);
      const std::int64_t begin = max_of(0, noise.n0 - p.kernel_size[2] + 1);
      const std::int64_t end = min_of(p.size[2], noise.n0 + kTokens);
      for (std::int64_t n = begin; n < end; n += kWindow) {
        __syncthreads();  // the tiles before have been used
        fill_toeplitz<Tile, true>(taps, p.kernel_size[2], n - noise.n0, shared.toeplitz);
        fill_code_gradients<kWindow, kReal, Storage>(p, place, n, r0, shared.noise);
        __syncthreads();
        product.template multiply<kWindow, Major::kToeplitz, Major::kOuter>(shared.toeplitz,
                                                                            shared.noise);
      }
    }
  }
  product.for_each([&](int token, int r, T value) {
    if (noise.n0 + token >= size2 || r0 + r >= real) return;
    const std::int64_t position = ((feature * size0 + noise.i0) * size1 + noise.i1) * size2;
    write_as(p.noise_dtype, value, p.grad_noise, (position + noise.n0 + token) * real + r0 + r);
  });
}

// Calls function(operand, std::bool_constant<dense>) with the types of the kernels to launch.
template <class Function>
void visit_kernels(const ConvFilterParams& p, bool allow_tf32, const Function& function) {
  if (p.kernel_size[2] > 1 << 30)  // a tile counts its periods with 32 bits
    throw std::runtime_error(
        "conv_filter: kernel must have at most 2^30 taps along its last dimension on a GPU, got " +
        std::to_string(p.kernel_size[2]));
  if (num_periods(p.generated) == 1) {
    visit_operands(p.dtype, allow_tf32, [&](auto storage, auto operand) {
      function(storage, operand, std::true_type{});
    });
  } else {
    visit_storage(p.dtype, [&](auto storage) {
      function(storage, core::accumulate_t<decltype(storage)>{}, std::false_type{});
    });
  }
}

// Parts of the scratch memory of the backward pass.
struct Workspace {
  PolyphaseTaps polyphase;
  std::int64_t segments, taps, kernel_parts;
  double *kernel = nullptr, *constant = nullptr;
  std::size_t size = 0;

  Workspace(const ConvFilterBackwardParams& p, void* memory)
      : polyphase(p),
        segments(kernel_segments(p)),
        taps(p.num_heads * p.in_features * p.kernel_size[0] * p.kernel_size[1] * p.kernel_size[2]),
        kernel_parts(polyphase.fits ? polyphase.parts() : segments) {
    Carver carver(static_cast<unsigned char*>(memory));
    if (p.grad_kernel != nullptr) kernel = carver.take<double>(kernel_parts * taps);
    if (p.grad_constant != nullptr) {
      // The same whether tf32 is allowed or not: tiles of both have the same shapes.
      visit_storage(p.dtype, [&](auto storage) {
        constant = carver.take<double>(ConstantBlocks<decltype(storage)>(p).num_parts());
      });
    }
    size = carver.size();
  }
};

template <class Storage, class Operand, bool kDense>
void backward(const ConvFilterBackwardParams& p, void* memory, Stream stream) {
  using T = core::accumulate_t<Storage>;
  const std::int64_t features = p.num_heads * p.in_features;
  bool needs_x = p.grad_x != nullptr;
  if constexpr (!kDense && sizeof(Storage) == 2)
    needs_x = needs_x && !launch_polyphase_gradient<Storage>(p, stream);
  if (needs_x) {
    using Shared = DataShared<Storage, Operand, kDense>;
    Carver size;
    Shared{size};
    launch(data_kernel<Storage, Operand, kDense>,
           grid_of(PositionTiles<Shared::Tile::kTokens>(p).count * ceil_div(p.batch, kDataBatch) *
                   features),
           dim3(kThreads), size.size(), stream, p);
  }
  const Workspace workspace(p, memory);
  bool needs_kernel = p.grad_kernel != nullptr;
  if constexpr (!kDense && sizeof(Storage) == 2) {
    if (needs_kernel && workspace.polyphase.fits) {
      launch_polyphase_taps<Storage>(p, workspace.polyphase, workspace.kernel, stream);
      needs_kernel = false;
    }
  }
  if (needs_kernel) {
    Carver size;
    KernelShared<Storage, Operand, kDense>{size};
    launch(kernel_kernel<Storage, Operand, kDense>, grid_of(workspace.segments * features),
           dim3(kThreads), size.size(), stream, p, workspace.segments, workspace.kernel);
  }
  if (p.grad_kernel != nullptr)
    sum_parts(workspace.kernel, workspace.kernel_parts, workspace.taps,
              static_cast<T*>(p.grad_kernel), stream);
  if constexpr (kDense) {
    if (p.grad_noise == nullptr) return;
    using Tile = CodeTile<true>;
    const PositionTiles<Tile::kTokens> tiles(p.size[0] + p.kernel_size[0] - 1,
                                             p.size[1] + p.kernel_size[1] - 1,
                                             p.size[2] + p.kernel_size[2] - 1);
    Carver size;
    CodeShared<Storage, Operand, Tile>{size, 1};
    launch(noise_gradient_kernel<Storage, Operand>,
           grid_of(tiles.count * ceil_div(p.num_realizations, Tile::kReal) * features),
           dim3(kThreads), size.size(), stream, p);
  }
}

// The i-th number of a noise.
template <class Storage>
struct MakeNoise {
  ConvNoiseParams p;

  TORCH_SPE_DEVICE void operator()(std::int64_t i) const {
    Storage* const out = static_cast<Storage*>(p.out) + i;
    const auto next = [&](std::int64_t size) {
      const std::int64_t index = i % size;
      i /= size;
      return index;
    };
    const std::int64_t r = next(p.num_realizations);
    std::int64_t position[3];
    TORCH_SPE_UNROLL
    for (int k = 2; k >= 0; --k) position[k] = next(p.size[k]);
    const std::int64_t d = next(p.in_features), head = i;
    const core::NoiseParams& noise = p.generated;
    const auto seed = static_cast<std::uint64_t>(*noise.device_seed);
    std::int64_t shift[3] = {0, 0, 0}, period[3];
    if (num_periods(noise) > 1) core::noise_shift(seed, noise.ndim, head, d, noise.stride, shift);
    bool has = true;
    std::int64_t rest = r;
    TORCH_SPE_UNROLL
    for (int k = 2; k >= 0; --k) {
      const std::int64_t shifted = noise.start[k] + position[k] + shift[k];
      period[k] = core::floor_divide(shifted, noise.stride[k]);
      has = has && shifted - period[k] * noise.stride[k] == rest % noise.stride[k];
      rest /= noise.stride[k];
    }
    using T = core::accumulate_t<Storage>;
    T value = 0;
    if (has) {
      value = static_cast<T>(__builtin_sqrt(static_cast<double>(num_periods(noise)))) *
              static_cast<T>(core::noise_value(noise.kind, seed, noise.ndim, period[0], period[1],
                                               period[2], head, d, r));
    }
    write(value, out);
  }
};

}  // namespace

void conv_filter_forward(const ConvFilterParams& p, bool allow_tf32, Stream stream) {
  visit_kernels(p, allow_tf32, [&](auto storage, auto operand, auto dense) {
    using Storage = decltype(storage);
    using Operand = decltype(operand);
    constexpr bool kDense = decltype(dense)::value;
    if constexpr (!kDense && sizeof(Storage) == 2) {
      if (launch_polyphase<Storage, false>(p, stream)) return;
    }
    using Shared = ForwardShared<Storage, Operand, kDense>;
    using Tile = typename Shared::Tile;
    Carver size;
    Shared{size};
    const std::int64_t blocks = PositionTiles<Tile::kTokens>(p).count *
                                ceil_div(p.batch, kBatch<Storage, kDense>) *
                                ceil_div(p.num_realizations, Tile::kReal) * p.num_heads;
    launch(forward_kernel<Storage, Operand, kDense>, grid_of(blocks), dim3(kThreads), size.size(),
           stream, p);
  });
}

std::size_t conv_filter_backward_workspace(const ConvFilterBackwardParams& p) {
  return Workspace(p, nullptr).size;
}

void conv_filter_backward(const ConvFilterBackwardParams& p, void* workspace, bool allow_tf32,
                          Stream stream) {
  visit_kernels(p, allow_tf32, [&](auto storage, auto operand, auto dense) {
    backward<decltype(storage), decltype(operand), decltype(dense)::value>(p, workspace, stream);
  });
  if (p.grad_constant == nullptr) return;
  visit_operands(p.dtype, allow_tf32, [&](auto storage, auto operand) {
    launch_constant_gradient<decltype(storage), decltype(operand)>(
        p, Workspace(p, workspace).constant, stream);
  });
}

void conv_noise(const ConvNoiseParams& p, Stream stream) {
  const std::int64_t count =
      p.num_heads * p.in_features * p.size[0] * p.size[1] * p.size[2] * p.num_realizations;
  visit_storage(p.dtype, [&](auto storage) {
    for_each_index(count, MakeNoise<decltype(storage)>{p}, stream);
  });
}

}  // namespace torch_spe::cuda
