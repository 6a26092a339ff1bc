// One binary holds code for several processors; the best is chosen when it is loaded.
#pragma once
#include <string>
#include <vector>

#include "moe_routing/call.h"

namespace moe_routing::cpu {

struct ExpertsKernel;

struct InstructionSet {
  const char* name;
  void (*route)(const Call&);
  const ExpertsKernel* bfloat16;
  const ExpertsKernel* float32;
  bool is_supported;
};

// The one that calls run with.
const InstructionSet& instruction_set();

// Names of those that this processor runs, fastest first.
std::vector<std::string> instruction_sets();

// Choose the instruction set of later calls. Returns false where it is not in `instruction_sets`.
bool use_instruction_set(const std::string& name);

}  // namespace moe_routing::cpu
