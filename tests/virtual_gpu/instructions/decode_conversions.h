// From the opcodes of conversions and moves to what executes them.
#pragma once

#include "decode_parts.h"

namespace vgpu {
namespace {

// Integer of type From in a register of type S, to type To in a register of type D.
template <class To, class From>
struct Between {
  template <class D>
  struct Into {
    template <class S>
    static D f(S a) {
      return static_cast<D>(static_cast<To>(static_cast<From>(a)));
    }
  };
};
template <class To, class From, class S>
Handler convert_registers(int register_bits) {
  using B = Between<To, From>;
  if (register_bits == 16) return unary<typename B::template Into<u16>, u16, S>;
  if (register_bits == 32) return unary<typename B::template Into<u32>, u32, S>;
  return unary<typename B::template Into<u64>, u64, S>;
}
template <class To, class From>
Handler convert_source(int register_bits, int source_bits) {
  if (source_bits == 16) return convert_registers<To, From, u16>(register_bits);
  if (source_bits == 32) return convert_registers<To, From, u32>(register_bits);
  return convert_registers<To, From, u64>(register_bits);
}
template <class From>
Handler convert_to(const std::string& to, int register_bits, int source_bits) {
  if (to == "u8") return convert_source<u8, From>(register_bits, source_bits);
  if (to == "s8") return convert_source<s8, From>(register_bits, source_bits);
  if (to == "u16") return convert_source<u16, From>(register_bits, source_bits);
  if (to == "s16") return convert_source<s16, From>(register_bits, source_bits);
  if (to == "u32") return convert_source<u32, From>(register_bits, source_bits);
  if (to == "s32") return convert_source<s32, From>(register_bits, source_bits);
  if (to == "u64") return convert_source<u64, From>(register_bits, source_bits);
  if (to == "s64") return convert_source<s64, From>(register_bits, source_bits);
  return nullptr;
}
Handler convert_from(const std::string& to, const std::string& from, int register_bits,
                     int source_bits) {
  if (from == "u8") return convert_to<u8>(to, register_bits, source_bits);
  if (from == "s8") return convert_to<s8>(to, register_bits, source_bits);
  if (from == "u16") return convert_to<u16>(to, register_bits, source_bits);
  if (from == "s16") return convert_to<s16>(to, register_bits, source_bits);
  if (from == "u32") return convert_to<u32>(to, register_bits, source_bits);
  if (from == "s32") return convert_to<s32>(to, register_bits, source_bits);
  if (from == "u64") return convert_to<u64>(to, register_bits, source_bits);
  if (from == "s64") return convert_to<s64>(to, register_bits, source_bits);
  return nullptr;
}

void decode_cvt(const std::string& opcode, std::vector<std::string> parts,
                std::vector<Operand>& ops, Decoder& d, Inst& in) {
  const std::string from = parts.back(), to = parts[parts.size() - 2];
  const std::string mode = parts.size() > 3 ? parts[1] : "";
  in.o[0] = d.destination(ops.at(0));
  const auto source = [&](int bits) { in.o[1] = d.source(ops.at(1), bits); };
  if (to == "f16x2" || to == "bf16x2") {
    if (mode != "rn" || from != "f32" || parts.size() != 4) unknown(opcode);
    in.fn =
        to == "f16x2" ? binary<PairToHalf, u32, float, float> : binary<PairToBf, u32, float, float>;
    source(32);
    in.o[2] = d.source(ops.at(2), 32);
    return;
  }
  source(bits_of(from));
  const std::string pair = to + " " + from;
  if (pair == "f32 f16") in.fn = unary<HalfToFloat, float, u16>;
  if (pair == "f32 bf16") in.fn = unary<BfToFloat, float, u16>;
  if (pair == "f16 f32" && mode == "rn") in.fn = unary<FloatToHalf, u16, float>;
  if (pair == "bf16 f32" && mode == "rn") in.fn = unary<FloatToBf, u16, float>;
  if (pair == "tf32 f32" && mode == "rna") in.fn = unary<ToTf32, u32, float>;
  if (pair == "f64 f32") in.fn = unary<Convert<double>, double, float>;
  if (pair == "f32 f64" && mode == "rn") in.fn = unary<Convert<float>, float, double>;
  if (pair == "f64 f64" || pair == "f32 f32") {
    const bool d64 = to == "f64";
    if (mode == "rni")
      in.fn = d64 ? unary<RoundNear, double, double> : unary<RoundNear, float, float>;
    if (mode == "rzi")
      in.fn = d64 ? unary<RoundZero, double, double> : unary<RoundZero, float, float>;
    if (mode == "rmi")
      in.fn = d64 ? unary<RoundDown, double, double> : unary<RoundDown, float, float>;
    if (mode == "rpi") in.fn = d64 ? unary<RoundUp, double, double> : unary<RoundUp, float, float>;
  }
  if (mode == "rn" && to == "f32") {
    if (from == "s32") in.fn = unary<Convert<float>, float, s32>;
    if (from == "u32") in.fn = unary<Convert<float>, float, u32>;
    if (from == "s64") in.fn = unary<Convert<float>, float, s64>;
    if (from == "u64") in.fn = unary<Convert<float>, float, u64>;
    if (from == "s16") in.fn = unary<Convert<float>, float, s16>;
    if (from == "u16") in.fn = unary<Convert<float>, float, u16>;
  }
  if (mode == "rn" && to == "f64") {
    if (from == "s32") in.fn = unary<Convert<double>, double, s32>;
    if (from == "u32") in.fn = unary<Convert<double>, double, u32>;
    if (from == "s64") in.fn = unary<Convert<double>, double, s64>;
    if (from == "u64") in.fn = unary<Convert<double>, double, u64>;
  }
#define TO_INT(MODE, FUNCTION)                                        \
  if (mode == MODE) {                                                 \
    if (pair == "s32 f32") in.fn = unary<FUNCTION<s32>, s32, float>;  \
    if (pair == "u32 f32") in.fn = unary<FUNCTION<u32>, u32, float>;  \
    if (pair == "s64 f32") in.fn = unary<FUNCTION<s64>, s64, float>;  \
    if (pair == "u64 f32") in.fn = unary<FUNCTION<u64>, u64, float>;  \
    if (pair == "s32 f64") in.fn = unary<FUNCTION<s32>, s32, double>; \
    if (pair == "u32 f64") in.fn = unary<FUNCTION<u32>, u32, double>; \
    if (pair == "s64 f64") in.fn = unary<FUNCTION<s64>, s64, double>; \
    if (pair == "u64 f64") in.fn = unary<FUNCTION<u64>, u64, double>; \
  }
  TO_INT("rzi", ToInt)
  TO_INT("rni", ToIntNear)
  TO_INT("rmi", ToIntFloor)
#undef TO_INT
  if (in.fn == nullptr && parts.size() == 3 && to[0] != 'f' && from[0] != 'f') {
    // Between integers; either register may be wider than its type.
    const int register_bits = d.bits_of(ops[0]);
    const int source_bits = std::max(d.bits_of(ops[1]), from[1] == '8' ? 16 : bits_of(from));
    if (d.bits_of(ops[1]) == 0 && source_bits != bits_of(from)) unknown(opcode);
    in.fn = convert_from(to, from, register_bits, source_bits);
  }
  if (in.fn == nullptr) unknown(opcode);
}

void decode_mov(const std::string& opcode, const std::string& type, std::vector<Operand>& ops,
                Decoder& d, Inst& in) {
  if (type == "pred") {
    in.fn = pred_mov;
    in.o[0] = d.destination(ops.at(0));
    in.o[1] = d.source(
        ops.at(1).kind == Operand::kImmediate
            ? Operand{Operand::kImmediate, "", ops[1].value ? ~0ull : 0ull, 0, false, {}, ""}
            : ops[1],
        ops[1].kind == Operand::kImmediate ? 32 : 1);
    return;
  }
  const int bits = bits_of(type);
  if (ops.at(0).kind == Operand::kVector || ops.at(1).kind == Operand::kVector) {
    const bool is_split = ops[0].kind == Operand::kVector;
    const std::vector<Operand>& items = is_split ? ops[0].items : ops[1].items;
    in.vector = static_cast<u8>(items.size());
    const int part = bits / in.vector;
    in.o[0] = is_split ? d.source(ops[1], bits) : d.destination(ops[0]);
    for (std::size_t i = 0; i < items.size(); ++i) {
      if (is_split) {
        in.o[1 + i] = items[i].kind == Operand::kSink ? 0 : d.destination(items[i]);
      } else {
        in.o[1 + i] = d.source(items[i], part);
      }
    }
    if (bits == 64 && part == 32) in.fn = is_split ? split<u32, u64> : join<u32, u64>;
    if (bits == 32 && part == 16) in.fn = is_split ? split<u16, u32> : join<u16, u32>;
    if (bits == 64 && part == 16) in.fn = is_split ? split<u16, u64> : join<u16, u64>;
    if (in.fn == nullptr) unknown(opcode);
    return;
  }
  in.fn = bits == 16   ? unary<Mov, u16, u16>
          : bits == 32 ? unary<Mov, u32, u32>
                       : unary<Mov, u64, u64>;
  in.o[0] = d.destination(ops[0]);
  in.o[1] = d.source(ops[1], bits);
}

}  // namespace
}  // namespace vgpu
