// Launches of the kernels of rotary positions.
#include "encode/rotary/kernels.h"
#include "rotary.h"

namespace torch_spe::cuda {
namespace {

// Parts of the scratch memory of the backward pass.
struct RotaryBackwardWorkspace {
  std::int64_t pairs, pair_tiles, segments;
  double* freqs = nullptr;  // [segment, H, D/2]
  std::size_t size = 0;

  RotaryBackwardWorkspace(const RotaryBackwardParams& p, void* memory)
      : pairs(p.num_heads * (p.in_features / 2)),
        pair_tiles(ceil_div(pairs, kLanes)),
        segments(max_of(1, min_of(ceil_div(p.length, kRotaryRun),
                                  ceil_div(kWantedBlocks * kWarps, max_of(1, pair_tiles))))) {
    MemoryLayout layout(static_cast<unsigned char*>(memory));
    if (p.grad_freqs != nullptr) freqs = layout.take<double>(segments * pairs);
    size = layout.size();
  }
};

}  // namespace

void rotary_forward(const RotaryParams& p, Stream stream) {
  const std::int64_t blocks = ceil_div(p.num_heads * (p.in_features / 2), kLanes) *
                              ceil_div(p.length, kRotaryTilePositions) *
                              ceil_div(p.batch, kRotaryBatch);
  if (blocks == 0) return;
  visit_storage(p.dtype, [&](auto storage) {
    launch(rotary_forward_kernel<decltype(storage)>, grid_of(blocks), dim3(kThreads), 0, stream, p);
  });
}

std::size_t rotary_backward_workspace(const RotaryBackwardParams& p) {
  return RotaryBackwardWorkspace(p, nullptr).size;
}

void rotary_backward(const RotaryBackwardParams& p, void* memory, Stream stream) {
  const RotaryBackwardWorkspace workspace(p, memory);
  visit_storage(p.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    const std::int64_t blocks = workspace.pair_tiles * ceil_div(workspace.segments, kWarps);
    if (blocks > 0 && (p.grad_x != nullptr || p.grad_freqs != nullptr)) {
      launch(rotary_backward_kernel<Storage>, grid_of(blocks), dim3(kThreads), 0, stream, p,
             workspace.segments, workspace.freqs);
    }
    if (p.grad_positions != nullptr && p.length > 0) {
      MemoryLayout size;
      size.take<double>(kWarps);
      launch(rotary_positions_gradient_kernel<Storage>, grid_of(p.length), dim3(kThreads),
             size.size(), stream, p);
    }
  });
  if (p.grad_freqs != nullptr)
    sum_parts(workspace.freqs, workspace.segments, workspace.pairs, p.grad_freqs, stream);
}

}  // namespace torch_spe::cuda
