#include "cuda_emulator.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include <ucontext.h>

namespace cuda_emulator {

dim3 thread_index, block_index, block_size, grid_size;

namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr int kWarp = 32;
constexpr int kPatience = 1 << 16;         // turns that a thread waits before the kernel is taken to hang
constexpr size_t kSharedBytes = 48 << 10;  // of a block, dynamic and static together
constexpr size_t kSharedAlign = 16;
constexpr uint16_t kPoison = 0x7ff9;  // over and over: NaN as double, float, bfloat16 and half, and a large integer

#if defined(__x86_64__)
// Saves what a call must keep on the stack in hand, and goes on where `to` stopped. (ucontext enters the kernel at each switch.)
extern "C" void cuda_emulator_switch(void** from, void* to);
asm(R"(
.text
.globl cuda_emulator_switch
.hidden cuda_emulator_switch
cuda_emulator_switch:
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
)");
struct Context {
  void* stack_pointer = nullptr;
};
void go(Context& from, Context& to) { cuda_emulator_switch(&from.stack_pointer, to.stack_pointer); }
void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(stack + kStackBytes - 16);
  *--top = nullptr;  // where entry would return to; keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}
#else
struct Context {
  ucontext_t context;
};
void go(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = kStackBytes;
  makecontext(&context.context, entry, 0);
}
#endif

struct Thread {
  Context context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  dim3 index;
  bool done;
};
struct Warp {
  uint64_t slots[2][kWarp];  // two, so that a fast lane's next exchange leaves alone what a slow one still reads
  int arrived, live;
  unsigned generation;
};

std::vector<Thread> threads;
std::vector<Warp> warps;
std::vector<int> order, place;  // order of turns, and each thread's place in it
alignas(kSharedAlign) uint16_t shared[kSharedBytes / sizeof(uint16_t)];
size_t dynamic_bytes, shared_bytes;                    // of the dynamic part, and of all that is taken
std::vector<std::pair<const void*, void*>> variables;  // of the running block
Context scheduler;
const std::function<void()>* body;
int current, count, live, arrived;
unsigned generation;
bool any[2];  // two, so that a fast thread's next vote leaves alone what a slow one still reads
std::mt19937 shuffler(20200101);

size_t round_up(size_t bytes) { return (bytes + kSharedAlign - 1) / kSharedAlign * kSharedAlign; }

[[noreturn]] void hang(const char* what) {
  std::fprintf(stderr, "cuda_emulator: block (%u, %u, %u): thread %d waits in vain at %s\n", block_index.x,
               block_index.y, block_index.z, current, what);
  std::abort();
}

void give_turn(int next) {
  if (next == current) return;
  Thread& from = threads[current];
  current = next;
  thread_index = threads[next].index;
  go(from.context, threads[next].context);
}

int next_in_block() {
  for (int i = 1; i <= count; ++i) {
    const int next = order[(place[current] + i) % count];
    if (!threads[next].done) return next;
  }
  return -1;
}

int next_in_warp() {
  const int first = current / kWarp * kWarp;
  for (int i = 1; i <= kWarp; ++i) {
    const int next = first + (current - first + i) % kWarp;
    if (next < count && !threads[next].done) return next;
  }
  return -1;
}

void release_block() {
  arrived = 0;
  ++generation;
  any[generation % 2] = false;
}

void run_thread() {
  (*body)();
  threads[current].done = true;
  --live;
  --warps[current / kWarp].live;
  if (live > 0 && arrived == live) release_block();
  const int next = next_in_block();
  Thread& from = threads[current];
  if (next < 0) {
    go(from.context, scheduler);
  } else {
    current = next;
    thread_index = threads[next].index;
    go(from.context, threads[next].context);
  }
  std::abort();
}

void run_block(dim3 block) {
  count = live = static_cast<int>(block.x * block.y * block.z);
  arrived = 0;
  any[0] = any[1] = false;
  if (static_cast<int>(threads.size()) < count) threads.resize(count);
  warps.assign((count + kWarp - 1) / kWarp, Warp{});
  for (int i = 0; i < count; ++i) {
    threads[i].done = false;
    threads[i].index = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
    ++warps[i / kWarp].live;
    prepare(threads[i].context, threads[i].stack.get(), run_thread);
  }
  // Warps in any order, and where in a warp the first turn falls: lanes then follow each other.
  order.clear();
  std::vector<int> warp_order(warps.size());
  for (size_t i = 0; i < warps.size(); ++i) warp_order[i] = static_cast<int>(i);
  for (size_t i = warps.size(); i > 1; --i) std::swap(warp_order[i - 1], warp_order[shuffler() % i]);
  for (int warp : warp_order) {
    const int lanes = std::min(kWarp, count - warp * kWarp), start = static_cast<int>(shuffler() % lanes);
    for (int i = 0; i < lanes; ++i) order.push_back(warp * kWarp + (start + i) % lanes);
  }
  place.resize(count);
  for (int i = 0; i < count; ++i) place[order[i]] = i;
  std::fill(std::begin(shared), std::end(shared), kPoison);
  shared_bytes = dynamic_bytes;
  variables.clear();
  current = order[0];
  thread_index = threads[current].index;
  go(scheduler, threads[current].context);
  if (live != 0) hang("the end");
}

}  // namespace

void launch(dim3 grid, dim3 block, size_t dynamic, const std::function<void()>& kernel) {
  if (dynamic > kSharedBytes || block.x * block.y * block.z > 1024 || grid.x == 0 || grid.y > 65535 || grid.z > 65535) {
    std::fprintf(stderr, "cuda_emulator: a launch that a GPU refuses: grid %u %u %u, block %u, shared %zu\n", grid.x,
                 grid.y, grid.z, block.x, dynamic);
    std::abort();
  }
  body = &kernel;
  block_size = block;
  grid_size = grid;
  dynamic_bytes = round_up(dynamic);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = dim3(x, y, z);
        run_block(block);
      }
    }
  }
}

unsigned char* dynamic_shared() { return reinterpret_cast<unsigned char*>(shared); }

void* static_shared(const void* key, size_t bytes) {
  for (const auto& [known, memory] : variables) {
    if (known == key) return memory;
  }
  void* const memory = dynamic_shared() + shared_bytes;
  shared_bytes += round_up(bytes);
  if (shared_bytes > kSharedBytes) {
    std::fprintf(stderr,
                 "cuda_emulator: a kernel with %zu bytes of shared memory, %zu of them dynamic, of %zu at most\n",
                 shared_bytes, dynamic_bytes, kSharedBytes);
    std::abort();
  }
  variables.emplace_back(key, memory);
  return memory;
}

int lane() { return current % kWarp; }

// To another warp, as the rest of this one may only wait for the caller.
void give_way() {
  for (int i = 1; i < count; ++i) {
    const int next = order[(place[current] + i) % count];
    if (!threads[next].done && next / kWarp != current / kWarp) return give_turn(next);
  }
}

void block_barrier() {
  if (++arrived == live) {
    release_block();
    return;
  }
  const unsigned mine = generation;
  for (int turn = 0; generation == mine; ++turn) {
    if (turn > kPatience) hang("__syncthreads");
    give_turn(next_in_block());
  }
}

bool block_any(bool predicate) {
  const unsigned mine = generation % 2;
  any[mine] = any[mine] || predicate;
  block_barrier();
  return any[mine];
}

const uint64_t* exchange(uint64_t value) {
  Warp& warp = warps[current / kWarp];
  const unsigned mine = warp.generation;
  uint64_t* const slots = warp.slots[mine % 2];
  slots[lane()] = value;
  if (++warp.arrived == warp.live) {
    warp.arrived = 0;
    ++warp.generation;
  }
  for (int turn = 0; warp.generation == mine; ++turn) {
    if (turn > kPatience) hang("a warp-wide instruction");
    give_turn(next_in_warp());
  }
  return slots;
}

}  // namespace cuda_emulator
