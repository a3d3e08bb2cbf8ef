#include "conv_filter.h"
#include "encode/conv_codes.h"
#include "encode/conv_phase_encoder.h"
#include "encode/conv_tiles.h"

namespace torch_spe::cpu::TORCH_SPE_ISA {
namespace {

// out = sum_d x_d codes_d
template <class Storage>
class ConvFilterEncoder {
  using T = core::accumulate_t<Storage>;

 public:
  ConvFilterEncoder(const ConvFilterParams& p, const ConvPlan& plan)
      : p_(p),
        plan_(plan),
        ld_(column_distance<T>(p, plan)),
        tables_(p, plan),
        slots_(tables_, tables_.dense() ? 1 : plan.group),
        x_(tables_.dense() ? p.in_features * ld_ : (x_rows(plan, p) + kPhaseSums) * p.in_features),
        features_(tables_.dense() ? 0 : plan.group),
        y_(plan.chunk(p, 0).rows() * p.batch * kWidth<T>) {}

  void run(std::int64_t head, std::int64_t first, std::int64_t chunk) {
    const GridBox box = plan_.chunk(p_, chunk);
    const std::int64_t width = block_width<T>(p_.num_realizations, first),
                       features = p_.in_features;
    const std::int64_t rows = box.rows() * p_.batch;
    if (tables_.dense()) {
      load_columns<Storage>(p_, box, p_.x, p_.x_strides, head, 0, features, ld_, x_.get());
      map_columns(p_.feature_map, features, rows, ld_, x_.get());
    } else {
      load_tile<Storage>(p_, box, p_.x, p_.x_strides, head, 0, features, features, x_.get());
      map_columns(p_.feature_map, 1, rows * features, 0, x_.get());
    }
    for (std::int64_t i = 0; i < box.rows() * p_.batch * width; ++i) y_[i] = 0;
    for (std::int64_t d0 = 0; d0 < features; d0 += plan_.group) {
      const std::int64_t d1 = min_of(d0 + plan_.group, features);
      tables_.load(box, head, first, d0, d1 - d0);
      for_each_class(box, p_.generated.stride, [&](const PhaseClass& positions) {
        for (std::int64_t d = d0; d < d1; ++d) {
          const std::int64_t place = tables_.dense() ? 0 : d - d0;
          const ConvFeatureCodes<T> codes(tables_, slots_, place, d, positions);
          if (tables_.dense()) {
            codes.make(AddEncoded<T>{x_ + d * ld_, y_, p_.batch, width});
          } else {
            features_[place] = {codes.phase_taps(), codes.first_noise()};
          }
        }
        if (!tables_.dense()) {
          const PhaseEncoder<T> encoder{features_, d1 - d0,  x_ + d0, features,
                                        y_,        p_.batch, width,   plan_};
          encoder.add(positions);
        }
      });
    }
    store_tile<Storage>(p_, box, y_.get(), head, first, min_of(width, p_.num_realizations - first),
                        width, p_.num_realizations, p_.out);
  }

 private:
  static std::int64_t x_rows(const ConvPlan& plan, const ConvFilterParams& p) {
    return plan.chunk(p, 0).rows() * p.batch;
  }

  const ConvFilterParams& p_;
  const ConvPlan& plan_;
  const std::int64_t ld_;
  ConvTables<T> tables_;
  ConvSlots<T> slots_;
  Workspace<T> x_;  // [D, rows, B], ld_ apart; of polyphase noise [rows, B, D]
  Workspace<PhaseFeature<T>> features_;
  Workspace<T> y_;  // [rows, B, width]
};

template <class Storage>
void conv_filter_forward_of(const ConvFilterParams& p) {
  using T = core::accumulate_t<Storage>;
  // Fewer rows for large batches, and where there would be too little work for all threads. The
  // results do not depend on it.
  std::int64_t rows = max_of(kMinRows, min_of(kMaxRows, 4 * kMaxRows / p.batch));
  ConvPlan plan = make_conv_plan<T>(p, rows);
  while (rows > kMinRows && p.num_heads * plan.blocks * plan.chunks < 4 * p.num_threads) {
    rows /= 2;
    plan = make_conv_plan<T>(p, rows);
  }
#pragma omp parallel num_threads(p.num_threads)
  {
    ConvFilterEncoder<Storage> encoder(p, plan);
#pragma omp for schedule(static)
    for (std::int64_t task = 0; task < p.num_heads * plan.blocks * plan.chunks; ++task) {
      const std::int64_t block = task / plan.chunks % plan.blocks;
      encoder.run(task / plan.chunks / plan.blocks, block * kWidth<T>, task % plan.chunks);
    }
  }
}

}  // namespace

void conv_filter_forward(const ConvFilterParams& p) {
  visit_storage(p.dtype, [&](auto storage) { conv_filter_forward_of<decltype(storage)>(p); });
}

}  // namespace torch_spe::cpu::TORCH_SPE_ISA
