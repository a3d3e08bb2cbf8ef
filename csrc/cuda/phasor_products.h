// The phasor filter of 16-bit numbers at consecutive positions, on tensor cores: at every position
// a product of codes, which each lane makes in registers, with the rows of the batch.
//
// A code comes from the one of the position before by a rotation in float32, and is exact again
// after kRun positions at most: far more precise than the 16 bits that it is rounded to.
#pragma once

#include "phasor_filter.h"
#include "phasors.h"

namespace torch_spe::cuda {

constexpr int kRun = 64;
constexpr int kMmaRows = 8;  // of the batch, in one mma

// What lane 4 g + c of a warp holds in the mma's that multiply codes [16 outputs, 64 inputs] with
// inputs [64, 8 batch rows]. The inputs of step s and the mma's indices 2c, 2c + 1, 2c + 8, 2c + 9
// are 16 c + 4 s + {0, 1, 2, 3}, so that those of a lane are contiguous; its outputs are 2 g and
// 2 g + 1 at batch rows 2 c and 2 c + 1.
//   filter:   inputs are features, outputs the real and imaginary parts of pair g
//   gradient: inputs are the real and imaginary parts of pairs, outputs features
constexpr int kOutputs = 16;
constexpr int kInputs = 64;
constexpr int kSteps = kInputs / 16;
constexpr int kInputsOfLane = 4 * kSteps;

// 16 numbers of a row in pairs, zero from `count` on.
template <class Storage>
TORCH_SPE_DEVICE void load_pairs(const Storage* row, std::int64_t count, std::int64_t stride,
                                 bool aligned, std::uint32_t (&out)[kInputsOfLane / 2]) {
  if (aligned && count >= kInputsOfLane) {
    struct alignas(16) Words {
      std::uint32_t words[4];
    };
    TORCH_SPE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Words four = reinterpret_cast<const Words*>(row)[i];
      TORCH_SPE_UNROLL
      for (int e = 0; e < 4; ++e) out[4 * i + e] = four.words[e];
    }
    return;
  }
  TORCH_SPE_UNROLL
  for (int i = 0; i < kInputsOfLane / 2; ++i) {
    const std::uint32_t low = 2 * i < count ? row[2 * i * stride].bits : 0u;
    const std::uint32_t high = 2 * i + 1 < count ? row[(2 * i + 1) * stride].bits : 0u;
    out[i] = low | high << 16;
  }
}

// A code times e^(2 pi i f n), and the rotation to the next position.
struct alignas(16) TurningCode {
  Phasor<float> code, step;
};

template <int kTiles>
struct CodeProductShared {
  // Where inputs come in several parts, runs are shorter and sums are kept from part to part.
  static constexpr int kShortRun = 16;
  TurningCode* codes;  // [warp, code, lane]
  float* sums;         // [warp, position, sum, lane]

  TORCH_SPE_INLINE CodeProductShared(Carver& carver, std::int64_t inputs)
      : codes(carver.take<TurningCode>(kWarps * kInputsOfLane * kLanes)),
        sums(inputs <= kInputs ? nullptr
                               : carver.take<float>(kWarps * kShortRun * kTiles * 4 * kLanes)) {}
};

// Warps, each with 16 outputs of one head, a run of positions and 8 kTiles batch rows.
template <bool kGradient, int kTiles>
struct CodeProductUnits {
  std::int64_t inputs, outputs, run, output_tiles, runs, batch_tiles, count;

  TORCH_SPE_INLINE explicit CodeProductUnits(const PhasorFilterParams& p)
      : inputs(kGradient ? 2 * p.num_pairs : p.in_features),
        outputs(kGradient ? p.in_features : 2 * p.num_pairs),
        run(inputs <= kInputs ? kRun : CodeProductShared<kTiles>::kShortRun),
        output_tiles(ceil_div(outputs, kOutputs)),
        runs(ceil_div(p.length, run)),
        batch_tiles(ceil_div(p.batch, kMmaRows * kTiles)),
        count(output_tiles * runs * batch_tiles * p.num_heads) {}
};

template <class Storage, bool kGradient, int kTiles>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    code_product_kernel(const PhasorFilterBackwardParams p) {
  TORCH_SPE_SHARED_MEMORY(memory);
  Carver carver(memory);
  const CodeProductUnits<kGradient, kTiles> units(p);
  const CodeProductShared<kTiles> shared(carver, units.inputs);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  const int group = lane / 4, member = lane % 4;
  const std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * kWarps + warp;
  if (unit >= units.count) return;
  const std::int64_t out0 = unit % units.output_tiles * kOutputs + 2 * group;
  const std::int64_t n0 = unit / units.output_tiles % units.runs * units.run;
  const std::int64_t b0 =
      unit / units.output_tiles / units.runs % units.batch_tiles * (kMmaRows * kTiles);
  const std::int64_t head = unit / units.output_tiles / units.runs / units.batch_tiles;
  const int count = static_cast<int>(min_of(units.run, p.length - n0));

  const Storage* const input = static_cast<const Storage*>(kGradient ? p.grad_out : p.x);
  const std::int64_t* const strides = kGradient ? p.grad_out_strides : p.x_strides;
  const bool aligned = strides[3] == 1 && rows_are_aligned<Storage>(input, strides[0]) &&
                       rows_are_aligned<Storage>(input, strides[1]) &&
                       rows_are_aligned<Storage>(input, strides[2]);
  const float* const coefficients = static_cast<const float*>(p.coefficients);
  const float* const constant = static_cast<const float*>(p.constant);
  TurningCode* const own_codes = shared.codes + warp * kInputsOfLane * kLanes + lane;
  float* const own_sums = shared.sums == nullptr
                              ? nullptr
                              : shared.sums + warp * units.run * kTiles * 4 * kLanes + lane;

  for (std::int64_t in0 = 0; in0 < units.inputs; in0 += kInputs) {
    const std::int64_t own_inputs = in0 + member * kInputsOfLane;
    // The feature and pair of this lane's i-th code, and whether there is such a one.
    const auto find_code = [&](int i, std::int64_t* index) {
      const std::int64_t feature = kGradient ? out0 + i % 2 : own_inputs + i;
      const std::int64_t pair = kGradient ? own_inputs / 2 + i / 2 : out0 / 2;
      *index = (head * p.in_features + feature) * p.num_pairs + pair;
      return feature < p.in_features && pair < p.num_pairs;
    };
    // A row of A is a real or imaginary part (filter), or a feature (gradient).
    const auto fragment = [&](const Phasor<float>(&codes)[4], std::uint32_t (&a)[4]) {
      TORCH_SPE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Phasor<float>&first = codes[i / 2 * 2], &second = codes[i / 2 * 2 + 1];
        a[i] = kGradient    ? pack_pair<Storage>(codes[i].re, codes[i].im)
               : i % 2 == 0 ? pack_pair<Storage>(first.re, second.re)
                            : pack_pair<Storage>(first.im, second.im);
      }
    };

    for (int i = 0; i < kInputsOfLane; ++i) {
      std::int64_t index;
      TurningCode turning{{0.0f, 0.0f}, {}};
      if (find_code(i, &index)) {
        turning.code.set(p.freqs[index], p.start + static_cast<double>(n0));
        turning.code.turn({coefficients[2 * index], coefficients[2 * index + 1]});
        turning.step.set(p.freqs[index], 1.0);
      }
      own_codes[i * kLanes] = turning;
    }
    Phasor<float> codes[kSteps][4], steps[kSteps][4];
    std::uint32_t constants[kSteps][4] = {};
    TORCH_SPE_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      Phasor<float> parts[4] = {{0.0f, 0.0f}, {0.0f, 0.0f}, {0.0f, 0.0f}, {0.0f, 0.0f}};
      TORCH_SPE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const TurningCode turning = own_codes[(4 * s + i) * kLanes];
        codes[s][i] = turning.code;
        steps[s][i] = turning.step;
        std::int64_t index;
        if (constant != nullptr && find_code(4 * s + i, &index))
          parts[i] = {constant[2 * index], constant[2 * index + 1]};
      }
      fragment(parts, constants[s]);
    }

    const Storage* row[kTiles];
    std::int64_t inside[kTiles];  // numbers of the row that belong to this lane
    std::uint32_t next[kTiles][kInputsOfLane / 2];
    TORCH_SPE_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      const std::int64_t b = b0 + tile * kMmaRows + group;
      row[tile] =
          input + b * strides[0] + n0 * strides[1] + head * strides[2] + own_inputs * strides[3];
      inside[tile] = b < p.batch ? units.inputs - own_inputs : 0;
      load_pairs(row[tile], inside[tile], strides[3], aligned, next[tile]);
    }
    for (int t = 0; t < count; ++t) {
      std::uint32_t numbers[kTiles][kInputsOfLane / 2];
      TORCH_SPE_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        TORCH_SPE_UNROLL
        for (int i = 0; i < kInputsOfLane / 2; ++i) numbers[tile][i] = next[tile][i];
        row[tile] += strides[1];
        load_pairs(row[tile], t + 1 < count ? inside[tile] : 0, strides[3], aligned, next[tile]);
      }
      float turning[kTiles][4], still[kTiles][4];
      TORCH_SPE_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        TORCH_SPE_UNROLL
        for (int e = 0; e < 4; ++e) {
          turning[tile][e] = in0 == 0 ? 0.0f : own_sums[((t * kTiles + tile) * 4 + e) * kLanes];
          still[tile][e] = 0;
        }
      }
      TORCH_SPE_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        std::uint32_t a[4];
        fragment(codes[s], a);
        TORCH_SPE_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
          const std::uint32_t b[2] = {numbers[tile][2 * s], numbers[tile][2 * s + 1]};
          mma_m16n8k16<Storage>(turning[tile], a, b);
          if (constant != nullptr) mma_m16n8k16<Storage>(still[tile], constants[s], b);
        }
        TORCH_SPE_UNROLL
        for (int i = 0; i < 4; ++i) codes[s][i].turn(steps[s][i]);
      }
      if (in0 + kInputs < units.inputs) {
        TORCH_SPE_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
          TORCH_SPE_UNROLL
          for (int e = 0; e < 4; ++e)
            own_sums[((t * kTiles + tile) * 4 + e) * kLanes] = turning[tile][e] + still[tile][e];
        }
        continue;
      }
      TORCH_SPE_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        TORCH_SPE_UNROLL
        for (int e = 0; e < 2; ++e) {
          const std::int64_t b = b0 + tile * kMmaRows + 2 * member + e;
          if (b >= p.batch) continue;
          Storage* const to = static_cast<Storage*>(kGradient ? p.grad_x : p.out) +
                              ((b * p.length + n0 + t) * p.num_heads + head) * units.outputs + out0;
          const float first = turning[tile][e] + still[tile][e];
          const float second = turning[tile][2 + e] + still[tile][2 + e];
          if (units.outputs % 2 == 0) {
            if (out0 < units.outputs)
              *reinterpret_cast<std::uint32_t*>(to) = pack_pair<Storage>(first, second);
          } else {
            if (out0 < units.outputs) write(first, to);
            if (out0 + 1 < units.outputs) write(second, to + 1);
          }
        }
      }
    }
  }
}

// Sums over positions, of the segments that they are cut into.
struct PhasorParts {
  double* freqs;         // [segment, H, D, R/2, ndim]
  double* coefficients;  // [segment, H, D, R/2, 2]
  double* constant;      // [segment, H, D, R]
};

// Gradients of frequencies, coefficients and constant: a block takes 32 features and 32 pairs of
// one head, and walks over the positions of a segment. At each one the gradients of the codes are a
// product over the batch; lane 4 g + c has those of features g, g + 8 and pairs c + {0, 4, 8, 12}
// of its warp's 16 and 16.
constexpr int kGradientTokens = 128;
constexpr int kGradientFeatures = 32;
constexpr int kGradientReal = 64;
constexpr std::int64_t kLongestSegment = 4096;  // positions whose sums are in float32

struct CodeGradientTiles {
  TokenTiles tokens;
  std::int64_t feature_tiles, real_tiles, segments, per_segment;

  TORCH_SPE_INLINE explicit CodeGradientTiles(const PhasorFilterParams& p)
      : tokens(max_of(1, p.batch), p.length, kGradientTokens),
        feature_tiles(ceil_div(p.in_features, kGradientFeatures)),
        real_tiles(ceil_div(2 * p.num_pairs, kGradientReal)) {
    const std::int64_t blocks = max_of(1, p.num_heads * feature_tiles * real_tiles);
    const std::int64_t wanted =
        max_of(ceil_div(kWantedBlocks, blocks), ceil_div(p.length, kLongestSegment));
    segments = max_of(1, min_of(tokens.position_tiles, wanted));
    per_segment = ceil_div(tokens.position_tiles, segments);
  }
};

template <class Storage>
struct CodeGradientShared {
  static constexpr int kRowX = row_of<Storage>(kGradientFeatures);
  static constexpr int kRowGrad = row_of<Storage>(kGradientReal);
  Storage* x;     // [2, token, feature]
  Storage* grad;  // [2, token, r]
  Storage* zero;  // a row, of batch rows that there are not

  TORCH_SPE_INLINE explicit CodeGradientShared(Carver& carver)
      : x(carver.take<Storage>(2 * kGradientTokens * kRowX)),
        grad(carver.take<Storage>(2 * kGradientTokens * kRowGrad)),
        zero(carver.take<Storage>(kRowGrad)) {}
};

template <class Storage>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    code_gradient_kernel(const PhasorFilterBackwardParams p, const CodeGradientTiles tiles,
                         const PhasorParts parts) {
  using Shared = CodeGradientShared<Storage>;
  constexpr int kPairs = 4;  // of a lane
  TORCH_SPE_SHARED_MEMORY(memory);
  Carver carver(memory);
  const Shared shared(carver);
  const TokenTiles& tokens = tiles.tokens;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  const std::int64_t features = p.in_features, pairs = p.num_pairs;
  const std::int64_t block = blockIdx.x;
  const std::int64_t segment = block % tiles.segments;
  const std::int64_t r0 = block / tiles.segments % tiles.real_tiles * kGradientReal;
  const std::int64_t d0 =
      block / tiles.segments / tiles.real_tiles % tiles.feature_tiles * kGradientFeatures;
  const std::int64_t head = block / tiles.segments / tiles.real_tiles / tiles.feature_tiles;
  const std::int64_t first_tile = segment * tiles.per_segment;
  const int count =
      static_cast<int>(max_of(0, min_of(tokens.position_tiles - first_tile, tiles.per_segment)));
  const std::int64_t n_segment = first_tile * tokens.positions;

  const auto &x_strides = p.x_strides, &grad_strides = p.grad_out_strides;
  const Storage* const x =
      static_cast<const Storage*>(p.x) + head * x_strides[2] + d0 * x_strides[3];
  const Storage* const grad =
      static_cast<const Storage*>(p.grad_out) + head * grad_strides[2] + r0 * grad_strides[3];
  const auto is_aligned = [](const void* data, const std::int64_t* strides) {
    return rows_are_aligned<Storage>(data, strides[0]) &&
           rows_are_aligned<Storage>(data, strides[1]) &&
           rows_are_aligned<Storage>(data, strides[2]);
  };
  const bool x_aligned = is_aligned(p.x, x_strides);
  const bool grad_aligned = is_aligned(p.grad_out, grad_strides);
  const auto copy = [&](std::int64_t batch_tile, int tile, int buffer) {
    const std::int64_t b0 = batch_tile * tokens.batch;
    const std::int64_t n0 = n_segment + static_cast<std::int64_t>(tile) * tokens.positions;
    const auto copy_rows = [&](auto columns, const Storage* from, const std::int64_t* strides,
                               std::int64_t size, bool aligned, Storage* to) {
      copy_tile<kGradientTokens, decltype(columns)::value, Storage>(
          to, size, strides[3], aligned, [&](int row) {
            const int t = row / tokens.batch, b = row % tokens.batch;
            return t < tokens.positions && n0 + t < p.length && b0 + b < p.batch
                       ? from + (b0 + b) * strides[0] + (n0 + t) * strides[1]
                       : nullptr;
          });
    };
    copy_rows(std::integral_constant<int, kGradientFeatures>{}, x, x_strides, features - d0,
              x_aligned, shared.x + buffer * kGradientTokens * Shared::kRowX);
    copy_rows(std::integral_constant<int, kGradientReal>{}, grad, grad_strides, 2 * pairs - r0,
              grad_aligned, shared.grad + buffer * kGradientTokens * Shared::kRowGrad);
  };

  // The feature and pair of this lane's code (i, half).
  const int feature0 = warp / 2 * 16, pair0 = warp % 2 * 16;
  const auto find_code = [&](int i, int half, std::int64_t* index) {
    const std::int64_t d = d0 + feature0 + lane / 4 + 8 * half;
    const std::int64_t pair = r0 / 2 + pair0 + lane % 4 + 4 * i;
    *index = (head * features + d) * pairs + pair;
    return d < features && pair < pairs;
  };
  Phasor<float> e[kPairs][2], step[kPairs][2];
  Phasor<float> sums[kPairs][2], slopes[kPairs][2];  // of w = conj(e) G, and of (n - n_segment) w
  float totals[kPairs][4];                           // of G
  TORCH_SPE_UNROLL
  for (int i = 0; i < kPairs; ++i) {
    TORCH_SPE_UNROLL
    for (int half = 0; half < 2; ++half) {
      sums[i][half] = slopes[i][half] = {0.0f, 0.0f};
      totals[i][2 * half] = totals[i][2 * half + 1] = 0;
      std::int64_t index;
      if (find_code(i, half, &index)) step[i][half].set(p.freqs[index], 1.0);
    }
  }

  for (int i = thread; i < Shared::kRowGrad; i += kThreads) shared.zero[i].bits = 0;
  const int tiles_of_segment = static_cast<int>(tokens.batch_tiles) * count;
  if (tiles_of_segment > 0) copy(0, 0, 0);
  int turns = kRun;  // since the rotations were exact
  for (int k = 0; k < tiles_of_segment; ++k) {
    const int tile = k % count;
    copy_async_wait();
    __syncthreads();  // this tile has arrived, and the one before has been used
    if (k + 1 < tiles_of_segment) copy((k + 1) / count, (k + 1) % count, (k + 1) % 2);
    if (tile == 0 || turns >= kRun) {
      turns = 0;
      const double n = p.start + static_cast<double>(n_segment + tile * tokens.positions);
      TORCH_SPE_UNROLL
      for (int i = 0; i < kPairs; ++i) {
        TORCH_SPE_UNROLL
        for (int half = 0; half < 2; ++half) {
          std::int64_t index;
          if (find_code(i, half, &index)) e[i][half].set(p.freqs[index], n);
        }
      }
    }
    turns += tokens.positions;
    const Storage* const x_tile = shared.x + k % 2 * kGradientTokens * Shared::kRowX;
    const Storage* const grad_tile = shared.grad + k % 2 * kGradientTokens * Shared::kRowGrad;
    // This lane's rows and columns within the 16 x 16 numbers that one ldmatrix brings; they
    // advance from position to position, but not in the row of zeros.
    const int low = lane % 16, high = lane / 16 * 8, x_row = lane % 8 + high;
    const bool has_x = x_row < tokens.batch, has_grad = low < tokens.batch;
    const Storage* x_from =
        has_x ? x_tile + x_row * Shared::kRowX + feature0 + low - lane % 8 : shared.zero;
    const Storage* grad_from =
        has_grad ? grad_tile + low * Shared::kRowGrad + 2 * pair0 + high : shared.zero;
    const int x_step = has_x ? tokens.batch * Shared::kRowX : 0;
    const int grad_step = has_grad ? tokens.batch * Shared::kRowGrad : 0;
    float t_float = static_cast<float>(tile * tokens.positions);
    for (int t = 0; t < tokens.positions; ++t, t_float += 1) {
      std::uint32_t a[4];
      ldmatrix_x4<true>(a, x_from);
      x_from += x_step;
      TORCH_SPE_UNROLL
      for (int j = 0; j < kPairs / 2; ++j) {
        std::uint32_t b[4];
        ldmatrix_x4<true>(b, grad_from + 16 * j);
        TORCH_SPE_UNROLL
        for (int l = 0; l < 2; ++l) {
          const int i = 2 * j + l;
          const std::uint32_t pair[2] = {b[2 * l], b[2 * l + 1]};
          float g[4] = {0.0f, 0.0f, 0.0f, 0.0f};
          mma_m16n8k16<Storage>(g, a, pair);
          mma_m16n8k16<Storage>(totals[i], a, pair);
          TORCH_SPE_UNROLL
          for (int half = 0; half < 2; ++half) {
            const float re = g[2 * half], im = g[2 * half + 1];
            Phasor<float>& own = e[i][half];
            const float w_re = re * own.re + im * own.im;
            const float w_im = im * own.re - re * own.im;
            sums[i][half].re += w_re;
            sums[i][half].im += w_im;
            slopes[i][half].re += t_float * w_re;
            slopes[i][half].im += t_float * w_im;
            own.turn(step[i][half]);
          }
        }
      }
      grad_from += grad_step;
    }
  }

  const std::int64_t codes = p.num_heads * features * pairs;
  TORCH_SPE_UNROLL
  for (int i = 0; i < kPairs; ++i) {
    TORCH_SPE_UNROLL
    for (int half = 0; half < 2; ++half) {
      std::int64_t index;
      if (!find_code(i, half, &index)) continue;
      const std::int64_t part = segment * codes + index;
      const Phasor<float>&sum = sums[i][half], &slope = slopes[i][half];
      if (parts.freqs != nullptr) {
        // The phase's gradient is the imaginary part of conj(coefficient) w.
        const double re = static_cast<const float*>(p.coefficients)[2 * index];
        const double im = static_cast<const float*>(p.coefficients)[2 * index + 1];
        parts.freqs[part] = core::kTwoPi * (re * slope.im - im * slope.re +
                                            (p.start + static_cast<double>(n_segment)) *
                                                (re * sum.im - im * sum.re));
      }
      if (parts.coefficients != nullptr) {
        parts.coefficients[2 * part] = sum.re;
        parts.coefficients[2 * part + 1] = sum.im;
      }
      if (parts.constant != nullptr) {
        parts.constant[2 * part] = totals[i][2 * half];
        parts.constant[2 * part + 1] = totals[i][2 * half + 1];
      }
    }
  }
}

}  // namespace torch_spe::cuda
