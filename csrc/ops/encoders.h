// What the operators share that encode x [B, N, H, D] at positions n with phases freqs n: they
// differ in their tables. A description derives from PositionalEncoder<itself> and has beside
// kSchema, kDoc, kGradients, Params and BackwardParams
//   Arguments                   derived from EncoderArguments
//   check_tables(a)             sizes and types of freqs and the tables
//   check_finite_tables(a)
//   width(a)                    the last size of the output
//   fill_tables(p, a, type, kept)
//                               the parameters that only this operator has
//   set_table_gradients(p, b)
#pragma once

#include "kernels.h"
#include "params.h"
#include "register.h"

namespace torch_spe::ops {

struct EncoderArguments {
  at::Tensor x;              // [B, N, H, D]
  at::Tensor freqs;          // [H, D, K] or [H, D, K, ndim], cycles per position
  OptionalTensor positions;  // [N] or [N, ndim]
  c10::Scalar start = 0;     // symbolic where a call is traced
  std::string feature_map;
};

// freqs [H, D, count] or [H, D, count, ndim].
void check_freqs(const char* op, const EncoderArguments& a, const char* count, const char* missing,
                 const char* x_name = "x");

// A table of an encoder: its device and type, and its first sizes, those of x.
void check_table(const char* op, const char* name, const at::Tensor& table, const at::Tensor& x,
                 int64_t dim, const char* layout, const char* x_name = "x");

// x, positions, start and the feature map.
void check_encoder(const char* op, const EncoderArguments& a);

template <class Op>
struct PositionalEncoder : Operator {
  static constexpr std::array kData{"x"};

  template <class Arguments>
  static void check(const Arguments& a) {
    check_data(Op::kName, "x", a.x, 4, "[B, N, H, D]");
    Op::check_tables(a);
    check_encoder(Op::kName, a);
  }

  template <class Arguments>
  static void check_values(const Arguments& a) {
    check_finite(Op::kName, "freqs", a.freqs);
    Op::check_finite_tables(a);
    if (a.positions.has_value()) check_finite(Op::kName, "positions", *a.positions);
  }

  template <class Arguments>
  static TensorSpecs results(const Arguments& a) {
    return {{{a.x.sym_size(0), a.x.sym_size(1), a.x.sym_size(2), Op::width(a)}, a.x.options()}};
  }

  template <class Params, class Arguments>
  static void fill(Params& p, const Arguments& a, TableType table_type, KernelTensors& kept) {
    p.dtype = to_dtype(a.x.scalar_type());
    p.feature_map = to_feature_map(Op::kName, "feature_map", a.feature_map);
    p.batch = a.x.size(0);
    p.length = a.x.size(1);
    p.num_heads = a.x.size(2);
    p.in_features = a.x.size(3);
    p.num_threads = at::get_num_threads();
    p.x = a.x.const_data_ptr();
    copy_strides(a.x, p.x_strides);
    p.freqs = kept.doubles(a.freqs);
    p.positions = kept.doubles(a.positions);
    p.start = a.start.toDouble();
    p.out = nullptr;
    Op::fill_tables(
        p, a,
        table_type == TableType::kOfX ? a.x.scalar_type() : accumulate_type(a.x.scalar_type()),
        kept);
  }

  template <class Arguments>
  static void forward(const Arguments& a, const Tensors& outputs) {
    if (outputs[0].numel() == 0) return;
    if (a.x.numel() == 0) {  // sums over no features
      outputs[0].zero_();
      return;
    }
    const auto kernel = kernel_of<typename Op::Params>(a.x.device().type());
    typename Op::Params p;
    KernelTensors kept;
    fill(p, a, kernel.table_type, kept);
    p.out = outputs[0].mutable_data_ptr();
    kernel(p, a.x);
  }

  template <class Call>
  static void check_backward(const Call& b) {
    check_grad_out(Op::kName, b.grads[0], b.arguments.x, Op::width(b.arguments));
  }

  template <class Call>
  static void backward(Call& b) {
    const auto& a = b.arguments;
    if (a.x.numel() == 0) {  // sums over nothing
      for (std::size_t i = 0; i < b.kCount; ++i) b.gradient(Op::kGradients[i], a.x.scalar_type());
      return;
    }
    const at::Tensor& grad_out = b.grads[0];
    const auto kernel = kernel_of<typename Op::BackwardParams>(a.x.device().type());
    typename Op::BackwardParams p;
    KernelTensors kept;
    fill(p, a, kernel.table_type, kept);
    p.grad_out = grad_out.const_data_ptr();
    copy_strides(grad_out, p.grad_out_strides);
    p.grad_x = b.overwritten_gradient("x", a.x.scalar_type());
    p.grad_freqs = b.double_gradient("freqs");
    p.grad_positions = b.double_gradient("positions");
    Op::set_table_gradients(p, b);
    kernel(p, a.x);
  }
};

}  // namespace torch_spe::ops
