// The gradient of a decay with one column where attention is causal, from what the walks for the
// gradients of queries and keys have in registers.
//
// For queries t and keys m < t of a chunk, with P_tm = between_tm (y_t . y_m + w_t w_m), the state
// `before` of the keys before the chunk and `after` of the queries behind it, the gradients are
//   dq_t = from_start_t (before y_t + w_t before.z) + sum_m P_tm k_m
//   dk_m = to_end_m (after y_m + w_m after.z) + sum_t P_tm q_t
// and that of step u is what all pairs that it lies between contribute to the loss,
//   dg_u = sum_(t >= u) terms_t + sum_(m < u) later_terms_m + passing
//   terms_t       = q_t dq_t - k_t sum_i P_it q_i
//   later_terms_m = to_end_m k_m (after y_m + w_m after.z)
//   passing       = over_chunk <before, after>,
// where pairs of two tokens from u on cancel. A token paired with itself contributes nothing and is
// left out: the difference would be lost in its size where attention fades fast.
#pragma once

#include "decay_gradient.h"

namespace torch_spe::cuda::attention {

// What the two walks leave, first that of queries, then that of keys. The parts of a row are sums
// over tiles of features and halves of these, those of a chunk over tiles and warps; walks of warps
// (warp_features.h) have all features of a row in one part, and those of a chunk over warps.
template <class T>
struct StepTerms {
  static constexpr int kParts = 2, kWarps = kThreads / 32;
  static constexpr int kMostRows = 4;  // of which a thread has elements
  T* terms = nullptr;                  // [tile, kParts, B, H, L], or null where nobody wants them
  T* later_terms = nullptr;            // [tile, kParts, B, H, L]
  T* passing = nullptr;                // [tile, kWarps, slot, H], <before, after>
  // [slot, H, R, E], states of keys before chunks; of walks of warps [slot, H, tile, kWide, kWide]
  // of 16 bits, as products take them, in an order of their own.
  T* s = nullptr;
  T* z = nullptr;           // [slot, H, R], or null
  std::int64_t rows = 0;    // B H L
  std::int64_t length = 0;  // L
  std::int64_t slots = 0;   // of chunks, times H
  bool of_keys = false;     // the walk
  bool of_warps = false;    // both walks

  TORCH_SPE_INLINE bool wanted() const { return terms != nullptr; }
  TORCH_SPE_INLINE std::int64_t row_parts(int tiles) const { return of_warps ? 1 : tiles * kParts; }
  TORCH_SPE_INLINE std::int64_t chunk_parts(int tiles) const {
    return (of_warps ? 1 : tiles) * kWarps;
  }

  // Writes the terms of a row, of which four threads have parts.
  TORCH_SPE_DEVICE void write_row(std::int64_t to, bool inside, T past, T own) const {
    past = quad_sum(past);
    own = quad_sum(own);
    if (!inside || thread_read_again() % 4 != 0) return;
    if (of_keys) {
      later_terms[to] = past;
      terms[to] -= own;
    } else {
      terms[to] = past + own;
    }
  }

  // Of a product with a state and one within the chunk, without pairs of a token with itself: adds
  // the second one, and diagonal[row] times what columns(row) says of these pairs, to the first
  // one, and writes the terms of the rows, whose features features(row) gives; 0 where scales[row]
  // is 0, whatever they are. Of [B, H, L], `size` rows from `first` on.
  template <class Product, class Features, class Columns>
  TORCH_SPE_DEVICE void add_within(Product& product, Product& within, int tile, std::int64_t first,
                                   int size, const T* diagonal, const T* scales,
                                   const Features& features, const Columns& columns) const {
    T past[kMostRows] = {}, own[kMostRows] = {};
    int number = 0;
    product.for_each_row_with(within, [&](int row) {
      T *const past_sum = past + number, *const own_sum = own + number;
      ++number;
      const T weight = diagonal[row];
      const auto x = features(row);
      const auto itself = columns(row);
      return [=](int column, T& element, T added) {
        const T feature = x(column);
        *past_sum += element * feature;
        *own_sum += added * feature;
        element += added + weight * itself(column);
      };
    });
    // Read again, here and below, or what follows from it would be kept in registers.
    const int thread = thread_read_again();
    const int part = Product::kTensorCores ? thread / 32 % 2 : thread / 4 % 2;
    const std::int64_t to = (tile * kParts + part) * read_again(rows) + first;
    number = 0;
    product.for_each_row([&](int row) {
      T past_sum = past[number], own_sum = own[number];
      ++number;
      if (scales[row] == T(0)) past_sum = own_sum = 0;
      write_row(to + row, row < size, past_sum, own_sum);
      return [](int, T) {};
    });
  }

  // Takes the tile at (r0, e0) of the state in front of a chunk: the walk of queries writes it,
  // that of keys adds its product with what was written to `sum`.
  template <class Tile>
  TORCH_SPE_DEVICE void take_state(Tile& tile, std::int64_t slot, std::int64_t r0, std::int64_t e0,
                                   std::int64_t features, std::int64_t values, T* sum) const {
    features = read_again(features);
    values = read_again(values);
    T* const there = s + (slot * features + r0) * values + e0;
    const int end_of_rows = static_cast<int>(min_of(kWide, features - r0));
    const int columns = static_cast<int>(min_of(kWide, values - e0));
    const int stride = static_cast<int>(values);
    const auto take = [&](auto keys) {
      tile.for_each_row([&](int row) {
        T* const own = there + row * stride;
        const int end = row < end_of_rows ? columns : 0;
        return [=](int column, T element) {
          if constexpr (decltype(keys)::value) {
            if (column < end) *sum += element * own[column];
          } else {
            if (column < end) own[column] = element;
          }
        };
      });
    };
    if (of_keys) {
      take(std::true_type{});
    } else {
      take(std::false_type{});
    }
  }
  template <class Vector>
  TORCH_SPE_DEVICE void take_z(Vector& vector, std::int64_t slot, std::int64_t r0,
                               std::int64_t features, T* sum) const {
    vector.for_each([&](int r, T element) {
      if (r0 + r >= features) return;
      T* const there = z + slot * features + r0 + r;
      if (of_keys) {
        *sum += element * *there;
      } else {
        *there = element;
      }
    });
  }
  // Elements of T that `tiles` of the states take so.
  TORCH_SPE_INLINE static constexpr std::int64_t rounded_size(std::int64_t tiles) {
    return tiles * kWide * kWide / 2;
  }
  // The same of a warp's rows of a tile, with what the walk of queries has rounded for products.
  template <class Operand, class Tile>
  TORCH_SPE_DEVICE void take_rounded(Tile& tile, std::int64_t at, T* sum) const {
    constexpr int kFours = kWide * kWide / 2 / (4 * kThreads);
    struct alignas(16) Four {
      std::uint32_t pairs[4];
    };
    Four* const there = reinterpret_cast<Four*>(s) + at * kFours * kThreads + thread_read_again();
    int number = 0;
    Four own;
    tile.for_each_pair_with(tile, [&](int, int, T* pair, const T*) {
      std::uint32_t& rounded = own.pairs[number % 4];
      if (of_keys) {
        if (number % 4 == 0) own = there[number / 4 * kThreads];
        T low, high;
        unpack_pair<Operand>(rounded, &low, &high);
        *sum += pair[0] * low + pair[1] * high;
      } else {
        rounded = pack_pair<Operand>(pair[0], pair[1]);
        if (number % 4 == 3) there[number / 4 * kThreads] = own;
      }
      ++number;
    });
  }
  // Writes what the threads have of the product of states.
  TORCH_SPE_DEVICE void write_passing(T sum, int tile, std::int64_t slot) const {
    if (!of_keys) return;
    sum = warp_sum(sum);
    const int thread = static_cast<int>(threadIdx.x);
    if (thread % 32 == 0) passing[(tile * kWarps + thread / 32) * slots + slot] = sum;
  }
};

// Puts the gradients of a chunk's steps together, a thread each, from so many parts of a row and of
// a chunk.
template <class T>
__global__ void __launch_bounds__(64)
    step_gradients_kernel(const StepTerms<T> terms, int row_parts, int chunk_parts,
                          const Cut chunks, const ColumnDecay<T> decay, const StepGradients out) {
  TORCH_SPE_SHARED_MEMORY(memory);
  double* const sums = reinterpret_cast<double*>(memory);  // [terms, later_terms], [row] each
  const int row = static_cast<int>(threadIdx.x), count = static_cast<int>(blockDim.x);
  const std::int64_t head = blockIdx.x % decay.heads, slot = blockIdx.x / decay.heads;
  const Part chunk(chunks, slot);
  double* const chunk_sum =
      out.of_chunks == nullptr ? nullptr : out.of_chunks + slot * decay.heads + head;
  if (chunk.size == 0) {
    if (chunk_sum != nullptr && row == 0 && !out.adds) *chunk_sum = 0;
    return;
  }
  double own = 0, later = 0, sum = 0;
  if (row < chunk.size) {
    const std::int64_t i = (chunk.batch * decay.heads + head) * terms.length + chunk.begin + row;
    for (std::int64_t part = 0; part < row_parts; ++part) {
      own += static_cast<double>(terms.terms[part * terms.rows + i]);
      later += static_cast<double>(terms.later_terms[part * terms.rows + i]);
    }
  }
  for (std::int64_t part = 0; part < chunk_parts; ++part)
    sum += static_cast<double>(terms.passing[part * terms.slots + blockIdx.x]);
  sum *= static_cast<double>(decay.over_chunk(slot, head).factor(0));
  sums[row] = own;
  sums[count + row] = later;
  __syncthreads();
  for (int i = 0; i < count; ++i) sum += sums[i < row ? count + i : i];
  // Exactly 0 where the step leaves nothing: rounding would leave something of terms that cancel.
  if (row < chunk.size &&
      core::exp_nonpositive(decay.steps.at(chunk.batch, chunk.begin + row, head, 0)) == 0)
    sum = 0;
  if (out.of_tokens != nullptr && row < chunk.size) {
    double* const to = out.of_tokens + decay.index(chunk.batch, chunk.begin + row, head);
    *to = out.adds ? *to + sum : sum;
  }
  if (chunk_sum == nullptr) return;
  __syncthreads();  // the terms have been used
  sums[row] = row < chunk.size ? sum : 0;
  __syncthreads();
  if (row > 0) return;
  sum = 0;
  for (int i = 0; i < count; ++i) sum += sums[i];
  *chunk_sum = out.adds ? *chunk_sum + sum : sum;
}

template <class T>
void make_step_gradients(const StepTerms<T>& terms, std::int64_t features, const Cut& chunks,
                         const ColumnDecay<T>& decay, const StepGradients& out, Stream stream) {
  const std::int64_t blocks = chunks.slots() * decay.heads;
  const int tiles = static_cast<int>(ceil_div(features, kWide));
  if (blocks == 0) return;
  launch(step_gradients_kernel<T>, grid_of(blocks), dim3(static_cast<unsigned>(chunks.size)),
         2 * static_cast<std::size_t>(chunks.size) * sizeof(double), stream, terms,
         static_cast<int>(terms.row_parts(tiles)), static_cast<int>(terms.chunk_parts(tiles)),
         chunks, decay, out);
}

}  // namespace torch_spe::cuda::attention
