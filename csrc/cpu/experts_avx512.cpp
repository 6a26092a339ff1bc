#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,fma,bmi,bmi2,popcnt")
#pragma GCC target("prefer-vector-width=512")
#define MOE_ROUTING_ISA avx512
#define MOE_ROUTING_LANES 16
#include "experts_vector.h"

namespace moe_routing::cpu::avx512 {

const ExpertsKernel bfloat16_experts = make_kernel<WideningDot>();
const ExpertsKernel float32_experts = make_kernel<FloatDot>();

}  // namespace moe_routing::cpu::avx512
#endif
