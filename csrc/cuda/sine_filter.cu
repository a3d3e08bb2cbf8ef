// Launches of the sine filter's kernels: for 16-bit storage at consecutive positions those of
// encode/sine/code*.h where batch rows share codes, or of encode/sine/steps*.h; else the general
// ones. The backward pass is cut into segments of the
// tokens; each writes its part of the sums over them.
#include "encode/sine/code_gradients.h"
#include "encode/sine/codes_forward.h"
#include "encode/sine/codes_input_gradient.h"
#include "encode/sine/few_parts.h"
#include "encode/sine/general_forward.h"
#include "encode/sine/general_input_gradient.h"
#include "encode/sine/general_weight_gradient.h"
#include "encode/sine/steps_forward.h"
#include "encode/sine/steps_input_gradient.h"
#include "encode/sine/steps_weight_gradient.h"
#include "sine_filter.h"

namespace torch_spe::cuda {
namespace {

// Whether the kernels of encode/sine/steps_*.h serve, and among them that of the gradients of x and
// frequencies.
bool runs_on_steps(const SineFilterParams& p) {
  return (p.dtype == core::DType::kFloat16 || p.dtype == core::DType::kBFloat16) &&
         p.positions == nullptr && p.in_features > 0 && p.num_sines > 0 && p.num_realizations > 0;
}
bool input_gradient_runs_on_steps(const SineFilterParams& p) {
  return runs_on_steps(p) && p.in_features * p.num_sines <= kMostSummedSines;
}

template <class Operand>
std::int64_t input_gradient_segments(const SineFilterParams& p) {
  using Shape = SineInputGradientShape<Operand>;
  if (input_gradient_runs_on_steps(p))
    return num_segments(p.num_heads, TokenTiles(p.batch, p.length, kSineTileTokens).count());
  return num_segments(p.num_heads * SineFeatureGroups<Shape::kColumns>(p).count,
                      TokenTiles(p.batch, p.length, Shape::kTokens).count());
}

template <class Operand>
std::int64_t weight_gradient_blocks(const SineFilterParams& p) {
  using Shape = SineWeightGradientShape<Operand>;
  if (runs_on_steps(p))
    return p.num_heads * ceil_div(SineSteps(p).count, kBlockSteps) *
           ceil_div(p.num_realizations, kSineTileRealizations);
  return p.num_heads * SineColumnChunks<Shape::kColumns>(p).count *
         ceil_div(p.num_realizations, Shape::kRealizations);
}

template <class Operand>
std::int64_t weight_gradient_segments(const SineFilterParams& p) {
  const int tokens =
      runs_on_steps(p) ? kWeightGradientTokens : SineWeightGradientShape<Operand>::kTokens;
  return num_segments(weight_gradient_blocks<Operand>(p),
                      TokenTiles(p.batch, p.length, tokens).count());
}

// Parts of the scratch memory of the backward pass.
template <class Operand>
struct SineBackwardWorkspace {
  using T = core::accumulate_t<Operand>;
  bool codes;
  std::int64_t input_gradient_segments, weight_gradient_segments, position_parts;
  std::int64_t num_freqs, num_weights, num_constants, num_positions;
  double *freqs = nullptr, *positions = nullptr;
  T *weight = nullptr, *constant = nullptr;
  std::size_t size = 0;

  SineBackwardWorkspace(const SineFilterBackwardParams& p, void* memory)
      : codes(backward_runs_on_codes<Operand>(p)),
        input_gradient_segments(codes ? SineCodeGradientsPlace::segments(p) *
                                            SineCodesPlace::realization_tiles(p)
                                      : cuda::input_gradient_segments<Operand>(p)),
        weight_gradient_segments(codes ? SineCodeGradientsPlace::segments(p)
                                       : cuda::weight_gradient_segments<Operand>(p)),
        position_parts(
            TokenTiles(p.batch, p.length, SineInputGradientShape<Operand>::kTokens).batch_tiles *
            p.num_heads * SineFeatureGroups<SineInputGradientShape<Operand>::kColumns>(p).count),
        num_freqs(p.num_heads * p.in_features * p.num_sines * p.ndim),
        num_weights(p.num_heads * p.in_features * 2 * p.num_sines * p.num_realizations),
        num_constants(p.num_heads * p.in_features * p.num_realizations),
        num_positions(p.length * p.ndim) {
    MemoryLayout layout(static_cast<unsigned char*>(memory));
    if (p.grad_freqs != nullptr) freqs = layout.take<double>(input_gradient_segments * num_freqs);
    if (p.grad_positions != nullptr)
      positions = layout.take<double>(position_parts * num_positions);
    if (p.grad_weight != nullptr || p.grad_constant != nullptr) {
      weight = layout.take<T>(weight_gradient_segments * num_weights);
      if (p.constant != nullptr)
        constant = layout.take<T>(weight_gradient_segments * num_constants);
    }
    size = layout.size();
  }
};

template <class Storage, class Operand>
void launch_input_gradient(const SineFilterBackwardParams& p,
                           const SineBackwardWorkspace<Operand>& workspace, Stream stream) {
  MemoryLayout size;
  if constexpr (sizeof(Storage) == 2) {
    if (input_gradient_runs_on_steps(p)) {
      SineStepsInputGradientShared<Storage>{size, TokenTiles(p.batch, p.length, kSineTileTokens),
                                            SineSteps(p)};
      launch(sine_steps_input_gradient_kernel<Storage>,
             grid_of(workspace.input_gradient_segments * p.num_heads), dim3(kThreads), size.size(),
             stream, p, workspace.input_gradient_segments, workspace.freqs);
      return;
    }
  }
  SineInputGradientShared<Operand>{size};
  const std::int64_t blocks = workspace.input_gradient_segments * p.num_heads *
                              SineFeatureGroups<SineInputGradientShape<Operand>::kColumns>(p).count;
  launch(sine_input_gradient_kernel<Storage, Operand>, grid_of(blocks), dim3(kThreads), size.size(),
         stream, p, workspace.input_gradient_segments, workspace.freqs, workspace.positions);
}

template <class Storage, class Operand>
void launch_weight_gradient(const SineFilterBackwardParams& p,
                            const SineBackwardWorkspace<Operand>& workspace, Stream stream) {
  MemoryLayout size;
  const dim3 grid =
      grid_of(workspace.weight_gradient_segments * weight_gradient_blocks<Operand>(p));
  if constexpr (sizeof(Storage) == 2) {
    if (runs_on_steps(p)) {
      SineStepsWeightGradientShared<Storage>{
          size, TokenTiles(p.batch, p.length, kWeightGradientTokens), SineSteps(p)};
      launch(sine_steps_weight_gradient_kernel<Storage>, grid, dim3(kThreads), size.size(), stream,
             p, workspace.weight_gradient_segments, workspace.weight, workspace.constant);
      return;
    }
  }
  SineWeightGradientShared<Operand>{size};
  launch(sine_weight_gradient_kernel<Storage, Operand>, grid, dim3(kThreads), size.size(), stream,
         p, workspace.weight_gradient_segments, workspace.weight, workspace.constant);
}

template <class Storage, int kEights = 1>
void launch_codes_backward(const SineFilterBackwardParams& p,
                           const SineBackwardWorkspace<Storage>& workspace, Stream stream) {
  if constexpr (kEights < kMostCodeEights) {
    if (sine_code_eights(p) > kEights)
      return launch_codes_backward<Storage, kEights + 1>(p, workspace, stream);
  }
  if (p.grad_x != nullptr) {
    MemoryLayout size;
    SineCodesShared<Storage>{size, p};
    launch(sine_codes_input_gradient_kernel<Storage, kEights>, grid_of(SineCodesPlace::count(p, 1)),
           dim3(kCodeThreads), size.size(), stream, p);
  }
  if (workspace.freqs == nullptr && workspace.weight == nullptr) return;
  MemoryLayout size;
  SineCodeGradientsShared<Storage>{size};
  launch(sine_code_gradients_kernel<Storage, kEights>,
         grid_of(workspace.weight_gradient_segments * SineCodeGradientsPlace::sums(p)),
         dim3(kGradientThreads), size.size(), stream, p, workspace.weight_gradient_segments,
         workspace.freqs, workspace.weight, workspace.constant);
}

template <class Storage, class Operand>
void backward(const SineFilterBackwardParams& p, void* memory, Stream stream) {
  using T = core::accumulate_t<Storage>;
  const SineBackwardWorkspace<Operand> workspace(p, memory);
  if constexpr (sizeof(Storage) == 2) {
    if (workspace.codes) launch_codes_backward<Storage>(p, workspace, stream);
  }
  if (p.grad_x != nullptr || p.grad_freqs != nullptr || p.grad_positions != nullptr) {
    if (!workspace.codes) launch_input_gradient<Storage>(p, workspace, stream);
    if (p.grad_freqs != nullptr)
      sum_parts(workspace.freqs, workspace.input_gradient_segments, workspace.num_freqs,
                p.grad_freqs, stream);
    if (p.grad_positions != nullptr)
      sum_parts(workspace.positions, workspace.position_parts, workspace.num_positions,
                p.grad_positions, stream);
  }
  if (p.grad_weight == nullptr && p.grad_constant == nullptr) return;
  if (!workspace.codes) launch_weight_gradient<Storage>(p, workspace, stream);
  if (p.grad_weight != nullptr)
    sum_weight_parts(workspace.weight, workspace.weight_gradient_segments, workspace.num_weights,
                     static_cast<T*>(p.grad_weight), stream);
  if (p.grad_constant != nullptr)
    sum_weight_parts(workspace.constant, workspace.weight_gradient_segments,
                     workspace.num_constants, static_cast<T*>(p.grad_constant), stream);
}

template <class Storage, int kEights = 1>
void launch_codes_forward(const SineFilterParams& p, Stream stream) {
  if constexpr (kEights < kMostCodeEights) {
    if (sine_code_eights(p) > kEights) return launch_codes_forward<Storage, kEights + 1>(p, stream);
  }
  MemoryLayout size;
  SineCodesShared<Storage>{size, p};
  launch(sine_codes_forward_kernel<Storage, kEights>,
         grid_of(SineCodesPlace::count(p, SineCodesPlace::realization_tiles(p))),
         dim3(kCodeThreads), size.size(), stream, p);
}

template <class Storage, class Operand>
void forward(const SineFilterParams& p, Stream stream) {
  MemoryLayout size;
  if constexpr (sizeof(Storage) == 2) {
    if (runs_on_codes<Storage>(p)) return launch_codes_forward<Storage>(p, stream);
    if (runs_on_steps(p)) {
      const TokenTiles tiles(p.batch, p.length, kSineTileTokens);
      SineStepsForwardShared<Storage>{size, tiles};
      const std::int64_t blocks =
          tiles.count() * p.num_heads * ceil_div(p.num_realizations, kSineTileRealizations);
      launch(sine_steps_forward_kernel<Storage>, grid_of(blocks), dim3(kThreads), size.size(),
             stream, p);
      return;
    }
  }
  using Shape = SineForwardShape<Operand>;
  SineForwardShared<Operand>{size};
  const std::int64_t blocks = TokenTiles(p.batch, p.length, Shape::kTokens).count() * p.num_heads *
                              ceil_div(p.num_realizations, Shape::kRealizations);
  launch(sine_forward_kernel<Storage, Operand>, grid_of(blocks), dim3(kThreads), size.size(),
         stream, p);
}

}  // namespace

void sine_filter_forward(const SineFilterParams& p, bool allow_tf32, Stream stream) {
  visit_operands(p.dtype, allow_tf32, [&](auto storage, auto operand) {
    forward<decltype(storage), decltype(operand)>(p, stream);
  });
}

std::size_t sine_filter_backward_workspace(const SineFilterBackwardParams& p) {
  std::size_t size = 0;
  // The same whether tf32 is allowed or not: tiles of both have the same shapes.
  visit_storage(p.dtype, [&](auto storage) {
    size = SineBackwardWorkspace<decltype(storage)>(p, nullptr).size;
  });
  return size;
}

void sine_filter_backward(const SineFilterBackwardParams& p, void* workspace, bool allow_tf32,
                          Stream stream) {
  visit_operands(p.dtype, allow_tf32, [&](auto storage, auto operand) {
    backward<decltype(storage), decltype(operand)>(p, workspace, stream);
  });
}

}  // namespace torch_spe::cuda
