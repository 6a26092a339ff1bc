// What one re-routing call is made of. Plain data: the same structures are read by CPU threads,
// CUDA kernels and the simulator.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define MOE_ROUTING_FN __host__ __device__ __forceinline__
#define MOE_ROUTING_ROLLED _Pragma("unroll 1")  // registers are worth more than loop overhead
#define MOE_ROUTING_OUTLINED_FN __host__ __device__ __noinline__ inline  // so is the code's size
#else
#define MOE_ROUTING_OUTLINED_FN MOE_ROUTING_FN
#define MOE_ROUTING_ROLLED
#define MOE_ROUTING_FN inline __attribute__((always_inline))
#endif

namespace moe_routing {

constexpr int kMaxExperts = 1024;
constexpr int kMaxTopK = 32;  // a lane of a warp each
constexpr int kMaxGroups = 32;
constexpr int kQuanta = 65536;   // most demand of one row for one expert
constexpr int kMaxRows = 65535;  // of a call: their demand for one expert fits 32 bits
constexpr int kPad = -1;         // policy id of a padded row
constexpr int kFree = -1;  // id of a slot without an expert, within and under FreeSlots::ignored
constexpr int kUnionWords = kMaxExperts / 32;

enum class FloatType : int32_t { float32, bfloat16, float16 };

// From logits to gates. `given`: scores and gates both come from the caller.
enum class Scoring : int32_t { softmax, sigmoid, sqrtsoftplus, given };

// The id of a slot without an expert: -1, which the engine's MoE runner skips, or the expert of the
// row's first slot.
enum class FreeSlots : int32_t { ignored, repeat_first };

// Bits of Policy::flags.
enum Flag : int32_t {
  kReroutes = 1,         // without it a row is vanilla, and no other word counts
  kMoves = 2,            // slots move to stand-ins; else the row takes experts in its own order
  kCompensates = 4,      // the policy gives a compensation; else the model's weights count
  kHasCoefficients = 8,  // a moved slot is weighed by the matrix that follows its artifact's
};

// What one policy does at one step of the number of live rows: twelve 32-bit words of the policy
// table, an int32 tensor [num_policies, num_steps, 12]. `Rule` in policies/rule.py says more.
struct Policy {
  int32_t flags;
  int32_t k0;          // experts that a row requires,
  float p;             // or fewer: those that hold this share of its gate mass
  int32_t k_max;       // most experts that a row takes
  int32_t max_rank;    // ranks from here on are not taken
  float threshold;     // kMoves: similarity below which a slot stays
  int32_t artifact;    // kMoves, and where mapped_share > 0: which similarity matrix
  int32_t start;       // live rows from which this step holds; the same for all policies
  int32_t max_active;  // how many experts join U by demand; 0: the row demands none
  int32_t exponent;    // of a gate in the demand: 0, 1 or 2
  float mapped_share;  // share of the weight that follows lost experts
  float compensation;  // share of the lost weight that stays; kMoves: factor on moved slots
};
constexpr int kPolicyWords = 12;
static_assert(sizeof(Policy) == 4 * kPolicyWords, "the words of one policy in the table");

// Columns of the statistics of one layer, int64, summed over calls.
enum Statistic { kCalls, kRows, kActive, kActiveBase, kMovedSlots, kCritical, kNumStatistics };

// A float matrix with a row stride; neighbouring elements of a row are adjacent.
struct FloatRows {
  const void* data = nullptr;
  int32_t stride = 0;  // elements; every offset of a call fits 31 bits
  FloatType type = FloatType::float32;
};

// An integer matrix of 4 or 8 bytes an element.
struct IdRows {
  const void* data = nullptr;
  int32_t stride = 0;
  bool is_wide = false;
};

// Everything that a call reads and writes. Pointers are valid on the device that runs it.
struct Call {
  int32_t num_rows = 0;
  int32_t num_experts = 0;
  int32_t top_k = 0;

  FloatRows scores;             // router logits, or ranking scores under Scoring::given
  FloatRows gates;              // float32; only under Scoring::given
  const float* bias = nullptr;  // [num_experts], added to the gates for ranking only; may be null
  Scoring scoring = Scoring::softmax;
  int32_t num_groups = 1;
  int32_t top_groups = 1;
  bool renormalize = true;
  float scale = 1.0f;

  IdRows topk_ids;         // the engine's choice
  FloatRows topk_weights;  // its weights

  const int32_t* policy_ids = nullptr;  // [num_rows]
  const Policy* policies = nullptr;     // [num_policies, num_steps]
  int32_t num_steps = 1;
  int32_t num_policies = 0;
  const float* similarity = nullptr;  // [num_artifacts, num_experts, num_experts]

  FreeSlots free_slots = FreeSlots::ignored;
  IdRows out_ids;                 // written; may be topk_ids itself
  FloatRows out_weights;          // written; may be topk_weights itself
  uint8_t* out_union = nullptr;   // [num_experts], 1 for experts that some row requires
  int64_t* statistics = nullptr;  // [kNumStatistics], added to; null: nothing is counted
  uint32_t* workspace = nullptr;  // two-launch form only: kWorkspaceWords, any contents
};

}  // namespace moe_routing
