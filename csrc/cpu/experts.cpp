#include "experts.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "experts_work.h"
#include "instruction_set.h"
#include "moe_routing/numbers.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace moe_routing::cpu {

namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kKept = 32 << 20;  // bytes of scratch memory that a thread keeps between calls
constexpr int64_t kBytesPerThread = 128 << 10;  // below this, waking a thread costs more
constexpr int64_t kGateUpBytes = 256 << 10;     // weights of one gate-and-up task
constexpr int64_t kTasksPerThread = 8;

// Aligned memory that grows. What a decode step needs stays allocated.
class Scratch {
 public:
  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      data_.reset();
      data_.reset(static_cast<char*>(std::aligned_alloc(kAlignment, round_up(bytes, kAlignment))));
      size_ = data_ ? bytes : 0;
      if (!data_) throw std::bad_alloc();
    }
    return data_.get();
  }
  void trim() {
    if (size_ <= kKept) return;
    data_.reset();
    size_ = 0;
  }

 private:
  struct Free {
    void operator()(char* data) const { std::free(data); }
  };
  std::unique_ptr<char, Free> data_;
  int64_t size_ = 0;
};

// The slots of all rows, grouped by expert. Repeated experts of a row become one pair.
class Plan {
 public:
  explicit Plan(const ExpertsCall& call) : call_(call) {
    const int64_t num_slots = static_cast<int64_t>(call.num_rows) * call.top_k;
    if (num_slots > INT32_MAX) throw std::out_of_range("topk_ids: expected fewer than 2^31 slots");
    merged_.resize(num_slots);
    counts_.assign(call.num_experts, 0);
    for (int row = 0; row < call.num_rows; ++row) merge_row(row);
    number_experts();
    rows_.resize(first_.back());
    weights_.resize(first_.back());
    std::vector<int32_t> next(counts_.size());
    for (size_t i = 0; i < experts_.size(); ++i) next[experts_[i]] = first_[i];
    for (int row = 0; row < call.num_rows; ++row) place_row(row, next);
  }

  Work work() const {
    Work work{};
    work.call = &call_;
    work.num_active = static_cast<int32_t>(experts_.size());
    work.num_pairs = first_.back();
    work.num_blocks = first_block_.back();
    work.experts = experts_.data();
    work.first = first_.data();
    work.first_block = first_block_.data();
    work.rows = rows_.data();
    work.weights = weights_.data();
    return work;
  }

 private:
  struct Slot {
    int32_t expert = -1;
    float weight = 0.0f;
  };

  Slot* slots_of(int row) { return merged_.data() + static_cast<int64_t>(row) * call_.top_k; }

  void merge_row(int row) {
    Slot* const slots = slots_of(row);
    int num_slots = 0;
    for (int k = 0; k < call_.top_k; ++k) {
      const int64_t id = load_id(call_.topk_ids, row, k);
      const float weight = load_float(call_.topk_weights, row, k);
      if (id < -1 || id >= call_.num_experts) refuse(row, k, id);
      if (id < 0 || weight == 0.0f) continue;
      int at = 0;
      while (at < num_slots && slots[at].expert != id) ++at;
      if (at < num_slots) {
        slots[at].weight += weight;
        continue;
      }
      slots[num_slots++] = {static_cast<int32_t>(id), weight};
      ++counts_[id];
    }
  }

  [[noreturn]] void refuse(int row, int k, int64_t id) const {
    throw std::out_of_range("topk_ids[" + std::to_string(row) + ", " + std::to_string(k) +
                            "] = " + std::to_string(id) + ": expected -1 or an expert below " +
                            std::to_string(call_.num_experts));
  }

  void number_experts() {
    first_.push_back(0);
    first_block_.push_back(0);
    for (int expert = 0; expert < call_.num_experts; ++expert) {
      if (counts_[expert] == 0) continue;
      experts_.push_back(expert);
      first_.push_back(first_.back() + counts_[expert]);
      first_block_.push_back(first_block_.back() +
                             (counts_[expert] + kBlockTokens - 1) / kBlockTokens);
    }
  }

  void place_row(int row, std::vector<int32_t>& next) {
    const Slot* const slots = slots_of(row);
    for (int k = 0; k < call_.top_k && slots[k].expert >= 0; ++k) {
      const int32_t at = next[slots[k].expert]++;
      rows_[at] = row;
      weights_[at] = slots[k].weight;
    }
  }

  const ExpertsCall& call_;
  std::vector<Slot> merged_;
  std::vector<int32_t> counts_, experts_, first_, first_block_, rows_;
  std::vector<float> weights_;
};

Columns block_columns(int64_t task, int64_t width, int64_t size) {
  const int64_t begin = task * width;
  return {begin, begin + width < size ? begin + width : size};
}

// How a call is cut into tasks.
struct Split {
  Split(const Work& work, int num_threads) {
    const ExpertsCall& call = *work.call;
    const int64_t element = call.is_bfloat16 ? 2 : 4;
    const int64_t wanted = kGateUpBytes / (2 * call.hidden * element);
    gate_up_width = round_up(wanted > 0 ? wanted : 1, kBlockColumns);
    gate_up_per_expert = (call.intermediate + gate_up_width - 1) / gate_up_width;
    down_width = 4 * kBlockColumns;
    while (down_width > kBlockColumns &&
           call.hidden / down_width < kTasksPerThread * num_threads) {
      down_width /= 2;
    }
    num_down = (call.hidden + down_width - 1) / down_width;
  }

  int64_t gate_up_width, gate_up_per_expert, down_width, num_down;
};

int threads_for(const Work& work) {
  const ExpertsCall& call = *work.call;
  const int64_t bytes =
      3 * call.hidden * call.intermediate * (call.is_bfloat16 ? 2 : 4) * work.num_active;
  const int64_t useful = 1 + bytes / kBytesPerThread;
  return static_cast<int>(useful < call.num_threads ? useful : call.num_threads);
}

int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Tasks are taken one at a time, so that a thread whose core is busy elsewhere takes fewer.
template <class F>
void take_tasks(std::atomic<int64_t>& next, int64_t count, F&& run) {
  for (int64_t task = next++; task < count; task = next++) run(task);
}

void run_on_threads(const ExpertsKernel& kernel, const Work& work, const Split& split,
                    int num_threads) {
  const ExpertsCall& call = *work.call;
  std::atomic<int64_t> packs{0}, gate_ups{0}, downs{0};
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    take_tasks(packs, kernel.num_packs(work), [&](int64_t task) { kernel.pack(work, task); });
#pragma omp barrier
    take_tasks(gate_ups, split.gate_up_per_expert * work.num_active, [&](int64_t task) {
      kernel.gate_up(work, static_cast<int32_t>(task / split.gate_up_per_expert),
                     block_columns(task % split.gate_up_per_expert, split.gate_up_width,
                                   call.intermediate));
    });
#pragma omp barrier
    float* const sums = work.sums + thread_number() * call.num_rows * split.down_width;
    take_tasks(downs, split.num_down, [&](int64_t task) {
      kernel.down(work, sums, block_columns(task, split.down_width, call.hidden));
    });
    kernel.leave();
  }
}

}  // namespace

void run_experts(const ExpertsCall& call) {
  static thread_local Scratch scratch;
  const Plan plan(call);
  Work work = plan.work();
  const int num_threads = threads_for(work);
  const Split split(work, num_threads);
  const InstructionSet& set = instruction_set();
  const ExpertsKernel& kernel = call.is_bfloat16 ? *set.bfloat16 : *set.float32;

  const int64_t input_bytes = round_up(kernel.input_bytes(work), kAlignment);
  const int64_t activated_bytes = round_up(kernel.activated_bytes(work), kAlignment);
  const int64_t sums_bytes = 4 * call.num_rows * split.down_width * num_threads;
  work.inputs = scratch.reserve(input_bytes + activated_bytes + sums_bytes);
  work.activated = work.inputs + input_bytes;
  work.sums = reinterpret_cast<float*>(work.activated + activated_bytes);
  run_on_threads(kernel, work, split, num_threads);
  scratch.trim();
}

uint64_t stream_read(const void* data, int64_t bytes, int num_threads) {
  typedef uint64_t Line __attribute__((vector_size(64), aligned(8)));
  const Line* const lines = static_cast<const Line*>(data);
  const int64_t count = bytes / static_cast<int64_t>(sizeof(Line));
  uint64_t checksum = 0;
#pragma omp parallel for num_threads(num_threads) reduction(^ : checksum) schedule(static)
  for (int64_t part = 0; part < num_threads; ++part) {
    Line sums[4] = {};
    const int64_t end = count * (part + 1) / num_threads;
    int64_t i = count * part / num_threads;
    for (; i + 4 <= end; i += 4) {
      for (int j = 0; j < 4; ++j) sums[j] ^= lines[i + j];
    }
    for (; i < end; ++i) sums[0] ^= lines[i];
    const Line all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
    for (int j = 0; j < 8; ++j) checksum ^= all[j];
  }
  return checksum;
}

}  // namespace moe_routing::cpu
