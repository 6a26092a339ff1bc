#include "route.h"

#include <atomic>

namespace moe_routing::cpu {

#if defined(__x86_64__)
namespace avx512 {
void route(const Call& call);
}
namespace avx2 {
void route(const Call& call);
}
#endif
namespace portable {
void route(const Call& call);
}

namespace {

struct InstructionSet {
  const char* name;
  void (*route)(const Call&);
  bool is_supported;
};

const std::vector<InstructionSet>& known() {
  static const std::vector<InstructionSet> sets = {
#if defined(__x86_64__)
      {"avx512", avx512::route,
       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd")},
      {"avx2", avx2::route,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi2")},
#endif
      {"portable", portable::route, true},
  };
  return sets;
}

void (*fastest())(const Call&) {
  for (const InstructionSet& set : known()) {
    if (set.is_supported) return set.route;
  }
  return portable::route;
}

std::atomic<void (*)(const Call&)> chosen{fastest()};

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : known()) {
    if (set.is_supported) names.emplace_back(set.name);
  }
  return names;
}

bool use_instruction_set(const std::string& name) {
  for (const InstructionSet& set : known()) {
    if (set.is_supported && set.name == name) {
      chosen = set.route;
      return true;
    }
  }
  return false;
}

void route(const Call& call) { chosen.load(std::memory_order_relaxed)(call); }

}  // namespace moe_routing::cpu
