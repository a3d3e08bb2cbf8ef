// Launches of the kernels of rotary positions.
#include "encode/rotary/kernels.h"
#include "rotary.h"

namespace torch_spe::cuda {
namespace {

// Calls function(storage, whether pairs are joined), the latter as a constant.
template <class Function>
void visit_pairs(const RotaryParams& p, const Function& function) {
  visit_storage(p.dtype, [&](auto storage) {
    if (has_joined_pairs<decltype(storage)>(p.x, p.x_strides, p.in_features))
      return function(storage, std::true_type{});
    function(storage, std::false_type{});
  });
}
template <class Function>
void visit_pairs(const RotaryBackwardParams& p, const Function& function) {
  visit_pairs(static_cast<const RotaryParams&>(p), [&](auto storage, auto joined) {
    if (has_joined_pairs<decltype(storage)>(p.grad_out, p.grad_out_strides, p.in_features))
      return function(storage, joined);
    function(storage, std::false_type{});
  });
}

// Parts of the scratch memory of the backward pass.
struct RotaryBackwardWorkspace {
  std::int64_t pairs, segments = 0;
  double* freqs = nullptr;  // [segment, H, D/2]
  std::size_t size = 0;

  RotaryBackwardWorkspace(const RotaryBackwardParams& p, void* memory)
      : pairs(p.num_heads * (p.in_features / 2)) {
    visit_pairs(p, [&](auto storage, auto joined) {
      const RotaryUnits<decltype(storage), decltype(joined)::value> units(p);
      segments = max_of(1, min_of(ceil_div(units.count, kRotaryWarps),
                                  kWalkingBlocks / max_of(1, units.pair_tiles)));
    });
    MemoryLayout layout(static_cast<unsigned char*>(memory));
    if (p.grad_freqs != nullptr) freqs = layout.take<double>(segments * pairs);
    size = layout.size();
  }
};

}  // namespace

void rotary_forward(const RotaryParams& p, Stream stream) {
  visit_pairs(p, [&](auto storage, auto joined) {
    using Storage = decltype(storage);
    constexpr bool kJoined = decltype(joined)::value;
    const RotaryUnits<Storage, kJoined> units(p);
    const std::int64_t blocks = units.pair_tiles * ceil_div(units.count, kRotaryWarps);
    if (blocks == 0) return;
    launch(rotary_forward_kernel<Storage, kJoined>, grid_of(blocks), dim3(kRotaryThreads), 0,
           stream, p);
  });
}

std::size_t rotary_backward_workspace(const RotaryBackwardParams& p) {
  return RotaryBackwardWorkspace(p, nullptr).size;
}

void rotary_backward(const RotaryBackwardParams& p, void* memory, Stream stream) {
  const RotaryBackwardWorkspace workspace(p, memory);
  visit_pairs(p, [&](auto storage, auto joined) {
    using Storage = decltype(storage);
    constexpr bool kJoined = decltype(joined)::value;
    const RotaryUnits<Storage, kJoined> units(p);
    const std::int64_t blocks = units.pair_tiles * workspace.segments;
    if (blocks > 0 && (p.grad_x != nullptr || p.grad_freqs != nullptr)) {
      MemoryLayout size;
      size.take<double>(kRotaryThreads * units.kPairs);
      launch(rotary_backward_kernel<Storage, kJoined>, grid_of(blocks), dim3(kRotaryThreads),
             size.size(), stream, p, workspace.segments, workspace.freqs);
    }
    if (p.grad_positions != nullptr && p.length > 0) {
      MemoryLayout size;
      size.take<double>(kWarps);
      launch(rotary_positions_gradient_kernel<Storage, kJoined>, grid_of(p.length), dim3(kThreads),
             size.size(), stream, p);
    }
  });
  if (p.grad_freqs != nullptr)
    sum_parts(workspace.freqs, workspace.segments, workspace.pairs, p.grad_freqs, stream);
}

}  // namespace torch_spe::cuda
