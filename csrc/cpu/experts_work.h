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
  int64_t input_size;  // columns of the hidden states
  int32_t num_active;
  int32_t num_pairs;
  int32_t num_blocks;
  const int32_t* experts;      // [num_active], ascending
  const int32_t* first;        // [num_active + 1]
  const int32_t* first_block;  // [num_active + 1]: blocks of at most 16 pairs of one expert
  const int32_t* rows;         // [num_pairs], ascending within an expert
  const float* weights;        // [num_pairs]
  char* inputs;                // hidden states in the layout of the kernel
  char* activated;             // intermediate of every pair in that layout
  float* sums;                 // [threads, rows, columns of a task]
};

struct Columns {
  int64_t begin, end;
};

// The gate-and-up columns of one expert, or output columns of all experts.
struct Task {
  int32_t active = 0;
  Columns columns{0, 0};
};

// The steps of one instruction set and element type. Each task writes what no other task writes;
// all tasks of a step come before those of the next.
struct ExpertsKernel {
  int64_t (*input_bytes)(const Work&);
  int64_t (*activated_bytes)(const Work&);
  int64_t (*num_packs)(const Work&);
  void (*pack)(const Work&, int64_t task);
  void (*gate_up)(const Work&, Task task, const Task* next);  // `next` of this thread, or null
  void (*down)(const Work&, float* sums, Task task, const Task* next);
  void (*leave)();  // gives back what a thread took
};

// Brings weights into the cache while others are worked on. Eight places take turns, pages apart:
// the processor's own prefetchers follow one stream a page, and a single stream leaves memory idle.
class Prefetcher {
 public:
  // Two stretches of memory of `bytes` each.
  void start(const void* first, const void* second, int64_t bytes) {
    data_[0] = static_cast<const char*>(first);
    data_[1] = static_cast<const char*>(second);
    part_ = bytes / kParts;
    at_ = 0;
    due_ = 0;
  }

  // To be called when so many bytes of other weights have been read.
  inline __attribute__((always_inline)) void advance(int bytes) {
    for (due_ += bytes; due_ >= kRound && at_ < part_; due_ -= kRound, at_ += kLine) {
      for (int part = 0; part < kParts; ++part) {
        __builtin_prefetch(data_[0] + part * part_ + at_, 0, 2);
        __builtin_prefetch(data_[1] + part * part_ + at_, 0, 2);
      }
    }
  }

 private:
  static constexpr int kParts = 4;
  static constexpr int64_t kLine = 64;
  static constexpr int64_t kRound = 2 * kParts * kLine;
  const char* data_[2] = {};
  int64_t part_ = 0;
  int64_t at_ = 0;
  int64_t due_ = 0;
};

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace moe_routing::cpu
