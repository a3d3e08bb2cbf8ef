// The kernel of the gradients of features, queries' and keys' in one, and of the steps, where each
// feature fades on its own: a block makes those of a chunk and head.
//
// Within a chunk the gradient of a row's feature is, at each level of blocks (feature_fading.h),
// its head (tail) times the sum over the other half's tokens of P times their X with tails (heads),
//   P = Y Y^T + w w^T of queries and keys,
// a product on tensor cores between sub-chunks, and sums from token to token within one.
//
// The step of token t fades every pair with one token before t and one at or after it, so its
// gradient is a sum of X times such parts of the gradients of X: from t to the end of their half
// for later tokens, from its start to t for earlier ones, and likewise for what tokens read of the
// states at the chunk's start (its end); what passes over the chunk is the product of these two
// states. Only within a sub-chunk are pairs that do not belong to t subtracted again.
#pragma once

#include "feature_values.h"

namespace torch_spe::cuda::attention {

// Where gradients of the steps go: [B, L, H, R], or sums over chunks for steps that are the same
// everywhere.
struct FeatureStepGradients {
  void* of_tokens = nullptr;  // [B, L, H, R], or null
  bool is_double = false;
  double* of_chunks = nullptr;  // [slot, H, R], or null
  bool adds = false;            // to what is there

  TORCH_SPE_INLINE bool wanted() const { return of_tokens != nullptr || of_chunks != nullptr; }
  template <class T>
  TORCH_SPE_DEVICE void write_step(std::int64_t i, T value) const {
    if (is_double) {
      add_or_set(static_cast<double*>(of_tokens) + i, static_cast<double>(value));
    } else {
      add_or_set(static_cast<float*>(of_tokens) + i, static_cast<float>(value));
    }
  }
  template <class T>
  TORCH_SPE_DEVICE void add_or_set(T* to, T value) const {
    *to = adds ? *to + value : value;
  }
};

template <class Storage>
struct FeatureGradients {
  Storage *queries = nullptr, *keys = nullptr;  // [B, L, H, R], or null
  FeatureStepGradients steps;
  // What pairs whose later token is a query give to the gradients of the steps, before sums, where
  // all tokens are seen: scratch memory.
  core::accumulate_t<Storage>* first_way = nullptr;  // [B, L, H, R]
};

template <class Operand>
struct FeatureGradientsShared {
  using T = core::accumulate_t<Operand>;
  static constexpr int kTokens = kChunk<Operand>, kSize = kTokens / kSubs;
  static constexpr int kStage = kDeep + 2;  // elements between rows of parts
  static constexpr int kTile = kTokens * row_of<Operand>(kDeep);
  static constexpr int kWideTile = kTokens * row_of<Operand>(kWide);
  static_assert(kDeep * row_of<Operand>(kWide) <= 2 * kTile);
  Operand* y;         // [queries or keys, token, e]
  Operand* weights;   // [query, key], P
  Operand* near;      // [token, r]: X with heads or tails
  Operand* far;       // [token, r]
  Operand* state;     // [r, e], in the place of these two
  T* own_weights;     // [later set, sub-chunk, later, earlier], P
  T* parts;           // [token, r], of a gradient
  T* y_weights;       // [queries or keys, token]
  T* passing;         // [r]
  T* far_sums;        // [sub-chunk, r]
  T* past_sums;       // [sub-chunk, r]
  T* future_sums;     // [sub-chunk, r]
  double* step_sums;  // [sub-chunk, r]

  TORCH_SPE_INLINE explicit FeatureGradientsShared(MemoryLayout& layout)
      : y(layout.take<Operand>(2 * kWideTile)),
        weights(layout.take<Operand>(kTokens * row_of<Operand>(kTokens))),
        near(layout.take<Operand>(2 * kTile)),
        far(near + kTile),
        state(near),
        own_weights(layout.take<T>(2 * kTokens * kSize)),
        parts(layout.take<T>(kTokens * kStage)),
        y_weights(layout.take<T>(2 * kTokens)),
        passing(layout.take<T>(kDeep)),
        far_sums(layout.take<T>(kSubs * kDeep)),
        past_sums(layout.take<T>(kSubs * kDeep)),
        future_sums(layout.take<T>(kSubs * kDeep)),
        step_sums(layout.take<double>(kSubs * kDeep)) {}
};

// Adds to the gradients of a sub-chunk's tokens what they have from each other, earlier ones for
// later rows and later ones for earlier rows, with weights [later, earlier] in shared memory.
template <int kSize, class T>
TORCH_SPE_DEVICE void add_within(const T* weights, const T (&factors)[kSize],
                                 const T (&later)[kSize], const T (&earlier)[kSize],
                                 T (&later_sums)[kSize], T (&earlier_sums)[kSize]) {
  constexpr int kAtOnce = 16 / static_cast<int>(sizeof(T));
  struct alignas(16) Some {
    T of[kAtOnce];
  };
  TORCH_SPE_UNROLL
  for (int i = 1; i < kSize; ++i) {
    Some row[kSize / kAtOnce];
    TORCH_SPE_UNROLL
    for (int j = 0; j < i; j += kAtOnce)
      row[j / kAtOnce] = *reinterpret_cast<const Some*>(weights + i * kSize + j);
    T factor = read_again(factors[i]);  // or products of all pairs would be kept in registers
    TORCH_SPE_UNROLL
    for (int j = i - 1; j >= 0; --j) {
      const T weight = row[j / kAtOnce].of[j % kAtOnce] * factor;
      later_sums[i] += weight * earlier[j];
      earlier_sums[j] += weight * later[i];
      factor *= factors[j];
    }
  }
}

template <class Storage, class Operand>
__global__ void __launch_bounds__(kThreads, kLeastBlocks)
    feature_gradients_kernel(const Tokens<Storage> queries, const Tokens<Storage> keys,
                             const Cut segments,
                             const SeenStates<core::accumulate_t<Storage>> seen_by_queries,
                             const SeenStates<core::accumulate_t<Storage>> seen_by_keys,
                             const FeatureGradients<Storage> grads,
                             const FeatureDecay<core::accumulate_t<Storage>> decay) {
  using T = core::accumulate_t<Storage>;
  using Sub = SubChunk<Operand>;
  using Shared = FeatureGradientsShared<Operand>;
  constexpr int kTokens = Sub::kTokens, kSize = Sub::kSize, kStage = Shared::kStage;
  constexpr int kRow = row_of<Operand>(kDeep), kWideRow = row_of<Operand>(kWide);
  constexpr int kWeightsRow = row_of<Operand>(kTokens);
  TORCH_SPE_SHARED_MEMORY(memory);
  MemoryLayout layout(memory);
  const Shared shared(layout);
  const int thread = static_cast<int>(threadIdx.x);
  const int features = static_cast<int>(seen_by_queries.states_before.features);
  const int values = static_cast<int>(seen_by_queries.states_before.values);
  const std::int64_t heads = decay.heads, head = blockIdx.x % heads;
  const std::int64_t own_slot = blockIdx.x / heads;
  const Part chunk(decay.chunks, own_slot);
  const bool wants_steps = grads.steps.wanted();
  if (chunk.size == 0) {
    if (grads.steps.of_chunks != nullptr && !grads.steps.adds) {
      for (int r = thread; r < features; r += kThreads)
        grads.steps.of_chunks[(own_slot * heads + head) * features + r] = 0;
    }
    return;
  }
  const Sub own_sub(chunk, head);
  const int warp = own_sub.warp, lane = own_sub.lane;
  const int ways = seen_by_queries.after ? 2 : 1;
  const bool wants_queries = grads.queries != nullptr || wants_steps;
  const bool wants_keys = grads.keys != nullptr || wants_steps;

  if (thread < kTokens) {
    const bool inside = thread < chunk.size;
    const std::int64_t n = chunk.begin + thread;
    shared.y_weights[thread] = inside ? queries.weight_of(chunk.batch, n, head) : T(0);
    shared.y_weights[kTokens + thread] = inside ? keys.weight_of(chunk.batch, n, head) : T(0);
  }
  const auto load_values = [&](int e0) {
    queries.template load_y<kTokens, kWide>(chunk, head, e0, values, shared.y);
    keys.template load_y<kTokens, kWide>(chunk, head, e0, values, shared.y + Shared::kWideTile);
  };
  {
    WarpProduct<Operand, kSize, kTokens> product;
    product.clear();
    TORCH_SPE_KEEP_LOOP
    for (int e0 = 0; e0 < values; e0 += kWide) {
      __syncthreads();  // the tiles before have been used
      load_values(e0);
      __syncthreads();
      product.template multiply<kWide, Major::kDepth, Major::kDepth>(
          shared.y + own_sub.first * kWideRow, kWideRow, shared.y + Shared::kWideTile, kWideRow);
    }
    __syncthreads();
    product.for_each_row([&](int row) {
      const T weight = shared.y_weights[row];
      const T* const weights = shared.y_weights + kTokens;
      T* const own = shared.own_weights + row * kSize;
      const int first = own_sub.first, own_row = row - first;
      return [=](int column, T& value) {
        value += weight * weights[column];
        const int there = column - first;
        if (there < 0 || there >= kSize) return;
        own[there] = value;
        own[kTokens * kSize + (there - own_row) * kSize + own_row] = value;
      };
    });
    product.store(shared.weights, [](int) { return [](int, T value) { return value; }; });
  }
  const T* const own_weights = shared.own_weights + own_sub.first * kSize;
  const T* const own_parts = shared.parts + own_sub.first * kStage + lane;
  __syncwarp();

  TORCH_SPE_KEEP_LOOP
  for (int r0 = 0; r0 < features; r0 += kDeep) {
    const int r = r0 + lane;
    // Read again, or places in memory would be kept in registers.
    const std::int64_t slot = read_again(own_slot);
    Sub sub = own_sub;
    sub.begin = read_again(sub.begin);
    T q[kSize], k[kSize], factors[kSize], q_sums[kSize], k_sums[kSize];
    sub.load_factors(decay.steps, r, features, factors);
    sub.load_x(queries, r, features, q);
    sub.load_x(keys, r, features, k);
    const T* const over = decay.over_subs_of(slot, head, r);
    const T over_inner[2] = {over[decay.width], over[2 * decay.width]};
    TORCH_SPE_UNROLL
    for (int t = 0; t < kSize; ++t) q_sums[t] = k_sums[t] = 0;
    // What belongs to the gradients of the steps of all tokens of the sub-chunk; what of the outer
    // sub-chunks of a half, and of all that come later or before, belongs to those of others.
    T earlier_sum = 0, far_sum = 0, past_sum = 0, future_sum = 0;

    // Adds factors times parts to the sums of later (earlier) tokens; returns the sum of their
    // products with x.
    const auto add_later = [&](T times, const T(&x)[kSize], T(&sums)[kSize]) {
      T sum = 0;
      sub.template take_heads<0, kSize>(factors, times, [&](int t, T factor) {
        const T part = factor * own_parts[t * kStage];
        sums[t] += part;
        sum += x[t] * part;
      });
      return sum;
    };
    const auto add_earlier = [&](T times, const T(&x)[kSize], T(&sums)[kSize]) {
      T sum = 0;
      sub.template take_tails<0, kSize>(factors, times, [&](int t, T factor) {
        const T part = factor * own_parts[t * kStage];
        sums[t] += part;
        sum += x[t] * part;
      });
      return sum;
    };
    const auto put_parts = [&](auto& product) {
      __syncwarp();  // the parts before have been used
      product.store(shared.parts, [](int) { return [](int, T value) { return value; }; }, kStage);
      __syncwarp();
    };

    // Pairs whose later token is a query and then, where all tokens are seen, those whose later
    // token is a key, with keys as q.
    TORCH_SPE_KEEP_LOOP
    for (int way = 0; true; ++way) {
      // Within the sub-chunk.
      add_within(own_weights + way * kTokens * kSize, factors, q, k, q_sums, k_sums);

      // Between sub-chunks.
      __syncthreads();  // the tiles before have been used
      const int place = sub.first * kRow + lane;
      sub.write_near(factors, q, k, shared.near + place, kRow);
      sub.write_far(factors, over_inner, q, k, shared.far + place, kRow);
      __syncthreads();
      // With the weights of this warp's rows if these are queries, else of its columns.
      const auto multiply = [&](auto depth, bool is_later, int first, const Operand* x) {
        constexpr int kDepth = decltype(depth)::value;
        WarpProduct<Operand, kSize, kDeep> product;
        product.clear();
        if (is_later == (way == 0)) {
          product.template multiply<kDepth, Major::kDepth, Major::kOuter>(
              shared.weights + sub.first * kWeightsRow + first, kWeightsRow, x + first * kRow,
              kRow);
        } else {
          product.template multiply<kDepth, Major::kOuter, Major::kOuter>(
              shared.weights + first * kWeightsRow + sub.first, kWeightsRow, x + first * kRow,
              kRow);
        }
        put_parts(product);
      };
      multiply(std::integral_constant<int, kSize>{}, warp % 2 == 1, (warp ^ 1) * kSize,
               shared.near);
      if (warp % 2 == 1) {
        add_later(T(1), q, q_sums);
      } else {
        earlier_sum += add_earlier(T(1), k, k_sums);
      }
      multiply(std::integral_constant<int, 2 * kSize>{}, warp >= 2, (warp / 2 ^ 1) * 2 * kSize,
               shared.far);
      if (warp >= 2) {
        far_sum += add_later(warp == 3 ? over_inner[1] : T(1), q, q_sums);
      } else {
        const T sum = add_earlier(warp == 0 ? over_inner[0] : T(1), k, k_sums);
        earlier_sum += sum;
        far_sum += sum;
      }

      // From the states around the chunk: that of earlier ones at its start for the later ones, and
      // the other way round at its end.
      TORCH_SPE_KEEP_LOOP
      for (int turn = 0; turn < 2; ++turn) {
        const bool is_after = turn == 1;
        const int set = way ^ turn;
        if (!(set == 0 ? wants_queries : wants_keys)) continue;
        const States<T> states = SeenStates<T>::choose(set == 1, seen_by_queries.states(is_after),
                                                       seen_by_keys.states(is_after));
        const StateReader<T> reader(states, decay.chunks, segments, slot, chunk, head,
                                    decay.to_chunk(slot, head, is_after));
        const Operand* const y = shared.y + set * Shared::kWideTile;
        const T* const weights = shared.y_weights + set * kTokens;
        WarpProduct<Operand, kSize, kDeep> product;
        product.clear();
        TORCH_SPE_KEEP_LOOP
        for (int e0 = 0; e0 < values; e0 += kWide) {
          __syncthreads();  // the tiles before have been used
          load_state<kDeep, kWide>(shared.state, [&](int row, int column, T(&four)[4]) {
            reader.s(r0 + row, e0 + column, four);
          });
          if (values > kWide) load_values(e0);
          __syncthreads();
          product.template multiply<kWide, Major::kDepth, Major::kDepth>(
              y + sub.first * kWideRow, kWideRow, shared.state, kWideRow);
        }
        put_parts(product);
        const T z = reader.z(r);
        TORCH_SPE_UNROLL
        for (int t = 0; t < kSize; ++t)
          shared.parts[(sub.first + t) * kStage + lane] += weights[sub.first + t] * z;
        if (is_after) {
          const T sum = add_earlier(decay.after_sub(over, warp), k, k_sums);
          earlier_sum += sum;
          future_sum += sum;
        } else {
          past_sum += add_later(decay.before_sub(over, warp), q, q_sums);
        }
      }
      if (ways == 1) break;
      if (way == 0 && wants_steps && r < features) {
        T* to = grads.first_way + queries.index(sub.batch, sub.begin, head) * features + r;
        TORCH_SPE_UNROLL
        for (int t = 0; t < kSize; ++t, to += heads * features) {
          if (t < sub.count) *to = q[t] * q_sums[t] - k[t] * k_sums[t];
        }
      }
      exchange(q, k);
      exchange(q_sums, k_sums);
      if (way == 1) break;
    }

    const auto write_steps = [&] {
      // What passes over the chunk, four threads for each feature.
      {
        constexpr int kPerFeature = kThreads / kDeep;
        const int own = thread / kPerFeature;
        T sum = 0;
        const auto add = [&](const States<T>& from_start, const States<T>& from_end) {
          const StateReader<T> before(from_start, decay.chunks, segments, slot, chunk, head,
                                      decay.to_chunk(slot, head, false));
          const StateReader<T> after(from_end, decay.chunks, segments, slot, chunk, head,
                                     decay.to_chunk(slot, head, true));
          TORCH_SPE_KEEP_LOOP
          for (int e = thread % kPerFeature * 4; e < values; e += kPerFeature * 4) {
            T a[4], b[4];
            before.s(r0 + own, e, a);
            after.s(r0 + own, e, b);
            TORCH_SPE_UNROLL
            for (int i = 0; i < 4; ++i) sum += a[i] * b[i];
          }
          if (thread % kPerFeature == 0) sum += before.z(r0 + own) * after.z(r0 + own);
        };
        add(seen_by_queries.states_before, seen_by_keys.states_after);
        if (ways == 2) add(seen_by_keys.states_before, seen_by_queries.states_after);
        sum = quad_sum(sum) * decay.over_chunk(slot, head).factor(r0 + own);
        if (thread % kPerFeature == 0) shared.passing[own] = sum;
      }
      const int place = warp * kDeep + lane;
      shared.far_sums[place] = far_sum;
      shared.past_sums[place] = past_sum;
      shared.future_sums[place] = future_sum;
      __syncthreads();
      T sum = shared.passing[lane] + earlier_sum;
      if (warp == 1) sum += shared.far_sums[lane];
      if (warp == 2) sum += shared.far_sums[3 * kDeep + lane];
      TORCH_SPE_UNROLL
      for (int other = 0; other < kSubs; ++other) {
        if (other > warp) sum += shared.past_sums[other * kDeep + lane];
        if (other < warp) sum += shared.future_sums[other * kDeep + lane];
      }
      double chunk_sum = 0;
      const std::int64_t first_step = (queries.index(sub.batch, sub.begin, head)) * features + r;
      const std::int64_t between_tokens = heads * features;
      TORCH_SPE_UNROLL
      for (int t = kSize - 1; t >= 0; --t) {
        if (t >= sub.count || r >= features) continue;
        T step = q[t] * q_sums[t] - k[t] * k_sums[t];
        // Of the second way keys are the later ones.
        if (ways == 2) step = 2 * grads.first_way[first_step + t * between_tokens] - step;
        sum += step;
        if (grads.steps.of_chunks != nullptr) {
          chunk_sum += static_cast<double>(sum);
        } else {
          grads.steps.write_step(first_step + t * between_tokens, sum);
        }
      }
      if (grads.steps.of_chunks == nullptr) return;
      shared.step_sums[place] = chunk_sum;
      __syncthreads();
      if (warp > 0 || r >= features) return;
      for (int other = 1; other < kSubs; ++other)
        chunk_sum += shared.step_sums[other * kDeep + lane];
      grads.steps.add_or_set(grads.steps.of_chunks + (slot * heads + head) * features + r,
                             chunk_sum);
    };
    if (wants_steps) write_steps();

    // Each token itself, which has no part in the gradients of the steps.
    TORCH_SPE_UNROLL
    for (int t = 0; t < kSize; ++t) {
      const T weight = own_weights[t * kSize + t];
      q_sums[t] += weight * k[t];
      k_sums[t] += weight * q[t];
    }
    const auto write_gradients = [&](const Tokens<Storage>& tokens, const T(&sums)[kSize],
                                     Storage* grad) {
      if (grad == nullptr || r >= features) return;
      const Storage* x = tokens.x + sub.batch * tokens.x_strides[0] +
                         sub.begin * tokens.x_strides[1] + head * tokens.x_strides[2] +
                         r * tokens.x_strides[3];
      Storage* to = grad + tokens.index(sub.batch, sub.begin, head) * features + r;
      TORCH_SPE_UNROLL
      for (int t = 0; t < kSize; ++t, x += tokens.x_strides[1], to += heads * features) {
        if (t >= sub.count) continue;
        // Padding, whatever it holds, has the gradient 0.
        const T scale = tokens.is_padding(sub.batch, sub.begin + t)
                            ? T(0)
                            : tokens.scale_of(sub.batch, sub.begin + t, head);
        write(scale == T(0) ? T(0) : gradient_of_input_at(tokens.map, sums[t], x) * scale, to);
      }
    };
    write_gradients(queries, q_sums, grads.queries);
    write_gradients(keys, k_sums, grads.keys);
  }
}

template <class Operand, class Storage, class T = core::accumulate_t<Storage>>
void make_feature_gradients(const Tokens<Storage>& queries, const Tokens<Storage>& keys,
                            const Cut& segments, const SeenStates<T>& seen_by_queries,
                            const SeenStates<T>& seen_by_keys,
                            const FeatureGradients<Storage>& grads, const FeatureDecay<T>& decay,
                            Stream stream) {
  const std::int64_t blocks = decay.chunks.slots() * decay.heads;
  if (blocks == 0) return;
  MemoryLayout size;
  FeatureGradientsShared<Operand>{size};
  launch(feature_gradients_kernel<Storage, Operand>, grid_of(blocks), dim3(kThreads), size.size(),
         stream, queries, keys, segments, seen_by_queries, seen_by_keys, grads, decay);
}

}  // namespace torch_spe::cuda::attention
