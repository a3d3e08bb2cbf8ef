#include "phasor_filter.h"
#include "phasor_products.h"

namespace torch_spe::cuda {
namespace {

// The filter (lanes are pairs, the sum is over features) and its gradient by x (lanes are features,
// the sum is over pairs). A thread keeps one lane at kPositions consecutive positions and kBatch
// rows of the batch; a code comes from the one before by a rotation, and is exact every kPositions.
constexpr int kPositions = 8;
constexpr int kTilePositions = kWarps * kPositions;
constexpr int kSum = 16;  // features or pairs whose coefficients lie in shared memory at once

template <class T, bool kGradient, int kBatch>
struct ApplyShared {
  static constexpr int kParts = kGradient ? 2 : 1;  // real and imaginary part
  static constexpr int kRow = kLanes + 1;
  double* freqs;  // [sum, lane], first coordinates
  T* codes;       // [4, sum, lane]: coefficient and constant, real and imaginary
  T* inputs;      // [position, sum, batch, part]

  TORCH_SPE_INLINE explicit ApplyShared(Carver& carver)
      : freqs(carver.take<double>(kSum * kRow)),
        codes(carver.take<T>(4 * kSum * kRow)),
        inputs(carver.take<T>(kTilePositions * kSum * kBatch * kParts)) {}
};

template <class Storage, bool kGradient, int kBatch>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    apply_kernel(const PhasorFilterBackwardParams p) {
  using T = core::accumulate_t<Storage>;
  using Shared = ApplyShared<T, kGradient, kBatch>;
  constexpr int kRow = Shared::kRow, kParts = Shared::kParts;
  TORCH_SPE_SHARED_MEMORY(memory);
  Carver carver(memory);
  const Shared shared(carver);
  const std::int64_t features = p.in_features, pairs = p.num_pairs;
  const std::int64_t lanes = kGradient ? features : pairs, sums = kGradient ? pairs : features;
  const std::int64_t lane_tiles = ceil_div(lanes, kLanes);
  const std::int64_t batch_tiles = ceil_div(p.batch, kBatch);
  const std::int64_t position_tiles = ceil_div(p.length, kTilePositions);
  const std::int64_t block = blockIdx.x;
  const std::int64_t lane0 = block % lane_tiles * kLanes;
  const std::int64_t b0 = block / lane_tiles % batch_tiles * kBatch;
  const std::int64_t tile0 = block / lane_tiles / batch_tiles % position_tiles * kTilePositions;
  const std::int64_t head = block / lane_tiles / batch_tiles / position_tiles;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes, warp = thread / kLanes;
  const std::int64_t n0 = tile0 + warp * kPositions;
  const Storage* const input = static_cast<const Storage*>(kGradient ? p.grad_out : p.x);
  const std::int64_t* const strides = kGradient ? p.grad_out_strides : p.x_strides;
  const T* const coefficients = static_cast<const T*>(p.coefficients);
  const T* const constant = static_cast<const T*>(p.constant);

  T re[kPositions][kBatch], im[kPositions][kBatch];
  TORCH_SPE_UNROLL
  for (int t = 0; t < kPositions; ++t) {
    TORCH_SPE_UNROLL
    for (int b = 0; b < kBatch; ++b) re[t][b] = im[t][b] = 0;
  }
  for (std::int64_t sum0 = 0; sum0 < sums; sum0 += kSum) {
    const int count = static_cast<int>(min_of(kSum, sums - sum0));
    __syncthreads();  // the tables before have been used
    for (int i = thread; i < kSum * kLanes; i += kThreads) {
      // Pairs are contiguous in memory.
      const int in_sum = kGradient ? i % kSum : i / kLanes;
      const int in_lanes = kGradient ? i / kSum : i % kLanes;
      const std::int64_t d = kGradient ? lane0 + in_lanes : sum0 + in_sum;
      const std::int64_t pair = kGradient ? sum0 + in_sum : lane0 + in_lanes;
      const bool inside = d < features && pair < pairs;
      const std::int64_t index = (head * features + d) * pairs + pair;
      const int to = in_sum * kRow + in_lanes;
      shared.freqs[to] = inside ? p.freqs[index * p.ndim] : 0.0;
      TORCH_SPE_UNROLL
      for (int part = 0; part < 2; ++part) {
        shared.codes[part * kSum * kRow + to] = inside ? coefficients[2 * index + part] : T(0);
        shared.codes[(2 + part) * kSum * kRow + to] =
            inside && constant != nullptr ? constant[2 * index + part] : T(0);
      }
    }
    for (int i = thread; i < kTilePositions * kBatch * kSum * kParts; i += kThreads) {
      const int in_sum = i % (kSum * kParts) / kParts, part = i % kParts;
      const int b = i / (kSum * kParts) % kBatch, t = i / (kSum * kParts) / kBatch;
      const bool inside = sum0 + in_sum < sums && b0 + b < p.batch && tile0 + t < p.length;
      shared.inputs[((t * kSum + in_sum) * kBatch + b) * kParts + part] =
          inside ? read(input[(b0 + b) * strides[0] + (tile0 + t) * strides[1] + head * strides[2] +
                              ((sum0 + in_sum) * kParts + part) * strides[3]])
                 : T(0);
    }
    __syncthreads();
    for (int s = 0; s < count; ++s) {
      const int at = s * kRow + lane;
      const T cr = shared.codes[at], ci = shared.codes[kSum * kRow + at];
      const T kr = shared.codes[2 * kSum * kRow + at], ki = shared.codes[3 * kSum * kRow + at];
      Phasor<T> phasor, step;
      if (p.positions == nullptr) {
        phasor.set(shared.freqs[at], p.start + static_cast<double>(n0));
        step.set(shared.freqs[at], 1.0);
      }
      const std::int64_t d = kGradient ? lane0 + lane : sum0 + s;
      const std::int64_t pair = kGradient ? sum0 + s : lane0 + lane;
      TORCH_SPE_UNROLL
      for (int t = 0; t < kPositions; ++t) {
        if (p.positions != nullptr && d < features && pair < pairs && n0 + t < p.length)
          phasor.set(p, p.freqs + ((head * features + d) * pairs + pair) * p.ndim, n0 + t);
        const T code_re = cr * phasor.re - ci * phasor.im + kr;
        const T code_im = cr * phasor.im + ci * phasor.re + ki;
        const T* const values =
            shared.inputs + ((warp * kPositions + t) * kSum + s) * kBatch * kParts;
        TORCH_SPE_UNROLL
        for (int b = 0; b < kBatch; ++b) {
          if constexpr (kGradient) {
            re[t][b] += values[2 * b] * code_re + values[2 * b + 1] * code_im;
          } else {
            re[t][b] += values[b] * code_re;
            im[t][b] += values[b] * code_im;
          }
        }
        if (p.positions == nullptr) phasor.turn(step);
      }
    }
  }
  if (lane0 + lane >= lanes) return;
  Storage* const out = static_cast<Storage*>(kGradient ? p.grad_x : p.out);
  const std::int64_t width = kGradient ? features : 2 * pairs;
  TORCH_SPE_UNROLL
  for (int t = 0; t < kPositions; ++t) {
    TORCH_SPE_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      if (n0 + t >= p.length || b0 + b >= p.batch) continue;
      Storage* const row = out + (((b0 + b) * p.length + n0 + t) * p.num_heads + head) * width;
      if constexpr (kGradient) {
        write(re[t][b], row + lane0 + lane);
      } else {
        write(re[t][b], row + 2 * (lane0 + lane));
        write(im[t][b], row + 2 * (lane0 + lane) + 1);
      }
    }
  }
}

// The gradient of the code of (feature, pair) at a position: sum over the batch of x times the
// gradient of the output.
template <class Storage, class T>
TORCH_SPE_DEVICE void code_gradient(const PhasorFilterBackwardParams& p, std::int64_t head,
                                    std::int64_t n, std::int64_t d, std::int64_t pair, T* re,
                                    T* im) {
  const Storage* const x = static_cast<const Storage*>(p.x) + n * p.x_strides[1] +
                           head * p.x_strides[2] + d * p.x_strides[3];
  const Storage* const grad = static_cast<const Storage*>(p.grad_out) + n * p.grad_out_strides[1] +
                              head * p.grad_out_strides[2] + 2 * pair * p.grad_out_strides[3];
  *re = *im = 0;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const T value = read(x[b * p.x_strides[0]]);
    *re += value * read(grad[b * p.grad_out_strides[0]]);
    *im += value * read(grad[b * p.grad_out_strides[0] + p.grad_out_strides[3]]);
  }
}

// Gradients of frequencies, coefficients and constant: a thread keeps one pair and one feature, and
// walks over the positions of a segment. Sums of a tile of positions are in T, all others in
// double: the terms of a frequency's gradient grow with the position.
constexpr int kTile = 32;

template <class Storage>
__global__ void __launch_bounds__(kThreads)
    parameters_kernel(const PhasorFilterBackwardParams p, std::int64_t segments,
                      const PhasorParts parts) {
  using T = core::accumulate_t<Storage>;
  const std::int64_t features = p.in_features, pairs = p.num_pairs;
  const std::int64_t pair_tiles = ceil_div(pairs, kLanes);
  const std::int64_t feature_tiles = ceil_div(features, kWarps);
  const std::int64_t block = blockIdx.x;
  const std::int64_t segment = block % segments;
  const std::int64_t pair = block / segments % pair_tiles * kLanes + threadIdx.x % kLanes;
  const std::int64_t d =
      block / segments / pair_tiles % feature_tiles * kWarps + threadIdx.x / kLanes;
  const std::int64_t head = block / segments / pair_tiles / feature_tiles;
  if (pair >= pairs || d >= features) return;
  const std::int64_t index = (head * features + d) * pairs + pair;
  const std::int64_t part = segment * p.num_heads * features * pairs + index;
  const double* const freq = p.freqs + index * p.ndim;
  const T cr = static_cast<const T*>(p.coefficients)[2 * index];
  const T ci = static_cast<const T*>(p.coefficients)[2 * index + 1];
  const std::int64_t tiles = ceil_div(p.length, kTile), per_segment = ceil_div(tiles, segments);
  const std::int64_t begin = min_of(p.length, segment * per_segment * kTile);
  const std::int64_t end = min_of(p.length, begin + per_segment * kTile);

  double sum_cr = 0, sum_ci = 0, sum_kr = 0, sum_ki = 0, sum_freq = 0;
  if (parts.freqs != nullptr) {
    for (std::int64_t i = 0; i < p.ndim; ++i) parts.freqs[part * p.ndim + i] = 0;
  }
  Phasor<T> phasor, step;
  if (p.positions == nullptr) step.set(freq[0], 1.0);
  for (std::int64_t n0 = begin; n0 < end; n0 += kTile) {
    const int size = static_cast<int>(min_of(kTile, end - n0));
    T tile_cr = 0, tile_ci = 0, tile_kr = 0, tile_ki = 0, tile_phase = 0, tile_slope = 0;
    if (p.positions == nullptr) phasor.set(freq[0], p.start + static_cast<double>(n0));
    for (int t = 0; t < size; ++t) {
      if (p.positions != nullptr) phasor.set(p, freq, n0 + t);
      T gr, gi;
      code_gradient<Storage>(p, head, n0 + t, d, pair, &gr, &gi);
      tile_kr += gr;
      tile_ki += gi;
      tile_cr += gr * phasor.re + gi * phasor.im;
      tile_ci += gi * phasor.re - gr * phasor.im;
      // Of the phase in cycles, without its factor 2 pi.
      const T phase =
          gi * (cr * phasor.re - ci * phasor.im) - gr * (cr * phasor.im + ci * phasor.re);
      tile_phase += phase;
      tile_slope += phase * static_cast<T>(t);
      if (p.positions != nullptr && parts.freqs != nullptr) {
        for (std::int64_t i = 0; i < p.ndim; ++i)
          parts.freqs[part * p.ndim + i] += core::kTwoPi * phase * position_of(p, n0 + t, i);
      }
      if (p.positions == nullptr) phasor.turn(step);
    }
    sum_cr += static_cast<double>(tile_cr);
    sum_ci += static_cast<double>(tile_ci);
    sum_kr += static_cast<double>(tile_kr);
    sum_ki += static_cast<double>(tile_ki);
    sum_freq += static_cast<double>(tile_slope) +
                static_cast<double>(tile_phase) * (p.start + static_cast<double>(n0));
  }
  if (parts.freqs != nullptr && p.positions == nullptr) parts.freqs[part] = core::kTwoPi * sum_freq;
  if (parts.coefficients != nullptr) {
    parts.coefficients[2 * part] = sum_cr;
    parts.coefficients[2 * part + 1] = sum_ci;
  }
  if (parts.constant != nullptr) {
    parts.constant[2 * part] = sum_kr;
    parts.constant[2 * part + 1] = sum_ki;
  }
}

template <class Storage>
__global__ void __launch_bounds__(kThreads)
    positions_kernel(const PhasorFilterBackwardParams p, double* parts) {  // [H, N, ndim]
  using T = core::accumulate_t<Storage>;
  TORCH_SPE_SHARED_MEMORY(memory);
  Carver carver(memory);
  double* const warp_sums = carver.take<double>(kWarps);
  const std::int64_t codes = p.in_features * p.num_pairs;
  sum_position_gradients(
      p, codes, warp_sums, parts, [&](std::int64_t head, std::int64_t n, std::int64_t j) {
        const std::int64_t index = head * codes + j;
        const T cr = static_cast<const T*>(p.coefficients)[2 * index];
        const T ci = static_cast<const T*>(p.coefficients)[2 * index + 1];
        Phasor<T> phasor;
        phasor.set(p, p.freqs + index * p.ndim, n);
        T gr, gi;
        code_gradient<Storage>(p, head, n, j / p.num_pairs, j % p.num_pairs, &gr, &gi);
        return gi * (cr * phasor.re - ci * phasor.im) - gr * (cr * phasor.im + ci * phasor.re);
      });
}

template <class Storage, bool kGradient, int kBatch>
void apply(const PhasorFilterBackwardParams& p, Stream stream) {
  Carver size;
  ApplyShared<core::accumulate_t<Storage>, kGradient, kBatch>{size};
  const std::int64_t blocks = ceil_div(kGradient ? p.in_features : p.num_pairs, kLanes) *
                              ceil_div(p.batch, kBatch) * ceil_div(p.length, kTilePositions) *
                              p.num_heads;
  launch(apply_kernel<Storage, kGradient, kBatch>, grid_of(blocks), dim3(kThreads), size.size(),
         stream, p);
}

template <class Storage, bool kGradient, int kTiles>
void apply_products(const PhasorFilterBackwardParams& p, Stream stream) {
  const CodeProductUnits<kGradient, kTiles> units(p);
  Carver size;
  CodeProductShared<kTiles>{size, units.inputs};
  launch(code_product_kernel<Storage, kGradient, kTiles>, grid_of(ceil_div(units.count, kWarps)),
         dim3(kThreads), size.size(), stream, p);
}

// Whether the kernels of phasor_products.h serve.
bool has_products(const PhasorFilterParams& p) {
  return p.positions == nullptr && p.in_features > 0 &&
         (p.dtype == core::DType::kFloat16 || p.dtype == core::DType::kBFloat16);
}

template <class Storage, bool kGradient>
void apply(const PhasorFilterBackwardParams& p, Stream stream) {
  if constexpr (sizeof(Storage) == 2) {
    if (has_products(p)) {
      if (p.batch <= kMmaRows) return apply_products<Storage, kGradient, 1>(p, stream);
      return apply_products<Storage, kGradient, 2>(p, stream);
    }
  }
  if (p.batch == 1) {
    apply<Storage, kGradient, 1>(p, stream);
  } else {
    apply<Storage, kGradient, 4>(p, stream);
  }
}

// Parts of the scratch memory of the backward pass.
struct Workspace {
  std::int64_t blocks, segments, codes;
  PhasorParts parts{};
  double* positions = nullptr;
  std::size_t size = 0;

  Workspace(const PhasorFilterBackwardParams& p, void* memory)
      : blocks(p.num_heads * ceil_div(p.num_pairs, kLanes) * ceil_div(p.in_features, kWarps)),
        segments(has_products(p) ? CodeGradientTiles(p).segments
                                 : num_segments(blocks, ceil_div(p.length, kTile))),
        codes(p.num_heads * p.in_features * p.num_pairs) {
    Carver carver(static_cast<unsigned char*>(memory));
    if (p.grad_freqs != nullptr) parts.freqs = carver.take<double>(segments * codes * p.ndim);
    if (p.grad_coefficients != nullptr)
      parts.coefficients = carver.take<double>(segments * codes * 2);
    if (p.grad_constant != nullptr) parts.constant = carver.take<double>(segments * codes * 2);
    if (p.grad_positions != nullptr)
      positions = carver.take<double>(p.num_heads * p.length * p.ndim);
    size = carver.size();
  }
};

template <class Storage>
void sum_over_positions(const PhasorFilterBackwardParams& p, const Workspace& workspace,
                        Stream stream) {
  if constexpr (sizeof(Storage) == 2) {
    if (has_products(p)) {
      const CodeGradientTiles tiles(p);
      Carver size;
      CodeGradientShared<Storage>{size};
      launch(code_gradient_kernel<Storage>,
             grid_of(p.num_heads * tiles.feature_tiles * tiles.real_tiles * tiles.segments),
             dim3(kThreads), size.size(), stream, p, tiles, workspace.parts);
      return;
    }
  }
  launch(parameters_kernel<Storage>, grid_of(workspace.blocks * workspace.segments), dim3(kThreads),
         0, stream, p, workspace.segments, workspace.parts);
}

template <class Storage>
void backward(const PhasorFilterBackwardParams& p, void* memory, Stream stream) {
  const Workspace workspace(p, memory);
  if (p.grad_x != nullptr) apply<Storage, true>(p, stream);
  if (p.grad_freqs != nullptr || p.grad_coefficients != nullptr || p.grad_constant != nullptr) {
    sum_over_positions<Storage>(p, workspace, stream);
  }
  const auto add = [&](const double* parts, std::int64_t size, double* out) {
    if (out != nullptr) sum_parts(parts, workspace.segments, size, out, stream);
  };
  add(workspace.parts.freqs, workspace.codes * p.ndim, p.grad_freqs);
  add(workspace.parts.coefficients, workspace.codes * 2, p.grad_coefficients);
  add(workspace.parts.constant, workspace.codes * 2, p.grad_constant);
  if (p.grad_positions != nullptr) {
    Carver size;
    size.take<double>(kWarps);
    launch(positions_kernel<Storage>, grid_of(p.length * p.num_heads), dim3(kThreads), size.size(),
           stream, p, workspace.positions);
    sum_parts(workspace.positions, p.num_heads, p.length * p.ndim, p.grad_positions, stream);
  }
}

}  // namespace

void phasor_filter_forward(const PhasorFilterParams& params, Stream stream) {
  PhasorFilterBackwardParams p{};
  static_cast<PhasorFilterParams&>(p) = params;
  visit_storage(p.dtype, [&](auto storage) { apply<decltype(storage), false>(p, stream); });
}

std::size_t phasor_filter_backward_workspace(const PhasorFilterBackwardParams& p) {
  return Workspace(p, nullptr).size;
}

void phasor_filter_backward(const PhasorFilterBackwardParams& p, void* workspace, Stream stream) {
  visit_storage(p.dtype, [&](auto storage) { backward<decltype(storage)>(p, workspace, stream); });
}

}  // namespace torch_spe::cuda
