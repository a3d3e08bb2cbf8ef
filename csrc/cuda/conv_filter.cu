// Launches of the convolution filter's kernels: for 16-bit storage those of encode/conv/dense*.h,
// or encode/conv/polyphase*.h where noise is polyphase along one dimension, else the general ones.
#include <stdexcept>
#include <string>

#include "conv_filter.h"
#include "device_for.h"
#include "encode/conv/constant_gradient.h"
#include "encode/conv/dense_forward.h"
#include "encode/conv/dense_input_gradient.h"
#include "encode/conv/dense_tap_gradient.h"
#include "encode/conv/forward.h"
#include "encode/conv/input_gradient.h"
#include "encode/conv/make_noise.h"
#include "encode/conv/noise_gradient.h"
#include "encode/conv/polyphase_code_products.h"
#include "encode/conv/polyphase_products.h"
#include "encode/conv/polyphase_tap_gradient.h"
#include "encode/conv/tap_gradient.h"

namespace torch_spe::cuda {
namespace {

// Calls function(operand, std::bool_constant<dense>) with the types of the kernels to launch.
template <class Function>
void visit_conv_kernels(const ConvFilterParams& p, bool allow_tf32, const Function& function) {
  if (p.kernel_size[2] > 1 << 30)  // a tile counts its periods with 32 bits
    throw std::runtime_error(
        "conv_filter: kernel must have at most 2^30 taps along its last dimension on a GPU, got " +
        std::to_string(p.kernel_size[2]));
  if (noise_periods(p.generated) == 1) {
    visit_operands(p.dtype, allow_tf32, [&](auto storage, auto operand) {
      function(storage, operand, std::true_type{});
    });
  } else {
    visit_storage(p.dtype, [&](auto storage) {
      function(storage, core::accumulate_t<decltype(storage)>{}, std::false_type{});
    });
  }
}

// Whether the kernels of encode/conv/dense*.h take the noise.
bool has_dense_kernels(const ConvFilterParams& p) {
  return (p.dtype == core::DType::kFloat16 || p.dtype == core::DType::kBFloat16) &&
         noise_periods(p.generated) == 1;
}

// Parts of the scratch memory of the backward pass.
struct ConvBackwardWorkspace {
  PolyphaseTapGradient polyphase;
  DenseTapGradientBlocks dense;
  std::int64_t segments, taps, kernel_parts;
  double *kernel = nullptr, *constant = nullptr;
  std::size_t size = 0;

  ConvBackwardWorkspace(const ConvFilterBackwardParams& p, void* memory)
      : polyphase(p),
        dense(p),
        segments(tap_gradient_segments(p)),
        taps(p.num_heads * p.in_features * p.kernel_size[0] * p.kernel_size[1] * p.kernel_size[2]),
        kernel_parts(has_dense_kernels(p) ? dense.parts()
                     : polyphase.fits     ? polyphase.parts()
                                          : segments) {
    MemoryLayout layout(static_cast<unsigned char*>(memory));
    if (p.grad_kernel != nullptr) kernel = layout.take<double>(kernel_parts * taps);
    if (p.grad_constant != nullptr) {
      // The same whether tf32 is allowed or not: tiles of both have the same shapes.
      visit_storage(p.dtype, [&](auto storage) {
        constant = layout.take<double>(ConstantGradientBlocks<decltype(storage)>(p).num_parts());
      });
    }
    size = layout.size();
  }
};

template <class Storage, class Operand, bool kDense>
void launch_backward(const ConvFilterBackwardParams& p, void* memory, Stream stream) {
  using T = core::accumulate_t<Storage>;
  const std::int64_t features = p.num_heads * p.in_features;
  bool needs_x = p.grad_x != nullptr;
  if constexpr (!kDense && sizeof(Storage) == 2)
    needs_x = needs_x && !launch_polyphase_codes<Storage, true>(p, stream) &&
              !launch_polyphase<Storage, true>(p, stream);
  if constexpr (kDense && sizeof(Storage) == 2) {
    if (needs_x) launch_dense_input_gradient<Storage>(p, stream);
  } else if (needs_x) {
    using Shared = ConvInputGradientShared<Storage, Operand, kDense>;
    MemoryLayout size;
    Shared{size};
    launch(conv_input_gradient_kernel<Storage, Operand, kDense>,
           grid_of(LineTiles<Shared::Tile::kTokens>(p).count *
                   ceil_div(p.batch, kInputGradientBatch) * features),
           dim3(kThreads), size.size(), stream, p);
  }
  const ConvBackwardWorkspace workspace(p, memory);
  bool needs_kernel = p.grad_kernel != nullptr;
  if constexpr (!kDense && sizeof(Storage) == 2) {
    if (needs_kernel && workspace.polyphase.fits) {
      launch_polyphase_tap_gradient<Storage>(p, workspace.polyphase, workspace.kernel, stream);
      needs_kernel = false;
    }
  }
  if constexpr (kDense && sizeof(Storage) == 2) {
    if (needs_kernel)
      launch_dense_tap_gradient<Storage>(p, workspace.dense, workspace.kernel, stream);
  } else if (needs_kernel) {
    MemoryLayout size;
    ConvTapGradientShared<Storage, Operand, kDense>{size};
    launch(conv_tap_gradient_kernel<Storage, Operand, kDense>,
           grid_of(workspace.segments * features), dim3(kThreads), size.size(), stream, p,
           workspace.segments, workspace.kernel);
  }
  if (p.grad_kernel != nullptr)
    sum_parts(workspace.kernel, workspace.kernel_parts, workspace.taps,
              static_cast<T*>(p.grad_kernel), stream);
  if constexpr (kDense) {
    if (p.grad_noise == nullptr) return;
    using Tile = ConvTileShape<true>;
    const LineTiles<Tile::kTokens> tiles(p.size[0] + p.kernel_size[0] - 1,
                                         p.size[1] + p.kernel_size[1] - 1,
                                         p.size[2] + p.kernel_size[2] - 1);
    MemoryLayout size;
    ConvCodeWindows<Storage, Operand, Tile>{size, 1};
    launch(conv_noise_gradient_kernel<Storage, Operand>,
           grid_of(tiles.count * ceil_div(p.num_realizations, Tile::kRealizations) * features),
           dim3(kThreads), size.size(), stream, p);
  }
}

}  // namespace

void conv_filter_forward(const ConvFilterParams& p, bool allow_tf32, Stream stream) {
  visit_conv_kernels(p, allow_tf32, [&](auto storage, auto operand, auto dense) {
    using Storage = decltype(storage);
    using Operand = decltype(operand);
    constexpr bool kDense = decltype(dense)::value;
    if constexpr (!kDense && sizeof(Storage) == 2) {
      ConvFilterBackwardParams forward{};
      static_cast<ConvFilterParams&>(forward) = p;
      if (launch_polyphase_codes<Storage, false>(forward, stream) ||
          launch_polyphase<Storage, false>(forward, stream))
        return;
    }
    if constexpr (kDense && sizeof(Storage) == 2) {
      launch_dense_forward<Storage>(p, stream);
    } else {
      using Shared = ConvForwardShared<Storage, Operand, kDense>;
      using Tile = typename Shared::Tile;
      MemoryLayout size;
      Shared{size};
      const std::int64_t blocks = LineTiles<Tile::kTokens>(p).count *
                                  ceil_div(p.batch, kConvForwardBatch<Storage>) *
                                  ceil_div(p.num_realizations, Tile::kRealizations) * p.num_heads;
      launch(conv_forward_kernel<Storage, Operand, kDense>, grid_of(blocks), dim3(kThreads),
             size.size(), stream, p);
    }
  });
}

std::size_t conv_filter_backward_workspace(const ConvFilterBackwardParams& p) {
  return ConvBackwardWorkspace(p, nullptr).size;
}

void conv_filter_backward(const ConvFilterBackwardParams& p, void* workspace, bool allow_tf32,
                          Stream stream) {
  visit_conv_kernels(p, allow_tf32, [&](auto storage, auto operand, auto dense) {
    launch_backward<decltype(storage), decltype(operand), decltype(dense)::value>(p, workspace,
                                                                                  stream);
  });
  if (p.grad_constant == nullptr) return;
  visit_operands(p.dtype, allow_tf32, [&](auto storage, auto operand) {
    launch_constant_gradient<decltype(storage), decltype(operand)>(
        p, ConvBackwardWorkspace(p, workspace).constant, stream);
  });
}

void conv_noise(const ConvNoiseParams& p, Stream stream) {
  const std::int64_t count =
      p.num_heads * p.in_features * p.size[0] * p.size[1] * p.size[2] * p.num_realizations;
  visit_storage(p.dtype, [&](auto storage) {
    for_each_index(count, MakeConvNoise<decltype(storage)>{p}, stream);
  });
}

}  // namespace torch_spe::cuda
