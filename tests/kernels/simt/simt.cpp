// The scheduler behind simt.h.
//
// Every CUDA thread of a block is a fiber. A block runs until all its fibers have returned, then
// the next block runs; only one fiber runs at a time, on the caller's OS thread. A fiber gives way
// when it waits at a barrier or in a collective, and at random at atomics and fences.
//
// For ThreadSanitizer, compile this file with -DSIMT_TSAN and without -fsanitize=thread: what the
// scheduler itself reads and writes must not be seen.
#include "cuda/portable.cuh"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_UCONTEXT
#endif
#ifdef SIMT_UCONTEXT
#include <ucontext.h>
#endif

#ifdef SIMT_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* object);
void __tsan_release(void* object);
}
#endif

namespace simt {
namespace {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kWarpSize;
constexpr size_t kMaxShared = 227 << 10;  // of a block on 9.0 and 10.0, with opting in
constexpr size_t kMaxStaticShared = 48 << 10;
constexpr size_t kMaxParameterBytes = 32764;
constexpr size_t kMaxSharedVariables = 64;

// Fresh memory, in place of what is there if told where.
void* map_memory(size_t bytes, void* where = nullptr) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (where ? MAP_FIXED : 0);
  void* const memory = mmap(where, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) {
    throw Error("cannot map " + std::to_string(bytes) + " bytes");
  }
  return memory;
}

// ------------------------------------------------------------------------- What TSan is told
//
// To TSan each CUDA thread is a thread of its own, and switching fibers orders nothing. What does
// order memory on a GPU is told to it by releasing to and acquiring from objects: what a thread did
// before it releases comes before what another one does after it acquires. Elsewhere all of this
// does nothing.
namespace race {

using Identity = void*;

#ifdef SIMT_TSAN
constexpr bool kModelled = true;
constexpr unsigned kSwitchOrdersNothing = 1;
constexpr size_t kObjectBytes = 8;

Identity current() { return __tsan_get_current_fiber(); }
Identity create() { return __tsan_create_fiber(0); }  // knows what the current one knows
void destroy(Identity identity) {
  if (identity != nullptr) {
    __tsan_destroy_fiber(identity);
  }
}
void become(Identity identity) { __tsan_switch_to_fiber(identity, kSwitchOrdersNothing); }
void acquire(void* object) { __tsan_acquire(object); }
void release(void* object) { __tsan_release(object); }

// Objects are addresses and never used again: an object remembers all that was released to it.
// Later ones have higher addresses.
char* new_objects(size_t count) {
  constexpr size_t kBytes = size_t{1} << 34;  // only addresses; the memory is never touched
  static char* next = static_cast<char*>(map_memory(kBytes));
  static char* const end = next + kBytes;
  char* const first = next;
  next += count * kObjectBytes;
  if (next > end) {
    throw Error("too many launches for one process under ThreadSanitizer");
  }
  return first;
}
char* object_at(char* first, size_t index) { return first + index * kObjectBytes; }

// Identities are slow to make, and TSan has only about 8000. One that is used again passes for
// ordered after whatever it did before, so all are used once before any is used again.
constexpr size_t kMaxIdentities = 6000;
std::array<Identity, kMaxIdentities> identities;
size_t taken = 0;

// An identity that knows what was released to the object; the current one must have done that.
Identity take(char* object) {
  Identity& identity = identities[taken++ % kMaxIdentities];
  if (identity == nullptr) {
    identity = create();
    return identity;
  }
  const Identity giver = current();
  become(identity);
  acquire(object);
  become(giver);
  return identity;
}

// What the identities did is known to all from here on.
void take_from_the_first() { taken = 0; }
#else
constexpr bool kModelled = false;

Identity current() { return nullptr; }
Identity create() { return nullptr; }
void become(Identity) {}
void acquire(void*) {}
void release(void*) {}
char* new_objects(size_t) { return nullptr; }
char* object_at(char*, size_t) { return nullptr; }
void destroy(Identity) {}
Identity take(char*) { return nullptr; }
void take_from_the_first() {}
#endif

}  // namespace race

// ----------------------------------------------------------------------------------- Threads

enum class State { kReady, kAtBarrier, kInCollective, kExited };

struct Fiber {
#ifdef SIMT_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // of ASan
  race::Identity identity = nullptr;
};

struct Thread : ThreadView {
  Fiber fiber;
  int index = 0;
  int warp = 0;
  int lane = 0;
  State state = State::kExited;
  Site site = {nullptr, 0};  // where it waits or waited last
  WarpCall call = {};
  bool vote = false;
  uint64_t collective_result = 0;
  BarrierVotes barrier_result = {};
  char* publication = nullptr;  // the newest one that its atomics have seen; see device_fence
};

Thread host;
std::array<Thread, kMaxThreads> threads;
int block_threads;    // threads of the running block
int live_threads;     // those that have not returned
int waiting_threads;  // those at the barrier
std::string failure;

Thread* self() { return static_cast<Thread*>(running); }

bool is_same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

std::string describe(const Thread& thread) {
  const unsigned mask = thread.state == State::kInCollective ? thread.call.mask : 0;
  const uint3 block = thread.block_index;
  std::array<char, 128> text;
  std::snprintf(text.data(), text.size(),
                "block (%u,%u,%u) thread %d (warp %d lane %d) mask %08x at ", block.x, block.y,
                block.z, thread.index, thread.warp, thread.lane, mask);
  const std::string file = thread.site.file ? thread.site.file : "?";
  return text.data() + file + ":" + std::to_string(thread.site.line);
}

// ------------------------------------------------------------------------- Switching fibers

#ifndef SIMT_UCONTEXT
// Saves the registers that a call preserves on the current stack and takes them from the other.
__attribute__((naked, noinline)) void switch_stacks(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp\n"
      "pushq %rbx\n"
      "pushq %r12\n"
      "pushq %r13\n"
      "pushq %r14\n"
      "pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n"
      "popq %r14\n"
      "popq %r13\n"
      "popq %r12\n"
      "popq %rbx\n"
      "popq %rbp\n"
      "ret\n");
}
constexpr size_t kSavedRegisters = 6;
#endif

enum class Leaving { kForNow, kForGood };

void switch_to(Thread* next, [[maybe_unused]] Leaving leaving = Leaving::kForNow) {
  Thread* const previous = self();
  if (previous == next) {
    return;
  }
#ifdef __SANITIZE_ADDRESS__
  void** const keep = leaving == Leaving::kForGood ? nullptr : &previous->fiber.fake_stack;
  __sanitizer_start_switch_fiber(keep, next->fiber.stack, next->fiber.stack_bytes);
#endif
  race::become(next->fiber.identity);
  running = next;
#ifdef SIMT_UCONTEXT
  swapcontext(&previous->fiber.context, &next->fiber.context);
#else
  switch_stacks(&previous->fiber.stack_pointer, next->fiber.stack_pointer);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(self()->fiber.fake_stack, nullptr, nullptr);
#endif
}

// ------------------------------------------------------------------- The grid that is running

struct Grid {
  void (*invoke)(const void*) = nullptr;
  race::Identity launcher = nullptr;   // threads start knowing what it knows
  char* completion = nullptr;          // threads release to it when they return
  char* primary_completion = nullptr;  // of the grid that this one may overlap
  race::Identity courier = nullptr;    // see before_atomic
  char* publication = nullptr;
};
Grid grid;
// A copy of the call, as CUDA makes one. Written where TSan does not look: to a dependent grid the
// host's later writes are unordered, but its own arguments are not.
alignas(64) unsigned char parameters[kMaxParameterBytes];
// The host as it was before the grids that a dependent launch may overlap.
race::Identity host_before_overlap = nullptr;
bool can_overlap = false;

// Gives up on the grid; run_grid throws the message on the host's stack.
[[noreturn]] void fail(std::string message) {
  failure = std::move(message);
  switch_to(&host);
  std::abort();
}

// ---------------------------------------------------------------------------------- Schedule

uint64_t random_state;
std::array<uint64_t, kMaxWarps> warp_speeds;

uint64_t next_random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

// Threads that can run, in a ring.
class ReadyQueue {
 public:
  void clear() { head_ = size_ = 0; }
  bool is_empty() const { return size_ == 0; }
  unsigned size() const { return size_; }
  Thread*& operator[](unsigned i) { return ring_[(head_ + i) % kMaxThreads]; }

  void push(Thread* thread) {
    thread->state = State::kReady;
    (*this)[size_++] = thread;
  }

  Thread* pop() {
    Thread* const thread = (*this)[0];
    head_ = (head_ + 1) % kMaxThreads;
    --size_;
    return thread;
  }

 private:
  std::array<Thread*, kMaxThreads> ring_;
  unsigned head_ = 0;
  unsigned size_ = 0;
};
ReadyQueue ready;

// Warps get random speeds, so that some run far ahead: a fast one among a few candidates is next.
void shuffle_next() {
  constexpr int kCandidates = 12;
  constexpr int kSpeedChangesEvery = 256;
  unsigned best = next_random() % ready.size();
  for (int i = 0; i < kCandidates; ++i) {
    const unsigned candidate = next_random() % ready.size();
    if (warp_speeds[ready[candidate]->warp] > warp_speeds[ready[best]->warp]) {
      best = candidate;
    }
  }
  std::swap(ready[0], ready[best]);
  if (next_random() % kSpeedChangesEvery == 0) {
    warp_speeds[next_random() % kMaxWarps] = next_random();
  }
}

[[noreturn]] void fail_with_deadlock() {
  constexpr int kListed = 4;
  std::string message = "deadlock: no thread can run; waiting:";
  int waiting = 0;
  for (int i = 0; i < block_threads; ++i) {
    if (threads[i].state != State::kExited && waiting++ < kListed) {
      message += "\n  " + describe(threads[i]);
    }
  }
  if (waiting > kListed) {
    message += "\n  ... " + std::to_string(waiting - kListed) + " more";
  }
  fail(message);
}

// Lets another thread run; the current one waits or has returned.
void run_next(Leaving leaving = Leaving::kForNow) {
  if (ready.is_empty()) {
    if (live_threads > 0) {
      fail_with_deadlock();
    }
    switch_to(&host, leaving);
    return;
  }
  if (options.seed != 0) {
    shuffle_next();
  }
  switch_to(ready.pop(), leaving);
}

// ---------------------------------------------------------------------------- Block barriers

// Objects of the running block for the race model.
struct BlockObjects {
  char* start;  // the launcher releases to it
  char* barrier;
  char* block_fence;
  char* device_fence;
  bool has_unpublished_fence;
  char* first_thread;  // one for each thread

  void renew() {
    start = race::new_objects(1);
    barrier = race::new_objects(1);
    block_fence = race::new_objects(1);
    device_fence = race::new_objects(1);
    has_unpublished_fence = false;
    first_thread = race::new_objects(size_t(block_threads));
  }
};
BlockObjects objects;

// Orders what each of the waiting threads did so far before what each of them does from now on.
// The threads need not run for it: the current one speaks for all.
void order_all(Thread* const* group, int count, char* object) {
  if (!race::kModelled) {
    return;
  }
  char* publication = nullptr;
  for (int i = 0; i < count; ++i) {
    race::become(group[i]->fiber.identity);
    race::release(object);
    publication = std::max(publication, group[i]->publication);
  }
  for (int i = 0; i < count; ++i) {
    race::become(group[i]->fiber.identity);
    race::acquire(object);
    group[i]->publication = publication;
  }
  race::become(self()->fiber.identity);
}

void check_barrier(Thread* const* group, int count) {
  const Thread& first = *group[0];
  for (int i = 1; i < count; ++i) {
    if (!is_same(group[i]->site, first.site)) {
      fail("divergent __syncthreads: " + describe(first) + " but " + describe(*group[i]));
    }
  }
  if (options.strict_exit && count != block_threads) {
    const std::string exited = std::to_string(block_threads - count);
    fail("__syncthreads after " + exited + " thread(s) exited: " + describe(first));
  }
}

// All threads that still run are at the barrier.
void open_barrier() {
  static std::array<Thread*, kMaxThreads> group;  // not on the small stack of a fiber
  int count = 0;
  int votes = 0;
  for (int i = 0; i < block_threads; ++i) {
    if (threads[i].state == State::kAtBarrier) {
      group[count++] = &threads[i];
      votes += threads[i].vote;
    }
  }
  check_barrier(group.data(), count);
  order_all(group.data(), count, objects.barrier);
  waiting_threads = 0;
  for (int i = 0; i < count; ++i) {
    group[i]->barrier_result = {votes > 0, votes == count, votes};
    ready.push(group[i]);
  }
}

// --------------------------------------------------------------------------- Warp collectives

bool has(unsigned mask, int lane) { return mask >> lane & 1u; }

bool is_shuffle(WarpOperation operation) {
  return operation == WarpOperation::kShuffle || operation == WarpOperation::kShuffleUp ||
         operation == WarpOperation::kShuffleDown || operation == WarpOperation::kShuffleXor;
}

uint32_t combine(WarpOperation operation, uint32_t a, uint32_t b) {
  switch (operation) {
    case WarpOperation::kAdd:
      return a + b;
    case WarpOperation::kMinSigned:
      return uint32_t(std::min(int32_t(a), int32_t(b)));
    case WarpOperation::kMaxSigned:
      return uint32_t(std::max(int32_t(a), int32_t(b)));
    case WarpOperation::kMinUnsigned:
      return std::min(a, b);
    case WarpOperation::kMaxUnsigned:
      return std::max(a, b);
    case WarpOperation::kAnd:
      return a & b;
    case WarpOperation::kOr:
      return a | b;
    case WarpOperation::kXor:
      return a ^ b;
    default:
      return a;
  }
}

// The thread of a lane of the warp, or null if it has returned or the block has no such lane.
Thread* live_lane(int warp, int lane) {
  const int index = warp * kWarpSize + lane;
  const bool is_live = index < block_threads && threads[index].state != State::kExited;
  return is_live ? &threads[index] : nullptr;
}

// Whether all lanes that the caller's mask names wait in a collective that names the caller. One
// that has returned may be named; it is left out.
bool has_everyone_arrived(const Thread& caller) {
  for (unsigned rest = caller.call.mask; rest != 0; rest &= rest - 1) {
    const Thread* const thread = live_lane(caller.warp, __builtin_ctz(rest));
    if (thread == nullptr) {
      continue;
    }
    if (thread->state != State::kInCollective || !has(thread->call.mask, caller.lane)) {
      return false;
    }
  }
  return true;
}

// The lanes of a warp that take part in one collective, once all have arrived.
class WarpGroup {
 public:
  explicit WarpGroup(const Thread& caller) : caller_(caller) {
    for (unsigned rest = caller.call.mask; rest != 0; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      Thread* const thread = live_lane(caller.warp, lane);
      if (thread != nullptr) {
        members_ |= 1u << lane;
        list_[count_++] = thread;
      }
    }
  }

  void complete() {
    for (const Thread* thread : *this) {
      check_same_call(*thread);
    }
    if (caller_.call.operation == WarpOperation::kSync) {
      synchronise();
    }
    compute();
    for (Thread* thread : *this) {
      if (thread == self() && thread->state != State::kExited) {
        thread->state = State::kReady;  // it came last and runs on
      } else {
        ready.push(thread);
      }
    }
  }

  Thread* const* begin() const { return list_.data(); }
  Thread* const* end() const { return list_.data() + count_; }

 private:
  // Only __syncwarp may be called from several places at once.
  void check_same_call(const Thread& thread) const {
    const WarpCall& mine = caller_.call;
    const WarpCall& other = thread.call;
    const bool is_sync = mine.operation == WarpOperation::kSync;
    if (mine.operation != other.operation || mine.mask != other.mask ||
        !(is_sync || is_same(caller_.site, thread.site))) {
      fail("warp collective mismatch: " + describe(caller_) + " but " + describe(thread));
    }
  }

  // The object is the first lane's own: that lane takes part in whatever uses it, so nothing
  // released to it earlier is news to it.
  void synchronise() const {
    order_all(begin(), count_, race::object_at(objects.first_thread, list_[0]->index));
  }

  void compute() {
    const WarpOperation operation = caller_.call.operation;
    const bool is_each_its_own = is_shuffle(operation) || operation == WarpOperation::kMatchAny;
    const uint64_t common = is_each_its_own ? 0 : voted_or_reduced();
    for (Thread* thread : *this) {
      if (is_shuffle(operation)) {
        thread->collective_result = shuffled(*thread);
      } else if (operation == WarpOperation::kMatchAny) {
        thread->collective_result = matching(*thread);
      } else {
        thread->collective_result = common;
      }
    }
  }

  uint64_t shuffled(const Thread& thread) const {
    const int source = source_lane(thread);
    if (!has(members_, source)) {
      fail("shuffle reads lane " + std::to_string(source) +
           ", which is not taking part: " + describe(thread));
    }
    return threads[thread.warp * kWarpSize + source].call.value;
  }

  // As the PTX instruction shfl.sync has it.
  static int source_lane(const Thread& thread) {
    const WarpCall& call = thread.call;
    const int width = call.width;
    if (width < 1 || width > kWarpSize || (width & (width - 1)) != 0) {
      fail("shuffle width " + std::to_string(width) +
           " is not a power of two up to 32: " + describe(thread));
    }
    const int lane = thread.lane;
    const int first = lane & ~(width - 1);
    const int argument = call.argument & (kWarpSize - 1);
    switch (call.operation) {
      case WarpOperation::kShuffleUp:
        return lane - argument >= first ? lane - argument : lane;
      case WarpOperation::kShuffleDown:
        return lane + argument < first + width ? lane + argument : lane;
      case WarpOperation::kShuffleXor:
        return (lane ^ argument) < first + width ? lane ^ argument : lane;
      default:
        return first + (argument & (width - 1));
    }
  }

  uint64_t matching(const Thread& thread) const {
    uint64_t lanes = 0;
    for (const Thread* other : *this) {
      lanes |= uint64_t{other->call.value == thread.call.value} << other->lane;
    }
    return lanes;
  }

  uint64_t voted_or_reduced() const {
    const WarpOperation operation = caller_.call.operation;
    unsigned ballot = 0;
    auto reduced = uint32_t(list_[0]->call.value);
    for (const Thread* thread : *this) {
      const uint64_t value = thread->call.value;
      ballot |= unsigned{value != 0} << thread->lane;
      reduced = thread == list_[0] ? reduced : combine(operation, reduced, uint32_t(value));
    }
    switch (operation) {
      case WarpOperation::kBallot:
        return ballot;
      case WarpOperation::kAny:
        return ballot != 0;
      case WarpOperation::kAll:
        return ballot == members_;
      default:
        return reduced;
    }
  }

  const Thread& caller_;
  unsigned members_ = 0;
  int count_ = 0;
  std::array<Thread*, kWarpSize> list_ = {};
};

void complete_collective_of(const Thread& caller) {
  if (has_everyone_arrived(caller)) {
    WarpGroup(caller).complete();
  }
}

// ------------------------------------------------------------------------------ Shared memory

// Sanitizers stop a kernel that writes between the variables, and TSan must forget the last block.
class SharedMemory {
 public:
  void renew() {
    constexpr size_t kBytes = 2 * kMaxShared;
    if (race::kModelled || memory_ == nullptr) {
      memory_ = static_cast<unsigned char*>(map_memory(kBytes, memory_));
    }
#ifdef __SANITIZE_ADDRESS__
    ASAN_POISON_MEMORY_REGION(memory_, kBytes);
#endif
    next_ = memory_ + kRedzone;
    end_ = memory_ + kBytes;
    static_bytes_ = 0;
    count_ = 0;
    dynamic_ = take(shape.dynamic_bytes, kRedzone);
  }

  void* dynamic() const { return dynamic_; }

  void* variable(const void* identity, size_t bytes, size_t alignment) {
    for (size_t i = 0; i < count_; ++i) {
      if (variables_[i].identity == identity) {
        return variables_[i].memory;
      }
    }
    static_bytes_ += bytes;
    if (static_bytes_ > kMaxStaticShared || static_bytes_ + shape.dynamic_bytes > kMaxShared) {
      fail("too much shared memory: " + std::to_string(static_bytes_) + " bytes static and " +
           std::to_string(shape.dynamic_bytes) + " dynamic");
    }
    void* const memory = take(bytes, std::max(alignment, kAlignment));
    if (memory == nullptr || count_ == kMaxSharedVariables) {
      fail("too many variables in shared memory");
    }
    variables_[count_++] = {identity, memory};
    return memory;
  }

 private:
  struct Variable {
    const void* identity;
    void* memory;
  };
  static constexpr size_t kAlignment = 16;
  static constexpr size_t kRedzone = 64;

  void* take(size_t bytes, size_t alignment) {
    const auto start = reinterpret_cast<uintptr_t>(next_);
    unsigned char* const memory = next_ + (alignment - start % alignment) % alignment;
    if (memory + bytes + kRedzone > end_) {
      return nullptr;
    }
    next_ = memory + bytes + kRedzone;
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
#endif
    fill_with_garbage(memory, bytes);
    return memory;
  }

  // Neither zero nor NaN, which could pass for right: -2.6e36 as a float, -67372037 as an int.
  // Volatile, so that it does not become a call of memset, which TSan would see.
  static void fill_with_garbage(volatile unsigned char* memory, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i) {
      memory[i] = 0xFB;
    }
  }

  unsigned char* memory_ = nullptr;
  unsigned char* next_ = nullptr;
  unsigned char* end_ = nullptr;
  void* dynamic_ = nullptr;
  size_t static_bytes_ = 0;
  std::array<Variable, kMaxSharedVariables> variables_;
  size_t count_ = 0;
};
SharedMemory shared_memory;

// -------------------------------------------------------------------------- Life of a thread

// A thread that returns may be the one that others were waiting for.
void leave_block(Thread* thread) {
  thread->state = State::kExited;
  --live_threads;
  race::release(grid.completion);
  if (live_threads > 0 && waiting_threads == live_threads) {
    open_barrier();
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int index = thread->warp * kWarpSize + lane;
    if (index < block_threads && threads[index].state == State::kInCollective) {
      complete_collective_of(threads[index]);
    }
  }
}

[[noreturn]] void thread_main() {
#ifdef __SANITIZE_ADDRESS__
  const void* came_from = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &came_from, &bytes);
  if (host.fiber.stack == nullptr) {  // the first fiber to run comes from the host
    host.fiber.stack = came_from;
    host.fiber.stack_bytes = bytes;
  }
#endif
  grid.invoke(parameters);
  leave_block(self());
  run_next(Leaving::kForGood);
  std::abort();
}

// TSan pays for every byte of a stack in every block.
constexpr size_t kStackBytes = race::kModelled ? 64 << 10 : 256 << 10;
constexpr size_t kGuardBytes = 4096;

void prepare_stack(Fiber& fiber) {
  if (race::kModelled && fiber.stack != nullptr) {
    // Mapped again, so that TSan forgets who wrote there.
    map_memory(kStackBytes, const_cast<void*>(fiber.stack));
  }
  if (fiber.stack == nullptr) {
    char* const memory = static_cast<char*>(map_memory(kGuardBytes + kStackBytes));
    mprotect(memory, kGuardBytes, PROT_NONE);
    fiber.stack = memory + kGuardBytes;
    fiber.stack_bytes = kStackBytes;
  }
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack, kStackBytes);
#endif
}

void prepare_fiber(Fiber& fiber) {
  fiber.identity = race::take(objects.start);
  void* const stack = const_cast<void*>(fiber.stack);
#ifdef SIMT_UCONTEXT
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, thread_main, 0);
#else
  void** const top = static_cast<void**>(stack) + kStackBytes / sizeof(void*);
  top[-1] = nullptr;  // where thread_main would return to; aligns its stack as a call does
  top[-2] = reinterpret_cast<void*>(&thread_main);
  fiber.stack_pointer = top - 2 - kSavedRegisters;
#endif
}

// --------------------------------------------------------------------------- Blocks and grids

void prepare_thread(Thread& thread, int index, uint3 block_index) {
  const dim3 block = shape.block;
  const auto i = unsigned(index);
  prepare_fiber(thread.fiber);
  thread.index = index;
  thread.warp = index / kWarpSize;
  thread.lane = index % kWarpSize;
  thread.thread_index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
  thread.block_index = block_index;
  thread.site = {nullptr, 0};
  thread.publication = nullptr;
}

// To TSan mapping memory is writing to it: the launcher does it before it releases to the threads.
void prepare_block(uint3 block_index) {
  race::become(grid.launcher);
  objects.renew();
  shared_memory.renew();
  for (int i = 0; i < block_threads; ++i) {
    prepare_stack(threads[i].fiber);
  }
  race::release(objects.start);
  for (int i = 0; i < block_threads; ++i) {
    prepare_thread(threads[i], i, block_index);
    ready.push(&threads[i]);
  }
  race::become(host.fiber.identity);
}

// The host goes on after an error, and may free what they have written.
void release_abandoned_threads() {
  for (int i = 0; i < block_threads; ++i) {
    race::become(threads[i].fiber.identity);
    race::release(grid.completion);
  }
  race::become(host.fiber.identity);
}

void run_block(uint3 block_index) {
  block_threads = int(shape.block.x * shape.block.y * shape.block.z);
  live_threads = block_threads;
  waiting_threads = 0;
  ready.clear();
  failure.clear();
  for (uint64_t& speed : warp_speeds) {
    speed = next_random();
  }
  prepare_block(block_index);
  running = &host;
  run_next();
  running = nullptr;
  if (!failure.empty()) {
    release_abandoned_threads();
  }
}

std::vector<uint3> block_order() {
  std::vector<uint3> order;
  for (unsigned z = 0; z < shape.grid.z; ++z) {
    for (unsigned y = 0; y < shape.grid.y; ++y) {
      for (unsigned x = 0; x < shape.grid.x; ++x) {
        order.push_back({x, y, z});
      }
    }
  }
  if (options.seed != 0) {
    for (size_t i = order.size(); i > 1; --i) {
      std::swap(order[i - 1], order[next_random() % i]);
    }
  }
  return order;
}

std::string as_text(dim3 d) {
  return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
}

void check_launch(const Shape& asked, size_t parameter_bytes) {
  const dim3 grid_size = asked.grid;
  const dim3 block = asked.block;
  const bool is_empty = grid_size.x == 0 || grid_size.y == 0 || grid_size.z == 0 || block.x == 0 ||
                        block.y == 0 || block.z == 0;
  const bool is_big = grid_size.x > 0x7fffffffu || grid_size.y > 65535 || grid_size.z > 65535 ||
                      block.z > 64 || uint64_t(block.x) * block.y > kMaxThreads ||
                      block.x * block.y * block.z > kMaxThreads;
  if (is_empty || is_big) {
    throw Error(std::string("launch configuration ") + (is_empty ? "empty" : "too big") +
                ": grid " + as_text(grid_size) + ", block " + as_text(block));
  }
  if (asked.dynamic_bytes > kMaxShared) {
    throw Error("too much shared memory: " + std::to_string(asked.dynamic_bytes) +
                " bytes dynamic");
  }
  if (parameter_bytes > kMaxParameterBytes) {
    throw Error("kernel parameters too big: " + std::to_string(parameter_bytes) + " bytes");
  }
}

void copy_parameters(const void* call, size_t bytes) {
  volatile unsigned char* const to = parameters;  // volatile: see fill_with_garbage
  for (size_t i = 0; i < bytes; ++i) {
    to[i] = static_cast<const unsigned char*>(call)[i];
  }
}

// From here on there is nothing that a dependent launch could overlap: the host knows what all
// grids did.
void end_overlap() {
  can_overlap = false;
  race::take_from_the_first();
}

// Brings up to date the identity that knows what the host knows now.
void remember_host() {
  char* const now = race::new_objects(1);
  race::release(now);
  if (host_before_overlap == nullptr) {
    host_before_overlap = race::create();
  }
  race::become(host_before_overlap);
  race::acquire(now);
  race::become(host.fiber.identity);
}

// A dependent grid starts from what the host knew before the grids that it may overlap, and so not
// with what they did.
void prepare_grid(Order order, void (*invoke)(const void*)) {
  host.fiber.identity = race::current();
  host.fiber.stack = nullptr;  // another OS thread may have launched last
  const bool overlaps = order == Order::kDependent && can_overlap;
  if (!overlaps) {
    end_overlap();
    remember_host();
    can_overlap = true;
  }
  char* const previous_completion = grid.completion;
  race::destroy(grid.courier);
  grid = {};
  grid.invoke = invoke;
  grid.launcher = overlaps ? host_before_overlap : host.fiber.identity;
  grid.completion = race::new_objects(1);
  grid.primary_completion = overlaps ? previous_completion : nullptr;
}

uint64_t seed_from_environment() {
  const char* const text = std::getenv("SIMT_SEED");
  return text == nullptr ? 0 : std::strtoull(text, nullptr, 10);
}

}  // namespace

// ------------------------------------------------------------------------- What simt.h declares

Options options = {seed_from_environment()};
uint64_t num_launches = 0;
ThreadView* running = nullptr;
Shape shape = {};

uint64_t warp_collective(const WarpCall& call, Site caller) {
  Thread* const thread = self();
  thread->call = call;
  thread->site = caller;
  thread->state = State::kInCollective;
  if (!has(call.mask, thread->lane)) {
    fail("calling lane is not in its own mask: " + describe(*thread));
  }
  complete_collective_of(*thread);
  if (thread->state == State::kInCollective) {
    run_next();
  }
  return thread->collective_result;
}

BarrierVotes block_barrier(bool vote, Site caller) {
  Thread* const thread = self();
  thread->vote = vote;
  thread->site = caller;
  thread->state = State::kAtBarrier;
  if (++waiting_threads == live_threads) {
    open_barrier();
  }
  run_next();
  return thread->barrier_result;
}

void maybe_yield() {
  constexpr int kYieldsEvery = 4;
  if (options.seed != 0 && next_random() % kYieldsEvery == 0) {
    ready.push(self());
    run_next();
  }
}

// On a GPU a fence orders nothing by itself: one thread's fence and later atomic pair with another
// thread's atomic on the same address and later fence. Here a fence makes what happened before it
// fit for publication, the next atomic of its block publishes it, an atomic sees all publications
// so far, and the fence after it makes them known. Barriers pass on what a thread has seen.
void device_fence() {
  Thread* const thread = self();
  if (thread->publication != nullptr) {
    race::acquire(thread->publication);
  }
  race::release(objects.device_fence);
  objects.has_unpublished_fence = true;
  maybe_yield();
}

// Passes on what the fences of the block have released, to a new object. The identity that does it
// knows nothing else of the grid but the earlier publications.
void publish_fences() {
  if (grid.courier == nullptr) {
    race::become(grid.launcher);
    grid.courier = race::create();
  }
  grid.publication = race::new_objects(1);
  race::become(grid.courier);
  race::acquire(objects.device_fence);
  race::release(grid.publication);
  race::become(self()->fiber.identity);
  objects.has_unpublished_fence = false;
}

void before_atomic() {
  maybe_yield();
  if (!race::kModelled) {
    return;
  }
  if (objects.has_unpublished_fence) {
    publish_fences();
  }
  self()->publication = grid.publication;
}

// Simpler than device_fence: it orders all threads of a block that call it, in the order of calls.
void block_fence() {
  race::acquire(objects.block_fence);
  race::release(objects.block_fence);
  maybe_yield();
}

void* static_shared(const void* identity, size_t bytes, size_t alignment) {
  return shared_memory.variable(identity, bytes, alignment);
}

void* dynamic_shared() { return shared_memory.dynamic(); }

void grid_dependency_wait() {
  if (grid.primary_completion != nullptr) {
    race::acquire(grid.primary_completion);
  }
}

void trap(Site caller) {
  self()->site = caller;
  fail("__trap: " + describe(*self()));
}

void run_grid(Order order, const Shape& asked, void (*invoke)(const void*), const void* call,
              size_t bytes) {
  if (running != nullptr) {
    fail("launch inside a kernel: " + describe(*self()));
  }
  check_launch(asked, bytes);
  shape = asked;
  ++num_launches;
  random_state = options.seed * 0x9E3779B97F4A7C15ull | 1;  // an even zero would stay zero
  copy_parameters(call, bytes);
  prepare_grid(order, invoke);
  for (const uint3& block_index : block_order()) {
    run_block(block_index);
    if (!failure.empty()) {
      break;
    }
  }
  race::acquire(grid.completion);  // only now: the blocks of a grid are unordered
  if (!failure.empty()) {
    throw Error(failure);
  }
}

}  // namespace simt

// ------------------------------------------------------- The part of the runtime API that is here

extern "C" {

cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaSuccess ? "cudaSuccess" : "an error that the simulator does not give";
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "an error that the simulator does not give";
}

cudaError_t cudaDeviceSynchronize() {
  simt::end_overlap();
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaDeviceSynchronize(); }

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  simt::end_overlap();
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

}  // extern "C"
