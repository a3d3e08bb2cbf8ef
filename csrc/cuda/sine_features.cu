// Launches of the sine features' kernels.
#include "encode/sine_features/backward.h"
#include "encode/sine_features/forward.h"
#include "sine_features.h"

namespace torch_spe::cuda {
namespace {

// Parts of the scratch memory of the backward pass.
struct SineFeaturesWorkspace {
  std::int64_t tiles, segments, sines;
  SineFeaturesParts parts{};
  double* positions = nullptr;
  std::size_t size = 0;

  SineFeaturesWorkspace(const SineFeaturesBackwardParams& p, void* memory)
      : tiles(p.num_heads * ceil_div(p.in_features, kLanes)),
        segments(max_of(
            1, min_of(ceil_div(p.length, 16), ceil_div(kWantedBlocks * kWarps, max_of(1, tiles))))),
        sines(p.num_heads * p.in_features * p.num_sines) {
    MemoryLayout layout(static_cast<unsigned char*>(memory));
    if (p.grad_freqs != nullptr) parts.freqs = layout.take<double>(segments * sines * p.ndim);
    if (p.grad_amplitudes != nullptr) parts.amplitudes = layout.take<double>(segments * sines);
    if (p.grad_offsets != nullptr) parts.offsets = layout.take<double>(segments * sines);
    if (p.grad_constant != nullptr)
      parts.constant = layout.take<double>(segments * p.num_heads * p.in_features);
    if (p.grad_positions != nullptr)
      positions = layout.take<double>(p.num_heads * p.length * p.ndim);
    size = layout.size();
  }
};

template <class Storage, int kBatch>
void launch_backward(const SineFeaturesBackwardParams& p, const SineFeaturesWorkspace& workspace,
                     Stream stream) {
  launch(sine_features_backward_kernel<Storage, kBatch>,
         grid_of(workspace.tiles * ceil_div(workspace.segments, kWarps)), dim3(kThreads), 0, stream,
         p, workspace.segments, workspace.parts);
}

template <class Storage>
void launch_backward(const SineFeaturesBackwardParams& p, void* memory, Stream stream) {
  const SineFeaturesWorkspace workspace(p, memory);
  const SineFeaturesParts& parts = workspace.parts;
  if (p.grad_x != nullptr || parts.freqs != nullptr || parts.amplitudes != nullptr ||
      parts.offsets != nullptr || parts.constant != nullptr) {
    if (p.batch == 1) {
      launch_backward<Storage, 1>(p, workspace, stream);
    } else {
      launch_backward<Storage, 4>(p, workspace, stream);
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
    MemoryLayout size;
    size.take<double>(kWarps);
    launch(sine_features_positions_kernel<Storage>, grid_of(p.length * p.num_heads), dim3(kThreads),
           size.size(), stream, p, workspace.positions);
    sum_parts(workspace.positions, p.num_heads, p.length * p.ndim, p.grad_positions, stream);
  }
}

}  // namespace

void sine_features_forward(const SineFeaturesParams& p, Stream stream) {
  const std::int64_t blocks =
      p.num_heads * ceil_div(p.in_features, kLanes) * ceil_div(p.length, kFeatureTilePositions);
  visit_storage(p.dtype, [&](auto storage) {
    launch(sine_features_forward_kernel<decltype(storage)>, grid_of(blocks), dim3(kThreads), 0,
           stream, p);
  });
}

std::size_t sine_features_backward_workspace(const SineFeaturesBackwardParams& p) {
  return SineFeaturesWorkspace(p, nullptr).size;
}

void sine_features_backward(const SineFeaturesBackwardParams& p, void* workspace, Stream stream) {
  visit_storage(p.dtype,
                [&](auto storage) { launch_backward<decltype(storage)>(p, workspace, stream); });
}

}  // namespace torch_spe::cuda
