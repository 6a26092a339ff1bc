// Run CUDA C++ kernel source on a CPU, one fiber per CUDA thread. Included by
// csrc/cuda/portable.cuh, which lists the names that a kernel's source keeps to.
//
// Modelled: block barriers with and without votes, __syncwarp, shuffles, votes, matches and
// reductions of a warp with their masks and widths, atomics, fences, static and dynamic shared
// memory, dependent launches, and half and bfloat16 through NVIDIA's own headers. Shared memory
// starts as garbage. Misuse that hangs a GPU or is undefined there throws simt::Error. Built with
// ThreadSanitizer, only what orders memory on a GPU counts as order: races are reported whether or
// not this run's schedule made them matter.
//
// NOT modelled: weak memory ordering (a load never returns an old value), inline PTX, asynchronous
// copies, clusters, cooperative grids, textures, streams beside each other, and blocks that run at
// the same time: a block that spins until another one writes never ends. Approximate intrinsics
// such as __expf round as the CPU does. It tests the source, not what nvcc makes of it. Only
// x86-64 was tried. See README.md.
#pragma once

#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __shared__ static_assert(false, "shared memory is declared with SIMT_SHARED");
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

// The address of the static variable identifies the declaration, per template instance.
#define SIMT_SHARED(T, name)           \
  static char simt_identity_of_##name; \
  T& name = *static_cast<T*>(::simt::static_shared(&simt_identity_of_##name, sizeof(T), alignof(T)))
#define SIMT_DYN_SHARED(T, name) T* const name = static_cast<T*>(::simt::dynamic_shared())

#define threadIdx (::simt::running->thread_index)
#define blockIdx (::simt::running->block_index)
#define blockDim (::simt::shape.block)
#define gridDim (::simt::shape.grid)
#define warpSize 32

// Last parameters of everything that reports where it was called. Two of them: only as a default
// argument itself does each builtin speak of the call.
#define SIMT_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SIMT_SITE (::simt::Site{file, line})

namespace simt {

// Misuse of CUDA by the kernel or its launch. The message names the thread and the source line.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Read at each launch.
struct Options {
  // 0 runs threads and blocks in order. Any other number shuffles blocks, gives warps random
  // speeds and interrupts threads at atomics and fences. Starts as $SIMT_SEED.
  uint64_t seed;
  // Whether __syncthreads after a thread of the block has returned is an error, as CUDA says it
  // is, although GPUs let it pass.
  bool strict_exit = true;
};
extern Options options;

extern uint64_t num_launches;  // grids run so far

struct Site {
  const char* file;
  int line;
};

// The part of a CUDA thread that kernels read.
struct ThreadView {
  uint3 thread_index;
  uint3 block_index;
};
extern ThreadView* running;

struct Shape {
  dim3 grid;
  dim3 block;
  size_t dynamic_bytes;
};
extern Shape shape;

enum class WarpOperation {
  kShuffle,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kBallot,
  kAny,
  kAll,
  kMatchAny,
  kAdd,
  kMinSigned,
  kMaxSigned,
  kMinUnsigned,
  kMaxUnsigned,
  kAnd,
  kOr,
  kXor,
  kSync,
};

// What one lane brings to a collective operation of its warp.
struct WarpCall {
  WarpOperation operation;
  unsigned mask;
  uint64_t value = 0;
  int argument = 0;  // lane or distance of a shuffle
  int width = 32;    // of a shuffle
};

struct BarrierVotes {
  bool any;
  bool all;
  int count;
};

uint64_t warp_collective(const WarpCall& call, Site caller);
BarrierVotes block_barrier(bool vote, Site caller);
void device_fence();
void block_fence();
void before_atomic();
void maybe_yield();
void* static_shared(const void* identity, size_t bytes, size_t alignment);
void* dynamic_shared();
void grid_dependency_wait();
inline void grid_dependency_launch() {}  // the dependent grid starts afterwards anyway
[[noreturn]] void trap(Site caller);

// Runs the grid; `invoke` gets a copy of the `bytes` at `call`.
void run_grid(Order order, const Shape& shape, void (*invoke)(const void*), const void* call,
              size_t bytes);

template <class... Parameters, class... Arguments>
cudaError_t launch(Order order, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t smem,
                   cudaStream_t, Arguments... arguments) {
  const auto call = [=] { kernel(static_cast<Parameters>(arguments)...); };
  using Call = std::remove_const_t<decltype(call)>;
  static_assert(std::is_trivially_copyable_v<Call>, "kernel arguments are copied as bytes");
  const auto invoke = [](const void* copy) { (*static_cast<const Call*>(copy))(); };
  run_grid(order, {grid, block, smem}, invoke, &call, sizeof(call));
  return cudaSuccess;
}

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(static_cast<void*>(&to), &from, sizeof(to));
  return to;
}

// Lanes exchange values as 64 bits; unused ones are zero, so that equal values compare equal.
template <class T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t packed = 0;
  std::memcpy(&packed, &value, sizeof(value));
  return packed;
}

template <class T>
T unpack(uint64_t packed) {
  T value;
  std::memcpy(static_cast<void*>(&value), &packed, sizeof(value));
  return value;
}

template <class T>
T shuffle(WarpOperation operation, unsigned mask, T value, int argument, int width, Site caller) {
  return unpack<T>(warp_collective({operation, mask, pack(value), argument, width}, caller));
}

template <class T>
T reduce(WarpOperation operation, unsigned mask, T value, Site caller) {
  return unpack<T>(warp_collective({operation, mask, pack(value)}, caller));
}

// Replaces *address by update(*address) and returns the old value. Relaxed, as CUDA's atomics are.
template <class T, class Update>
T atomic_update(T* address, Update update) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  typedef Bits __attribute__((may_alias)) AliasingBits;
  auto* const bits = reinterpret_cast<AliasingBits*>(address);
  before_atomic();
  Bits old = __atomic_load_n(bits, __ATOMIC_RELAXED);
  while (true) {
    const Bits updated = bit_cast<Bits>(static_cast<T>(update(bit_cast<T>(old))));
    if (__atomic_compare_exchange_n(bits, &old, updated, false, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED)) {
      return bit_cast<T>(old);
    }
  }
}

// Integers wrap around on a GPU; signed ones must not overflow on the way.
template <class T>
T wrapping_add(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    using Unsigned = std::make_unsigned_t<T>;
    return static_cast<T>(static_cast<Unsigned>(a) + static_cast<Unsigned>(b));
  } else {
    return a + b;
  }
}

template <class T>
using NotDeduced = std::common_type_t<T>;

}  // namespace simt

// Warp collectives.

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SIMT_CALLER) {
  return simt::shuffle(simt::WarpOperation::kShuffle, mask, value, lane, width, SIMT_SITE);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_CALLER) {
  return simt::shuffle(simt::WarpOperation::kShuffleUp, mask, value, int(delta), width, SIMT_SITE);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_CALLER) {
  return simt::shuffle(simt::WarpOperation::kShuffleDown, mask, value, int(delta), width,
                       SIMT_SITE);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, SIMT_CALLER) {
  return simt::shuffle(simt::WarpOperation::kShuffleXor, mask, value, lane_mask, width, SIMT_SITE);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_CALLER) {
  const auto operation = simt::WarpOperation::kBallot;
  return unsigned(simt::warp_collective({operation, mask, predicate != 0}, SIMT_SITE));
}

inline int __any_sync(unsigned mask, int predicate, SIMT_CALLER) {
  const auto operation = simt::WarpOperation::kAny;
  return int(simt::warp_collective({operation, mask, predicate != 0}, SIMT_SITE));
}

inline int __all_sync(unsigned mask, int predicate, SIMT_CALLER) {
  const auto operation = simt::WarpOperation::kAll;
  return int(simt::warp_collective({operation, mask, predicate != 0}, SIMT_SITE));
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value, SIMT_CALLER) {
  const auto operation = simt::WarpOperation::kMatchAny;
  return unsigned(simt::warp_collective({operation, mask, simt::pack(value)}, SIMT_SITE));
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value, SIMT_CALLER) {
  return simt::reduce(simt::WarpOperation::kAdd, mask, value, SIMT_SITE);
}

inline int __reduce_add_sync(unsigned mask, int value, SIMT_CALLER) {
  return simt::reduce(simt::WarpOperation::kAdd, mask, value, SIMT_SITE);
}

inline unsigned __reduce_min_sync(unsigned mask, unsigned value, SIMT_CALLER) {
  return simt::reduce(simt::WarpOperation::kMinUnsigned, mask, value, SIMT_SITE);
}

inline int __reduce_min_sync(unsigned mask, int value, SIMT_CALLER) {
  return simt::reduce(simt::WarpOperation::kMinSigned, mask, value, SIMT_SITE);
}

inline unsigned __reduce_max_sync(unsigned mask, unsigned value, SIMT_CALLER) {
  return simt::reduce(simt::WarpOperation::kMaxUnsigned, mask, value, SIMT_SITE);
}

inline int __reduce_max_sync(unsigned mask, int value, SIMT_CALLER) {
  return simt::reduce(simt::WarpOperation::kMaxSigned, mask, value, SIMT_SITE);
}

inline unsigned __reduce_and_sync(unsigned mask, unsigned value, SIMT_CALLER) {
  return simt::reduce(simt::WarpOperation::kAnd, mask, value, SIMT_SITE);
}

inline unsigned __reduce_or_sync(unsigned mask, unsigned value, SIMT_CALLER) {
  return simt::reduce(simt::WarpOperation::kOr, mask, value, SIMT_SITE);
}

inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, SIMT_CALLER) {
  return simt::reduce(simt::WarpOperation::kXor, mask, value, SIMT_SITE);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_CALLER) {
  simt::warp_collective({simt::WarpOperation::kSync, mask}, SIMT_SITE);
}

// Block barriers, fences, and the rest of what orders or stops threads.

inline void __syncthreads(SIMT_CALLER) { simt::block_barrier(false, SIMT_SITE); }

inline int __syncthreads_or(int predicate, SIMT_CALLER) {
  return simt::block_barrier(predicate != 0, SIMT_SITE).any;
}

inline int __syncthreads_and(int predicate, SIMT_CALLER) {
  return simt::block_barrier(predicate != 0, SIMT_SITE).all;
}

inline int __syncthreads_count(int predicate, SIMT_CALLER) {
  return simt::block_barrier(predicate != 0, SIMT_SITE).count;
}

inline void __threadfence() { simt::device_fence(); }
inline void __threadfence_block() { simt::block_fence(); }
inline void __nanosleep(unsigned) { simt::maybe_yield(); }
inline void __trap(SIMT_CALLER) { simt::trap(SIMT_SITE); }
inline void cudaGridDependencySynchronize() { simt::grid_dependency_wait(); }
inline void cudaTriggerProgrammaticLaunchCompletion() { simt::grid_dependency_launch(); }

// Atomics: each returns the old value.

template <class T>
T atomicAdd(T* address, simt::NotDeduced<T> value) {
  return simt::atomic_update(address, [=](T old) { return simt::wrapping_add(old, value); });
}

template <class T>
T atomicSub(T* address, simt::NotDeduced<T> value) {
  static_assert(std::is_integral_v<T>);
  return simt::atomic_update(address, [=](T old) {
    using Unsigned = std::make_unsigned_t<T>;
    return static_cast<Unsigned>(old) - static_cast<Unsigned>(value);
  });
}

template <class T>
T atomicMin(T* address, simt::NotDeduced<T> value) {
  return simt::atomic_update(address, [=](T old) { return value < old ? value : old; });
}

template <class T>
T atomicMax(T* address, simt::NotDeduced<T> value) {
  return simt::atomic_update(address, [=](T old) { return old < value ? value : old; });
}

template <class T>
T atomicAnd(T* address, simt::NotDeduced<T> value) {
  return simt::atomic_update(address, [=](T old) { return old & value; });
}

template <class T>
T atomicOr(T* address, simt::NotDeduced<T> value) {
  return simt::atomic_update(address, [=](T old) { return old | value; });
}

template <class T>
T atomicXor(T* address, simt::NotDeduced<T> value) {
  return simt::atomic_update(address, [=](T old) { return old ^ value; });
}

template <class T>
T atomicExch(T* address, simt::NotDeduced<T> value) {
  return simt::atomic_update(address, [=](T) { return value; });
}

template <class T>
T atomicCAS(T* address, simt::NotDeduced<T> expected, simt::NotDeduced<T> value) {
  return simt::atomic_update(address, [=](T old) { return old == expected ? value : old; });
}

// Counts 0, 1, ... last, 0, 1, ...
inline unsigned atomicInc(unsigned* address, unsigned last) {
  return simt::atomic_update(address, [=](unsigned old) { return old >= last ? 0u : old + 1; });
}

// Counts last, ... 1, 0, last, ...
inline unsigned atomicDec(unsigned* address, unsigned last) {
  return simt::atomic_update(address,
                             [=](unsigned old) { return old == 0 || old > last ? last : old - 1; });
}

// Loads, bits and arithmetic.

template <class T>
T __ldg(const T* address) {
  return *address;
}

template <class T>
T __ldcg(const T* address) {
  return *address;
}

inline unsigned __float_as_uint(float x) { return simt::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return simt::bit_cast<float>(x); }
inline int __float_as_int(float x) { return simt::bit_cast<int>(x); }
inline float __int_as_float(int x) { return simt::bit_cast<float>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::isinf;
using std::isnan;

template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
  using Common = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<Common>) {
    return std::fmin(Common(a), Common(b));  // a NaN gives way to a number
  } else {
    return Common(b) < Common(a) ? Common(b) : Common(a);
  }
}

template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
  using Common = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<Common>) {
    return std::fmax(Common(a), Common(b));
  } else {
    return Common(a) < Common(b) ? Common(b) : Common(a);
  }
}
