// The experts of an MoE layer on CPU threads.
//
// For each row b: out[b] = sum over its experts e, in ascending order, of
//   weight(b, e) * (w2[e] * activation(w13[e] * x[b] + bias13[e]) + bias2[e]).
//
// A result does not depend, bit for bit, on the other rows of the call or on the number of threads:
// every sum has a fixed order, and no part of it is split between threads.
#pragma once
#include "moe_routing/call.h"

namespace moe_routing::cpu {

enum class Activation : int32_t {
  silu,            // silu(gate) * up
  gelu_tanh,       // gelu(gate) * up, by the tanh formula
  clamped_swiglu,  // GPT-OSS: gate' * sigmoid(alpha * gate') * (up' + 1), both clamped to a limit
};

// A matrix of each expert: [experts, rows, columns] with adjacent columns.
struct ExpertMatrices {
  const void* data = nullptr;
  int64_t expert_stride = 0;  // elements
  int64_t row_stride = 0;
};

struct ExpertsCall {
  int32_t num_rows = 0;
  int32_t num_experts = 0;
  int32_t top_k = 0;
  int64_t hidden = 0;
  int64_t intermediate = 0;
  bool is_bfloat16 = false;  // hidden states, weights and output; else all are float32

  const void* hidden_states = nullptr;  // [rows, hidden]
  int64_t hidden_stride = 0;
  FloatRows topk_weights;       // [rows, top_k]; a slot of weight 0 is skipped
  IdRows topk_ids;              // [rows, top_k]; a slot of id -1 is skipped, a repeated id adds up
  ExpertMatrices w13;           // [experts, 2 * intermediate, hidden]: gate and up
  ExpertMatrices w2;            // [experts, hidden, intermediate]
  FloatRows bias13;             // [experts, 2 * intermediate], may be null
  FloatRows bias2;              // [experts, hidden], may be null
  bool is_interleaved = false;  // gate and up take turns in w13, else gate comes first
  Activation activation = Activation::silu;
  float alpha = 1.0f;
  float limit = 0.0f;
  void* out = nullptr;  // [rows, hidden], contiguous
  int32_t num_threads = 1;
};

// Run one call. Throws std::out_of_range for an id that is neither -1 nor an expert.
void run_experts(const ExpertsCall& call);

// out = input * transposed weight, with the same promise: a row does not depend on other rows.
struct LinearCall {
  int32_t num_rows = 0;
  int64_t in_features = 0;
  int64_t out_features = 0;
  bool is_bfloat16 = false;     // all three, else float32
  const void* input = nullptr;  // [rows, in_features]
  int64_t input_stride = 0;
  const void* weight = nullptr;  // [out_features, in_features]
  int64_t weight_stride = 0;
  void* out = nullptr;  // [rows, out_features], contiguous
  int32_t num_threads = 1;
};

void run_linear(const LinearCall& call);

// Read memory once with `num_threads` threads, as fast as it goes. Returns a checksum.
uint64_t stream_read(const void* data, int64_t bytes, int num_threads);

}  // namespace moe_routing::cpu
