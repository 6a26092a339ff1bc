#define MOE_ROUTING_ISA portable
#define MOE_ROUTING_LANES 4
#include "experts_vector.h"

namespace moe_routing::cpu::portable {

const ExpertsKernel bfloat16_experts = make_kernel<WideningDot>();
const ExpertsKernel float32_experts = make_kernel<FloatDot>();

}  // namespace moe_routing::cpu::portable
