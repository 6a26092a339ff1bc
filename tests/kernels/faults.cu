// Kernels with one planted fault each, and the same kernels without it.
//
//   faults CASE faulty|right
//   faults all right
//   faults names               prints the cases that have a fault
//
// Exit status: 0 all results are right, 2 no such case, 3 wrong, 4 the simulator threw an error. A
// sanitizer ends the program with a status of its own.
#include "cuda/portable.cuh"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr unsigned kFullMask = 0xffffffffu;

using Row = int[32];
using TwoRows = int[64];

// ------------------------------------------------------------------------------ Block barriers

template <bool kFaulty>
__global__ void barrier_in_branches(int* out) {
  const bool is_low = threadIdx.x < 16;
  if (kFaulty && is_low) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

template <bool kFaulty>
__global__ void exit_before_barrier(int* out) {
  const bool is_idle = threadIdx.x == 5;
  if (kFaulty && is_idle) {
    return;
  }
  __syncthreads();
  out[threadIdx.x] = 1;
}

template <bool kFaulty>
__global__ void no_barrier_before_read(int* out) {
  SIMT_SHARED(TwoRows, values);
  values[threadIdx.x] = int(threadIdx.x);
  if (!kFaulty) {
    __syncthreads();
  }
  out[threadIdx.x] = values[63 - threadIdx.x];
}

// The second write may come before another warp's read of the first. Here the value is the same, so
// that no schedule shows it.
template <bool kFaulty>
__global__ void no_barrier_before_reuse(int* out) {
  SIMT_SHARED(TwoRows, values);
  values[threadIdx.x] = 1;
  __syncthreads();
  const int first = values[63 - threadIdx.x];
  if (!kFaulty) {
    __syncthreads();
  }
  values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = first + values[63 - threadIdx.x];
}

// ---------------------------------------------------------------------------- Warp collectives

template <bool kFaulty>
__global__ void outside_own_mask(int* out) {
  const unsigned mask = kFaulty ? kFullMask << 1 : kFullMask;
  out[threadIdx.x] = __shfl_sync(mask, int(threadIdx.x), 1);  // !! outside_own_mask
}

template <bool kFaulty>
__global__ void half_warp_missing(int* out) {
  const bool is_low = threadIdx.x < 16;
  const unsigned mask = kFaulty ? kFullMask : 0x0000ffffu;
  int lanes = 0;
  if (is_low) {
    lanes = __popc(__ballot_sync(mask, 1));
  }
  __syncthreads();
  out[threadIdx.x] = lanes;
}

template <bool kFaulty>
__global__ void collectives_differ(int* out) {
  const bool is_odd = threadIdx.x % 2 != 0;
  if (kFaulty && is_odd) {
    out[threadIdx.x] = __any_sync(kFullMask, 1);
  } else {
    out[threadIdx.x] = __all_sync(kFullMask, 1);
  }
}

template <bool kFaulty>
__global__ void masks_differ(int* out) {
  const bool is_low = threadIdx.x < 16;
  const unsigned mask = kFaulty && is_low ? 0x0001ffffu : kFullMask;
  out[threadIdx.x] = __any_sync(mask, 1);
}

template <bool kFaulty>
__global__ void shuffle_from_outside(int* out) {
  const unsigned half = threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u;
  out[threadIdx.x] = __shfl_xor_sync(kFaulty ? half : kFullMask, int(threadIdx.x), 16);
}

template <bool kFaulty>
__global__ void odd_shuffle_width(int* out) {
  out[threadIdx.x] = __shfl_sync(kFullMask, int(threadIdx.x), 0, kFaulty ? 12 : 16);
}

template <bool kFaulty>
__global__ void no_syncwarp(int* out) {
  SIMT_SHARED(Row, values);
  values[threadIdx.x] = int(threadIdx.x);
  if (!kFaulty) {
    __syncwarp();
  }
  out[threadIdx.x] = values[31 - threadIdx.x];
}

// A shuffle makes lanes wait for each other but orders no memory.
template <bool kFaulty>
__global__ void shuffle_for_syncwarp(int* out) {
  SIMT_SHARED(Row, values);
  values[threadIdx.x] = int(threadIdx.x);
  if (kFaulty) {
    __shfl_sync(kFullMask, 0, 0);
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = values[31 - threadIdx.x];
}

// Each half of the warp waits for itself only.
template <bool kFaulty>
__global__ void syncwarp_of_halves(int* out) {
  SIMT_SHARED(Row, values);
  const int source = int(threadIdx.x) ^ (kFaulty ? 16 : 8);
  values[threadIdx.x] = int(threadIdx.x);
  __syncwarp(threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u);
  out[threadIdx.x] = values[source] - source;
}

// ------------------------------------------------------------------------------ Several blocks

template <bool kFaulty>
__global__ void blocks_add(int* out) {
  if (threadIdx.x != 0) {
    return;
  }
  if (kFaulty) {
    out[0] += 1;
  } else {
    atomicAdd(out, 1);
  }
}

// A barrier of each block orders nothing between them.
template <bool kFaulty>
__global__ void blocks_add_after_barrier(int* out) {
  __syncthreads();
  if (threadIdx.x != 0) {
    return;
  }
  if (kFaulty) {
    out[0] += 1;
  } else {
    atomicAdd(out, 1);
  }
}

// Nor do fences without an atomic between them.
template <bool kFaulty>
__global__ void blocks_add_with_fences(int* out) {
  if (threadIdx.x != 0) {
    return;
  }
  __threadfence();
  if (kFaulty) {
    out[0] += 1;
  } else {
    atomicAdd(out, 1);
  }
  __threadfence();
}

enum class Fence { kNone, kBlock, kDevice };

template <Fence kFence>
__device__ void fence() {
  if (kFence == Fence::kBlock) {
    __threadfence_block();
  } else if (kFence == Fence::kDevice) {
    __threadfence();
  }
}

// The block that comes last adds up what all have written.
template <Fence kWriter, Fence kReader>
__global__ void last_block_sums(int* partial, unsigned* arrived, int* out) {
  SIMT_SHARED(bool, is_last);
  SIMT_SHARED(Row, values);
  values[threadIdx.x] = int(threadIdx.x);
  __syncthreads();
  if (threadIdx.x == 0) {
    int sum = 0;
    for (const int value : values) {
      sum += value;
    }
    partial[blockIdx.x] = sum;
    fence<kWriter>();
    is_last = atomicInc(arrived, gridDim.x - 1) == gridDim.x - 1;
    fence<kReader>();
  }
  __syncthreads();
  if (is_last && threadIdx.x < gridDim.x) {
    atomicAdd(out, partial[threadIdx.x]);
  }
}

// As above, with the fences on the far sides of the barriers.
__global__ void last_block_sums_across_barriers(int* partial, unsigned* arrived, int* out) {
  SIMT_SHARED(bool, is_last);
  if (threadIdx.x == 1) {
    partial[blockIdx.x] = 496;
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicInc(arrived, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (is_last && threadIdx.x < gridDim.x) {
    __threadfence();
    atomicAdd(out, partial[threadIdx.x]);
  }
}

// ---------------------------------------------------------------------------- Dependent launch

__global__ void produce(int* values, int first) {
  simt::grid_dependency_launch();
  values[threadIdx.x] = first + int(threadIdx.x);
}

template <bool kWaits>
__global__ void consume(const int* values, int* out) {
  const int mine = int(threadIdx.x);
  if (kWaits) {
    simt::grid_dependency_wait();
  }
  out[threadIdx.x] = values[threadIdx.x] - mine;
}

template <bool kWaits>
__global__ void overwrite(int* values) {
  if (kWaits) {
    simt::grid_dependency_wait();
  }
  values[threadIdx.x] = 8;
}

template <bool kWaits>
__global__ void bystander(int* other) {
  if (kWaits) {
    simt::grid_dependency_wait();
  }
  other[threadIdx.x] = 1;
}

// ------------------------------------------------------------------------------------- Memory

template <bool kFaulty>
__global__ void uninitialised_shared(int* out) {
  SIMT_SHARED(Row, values);
  if (!kFaulty) {
    values[threadIdx.x] = 0;
  }
  out[threadIdx.x] = values[threadIdx.x];
}

struct Pair {
  int first[8];
  int second[8];
};

template <bool kFaulty>
__global__ void index_past_member(int* out) {
  SIMT_SHARED(Pair, pair);
  if (threadIdx.x < 8) {
    pair.second[threadIdx.x] = 0;
  }
  __syncwarp();
  if (threadIdx.x < (kFaulty ? 16 : 8)) {
    pair.first[threadIdx.x] = 1;
  }
  __syncwarp();
  out[threadIdx.x] = pair.second[threadIdx.x % 8];
}

template <bool kFaulty>
__global__ void past_static_shared(int* out) {
  SIMT_SHARED(Row, values);
  int* const value = values + threadIdx.x + (kFaulty ? 1 : 0);
  *value = 7;
  out[threadIdx.x] = *value;
}

template <bool kFaulty>
__global__ void past_dynamic_shared(int* out) {
  SIMT_DYN_SHARED(int, values);
  int* const value = values + threadIdx.x + (kFaulty ? 1 : 0);
  *value = 7;
  out[threadIdx.x] = *value;
}

template <bool kFaulty>
__global__ void misaligned_load(int* out) {
  SIMT_DYN_SHARED(int, values);
  values[threadIdx.x] = 7;
  __syncwarp();
  const int start = kFaulty ? 1 : 2;
  out[threadIdx.x] = int(reinterpret_cast<const uint2*>(values + start)->x);
}

using Large = unsigned char[128 << 10];

template <bool kFaulty>
__global__ void too_much_static_shared(int* out) {
  if (kFaulty) {
    SIMT_SHARED(Large, values);
    values[threadIdx.x] = 1;
  }
  out[threadIdx.x] = 1;
}

__global__ void write_ones(int* out) { out[threadIdx.x] = 1; }

template <bool kFaulty>
__global__ void trap(int* out) {
  if (kFaulty && threadIdx.x == 3) {
    __trap();
  }
  out[threadIdx.x] = 1;
}

// -------------------------------------------------------------------------- What must be right

// Writes how many of its checks failed in each thread.
__global__ void collectives(int* bad) {
  const int lane = int(threadIdx.x % 32);
  const int warps = int(blockDim.x / 32);
  int failed = 0;
  failed += __shfl_sync(kFullMask, lane, 5) != 5;
  failed += __shfl_sync(kFullMask, lane, 5, 8) != (lane & ~7) + 5;
  failed += __shfl_sync(kFullMask, lane, 13, 8) != (lane & ~7) + 5;
  failed += __shfl_up_sync(kFullMask, lane, 1, 8) != (lane % 8 > 0 ? lane - 1 : lane);
  failed += __shfl_up_sync(kFullMask, lane, 3) != (lane >= 3 ? lane - 3 : lane);
  failed += __shfl_down_sync(kFullMask, lane, 3, 16) != (lane % 16 < 13 ? lane + 3 : lane);
  failed += __shfl_xor_sync(kFullMask, float(lane), 16) != float(lane ^ 16);
  failed += __shfl_xor_sync(kFullMask, lane, 8, 4) != (lane & ~8);
  failed += __shfl_xor_sync(kFullMask, 1ull << lane, 1) != 1ull << (lane ^ 1);
  failed += __half2float(__shfl_xor_sync(kFullMask, __float2half(float(lane)), 1)) != (lane ^ 1);
  failed += __ballot_sync(kFullMask, lane % 2) != 0xaaaaaaaau;
  failed += __any_sync(kFullMask, lane == 7) != 1;
  failed += __any_sync(kFullMask, 0) != 0;
  failed += __all_sync(kFullMask, lane >= 0) != 1;
  failed += __all_sync(kFullMask, lane != 7) != 0;
  failed += __match_any_sync(kFullMask, lane % 4) != 0x11111111u << (lane % 4);
  failed += __reduce_add_sync(kFullMask, unsigned(lane)) != 496;
  failed += __reduce_add_sync(kFullMask, -lane) != -496;
  failed += __reduce_min_sync(kFullMask, lane - 5) != -5;
  failed += __reduce_max_sync(kFullMask, -lane - 1) != -1;
  failed += __reduce_min_sync(kFullMask, unsigned(-lane - 1)) != unsigned(-32);
  failed += __reduce_max_sync(kFullMask, unsigned(lane)) != 31;
  failed += __reduce_or_sync(kFullMask, 1u << lane) != kFullMask;
  failed += __reduce_and_sync(kFullMask, ~(1u << lane)) != 0;
  failed += __reduce_xor_sync(kFullMask, 1u << lane % 16) != 0;
  if (lane < 12) {
    failed += __ballot_sync(0xfffu, lane % 2) != 0xaaau;
    failed += __reduce_add_sync(0xfffu, lane) != 66;
    failed += __shfl_down_sync(0xfffu, lane, 1, 4) != (lane % 4 < 3 ? lane + 1 : lane);
    __syncwarp(0xfffu);
  } else if (lane >= 20) {
    failed += __match_any_sync(0xfff00000u, 1) != 0xfff00000u;
    __syncwarp(0xfff00000u);
  }
  failed += __syncthreads_count(lane == 3) != warps;
  failed += __syncthreads_or(int(threadIdx.x) == 40) != (warps > 1);
  failed += __syncthreads_or(0) != 0;
  failed += __syncthreads_and(lane == 3) != 0;
  failed += __syncthreads_and(1) != 1;
  bad[blockIdx.x * blockDim.x + threadIdx.x] = failed;
}

// One warp goes round a loop more often than the other; they meet at the barrier.
__global__ void uneven_warps(int* out) {
  const int warp = int(threadIdx.x / 32);
  int sum = 0;
  for (int i = 0; i <= 3 * warp; ++i) {
    sum += __reduce_add_sync(kFullMask, 1);
  }
  __syncthreads();
  out[threadIdx.x] = sum;
}

struct Counters {
  unsigned up = 0;
  unsigned down = 0;
  unsigned long long wide = 0;
  float real = 0;
  int least = 0;
  int most = 0;
  unsigned bits = 0;
  unsigned flips = 0;
  unsigned locked = 0;
  int less = 0;
};

__global__ void atomics(Counters* counters) {
  const auto i = int(threadIdx.x);
  atomicInc(&counters->up, 9);
  atomicDec(&counters->down, 9);
  atomicAdd(&counters->wide, 1ull << 33);
  atomicAdd(&counters->real, 0.5f);
  atomicMin(&counters->least, -i);
  atomicMax(&counters->most, i);
  atomicOr(&counters->bits, 1u << i % 32);
  atomicXor(&counters->flips, 1u << i % 32);
  atomicSub(&counters->less, 2);
  unsigned seen = 0;
  unsigned expected = 0;
  do {
    expected = seen;
    seen = atomicCAS(&counters->locked, expected, expected + 3);
  } while (seen != expected);
}

__global__ void arithmetic(int* bad) {
  int failed = 0;
  failed += __popc(0xf0u) != 4;
  failed += __popcll(0xf0000000000ull) != 4;
  failed += __ffs(0) != 0 || __ffs(8) != 4;
  failed += __clz(0) != 32 || __clz(1) != 31;
  failed += __clzll(1) != 63;
  failed += __umulhi(0x80000000u, 6) != 3;
  failed += __fmaf_rn(2, 3, 4) != 10;
  failed += fabsf(__expf(1) - 2.7182818f) > 1e-6f;
  failed += __float_as_uint(1.0f) != 0x3f800000u || __uint_as_float(0x3f800000u) != 1;
  failed += min(3u, 5) != 3 || max(-1, 2) != 2 || max(NAN, 1.0f) != 1;
  failed += __half2float(__float2half(1.5f)) != 1.5f;
  failed += __bfloat162float(__float2bfloat16_rn(1.5f)) != 1.5f;
  failed += static_cast<float>(__nv_bfloat16(1.00390625f)) != 1.0f;  // a tie, to even
  bad[0] = failed;
}

template <class T>
__device__ T* scratch() {
  SIMT_SHARED(T, value);
  return &value;
}

// Each instance of a template has its own variable, aligned for its type.
__global__ void shared_of_templates(int* bad) {
  if (threadIdx.x == 0) {
    *scratch<char>() = 1;
    *scratch<double>() = 2;
  }
  __syncthreads();
  const bool is_aligned = reinterpret_cast<uintptr_t>(scratch<uint4>()) % 16 == 0;
  bad[blockIdx.x * blockDim.x + threadIdx.x] =
      *scratch<char>() != 1 || *scratch<double>() != 2 || !is_aligned;
}

__global__ void indices(int* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned i = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
  out[i] += int(i) + 1;
}

// --------------------------------------------------------------------------------------- Cases

using Kernel = void (*)(int*);
using Expected = std::function<int(int)>;

Expected always(int value) {
  return [=](int) { return value; };
}

bool is_right(const std::vector<int>& values, const Expected& expected) {
  for (int i = 0; i < int(values.size()); ++i) {
    if (values[i] != expected(i)) {
      std::fprintf(stderr, "[%d] is %d, expected %d\n", i, values[i], expected(i));
      return false;
    }
  }
  return true;
}

bool check(Kernel kernel, dim3 grid, dim3 block, size_t smem, int count, const Expected& expected) {
  std::vector<int> out(count);
  SIMT_LAUNCH(kernel, grid, block, smem, nullptr, out.data());
  return is_right(out, expected);
}

template <class Kernel>
bool check_last_block(Kernel kernel) {
  constexpr int kBlocks = 7;
  std::vector<int> partial(kBlocks);
  std::vector<int> out(1);
  unsigned arrived = 0;
  SIMT_LAUNCH(kernel, kBlocks, 32, 0, nullptr, partial.data(), &arrived, out.data());
  return arrived == 0 && is_right(out, always(kBlocks * 496));
}

template <bool kWaits>
bool check_dependent_read() {
  std::vector<int> values(32);
  std::vector<int> out(32);
  SIMT_LAUNCH(produce, 1, 32, 0, nullptr, values.data(), 3);
  SIMT_LAUNCH_DEPENDENT(consume<kWaits>, 1, 32, 0, nullptr, values.data(), out.data());
  return cudaGetLastError() == cudaSuccess && is_right(out, always(3));
}

template <bool kWaits>
bool check_dependent_write() {
  std::vector<int> values(32);
  SIMT_LAUNCH(produce, 1, 32, 0, nullptr, values.data(), 3);
  SIMT_LAUNCH_DEPENDENT(overwrite<kWaits>, 1, 32, 0, nullptr, values.data());
  return is_right(values, always(8));
}

// The last grid waits for the one ahead of it, which is no help if that one waited for nothing.
template <bool kWaits>
bool check_dependent_chain() {
  std::vector<int> values(32);
  std::vector<int> other(32);
  std::vector<int> out(32);
  SIMT_LAUNCH(produce, 1, 32, 0, nullptr, values.data(), 3);
  SIMT_LAUNCH_DEPENDENT(bystander<kWaits>, 1, 32, 0, nullptr, other.data());
  SIMT_LAUNCH_DEPENDENT(consume<true>, 1, 32, 0, nullptr, values.data(), out.data());
  return is_right(out, always(3)) && is_right(other, always(1));
}

// After a launch in stream order, or after the host has waited, there is nothing to overlap.
bool check_ends_of_overlap() {
  std::vector<int> values(32);
  std::vector<int> out(32);
  SIMT_LAUNCH(produce, 1, 32, 0, nullptr, values.data(), 3);
  SIMT_LAUNCH_DEPENDENT(overwrite<true>, 1, 32, 0, nullptr, values.data());
  SIMT_LAUNCH(consume<false>, 1, 32, 0, nullptr, values.data(), out.data());
  const bool is_first_right = is_right(out, [](int i) { return 8 - i; });
  cudaStreamSynchronize(nullptr);
  std::vector<int> fresh(32, 5);
  SIMT_LAUNCH_DEPENDENT(consume<false>, 1, 32, 0, nullptr, fresh.data(), out.data());
  return is_first_right && is_right(out, [](int i) { return 5 - i; });
}

bool check_atomics() {
  Counters counters;
  SIMT_LAUNCH(atomics, 3, 64, 0, nullptr, &counters);
  const int n = 3 * 64;
  return counters.up == n % 10 && counters.down == (10 - n % 10) % 10 &&
         counters.wide == (1ull << 33) * n && counters.real == 0.5f * n && counters.least == -63 &&
         counters.most == 63 && counters.bits == kFullMask && counters.flips == 0 &&
         counters.locked == 3 * n && counters.less == -2 * n;
}

// A launch that fails leaves the simulator fit for the next one.
bool check_after_error() {
  try {
    check(half_warp_missing<true>, 1, 32, 0, 32, always(0));
  } catch (const simt::Error&) {
    return check(write_ones, 1, 32, 0, 32, always(1));
  }
  return false;
}

struct Case {
  std::string name;
  std::function<bool()> right;
  std::function<bool()> faulty;  // empty if there is no such fault
};

// A kernel that is right with `right` and has its fault with `faulty`, in one block.
Case twins(const char* name, Kernel right, Kernel faulty, int block, const Expected& expected,
           size_t smem = 0) {
  return {name, [=] { return check(right, 1, block, smem, block, expected); },
          [=] { return check(faulty, 1, block, smem, block, expected); }};
}

// Every one of 5 blocks adds 1 to the same place.
Case adding_twins(const char* name, Kernel right, Kernel faulty) {
  return {name, [=] { return check(right, 5, 32, 0, 1, always(5)); },
          [=] { return check(faulty, 5, 32, 0, 1, always(5)); }};
}

Case launch_twins(const char* name, dim3 grid, dim3 block, size_t smem) {
  return {name, [] { return check(write_ones, 1, 32, 227 << 10, 32, always(1)); },
          [=] { return check(write_ones, grid, block, smem, 32, always(1)); }};
}

template <Fence kWriter, Fence kReader>
Case last_block_twins(const char* name) {
  return {name, [] { return check_last_block(last_block_sums<Fence::kDevice, Fence::kDevice>); },
          [] { return check_last_block(last_block_sums<kWriter, kReader>); }};
}

Case without_fault(const char* name, std::function<bool()> right) {
  return {name, std::move(right), nullptr};
}

#define TWINS(kernel, ...) twins(#kernel, kernel<false>, kernel<true>, __VA_ARGS__)
#define ADDING_TWINS(kernel) adding_twins(#kernel, kernel<false>, kernel<true>)

std::vector<Case> all_cases() {
  const Expected reversed = [](int i) { return 31 - i; };
  const Expected sums = [](int i) { return i < 32 ? 32 : 4 * 32; };
  return {
      TWINS(barrier_in_branches, 32, always(1)),
      TWINS(exit_before_barrier, 32, always(1)),
      TWINS(no_barrier_before_read, 64, [](int i) { return 63 - i; }),
      TWINS(no_barrier_before_reuse, 64, always(2)),

      TWINS(outside_own_mask, 32, always(1)),
      TWINS(half_warp_missing, 32, [](int i) { return i < 16 ? 16 : 0; }),
      TWINS(collectives_differ, 32, always(1)),
      TWINS(masks_differ, 32, always(1)),
      TWINS(shuffle_from_outside, 32, [](int i) { return i ^ 16; }),
      TWINS(odd_shuffle_width, 32, [](int i) { return i / 16 * 16; }),
      TWINS(no_syncwarp, 32, reversed),
      TWINS(shuffle_for_syncwarp, 32, reversed),
      TWINS(syncwarp_of_halves, 32, always(0)),

      ADDING_TWINS(blocks_add),
      ADDING_TWINS(blocks_add_after_barrier),
      ADDING_TWINS(blocks_add_with_fences),
      last_block_twins<Fence::kNone, Fence::kDevice>("last_block_no_writer_fence"),
      last_block_twins<Fence::kDevice, Fence::kNone>("last_block_no_reader_fence"),
      last_block_twins<Fence::kBlock, Fence::kDevice>("last_block_narrow_writer_fence"),
      without_fault("last_block_fences_across_barriers",
                    [] { return check_last_block(last_block_sums_across_barriers); }),

      {"dependent_read", check_dependent_read<true>, check_dependent_read<false>},
      {"dependent_write", check_dependent_write<true>, check_dependent_write<false>},
      {"dependent_chain", check_dependent_chain<true>, check_dependent_chain<false>},
      without_fault("ends_of_overlap", check_ends_of_overlap),

      TWINS(uninitialised_shared, 32, always(0)),
      TWINS(index_past_member, 32, always(0)),
      TWINS(past_static_shared, 32, always(7)),
      TWINS(past_dynamic_shared, 32, always(7), 32 * sizeof(int)),
      TWINS(misaligned_load, 32, always(7), 64 * sizeof(int)),
      TWINS(too_much_static_shared, 32, always(1)),
      TWINS(trap, 32, always(1)),
      launch_twins("too_much_dynamic_shared", 1, 32, (227 << 10) + 1),
      launch_twins("block_too_big", 1, dim3(32, 33), 0),
      launch_twins("grid_too_big", dim3(1, 65536), 32, 0),
      launch_twins("grid_empty", 0, 32, 0),

      without_fault("collectives", [] { return check(collectives, 3, 256, 0, 768, always(0)); }),
      without_fault("uneven_warps", [=] { return check(uneven_warps, 1, 64, 0, 64, sums); }),
      without_fault("atomics", check_atomics),
      without_fault("arithmetic", [] { return check(arithmetic, 1, 1, 0, 1, always(0)); }),
      without_fault("shared_of_templates",
                    [] { return check(shared_of_templates, 2, 32, 0, 64, always(0)); }),
      without_fault("indices",
                    [] {
                      return check(indices, dim3(2, 3, 2), dim3(4, 3, 5), 0, 720,
                                   [](int i) { return i + 1; });
                    }),
      without_fault("after_error", check_after_error),
  };
}

int run_case(const Case& tested, bool is_faulty) {
  try {
    if (is_faulty ? tested.faulty() : tested.right()) {
      return 0;
    }
    std::fprintf(stderr, "%s: wrong\n", tested.name.c_str());
    return 3;
  } catch (const simt::Error& error) {
    std::fprintf(stderr, "%s: error: %s\n", tested.name.c_str(), error.what());
    return 4;
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  const bool is_faulty = argc > 2 && std::strcmp(argv[2], "faulty") == 0;
  bool is_known = name == "names";
  int status = 0;
  for (const Case& tested : all_cases()) {
    const bool has_fault = tested.faulty != nullptr;
    const bool is_chosen = name == "all" ? !is_faulty : name == tested.name;
    if (name == "names" && has_fault) {
      std::printf("%s\n", tested.name.c_str());
    } else if (is_chosen && (has_fault || !is_faulty)) {
      is_known = true;
      status = std::max(status, run_case(tested, is_faulty));
    }
  }
  return is_known ? status : 2;
}
