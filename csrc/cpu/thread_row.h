// One row on one CPU thread, and the two passes over all rows.
//
// Compiled once for each instruction set, in a namespace named MOE_ROUTING_ISA; the including file
// sets the compiler's target first. Loops over experts are written for the vectoriser: no branches,
// integer keys, one array at a time.
#pragma once
#include "moe_routing/row.h"

namespace moe_routing::cpu::MOE_ROUTING_ISA {

template <class T>
struct Slots {
  T value[kMaxTopK];

  MOE_ROUTING_FN Slots operator*(T factor) const {
    return map([=](T x) { return x * factor; });
  }
  MOE_ROUTING_FN Slots operator/(T divisor) const {
    return map([=](T x) { return x / divisor; });
  }

 private:
  template <class F>
  MOE_ROUTING_FN Slots map(F f) const {
    Slots result;
    for (int t = 0; t < kMaxTopK; ++t) result.value[t] = f(value[t]);
    return result;
  }
};

struct ExpertSet {
  uint32_t words[kUnionWords] = {};

  MOE_ROUTING_FN void add(int expert) { words[expert / 32] |= 1u << (expert % 32); }
  MOE_ROUTING_FN bool has(int expert) const { return words[expert / 32] >> (expert % 32) & 1u; }
  MOE_ROUTING_FN int size() const {
    int total = 0;
    for (uint32_t word : words) total += popcount(word);
    return total;
  }
};

// What all rows of a call share. `member` is U as a mask for keys; `wanted` is how many experts
// join U by `demand`, 0 where no row demands any.
struct Shared {
  ExpertSet required, before, after;
  int64_t num_moved = 0;
  int wanted = 0;
  alignas(64) uint32_t demand[kMaxExperts];
  alignas(64) int64_t member[kMaxExperts];
};

// Scores of the row at hand. A key holds the ordered score above the inverted expert id, so that
// the greatest key is the best expert, ties to the lower id; 0 is "not in the pool".
struct Scratch {
  alignas(64) float logits[kMaxExperts];
  alignas(64) float scores[kMaxExperts];
  alignas(64) int64_t keys[kMaxExperts];
  alignas(64) int64_t loaded[kMaxExperts];
  bool allowed[kMaxExperts];
};

constexpr int kIdBits = 16;
constexpr int64_t kIdMask = (1 << kIdBits) - 1;

MOE_ROUTING_FN int64_t make_key(float score, int expert) {
  return static_cast<int64_t>(ordered(score)) << kIdBits | (kIdMask - expert);
}

MOE_ROUTING_FN int64_t greatest(const int64_t* keys, int n) {
  int64_t best = 0;
  for (int j = 0; j < n; ++j) best = keys[j] > best ? keys[j] : best;
  return best;
}

class ThreadRow {
 public:
  using Ints = Slots<int>;
  using Floats = Slots<float>;

  MOE_ROUTING_FN ThreadRow(const Call& call, const Policy* policy, int row, Shared& shared,
                           Scratch& scratch, const Softmax* known = nullptr)
      : call_(call),
        policy_(policy),
        row_(row),
        shared_(shared),
        scratch_(scratch),
        knows_softmax_(known != nullptr),
        softmax_(known != nullptr ? *known : Softmax{}) {}

  MOE_ROUTING_FN const Call& call() const { return call_; }
  MOE_ROUTING_FN bool is(Flag flag) const { return policy_ && (policy_->flags & flag); }
  MOE_ROUTING_FN const Policy& policy() const { return *policy_; }
  MOE_ROUTING_FN const Softmax& softmax() const { return softmax_; }

  template <class T>
  MOE_ROUTING_FN T get(const Slots<T>& slots, int t) const {
    return slots.value[t];
  }
  template <class T>
  MOE_ROUTING_FN T at(const Slots<T>& slots, int t) const {
    return slots.value[t];
  }
  template <class T>
  MOE_ROUTING_FN void put(Slots<T>& slots, int t, T value) const {
    slots.value[t] = value;
  }

  template <class F>
  MOE_ROUTING_FN unsigned which(F f) const {
    unsigned bits = 0;
    for (int t = 0; t < call_.top_k; ++t) bits |= static_cast<unsigned>(f(t)) << t;
    return bits;
  }

  MOE_ROUTING_FN float sum(const Floats& slots) const { return sum_first(slots, call_.top_k); }
  MOE_ROUTING_FN float sum_first(const Floats& slots, int n) const {
    float total = 0.0f;
    for (int t = 0; t < n; ++t) total += slots.value[t];
    return total;
  }

  MOE_ROUTING_FN void open() {
    if (is_open_) return;
    is_open_ = true;
    const int n = call_.num_experts;
    read(call_.scores, scratch_.logits);
    const float* scores = scratch_.logits;
    if (call_.scoring == Scoring::softmax && !knows_softmax_) {
      softmax_ = {largest(scores), 1.0f};
      if (!call_.renormalize || call_.bias != nullptr) {
        softmax_.inverse_total = 1.0f / total_of_all();
      }
    }
    if (call_.bias != nullptr) scores = add_bias();
    if (call_.num_groups > 1) scores = limit_groups(scores);
    for (int j = 0; j < n; ++j) scratch_.keys[j] = make_key(scores[j], j);
    pool_ = scratch_.keys;
  }

  MOE_ROUTING_FN void reopen() { open(); }

  MOE_ROUTING_FN int rank_base(Ints& order) {
    int64_t keys[kMaxTopK];
    int n = 0;
    const Ints base = base_ids();
    for (int t = 0; t < call_.top_k; ++t) {
      const int expert = base.value[t];
      if (expert < 0 || pool_[expert] == 0) continue;  // invalid, or there twice
      int64_t key = pool_[expert];
      pool_[expert] = 0;
      int place = n++;
      for (; place > 0 && keys[place - 1] < key; --place) keys[place] = keys[place - 1];
      keys[place] = key;
    }
    for (int t = 0; t < n; ++t) order.value[t] = expert_of(keys[t]);
    return n;
  }

  MOE_ROUTING_FN int pop() {
    const int64_t best = greatest(pool_, call_.num_experts);
    if (best == 0) return -1;
    const int expert = expert_of(best);
    pool_[expert] = 0;
    return expert;
  }

  MOE_ROUTING_FN void remove(int expert) { pool_[expert] = 0; }

  MOE_ROUTING_FN void keep_union() {
    for (int j = 0; j < call_.num_experts; ++j) {
      scratch_.loaded[j] = scratch_.keys[j] & shared_.member[j];
    }
    pool_ = scratch_.loaded;
  }

  MOE_ROUTING_FN int num_before(int expert) const {
    const int64_t key = scratch_.keys[expert];
    int total = 0;
    for (int j = 0; j < call_.num_experts; ++j) total += scratch_.keys[j] > key;
    return total;
  }

  MOE_ROUTING_FN Ints base_ids() const {
    Ints ids;
    for (int t = 0; t < call_.top_k; ++t) {
      const int64_t id = load_id(call_.topk_ids, row_, t);
      ids.value[t] = id >= 0 && id < call_.num_experts ? static_cast<int>(id) : -1;
    }
    return ids;
  }

  MOE_ROUTING_FN Floats base_weights() const {
    const Ints ids = base_ids();
    Floats weights;
    for (int t = 0; t < call_.top_k; ++t) {
      weights.value[t] = ids.value[t] < 0 ? 0.0f : load_float(call_.topk_weights, row_, t);
    }
    return weights;
  }

  MOE_ROUTING_FN Floats gates_of(const Ints& ids, int n) {
    Floats gates = {};
    for (int t = 0; t < n; ++t) gates.value[t] = gate_of(ids.value[t]);
    return gates;
  }

  MOE_ROUTING_FN float gate_total() const {
    if (call_.num_groups == 1 && call_.scoring == Scoring::softmax) {
      return total_of_all();
    }
    float total = 0.0f;
    for (int j = 0; j < call_.num_experts; ++j) total += gate_of(j);
    return total;
  }

  MOE_ROUTING_FN void require(const Ints& ids, int n) {
    for (int t = 0; t < n; ++t) shared_.required.add(ids.value[t]);
  }

  MOE_ROUTING_FN void require_base() { add_valid(shared_.required, base_ids(), call_.top_k); }

  template <class F>
  MOE_ROUTING_FN void add_demand(F f) {
    for (int t = 0; t < call_.top_k; ++t) {
      const Demand demand = f(t);
      shared_.demand[demand.id] += demand.quanta;
    }
    if (policy_->max_active > shared_.wanted) shared_.wanted = policy_->max_active;
  }

  MOE_ROUTING_FN bool in_union(int expert) const { return shared_.required.has(expert); }

  MOE_ROUTING_FN void expect_neighbours(const Ints&) const {}  // the caches know by themselves

  MOE_ROUTING_FN Neighbour nearest(int expert) const {
    const int n = call_.num_experts;
    const float* const row = neighbours_of(expert);
    int64_t best = 0;
    for (int j = 0; j < n; ++j) {
      const int64_t key = make_key(row[j], j) & shared_.member[j];
      best = key > best ? key : best;
    }
    if (best == 0) return {expert, minus_infinity()};
    return {expert_of(best), row[expert_of(best)]};
  }

  MOE_ROUTING_FN float coefficient(int expert, int stand_in) const {
    const int64_t n = call_.num_experts;
    return neighbours_of(expert)[n * n + stand_in];
  }

  MOE_ROUTING_FN int nearest_slot(int expert, const Ints& ids, int n) const {
    const float* const row = neighbours_of(expert);
    int best = 0;
    for (int t = 1; t < n; ++t) {
      const int64_t key = make_key(row[ids.value[t]], ids.value[t]);
      if (key > make_key(row[ids.value[best]], ids.value[best])) best = t;
    }
    return best;
  }

  template <class F>
  MOE_ROUTING_FN void write(F f) const {
    for (int t = 0; t < call_.top_k; ++t) {
      const Expert expert = f(t);
      store_id(call_.out_ids, row_, t, expert.id);
      store_float(call_.out_weights, row_, t, expert.weight);
    }
  }

  MOE_ROUTING_FN void copy_base() const {
    for (int t = 0; t < call_.top_k; ++t) {
      store_id(call_.out_ids, row_, t, load_id(call_.topk_ids, row_, t));
      copy_float(call_.topk_weights, call_.out_weights, row_, t);
    }
  }

  MOE_ROUTING_FN void mark(Experts when, const Ints& ids, int n) {
    add_valid(when == Experts::before ? shared_.before : shared_.after, ids, n);
  }

  MOE_ROUTING_FN void add_moved(int n) { shared_.num_moved += n; }

 private:
  MOE_ROUTING_FN const float* neighbours_of(int expert) const {
    const int64_t n = call_.num_experts;
    return call_.similarity + (policy_->artifact * n + expert) * n;
  }

  MOE_ROUTING_FN static int expert_of(int64_t key) {
    return static_cast<int>(kIdMask - (key & kIdMask));
  }

  MOE_ROUTING_FN static void add_valid(ExpertSet& set, const Ints& ids, int n) {
    for (int t = 0; t < n; ++t) {
      if (ids.value[t] >= 0) set.add(ids.value[t]);
    }
  }

  MOE_ROUTING_FN void read(const FloatRows& rows, float* to) const {
    const int n = call_.num_experts;
    if (rows.type == FloatType::float32) {
      const float* from = static_cast<const float*>(rows.data) + row_ * rows.stride;
      for (int j = 0; j < n; ++j) to[j] = from[j];
      return;
    }
    const uint16_t* from = static_cast<const uint16_t*>(rows.data) + row_ * rows.stride;
    if (rows.type == FloatType::bfloat16) {
      for (int j = 0; j < n; ++j) to[j] = from_bfloat16(from[j]);
    } else {
      for (int j = 0; j < n; ++j) to[j] = from_float16(from[j]);
    }
  }

  MOE_ROUTING_FN float largest(const float* logits) const {
    uint32_t best = 0;
    for (int j = 0; j < call_.num_experts; ++j) {
      const uint32_t key = ordered(logits[j]);
      best = key > best ? key : best;
    }
    const float top = best == 1 ? minus_infinity() : unordered(best);  // 1: nothing but NaN
    return top < kLargest ? top : kLargest;
  }

  // Softmax over all experts, up to the factor that `inverse_total_` corrects.
  MOE_ROUTING_FN float total_of_all() const {
    float total = 0.0f;
    if (!(softmax_.top >= -kLargest)) return total;
#pragma omp simd reduction(+ : total)
    for (int j = 0; j < call_.num_experts; ++j) {
      const float x = scratch_.logits[j];
      const float gate = exponential((x < kLargest ? x : kLargest) - softmax_.top);
      total += is_nan(x) ? 0.0f : gate;
    }
    return total * softmax_.inverse_total;
  }

  MOE_ROUTING_FN float gate_of(int expert) const {
    if (call_.num_groups > 1 && !scratch_.allowed[expert]) return 0.0f;
    if (call_.scoring == Scoring::given) {
      const float gate = load_float(call_.gates, row_, expert);
      return is_nan(gate) ? 0.0f : gate;
    }
    return gate_of_logit(call_.scoring, load_float(call_.scores, row_, expert), softmax_);
  }

  MOE_ROUTING_FN const float* add_bias() const {
    for (int j = 0; j < call_.num_experts; ++j) {
      const float logit = scratch_.logits[j];
      const float gate = gate_of_logit(call_.scoring, logit, softmax_);
      scratch_.scores[j] = is_nan(logit) ? logit : gate + call_.bias[j];
    }
    return scratch_.scores;
  }

  // Experts outside the best groups score -inf. What the engine chose counts as allowed.
  MOE_ROUTING_FN const float* limit_groups(const float* scores) const {
    const int size = call_.num_experts / call_.num_groups;
    bool is_best[kMaxGroups] = {};
    int64_t strengths[kMaxGroups];
    for (int g = 0; g < call_.num_groups; ++g) {
      strengths[g] = make_key(strength(scores + g * size, size), g);
    }
    for (int i = 0; i < call_.top_groups; ++i) {
      const int best = expert_of(greatest(strengths, call_.num_groups));
      is_best[best] = true;
      strengths[best] = 0;
    }
    for (int j = 0; j < call_.num_experts; ++j) scratch_.allowed[j] = is_best[j / size];
    const Ints base = base_ids();
    for (int t = 0; t < call_.top_k; ++t) {
      if (base.value[t] >= 0) scratch_.allowed[base.value[t]] = true;
    }
    for (int j = 0; j < call_.num_experts; ++j) {
      scratch_.scores[j] = scratch_.allowed[j] ? scores[j] : minus_infinity();
    }
    return scratch_.scores;
  }

  // DeepSeek-V2: a group is as good as its best expert; with a bias (V3) as its best two.
  MOE_ROUTING_FN float strength(const float* scores, int size) const {
    float best = minus_infinity();
    float second = minus_infinity();
    for (int j = 0; j < size; ++j) {
      const float score = group_score(scores[j]);
      second = score > best ? best : score > second ? score : second;
      best = score > best ? score : best;
    }
    return call_.bias == nullptr || size == 1 ? best : best + second;
  }

  const Call& call_;
  const Policy* const policy_;
  const int row_;
  Shared& shared_;
  Scratch& scratch_;
  int64_t* pool_ = nullptr;
  bool is_open_ = false;
  const bool knows_softmax_;
  Softmax softmax_;
};

struct RowState {
  Slots<int> order;
  Decision decision;
  Softmax softmax;
};

// What the free slots of padded rows name; -1, or an expert that is active anyway.
MOE_ROUTING_FN int padding_id(const Call& call, const Shared& shared) {
  if (call.free_slots == FreeSlots::ignored) return kFree;
  int lowest = 0;
  while (lowest < call.num_experts && !shared.required.has(lowest)) ++lowest;
  return lowest % call.num_experts;
}

MOE_ROUTING_FN void pad_row(const Call& call, int row, int id) {
  for (int t = 0; t < call.top_k; ++t) {
    store_id(call.out_ids, row, t, id);
    store_float(call.out_weights, row, t, 0.0f);
  }
}

// The most demanded experts join U, ties to the lower id.
MOE_ROUTING_FN void fill_union(const Call& call, Shared& shared) {
  if (shared.wanted == 0) return;
  const int n = call.num_experts;
  const uint32_t* const demand = shared.demand;
  const auto count = [=](uint32_t least) {
    int total = 0;
    for (int j = 0; j < n; ++j) total += demand[j] >= least;
    return total;
  };
  const uint32_t least = least_demand(shared.wanted, call.num_rows, count);
  int spare = shared.wanted - count(least + 1);
  for (int j = 0; j < n; ++j) {
    if (demand[j] > least || (demand[j] == least && spare-- > 0)) shared.required.add(j);
  }
}

MOE_ROUTING_FN void finish_union(const Call& call, Shared& shared) {
  for (int j = 0; j < call.num_experts; ++j) {
    call.out_union[j] = shared.required.has(j);
    shared.member[j] = -static_cast<int64_t>(shared.required.has(j));
  }
}

MOE_ROUTING_FN void add_statistics(const Call& call, const Shared& shared, int num_live) {
  if (call.statistics == nullptr || num_live == 0) return;
  ExpertSet critical;
  for (int i = 0; i < kUnionWords; ++i) {
    critical.words[i] = shared.after.words[i] & ~shared.required.words[i];
  }
  call.statistics[kCalls] += 1;
  call.statistics[kRows] += num_live;
  call.statistics[kActive] += shared.after.size();
  call.statistics[kActiveBase] += shared.before.size();
  call.statistics[kMovedSlots] += shared.num_moved;
  call.statistics[kCritical] += critical.size();
}

void route(const Call& call) {
  thread_local Shared shared;
  thread_local Scratch scratch;
  thread_local std::vector<RowState> states;
  shared.required = shared.before = shared.after = ExpertSet{};
  shared.num_moved = 0;
  shared.wanted = 0;
  for (int j = 0; j < call.num_experts; ++j) shared.demand[j] = 0;
  if (states.size() < static_cast<size_t>(call.num_rows)) states.resize(call.num_rows);

  int num_live = 0;
  for (int row = 0; row < call.num_rows; ++row) num_live += call.policy_ids[row] != kPad;
  const int step = find_step(call, num_live);
  for (int row = 0; row < call.num_rows; ++row) {
    if (call.policy_ids[row] == kPad) continue;
    ThreadRow live(call, find_policy(call, call.policy_ids[row], step), row, shared, scratch);
    states[row].decision = decide(live, states[row].order);
    states[row].softmax = live.softmax();
  }
  fill_union(call, shared);
  finish_union(call, shared);
  const int padding = padding_id(call, shared);
  for (int row = 0; row < call.num_rows; ++row) {
    if (call.policy_ids[row] == kPad) {
      pad_row(call, row, padding);
      continue;
    }
    RowState& state = states[row];
    ThreadRow live(call, find_policy(call, call.policy_ids[row], step), row, shared, scratch,
                   &state.softmax);
    settle(live, state.order, state.decision);
  }
  add_statistics(call, shared, num_live);
}

}  // namespace moe_routing::cpu::MOE_ROUTING_ISA
