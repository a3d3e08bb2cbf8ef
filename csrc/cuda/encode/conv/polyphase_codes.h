// The convolution filter with polyphase noise along one dimension, for 16-bit storage and strides s
// that are multiples of 16: codes are made on tensor cores.
//
// Let a position be n = s q + u, and z[i] the noise of a realization of class c in period i. Its
// code is the sum over k of kernel[e + s k] z[q + k], up to constants, with e = c - u: for 16
// values of u and 8 of q it is a product of taps [u, k], a Toeplitz matrix in u and c, with noise
// [k, q]. It is made for 16 features and 16 realizations of neighbouring classes, and goes through
// shared memory to the product over features, or realizations, at each position.
#pragma once

#include "encode/conv/dense_forward.h"
#include "normals.h"

namespace torch_spe::cuda {

constexpr int kCodeThreads = 256, kCodeWarps = kCodeThreads / 32;
constexpr int kCodeBatch = 8;                      // batch rows of a block
constexpr int kCodePhases = 16, kCodePeriods = 8;  // of u and q, of a block
constexpr int kCodePositions = kCodePhases * kCodePeriods;
constexpr int kCodeTile = 16;  // features, and realizations, at a time
constexpr int kCodeTaps = 8;   // of a code, at most
constexpr int kCodeLags = 2 * kCodeTile - 1;
constexpr int kCodeChunks = 2 * kCodeTile;  // of 8 codes, of a position

// Blocks of the kernels that make codes so.
struct PolyphaseCodePlan {
  int stride, taps;               // s, and k counts so far
  std::uint32_t per_feature;      // groups of 4 values of noise
  std::uint32_t feature_divisor;  // 2^20 over that, rounded up
  std::int64_t first_period;      // of position 0, without the shift of the feature
  int first_phase;                // and where it is in that period
  bool aligned = false;           // rows of the operand beside the codes
  std::int64_t phase_tiles, period_tiles, batch_tiles, feature_tiles, realization_tiles;

  explicit PolyphaseCodePlan(const ConvFilterParams& p)
      : stride(static_cast<int>(p.generated.stride[2])),
        taps(static_cast<int>((p.kernel_size[2] + 2 * kCodePhases - 3) / stride + 1)),
        per_feature(static_cast<std::uint32_t>(4 * periods())),
        feature_divisor((1u << 20) / per_feature + 1),
        first_period(core::floor_divide(p.generated.start[2], stride)),
        first_phase(static_cast<int>(p.generated.start[2] - first_period * stride)),
        phase_tiles(stride / kCodePhases),
        period_tiles(ceil_div(p.size[2], std::int64_t{stride} * kCodePeriods)),
        batch_tiles(ceil_div(p.batch, kCodeBatch)),
        feature_tiles(ceil_div(p.in_features, kCodeTile)),
        realization_tiles(ceil_div(p.num_realizations, kCodeTile)) {}

  TORCH_SPE_INLINE int periods() const { return kCodePeriods + taps - 1; }
  std::int64_t tiles() const { return phase_tiles * period_tiles * batch_tiles; }

  // Whether few of the codes lie beyond the last position, and k is within bounds.
  static bool takes(const ConvFilterParams& p) {
    const core::NoiseParams& noise = p.generated;
    const std::int64_t s = noise.stride[2];
    return p.noise == nullptr && noise.ndim == 1 && s % kCodePhases == 0 && s <= (1 << 20) &&
           p.size[2] >= 4 * s && p.kernel_size[2] + 2 * kCodePhases - 3 < kCodeTaps * s &&
           p.batch > 0 && p.in_features > 0;
  }
};

// What a block makes: features or realizations from `row` on, phases u, periods q, batch rows b.
struct PolyphaseCodeBlock {
  int row, u, q, head, b;

  TORCH_SPE_DEVICE PolyphaseCodeBlock(const ConvFilterParams& p, const PolyphaseCodePlan& plan,
                                      bool gradient, int index) {
    BlockIndices rest(static_cast<std::uint32_t>(index));
    row = static_cast<int>(rest.next(gradient ? plan.feature_tiles : plan.realization_tiles)) *
          kCodeTile;
    u = static_cast<int>(rest.next(plan.phase_tiles)) * kCodePhases;
    q = static_cast<int>(rest.next(plan.period_tiles)) * kCodePeriods;
    head = static_cast<int>(rest.next(p.num_heads));
    b = static_cast<int>(rest.rest()) * kCodeBatch;
  }
  // The first of a warp's positions.
  TORCH_SPE_DEVICE std::int64_t position(const PolyphaseCodePlan& plan, int warp) const {
    return std::int64_t{q} * plan.stride + u + 2 * warp;
  }
};

struct alignas(8) NoisePair {
  std::uint32_t of[2];
};

template <class Storage>
struct PolyphaseCodeShared {
  static constexpr int kNoiseRow = kCodePeriods + kCodeTaps - 2, kTapRow = 40;
  // [position, half of the realizations, feature], see `chunk`; constants are like two more
  // positions, of odd and even steps.
  Vector<Storage>* codes;
  NoisePair* noise;     // [feature, class % 8, period], of classes c and c + 8: z there and next
  std::uint32_t* taps;  // [feature, k / 2, e]: those of k and k + 1
  int *first_tap, *first_period;  // [step % 2, feature]
  PolyphaseCodeBlock* block;      // so that it need not be kept in registers

  TORCH_SPE_INLINE explicit PolyphaseCodeShared(MemoryLayout& layout)
      : codes(layout.take<Vector<Storage>>((kCodePositions + 2) * kCodeChunks)),
        noise(layout.take<NoisePair>(kCodeTile * 8 * kNoiseRow)),
        taps(layout.take<std::uint32_t>(kCodeTile * kCodeTaps / 2 * kTapRow)),
        first_tap(layout.take<int>(2 * kCodeTile)),
        first_period(layout.take<int>(2 * kCodeTile)),
        block(layout.take<PolyphaseCodeBlock>(1)) {}
};

// Fragments of products over 16 features or realizations have number 4 m + 2 h + e in place
// 8 h + 2 m + e, so that lane m reads four neighbours of the other operand at once.
TORCH_SPE_DEVICE int place_of(int i) { return (i >> 1 & 1) * 8 + (i >> 2) * 2 + (i & 1); }

// Codes of a tile of positions, of 16 features and 16 realizations at a time: a step takes those of
// the block's features (kGradient) or realizations, and from `sum0` on of the others.
template <class Storage, bool kGradient>
class PolyphaseCodes {
  using Shared = PolyphaseCodeShared<Storage>;

 public:
  // Needs a barrier before anything else.
  TORCH_SPE_DEVICE PolyphaseCodes(const ConvFilterParams& p, const PolyphaseCodePlan& plan,
                                  const Shared& shared, const PolyphaseCodeBlock& block)
      : p_(p), plan_(plan), shared_(shared) {
    // Taps are zero beyond the last one, and there noise must not be NaN.
    for (int i = static_cast<int>(threadIdx.x); i < kCodeTile * 8 * Shared::kNoiseRow;
         i += kCodeThreads)
      shared.noise[i] = {};
    for (int i = static_cast<int>(threadIdx.x); i < kCodeTile * kCodeTaps / 2 * Shared::kTapRow;
         i += kCodeThreads)
      shared.taps[i] = 0;
    if (threadIdx.x == 0) *shared.block = block;
  }

  // Finds where taps and noise of a step begin. Needs a barrier before `make_factors`.
  TORCH_SPE_DEVICE void locate(int sum0) const {
    const int d0 = first_feature(sum0), r0 = first_realization(sum0);
    const int i = thread_read_again(), s = plan_.stride;
    if (i >= kCodeTile) return;
    std::int64_t shift[3];
    core::noise_shift(seed(), 1, shared_.block->head, d0 + i, p_.generated.stride, shift);
    int phase = plan_.first_phase + static_cast<int>(shift[2]), period = 0;
    if (phase >= s) phase -= s, ++period;
    int last =
        r0 % s - shared_.block->u - phase + kCodePhases - 1;  // e of u = 0 and the last class
    if (last < 0) last += s, ++period;
    if (last < 0) last += s, ++period;
    shared_.first_tap[parity_of(sum0) * kCodeTile + i] = last - (kCodeLags - 1);
    shared_.first_period[parity_of(sum0) * kCodeTile + i] = period;
  }

  // Noise, taps and constants of a step. Needs a barrier before `make`.
  TORCH_SPE_DEVICE void make_factors(int sum0) const {
    const int d0 = first_feature(sum0), r0 = first_realization(sum0);
    if (p_.generated.kind == core::NoiseKind::kGaussian) {
      make_noise<true>(parity_of(sum0), d0, r0);
    } else {
      make_noise<false>(parity_of(sum0), d0, r0);
    }
    make_taps(parity_of(sum0), d0);
    if (p_.constant == nullptr) return;
    static_assert(kCodeThreads == kCodeTile * kCodeTile);
    const int i = thread_read_again(), c = i % kCodeTile, d = d0 + i / kCodeTile, r = r0 + c;
    const float value =
        d < p_.in_features && r < p_.num_realizations
            ? static_cast<const float*>(
                  p_.constant)[(shared_.block->head * p_.in_features + d) * p_.num_realizations + r]
            : 0.0f;
    write(value, (shared_.codes +
                  chunk(kCodePhases, parity_of(sum0), 0, c / 2 % 2, place_of(i / kCodeTile)))
                         ->values +
                     c / 4 * 2 + c % 2);
  }

  // The codes of a step: rows of products are u, columns q.
  TORCH_SPE_DEVICE void make() const {
    const int thread = thread_read_again(), group = thread % 32 / 4, member = thread % 4;
    TORCH_SPE_KEEP_LOOP
    for (int d = thread / 32; d < kCodeTile; d += kCodeWarps) {
      const std::uint32_t* const taps =
          shared_.taps + (d * (kCodeTaps / 2) + member) * Shared::kTapRow + kCodeTile - 1 - group;
      const NoisePair* const noise = shared_.noise + d * 8 * Shared::kNoiseRow + group + 2 * member;
      Vector<Storage>* const out =
          shared_.codes + chunk(group, 2 * member, (group & 1) << 2 | member, 0, place_of(d));
      TORCH_SPE_UNROLL
      for (int half = 0; half < 2; ++half) {
        Chunk chunks[4];  // of u and u + 8, q and q + 1
        TORCH_SPE_UNROLL
        for (int k = 0; k < 2; ++k) {
          const int c = 4 * k + 2 * half;
          float sums[2][2][4] = {};
          TORCH_SPE_UNROLL
          for (int e = 0; e < 2; ++e) {
            const NoisePair z = noise[(c + e) * Shared::kNoiseRow];
            const std::uint32_t same = taps[c + e];
            const std::uint32_t a[2][2] = {{same, taps[c + e - 8]}, {taps[c + e + 8], same}};
            TORCH_SPE_UNROLL
            for (int i = 0; i < 2; ++i) mma_m16n8k8<Storage>(sums[e][i], a[i], z.of[i]);
          }
          TORCH_SPE_UNROLL
          for (int i = 0; i < 2; ++i) {
            TORCH_SPE_UNROLL
            for (int v = 0; v < 4; ++v)
              chunks[v].pairs[2 * i + k] = pack_pair<Storage>(sums[0][i][v], sums[1][i][v]);
          }
        }
        TORCH_SPE_UNROLL
        for (int v = 0; v < 4; ++v)
          *reinterpret_cast<Chunk*>(out + kCodeChunks * (v / 2 * 8 * kCodePeriods + v % 2) +
                                    half * kCodeTile) = chunks[v];
      }
    }
  }

  // Whether a step is an odd one.
  TORCH_SPE_DEVICE static int parity_of(int sum0) { return sum0 / kCodeTile % 2; }
  // Where 8 codes lie; `swizzle` is that of u and q.
  TORCH_SPE_DEVICE static int chunk(int u, int q, int swizzle, int half, int place) {
    return (u * kCodePeriods + q) * kCodeChunks + half * kCodeTile + (place ^ swizzle);
  }

 private:
  struct alignas(16) Chunk {
    std::uint32_t pairs[4];
  };

  TORCH_SPE_DEVICE int first_feature(int sum0) const {
    return kGradient ? shared_.block->row : sum0;
  }
  TORCH_SPE_DEVICE int first_realization(int sum0) const {
    return kGradient ? sum0 : shared_.block->row;
  }

  // Read for each step, and not kept in registers.
  TORCH_SPE_DEVICE std::uint64_t seed() const {
    return static_cast<std::uint64_t>(*p_.generated.device_seed);
  }

  // Four realizations of a feature and period at a time.
  template <bool kGaussian>
  TORCH_SPE_DEVICE void make_noise(int parity, int d0, int r0) const {
    const std::uint32_t count = kCodeTile * plan_.per_feature;
    const std::uint64_t seed = this->seed();
    TORCH_SPE_KEEP_LOOP
    for (auto i = static_cast<std::uint32_t>(thread_read_again()); i < count; i += kCodeThreads) {
      const std::uint32_t d = i * plan_.feature_divisor >> 20, rest = i - d * plan_.per_feature;
      const int feature = static_cast<int>(d), q = static_cast<int>(rest / 4);
      const int c = static_cast<int>(rest % 4 * 4), r = r0 + c;
      float z[4] = {};
      if (d0 + feature < p_.in_features && r < p_.num_realizations) {
        const auto position = static_cast<std::uint64_t>(
            plan_.first_period +
            (shared_.block->q + shared_.first_period[parity * kCodeTile + feature] + q));
        const core::NoiseKind kind =
            kGaussian ? core::NoiseKind::kGaussian : core::NoiseKind::kRademacher;
        const auto words = core::philox<core::ScalarNumbers>(
            {{static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(position >> 32),
              core::noise_source(shared_.block->head, d0 + feature),
              core::noise_block(static_cast<std::uint32_t>(kind), 1, r / (kGaussian ? 4 : 128))}},
            seed);
        if constexpr (kGaussian) {
          normals_of<Storage>(words, z);
        } else {
          const std::uint32_t bits = core::word_of(words, r % 128 / 32) >> r % 32;
          TORCH_SPE_UNROLL
          for (int e = 0; e < 4; ++e) z[e] = (bits >> e & 1u) != 0 ? -1.0f : 1.0f;
        }
      }
      // z[q] is the first value of its own place and the second one of the place before.
      Storage* const out = reinterpret_cast<Storage*>(
                               shared_.noise + (feature * 8 + c % 8) * Shared::kNoiseRow + q) +
                           c / 8 * 2;
      TORCH_SPE_UNROLL
      for (int e = 0; e < 4; ++e) {
        Storage value;
        write(z[e], &value);
        if (q < Shared::kNoiseRow) out[e * 4 * Shared::kNoiseRow] = value;
        if (q > 0) out[e * 4 * Shared::kNoiseRow - 3] = value;
      }
    }
  }

  TORCH_SPE_DEVICE void make_taps(int parity, int d0) const {
    const int thread = thread_read_again(), lane = thread % 32, s = plan_.stride;
    const float factor = __builtin_sqrtf(static_cast<float>(s));
    if (lane >= kCodeLags) return;
    TORCH_SPE_KEEP_LOOP
    for (int d = thread / 32; d < kCodeTile; d += kCodeWarps) {
      const auto count =
          static_cast<std::uint32_t>(d0 + d < p_.in_features ? p_.kernel_size[2] : 0);
      const int first = shared_.first_tap[parity * kCodeTile + d] + lane;
      const float* const kernel =
          static_cast<const float*>(p_.kernel) +
          (shared_.block->head * p_.in_features + d0 + d) * p_.kernel_size[2];
      const auto tap = [&](int i) {
        return static_cast<std::uint32_t>(i) < count ? factor * kernel[i] : 0.0f;
      };
      TORCH_SPE_UNROLL
      for (int m = 0; m < kCodeTaps / 2; ++m) {
        if (2 * m < plan_.taps)
          shared_.taps[(d * (kCodeTaps / 2) + m) * Shared::kTapRow + lane] =
              pack_pair<Storage>(tap(first + 2 * m * s), tap(first + (2 * m + 1) * s));
      }
    }
  }

  const ConvFilterParams& p_;
  const PolyphaseCodePlan& plan_;
  const Shared& shared_;
};

}  // namespace torch_spe::cuda
