#include "phasors.h"
#include "sine_features.h"

namespace torch_spe::cuda {
namespace {

// One sine of a head and feature, from position to position: lanes are features, and a rotation
// leads to the next position.
template <class T>
class Sine {
 public:
  std::int64_t index;  // in [H, D, K]
  T amplitude;

  // At position n.
  TORCH_SPE_DEVICE Sine(const SineFeaturesParams& p, std::int64_t head, std::int64_t d,
                        std::int64_t k, std::int64_t n)
      : index((head * p.in_features + d) * p.num_sines + k),
        amplitude(static_cast<const T*>(p.amplitudes)[index]) {
    offset_.set(p.offsets[index] * (1 / core::kTwoPi), 1.0);
    move_to(p, n);
    if (p.positions == nullptr) step_.set(p.freqs[index], 1.0);
  }

  TORCH_SPE_DEVICE void move_to(const SineFeaturesParams& p, std::int64_t n) {
    e_.set(p, p.freqs + index * p.ndim, n);
    e_.turn(offset_);
  }
  // Only where positions are consecutive.
  TORCH_SPE_DEVICE void next() { e_.turn(step_); }

  TORCH_SPE_DEVICE T re() const { return e_.re; }
  TORCH_SPE_DEVICE T im() const { return e_.im; }
  // Gradient of the phase, in radians, from that of e.
  TORCH_SPE_DEVICE T phase_gradient(T grad_re, T grad_im) const {
    return amplitude * (grad_im * e_.re - grad_re * e_.im);
  }

 private:
  Phasor<T> e_, offset_, step_;
};

TORCH_SPE_INLINE std::int64_t num_outputs(const SineFeaturesParams& p) {
  return (2 * p.num_sines + (p.constant != nullptr ? 1 : 0)) * p.in_features;
}

// Forward: each thread keeps one feature and some consecutive positions, for the whole batch.
constexpr int kPositions = 8;
constexpr int kTilePositions = kWarps * kPositions;

template <class Storage>
__global__ void __launch_bounds__(kThreads) forward_kernel(const SineFeaturesParams p) {
  using T = core::accumulate_t<Storage>;
  const std::int64_t features = p.in_features, outputs = num_outputs(p);
  const std::int64_t feature_tiles = ceil_div(features, kLanes);
  const std::int64_t position_tiles = ceil_div(p.length, kTilePositions);
  const std::int64_t block = blockIdx.x;
  const std::int64_t d = block % feature_tiles * kLanes + threadIdx.x % kLanes;
  const std::int64_t n0 =
      block / feature_tiles % position_tiles * kTilePositions + threadIdx.x / kLanes * kPositions;
  const std::int64_t head = block / feature_tiles / position_tiles;
  if (d >= features) return;
  const Storage* const x =
      static_cast<const Storage*>(p.x) + head * p.x_strides[2] + d * p.x_strides[3];
  Storage* const out = static_cast<Storage*>(p.out) + head * outputs + d;
  const std::int64_t out_stride = p.num_heads * outputs;
  const std::int64_t end = min_of(p.length, n0 + kPositions);
  for (std::int64_t k = 0; k < p.num_sines && n0 < end; ++k) {
    Sine<T> sine(p, head, d, k, n0);
    for (std::int64_t n = n0; n < end; ++n) {
      if (p.positions != nullptr) sine.move_to(p, n);
      const T re = sine.amplitude * sine.re(), im = sine.amplitude * sine.im();
      for (std::int64_t b = 0; b < p.batch; ++b) {
        const T value = read(x[b * p.x_strides[0] + n * p.x_strides[1]]);
        Storage* const to = out + (b * p.length + n) * out_stride + 2 * k * features;
        write(value * re, to);
        write(value * im, to + features);
      }
      if (p.positions == nullptr) sine.next();
    }
  }
  if (p.constant == nullptr) return;
  const T constant = static_cast<const T*>(p.constant)[head * features + d];
  for (std::int64_t n = n0; n < end; ++n) {
    for (std::int64_t b = 0; b < p.batch; ++b) {
      write(read(x[b * p.x_strides[0] + n * p.x_strides[1]]) * constant,
            out + (b * p.length + n) * out_stride + 2 * p.num_sines * features);
    }
  }
}

// Sums over positions, of the segments that they are cut into.
struct Parts {
  double* freqs;       // [segment, H, D, K, ndim]
  double* amplitudes;  // [segment, H, D, K]
  double* offsets;     // [segment, H, D, K]
  double* constant;    // [segment, H, D]
};

// Backward: each warp takes a segment of the positions and each lane a feature; they share nothing.
// Sums of a tile of positions and batch rows are in T, all others in double: the terms of a
// frequency's gradient grow with the position.
template <class Storage, int kBatch>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    backward_kernel(const SineFeaturesBackwardParams p, std::int64_t segments, const Parts parts) {
  using T = core::accumulate_t<Storage>;
  constexpr int kTile = 16 / kBatch;  // positions
  const std::int64_t features = p.in_features;
  const std::int64_t feature_tiles = ceil_div(features, kLanes);
  const std::int64_t block = blockIdx.x;
  const std::int64_t d = block % feature_tiles * kLanes + threadIdx.x % kLanes;
  const std::int64_t head = block / feature_tiles % p.num_heads;
  const std::int64_t segment = block / feature_tiles / p.num_heads * kWarps + threadIdx.x / kLanes;
  if (d >= features || segment >= segments) return;
  const Storage* const x =
      static_cast<const Storage*>(p.x) + head * p.x_strides[2] + d * p.x_strides[3];
  const auto& strides = p.grad_out_strides;
  const Storage* const grad =
      static_cast<const Storage*>(p.grad_out) + head * strides[2] + d * strides[3];
  const T constant =
      p.constant == nullptr ? T(0) : static_cast<const T*>(p.constant)[head * features + d];
  const std::int64_t feature = (segment * p.num_heads + head) * features + d;
  const auto clear = [&](double* sums, std::int64_t count) {
    for (std::int64_t i = 0; sums != nullptr && i < count; ++i) sums[feature * count + i] = 0;
  };
  clear(parts.freqs, p.num_sines * p.ndim);
  clear(parts.amplitudes, p.num_sines);
  clear(parts.offsets, p.num_sines);
  double constant_sum = 0;

  const std::int64_t per_segment = ceil_div(ceil_div(p.length, kTile), segments) * kTile;
  const std::int64_t end = min_of(p.length, (segment + 1) * per_segment);
  for (std::int64_t n0 = segment * per_segment; n0 < end; n0 += kTile) {
    for (std::int64_t b0 = 0; b0 < p.batch; b0 += kBatch) {
      const auto inside = [&](int t, int b) { return n0 + t < end && b0 + b < p.batch; };
      const auto grad_at = [&](int t, int b, std::int64_t output) {
        return inside(t, b) ? read(grad[(b0 + b) * strides[0] + (n0 + t) * strides[1] +
                                        output * features * strides[3]])
                            : T(0);
      };
      T values[kTile][kBatch], grad_x[kTile][kBatch], tile_constant = 0;
      TORCH_SPE_UNROLL
      for (int t = 0; t < kTile; ++t) {
        TORCH_SPE_UNROLL
        for (int b = 0; b < kBatch; ++b) {
          values[t][b] =
              inside(t, b) ? read(x[(b0 + b) * p.x_strides[0] + (n0 + t) * p.x_strides[1]]) : T(0);
          const T last = p.constant == nullptr ? T(0) : grad_at(t, b, 2 * p.num_sines);
          grad_x[t][b] = last * constant;
          tile_constant += last * values[t][b];
        }
      }
      constant_sum += static_cast<double>(tile_constant);
      for (std::int64_t k = 0; k < p.num_sines; ++k) {
        Sine<T> sine(p, head, d, k, n0);
        const std::int64_t part = feature * p.num_sines + k;
        T tile_amplitude = 0, tile_phase = 0, tile_slope = 0;
        TORCH_SPE_UNROLL
        for (int t = 0; t < kTile; ++t) {
          if (p.positions != nullptr && n0 + t < end) sine.move_to(p, n0 + t);
          T grad_re = 0, grad_im = 0;  // of e
          TORCH_SPE_UNROLL
          for (int b = 0; b < kBatch; ++b) {
            const T re = grad_at(t, b, 2 * k), im = grad_at(t, b, 2 * k + 1);
            grad_x[t][b] += sine.amplitude * (re * sine.re() + im * sine.im());
            grad_re += values[t][b] * re;
            grad_im += values[t][b] * im;
          }
          const T phase = sine.phase_gradient(grad_re, grad_im);
          tile_amplitude += grad_re * sine.re() + grad_im * sine.im();
          tile_phase += phase;
          tile_slope += phase * static_cast<T>(t);
          if (p.positions != nullptr && parts.freqs != nullptr && n0 + t < end) {
            for (std::int64_t i = 0; i < p.ndim; ++i)
              parts.freqs[part * p.ndim + i] += core::kTwoPi * phase * position_of(p, n0 + t, i);
          }
          if (p.positions == nullptr) sine.next();
        }
        if (parts.amplitudes != nullptr) parts.amplitudes[part] += tile_amplitude;
        if (parts.offsets != nullptr) parts.offsets[part] += tile_phase;
        if (parts.freqs != nullptr && p.positions == nullptr) {
          parts.freqs[part] +=
              core::kTwoPi * (static_cast<double>(tile_slope) +
                              static_cast<double>(tile_phase) * position_of(p, n0, 0));
        }
      }
      if (p.grad_x == nullptr) continue;
      TORCH_SPE_UNROLL
      for (int t = 0; t < kTile; ++t) {
        TORCH_SPE_UNROLL
        for (int b = 0; b < kBatch; ++b) {
          if (!inside(t, b)) continue;
          write(grad_x[t][b], static_cast<Storage*>(p.grad_x) +
                                  (((b0 + b) * p.length + n0 + t) * p.num_heads + head) * features +
                                  d);
        }
      }
    }
  }
  if (parts.constant != nullptr) parts.constant[feature] = constant_sum;
}

template <class Storage>
__global__ void __launch_bounds__(kThreads)
    positions_kernel(const SineFeaturesBackwardParams p, double* parts) {  // [H, N, ndim]
  using T = core::accumulate_t<Storage>;
  TORCH_SPE_SHARED_MEMORY(memory);
  Carver carver(memory);
  double* const warp_sums = carver.take<double>(kWarps);
  const auto& strides = p.grad_out_strides;
  sum_position_gradients(
      p, p.in_features * p.num_sines, warp_sums, parts,
      [&](std::int64_t head, std::int64_t n, std::int64_t j) {
        const std::int64_t d = j / p.num_sines, k = j % p.num_sines;
        const Storage* const x = static_cast<const Storage*>(p.x) + n * p.x_strides[1] +
                                 head * p.x_strides[2] + d * p.x_strides[3];
        const Storage* const grad = static_cast<const Storage*>(p.grad_out) + n * strides[1] +
                                    head * strides[2] + (2 * k * p.in_features + d) * strides[3];
        T re = 0, im = 0;
        for (std::int64_t b = 0; b < p.batch; ++b) {
          const T value = read(x[b * p.x_strides[0]]);
          re += value * read(grad[b * strides[0]]);
          im += value * read(grad[b * strides[0] + p.in_features * strides[3]]);
        }
        return Sine<T>(p, head, d, k, n).phase_gradient(re, im);
      });
}

// Parts of the scratch memory of the backward pass.
struct Workspace {
  std::int64_t tiles, segments, sines;
  Parts parts{};
  double* positions = nullptr;
  std::size_t size = 0;

  Workspace(const SineFeaturesBackwardParams& p, void* memory)
      : tiles(p.num_heads * ceil_div(p.in_features, kLanes)),
        segments(max_of(
            1, min_of(ceil_div(p.length, 16), ceil_div(kWantedBlocks * kWarps, max_of(1, tiles))))),
        sines(p.num_heads * p.in_features * p.num_sines) {
    Carver carver(static_cast<unsigned char*>(memory));
    if (p.grad_freqs != nullptr) parts.freqs = carver.take<double>(segments * sines * p.ndim);
    if (p.grad_amplitudes != nullptr) parts.amplitudes = carver.take<double>(segments * sines);
    if (p.grad_offsets != nullptr) parts.offsets = carver.take<double>(segments * sines);
    if (p.grad_constant != nullptr)
      parts.constant = carver.take<double>(segments * p.num_heads * p.in_features);
    if (p.grad_positions != nullptr)
      positions = carver.take<double>(p.num_heads * p.length * p.ndim);
    size = carver.size();
  }
};

template <class Storage, int kBatch>
void backward(const SineFeaturesBackwardParams& p, const Workspace& workspace, Stream stream) {
  launch(backward_kernel<Storage, kBatch>,
         grid_of(workspace.tiles * ceil_div(workspace.segments, kWarps)), dim3(kThreads), 0, stream,
         p, workspace.segments, workspace.parts);
}

template <class Storage>
void backward(const SineFeaturesBackwardParams& p, void* memory, Stream stream) {
  const Workspace workspace(p, memory);
  const Parts& parts = workspace.parts;
  if (p.grad_x != nullptr || parts.freqs != nullptr || parts.amplitudes != nullptr ||
      parts.offsets != nullptr || parts.constant != nullptr) {
    if (p.batch == 1) {
      backward<Storage, 1>(p, workspace, stream);
    } else {
      backward<Storage, 4>(p, workspace, stream);
    }
  }
  const auto add = [&](const double* sums, std::int64_t size, double* out) {
    if (out != nullptr) sum_parts(sums, workspace.segments, size, out, stream);
  };
  add(parts.freqs, workspace.sines * p.ndim, p.grad_freqs);
  add(parts.amplitudes, workspace.sines, p.grad_amplitudes);
  add(parts.offsets, workspace.sines, p.grad_offsets);
  add(parts.constant, p.num_heads * p.in_features, p.grad_constant);
  if (p.grad_positions != nullptr) {
    Carver size;
    size.take<double>(kWarps);
    launch(positions_kernel<Storage>, grid_of(p.length * p.num_heads), dim3(kThreads), size.size(),
           stream, p, workspace.positions);
    sum_parts(workspace.positions, p.num_heads, p.length * p.ndim, p.grad_positions, stream);
  }
}

}  // namespace

void sine_features_forward(const SineFeaturesParams& p, Stream stream) {
  const std::int64_t blocks =
      p.num_heads * ceil_div(p.in_features, kLanes) * ceil_div(p.length, kTilePositions);
  visit_storage(p.dtype, [&](auto storage) {
    launch(forward_kernel<decltype(storage)>, grid_of(blocks), dim3(kThreads), 0, stream, p);
  });
}

std::size_t sine_features_backward_workspace(const SineFeaturesBackwardParams& p) {
  return Workspace(p, nullptr).size;
}

void sine_features_backward(const SineFeaturesBackwardParams& p, void* workspace, Stream stream) {
  visit_storage(p.dtype, [&](auto storage) { backward<decltype(storage)>(p, workspace, stream); });
}

}  // namespace torch_spe::cuda
