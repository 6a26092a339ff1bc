// The re-routing of one row of one MoE call. SERE: arXiv 2602.07616; OEA: arXiv 2511.02237.
//
// The algorithm is written once, over a `Row` that a backend provides: a warp of a GPU, or one CPU
// thread. Control flow and plain values are uniform over the lanes of a row. What a backend spreads
// over lanes hides behind two types, `Ints` and `Floats`: one value for each of the top_k slots.
//
// A call has two passes with a barrier of all rows between them:
//   decide   what the row insists on; the union over all live rows is U
//   settle   which experts and weights the row ends up with, given U
// Between them the experts that rows demand most, as many as the largest of their `max_active`,
// join U; `least_demand` says from which demand on.
//
// `Row` offers
//   call(), policy(), is(flag)          the data; the row's policy, which a vanilla row may lack
//   get(slots, t), put(slots, t, v)     one slot, the same for all lanes
//   at(slots, t)                        a slot inside the function given to `which` or `write`
//   which(f)                            bit mask of the slots t for which f(t) holds
//   sum(floats), sum_first(floats, n)   sum over the slots, or over the first n
//   open()                              read the row's scores, unless done; every expert is then
//                                       in the pool
//   reopen()                            the same in pass 2, where a backend may have let go of them
//   softmax()                           the row's denominators, known after `open`; only for a
//                                       backend that makes a new row for pass 2
//   rank_base(order)                    the engine's valid choices, best first, leave the pool for
//                                       order[0..n); returns n
//   pop()                               the best expert of the pool leaves it; -1 if it is empty
//   remove(e), keep_union()             drop one expert, or all those outside U, from the pool
//   num_before(e)                       how many experts of the pool ranked before e, when
//                                       `keep_union` was called
//   base_ids(), base_weights()          the engine's choice; -1 and 0 where an id is invalid
//   gates_of(ids, n)                    combine weights of the first n ids, 0 for other slots
//   gate_total()                        sum of the combine weights of all experts
//   require(ids, n), require_base()     put experts into U
//   add_demand(f)                       f(t) gives the {id, quanta} by which slot t raises demand;
//                                       the row's max_active counts from now on
//   in_union(e), nearest(u)             read U: membership; the most similar expert to u in U, u
//                                       itself at -inf if U is empty
//   coefficient(u, v)                   what a slot of u weighs on v
//   nearest_slot(u, ids, n)             which of the first n ids is the most similar to u; ties
//                                       go to the lowest id, here and above
//   expect_neighbours(ids)              a hint that the two above will be asked for these
//   write(f), copy_base()               emit the row: f(t) gives slot t's {id, weight}
//   mark(which, ids, n), add_moved(n)   statistics
#pragma once
#include "numbers.h"

namespace moe_routing {

struct Expert {
  int id;
  float weight;
};

struct Neighbour {
  int id;
  float similarity;
};

struct Demand {
  int id;
  uint32_t quanta;
};

// What the softmax of a row needs besides its logits. Factors cancel where weights are
// renormalised.
struct Softmax {
  float top = 0.0f;  // largest logit, at most kLargest
  float inverse_total = 1.0f;
};

// Logit, under softmax relative to the row's largest, below which the gate is 0. Just beyond it
// float32 underflows, at a point that depends on the device; this one is the same on all.
constexpr float kFaintest = -80.0f;

enum class Experts { before, after };  // of the re-routing

MOE_ROUTING_FN int popcount(unsigned bits) {
#if defined(__CUDA_ARCH__)
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

MOE_ROUTING_FN int lowest_bit(unsigned bits) {
#if defined(__CUDA_ARCH__)
  return __ffs(static_cast<int>(bits)) - 1;
#else
  return __builtin_ctz(bits);
#endif
}

// The combine weight of an expert before any normalisation over the chosen ones.
MOE_ROUTING_OUTLINED_FN float gate_of_logit(Scoring scoring, float logit, const Softmax& softmax) {
  if (is_nan(logit)) return 0.0f;
  float x = logit < kLargest ? logit : kLargest;
  if (scoring == Scoring::softmax) x -= softmax.top;
  if (!(x >= kFaintest)) return 0.0f;  // NaN: nothing but -inf in the row
  if (scoring == Scoring::softmax) return exponential(x) * softmax.inverse_total;
  if (scoring == Scoring::sigmoid) return 1.0f / (1.0f + exponential(-x));
  return sqrtf(x > 20.0f ? x : log1pf(exponential(x)));
}

// How a score counts towards the strength of its group: NaN below everything, infinities as the
// largest numbers, so that sums of two stay ordered.
MOE_ROUTING_FN float group_score(float score) {
  if (is_nan(score)) return minus_infinity();
  return score > kLargest ? kLargest : score < -kLargest ? -kLargest : score;
}

MOE_ROUTING_FN int smaller(int a, int b) { return a < b ? a : b; }

// The step of the policy table that holds for this many live rows.
MOE_ROUTING_FN int find_step(const Call& call, int num_live) {
  int step = 0;
  while (step + 1 < call.num_steps && call.policies[step + 1].start <= num_live) ++step;
  return step;
}

// The policy of a row; null, which means vanilla, for an id outside the table.
MOE_ROUTING_FN const Policy* find_policy(const Call& call, int policy_id, int step) {
  if (policy_id < 0 || policy_id >= call.num_policies) return nullptr;
  return call.policies + (policy_id * call.num_steps + step);
}

template <class Row>
MOE_ROUTING_FN int num_required(Row& row, const typename Row::Ints& order) {
  const int k = row.call().top_k;
  const Policy& policy = row.policy();
  const int count = smaller(policy.k0, k);
  if (policy.p >= 1.0f) return count;
  const auto gates = row.gates_of(order, k);  // OEA, Algorithm 2, phase 1
  const float total = row.gate_total();
  float mass = 0.0f;
  MOE_ROUTING_ROLLED
  for (int t = 0; t < count; ++t) {
    mass += row.get(gates, t);
    if (mass / total >= policy.p) return t + 1;  // never without any mass: NaN compares false
  }
  return count;
}

// What an expert with this share of a row's gates is worth to the row. Demand adds up in whole
// quanta, so that the order of the rows does not matter.
MOE_ROUTING_FN uint32_t quanta_of(float share, int exponent) {
  if (!(share > 0.0f)) return 0;  // NaN too
  const float capped = share < 1.0f ? share : 1.0f;
  const float utility = exponent == 2 ? capped * capped : exponent == 1 ? capped : 1.0f;
  const uint32_t quanta = static_cast<uint32_t>(utility * kQuanta + 0.5f);
  return quanta > 0 ? quanta : 1;
}

// The demand from which on experts join U where `wanted` may join; at least 1. Equal demands may be
// too many. `count(x)` says how many experts have a demand of at least x.
template <class Count>
MOE_ROUTING_FN uint32_t least_demand(int wanted, int num_rows, Count count) {
  if (count(1u) <= wanted) return 1;
  uint32_t bit = kQuanta;
  for (int rows = num_rows; rows > 1; rows /= 2) bit *= 2;  // the highest of any sum
  uint32_t least = 0;
  MOE_ROUTING_ROLLED
  for (; bit != 0; bit /= 2) {
    const int found = count(least | bit);
    if (found >= wanted) least |= bit;
    if (found == wanted) break;
  }
  return least;
}

// What pass 1 found of a row.
struct Decision {
  int num_required = 0;   // experts of its order that it insists on
  bool is_whole = false;  // whether its choice holds top_k distinct experts
};

// Pass 1. Fills `order`, the row's first top_k experts in rank order. A vanilla row insists on the
// engine's choice as it stands; its order is not needed and not made.
template <class Row>
MOE_ROUTING_FN Decision decide(Row& row, typename Row::Ints& order) {
  const Call& call = row.call();
  Decision decision;
  if (!row.is(kReroutes)) {
    row.require_base();
    return decision;
  }
  row.open();
  int n = row.rank_base(order);
  decision.is_whole = n == call.top_k;
  MOE_ROUTING_ROLLED
  for (; n < call.top_k; ++n) row.put(order, n, row.pop());
  if (row.is(kMoves) || row.policy().mapped_share > 0.0f) row.expect_neighbours(order);
  decision.num_required = num_required(row, order);
  row.require(order, decision.num_required);
  if (row.policy().max_active > 0) {
    const auto gates = row.gates_of(order, call.top_k);
    const auto shares = gates / row.sum(gates);
    const int exponent = row.policy().exponent;
    row.add_demand(
        [&](int t) { return Demand{row.at(order, t), quanta_of(row.at(shares, t), exponent)}; });
  }
  return decision;
}

// Count the experts that the row had and has, and the slots whose expert it no longer uses.
template <class Row>
MOE_ROUTING_FN void tally(Row& row, const typename Row::Ints& base, const typename Row::Ints& ids,
                          int n) {
  if (row.call().statistics == nullptr) return;
  row.mark(Experts::before, base, row.call().top_k);
  row.mark(Experts::after, ids, n);
  unsigned moved = row.which([&](int t) { return row.at(base, t) >= 0; });
  MOE_ROUTING_ROLLED
  for (int s = 0; s < n; ++s) {
    const int used = row.get(ids, s);
    moved &= ~row.which([&](int t) { return row.at(base, t) == used; });
  }
  row.add_moved(popcount(moved));
}

// Whether the row's whole choice is loaded and nothing cuts it: the row then stays as it is.
template <class Row>
MOE_ROUTING_FN bool keeps_base(Row& row, const typename Row::Ints& order, bool is_whole) {
  const int k = row.call().top_k;
  const Policy& policy = row.policy();
  if (!is_whole) return false;
  if (!row.is(kMoves) && smaller(policy.k_max, policy.max_rank) < k) return false;
  return row.which([&](int t) { return !row.in_union(row.at(order, t)); }) == 0;
}

// How many experts a row has taken, and how many of them, the first, are of its own top_k.
struct Taken {
  int count = 0;
  int own = 0;
};

// After the required experts come those of U, in the row's own order of preference. Fills `chosen`,
// which starts as `order`.
template <class Row>
MOE_ROUTING_FN Taken take(Row& row, const typename Row::Ints& order, int num_required,
                          typename Row::Ints& chosen) {
  const int k = row.call().top_k;
  const int num_experts = row.call().num_experts;
  const int limit = smaller(row.policy().k_max, k);
  const int max_rank = smaller(row.policy().max_rank, num_experts);
  int n = num_required;
  if (n >= limit) return {n, n};
  unsigned loaded = row.which(
      [&](int t) { return t >= num_required && t < max_rank && row.in_union(row.at(order, t)); });
  MOE_ROUTING_ROLLED
  for (int t = 0; loaded != 0 && n < limit; ++t, loaded >>= 1) {
    if (loaded & 1u) row.put(chosen, n++, row.get(order, t));
  }
  const int own = n;
  if (n >= limit || max_rank <= k) return {n, own};
  row.reopen();
  MOE_ROUTING_ROLLED
  for (int t = 0; t < k; ++t) row.remove(row.get(order, t));
  row.keep_union();
  while (n < limit) {
    const int expert = row.pop();
    if (expert < 0) break;
    if (max_rank < num_experts && k + row.num_before(expert) >= max_rank) break;
    row.put(chosen, n++, expert);
  }
  return {n, own};
}

// The slots that the row came with; an invalid id becomes `first`, and weighs nothing.
template <class Row>
MOE_ROUTING_FN typename Row::Ints own_slots(Row& row, const typename Row::Ints& base, int first) {
  typename Row::Ints ids = base;
  unsigned invalid = row.which([&](int t) { return row.at(base, t) < 0; });
  for (; invalid != 0; invalid &= invalid - 1) row.put(ids, lowest_bit(invalid), first);
  return ids;
}

// SERE: a slot whose expert nobody loads moves to the most similar expert of U, unless that is not
// similar enough. What a row requires is in U, so it stays by itself.
template <class Row>
MOE_ROUTING_FN void move_to_stand_ins(Row& row, typename Row::Ints& ids,
                                      typename Row::Floats& weights) {
  unsigned homeless = row.which([&](int t) { return !row.in_union(row.at(ids, t)); });
  MOE_ROUTING_ROLLED
  for (; homeless != 0; homeless &= homeless - 1) {
    const int t = lowest_bit(homeless);
    const int expert = row.get(ids, t);
    const Neighbour nearest = row.nearest(expert);
    if (nearest.similarity < row.policy().threshold) continue;
    const float share =
        row.is(kHasCoefficients) ? row.coefficient(expert, nearest.id) : row.policy().compensation;
    row.put(ids, t, nearest.id);
    row.put(weights, t, row.get(weights, t) * share);
  }
}

// The first of the slots that name one expert takes the weight of them all; the others are free.
template <class Row>
MOE_ROUTING_FN void merge(Row& row, typename Row::Ints& ids, typename Row::Floats& weights) {
  MOE_ROUTING_ROLLED
  for (int t = 1; t < row.call().top_k; ++t) {
    const int expert = row.get(ids, t);
    const unsigned before = row.which([&](int s) { return s < t && row.at(ids, s) == expert; });
    if (before == 0) continue;
    const int first = lowest_bit(before);
    row.put(weights, first, row.get(weights, first) + row.get(weights, t));
    row.put(weights, t, 0.0f);
    row.put(ids, t, kFree);
  }
}

// Blends into `chosen`, the weights of the first `n` of `ids`, `own`, the weights of the router's
// own choice `base`, each on its own expert or on the most similar one that the row has.
template <class Row>
MOE_ROUTING_FN typename Row::Floats map_weights(Row& row, const typename Row::Ints& base,
                                                const typename Row::Floats& own,
                                                const typename Row::Ints& ids, int n,
                                                const typename Row::Floats& chosen) {
  const float share = row.policy().mapped_share;
  const auto mapped = own * share;
  auto weights = chosen * (1.0f - share);
  MOE_ROUTING_ROLLED
  for (int t = 0; t < row.call().top_k; ++t) {
    const int expert = row.get(base, t);
    if (expert < 0) continue;
    const unsigned kept = row.which([&](int s) { return s < n && row.at(ids, s) == expert; });
    const int slot = kept != 0 ? lowest_bit(kept) : row.nearest_slot(expert, ids, n);
    row.put(weights, slot, row.get(weights, slot) + row.get(mapped, t));
  }
  return weights;
}

// The weights of the `taken` experts, whose gates are `gates`. Where the policy says how much of
// the lost weight stays, they add up to the row's own sum, less what is given up.
template <class Row>
MOE_ROUTING_FN typename Row::Floats weigh(Row& row, const typename Row::Ints& order,
                                          const typename Row::Floats& gates, const Taken& taken) {
  const Call& call = row.call();
  const bool compensates = row.is(kCompensates);
  if (!call.renormalize && !compensates) return gates * call.scale;
  float wanted = row.sum(row.base_weights());
  const float share = row.policy().compensation;
  if (compensates && share < 1.0f) {
    const float total = row.sum(row.gates_of(order, call.top_k));
    const float kept = total > 0.0f ? row.sum_first(gates, taken.own) / total : 1.0f;
    wanted *= kept + share * (1.0f - kept);
  }
  return gates / row.sum(gates) * wanted;
}

// Pass 2. `order` and `decision` are what `decide` made of the row. The row ends with distinct
// experts; its first slot always holds one. A row whose experts have no weight keeps its base.
template <class Row>
MOE_ROUTING_FN void settle(Row& row, const typename Row::Ints& order, const Decision& decision) {
  const Call& call = row.call();
  const typename Row::Ints base = row.base_ids();
  if (!row.is(kReroutes) || keeps_base(row, order, decision.is_whole)) {
    tally(row, base, base, call.top_k);
    return row.copy_base();
  }
  if (call.num_groups > 1) row.reopen();
  typename Row::Ints ids = order;
  Taken taken;
  if (!row.is(kMoves)) taken = take(row, order, decision.num_required, ids);
  int n = taken.count;
  const auto gates = row.gates_of(ids, n);
  typename Row::Floats weights;
  if (row.which([&](int t) { return row.at(gates, t) > 0.0f; }) == 0) {
    n = call.top_k;
    ids = own_slots(row, base, row.get(order, 0));
    weights = row.base_weights();
    if (row.is(kMoves)) move_to_stand_ins(row, ids, weights);
    merge(row, ids, weights);
  } else {
    weights = weigh(row, order, gates, taken);
    if (row.policy().mapped_share > 0.0f) {
      weights = map_weights(row, base, row.base_weights(), ids, n, weights);
    }
  }
  tally(row, base, ids, n);
  const int free_id = call.free_slots == FreeSlots::ignored ? kFree : row.get(ids, 0);
  row.write([&](int t) {
    const bool is_free = t >= n || row.at(ids, t) < 0;
    return Expert{is_free ? free_id : row.at(ids, t), row.at(weights, t)};
  });
}

}  // namespace moe_routing
