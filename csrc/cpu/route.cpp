#include "route.h"

#include "instruction_set.h"

namespace moe_routing::cpu {

void route(const Call& call) { instruction_set().route(call); }

}  // namespace moe_routing::cpu
