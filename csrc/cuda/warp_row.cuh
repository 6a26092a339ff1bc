// One row on one warp. Expert j lives in lane j % 32; slot t of the row lives in lane t.
#pragma once
#include "moe_routing/row.h"
#include "portable.cuh"

namespace moe_routing::cuda {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarp = 32;

// What the rows of one block share. Sets of experts are bit masks. `wanted` is how many experts
// join U by `demand`, 0 where no row demands any.
struct Shared {
  uint32_t required[kUnionWords];
  uint32_t before[kUnionWords];
  uint32_t after[kUnionWords];
  uint32_t demand[kMaxExperts];
  int wanted;
  int num_live;
  int num_moved;
  bool is_last;
};

__device__ __forceinline__ bool has(const uint32_t* set, int expert) {
  return set[expert / kWarp] >> (expert % kWarp) & 1u;
}

// Between two calls the experts' weights stream through L2 and drive everything else out of it.
__device__ __forceinline__ void prefetch(const void* address) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
  (void)address;
#endif
}
constexpr int kCacheLine = 128;

// How experts compare. Either kind of key is greater for the better expert and never 0.
//
// Packed: 16-bit scores, the ordered value above the inverted expert id: one REDUX selects.
// Wide: any score; the ordered value alone: a second REDUX finds the lowest id among equals.
template <bool kPacked>
struct Key;

template <>
struct Key<true> {
  using Slot = uint32_t;

  static __device__ __forceinline__ uint32_t make(uint16_t bits, FloatType type, int expert) {
    const unsigned infinity = type == FloatType::bfloat16 ? 0x7f80u : 0x7c00u;
    const unsigned magnitude = bits & 0x7fffu;
    unsigned key = bits & 0x8000u ? ~static_cast<unsigned>(bits) & 0xffffu : bits | 0x8000u;
    if (magnitude == 0) key = 0x8000u;
    if (magnitude > infinity) key = 0;  // NaN: below -inf, whose key is above 0
    return key << 16 | (0xffffu - static_cast<unsigned>(expert));
  }
  static __device__ __forceinline__ Slot slot(uint32_t key, int) { return key; }
  static __device__ __forceinline__ int expert(uint32_t key) {
    return static_cast<int>(0xffffu - (key & 0xffffu));
  }
  static __device__ __forceinline__ float value(uint32_t key, FloatType type) {
    const unsigned high = key >> 16;
    if (high == 0) return minus_infinity();
    const uint16_t bits = static_cast<uint16_t>(high & 0x8000u ? high ^ 0x8000u : ~high);
    return type == FloatType::bfloat16 ? from_bfloat16(bits) : from_float16(bits);
  }
};

template <>
struct Key<false> {
  using Slot = unsigned long long;

  static __device__ __forceinline__ Slot slot(uint32_t key, int expert) {
    return static_cast<Slot>(key) << 16 | (0xffffu - static_cast<unsigned>(expert));
  }
};

template <bool kPacked, int kPerLane>
class WarpRow {
 public:
  using Ints = int;
  using Floats = float;

  __device__ __forceinline__ WarpRow(const Call& call, const Policy* policy, int row,
                                     Shared& shared, bool adds_to_union)
      : call_(call),
        policy_(policy),
        flags_(policy != nullptr ? policy->flags : 0),
        row_(row),
        lane_(static_cast<int>(threadIdx.x) % kWarp),
        shared_(shared),
        adds_to_union_(adds_to_union) {}

  __device__ __forceinline__ const Call& call() const { return call_; }
  __device__ __forceinline__ bool is(Flag flag) const { return flags_ & flag; }
  __device__ __forceinline__ const Policy& policy() const { return *policy_; }

  template <class T>
  __device__ __forceinline__ T get(T slots, int t) const {
    return __shfl_sync(kAll, slots, t);
  }
  template <class T>
  __device__ __forceinline__ T at(T slots, int) const {
    return slots;
  }
  template <class T>
  __device__ __forceinline__ void put(T& slots, int t, T value) const {
    if (lane_ == t) slots = value;
  }

  template <class F>
  __device__ __forceinline__ unsigned which(F f) const {
    return __ballot_sync(kAll, lane_ < call_.top_k && f(lane_));
  }

  __device__ __forceinline__ float sum(float slots) const {
    return sum_first(slots, call_.top_k);
  }
  __device__ __forceinline__ float sum_first(float slots, int n) const {
    return add_lanes(lane_ < n ? slots : 0.0f);
  }

  __device__ __forceinline__ void open() {
    read_keys();
    if (call_.scoring == Scoring::softmax) {
      softmax_.top = largest_logit();
      if (!call_.renormalize || call_.bias != nullptr) {
        softmax_.inverse_total = 1.0f;
        softmax_.inverse_total = 1.0f / total_of_all();
      }
    }
    if constexpr (!kPacked) {
      if (call_.bias != nullptr) add_bias();
      if (call_.num_groups > 1) limit_groups();
    }
  }

  __device__ __forceinline__ void reopen() const {}  // the row that decided is the one that settles

  __device__ __forceinline__ int rank_base(int& order) {
    const int expert = base_ids();
    typename Key<kPacked>::Slot key = 0;
    if (expert >= 0) key = Key<kPacked>::slot(key_of(expert), expert);
    bool is_repeated = false;
    MOE_ROUTING_ROLLED
    for (int t = 0; t < call_.top_k; ++t) {
      const auto other = get(key, t);
      is_repeated = is_repeated || (other == key && t < lane_);
    }
    if (is_repeated) key = 0;
    int place = 0;
    MOE_ROUTING_ROLLED
    for (int t = 0; t < call_.top_k; ++t) place += get(key, t) > key;
    const unsigned valid = which([&](int) { return key != 0; });
    const int placed = key != 0 ? place << 16 | expert : -1;
    MOE_ROUTING_ROLLED
    for (int t = 0; t < call_.top_k; ++t) {
      const int other = get(placed, t);
      if (other < 0) continue;
      if (other >> 16 == lane_) order = other & 0xffff;
      remove(other & 0xffff);
    }
    return popcount(valid);
  }

  __device__ __forceinline__ int pop() {
    const int expert = best_of(pool_);
    if (expert >= 0) remove(expert);
    return expert;
  }

  __device__ __forceinline__ void remove(int expert) {
    if (expert % kWarp == lane_) pool_ &= ~(1u << (expert / kWarp));
  }

  __device__ __forceinline__ void keep_union() {
    whole_ = pool_;
    unsigned loaded = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) loaded |= (shared_.required[i] >> lane_ & 1u) << i;
    pool_ &= loaded;
  }

  __device__ __forceinline__ int num_before(int expert) const {
    uint32_t mine = 0;  // not `key_of`: its group may be excluded
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) mine = i == expert / kWarp ? keys_[i] : mine;
    const uint32_t key = __shfl_sync(kAll, mine, expert % kWarp);
    int count = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const bool ties_before = !kPacked && keys_[i] == key && i * kWarp + lane_ < expert;
      count += (whole_ >> i & 1u) && (keys_[i] > key || ties_before);
    }
    return __reduce_add_sync(kAll, count);
  }

  __device__ __forceinline__ int base_ids() const {
    if (lane_ >= call_.top_k) return -1;
    const int64_t id = load_id(call_.topk_ids, row_, lane_);
    return id >= 0 && id < call_.num_experts ? static_cast<int>(id) : -1;
  }

  __device__ __forceinline__ float base_weights() const {
    return base_ids() < 0 ? 0.0f : load_float(call_.topk_weights, row_, lane_);
  }

  __device__ __forceinline__ float gates_of(int ids, int n) {
    float gate = 0.0f;
    if (lane_ < n) gate = gate_of(ids);
    if constexpr (!kPacked) {
      if (call_.num_groups > 1) {
        const int expert = lane_ < n ? ids : 0;
        const unsigned allowed = __shfl_sync(kAll, allowed_, expert % kWarp);
        if ((allowed >> (expert / kWarp) & 1u) == 0) gate = 0.0f;
      }
    }
    return gate;
  }

  __device__ __forceinline__ float gate_total() const {
    float total = 0.0f;
    MOE_ROUTING_ROLLED
    for (int i = 0; i < kPerLane; ++i) {
      const int expert = i * kWarp + lane_;
      if (expert < call_.num_experts && (allowed_ >> i & 1u)) total += gate_of(expert);
    }
    return add_lanes(total);
  }

  __device__ __forceinline__ void require(int ids, int n) {
    if (adds_to_union_) add_to(shared_.required, lane_ < n ? ids : -1);
  }

  __device__ __forceinline__ void require_base() {
    if (adds_to_union_) add_to(shared_.required, base_ids());
  }

  template <class F>
  __device__ __forceinline__ void add_demand(F f) {
    if (!adds_to_union_) return;
    if (lane_ < call_.top_k) {
      const Demand demand = f(lane_);
      if (demand.quanta > 0) atomicAdd(&shared_.demand[demand.id], demand.quanta);
    }
    if (lane_ == 0) atomicMax(&shared_.wanted, policy_->max_active);
  }

  __device__ __forceinline__ bool in_union(int expert) const {
    return has(shared_.required, expert);
  }

  __device__ __forceinline__ void expect_neighbours(int ids) const {
    if (lane_ >= call_.top_k) return;
    const float* const row = neighbours_of(ids);
    for (int j = 0; j < call_.num_experts; j += kCacheLine / 4) prefetch(row + j);
  }

  __device__ __forceinline__ Neighbour nearest(int expert) const {
    const float* const row = neighbours_of(expert);
    uint32_t best = 0;
    int best_expert = kMaxExperts;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if ((shared_.required[i] >> lane_ & 1u) == 0) continue;
      const uint32_t key = ordered(row[i * kWarp + lane_]);
      if (key > best) {
        best = key;
        best_expert = i * kWarp + lane_;
      }
    }
    const uint32_t top = __reduce_max_sync(kAll, best);
    if (top == 0) return {expert, minus_infinity()};
    const unsigned candidate = best == top ? best_expert : kMaxExperts;
    return {static_cast<int>(__reduce_min_sync(kAll, candidate)), unordered(top)};
  }

  __device__ __forceinline__ float coefficient(int expert, int stand_in) const {
    const int64_t n = call_.num_experts;
    return neighbours_of(expert)[n * n + stand_in];
  }

  __device__ __forceinline__ int nearest_slot(int expert, int ids, int n) const {
    const uint32_t key = lane_ < n ? ordered(neighbours_of(expert)[ids]) : 0;
    const unsigned candidate = key == __reduce_max_sync(kAll, key) ? ids : kMaxExperts;
    const unsigned nearest = __reduce_min_sync(kAll, candidate);
    return lowest_bit(__ballot_sync(kAll, candidate == nearest));
  }

  template <class F>
  __device__ __forceinline__ void write(F f) const {
    if (lane_ >= call_.top_k) return;
    const Expert expert = f(lane_);
    store_id(call_.out_ids, row_, lane_, expert.id);
    store_float(call_.out_weights, row_, lane_, expert.weight);
  }

  __device__ __forceinline__ void copy_base() const {
    if (lane_ >= call_.top_k) return;
    store_id(call_.out_ids, row_, lane_, load_id(call_.topk_ids, row_, lane_));
    copy_float(call_.topk_weights, call_.out_weights, row_, lane_);
  }

  __device__ __forceinline__ void mark(Experts when, int ids, int n) {
    add_to(when == Experts::before ? shared_.before : shared_.after, lane_ < n ? ids : -1);
  }

  __device__ __forceinline__ void add_moved(int n) {
    if (lane_ == 0) atomicAdd(&shared_.num_moved, n);
  }

 private:
  __device__ __forceinline__ const float* neighbours_of(int expert) const {
    const int64_t n = call_.num_experts;
    return call_.similarity + (policy_->artifact * n + expert) * n;
  }

  static __device__ __forceinline__ float add_lanes(float value) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      value += __shfl_xor_sync(kAll, value, distance);
    }
    return value;
  }

  // Each lane names one expert, or none (-1). One atomic a word, not one an expert.
  __device__ __forceinline__ void add_to(uint32_t* set, int expert) const {
    uint32_t mine = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const bool is_here = expert >= 0 && expert / kWarp == i;
      const uint32_t word = __reduce_or_sync(kAll, is_here ? 1u << (expert % kWarp) : 0u);
      if (lane_ == i) mine = word;
    }
    if (mine != 0) atomicOr(&set[lane_], mine);
  }

  __device__ __forceinline__ void read_keys() {
    pool_ = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int expert = i * kWarp + lane_;
      keys_[i] = 0;
      if (expert >= call_.num_experts) continue;
      pool_ |= 1u << i;
      if constexpr (kPacked) {
        keys_[i] = key_of(expert);
      } else {
        keys_[i] = ordered(load_float(call_.scores, row_, expert));
      }
    }
    allowed_ = pool_;
  }

  // The key of one expert, read from memory: registers cannot be indexed. An expert that the
  // engine chose is never excluded by its group, so its score is enough.
  __device__ __forceinline__ uint32_t key_of(int expert) const {
    if constexpr (kPacked) {
      const auto* scores = static_cast<const uint16_t*>(call_.scores.data);
      const uint16_t bits = scores[row_ * call_.scores.stride + expert];
      return Key<true>::make(bits, call_.scores.type, expert);
    } else {
      const float logit = load_float(call_.scores, row_, expert);
      return ordered(call_.bias == nullptr ? logit : biased(logit, expert));
    }
  }

  __device__ __forceinline__ float logit_of(int expert) const {
    if constexpr (kPacked) {
      const auto* scores = static_cast<const uint16_t*>(call_.scores.data);
      const uint16_t bits = scores[row_ * call_.scores.stride + expert];
      const float brain = from_bfloat16(bits);
      return call_.scores.type == FloatType::bfloat16 ? brain : from_float16(bits);
    } else {
      return load_float(call_.scores, row_, expert);
    }
  }

  __device__ __forceinline__ float biased(float logit, int expert) const {
    return is_nan(logit) ? logit
                         : gate_of_logit(call_.scoring, logit, softmax_) + call_.bias[expert];
  }

  __device__ __forceinline__ uint32_t greatest_key(unsigned members) const {
    uint32_t best = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if ((members >> i & 1u) && keys_[i] > best) best = keys_[i];
    }
    return __reduce_max_sync(kAll, best);
  }

  // The best of this lane's and all other lanes' members; -1 if there is none.
  __device__ __forceinline__ int best_of(unsigned members) const {
    const uint32_t key = greatest_key(members);
    if (key == 0) return -1;
    if constexpr (kPacked) {
      return Key<true>::expert(key);
    } else {
      unsigned lowest = kMaxExperts;
#pragma unroll
      for (int i = kPerLane - 1; i >= 0; --i) {
        if ((members >> i & 1u) && keys_[i] == key) lowest = i * kWarp + lane_;
      }
      return static_cast<int>(__reduce_min_sync(kAll, lowest));
    }
  }

  __device__ __forceinline__ float largest_logit() const {
    const uint32_t key = greatest_key(pool_);
    float top;
    if constexpr (kPacked) {
      top = Key<true>::value(key, call_.scores.type);
    } else {
      top = key == 1 ? minus_infinity() : unordered(key);  // 1: nothing but NaN
    }
    return top < kLargest ? top : kLargest;
  }

  __device__ __forceinline__ float total_of_all() const {
    float total = 0.0f;
    MOE_ROUTING_ROLLED
    for (int i = 0; i < kPerLane; ++i) {
      const int expert = i * kWarp + lane_;
      if (expert < call_.num_experts) total += gate_of(expert);
    }
    return add_lanes(total);
  }

  __device__ __forceinline__ float gate_of(int expert) const {
    if (call_.scoring == Scoring::given) {
      const float gate = load_float(call_.gates, row_, expert);
      return is_nan(gate) ? 0.0f : gate;
    }
    return gate_of_logit(call_.scoring, logit_of(expert), softmax_);
  }

  __device__ __forceinline__ void add_bias() {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int expert = i * kWarp + lane_;
      if (expert >= call_.num_experts) continue;
      keys_[i] = ordered(biased(load_float(call_.scores, row_, expert), expert));
    }
  }

  // Experts outside the best groups score -inf. What the engine chose counts as allowed.
  __device__ __forceinline__ void limit_groups() {
    const int size = call_.num_experts / call_.num_groups;
    uint32_t strength = 0;  // of the group whose number this lane has
    MOE_ROUTING_ROLLED
    for (int group = 0; group < call_.num_groups; ++group) {
      const uint32_t found = ordered(strength_of(group * size, size));
      if (lane_ == group) strength = found;
    }
    unsigned best_groups = 0;
    MOE_ROUTING_ROLLED
    for (int i = 0; i < call_.top_groups; ++i) {
      const uint32_t top = __reduce_max_sync(kAll, strength);
      const unsigned equal = __ballot_sync(kAll, strength == top);
      best_groups |= equal & (~equal + 1u);  // ties to the lowest group
      if (best_groups >> lane_ & 1u) strength = 0;
    }
    unsigned allowed = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int expert = i * kWarp + lane_;
      if (expert < call_.num_experts) allowed |= (best_groups >> (expert / size) & 1u) << i;
    }
    const int base = base_ids();
    MOE_ROUTING_ROLLED
    for (int t = 0; t < call_.top_k; ++t) {
      const int expert = get(base, t);
      if (expert >= 0 && expert % kWarp == lane_) allowed |= 1u << (expert / kWarp);
    }
    allowed_ = allowed;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if ((allowed >> i & 1u) == 0 && (pool_ >> i & 1u)) keys_[i] = ordered(minus_infinity());
    }
  }

  // DeepSeek-V2: a group is as good as its best expert; with a bias (V3) as its best two.
  __device__ __forceinline__ float strength_of(int first, int size) const {
    unsigned members = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int expert = i * kWarp + lane_;
      if (expert >= first && expert < first + size) members |= 1u << i;
    }
    const float best = group_score(unordered_score(greatest_key(members)));
    if (call_.bias == nullptr || size == 1) return best;
    const int expert = best_of(members);
    if (expert % kWarp == lane_) members &= ~(1u << (expert / kWarp));
    return best + group_score(unordered_score(greatest_key(members)));
  }

  static __device__ __forceinline__ float unordered_score(uint32_t key) {
    return key == 1 ? minus_infinity() : unordered(key);
  }

  const Call& call_;
  const Policy* const policy_;
  const int32_t flags_;
  const int row_;
  const int lane_;
  Shared& shared_;
  const bool adds_to_union_;
  Softmax softmax_ = {};
  unsigned pool_ = 0;     // bit i: expert 32 i + lane can still be popped
  unsigned whole_ = 0;    // the pool before it was restricted to U
  unsigned allowed_ = 0;  // experts of the row's best groups
  uint32_t keys_[kPerLane];
};

}  // namespace moe_routing::cuda
