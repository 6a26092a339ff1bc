#if defined(__x86_64__)
#pragma GCC target("avx2,fma,bmi,bmi2,popcnt")
#define MOE_ROUTING_ISA avx2
#define MOE_ROUTING_LANES 8
#include "experts_vector.h"

namespace moe_routing::cpu::avx2 {

const ExpertsKernel bfloat16_experts = make_kernel<WideningDot>();
const ExpertsKernel float32_experts = make_kernel<FloatDot>();

}  // namespace moe_routing::cpu::avx2
#endif
