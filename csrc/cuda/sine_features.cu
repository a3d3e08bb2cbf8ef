// Launches of the sine features' kernels: those of encode/sine_features/pairs_*.h for 16-bit
// values in contiguous rows at consecutive positions, else the general ones.
#include "encode/sine_features/backward.h"
#include "encode/sine_features/forward.h"
#include "encode/sine_features/pairs_backward.h"
#include "encode/sine_features/pairs_forward.h"
#include "sine_features.h"

namespace torch_spe::cuda {
namespace {

bool backward_runs_on_pairs(const SineFeaturesBackwardParams& p) {
  MemoryLayout size;
  SinePairsBackwardShared{size, p};
  bool result = false;
  visit_storage(p.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    result = runs_on_pairs<Storage>(p) &&
             has_feature_pairs<Storage>(p.grad_out, p.grad_out_strides, sine_features_outputs(p));
  });
  return result && static_cast<std::int64_t>(size.size()) <= kMostShared;
}

// Calls function(batch rows of a tile, as a constant).
template <class Function>
void visit_pair_batch(std::int64_t batch, const Function& function) {
  if (batch == 1) return function(std::integral_constant<int, 1>{});
  if (batch <= 4) return function(std::integral_constant<int, 4>{});
  function(std::integral_constant<int, 8>{});
}

// Parts of the scratch memory of the backward pass.
struct SineFeaturesWorkspace {
  bool on_pairs;
  std::int64_t tiles, segments, sines;
  SineFeaturesParts parts{};
  double* positions = nullptr;
  std::size_t size = 0;

  SineFeaturesWorkspace(const SineFeaturesBackwardParams& p, void* memory)
      : on_pairs(backward_runs_on_pairs(p)),
        tiles(p.num_heads * ceil_div(p.in_features, on_pairs ? 2 * kLanes : kLanes)),
        segments(max_of(1, min_of(ceil_div(p.length, 16),
                                  max_of(wanted_segments(),
                                         on_pairs ? ceil_div(p.length, kLongestPairSegment) : 1)))),
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

 private:
  // With which the blocks are enough; of the kernel for pairs, with which all work at once.
  std::int64_t wanted_segments() const {
    return on_pairs ? kWalkingBlocks / 2 * kPairBackwardBlocks / max_of(1, tiles) * kWarps
                    : ceil_div(kWantedBlocks * kWarps, max_of(1, tiles));
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
void launch_pairs_backward(const SineFeaturesBackwardParams& p,
                           const SineFeaturesWorkspace& workspace, Stream stream) {
  if constexpr (sizeof(Storage) == 2) {
    MemoryLayout size;
    SinePairsBackwardShared{size, p};
    visit_pair_batch(p.batch, [&](auto batch) {
      launch(sine_features_pairs_backward_kernel<Storage, decltype(batch)::value>,
             grid_of(workspace.tiles * ceil_div(workspace.segments, kWarps)), dim3(kThreads),
             size.size(), stream, p, workspace.segments, workspace.parts);
    });
  }
}

// Launches the kernel for pairs, if that serves.
template <class Storage>
bool launch_pairs_forward(const SineFeaturesParams& p, Stream stream) {
  if constexpr (sizeof(Storage) == 2) {
    MemoryLayout size;
    SinePairTable{size, p};
    if (!runs_on_pairs<Storage>(p) || static_cast<std::int64_t>(size.size()) > kMostShared)
      return false;
    visit_pair_batch(p.batch, [&](auto batch) {
      constexpr int kBatch = decltype(batch)::value;
      const std::int64_t units =
          p.num_heads * ceil_div(p.in_features, 2 * kLanes) * ceil_div(p.length, kPairRun<kBatch>);
      launch(sine_features_pairs_forward_kernel<Storage, kBatch>, grid_of(ceil_div(units, kWarps)),
             dim3(kThreads), size.size(), stream, p);
    });
    return true;
  } else {
    return false;
  }
}

template <class Storage>
void launch_backward(const SineFeaturesBackwardParams& p, void* memory, Stream stream) {
  const SineFeaturesWorkspace workspace(p, memory);
  const SineFeaturesParts& parts = workspace.parts;
  if (p.grad_x != nullptr || parts.freqs != nullptr || parts.amplitudes != nullptr ||
      parts.offsets != nullptr || parts.constant != nullptr) {
    if (workspace.on_pairs) {
      launch_pairs_backward<Storage>(p, workspace, stream);
    } else if (p.batch == 1) {
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
    if (launch_pairs_forward<decltype(storage)>(p, stream)) return;
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
