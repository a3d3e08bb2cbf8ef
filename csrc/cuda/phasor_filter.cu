// Launches of the phasor filter's kernels: those of encode/phasor/product*.h for 16-bit storage at
// consecutive positions, else the general ones.
#include "encode/phasor/general_codes.h"
#include "encode/phasor/general_gradients.h"
#include "encode/phasor/product_gradients.h"
#include "encode/phasor/products.h"
#include "encode/phasor/row_products.h"
#include "phasor_filter.h"

namespace torch_spe::cuda {
namespace {

template <class Storage, bool kGradient, int kBatch>
void launch_codes(const PhasorFilterBackwardParams& p, Stream stream) {
  MemoryLayout size;
  PhasorTables<core::accumulate_t<Storage>, kGradient, kBatch>{size};
  const std::int64_t blocks = ceil_div(kGradient ? p.in_features : p.num_pairs, kLanes) *
                              ceil_div(p.batch, kBatch) * ceil_div(p.length, kPhasorTilePositions) *
                              p.num_heads;
  launch(phasor_codes_kernel<Storage, kGradient, kBatch>, grid_of(blocks), dim3(kThreads),
         size.size(), stream, p);
}

template <class Storage, bool kGradient, int kTiles>
void launch_code_products(const PhasorFilterBackwardParams& p, Stream stream) {
  const PhasorProductUnits<kGradient, kTiles> units(p);
  MemoryLayout size;
  PhasorProductShared<kTiles>{size, units.inputs};
  launch(phasor_product_kernel<Storage, kGradient, kTiles>, grid_of(ceil_div(units.count, kWarps)),
         dim3(kThreads), size.size(), stream, p);
}

template <class Storage, bool kGradient, int kTiles>
void launch_row_products(const PhasorFilterBackwardParams& p, Stream stream) {
  const PhasorRowUnits<kGradient, kTiles> units(p);
  MemoryLayout size;
  PhasorRowsShared<Storage, kTiles>{size};
  if (units.count == 0) return;
  launch(p.constant == nullptr ? phasor_row_product_kernel<Storage, kGradient, false, kTiles>
                               : phasor_row_product_kernel<Storage, kGradient, true, kTiles>,
         grid_of(units.count), dim3(units.warps * kLanes), size.size(), stream, p);
}

// Whether the kernels of encode/phasor/*product*.h serve.
bool runs_on_tensor_cores(const PhasorFilterParams& p) {
  return p.positions == nullptr && p.in_features > 0 &&
         (p.dtype == core::DType::kFloat16 || p.dtype == core::DType::kBFloat16);
}

template <class Storage, bool kGradient>
void launch_codes(const PhasorFilterBackwardParams& p, Stream stream) {
  if constexpr (sizeof(Storage) == 2) {
    if (runs_on_tensor_cores(p)) {
      if (has_whole_phasor_rows<Storage, kGradient>(p)) {
        if (p.batch <= kProductBatch) return launch_row_products<Storage, kGradient, 1>(p, stream);
        return launch_row_products<Storage, kGradient, 2>(p, stream);
      }
      if (p.batch <= kProductBatch) return launch_code_products<Storage, kGradient, 1>(p, stream);
      return launch_code_products<Storage, kGradient, 2>(p, stream);
    }
  }
  if (p.batch == 1) {
    launch_codes<Storage, kGradient, 1>(p, stream);
  } else {
    launch_codes<Storage, kGradient, 4>(p, stream);
  }
}

// Parts of the scratch memory of the backward pass.
struct PhasorBackwardWorkspace {
  std::int64_t blocks, segments, codes;
  PhasorGradientParts parts{};
  double* positions = nullptr;
  std::size_t size = 0;

  PhasorBackwardWorkspace(const PhasorFilterBackwardParams& p, void* memory)
      : blocks(p.num_heads * ceil_div(p.num_pairs, kLanes) * ceil_div(p.in_features, kWarps)),
        segments(runs_on_tensor_cores(p)
                     ? PhasorGradientTiles(p).segments
                     : num_segments(blocks, ceil_div(p.length, kPhasorGradientTile))),
        codes(p.num_heads * p.in_features * p.num_pairs) {
    MemoryLayout layout(static_cast<unsigned char*>(memory));
    if (p.grad_freqs != nullptr) parts.freqs = layout.take<double>(segments * codes * p.ndim);
    if (p.grad_coefficients != nullptr)
      parts.coefficients = layout.take<double>(segments * codes * 2);
    if (p.grad_constant != nullptr) parts.constant = layout.take<double>(segments * codes * 2);
    if (p.grad_positions != nullptr)
      positions = layout.take<double>(p.num_heads * p.length * p.ndim);
    size = layout.size();
  }
};

template <class Storage>
void launch_parameters_gradient(const PhasorFilterBackwardParams& p,
                                const PhasorBackwardWorkspace& workspace, Stream stream) {
  if constexpr (sizeof(Storage) == 2) {
    if (runs_on_tensor_cores(p)) {
      const PhasorGradientTiles tiles(p);
      MemoryLayout size;
      PhasorGradientShared<Storage>{size};
      launch(workspace.parts.constant == nullptr ? phasor_product_gradient_kernel<Storage, false>
                                                 : phasor_product_gradient_kernel<Storage, true>,
             grid_of(p.num_heads * tiles.feature_tiles * tiles.realization_tiles * tiles.segments),
             dim3(kThreads), size.size(), stream, p, tiles, workspace.parts);
      return;
    }
  }
  launch(phasor_parameters_gradient_kernel<Storage>, grid_of(workspace.blocks * workspace.segments),
         dim3(kThreads), 0, stream, p, workspace.segments, workspace.parts);
}

template <class Storage>
void backward(const PhasorFilterBackwardParams& p, void* memory, Stream stream) {
  const PhasorBackwardWorkspace workspace(p, memory);
  if (p.grad_x != nullptr) launch_codes<Storage, true>(p, stream);
  if (p.grad_freqs != nullptr || p.grad_coefficients != nullptr || p.grad_constant != nullptr) {
    launch_parameters_gradient<Storage>(p, workspace, stream);
  }
  const auto add = [&](const double* parts, std::int64_t size, double* out) {
    if (out != nullptr) sum_parts(parts, workspace.segments, size, out, stream);
  };
  add(workspace.parts.freqs, workspace.codes * p.ndim, p.grad_freqs);
  add(workspace.parts.coefficients, workspace.codes * 2, p.grad_coefficients);
  add(workspace.parts.constant, workspace.codes * 2, p.grad_constant);
  if (p.grad_positions != nullptr) {
    MemoryLayout size;
    size.take<double>(kWarps);
    launch(phasor_positions_gradient_kernel<Storage>, grid_of(p.length * p.num_heads),
           dim3(kThreads), size.size(), stream, p, workspace.positions);
    sum_parts(workspace.positions, p.num_heads, p.length * p.ndim, p.grad_positions, stream);
  }
}

}  // namespace

void phasor_filter_forward(const PhasorFilterParams& params, Stream stream) {
  PhasorFilterBackwardParams p{};
  static_cast<PhasorFilterParams&>(p) = params;
  visit_storage(p.dtype, [&](auto storage) { launch_codes<decltype(storage), false>(p, stream); });
}

std::size_t phasor_filter_backward_workspace(const PhasorFilterBackwardParams& p) {
  return PhasorBackwardWorkspace(p, nullptr).size;
}

void phasor_filter_backward(const PhasorFilterBackwardParams& p, void* workspace, Stream stream) {
  visit_storage(p.dtype, [&](auto storage) { backward<decltype(storage)>(p, workspace, stream); });
}

}  // namespace torch_spe::cuda
