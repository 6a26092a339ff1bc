// Kernels and launchers. What is launched depends on the call's shapes and types only; nothing is
// allocated, and nothing is read back: safe under CUDA-graph capture.
//
//   up to kOneBlockRows rows: one launch of one block; the barrier between the passes is the
//     block's own
//   beyond: two launches. Each block of the first writes its own part of U and of the demand, so
//     that nothing has to be zeroed beforehand; each block of the second gathers all parts. The
//     second may start early (programmatic dependent launch) and ranks its first row while the
//     first still runs.
#pragma once
#include "warp_row.cuh"

namespace moe_routing::cuda {

constexpr int kOneBlockRows = 16;  // a warp each; beyond, two launches are faster
constexpr int kWarps = 8;
constexpr int kMaxBlocks = 128;

// The workspace of the two-launch form. A block's demand is there if it wants more than 0 experts.
struct Workspace {
  unsigned num_done;
  int wanted[kMaxBlocks];
  int num_moved[kMaxBlocks];
  uint32_t required[kMaxBlocks][kUnionWords];
  uint32_t before[kMaxBlocks][kUnionWords];
  uint32_t after[kMaxBlocks][kUnionWords];
  uint32_t demand[kMaxBlocks][kMaxExperts];
};
constexpr int kWorkspaceWords = 147456;
static_assert(sizeof(Workspace) <= 4 * kWorkspaceWords, "callers allocate kWorkspaceWords");

template <int kPerLane>
__device__ __forceinline__ void clear(Shared& shared) {
  if (threadIdx.x < kUnionWords) {
    shared.required[threadIdx.x] = 0;
    shared.before[threadIdx.x] = 0;
    shared.after[threadIdx.x] = 0;
  }
  for (int j = threadIdx.x; j < kPerLane * kWarp; j += blockDim.x) shared.demand[j] = 0;
  if (threadIdx.x == 0) shared.wanted = shared.num_live = shared.num_moved = 0;
}

// The table is small; which entries a row needs is known two memory accesses later.
__device__ __forceinline__ void expect_policies(const Call& call) {
  const int bytes = call.num_policies * call.num_steps * static_cast<int>(sizeof(Policy));
  const int at = static_cast<int>(threadIdx.x) * kCacheLine;
  if (at < bytes) prefetch(reinterpret_cast<const char*>(call.policies) + at);
}

// The most demanded experts join U, ties to the lower id. The work of one warp.
template <int kPerLane>
__device__ __forceinline__ void fill_union(const Call& call, Shared& shared) {
  const int lane = threadIdx.x % kWarp;
  uint32_t demand[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) demand[i] = shared.demand[i * kWarp + lane];
  const auto count = [&](uint32_t least) {
    int total = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) total += demand[i] >= least;
    return __reduce_add_sync(kAll, total);
  };
  const uint32_t least = least_demand(shared.wanted, call.num_rows, count);
  int spare = shared.wanted - count(least + 1);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const unsigned equal = __ballot_sync(kAll, demand[i] == least);
    const bool joins = demand[i] == least && popcount(equal & ((1u << lane) - 1)) < spare;
    const unsigned joining = __ballot_sync(kAll, demand[i] > least || joins);
    spare -= popcount(equal);
    if (lane == 0) shared.required[i] |= joining;
  }
}

__device__ __forceinline__ void write_union(const Call& call, const Shared& shared) {
  for (int j = threadIdx.x; j < call.num_experts; j += blockDim.x) {
    call.out_union[j] = has(shared.required, j);
  }
}

// What the free slots of padded rows name; -1, or an expert that is active anyway.
__device__ __forceinline__ int padding_id(const Call& call, const Shared& shared) {
  if (call.free_slots == FreeSlots::ignored) return kFree;
  for (int i = 0; i < kUnionWords; ++i) {
    if (shared.required[i] != 0) return i * kWarp + __ffs(static_cast<int>(shared.required[i])) - 1;
  }
  return 0;
}

__device__ __forceinline__ void pad_row(const Call& call, int row, const Shared& shared) {
  const int lane = threadIdx.x % kWarp;
  if (lane >= call.top_k) return;
  store_id(call.out_ids, row, lane, padding_id(call, shared));
  store_float(call.out_weights, row, lane, 0.0f);
}

template <int kPerLane>
__device__ __forceinline__ void add_statistics(const Call& call, const uint32_t* required,
                                               const uint32_t* before, const uint32_t* after,
                                               int num_live, int num_moved) {
  if (num_live == 0) return;
  int active = 0;
  int active_base = 0;
  int critical = 0;
  for (int i = 0; i < kPerLane; ++i) {
    active += popcount(after[i]);
    active_base += popcount(before[i]);
    critical += popcount(after[i] & ~required[i]);
  }
  call.statistics[kCalls] += 1;
  call.statistics[kRows] += num_live;
  call.statistics[kActive] += active;
  call.statistics[kActiveBase] += active_base;
  call.statistics[kMovedSlots] += num_moved;
  call.statistics[kCritical] += critical;
}

template <bool kPacked, int kPerLane>
__global__ void __launch_bounds__(kOneBlockRows* kWarp, 1)
    route_one_block(const __grid_constant__ Call call) {
  SIMT_SHARED(Shared, shared);
  const int thread = threadIdx.x;
  const int row = thread / kWarp;
  expect_policies(call);
  clear<kPerLane>(shared);
  const bool is_live = thread < call.num_rows && call.policy_ids[thread] != kPad;
  const int num_live = __syncthreads_count(is_live);
  const int step = find_step(call, num_live);
  const int policy_id = row < call.num_rows ? call.policy_ids[row] : kPad;
  WarpRow<kPacked, kPerLane> live(call, find_policy(call, policy_id, step), row, shared, true);
  int order = 0;
  Decision decision;
  if (policy_id != kPad) decision = decide(live, order);
  __syncthreads();
  if (shared.wanted > 0) {
    if (row == 0) fill_union<kPerLane>(call, shared);
    __syncthreads();
  }
  if (policy_id != kPad) {
    settle(live, order, decision);
  } else if (row < call.num_rows) {
    pad_row(call, row, shared);
  }
  write_union(call, shared);
  if (call.statistics == nullptr) return;
  __syncthreads();
  if (thread == 0) {
    add_statistics<kPerLane>(call, shared.required, shared.before, shared.after, num_live,
                             shared.num_moved);
  }
}

// Every block counts all rows: cheaper than another launch that counts them once.
__device__ __forceinline__ int count_live(const Call& call, Shared& shared) {
  int mine = 0;
  for (int row = threadIdx.x; row < call.num_rows; row += blockDim.x) {
    mine += call.policy_ids[row] != kPad;
  }
  const int total = __reduce_add_sync(kAll, mine);
  if (threadIdx.x % kWarp == 0) atomicAdd(&shared.num_live, total);
  __syncthreads();
  return shared.num_live;
}

template <bool kPacked, int kPerLane>
__global__ void __launch_bounds__(kWarps* kWarp, 1) decide_rows(const __grid_constant__ Call call) {
  SIMT_SHARED(Shared, shared);
  simt::grid_dependency_launch();
  Workspace& workspace = *reinterpret_cast<Workspace*>(call.workspace);
  expect_policies(call);
  clear<kPerLane>(shared);
  __syncthreads();
  const int step = call.num_steps > 1 ? find_step(call, count_live(call, shared)) : 0;
  const int stride = gridDim.x * kWarps;
  for (int row = blockIdx.x * kWarps + threadIdx.x / kWarp; row < call.num_rows; row += stride) {
    const int policy_id = call.policy_ids[row];
    if (policy_id == kPad) continue;
    WarpRow<kPacked, kPerLane> live(call, find_policy(call, policy_id, step), row, shared, true);
    int order = 0;
    decide(live, order);
  }
  __syncthreads();
  if (threadIdx.x < kUnionWords) {
    workspace.required[blockIdx.x][threadIdx.x] = shared.required[threadIdx.x];
  }
  if (threadIdx.x == 0) workspace.wanted[blockIdx.x] = shared.wanted;
  if (blockIdx.x == 0 && threadIdx.x == 0) workspace.num_done = 0;
  if (shared.wanted == 0) return;
  for (int j = threadIdx.x; j < kPerLane * kWarp; j += blockDim.x) {
    workspace.demand[blockIdx.x][j] = shared.demand[j];
  }
}

// The union over blocks of one word of their sets. Every lane of the warp gets it.
__device__ __forceinline__ uint32_t gather(const uint32_t (*parts)[kUnionWords], int word) {
  uint32_t found = 0;
  for (int block = threadIdx.x % kWarp; block < static_cast<int>(gridDim.x); block += kWarp) {
    found |= parts[block][word];
  }
  return __reduce_or_sync(kAll, found);
}

// What all blocks require and want. Ends with a barrier.
template <int kPerLane>
__device__ __forceinline__ void gather_required(const Workspace& workspace, Shared& shared) {
  for (int word = threadIdx.x / kWarp; word < kPerLane; word += kWarps) {
    const uint32_t found = gather(workspace.required, word);
    if (threadIdx.x % kWarp == 0) shared.required[word] = found;
  }
  for (int block = threadIdx.x; block < static_cast<int>(gridDim.x); block += blockDim.x) {
    if (workspace.wanted[block] > 0) atomicMax(&shared.wanted, workspace.wanted[block]);
  }
  __syncthreads();
}

// The demand that all blocks have found. Ends with a barrier.
template <int kPerLane>
__device__ __forceinline__ void gather_demand(const Workspace& workspace, Shared& shared) {
  const int lane = threadIdx.x % kWarp;
  uint32_t demand[kPerLane] = {};
  for (unsigned block = threadIdx.x / kWarp; block < gridDim.x; block += kWarps) {
    if (workspace.wanted[block] == 0) continue;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) demand[i] += workspace.demand[block][i * kWarp + lane];
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (demand[i] > 0) atomicAdd(&shared.demand[i * kWarp + lane], demand[i]);
  }
  __syncthreads();
}

// The last block to finish adds up what all blocks found.
template <int kPerLane>
__device__ __forceinline__ void finish_statistics(const Call& call, Workspace& workspace,
                                                  Shared& shared, int num_live) {
  __syncthreads();
  if (threadIdx.x < kUnionWords) {
    workspace.before[blockIdx.x][threadIdx.x] = shared.before[threadIdx.x];
    workspace.after[blockIdx.x][threadIdx.x] = shared.after[threadIdx.x];
  }
  if (threadIdx.x == 0) workspace.num_moved[blockIdx.x] = shared.num_moved;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.is_last = atomicInc(&workspace.num_done, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!shared.is_last) return;
  __threadfence();
  for (int word = threadIdx.x / kWarp; word < kPerLane; word += kWarps) {
    const uint32_t before = gather(workspace.before, word);
    const uint32_t after = gather(workspace.after, word);
    if (threadIdx.x % kWarp == 0) {
      shared.before[word] = before;
      shared.after[word] = after;
    }
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  int num_moved = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) num_moved += workspace.num_moved[block];
  add_statistics<kPerLane>(call, shared.required, shared.before, shared.after, num_live, num_moved);
}

template <bool kPacked, int kPerLane>
__global__ void __launch_bounds__(kWarps* kWarp, 1) settle_rows(const __grid_constant__ Call call) {
  SIMT_SHARED(Shared, shared);
  Workspace& workspace = *reinterpret_cast<Workspace*>(call.workspace);
  const int warp = threadIdx.x / kWarp;
  clear<kPerLane>(shared);
  __syncthreads();
  const bool counts = call.num_steps > 1 || call.statistics != nullptr;
  const int num_live = counts ? count_live(call, shared) : 0;
  const int step = find_step(call, num_live);
  bool waits = true;
  const int stride = gridDim.x * kWarps;
  // every warp comes by at least once, rows or not: the block meets at the barrier inside
  for (int row = blockIdx.x * kWarps + warp; waits || row < call.num_rows; row += stride) {
    const int policy_id = row < call.num_rows ? call.policy_ids[row] : kPad;
    WarpRow<kPacked, kPerLane> live(call, find_policy(call, policy_id, step), row, shared, false);
    int order = 0;
    Decision decision;
    if (policy_id != kPad) decision = decide(live, order);
    if (waits) {
      simt::grid_dependency_wait();
      gather_required<kPerLane>(workspace, shared);
      if (shared.wanted > 0) {
        gather_demand<kPerLane>(workspace, shared);
        if (warp == 0) fill_union<kPerLane>(call, shared);
        __syncthreads();
      }
      waits = false;
    }
    if (policy_id != kPad) {
      settle(live, order, decision);
    } else if (row < call.num_rows) {
      pad_row(call, row, shared);
    }
  }
  if (blockIdx.x == 0) write_union(call, shared);
  if (call.statistics != nullptr) finish_statistics<kPerLane>(call, workspace, shared, num_live);
}

template <bool kPacked, int kPerLane>
cudaError_t launch(const Call& call, cudaStream_t stream) {
  if (call.num_rows <= kOneBlockRows) {
    const dim3 block((call.num_rows < 1 ? 1 : call.num_rows) * kWarp);
    return SIMT_LAUNCH((route_one_block<kPacked, kPerLane>), dim3(1), block, 0, stream, call);
  }
  const int wanted = (call.num_rows + kWarps - 1) / kWarps;
  const dim3 grid(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  const dim3 block(kWarps * kWarp);
  const cudaError_t error =
      SIMT_LAUNCH((decide_rows<kPacked, kPerLane>), grid, block, 0, stream, call);
  if (error != cudaSuccess) return error;
  return SIMT_LAUNCH_DEPENDENT((settle_rows<kPacked, kPerLane>), grid, block, 0, stream, call);
}

template <bool kPacked>
cudaError_t launch_for_experts(const Call& call, cudaStream_t stream) {
  if (call.num_experts <= 64) return launch<kPacked, 2>(call, stream);
  if (call.num_experts <= 128) return launch<kPacked, 4>(call, stream);
  if (call.num_experts <= 256) return launch<kPacked, 8>(call, stream);
  if (call.num_experts <= 512) return launch<kPacked, 16>(call, stream);
  return launch<kPacked, 32>(call, stream);
}

// Run one call on `stream`. All pointers of `call` are device memory; `workspace` is needed above
// kOneBlockRows rows.
inline cudaError_t route(const Call& call, cudaStream_t stream) {
  const bool is_packed =
      call.scores.type != FloatType::float32 && call.bias == nullptr && call.num_groups == 1;
  return is_packed ? launch_for_experts<true>(call, stream)
                   : launch_for_experts<false>(call, stream);
}

}  // namespace moe_routing::cuda
