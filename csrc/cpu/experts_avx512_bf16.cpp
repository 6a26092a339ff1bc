#if defined(__x86_64__)
#include <immintrin.h>

// Standard headers stay above: their inline functions are shared with code for older processors.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,fma,bmi,bmi2,popcnt")
#pragma GCC target("avx512bf16")
#pragma GCC target("prefer-vector-width=512")
#define MOE_ROUTING_ISA avx512_bf16
#define MOE_ROUTING_LANES 16
#include "experts_vector.h"

namespace moe_routing::cpu::avx512_bf16 {

// bfloat16 weights and inputs: two products for each sum and instruction.
struct PairDot {
  using Weight = Bfloat16;
  using Input = Bfloat16;
  static constexpr int kChunk = 2 * kLanes;

  template <int rows, int tokens>
  MOE_ROUTING_INLINE void step(Floats (&sums)[tokens][rows], const Bfloat16* const* weights,
                               const Bfloat16* const* inputs, int64_t at, int64_t k) {
    for (int r = 0; r < rows; ++r) {
      const __m512bh weight = load<__m512bh>(weights[r] + at);
      for (int t = 0; t < tokens; ++t) {
        const __m512 sum = reinterpret_cast<__m512>(sums[t][r]);
        sums[t][r] =
            reinterpret_cast<Floats>(_mm512_dpbf16_ps(sum, weight, load<__m512bh>(inputs[t] + k)));
      }
    }
  }

  MOE_ROUTING_INLINE void put(Bfloat16* inputs, int64_t column, Bfloat16 value) {
    inputs[column] = value;
  }
  MOE_ROUTING_INLINE void put_block(Bfloat16* inputs, int64_t column, const float* values) {
    for (int i = 0; i < kBlockColumns; i += kLanes) {
      store_floats(inputs + column + i, load<Floats>(values + i));
    }
  }
};

const ExpertsKernel bfloat16_experts = make_kernel<PairDot>();

}  // namespace moe_routing::cpu::avx512_bf16
#endif
