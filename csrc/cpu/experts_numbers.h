// Vectors of floats in the compiler's notation, and functions on them.
//
// Compiled once for each instruction set, in a namespace named MOE_ROUTING_ISA, with
// MOE_ROUTING_LANES floats in a vector; the including file sets the compiler's target first.
#pragma once
#include "experts_work.h"

#define MOE_ROUTING_INLINE static inline __attribute__((always_inline))

namespace moe_routing::cpu::MOE_ROUTING_ISA {

extern const ExpertsKernel bfloat16_experts;
extern const ExpertsKernel float32_experts;

constexpr int kLanes = MOE_ROUTING_LANES;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

template <class V>
MOE_ROUTING_INLINE V load(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
MOE_ROUTING_INLINE void store(void* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

MOE_ROUTING_INLINE Floats all(float x) { return x - Floats{}; }

// e^x within 2 units in the last place; infinity above 88.4, 0 below -87.3, NaN for NaN.
MOE_ROUTING_INLINE Floats exponential(Floats x) {
  x = x > 88.8f ? all(88.8f) : x;
  x = x < -87.6f ? all(-87.6f) : x;
  const Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum rounds to integers
  const Floats n = shifted - 12582912.0f;
  Floats r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Ints exponent = reinterpret_cast<Ints>(shifted) - 0x4b400000 + 127;
  return p * reinterpret_cast<Floats>(exponent << 23);
}

MOE_ROUTING_INLINE Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

template <Activation activation>
MOE_ROUTING_INLINE Floats activate(Floats gate, Floats up, float alpha, float limit) {
  if constexpr (activation == Activation::silu) {
    return gate / (1.0f + exponential(-gate)) * up;
  } else if constexpr (activation == Activation::gelu_tanh) {
    const Floats u = 1.59576912f * (gate + 0.044715f * gate * gate * gate);  // 2 sqrt(2 / pi)
    const Floats tanh = 1.0f - 2.0f / (exponential(u) + 1.0f);
    return 0.5f * gate * (1.0f + tanh) * up;
  } else {
    gate = gate > limit ? all(limit) : gate;
    up = up > limit ? all(limit) : up;
    up = up < -limit ? all(-limit) : up;
    return gate * sigmoid(alpha * gate) * (up + 1.0f);
  }
}

// To nearest even, in the lower half of each element.
MOE_ROUTING_INLINE Bits to_bfloat16_bits(Floats x) {
  const Bits bits = reinterpret_cast<Bits>(x);
  const Bits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return x == x ? rounded : rounded * 0 + 0x7fc0u;
}

MOE_ROUTING_INLINE void store_bfloat16(void* to, Floats x) {
  store(to, __builtin_convertvector(to_bfloat16_bits(x), Halves));
}

// Elements as they lie in memory.
struct Bfloat16 {
  uint16_t bits;
};

MOE_ROUTING_INLINE float to_float(Bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
MOE_ROUTING_INLINE float to_float(float x) { return x; }

MOE_ROUTING_INLINE Floats load_floats(const Bfloat16* from) {
  const Bits bits = __builtin_convertvector(load<Halves>(from), Bits) << 16;
  return reinterpret_cast<Floats>(bits);
}
MOE_ROUTING_INLINE Floats load_floats(const float* from) { return load<Floats>(from); }

MOE_ROUTING_INLINE void store_floats(Bfloat16* to, Floats x) { store_bfloat16(to, x); }
MOE_ROUTING_INLINE void store_floats(float* to, Floats x) { store(to, x); }

// One element of a matrix of biases, float32 or bfloat16; 0 where there is none.
MOE_ROUTING_INLINE float bias_at(const FloatRows& bias, int64_t expert, int64_t column) {
  if (bias.data == nullptr) return 0.0f;
  const int64_t at = expert * bias.stride + column;
  if (bias.type == FloatType::float32) return static_cast<const float*>(bias.data)[at];
  return to_float(static_cast<const Bfloat16*>(bias.data)[at]);
}

// Rows of w13 that make one column of the intermediate.
struct GateUp {
  int64_t gate, up, step;  // first rows, and rows from one column to the next

  MOE_ROUTING_INLINE GateUp at(const ExpertsCall& call, int64_t column) {
    if (call.is_interleaved) return {2 * column, 2 * column + 1, 2};
    return {column, call.intermediate + column, 1};
  }
};

template <class T>
MOE_ROUTING_INLINE const T* matrix(const ExpertMatrices& matrices, int64_t expert) {
  return static_cast<const T*>(matrices.data) + expert * matrices.expert_stride;
}

template <class T>
MOE_ROUTING_INLINE void prefetch_gate_up(const Work& work, int32_t active, int64_t column,
                                         int64_t columns, Prefetcher& prefetcher) {
  const ExpertsCall& call = *work.call;
  const GateUp at = GateUp::at(call, column);
  const T* const weights = matrix<T>(call.w13, work.experts[active]);
  const T* const gate = weights + at.gate * call.w13.row_stride;
  const int64_t second = call.is_interleaved ? at.gate + columns : at.up;
  const T* const up = weights + second * call.w13.row_stride;
  prefetcher.start(gate, up, columns * call.w13.row_stride * sizeof(T));
}

template <class T>
MOE_ROUTING_INLINE void prefetch_down(const Work& work, int32_t active, int64_t column,
                                      int64_t columns, Prefetcher& prefetcher) {
  const ExpertMatrices& w2 = work.call->w2;
  const T* const rows = matrix<T>(w2, work.experts[active]) + column * w2.row_stride;
  const int64_t half = columns / 2 * w2.row_stride;
  prefetcher.start(rows, rows + half, half * sizeof(T));
}

// Adds up the output columns of all rows and writes them when all experts are done.
template <class T>
MOE_ROUTING_INLINE void write_sums(const ExpertsCall& call, const float* sums, Columns columns,
                                   int64_t width) {
  const int64_t count = columns.end - columns.begin;
  for (int32_t row = 0; row < call.num_rows; ++row) {
    T* const out = static_cast<T*>(call.out) + row * call.hidden + columns.begin;
    const float* const from = sums + row * width;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store_floats(out + i, load<Floats>(from + i));
    if (i == count) continue;
    alignas(64) T rest[kLanes];
    store_floats(rest, load<Floats>(from + i));
    for (int64_t j = i; j < count; ++j) out[j] = rest[j - i];
  }
}

}  // namespace moe_routing::cpu::MOE_ROUTING_ISA
