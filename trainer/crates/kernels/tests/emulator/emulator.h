// CUDA's words for a host compiler, and what stands behind them: the threads of a block as fibers that take turns, so that a
// kernel runs as it is written, barriers and shuffles included. x86-64 only.
//
// A thread runs until it waits for others. The same launch is run in several orders, of threads, warps and blocks, and must leave
// the same bits: where it does not, a barrier is missing. Every buffer is copied to memory that ends at a page that nobody may
// touch, so that an access outside is seen. What a kernel only writes, shared memory at the start of each block, and the bytes
// between a buffer and that page hold other numbers in each order: whoever reads them gives himself away.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define EMULATED 1
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
// All in one section, whose bounds the linker knows.
#define __shared__ static __attribute__((section("phx_shared")))

extern "C" {
extern char __start_phx_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_phx_shared[] __attribute__((weak, visibility("hidden")));
void phx_switch(void** from, void* to) __attribute__((visibility("hidden")));
}

// Saves what a call must keep, changes stacks, and goes on where the other one was.
asm(R"(
.text
.hidden phx_switch
.globl phx_switch
.type phx_switch,@function
phx_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size phx_switch,.-phx_switch
)");

struct Dim {
  unsigned x, y, z;
};

namespace emulation {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kPage = 4096;
constexpr int kMaxArguments = 32;
constexpr int kOrders = 3;

// What Rust hands over; the same in emulator/mod.rs.
struct Argument {
  const void* value;  // the bytes of a number, or the address of a buffer
  uint64_t bytes;     // of the number, or of the buffer
  uint32_t is_buffer;
  uint32_t access;  // of a buffer: 1 read, 2 written, 3 both
};
struct Launch {
  Dim grid;
  uint32_t threads;
  uint32_t num_arguments;
  const Argument* arguments;
};

enum class State { kReady, kBarrier, kShuffle, kDone };

struct Fiber {
  void* stack_pointer;
  Dim thread;
  State state;
  const void* given;  // what the lane shows the others
  void* taken;        // where it wants what it gets
  size_t size;
  int from;  // the lane it reads
  int kind;  // which call it waits in
};

static Fiber fibers[kMaxThreads];
static Fiber* volatile current;  // changes under a thread whenever it waits
static void* scheduler;
static char* stacks;
static Dim block_index, block_size, grid_size;
static char problem[512];
static sigjmp_buf escape;
static volatile sig_atomic_t running;
static void (*kernel)(void** values);
static void** kernel_values;

// What memory holds that nobody has written, in each order: NaN in every format, a huge number, a small one.
static const int kFill[kOrders] = {0xff, 0x7e, 0x3d};

static void report(const char* format, ...) {
  if (problem[0]) return;
  va_list list;
  va_start(list, format);
  vsnprintf(problem, sizeof problem, format, list);
  va_end(list);
}

static void wait_as(State state) {
  current->state = state;
  phx_switch(&current->stack_pointer, scheduler);
}

static void enter() {
  kernel(kernel_values);
  wait_as(State::kDone);
  abort();  // nobody takes up a thread that is done
}

static void start(Fiber& fiber, int index) {
  char* top = stacks + (index + 1) * kStackBytes;
  void** at = (void**)top;
  *--at = nullptr;         // keeps the stack aligned as after a call
  *--at = (void*)&enter;   // what `ret` goes to
  for (int i = 0; i < 6; i++) *--at = nullptr;
  fiber = Fiber{};
  fiber.stack_pointer = at;
  fiber.thread = Dim{(unsigned)index, 0, 0};
  fiber.state = State::kReady;
}

// The i-th thread (or block) of `count` in an order: up, down, or mixed by a step that shares no factor with the count.
static uint64_t place(int order, uint64_t i, uint64_t count) {
  if (order == 0) return i;
  if (order == 1) return count - 1 - i;
  uint64_t step = count / 2 + 7;
  for (;; step++) {
    uint64_t a = step, b = count;
    while (b) {
      uint64_t rest = a % b;
      a = b;
      b = rest;
    }
    if (a == 1) break;
  }
  return (i * step + count / 3) % count;
}

// Exchanges between the lanes of a warp, where all have come to the same shuffle.
static bool release_shuffle(Fiber* warp) {
  for (int i = 0; i < kWarpSize; i++)
    if (warp[i].state != State::kShuffle || warp[i].kind != warp[0].kind || warp[i].size != warp[0].size) return false;
  for (int i = 0; i < kWarpSize; i++) memcpy(warp[i].taken, warp[warp[i].from].given, warp[i].size);
  for (int i = 0; i < kWarpSize; i++) warp[i].state = State::kReady;
  return true;
}

// Lets all threads go on, where all have come to a barrier.
static bool release_barrier(int threads) {
  int at_barrier = 0, done = 0;
  for (int i = 0; i < threads; i++) {
    at_barrier += fibers[i].state == State::kBarrier;
    done += fibers[i].state == State::kDone;
  }
  if (at_barrier < threads) {
    report("block (%u, %u): %d of %d threads wait at a barrier, %d have left the kernel, the others wait in shuffles",
           block_index.x, block_index.y, at_barrier, threads, done);
    return false;
  }
  for (int i = 0; i < threads; i++) fibers[i].state = State::kReady;
  return true;
}

// Runs the lanes of a warp until each waits; whether any ran, or could go on then.
static bool run_warp(Fiber* warp, int order) {
  bool moved = false;
  for (int i = 0; i < kWarpSize; i++) {
    Fiber& fiber = warp[place(order, i, kWarpSize)];
    if (fiber.state != State::kReady) continue;
    current = &fiber;
    phx_switch(&scheduler, fiber.stack_pointer);
    moved = true;
  }
  return release_shuffle(warp) || moved;
}

// In the first order the warps keep step with each other; in the others each runs ahead as far as it can, to the next barrier of
// the block, so that what a slower one still wants to read is overwritten where no barrier keeps it.
static void run_block(int order, int threads) {
  if (__start_phx_shared) memset(__start_phx_shared, kFill[order], __stop_phx_shared - __start_phx_shared);
  for (int i = 0; i < threads; i++) start(fibers[i], i);
  int warps = threads / kWarpSize;
  for (;;) {
    bool moved = false;
    for (int i = 0; i < warps; i++) {
      Fiber* warp = fibers + place(order, i, warps) * kWarpSize;
      while (run_warp(warp, order)) {
        moved = true;
        if (order == 0) break;
      }
    }
    if (moved) continue;
    int done = 0;
    for (int i = 0; i < threads; i++) done += fibers[i].state == State::kDone;
    if (done == threads || !release_barrier(threads)) return;
  }
}

// Buffers that overlap are one region, as in the caller's memory.
struct Region {
  const char* original;
  size_t bytes;
  uint32_t access;
  char* mapped;
  size_t mapped_bytes;
  char* copy;
  char* first_result;
};

struct Memory {
  Region regions[kMaxArguments];
  int count = 0;

  void add(const char* from, size_t bytes, uint32_t access) {
    if (bytes == 0) return;
    const char* to = from + bytes;
    for (int i = 0; i < count; i++) {
      Region& other = regions[i];
      const char* end = other.original + other.bytes;
      if (from >= end || to <= other.original) continue;
      if (other.original < from) from = other.original;
      if (end > to) to = end;
      access |= other.access;
      other = regions[--count];
      i = -1;  // the larger one may reach others
    }
    regions[count++] = Region{from, (size_t)(to - from), access, nullptr, 0, nullptr, nullptr};
  }

  // Ends less than 16 bytes before the page that nobody may touch, at the same place of 16 bytes as the original.
  void map() {
    for (int i = 0; i < count; i++) {
      Region& region = regions[i];
      size_t inside = (region.bytes + 16 + kPage - 1) / kPage * kPage;
      region.mapped_bytes = inside + 2 * kPage;
      region.mapped = (char*)mmap(nullptr, region.mapped_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      mprotect(region.mapped + kPage, inside, PROT_READ | PROT_WRITE);
      char* end = region.mapped + kPage + inside;
      size_t slack = ((uintptr_t)(end - region.bytes) - (uintptr_t)region.original) & 15;
      region.copy = end - region.bytes - slack;
      region.first_result = (char*)malloc(region.bytes);
    }
  }

  void fill(int order) {
    for (int i = 0; i < count; i++) {
      Region& region = regions[i];
      memset(region.mapped + kPage, kFill[order], region.mapped_bytes - 2 * kPage);
      if (region.access & 1) memcpy(region.copy, region.original, region.bytes);
    }
  }

  void* find(const char* original) {
    for (int i = 0; i < count; i++)
      if (original >= regions[i].original && original < regions[i].original + regions[i].bytes)
        return regions[i].copy + (original - regions[i].original);
    return nullptr;
  }

  // What the run of one order left behind.
  void check(int order) {
    for (int i = 0; i < count; i++) {
      Region& region = regions[i];
      for (char* at = region.mapped + kPage; at < region.mapped + region.mapped_bytes - kPage; at++)
        if ((at < region.copy || at >= region.copy + region.bytes) && *at != (char)kFill[order])
          report("region %d: %ld bytes from its beginning were written, it has %zu", i, (long)(at - region.copy), region.bytes);
      if (!(region.access & 2) && memcmp(region.copy, region.original, region.bytes))
        report("region %d is only read, they say, and was written", i);
      if (order == 0)
        memcpy(region.first_result, region.copy, region.bytes);
      else if (memcmp(region.first_result, region.copy, region.bytes))
        report("another order of threads leaves other bits in region %d: a barrier is missing, or memory is read that nobody wrote", i);
    }
  }

  void keep() {
    for (int i = 0; i < count; i++)
      if (regions[i].access & 2) memcpy((char*)regions[i].original, regions[i].first_result, regions[i].bytes);
  }

  void drop() {
    for (int i = 0; i < count; i++) {
      munmap(regions[i].mapped, regions[i].mapped_bytes);
      free(regions[i].first_result);
    }
  }

  void explain(const char* address) {
    for (int i = 0; i < count; i++)
      if (address >= regions[i].mapped && address < regions[i].mapped + regions[i].mapped_bytes)
        return report("block %u, thread %u reads or writes %ld bytes from the beginning of region %d, which has %zu",
                      block_index.x, current->thread.x, (long)(address - regions[i].copy), i, regions[i].bytes);
    report("block %u, thread %u reads or writes memory of nobody", block_index.x, current->thread.x);
  }
};

static Memory* memory;

static void on_fault(int, siginfo_t* info, void*) {
  if (!running) abort();
  memory->explain((const char*)info->si_addr);
  siglongjmp(escape, 1);
}

static void run_orders(const Launch& launch) {
  uint64_t blocks = (uint64_t)launch.grid.x * launch.grid.y;
  for (int order = 0; order < kOrders && !problem[0]; order++) {
    memory->fill(order);
    for (uint64_t i = 0; i < blocks && !problem[0]; i++) {
      uint64_t block = place(order, i, blocks);
      block_index = Dim{(unsigned)(block % launch.grid.x), (unsigned)(block / launch.grid.x), 0};
      run_block(order, launch.threads);
    }
    if (!problem[0]) memory->check(order);
  }
}

// Runs a kernel whose parameters have these sizes; null, or what is wrong.
static const char* run(const Launch& launch, void (*call)(void**), const size_t* sizes, size_t num_sizes) {
  problem[0] = 0;
  if (launch.num_arguments != num_sizes || num_sizes > (size_t)kMaxArguments)
    report("%u arguments for a kernel that takes %zu", launch.num_arguments, num_sizes);
  if (launch.threads == 0 || launch.threads > (uint32_t)kMaxThreads || launch.threads % kWarpSize)
    report("a block of %u threads", launch.threads);
  Memory own;
  for (uint32_t i = 0; i < launch.num_arguments && !problem[0]; i++) {
    const Argument& argument = launch.arguments[i];
    if (argument.is_buffer ? sizes[i] != 8 : argument.bytes != sizes[i])
      report("argument %u has %zu bytes, the kernel wants %zu", i, (size_t)argument.bytes, sizes[i]);
    if (argument.is_buffer) own.add((const char*)argument.value, argument.bytes, argument.access);
  }
  if (problem[0]) return problem;
  own.map();
  void* addresses[kMaxArguments];
  void* values[kMaxArguments];
  for (uint32_t i = 0; i < launch.num_arguments; i++) {
    const Argument& argument = launch.arguments[i];
    addresses[i] = argument.is_buffer && argument.bytes ? own.find((const char*)argument.value) : nullptr;
    values[i] = argument.is_buffer ? (void*)&addresses[i] : (void*)argument.value;
  }
  if (!stacks)
    stacks = (char*)mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  memory = &own;
  kernel = call;
  kernel_values = values;
  block_size = Dim{launch.threads, 1, 1};
  grid_size = launch.grid;
  struct sigaction action = {}, segv, bus;
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &segv);
  sigaction(SIGBUS, &action, &bus);
  running = 1;
  if (sigsetjmp(escape, 1) == 0) run_orders(launch);
  running = 0;
  sigaction(SIGSEGV, &segv, nullptr);
  sigaction(SIGBUS, &bus, nullptr);
  if (!problem[0]) own.keep();
  own.drop();
  return problem[0] ? problem : nullptr;
}

template <size_t... I>
struct Indices {};
template <size_t N, size_t... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <size_t... I>
struct Count<0, I...> {
  typedef Indices<I...> Type;
};

// A kernel's parameters, from the type of the function.
template <typename F>
struct Signature;
template <typename... A>
struct Signature<void(A...)> {
  static constexpr size_t kCount = sizeof...(A);
  static constexpr size_t kSizes[] = {sizeof(A)...};
  template <size_t... I>
  static void call(void (*f)(A...), void** values, Indices<I...>) {
    f(*(A*)values[I]...);
  }
  static void call(void (*f)(A...), void** values) { call(f, values, typename Count<kCount>::Type()); }
};

// What each lane of a warp gets from lane `from`. `kind` tells the calls apart, so that lanes in different ones do not meet.
template <typename V>
static V exchange(V value, int from, int kind) {
  V out;
  current->given = &value;
  current->taken = &out;
  current->size = sizeof(V);
  current->from = from;
  current->kind = kind;
  wait_as(State::kShuffle);
  return out;
}

}  // namespace emulation

#define threadIdx (emulation::current->thread)
#define blockIdx emulation::block_index
#define blockDim emulation::block_size
#define gridDim emulation::grid_size

static inline void __syncthreads() { emulation::wait_as(emulation::State::kBarrier); }

template <typename V>
static inline V __shfl_xor_sync(unsigned mask, V value, int distance) {
  if (mask != 0xffffffffu) emulation::report("a shuffle of less than a warp is not emulated");
  int lane = threadIdx.x % emulation::kWarpSize;
  return emulation::exchange(value, lane ^ distance, distance);
}

static inline float __uint_as_float(unsigned word) {
  float value;
  memcpy(&value, &word, 4);
  return value;
}
static inline unsigned __float_as_uint(float value) {
  unsigned word;
  memcpy(&word, &value, 4);
  return word;
}

// Makes a kernel callable from Rust.
#define EMULATE(name)                                                                                   \
  extern "C" const char* emulate_##name(const emulation::Launch* launch) {                              \
    typedef emulation::Signature<decltype(name)> Signature;                                             \
    return emulation::run(*launch, [](void** values) { Signature::call(name, values); }, Signature::kSizes, \
                          Signature::kCount);                                                           \
  }
