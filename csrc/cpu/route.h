// The re-routing on a CPU: one thread, vectorised over experts.
#pragma once
#include <string>
#include <vector>

#include "moe_routing/call.h"

namespace moe_routing::cpu {

// Instruction sets that this binary holds and this processor runs, fastest first.
std::vector<std::string> instruction_sets();

// Choose the instruction set of later calls. Returns false where it is not in `instruction_sets`.
bool use_instruction_set(const std::string& name);

// Run one call. All pointers of `call` are host memory.
void route(const Call& call);

}  // namespace moe_routing::cpu
