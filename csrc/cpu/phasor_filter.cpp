#include "phasor_filter.h"

#include "encode/one_position.h"
#include "encode/phasor_encoder.h"
#include "encode/phasor_gradient.h"
#include "prefetch.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {
namespace {

// Rows of x and of its gradient, [B, N, H, D], and of the encoded rows and theirs, [B, N, H, R].
template <class Storage>
TileView<const Storage> x_rows(const PhasorFilterParams& p, const HeadGroup& heads,
                               const Tile& tile) {
  return strided_tile<Storage>(p.x, p.x_strides, tile.b, tile.n, heads.first + tile.head);
}
template <class Storage>
TileView<Storage> out_rows(const PhasorFilterParams& p, const HeadGroup& heads, const Tile& tile) {
  return contiguous_tile<Storage>(p.out, p.length, p.num_heads, 2 * p.num_pairs, tile.b, tile.n,
                                  heads.first + tile.head);
}
template <class Storage>
TileView<const Storage> grad_out_rows(const PhasorFilterBackwardParams& p, const HeadGroup& heads,
                                      const Tile& tile) {
  return strided_tile<Storage>(p.grad_out, p.grad_out_strides, tile.b, tile.n,
                               heads.first + tile.head);
}
template <class Storage>
TileView<Storage> grad_x_rows(const PhasorFilterBackwardParams& p, const HeadGroup& heads,
                              const Tile& tile) {
  return contiguous_tile<Storage>(p.grad_x, p.length, p.num_heads, p.in_features, tile.b, tile.n,
                                  heads.first + tile.head);
}

// The positions [n0, n1) of a group of heads. While a tile is made, the next one's x and the memory
// of its own result are asked for.
template <class Storage, class T>
void encode_positions(const PhasorFilterParams& p, PhasorEncoder<T>& encoder,
                      const HeadGroup& heads, std::int64_t n0, std::int64_t n1) {
  for (Tiles tiles(heads.count, p.batch, num_shared_rows(p), n0, n1); !tiles.done();
       tiles.advance()) {
    const Tile tile = *tiles, next = tiles.next();
    const auto next_x = x_rows<Storage>(p, heads, next);
    const auto out = out_rows<Storage>(p, heads, tile);
    encoder.encode(heads, tile, x_rows<Storage>(p, heads, tile), out,
                   [&](std::int64_t step, std::int64_t steps) {
                     for_part(next, step, steps, [&](std::int64_t t, std::int64_t b) {
                       prefetch_near(next_x.row(b, t, 0), next_x.column_stride, p.in_features);
                     });
                     for_part(tile, step, steps, [&](std::int64_t t, std::int64_t b) {
                       prefetch_near(out.row(b, t, 0), 1, 2 * p.num_pairs);
                     });
                   });
  }
}

template <class Storage>
void phasor_filter_forward_of(const PhasorFilterParams& p) {
  if (p.length == 1 && p.ndim == 1) return encode_phasors_of_one_position<Storage>(p);
  const std::int64_t segments = (p.length + kPhasorSegment - 1) / kPhasorSegment;
  const std::int64_t heads = group_heads(p), groups = (p.num_heads + heads - 1) / heads;
#pragma omp parallel num_threads(p.num_threads)
  {
    PhasorEncoder<core::accumulate_t<Storage>> encoder(p);
#pragma omp for schedule(static)
    for (std::int64_t task = 0; task < groups * segments; ++task) {
      const std::int64_t n0 = task % segments * kPhasorSegment, head = task / segments * heads;
      encode_positions<Storage>(p, encoder, {head, min_of(heads, p.num_heads - head)}, n0,
                                min_of(n0 + kPhasorSegment, p.length));
    }
  }
}

// The positions [n0, n1) of a group of heads, of which n0 starts a segment. The heads' sums and
// gradients of positions (or null) stand at the given distances.
template <class Storage, class T>
void differentiate_positions(const PhasorFilterBackwardParams& p, PhasorGradient<T>& gradient,
                             const HeadGroup& heads, std::int64_t n0, std::int64_t n1, double* sums,
                             std::int64_t sums_stride, double* grad_positions,
                             std::int64_t positions_stride) {
  for (Tiles tiles(heads.count, p.batch, num_shared_rows(p), n0, n1); !tiles.done();
       tiles.advance()) {
    const Tile tile = *tiles, next = tiles.next();
    const auto next_x = x_rows<Storage>(p, heads, next);
    const auto next_g = grad_out_rows<Storage>(p, heads, next);
    const auto grad_x = grad_x_rows<Storage>(p, heads, tile);
    gradient.add_tile(
        heads, tile, x_rows<Storage>(p, heads, tile), grad_out_rows<Storage>(p, heads, tile),
        grad_x, sums + tile.head * sums_stride,
        grad_positions == nullptr ? nullptr : grad_positions + tile.head * positions_stride,
        [&](std::int64_t step, std::int64_t steps) {
          for_part(next, step, steps, [&](std::int64_t t, std::int64_t b) {
            prefetch_near(next_x.row(b, t, 0), next_x.column_stride, p.in_features);
            prefetch_near(next_g.row(b, t, 0), next_g.column_stride, 2 * p.num_pairs);
          });
          if (grad_x.first == nullptr) return;
          for_part(tile, step, steps, [&](std::int64_t t, std::int64_t b) {
            prefetch_near(grad_x.row(b, t, 0), 1, p.in_features);
          });
        });
  }
  for (std::int64_t head = 0; head < heads.count; ++head)
    gradient.finish_sums(heads, head, sums + head * sums_stride);
}

// Writes the gradients of a head's parameters from the sums of the parts.
void store_sums(const PhasorFilterBackwardParams& p, std::int64_t width, std::int64_t parts,
                const double* sums, std::int64_t head_size, std::int64_t head) {
  for (std::int64_t d = 0; d < p.in_features; ++d) {
    for (std::int64_t i = 0; i < p.num_pairs; ++i) {
      const auto total = [&](std::int64_t which) {
        double sum = 0;
        for (std::int64_t part = 0; part < parts; ++part) {
          sum += sums[(head * parts + part) * head_size + (i * num_phasor_sums(p) + which) * width +
                      d];
        }
        return sum;
      };
      const std::int64_t at = (head * p.in_features + d) * p.num_pairs + i;
      for (std::int64_t k = 0; k < 2; ++k) {
        if (p.grad_coefficients != nullptr) p.grad_coefficients[2 * at + k] = total(k);
        if (p.grad_constant != nullptr) p.grad_constant[2 * at + k] = total(2 + k);
      }
      for (std::int64_t a = 0; a < p.ndim && p.grad_freqs != nullptr; ++a)
        p.grad_freqs[at * p.ndim + a] = total(4 + a);
    }
  }
}

template <class Storage>
void phasor_filter_backward_of(const PhasorFilterBackwardParams& p) {
  using T = core::accumulate_t<Storage>;
  constexpr std::int64_t kEnoughTasks = 32;
  const Parts parts(p.length, max_of(1, kEnoughTasks / p.num_heads));
  const std::int64_t width = round_up(p.in_features, kLanes<T>);
  const std::int64_t head_size = p.num_pairs * num_phasor_sums(p) * width;
  const std::int64_t heads = group_heads(p), groups = (p.num_heads + heads - 1) / heads;
  const std::int64_t positions = p.grad_positions == nullptr ? 0 : p.length * p.ndim;
  Workspace<double> sums(p.num_heads * parts.count * head_size);
  Workspace<double> grad_positions(p.num_heads * positions);
  for (std::int64_t k = 0; k < p.num_heads * positions; ++k) grad_positions[k] = 0;

#pragma omp parallel num_threads(p.num_threads)
  {
    PhasorGradient<T> gradient(p);
#pragma omp for schedule(static)
    for (std::int64_t task = 0; task < groups * parts.count; ++task) {
      const std::int64_t first = task / parts.count * heads, part = task % parts.count;
      const std::int64_t count = min_of(heads, p.num_heads - first), n0 = part * parts.length;
      // Sums are [H, parts, head_size].
      double* task_sums = sums + (first * parts.count + part) * head_size;
      for (std::int64_t head = 0; head < count; ++head) {
        for (std::int64_t k = 0; k < head_size; ++k)
          task_sums[head * parts.count * head_size + k] = 0;
      }
      differentiate_positions<Storage>(
          p, gradient, {first, count}, n0, min_of(n0 + parts.length, p.length), task_sums,
          parts.count * head_size, positions == 0 ? nullptr : grad_positions + first * positions,
          positions);
    }
#pragma omp for schedule(static)
    for (std::int64_t head = 0; head < p.num_heads; ++head)
      store_sums(p, width, parts.count, sums, head_size, head);
  }
  for (std::int64_t k = 0; k < positions; ++k) {
    double sum = 0;
    for (std::int64_t head = 0; head < p.num_heads; ++head)
      sum += grad_positions[head * positions + k];
    p.grad_positions[k] = sum;
  }
}

}  // namespace

void phasor_filter_forward(const PhasorFilterParams& p) {
  visit_storage(p.dtype, [&](auto storage) { phasor_filter_forward_of<decltype(storage)>(p); });
}

void phasor_filter_backward(const PhasorFilterBackwardParams& p) {
  visit_storage(p.dtype, [&](auto storage) { phasor_filter_backward_of<decltype(storage)>(p); });
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
