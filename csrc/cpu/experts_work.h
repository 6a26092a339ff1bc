// What the threads of one `run_experts` share, and the steps that they run. No standard containers:
// this is read by code for several instruction sets.
#pragma once
#include "experts.h"

namespace moe_routing::cpu {

constexpr int kBlockTokens = 16;   // tokens that a tile holds
constexpr int kBlockColumns = 32;  // columns of the intermediate, or of the output, at a time

// The rows of one active expert are the pairs first[i] .. first[i + 1].
struct Work {
  const ExpertsCall* call;
  int32_t num_active;
  int32_t num_pairs;
  int32_t num_blocks;
  const int32_t* experts;        // [num_active], ascending
  const int32_t* first;          // [num_active + 1]
  const int32_t* first_block;    // [num_active + 1]: blocks of at most 16 pairs of one expert
  const int32_t* rows;           // [num_pairs], ascending within an expert
  const float* weights;          // [num_pairs]
  char* inputs;                  // hidden states in the layout of the kernel
  char* activated;               // intermediate of every pair in that layout
  float* sums;                   // [threads, rows, columns of a task]
};

struct Columns {
  int64_t begin, end;
};

// The steps of one instruction set and element type. Each task writes what no other task writes;
// all tasks of a step come before those of the next.
struct ExpertsKernel {
  int64_t (*input_bytes)(const Work&);
  int64_t (*activated_bytes)(const Work&);
  int64_t (*num_packs)(const Work&);
  void (*pack)(const Work&, int64_t task);
  void (*gate_up)(const Work&, int32_t active, Columns columns);
  void (*down)(const Work&, float* sums, Columns columns);
  void (*leave)();  // gives back what a thread took
};

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace moe_routing::cpu
