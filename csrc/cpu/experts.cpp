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
constexpr int64_t kBytesPerThread = 512 << 10;   // below this, waking a thread costs more
constexpr int64_t kSerialPackBytes = 128 << 10;  // up to this, so does waiting for all
constexpr int64_t kGateUpBytes = 256 << 10;      // weights of one gate-and-up task
constexpr int64_t kTasksPerThread = 32;

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
    work.input_size = call_.hidden;
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

int64_t element_bytes(const ExpertsCall& call) { return call.is_bfloat16 ? 2 : 4; }

// How a call is cut into tasks.
struct Split {
  int64_t gate_up_width = 1, gate_up_per_expert = 0, down_width = 4 * kBlockColumns, num_down = 0;

  void cut_gate_up(const ExpertsCall& call) {
    const int64_t wanted = kGateUpBytes / (2 * call.hidden * element_bytes(call));
    gate_up_width = round_up(wanted > 0 ? wanted : 1, kBlockColumns);
    gate_up_per_expert = (call.intermediate + gate_up_width - 1) / gate_up_width;
  }
  void cut_down(const ExpertsCall& call, int num_threads) {
    while (down_width > kBlockColumns && call.hidden / down_width < kTasksPerThread * num_threads) {
      down_width /= 2;
    }
    num_down = (call.hidden + down_width - 1) / down_width;
  }
  Task gate_up_task(int64_t at, int64_t intermediate) const {
    return {static_cast<int32_t>(at / gate_up_per_expert),
            block_columns(at % gate_up_per_expert, gate_up_width, intermediate)};
  }
  Task down_task(int64_t at, int64_t hidden) const {
    return {0, block_columns(at, down_width, hidden)};
  }
};

int threads_for(int64_t weight_bytes, int num_threads) {
  const int64_t useful = 1 + weight_bytes / kBytesPerThread;
  return static_cast<int>(useful < num_threads ? useful : num_threads);
}

int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Tasks are taken one at a time, so that a thread whose core is busy elsewhere takes fewer; and one
// ahead, so that its memory is on the way.
template <class MakeTask, class Run>
void take_tasks(std::atomic<int64_t>& next, int64_t count, MakeTask&& make, Run&& run) {
  for (int64_t at = next++; at < count;) {
    const int64_t following = next++;
    const auto task = make(at);
    if (following < count) {
      const auto upcoming = make(following);
      run(task, &upcoming);
    } else {
      run(task, nullptr);
    }
    at = following;
  }
}

void run_on_threads(const ExpertsKernel& kernel, const Work& work, const Split& split,
                    int num_threads) {
  const ExpertsCall& call = *work.call;
  const int64_t num_packs = kernel.num_packs(work);
  std::atomic<int64_t> packs{0}, gate_ups{0}, downs{0};
  const auto pack_all = [&] {
    for (int64_t at = packs++; at < num_packs; at = packs++) kernel.pack(work, at);
  };
  const bool packs_alone = kernel.input_bytes(work) <= kSerialPackBytes;
  if (packs_alone) pack_all();
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
  {
    if (!packs_alone) {
      pack_all();
#pragma omp barrier
    }
    const int64_t num_gate_ups = split.gate_up_per_expert * work.num_active;
    take_tasks(
        gate_ups, num_gate_ups,
        [&](int64_t at) { return split.gate_up_task(at, call.intermediate); },
        [&](Task task, const Task* next) { kernel.gate_up(work, task, next); });
    if (num_gate_ups > 0) {
#pragma omp barrier
    }
    float* const sums = work.sums + thread_number() * call.num_rows * split.down_width;
    take_tasks(
        downs, split.num_down, [&](int64_t at) { return split.down_task(at, call.hidden); },
        [&](Task task, const Task* next) { kernel.down(work, sums, task, next); });
    kernel.leave();
  }
}

int64_t sums_bytes(const ExpertsCall& call, const Split& split, int num_threads) {
  return sizeof(float) * call.num_rows * split.down_width * num_threads;
}

const ExpertsKernel& kernel_of(const ExpertsCall& call) {
  const InstructionSet& set = instruction_set();
  return call.is_bfloat16 ? *set.bfloat16 : *set.float32;
}

Scratch& scratch_of_thread() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace

void run_experts(const ExpertsCall& call) {
  if (call.num_rows == 0) return;
  const Plan plan(call);
  Work work = plan.work();
  const int64_t weight_bytes =
      3 * call.hidden * call.intermediate * element_bytes(call) * work.num_active;
  const int num_threads = threads_for(weight_bytes, call.num_threads);
  Split split;
  split.cut_gate_up(call);
  split.cut_down(call, num_threads);
  const ExpertsKernel& kernel = kernel_of(call);
  const int64_t input_bytes = round_up(kernel.input_bytes(work), kAlignment);
  const int64_t activated_bytes = round_up(kernel.activated_bytes(work), kAlignment);
  Scratch& scratch = scratch_of_thread();
  work.inputs =
      scratch.reserve(input_bytes + activated_bytes + sums_bytes(call, split, num_threads));
  work.activated = work.inputs + input_bytes;
  work.sums = reinterpret_cast<float*>(work.activated + activated_bytes);
  run_on_threads(kernel, work, split, num_threads);
  scratch.trim();
}

// One expert that every row uses, and of it only the down projection.
void run_linear(const LinearCall& linear) {
  if (linear.num_rows == 0) return;
  ExpertsCall call;
  call.num_rows = linear.num_rows;
  call.num_experts = 1;
  call.hidden = linear.out_features;
  call.intermediate = linear.in_features;
  call.is_bfloat16 = linear.is_bfloat16;
  call.hidden_states = linear.input;
  call.hidden_stride = linear.input_stride;
  call.w2 = {linear.weight, 0, linear.weight_stride};
  call.out = linear.out;

  const int32_t expert = 0;
  const int32_t first[] = {0, linear.num_rows};
  const int32_t first_block[] = {0, (linear.num_rows + kBlockTokens - 1) / kBlockTokens};
  std::vector<int32_t> rows(linear.num_rows);
  for (int32_t row = 0; row < linear.num_rows; ++row) rows[row] = row;
  const std::vector<float> weights(linear.num_rows, 1.0f);
  Work work{};
  work.call = &call;
  work.input_size = linear.in_features;
  work.num_active = 1;
  work.num_pairs = linear.num_rows;
  work.num_blocks = first_block[1];
  work.experts = &expert;
  work.first = first;
  work.first_block = first_block;
  work.rows = rows.data();
  work.weights = weights.data();

  const int64_t weight_bytes = call.hidden * call.intermediate * element_bytes(call);
  const int num_threads = threads_for(weight_bytes, linear.num_threads);
  Split split;
  split.cut_down(call, num_threads);
  const ExpertsKernel& kernel = kernel_of(call);
  const int64_t input_bytes = round_up(kernel.input_bytes(work), kAlignment);
  Scratch& scratch = scratch_of_thread();
  work.inputs = scratch.reserve(input_bytes + sums_bytes(call, split, num_threads));
  work.activated = work.inputs;
  work.sums = reinterpret_cast<float*>(work.inputs + input_bytes);
  run_on_threads(kernel, work, split, num_threads);
  scratch.trim();
}

// Sixteen streams at a time, each a little ahead of itself: one stream leaves memory idle.
uint64_t stream_read(const void* data, int64_t bytes, int num_threads) {
  typedef uint64_t Line __attribute__((vector_size(64), aligned(8)));
  constexpr int kStreams = 16;
  constexpr int64_t kStreamBytes = 64 << 10;
  constexpr int64_t kAhead = 512;
  const char* const start = static_cast<const char*>(data);
  const int64_t chunks = bytes / (kStreams * kStreamBytes);
  uint64_t checksum = 0;
#pragma omp parallel for num_threads(num_threads) reduction(^ : checksum) schedule(dynamic)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const char* const from = start + chunk * kStreams * kStreamBytes;
    Line sum = {};
    for (int64_t at = 0; at < kStreamBytes; at += sizeof(Line)) {
      for (int stream = 0; stream < kStreams; ++stream) {
        const char* const line = from + stream * kStreamBytes + at;
        __builtin_prefetch(line + kAhead, 0, 3);
        sum ^= *reinterpret_cast<const Line*>(line);
      }
    }
    for (int i = 0; i < 8; ++i) checksum ^= sum[i];
  }
  for (int64_t at = chunks * kStreams * kStreamBytes; at < bytes; ++at) {
    checksum ^= static_cast<unsigned char>(start[at]);
  }
  return checksum;
}

}  // namespace moe_routing::cpu
