// Kernel of the gradient of the convolution filter's kernel with polyphase noise for 16-bit
// storage, see polyphase_plan.h.
#pragma once

#include "encode/conv/polyphase_streams.h"

namespace torch_spe::cuda {

// For the gradient of the kernel: products of 16 features each, and columns of a tile of x.
constexpr int kTapPositions = 4;  // positions
constexpr int kTapFeatureTiles = 2, kTapFeatures = 16 * kTapFeatureTiles,
              kTapFeatureRow = kTapFeatures + 8;

template <class Storage>
struct PolyphaseTapGradientShared : NoiseStreamsShared {
  Storage *x, *grad;  // [position, batch row, column]

  TORCH_SPE_INLINE PolyphaseTapGradientShared(MemoryLayout& layout, const PolyphasePlan& plan)
      : NoiseStreamsShared(layout, plan),
        x(layout.take<Storage>(std::int64_t{kPolyphaseTileRows} * kTapFeatureRow)),
        grad(layout.take<Storage>(std::int64_t{kPolyphaseTileRows} * plan.row)) {}
};

// Gradient of the kernel. A block takes kTapFeatures features, kPolyphaseRows diagonals and a
// segment of the positions. The gradients of codes, products of x and grad_out summed over the
// batch, are made on tensor cores; a lane adds each, times the stream, to sums of its taps.
template <class Storage, int kBatchTiles>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    polyphase_tap_gradient_kernel(const ConvFilterBackwardParams p, const PolyphasePlan plan,
                                  std::int64_t segments,
                                  double* parts) {  // [segment, group, H, D, P]
  constexpr int kBatch = 8 * kBatchTiles, kPass = kPolyphaseTileRows / kBatch;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const PolyphaseTapGradientShared<Storage> shared(layout, plan);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int group = lane / 4, member = lane % 4, s = plan.stride;
  const std::int64_t diagonals = std::int64_t{plan.all_groups} * s, length = p.size[2];
  const std::int64_t diagonal_tiles = ceil_div(diagonals, kPolyphaseRows);
  const std::int64_t feature_tiles = ceil_div(p.in_features, kTapFeatures);
  std::int64_t block = blockIdx.x;
  const std::int64_t segment = block % segments;
  block /= segments;
  const std::int64_t diagonal0 = block % diagonal_tiles * kPolyphaseRows;
  block /= diagonal_tiles;
  const std::int64_t d0 = block % feature_tiles * kTapFeatures, head = block / feature_tiles;
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
  NoiseStreams<Storage> streams(p, plan, shared, head);
  // The lane's codes: of feature tile i, diagonal tile j and number e of the product, these are.
  const int warp_diagonal = thread / 32 * 16;
  const auto feature_of = [&](int i, int e) { return 16 * i + group + 8 * (e / 2); };
  const auto diagonal_of = [&](int j, int e) {
    return warp_diagonal + 8 * j + member + 4 * (e % 2);
  };

  for (int pair = 0; pair < plan.pairs; ++pair) {
    float sums[kTapFeatureTiles][2][4][2];
    for (std::int64_t tile = first_tile; tile < end_tile; ++tile) {
      const std::int64_t tile0 = tile * plan.positions;
      TORCH_SPE_UNROLL
      for (int i = 0; i < kTapFeatureTiles * 16; ++i) sums[i / 16][i / 8 % 2][i / 2 % 4][i % 2] = 0;
      __syncthreads();  // the streams before have been used
      streams.make(d0, diagonal0, tile0);
      __syncthreads();
      int words[kTapFeatureTiles][2][4];
      TORCH_SPE_UNROLL
      for (int i = 0; i < kTapFeatureTiles * 8; ++i) {
        const auto feature = streams.feature(feature_of(i / 8, i % 4));
        const auto line = streams.diagonal(diagonal_of(i / 4 % 2, i % 4));
        words[i / 8][i / 4 % 2][i % 4] =
            feature.begin + line.begin + streams.tap(feature, line) + 2 * s * pair;
      }
      for (std::int64_t b0 = 0; b0 < p.batch; b0 += kBatch) {
        for (int pass = 0; pass < plan.positions && tile0 + pass < length; pass += kPass) {
          const std::int64_t n0 = tile0 + pass;
          const int turn = static_cast<int>(n0 % s);
          const int rows = static_cast<int>(min_of(kBatch, p.batch - b0));
          const int positions = static_cast<int>(min_of(kPass, length - n0));
          const auto row = [&](const Storage* data, const std::int64_t (&strides)[6]) {
            data += b0 * strides[0] + n0 * strides[3];
            return [=, &strides](int i) -> const Storage* {
              const int b = i % kBatch, n = i / kBatch;
              return b < rows && n < positions ? data + b * strides[0] + n * strides[3] : nullptr;
            };
          };
          __syncthreads();  // the tiles have been used
          copy_polyphase_rows(shared.x, kTapFeatureRow, kPolyphaseTileRows, kTapFeatures,
                              p.in_features - d0, p.x_strides[5], x_aligned, row(x, p.x_strides),
                              [&](int column) -> std::int64_t { return column; });
          copy_polyphase_rows(
              shared.grad, plan.row, kPolyphaseTileRows, plan.columns, p.num_realizations,
              p.grad_out_strides[5], grad_aligned, row(grad, p.grad_out_strides), [&](int column) {
                return realization_of(plan, column, diagonal0 / s, turn, p.num_realizations);
              });
          copy_async_wait();
          map_polyphase_rows(p.feature_map, shared.x, kTapFeatureRow, kPolyphaseTileRows,
                             kTapFeatures, x_aligned);
          __syncthreads();
          const Storage* columns[2];  // number `group` of a product's columns
          TORCH_SPE_UNROLL
          for (int j = 0; j < 2; ++j)
            columns[j] =
                shared.grad + 2 * member * plan.row +
                column_of(shared, plan, warp_diagonal + 8 * j + group / 2 + 4 * (group % 2));
          int at[kTapFeatureTiles][2][4];
          TORCH_SPE_UNROLL
          for (int i = 0; i < kTapFeatureTiles * 8; ++i)
            at[i / 8][i / 4 % 2][i % 4] = words[i / 8][i / 4 % 2][i % 4] + pass;
          for (int t0 = 0; t0 < kPass; t0 += kTapPositions) {
            TORCH_SPE_UNROLL
            for (int step = 0; step < kTapPositions; ++step) {
              const int t = t0 + step;
              std::uint32_t a[kTapFeatureTiles][4] = {}, b[2][2] = {};
              if constexpr (kBatchTiles == 1) {
                TORCH_SPE_UNROLL
                for (int i = 0; i < kTapFeatureTiles; i += 2) {
                  std::uint32_t four[4];
                  ldmatrix_x4<true>(four, shared.x + (t * kBatch + lane % 8) * kTapFeatureRow +
                                              16 * i + lane / 8 * 8);
                  TORCH_SPE_UNROLL
                  for (int e = 0; e < 4; ++e) a[i + e / 2][e % 2] = four[e];
                }
              } else {
                TORCH_SPE_UNROLL
                for (int i = 0; i < kTapFeatureTiles; ++i)
                  ldmatrix_x4<true>(
                      a[i], shared.x + (t * kBatch + lane % 8 + lane / 16 * 8) * kTapFeatureRow +
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
              for (int i = 0; i < kTapFeatureTiles; ++i) {
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
            for (int i = 0; i < kTapFeatureTiles * 8; ++i)
              at[i / 8][i / 4 % 2][i % 4] += kTapPositions;
          }
        }
      }
      // Every tap of a group is one lane's.
      TORCH_SPE_UNROLL
      for (int i = 0; i < kTapFeatureTiles * 8; ++i) {
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

// How the gradient of the kernel is made, if it `fits`, with segments of the positions.
struct PolyphaseTapGradient {
  bool fits = false;
  PolyphasePlan plan;
  std::int64_t blocks = 0, segments = 0;  // blocks of a segment
  std::size_t shared_bytes = 0;

  explicit PolyphaseTapGradient(const ConvFilterBackwardParams& p)
      : plan(PolyphasePlan::for_tap_gradient(p, kTapFeatures, 64)) {
    if ((p.dtype != core::DType::kFloat16 && p.dtype != core::DType::kBFloat16) ||
        !is_polyphase_line(p))
      return;
    for (const int positions : {64, 32, 16}) {
      plan = PolyphasePlan::for_tap_gradient(p, kTapFeatures, positions);
      MemoryLayout size;
      PolyphaseTapGradientShared<core::Half>{size, plan};
      shared_bytes = size.size();
      fits = static_cast<std::int64_t>(shared_bytes) <= kMostShared;
      if (fits) break;
    }
    blocks = p.num_heads * ceil_div(p.in_features, kTapFeatures) * plan.diagonal_tiles();
    const std::int64_t count = ceil_div(p.size[2], plan.positions);
    segments = min_of(count, ceil_div(kWantedBlocks, max_of(1, blocks)));
    segments = ceil_div(count, ceil_div(count, segments));  // none is empty
  }
  std::int64_t parts() const { return segments * plan.all_groups; }
};

template <class Storage>
void launch_polyphase_tap_gradient(const ConvFilterBackwardParams& p,
                                   const PolyphaseTapGradient& taps, double* parts, Stream stream) {
  launch(taps.plan.batch > 8 ? polyphase_tap_gradient_kernel<Storage, 2>
                             : polyphase_tap_gradient_kernel<Storage, 1>,
         grid_of(taps.blocks * taps.segments), dim3(kThreads), taps.shared_bytes, stream, p,
         taps.plan, taps.segments, parts);
}

}  // namespace torch_spe::cuda
