// Floats of three widths, and integer keys in the order of floats.
#pragma once
#include <cmath>
#include <cstring>

#include "call.h"

namespace moe_routing {

MOE_ROUTING_FN uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

MOE_ROUTING_FN float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

constexpr float kLargest = 3.402823466e38f;
constexpr uint32_t kInfinityBits = 0x7f800000u;

MOE_ROUTING_FN bool is_nan(float value) { return (bits_of(value) & 0x7fffffffu) > kInfinityBits; }
MOE_ROUTING_FN float minus_infinity() { return float_of(0xff800000u); }

// Unsigned integers in the order of the floats: -0.0 equals +0.0, NaN comes last, and 0 is free to
// say "no expert".
MOE_ROUTING_FN uint32_t ordered(float value) {
  const uint32_t bits = bits_of(value + 0.0f);
  const uint32_t key =
      bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
  return (bits & 0x7fffffffu) > kInfinityBits ? 1u : key;
}

// Undoes `ordered`; NaN comes back as some NaN.
MOE_ROUTING_FN float unordered(uint32_t key) {
  return float_of(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

MOE_ROUTING_FN float from_bfloat16(uint16_t bits) {
  return float_of(static_cast<uint32_t>(bits) << 16);
}

MOE_ROUTING_FN float from_float16(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  if (magnitude >= 0x7c00u) return float_of(sign | kInfinityBits | (magnitude & 0x3ffu) << 13);
  // 2^112 rebiases the exponent and is exact for subnormal halves too
  return float_of(bits_of(float_of(magnitude << 13) * 5.192296858534828e33f) | sign);
}

MOE_ROUTING_FN uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > kInfinityBits) return 0x7fc0u;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);  // to nearest even
}

MOE_ROUTING_FN uint16_t to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > kInfinityBits) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal: let one float addition do the rounding
    const float shifted = float_of(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_of(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | rounded >> 13);
}

MOE_ROUTING_FN float load_float(const FloatRows& rows, int row, int column) {
  const int at = row * rows.stride + column;
  if (rows.type == FloatType::float32) return static_cast<const float*>(rows.data)[at];
  const uint16_t bits = static_cast<const uint16_t*>(rows.data)[at];
  return rows.type == FloatType::bfloat16 ? from_bfloat16(bits) : from_float16(bits);
}

MOE_ROUTING_FN void store_float(const FloatRows& rows, int row, int column, float value) {
  void* const data = const_cast<void*>(rows.data);
  const int at = row * rows.stride + column;
  if (rows.type == FloatType::float32) {
    static_cast<float*>(data)[at] = value;
  } else {
    const bool is_brain = rows.type == FloatType::bfloat16;
    static_cast<uint16_t*>(data)[at] = is_brain ? to_bfloat16(value) : to_float16(value);
  }
}

// Same element type on both sides: not one bit changes, NaN payloads included.
MOE_ROUTING_FN void copy_float(const FloatRows& from, const FloatRows& to, int row, int column) {
  const int source = row * from.stride + column;
  const int target = row * to.stride + column;
  void* const data = const_cast<void*>(to.data);
  if (from.type == FloatType::float32) {
    static_cast<uint32_t*>(data)[target] = static_cast<const uint32_t*>(from.data)[source];
  } else {
    static_cast<uint16_t*>(data)[target] = static_cast<const uint16_t*>(from.data)[source];
  }
}

MOE_ROUTING_FN int64_t load_id(const IdRows& rows, int row, int column) {
  const int at = row * rows.stride + column;
  return rows.is_wide ? static_cast<const int64_t*>(rows.data)[at]
                      : static_cast<const int32_t*>(rows.data)[at];
}

MOE_ROUTING_FN void store_id(const IdRows& rows, int row, int column, int64_t id) {
  void* const data = const_cast<void*>(rows.data);
  const int at = row * rows.stride + column;
  if (rows.is_wide) {
    static_cast<int64_t*>(data)[at] = id;
  } else {
    static_cast<int32_t*>(data)[at] = static_cast<int32_t>(id);
  }
}

// exp to 2 units in the last place; 0 below the smallest normal float, infinite above the largest.
MOE_ROUTING_FN float exponential(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  constexpr float kLowest = -87.336f;  // logarithm of the smallest normal float
  // 2^n * e^r with |r| <= ln(2) / 2; branch-free, so that compilers vectorise loops around it
  const float clamped = x < kLowest ? kLowest : x > 89.0f ? 89.0f : x;
  const float n = static_cast<float>(
      static_cast<int32_t>(clamped * 1.44269504f + (clamped < 0.0f ? -0.5f : 0.5f)));
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const float power = float_of(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
  return x < kLowest ? 0.0f : y * power;
#endif
}

}  // namespace moe_routing
