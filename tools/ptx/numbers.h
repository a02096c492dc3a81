// 16-bit and TF32 numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace ptx {

template <class To, class From>
inline To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

constexpr uint16_t kNotANumber = 0x7fff;  // NVIDIA's canonical NaN in bfloat16 and float16

struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  BFloat16(float value) {
    const uint32_t x = bits_of<uint32_t>(value);
    bits = value != value ? kNotANumber : static_cast<uint16_t>((x + 0x7fff + (x >> 16 & 1)) >> 16);
  }
  operator float() const { return bits_of<float>(static_cast<uint32_t>(bits) << 16); }
};

struct Half {
  uint16_t bits;

  Half() = default;
  Half(float value) {
    const uint32_t x = bits_of<uint32_t>(value);
    const uint16_t sign = x >> 16 & 0x8000;
    const float magnitude = std::fabs(value);
    if (value != value) {
      bits = kNotANumber;
    } else if (magnitude >= 65520) {  // values from here on round to infinity
      bits = sign | 0x7c00;
    } else if (magnitude < 0x1p-14f) {  // subnormal: adding 0.5 rounds to a multiple of 2^-24
      bits = sign | static_cast<uint16_t>(bits_of<uint32_t>(magnitude + 0.5f) - 0x3f000000);
    } else {
      const uint32_t rounded = (x & 0x7fffffff) + 0xfff + (x >> 13 & 1);
      bits = sign | static_cast<uint16_t>((rounded - (112u << 23)) >> 13);
    }
  }
  operator float() const {
    const uint32_t exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    const float magnitude = exponent == 0 ? static_cast<float>(fraction) * 0x1p-24f
                            : exponent == 31
                                ? bits_of<float>(0x7f800000 | fraction << 13)
                                : bits_of<float>((exponent + 112) << 23 | fraction << 13);
    return bits & 0x8000 ? -magnitude : magnitude;
  }
};

// A float32 operand of a TF32 product: tensor cores ignore its last 13 bits.
struct TensorFloat32 {
  uint32_t bits;
  operator float() const { return bits_of<float>(bits & ~uint32_t{0x1fff}); }
};

}  // namespace ptx
