// The re-routing on a CPU: one thread, vectorised over experts.
#pragma once
#include "moe_routing/call.h"

namespace moe_routing::cpu {

// Run one call. All pointers of `call` are host memory.
void route(const Call& call);

}  // namespace moe_routing::cpu
