// From the text of PTX instructions to what executes them. Compiled without contraction of products
// and sums: roundings are those of PTX.
#include "instructions/decode_conversions.h"

namespace vgpu {

void set_rough(bool wanted) { rough = wanted; }

void decode(const std::string& opcode, std::vector<Operand>& ops, Decoder& d, Inst& in) {
  const std::vector<std::string> parts = parts_of(opcode);
  const std::string& op = parts[0];
  const std::string& t = parts.back();
  const auto two = [&](int bits) {  // d, a
    in.o[0] = d.destination(ops.at(0));
    in.o[1] = d.source(ops.at(1), bits);
  };
  const auto three = [&](int bits, int second) {  // d, a, b
    two(bits);
    in.o[2] = d.source(ops.at(2), second);
  };
  const auto require = [&] {
    if (in.fn == nullptr) unknown(opcode);
  };
  const bool ftz = has(parts, "ftz"), approx = has(parts, "approx");

  if (op == "ld" || op == "ldu") return decode_access(opcode, parts, true, ops, d, in);
  if (op == "st") return decode_access(opcode, parts, false, ops, d, in);
  if (op == "mov") return decode_mov(opcode, t, ops, d, in);
  if (op == "cvt") {
    if (ftz || has(parts, "sat")) unknown(opcode);
    return decode_cvt(opcode, parts, ops, d, in);
  }
  if (op == "bra") {
    in.fn = branch;
    in.target = d.branch_target(ops.at(0));
    return;
  }
  if (op == "ret" || op == "exit") {
    in.fn = leave;
    return;
  }
  if (op == "cvta") {
    if (has(parts, "global") || has(parts, "local") || has(parts, "param")) {
      in.fn = unary<Mov, u64, u64>;
    } else if (has(parts, "shared")) {
      in.fn = to_generic_shared;
      in.flags = has(parts, "to");
    } else {
      unknown(opcode);
    }
    two(64);
    return;
  }
  if (op == "bar" || op == "barrier") {
    if (has(parts, "warp")) {
      in.fn = warp_barrier;
      in.o[0] = d.source(ops.at(0), 32);
      return;
    }
    if (!has(parts, "sync")) unknown(opcode);
    in.fn = barrier;
    in.o[0] = d.source(ops.at(0), 32);
    if (ops.size() > 1) in.o[1] = d.source(ops[1], 32);
    return;
  }
  if (op == "membar" || op == "fence") {
    in.fn = nothing;
    return;
  }
  if (op == "shfl") {
    in.fn = shuffle;
    in.imm = has(parts, "bfly") ? kBfly : has(parts, "idx") ? kIdx : has(parts, "up") ? kUp : kDown;
    in.o[0] = d.destination(ops.at(0));
    in.o[4] = d.pair_destination(ops[0]);
    for (int i = 1; i < 4; ++i) in.o[i] = d.source(ops.at(static_cast<std::size_t>(i)), 32);
    in.target = d.source(ops.at(4), 32);
    return;
  }
  if (op == "vote") {
    in.fn = ballot;
    in.imm = has(parts, "ballot") ? 0 : has(parts, "any") ? 1 : has(parts, "all") ? 2 : 3;
    in.o[0] = d.destination(ops.at(0));
    in.o[1] = d.source(ops.at(1), 1);
    in.flags = ops[1].negated;
    in.o[2] = d.source(ops.at(2), 32);
    return;
  }
  if (op == "activemask") {
    in.fn = active_mask;
    in.o[0] = d.destination(ops.at(0));
    return;
  }
  if (op == "redux") {
    in.fn = reduce;
    const char* names[] = {"add", "and", "or", "xor", "min", "max"};
    for (int i = 0; i < 6; ++i) {
      if (has(parts, names[i])) in.imm = i;
    }
    in.flags = t == "s32";
    three(32, 32);
    return;
  }
  if (op == "ldmatrix") {
    if (!has(parts, "m8n8") || !has(parts, "b16")) unknown(opcode);
    in.fn = load_matrix;
    in.flags = has(parts, "trans");
    in.vector = has(parts, "x4") ? 4 : has(parts, "x2") ? 2 : 1;
    in.bytes = 16;
    in.o[0] = d.address(ops.at(1), Space::kShared, &in.imm);
    for (std::size_t i = 0; i < in.vector; ++i) in.o[1 + i] = d.destination(ops[0].items.at(i));
    return;
  }
  if (op == "stmatrix") {
    if (!has(parts, "m8n8") || !has(parts, "b16")) unknown(opcode);
    in.fn = store_matrix;
    in.flags = has(parts, "trans");
    in.vector = has(parts, "x4") ? 4 : has(parts, "x2") ? 2 : 1;
    in.bytes = 16;
    in.o[0] = d.address(ops.at(0), Space::kShared, &in.imm);
    for (std::size_t i = 0; i < in.vector; ++i) in.o[1 + i] = d.source(ops[1].items.at(i), 32);
    return;
  }
  if (op == "wgmma") {
    if (!has(parts, "mma_async")) {
      in.fn = nothing;
      return;
    }
    const u32 n = static_cast<u32>(std::stoul(parts.at(4).substr(parts[4].find('n') + 1)));
    if (opcode != "wgmma.mma_async.sync.aligned.m64n" + std::to_string(n) + "k16.f32.bf16.bf16")
      unknown(opcode);
    in.fn = warpgroup_mma;
    std::vector<u32>& extra = d.extra();
    in.target = static_cast<u32>(extra.size());
    extra.push_back(n);
    if (ops.at(0).items.size() != n / 2) unknown(opcode);
    for (const Operand& item : ops[0].items) extra.push_back(d.destination(item));
    const bool a_shared = ops.at(1).kind != Operand::kVector;
    if (a_shared) {
      extra.push_back(d.source(ops[1], 64));
    } else {
      for (const Operand& item : ops[1].items) extra.push_back(d.source(item, 32));
    }
    extra.push_back(d.source(ops.at(2), 64));
    extra.push_back(d.source(ops.at(3), 1));
    if (ops.at(4).value != 1 || ops.at(5).value != 1) unknown(opcode);
    in.flags = static_cast<u8>((a_shared ? 1 : 0) | (a_shared && ops.at(6).value ? 2 : 0) |
                               (ops.at(a_shared ? 7 : 6).value ? 4 : 0));
    return;
  }
  if (op == "mma") {
    const std::string shape = "sync.aligned.m16n8k";
    if (opcode == "mma." + shape + "16.row.col.f32.f16.f16.f32") in.fn = mma<0>;
    if (opcode == "mma." + shape + "16.row.col.f32.bf16.bf16.f32") in.fn = mma<1>;
    const bool half = opcode == "mma." + shape + "8.row.col.f32.f16.f16.f32" ||
                      opcode == "mma." + shape + "8.row.col.f32.bf16.bf16.f32";
    if (half) in.fn = has(parts, "bf16") ? mma<1, 8> : mma<0, 8>;
    if (opcode == "mma." + shape + "8.row.col.f32.tf32.tf32.f32") in.fn = mma<2>;
    require();
    std::vector<u32>& extra = d.extra();
    in.target = static_cast<u32>(extra.size());
    const std::size_t counts[] = {4, half ? 2u : 4u, half ? 1u : 2u, 4};
    for (std::size_t i = 0; i < 4; ++i) {
      if (ops.at(i).items.size() != counts[i]) unknown(opcode);
      for (const Operand& item : ops[i].items)
        extra.push_back(i == 0 ? d.destination(item) : d.source(item, 32));
    }
    return;
  }
  if (op == "cp" && has(parts, "async")) {
    if (has(parts, "wait_all")) {
      in.fn = copy_wait;
      in.imm = 0;
    } else if (has(parts, "wait_group")) {
      in.fn = copy_wait;
      in.imm = static_cast<s32>(ops.at(0).value);
      in.flags = 1;
    } else if (has(parts, "commit_group")) {
      in.fn = copy_commit;
    } else if (has(parts, "shared") && has(parts, "global")) {
      in.fn = copy_async;
      in.bytes = static_cast<u8>(ops.at(2).value);
      s32 offset = 0;
      in.o[0] = d.address(ops[0], Space::kShared, &in.imm);
      in.o[1] = d.address(ops[1], Space::kGlobal, &offset);
      in.target = static_cast<u32>(offset);
      if (ops.size() > 3) in.o[2] = d.source(ops[3], 32);
    }
    require();
    return;
  }
  if (op == "setp") {
    in.o[0] = d.destination(ops.at(0));
    in.o[3] = d.pair_destination(ops[0]);
    if (ops.size() != 3 || ftz) unknown(opcode);
    in.fn = compare(parts[1], t);
    in.o[1] = d.source(ops[1], bits_of(t));
    in.o[2] = d.source(ops[2], bits_of(t));
    require();
    return;
  }
  if (op == "selp") {
    const int bits = bits_of(t);
    in.fn = bits == 16 ? selp<u16> : bits == 32 ? selp<u32> : selp<u64>;
    three(bits, bits);
    in.o[3] = d.source(ops.at(3), 1);
    in.flags = ops[3].negated;
    return;
  }
  if ((op == "and" || op == "or" || op == "xor" || op == "not") && t == "pred") {
    in.o[0] = d.destination(ops.at(0));
    in.o[1] = d.source(ops.at(1), 1);
    in.flags = ops[1].negated ? 1 : 0;
    if (op == "not") {
      in.fn = pred_not;
      return;
    }
    in.o[2] = d.source(ops.at(2), 1);
    if (ops[2].negated) in.flags |= 2;
    in.fn = op == "and" ? pred_binary<And> : op == "or" ? pred_binary<Or> : pred_binary<Xor>;
    return;
  }
  if (op == "and" || op == "or" || op == "xor") {
    in.fn = op == "and"  ? unsigned_integers<And>(t)
            : op == "or" ? unsigned_integers<Or>(t)
                         : unsigned_integers<Xor>(t);
    three(bits_of(t), bits_of(t));
    require();
    return;
  }
  if (op == "not" || op == "neg" || op == "abs") {
    const int bits = bits_of(t);
    if (op == "not")
      in.fn = bits == 16   ? unary<Not, u16, u16>
              : bits == 32 ? unary<Not, u32, u32>
                           : unary<Not, u64, u64>;
    if (op == "neg") {
      if (t == "f32") in.fn = unary<Neg, float, float>;
      if (t == "f64") in.fn = unary<Neg, double, double>;
      if (t == "s32") in.fn = unary<Neg, u32, u32>;
      if (t == "s64") in.fn = unary<Neg, u64, u64>;
      if (t == "s16") in.fn = unary<Neg, u16, u16>;
    }
    if (op == "abs") {
      if (t == "f32") in.fn = unary<Abs, float, float>;
      if (t == "f64") in.fn = unary<Abs, double, double>;
      if (t == "s32") in.fn = unary<Abs, s32, s32>;
      if (t == "s64") in.fn = unary<Abs, s64, s64>;
    }
    if (ftz) unknown(opcode);
    two(bits);
    require();
    return;
  }
  if (op == "shl" || op == "shr") {
    const std::string type = op == "shl" ? "u" + t.substr(1) : t;
    if (op == "shl") {
      in.fn = type == "u16"   ? binary<Shl, u16, u16, u32>
              : type == "u32" ? binary<Shl, u32, u32, u32>
                              : binary<Shl, u64, u64, u32>;
    } else {
      if (t == "u16" || t == "b16") in.fn = binary<Shr, u16, u16, u32>;
      if (t == "s16") in.fn = binary<Shr, s16, s16, u32>;
      if (t == "u32" || t == "b32") in.fn = binary<Shr, u32, u32, u32>;
      if (t == "s32") in.fn = binary<Shr, s32, s32, u32>;
      if (t == "u64" || t == "b64") in.fn = binary<Shr, u64, u64, u32>;
      if (t == "s64") in.fn = binary<Shr, s64, s64, u32>;
    }
    three(bits_of(t), 32);
    require();
    return;
  }
  if (op == "shf") {
    if (!has(parts, "wrap")) unknown(opcode);
    in.fn = has(parts, "l") ? ternary<ShfL, u32, u32, u32, u32> : ternary<ShfR, u32, u32, u32, u32>;
    three(32, 32);
    in.o[3] = d.source(ops.at(3), 32);
    return;
  }
  if (op == "prmt") {
    if (parts.size() != 2) unknown(opcode);
    in.fn = ternary<Prmt, u32, u32, u32, u32>;
    three(32, 32);
    in.o[3] = d.source(ops.at(3), 32);
    return;
  }
  if (op == "lop3") {
    in.fn = lop3;
    three(32, 32);
    in.o[3] = d.source(ops.at(3), 32);
    in.imm = static_cast<s32>(ops.at(4).value);
    return;
  }
  if (op == "bfi") {
    in.fn = t == "b32" ? bfi<u32> : bfi<u64>;
    three(bits_of(t), bits_of(t));
    in.o[3] = d.source(ops.at(3), 32);
    in.o[4] = d.source(ops.at(4), 32);
    return;
  }
  if (op == "bfe") {
    in.fn = t == "u32" ? bfe<u32> : t == "s32" ? bfe<s32> : t == "u64" ? bfe<u64> : bfe<s64>;
    three(bits_of(t), 32);
    in.o[3] = d.source(ops.at(3), 32);
    return;
  }
  if (op == "popc" || op == "clz" || op == "brev") {
    if (op == "popc") in.fn = t == "b32" ? unary<Popc, u32, u32> : unary<Popc64, u32, u64>;
    if (op == "clz") in.fn = t == "b32" ? unary<Clz, u32, u32> : unary<Clz64, u32, u64>;
    if (op == "brev" && t == "b32") in.fn = unary<Brev, u32, u32>;
    two(bits_of(t));
    require();
    return;
  }
  if (op == "add" || op == "sub") {
    if (ftz || has(parts, "sat") || has(parts, "cc")) unknown(opcode);
    if (t[0] == 'f' || t == "bf16x2") {
      if (has(parts, "rz")) {
        if (opcode == "add.rz.f32") in.fn = binary<AddRz, float, float, float>;
      } else if (parts.size() == 2 || parts[1] == "rn") {
        in.fn = op == "add" ? reals<Add>(t) : reals<Sub>(t);
      }
    } else {
      in.fn = op == "add" ? unsigned_integers<Add>(t) : unsigned_integers<Sub>(t);
    }
    three(bits_of(t), bits_of(t));
    require();
    return;
  }
  if (op == "mul") {
    if (ftz || has(parts, "sat")) unknown(opcode);
    const int bits = bits_of(t);
    if (t == "f32" || t == "f64") {
      if (parts.size() == 2 || parts[1] == "rn") in.fn = reals<Mul>(t);
    } else if (t == "f16x2") {
      in.fn = binary<MulF16x2, u32, u32, u32>;
    } else if (t == "bf16x2") {
      in.fn = binary<MulBf16x2, u32, u32, u32>;
    } else if (has(parts, "lo")) {
      if (bits != 16) in.fn = unsigned_integers<Mul>(t);
      if (bits == 16) in.fn = binary<Mul, u16, u16, u16>;
    } else if (has(parts, "hi")) {
      if (bits != 16) {
        in.fn = t == "u32"   ? binary<MulHi, u32, u32, u32>
                : t == "s32" ? binary<MulHi, s32, s32, s32>
                : t == "u64" ? binary<MulHi, u64, u64, u64>
                             : binary<MulHi, s64, s64, s64>;
      }
    } else if (has(parts, "wide")) {
      if (t == "u32") in.fn = binary<MulWide<u64>, u64, u32, u32>;
      if (t == "s32") in.fn = binary<MulWide<s64>, s64, s32, s32>;
      if (t == "u16") in.fn = binary<MulWide<u32>, u32, u16, u16>;
      if (t == "s16") in.fn = binary<MulWide<s32>, s32, s16, s16>;
    }
    three(bits, bits);
    require();
    return;
  }
  if (op == "mad" || op == "fma") {
    if (ftz || has(parts, "sat") || has(parts, "cc") || has(parts, "relu")) unknown(opcode);
    const int bits = bits_of(t);
    int last = bits;
    if (t == "f32") in.fn = ternary<Fma, float, float, float, float>;
    if (t == "f64") in.fn = ternary<Fma, double, double, double, double>;
    if (t[0] == 'f' && !has(parts, "rn")) unknown(opcode);
    if (t == "f16x2") in.fn = ternary<FmaF16x2, u32, u32, u32, u32>;
    if (t == "bf16x2") in.fn = ternary<FmaBf16x2, u32, u32, u32, u32>;
    if (has(parts, "lo"))
      in.fn = bits == 32 ? ternary<MadLo, u32, u32, u32, u32> : ternary<MadLo, u64, u64, u64, u64>;
    if (has(parts, "hi")) {
      if (t == "u32") in.fn = ternary<MadHi, u32, u32, u32, u32>;
      if (t == "s32") in.fn = ternary<MadHi, s32, s32, s32, s32>;
    }
    if (has(parts, "wide")) {
      last = 2 * bits;
      if (t == "u32") in.fn = ternary<MadWide<u64>, u64, u32, u32, u64>;
      if (t == "s32") in.fn = ternary<MadWide<s64>, s64, s32, s32, s64>;
    }
    three(bits, bits);
    in.o[3] = d.source(ops.at(3), last);
    require();
    return;
  }
  if (op == "div" || op == "rem") {
    if (t == "f32" || t == "f64") {
      if (has(parts, "rn") && !ftz) in.fn = reals<DivReal>(t);
    } else {
      in.fn = op == "div" ? integers<Div>(t) : integers<Rem>(t);
    }
    three(bits_of(t), bits_of(t));
    require();
    return;
  }
  if (op == "min" || op == "max") {
    if (parts.size() != 2) unknown(opcode);
    in.fn = t[0] == 'f' ? (op == "min" ? reals<Min>(t) : reals<Max>(t))
                        : (op == "min" ? integers<Min>(t) : integers<Max>(t));
    three(bits_of(t), bits_of(t));
    require();
    return;
  }
  if (op == "copysign") {
    in.fn = reals<CopySign>(t);
    three(bits_of(t), bits_of(t));
    require();
    return;
  }
  if (op == "rcp" || op == "sqrt" || op == "rsqrt" || op == "sin" || op == "cos" || op == "lg2" ||
      op == "ex2" || op == "tanh") {
    if (approx && t == "f32") {
      if (op == "sin") in.fn = unary<SinApprox, float, float>;
      if (op == "cos") in.fn = unary<CosApprox, float, float>;
      if (op == "tanh") in.fn = unary<TanhApprox, float, float>;
      if (ftz) {
        if (op == "lg2") in.fn = unary<Lg2Approx, float, float>;
        if (op == "ex2") in.fn = unary<Ex2Approx, float, float>;
        if (op == "sqrt") in.fn = unary<SqrtApprox, float, float>;
        if (op == "rsqrt") in.fn = unary<RsqrtApprox, float, float>;
        if (op == "rcp") in.fn = unary<RcpApprox, float, float>;
      }
    }
    if (opcode == "rcp.approx.ftz.f64") in.fn = unary<RcpCoarse, double, double>;
    if (opcode == "rcp.rn.f32") in.fn = unary<RcpReal, float, float>;
    if (opcode == "rcp.rn.f64") in.fn = unary<RcpReal, double, double>;
    if (opcode == "sqrt.rn.f32") in.fn = unary<SqrtReal, float, float>;
    if (opcode == "sqrt.rn.f64") in.fn = unary<SqrtReal, double, double>;
    two(bits_of(t));
    require();
    return;
  }
  unknown(opcode);
}

}  // namespace vgpu
