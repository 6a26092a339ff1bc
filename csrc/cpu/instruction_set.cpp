#include "instruction_set.h"

#include <atomic>

#include "experts_work.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moe_routing::cpu {

#define MOE_ROUTING_DECLARE(isa)               \
  namespace isa {                              \
  void route(const Call& call);                \
  extern const ExpertsKernel bfloat16_experts; \
  extern const ExpertsKernel float32_experts;  \
  }
#if defined(__x86_64__)
MOE_ROUTING_DECLARE(amx)
MOE_ROUTING_DECLARE(avx512_bf16)
MOE_ROUTING_DECLARE(avx512)
MOE_ROUTING_DECLARE(avx2)
#endif
MOE_ROUTING_DECLARE(portable)
#undef MOE_ROUTING_DECLARE

namespace {

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
}

// Linux grants the tile registers to a process that asks; threads started later inherit them.
bool has_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023;
  constexpr int kTileData = 18;
  constexpr unsigned kTileBits = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kTileBits) == kTileBits &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

const std::vector<InstructionSet>& known() {
  static const std::vector<InstructionSet> sets = {
#if defined(__x86_64__)
      {"amx", avx512::route, &amx::bfloat16_experts, &avx512::float32_experts,
       has_avx512() && has_tiles()},
      {"avx512_bf16", avx512::route, &avx512_bf16::bfloat16_experts, &avx512::float32_experts,
       has_avx512() && __builtin_cpu_supports("avx512bf16")},
      {"avx512", avx512::route, &avx512::bfloat16_experts, &avx512::float32_experts, has_avx512()},
      {"avx2", avx2::route, &avx2::bfloat16_experts, &avx2::float32_experts,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi2")},
#endif
      {"portable", portable::route, &portable::bfloat16_experts, &portable::float32_experts, true},
  };
  return sets;
}

const InstructionSet* fastest() {
  const InstructionSet* set = known().data();
  while (!set->is_supported) ++set;  // the last one runs everywhere
  return set;
}

std::atomic<const InstructionSet*> chosen{fastest()};

}  // namespace

const InstructionSet& instruction_set() { return *chosen.load(std::memory_order_relaxed); }

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
      chosen = &set;
      return true;
    }
  }
  return false;
}

}  // namespace moe_routing::cpu
