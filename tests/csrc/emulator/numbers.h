// 16-bit numbers and their conversions, to nearest with ties to even.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline float float_of_bits(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline uint32_t bits_of_float(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return float_of_bits(static_cast<uint32_t>(v.bits) << 16); }
inline float to_float(fp16 v) {
  const uint32_t exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
  float size = std::ldexp(static_cast<float>(exponent ? 1024 + mantissa : mantissa), (exponent ? exponent : 1) - 25);
  if (exponent == 31) size = mantissa ? NAN : INFINITY;
  return v.bits >> 15 ? -size : size;
}

template <class T>
T from_float(float v);
template <>
inline float from_float<float>(float v) {
  return v;
}
template <>
inline bf16 from_float<bf16>(float v) {
  const uint32_t bits = bits_of_float(v);
  if (std::isnan(v)) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float v) {
  const uint16_t sign = bits_of_float(v) >> 16 & 0x8000;
  const float size = std::fabs(v);
  if (std::isnan(v)) return {0x7FFF};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00)};
  if (size == 0) return {sign};
  int exponent;
  std::frexp(size, &exponent);
  exponent = std::max(exponent - 1, -14);  // of the leading bit; below -14 numbers are subnormal
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 10 - exponent)));  // ties to even
  return {static_cast<uint16_t>(sign | (units + ((exponent + 14) << 10)))};
}

template <class T>
void round_pair(float& a, float& b) {
  a = to_float(from_float<T>(a)), b = to_float(from_float<T>(b));
}
