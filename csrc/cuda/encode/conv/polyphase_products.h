// Kernel of the convolution filter with polyphase noise and of its gradient by x for 16-bit
// storage, see polyphase_plan.h.
#pragma once

#include "encode/conv/polyphase_streams.h"

namespace torch_spe::cuda {

template <class Storage>
struct PolyphaseShared : NoiseStreamsShared {
  std::uint32_t* taps;  // [feature, pair, phase]
  Storage* constant;    // [feature, group, class], over the factor of the noise
  Storage* tile;        // [position, batch row, column] of x or grad_out

  TORCH_SPE_INLINE PolyphaseShared(MemoryLayout& layout, const PolyphasePlan& plan)
      : NoiseStreamsShared(layout, plan),
        taps(layout.take<std::uint32_t>(std::int64_t{plan.features} * plan.pairs * plan.stride)),
        constant(plan.has_constant
                     ? layout.take<Storage>(std::int64_t{plan.features} * plan.groups * plan.stride)
                     : nullptr),
        tile(layout.take<Storage>(std::int64_t{kPolyphaseTileRows} * plan.row)) {}
};

template <class Storage>
struct alignas(8) FourValues {
  Storage values[4];
};

// x times codes, summed over features; or, for the gradient of x, grad_out times codes, summed over
// realizations. A block makes some positions of kPolyphaseRows diagonals or features.
template <class Storage, bool kGradient, int kBatchTiles>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    polyphase_kernel(const ConvFilterBackwardParams p, const PolyphasePlan plan) {
  constexpr int kBatch = 8 * kBatchTiles, kPass = kPolyphaseTileRows / kBatch;
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const PolyphaseShared<Storage> shared(layout, plan);
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
  const auto& strides = kGradient ? p.grad_out_strides : p.x_strides;
  const Storage* const in_data = static_cast<const Storage*>(kGradient ? p.grad_out : p.x);
  const Storage* const in = in_data + head * strides[4];
  Storage* const out = static_cast<Storage*>(kGradient ? p.grad_x : p.out);
  const std::int64_t in_columns = kGradient ? p.num_realizations : p.in_features;
  const std::int64_t out_columns = kGradient ? p.in_features : p.num_realizations;
  const bool aligned = is_aligned<Storage>(in_data, strides) && (!kGradient || s % 8 == 0);
  const float factor = __builtin_sqrtf(static_cast<float>(s));
  NoiseStreams<Storage> streams(p, plan, shared, head);

  // Rows of the product that this lane holds values of.
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
      copy_polyphase_rows(
          shared.tile, plan.row, kPolyphaseTileRows, plan.columns, in_columns, strides[5], aligned,
          [&](int i) -> const Storage* {
            const std::int64_t b = b0 + i % kBatch, n = n0 + i / kBatch;
            if (b >= p.batch || n >= length) return nullptr;
            return in + b * strides[0] + n * strides[3];
          },
          [&](int column) -> std::int64_t {
            if constexpr (!kGradient) return sum0 + column;
            return realization_of(plan, column, group0, turn, in_columns);
          });
      copy_async_wait();
      if constexpr (!kGradient)
        map_polyphase_rows(p.feature_map, shared.tile, plan.row, kPolyphaseTileRows, plan.columns,
                           aligned);
      __syncthreads();

      // A lane has two rows and 4 of 16 summands, two in each product.
      typename NoiseStreams<Storage>::Feature features[4];
      typename NoiseStreams<Storage>::Diagonal lines[4];
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
          int rotated = turn;
          TORCH_SPE_UNROLL
          for (int t = 0; t < kPass; ++t, rotated = next_turn(rotated, s)) {
            std::uint32_t twice[kBatchTiles][4];  // (x, x) of the 4 summands
            TORCH_SPE_UNROLL
            for (int j = 0; j < kBatchTiles; ++j) {
              const int at = (t * kBatch + 8 * j) * plan.row;
              if constexpr (kGradient) {
                TORCH_SPE_UNROLL
                for (int i = 0; i < 4; ++i) twice[j][i] = low_twice(tile[i][at + t].bits);
              } else {
                const auto four = *reinterpret_cast<const FourValues<Storage>*>(tile[0] + at);
                std::uint32_t pairs[2];
                __builtin_memcpy(pairs, &four, sizeof(pairs));
                TORCH_SPE_UNROLL
                for (int i = 0; i < 4; ++i)
                  twice[j][i] = i % 2 == 0 ? low_twice(pairs[i / 2]) : high_twice(pairs[i / 2]);
              }
            }
            TORCH_SPE_UNROLL
            for (int i = 0; i < 4; i += 2) {
              const std::uint32_t a[4] = {code(t, rotated, i, 0), code(t, rotated, i, 1),
                                          code(t, rotated, i + 1, 0), code(t, rotated, i + 1, 1)};
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
          multiply([&](int, int rotated, int i, int e) -> std::uint32_t {
            const int summand = summand0 + kStep * i;
            const int d = kGradient ? rows[e] : summand, diagonal = kGradient ? summand : rows[e];
            return shared
                .constant[(d * plan.groups + streams.group(diagonal)) * s +
                          rotated_index(shared.index[diagonal], rotated, s)]
                .bits;
          });
        }
      }
    }

    // The sums go through shared memory; where the block has all realizations of its groups, it
    // brings them into order there.
    const bool ordered = kGradient || kPolyphaseRows % s == 0;
    __syncthreads();  // the tile has been used
    int rotated = turn;
    TORCH_SPE_UNROLL
    for (int t = 0; t < kPass; ++t, rotated = next_turn(rotated, s)) {
      TORCH_SPE_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int column = kGradient || !ordered
                               ? rows[e]
                               : rows[e] - row_index[e] + rotated_index(row_index[e], rotated, s);
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
        ordered && out_columns % 8 == 0 && reinterpret_cast<std::uintptr_t>(out) % 16 == 0;
    const int column = thread % (kPolyphaseRows / 8) * 8;
    for (int m = thread / (kPolyphaseRows / 8); m < kPolyphaseTileRows;
         m += kThreads / (kPolyphaseRows / 8)) {
      const std::int64_t b = b0 + m % kBatch, n = n0 + m / kBatch;
      if (b >= p.batch || n >= length) continue;
      Storage* const from = shared.tile + m * plan.row + column;
      if constexpr (kGradient) {
        if (p.feature_map != FeatureMap::kIdentity) {
          const Storage* const x = static_cast<const Storage*>(p.x) + b * p.x_strides[0] +
                                   n * p.x_strides[3] + head * p.x_strides[4];
          TORCH_SPE_KEEP_LOOP
          for (int e = 0; e < 8; ++e) {
            const std::int64_t d = row0 + column + e;
            if (d < out_columns)
              write(gradient_of_input_at(p.feature_map, read(from[e]), x + d * p.x_strides[5]),
                    from + e);
          }
        }
      }
      Storage* const to = out + ((b * length + n) * p.num_heads + head) * out_columns;
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

// Starts the kernel, unless it is not made for these arguments.
template <class Storage, bool kGradient>
bool launch_polyphase(const ConvFilterBackwardParams& p, Stream stream) {
  if (!is_polyphase_line(p)) return false;
  const std::int64_t s = p.generated.stride[2], diagonals = ceil_div(p.num_realizations, s) * s;
  return choose_plan<PolyphaseShared<Storage>>(
      kGradient ? diagonals : p.in_features,
      [&](int depth, int positions) {
        return kGradient ? PolyphasePlan::for_input_gradient(p, depth, positions)
                         : PolyphasePlan::for_forward(p, depth, positions);
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

}  // namespace torch_spe::cuda
