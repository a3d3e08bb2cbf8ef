// Goes over the state once, without tiles and matrix products.
#include "one_position.h"

#include "row_norm.h"
#include "tiles.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {
namespace {

constexpr std::int64_t kWorthThreads = 1 << 17;  // elements of states

template <class Storage>
void one_position(const LinearAttentionParams& p) {
  using T = core::accumulate_t<Storage>;
  const StateLayout<T> layout(p);
  const std::int64_t rows = p.num_sequences * p.num_heads;
  const bool own = p.has_own_denominator;
#pragma omp parallel num_threads(p.num_threads) if (rows * layout.size() >= kWorthThreads)
  {
    Decay<T> decay(p, layout.feature_width);
    const AttentionTiles<Storage> tiles(p, layout, decay);
    Workspace<T> queries(layout.feature_width), keys(layout.feature_width);
    Workspace<T> own_queries(own ? layout.denominator_width : 0);
    Workspace<T> own_keys(own ? layout.denominator_width : 0);
    Workspace<T> values(layout.value_width), out(layout.value_width);
    Workspace<T> z(layout.denominator_width);
    set_zero(z.get(), layout.denominator_width);
    const T* denominator_queries = own ? own_queries : queries;
    const T* denominator_keys = own ? own_keys : keys;
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < rows; ++row) {
      const Chunk token{row / p.num_heads, row % p.num_heads, 0, 1, 1};
      const auto from =
          layout.tensor_view(static_cast<const T*>(p.initial_s), static_cast<const T*>(p.initial_z),
                             p.initial_s == nullptr ? 0 : row);
      const auto to = layout.tensor_view(static_cast<T*>(p.final_s), static_cast<T*>(p.final_z),
                                         p.final_s == nullptr ? 0 : row);
      decay.load(token);
      const Passage<T> passage = decay.passage();
      tiles.load_queries(token, queries, layout.feature_width);
      tiles.load_keys(token, keys);
      tiles.load_values(token, values);
      if (own) {
        tiles.load_denominator_queries(token, own_queries);
        tiles.load_denominator_keys(token, own_keys);
      }
      for (std::int64_t f = 0; f < layout.denominator_features; ++f) {
        z[f] = from.z == nullptr ? denominator_keys[f]
                                 : core::join(passage, f, from.z[f], denominator_keys[f]);
        if (to.z != nullptr) to.z[f] = z[f];
      }
      set_zero(out.get(), layout.value_width);
      for (std::int64_t r = 0; r < layout.features; ++r) {
        core::step_row(passage, r, keys[r], values.get(), queries[r],
                       from.s == nullptr ? nullptr : from.s + r * from.stride, layout.values,
                       to.s == nullptr ? nullptr : to.s + r * to.stride, out.get());
      }
      const T denominator =
          dot<T>(denominator_queries, z, layout.denominator_width) + static_cast<T>(p.eps);
      store_divided(p, token, 0, out.get(),
                    row_divisor(p, out.get(), layout.value_width, denominator),
                    static_cast<Storage*>(p.out));
    }
  }
}

}  // namespace

void linear_attention_one_position(const LinearAttentionParams& p) {
  visit_storage(p.dtype, [&](auto storage) { one_position<decltype(storage)>(p); });
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
