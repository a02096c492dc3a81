// Instructions that compute in registers, on each lane separately.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "instructions.h"
#include "numbers.h"

namespace ptx {

namespace {

using s16 = int16_t;
using u16 = uint16_t;
using s32 = int32_t;
using u32 = uint32_t;
using s64 = int64_t;
using u64 = uint64_t;

template <class Value>
std::string name_of() {
  if constexpr (std::is_same_v<Value, float>) {
    return "f32";
  } else if constexpr (std::is_same_v<Value, Half>) {
    return "f16";
  } else if constexpr (std::is_same_v<Value, BFloat16>) {
    return "bf16";
  } else {
    return (std::is_signed_v<Value> ? "s" : "u") + std::to_string(8 * sizeof(Value));
  }
}

template <class Value>
std::string bits_name() {
  return "b" + std::to_string(8 * sizeof(Value));
}

// `one` and `two` add a row NAME.TYPE for each type. The instructions have one or two sources.
template <class... Values, class Work>
void one(Table& table, const std::string& name, Work work) {
  ((table[name + name_of<Values>()] = lanewise<Values, Values>(work)), ...);
}

template <class... Values, class Work>
void two(Table& table, const std::string& name, Work work) {
  ((table[name + name_of<Values>()] = lanewise<Values, Values, Values>(work)), ...);
}

template <class... Values, class Work>
void two_of_bits(Table& table, const std::string& name, Work work) {
  ((table[name + bits_name<Values>()] = lanewise<Values, Values, Values>(work)), ...);
}

template <class Number, class Work>
void floating(Table& table, const std::string& name, Work work) {
  const std::string type = name_of<Number>();
  table[name + type] = lanewise<Number, Number, Number>(work);
  table[name + type + "x2"] = in_pairs<Number, Number, Number>(work);
}

template <class Number>
void add_floating(Table& table) {
  floating<Number>(table, "add.", [](float a, float b) { return Number(a + b); });
  floating<Number>(table, "sub.", [](float a, float b) { return Number(a - b); });
  floating<Number>(table, "mul.", [](float a, float b) { return Number(a * b); });
  const auto fused = [](float a, float b, float c) { return Number(std::fma(a, b, c)); };
  const std::string name = "fma.rn." + name_of<Number>();
  table[name] = lanewise<Number, Number, Number, Number>(fused);
  table[name + "x2"] = in_pairs<Number, Number, Number, Number>(fused);
  one<Number>(table, "neg.", [](float a) { return Number(-a); });
  one<Number>(table, "abs.", [](float a) { return Number(std::fabs(a)); });
}

// Adds the instruction that adds a 16-bit number to a float32 number.
template <class Number>
void add_mixed(Table& table) {
  table["add.rn.f32." + name_of<Number>()] =
      lanewise<float, Number, float>([](float a, float c) { return a + c; });
}

template <class Narrow, class Wide>
void wide(Table& table) {
  const std::string type = name_of<Narrow>();
  table["mul.wide." + type] =
      lanewise<Wide, Narrow, Narrow>([](Wide a, Wide b) { return static_cast<Wide>(a * b); });
  table["mad.wide." + type] = lanewise<Wide, Narrow, Narrow, Wide>(
      [](Wide a, Wide b, Wide c) { return static_cast<Wide>(a * b + c); });
  table["mul.hi." + type] = lanewise<Narrow, Narrow, Narrow>(
      [](Wide a, Wide b) { return static_cast<Narrow>(a * b >> 8 * sizeof(Narrow)); });
}

template <class Value>
void divide(Table& table) {
  Entry made = lanewise<Value, Value, Value>([](Value a, Value b) { return a / b; });
  const Handler run = made.run;
  made.run = [run](Machine& machine, Warp& warp, const Instruction& at, Mask mask) {
    const Value* divisor = warp.lanes<Value>(at.sources[1]);
    // Divides lane by lane, because inactive lanes may hold a zero divisor.
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      if (divisor[lane] == 0) machine.stop("division by zero", {warp, lane});
      run(machine, warp, at, Mask{1} << lane);
    }
  };
  table["div." + name_of<Value>()] = made;
}

template <class Bits, class Signed>
void shift(Table& table) {
  constexpr u32 kBits = 8 * sizeof(Bits);
  const auto left = [](Bits a, u32 by) { return static_cast<Bits>(by < kBits ? a << by : 0); };
  const auto right = [](Bits a, u32 by) { return static_cast<Bits>(by < kBits ? a >> by : 0); };
  const auto keep_sign = [](Signed a, u32 by) {
    return static_cast<Signed>(a >> std::min(by, kBits - 1));
  };
  table["shl." + bits_name<Bits>()] = lanewise<Bits, Bits, u32>(left);
  table["shr." + name_of<Bits>()] = lanewise<Bits, Bits, u32>(right);
  table["shr." + name_of<Signed>()] = lanewise<Signed, Signed, u32>(keep_sign);
}

// bfe: extracts `count` bits starting at `first`, and extends the sign if Value is signed.
template <class Value>
Value extract(Value a, u32 first, u32 count) {
  constexpr u32 kBits = 8 * sizeof(Value);
  first &= 255, count &= 255;
  const bool is_signed = static_cast<Value>(-1) < 0;
  const bool fill = is_signed && count != 0 && (a >> std::min(first + count - 1, kBits - 1) & 1);
  u64 result = 0;
  for (u32 i = 0; i < kBits; ++i) {
    const bool bit = i < count && first + i < kBits ? a >> (first + i) & 1 : fill;
    result |= static_cast<u64>(bit) << i;
  }
  return static_cast<Value>(result);
}

u32 permute(u32 a, u32 b, u32 choice) {
  const u64 bytes = a | static_cast<u64>(b) << 32;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 chosen = choice >> 4 * i & 15;
    u32 byte = bytes >> 8 * (chosen & 7) & 255;
    if (chosen & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}

void add_integers(Table& table) {
  two<s32, u32, s64, u64>(table, "add.", [](auto a, auto b) { return a + b; });
  two<s32, u32, s64, u64>(table, "sub.", [](auto a, auto b) { return a - b; });
  two<s32, u32, s64, u64>(table, "mul.lo.", [](u64 a, u64 b) { return a * b; });
  two<s32, u32, s64, u64>(table, "min.", [](auto a, auto b) { return std::min(a, b); });
  two<s32, u32, s64, u64>(table, "max.", [](auto a, auto b) { return std::max(a, b); });
  const auto fused = [](u64 a, u64 b, u64 c) { return a * b + c; };
  table["mad.lo.s32"] = lanewise<s32, s32, s32, s32>(fused);
  table["mad.lo.s64"] = lanewise<s64, s64, s64, s64>(fused);
  one<s32, s64>(table, "neg.", [](auto a) { return -a; });
  wide<u16, u32>(table);
  wide<s32, s64>(table);
  wide<u32, u64>(table);
  divide<s32>(table);
  divide<u32>(table);
  divide<s64>(table);
}

void add_bits(Table& table) {
  two_of_bits<u16, u32, u64>(table, "and.", [](auto a, auto b) { return a & b; });
  two_of_bits<u16, u32, u64>(table, "or.", [](auto a, auto b) { return a | b; });
  two_of_bits<u16, u32, u64>(table, "xor.", [](auto a, auto b) { return a ^ b; });
  table["not.b16"] = lanewise<u16, u16>([](u16 a) { return static_cast<u16>(~a); });
  table["not.b32"] = lanewise<u32, u32>([](u32 a) { return ~a; });
  table["not.b64"] = lanewise<u64, u64>([](u64 a) { return ~a; });
  shift<u16, s16>(table);
  shift<u32, s32>(table);
  shift<u64, s64>(table);
  table["bfe.u32"] = lanewise<u32, u32, u32, u32>(extract<u32>);
  table["bfe.s32"] = lanewise<s32, s32, u32, u32>(extract<s32>);
  table["prmt.b32"] = lanewise<u32, u32, u32, u32>(permute);
}

// Copies the bits in `mask` from `values` to a predicate, which is one Mask per warp.
void put(Mask& predicate, Mask mask, Mask values) {
  predicate = (predicate & ~mask) | (values & mask);
}

template <class Work>
Entry of_predicates(Work work, std::vector<int> sources) {
  const auto run = [work](Machine&, Warp& warp, const Instruction& at, Mask mask) {
    const Mask a = warp.predicate(at.sources[0]);
    put(warp.predicate(at.results[0]), mask, work(a, warp.predicate(at.sources.back())));
  };
  return {run, {1}, sources};
}

// Returns an instruction that compares `count` packed numbers per lane and writes a predicate for
// each number.
template <class Value, int count = 1, class Work>
Entry comparison(Work work) {
  const auto run = [work](Machine&, Warp& warp, const Instruction& at, Mask mask) {
    const Value* a = warp.lanes<Value>(at.sources[0]);
    const Value* b = warp.lanes<Value>(at.sources[1]);
    for (int i = 0; i < count; ++i) {
      Mask values = 0;
      each_lane(kWholeWarp, [&](int lane) {
        values |= static_cast<Mask>(work(a[count * lane + i], b[count * lane + i])) << lane;
      });
      put(warp.predicate(at.results[i]), mask, values);
    }
  };
  constexpr int kSize = count * sizeof(Value);
  return {run, std::vector<int>(count, 1), {kSize, kSize}};
}

template <class Value, class Compared, int count = 1>
void compare(Table& table, const std::string& type) {
  const auto add = [&](const char* name, auto work) {
    table[std::string("setp.") + name + "." + type] = comparison<Value, count>(work);
  };
  add("eq", [](Compared a, Compared b) { return a == b; });
  add("ne", [](Compared a, Compared b) { return a < b || a > b; });  // false if a or b is NaN
  add("lt", [](Compared a, Compared b) { return a < b; });
  add("le", [](Compared a, Compared b) { return a <= b; });
  add("gt", [](Compared a, Compared b) { return a > b; });
  add("ge", [](Compared a, Compared b) { return a >= b; });
  add("gtu", [](Compared a, Compared b) { return !(a <= b); });  // true if a or b is NaN
}

template <class Bits>
void select(Table& table, std::vector<std::string> types) {
  const auto run = [](Machine&, Warp& warp, const Instruction& at, Mask mask) {
    const Mask chosen = warp.predicate(at.sources[2]);
    Bits* result = warp.lanes<Bits>(at.results[0]);
    const Bits* a = warp.lanes<Bits>(at.sources[0]);
    const Bits* b = warp.lanes<Bits>(at.sources[1]);
    each_lane(mask, [&](int lane) { result[lane] = chosen >> lane & 1 ? a[lane] : b[lane]; });
  };
  for (const std::string& type : types) {
    table["selp." + type] = {run, {sizeof(Bits)}, {sizeof(Bits), sizeof(Bits), 1}};
  }
}

void add_predicates(Table& table) {
  table["and.pred"] = of_predicates([](Mask a, Mask b) { return a & b; }, {1, 1});
  table["xor.pred"] = of_predicates([](Mask a, Mask b) { return a ^ b; }, {1, 1});
  table["mov.pred"] = of_predicates([](Mask a, Mask) { return a; }, {1});
  compare<u16, u16>(table, "b16");
  compare<u32, u32>(table, "b32");
  compare<u32, u32>(table, "u32");
  compare<s32, s32>(table, "s32");
  compare<u64, u64>(table, "b64");
  compare<u64, u64>(table, "u64");
  compare<s64, s64>(table, "s64");
  compare<float, float>(table, "f32");
  compare<Half, float>(table, "f16");
  compare<BFloat16, float>(table, "bf16");
  compare<Half, float, 2>(table, "f16x2");
  compare<BFloat16, float, 2>(table, "bf16x2");
  select<u16>(table, {"b16"});
  select<u32>(table, {"b32", "f32"});
  select<u64>(table, {"b64"});
}

template <class To, class... From>
void convert_integers(Table& table) {
  ((table["cvt." + name_of<To>() + "." + name_of<From>()] =
        lanewise<To, From>([](From value) { return static_cast<To>(value); })),
   ...);
}

template <class Number>
void convert_16_bits(Table& table) {
  const std::string type = name_of<Number>();
  table["cvt.f32." + type] = lanewise<float, Number>([](float value) { return value; });
  table["cvt.rn." + type + ".f32"] = lanewise<Number, float>([](float value) { return value; });
  table["cvt.rn." + type + "x2.f32"] = lanewise<u32, float, float>([](float high, float low) {
    return static_cast<u32>(Number(high).bits) << 16 | Number(low).bits;
  });
}

template <class Bits>
void move(Table& table, std::vector<std::string> types) {
  for (const std::string& type : types) {
    table["mov." + type] = lanewise<Bits, Bits>([](Bits a) { return a; });
  }
}

// mov between a register and several smaller registers that hold its parts, lowest bits first.
void pack_or_unpack(Machine&, Warp& warp, const Instruction& at, Mask mask) {
  each_lane(mask, [&](int lane) {
    uint64_t bits = 0;
    int64_t size = 0;
    for (const Operand& part : at.sources) {
      bits |= warp.get(part, lane) << 8 * size;
      size += part.size;
    }
    for (const Operand& part : at.results) {
      warp.set(part, lane, bits);
      bits = part.size < 8 ? bits >> 8 * part.size : 0;
    }
  });
}

void add_conversions(Table& table) {
  convert_integers<u16, u32>(table);
  convert_integers<u32, u16, u64>(table);
  convert_integers<u64, u32>(table);
  convert_integers<s64, s32>(table);
  convert_16_bits<Half>(table);
  convert_16_bits<BFloat16>(table);
  move<u16>(table, {"b16", "u16"});
  move<u32>(table, {"b32", "u32", "f32"});
  move<u64>(table, {"b64", "u64"});
  table["cvta.global.u64"] = table["cvta.to.global.u64"] = table["mov.b64"];
  table["pack"] = {pack_or_unpack, {}, {}};
}

}  // namespace

void add_arithmetic(Table& table) {
  add_floating<float>(table);
  add_floating<Half>(table);
  add_floating<BFloat16>(table);
  add_mixed<Half>(table);
  add_mixed<BFloat16>(table);
  // On a GPU, quotients may be 2 ulp off.
  two<float>(table, "div.full.", [](float a, float b) { return a / b; });
  add_integers(table);
  add_bits(table);
  add_predicates(table);
  add_conversions(table);
}

}  // namespace ptx
