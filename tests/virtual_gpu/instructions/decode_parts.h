// From the parts of an opcode to what executes it: types, comparisons, accesses to memory.
#pragma once

#include "conversions.h"
#include "matrices.h"
#include "predicates.h"

namespace vgpu {
namespace {

std::vector<std::string> parts_of(const std::string& opcode) {
  std::vector<std::string> parts;
  std::size_t begin = 0;
  while (true) {
    const std::size_t dot = opcode.find('.', begin);
    parts.push_back(opcode.substr(begin, dot - begin));
    if (dot == std::string::npos) return parts;
    begin = dot + 1;
  }
}

int bits_of(const std::string& type) {
  if (type == "pred") return 1;
  if (type == "f16x2" || type == "bf16x2") return 32;
  if (type == "bf16") return 16;
  return std::stoi(type.substr(1));
}

template <class F, class T>
void set3(Decoder& d, std::vector<Operand>& ops, Inst& in, int third_bits = 0) {
  in.fn = binary<F, T, T, T>;
  const int bits = sizeof(T) * 8;
  in.o[0] = d.destination(ops.at(0));
  in.o[1] = d.source(ops.at(1), bits);
  in.o[2] = d.source(ops.at(2), third_bits == 0 ? bits : third_bits);
}

// A binary operation on each integer type, by name.
template <class F>
Handler integers(const std::string& t) {
  if (t == "s16") return binary<F, s16, s16, s16>;
  if (t == "u16" || t == "b16") return binary<F, u16, u16, u16>;
  if (t == "s32") return binary<F, s32, s32, s32>;
  if (t == "u32" || t == "b32") return binary<F, u32, u32, u32>;
  if (t == "s64") return binary<F, s64, s64, s64>;
  if (t == "u64" || t == "b64") return binary<F, u64, u64, u64>;
  return nullptr;
}
// ... where the sign does not matter.
template <class F>
Handler unsigned_integers(const std::string& t) {
  if (t[0] == 's') return integers<F>("u" + t.substr(1));
  return integers<F>(t);
}
template <class F>
Handler reals(const std::string& t) {
  if (t == "f32") return binary<F, float, float, float>;
  if (t == "f64") return binary<F, double, double, double>;
  return nullptr;
}

template <class F>
Handler compare_type(const std::string& t) {
  if (t == "s16") return setp<F, s16>;
  if (t == "u16" || t == "b16") return setp<F, u16>;
  if (t == "s32") return setp<F, s32>;
  if (t == "u32" || t == "b32") return setp<F, u32>;
  if (t == "s64") return setp<F, s64>;
  if (t == "u64" || t == "b64") return setp<F, u64>;
  if (t == "f32") return setp<F, float>;
  if (t == "f64") return setp<F, double>;
  return nullptr;
}
Handler compare(const std::string& c, const std::string& t) {
  if (c == "eq") return compare_type<Eq>(t);
  if (c == "ne") return compare_type<Ne>(t);
  if (c == "lt" || c == "lo") return compare_type<Lt>(t);
  if (c == "le" || c == "ls") return compare_type<Le>(t);
  if (c == "gt" || c == "hi") return compare_type<Gt>(t);
  if (c == "ge" || c == "hs") return compare_type<Ge>(t);
  if (c == "equ") return compare_type<Equ>(t);
  if (c == "neu") return compare_type<Neu>(t);
  if (c == "ltu") return compare_type<Ltu>(t);
  if (c == "leu") return compare_type<Leu>(t);
  if (c == "gtu") return compare_type<Gtu>(t);
  if (c == "geu") return compare_type<Geu>(t);
  if (c == "num") return compare_type<Num>(t);
  if (c == "nan") return compare_type<Nan>(t);
  return nullptr;
}

template <template <class, class> class Access>
Handler access(const std::string& type, int register_bits) {
  const int bits = type == "b8" ? 8 : bits_of(type);
  const bool is_signed = type[0] == 's';
#define PICK(M)                     \
  switch (register_bits) {          \
    case 16:                        \
      return Access<M, u16>::get(); \
    case 32:                        \
      return Access<M, u32>::get(); \
    case 64:                        \
      return Access<M, u64>::get(); \
    default:                        \
      return nullptr;               \
  }
  if (bits == 8 && is_signed) {
    PICK(s8)
  }
  if (bits == 8) {
    PICK(u8)
  }
  if (bits == 16 && is_signed) {
    PICK(s16)
  }
  if (bits == 16) {
    PICK(u16)
  }
  if (bits == 32 && is_signed) {
    PICK(s32)
  }
  if (bits == 32) {
    PICK(u32)
  }
  if (bits == 64) {
    PICK(u64)
  }
#undef PICK
  return nullptr;
}
template <class M, class D>
struct LoadGlobal {
  static Handler get() { return load_global<M, D>; }
};
template <class M, class D>
struct StoreGlobal {
  static Handler get() { return store_global<M, D>; }
};
template <class M, class D>
struct LoadShared {
  static Handler get() { return load_shared<M, D>; }
};
template <class M, class D>
struct StoreShared {
  static Handler get() { return store_shared<M, D>; }
};
template <class M, class D>
struct LoadParam {
  static Handler get() { return load_param<M, D>; }
};

[[noreturn]] void unknown(const std::string& opcode) {
  throw std::runtime_error("PTX: instruction " + opcode + " is not supported");
}

bool has(const std::vector<std::string>& parts, const char* what) {
  return std::find(parts.begin(), parts.end(), what) != parts.end();
}

void decode_access(const std::string& opcode, const std::vector<std::string>& parts, bool load,
                   std::vector<Operand>& ops, Decoder& d, Inst& in) {
  const std::string& type = parts.back();
  const Space space = has(parts, "global")   ? Space::kGlobal
                      : has(parts, "shared") ? Space::kShared
                      : has(parts, "param")  ? Space::kParam
                                             : Space::kGeneric;
  in.vector = has(parts, "v4") ? 4 : has(parts, "v2") ? 2 : 1;
  in.bytes = static_cast<u8>((type == "b8" ? 8 : bits_of(type)) / 8);
  Operand& address = ops.at(load ? 1 : 0);
  Operand& data = ops.at(load ? 0 : 1);
  in.o[0] = d.address(address, space, &in.imm);
  std::vector<Operand> items =
      data.kind == Operand::kVector ? data.items : std::vector<Operand>{data};
  if (items.size() != in.vector) unknown(opcode);
  int register_bits = 0;
  for (const Operand& item : items) register_bits = std::max(register_bits, d.bits_of(item));
  if (register_bits == 0) register_bits = std::max(16, in.bytes * 8);
  for (std::size_t i = 0; i < items.size(); ++i)
    in.o[1 + i] = load ? d.destination(items[i]) : d.source(items[i], register_bits);
  if (space == Space::kGlobal) {
    in.fn =
        load ? access<LoadGlobal>(type, register_bits) : access<StoreGlobal>(type, register_bits);
  } else if (space == Space::kShared) {
    in.fn =
        load ? access<LoadShared>(type, register_bits) : access<StoreShared>(type, register_bits);
  } else if (space == Space::kParam && load) {
    in.fn = access<LoadParam>(type, register_bits);
  }
  if (in.fn == nullptr) unknown(opcode);
}

}  // namespace
}  // namespace vgpu
