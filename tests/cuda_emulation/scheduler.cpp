// Runs the blocks of a grid one after another, the threads of a block as fibers.
#include <cstdio>
#include <cstdlib>

#include "cuda_emulation.h"

#ifndef __x86_64__
#error "the switch between fibers is written for x86-64"
#endif

// Saves the registers that a function must keep, and goes on with another stack.
extern "C" void switch_stack(void** save, void* to) asm("peft_ext_switch_stack");
asm(R"(
.text
peft_ext_switch_stack:
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

namespace cuda_emulation {

Grid grid;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr unsigned kWarp = 32, kMostThreads = 1024, kMostShared = 227 << 10;
constexpr unsigned char kPoison = 0xff;  // NaN as a float.

void* scheduler_stack = nullptr;
const std::function<void()>* body = nullptr;
std::vector<Fiber> fibers;
std::vector<char*> stacks;

void enter() {
  (*body)();
  wait_for(Wait::kEnd);
  fail("a thread that had ended was resumed");
}

void start(unsigned number) {
  if (stacks.size() <= number) stacks.push_back(static_cast<char*>(std::aligned_alloc(4096, kStackBytes)));
  Fiber& fiber = fibers[number];
  fiber = Fiber{};
  const dim3 size = grid.block_dim;
  fiber.thread = dim3(number % size.x, number / size.x % size.y, number / size.x / size.y);
  fiber.lane = static_cast<int>(number % kWarp);
  fiber.warp = static_cast<int>(number / kWarp);
  constexpr int kSavedRegisters = 6;
  void** top = reinterpret_cast<void**>(stacks[number] + kStackBytes);
  *--top = nullptr;  // The stack of a function begins 8 bytes off a multiple of 16.
  *--top = reinterpret_cast<void*>(&enter);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

void resume_all() {
  for (Fiber& fiber : fibers) {
    if (fiber.wait != Wait::kNone) continue;
    grid.current = &fiber;
    switch_stack(&scheduler_stack, fiber.stack_pointer);
  }
}

unsigned count(unsigned begin, unsigned end, Wait wait) {
  return static_cast<unsigned>(std::count_if(fibers.begin() + begin, fibers.begin() + end,
                                             [&](const Fiber& fiber) { return fiber.wait == wait; }));
}

void release(unsigned begin, unsigned end) {
  for (unsigned i = begin; i < end; ++i) fibers[i].wait = Wait::kNone;
}

// Lets go on every warp all of whose threads have arrived at a warp operation.
bool release_warps() {
  const auto threads = static_cast<unsigned>(fibers.size());
  bool released = false;
  for (unsigned begin = 0; begin < threads; begin += kWarp) {
    const unsigned end = std::min(threads, begin + kWarp);
    if (count(begin, end, Wait::kWarp) != end - begin) continue;
    if (end - begin != kWarp) fail("a warp operation in a warp of fewer than 32 threads");
    release(begin, end);
    released = true;
  }
  return released;
}

void run_block() {
  const auto threads = static_cast<unsigned>(fibers.size());
  for (unsigned i = 0; i < threads; ++i) start(i);
  for (;;) {
    resume_all();
    if (release_warps()) continue;
    if (count(0, threads, Wait::kEnd) == threads) return;
    if (count(0, threads, Wait::kBlock) != threads) {
      fail("divergence: some threads are at __syncthreads, others at a warp operation or have ended");
    }
    release(0, threads);
  }
}

}  // namespace

void fail(const char* what) {
  const dim3 at = grid.block, of = grid.grid_dim;
  std::fprintf(stderr, "CUDA emulation: %s, in block (%u, %u, %u) of (%u, %u, %u)\n", what, at.x, at.y, at.z, of.x,
               of.y, of.z);
  std::abort();
}

void wait_for(Wait wait) {
  Fiber& me = *grid.current;
  me.wait = wait;
  switch_stack(&me.stack_pointer, scheduler_stack);
}

void run(dim3 grid_dim, dim3 block_dim, size_t shared_bytes, const std::function<void()>& kernel) {
  grid.grid_dim = grid_dim;
  grid.block_dim = block_dim;
  body = &kernel;
  const unsigned threads = block_dim.x * block_dim.y * block_dim.z;
  constexpr unsigned kMostBlocks = 65535;
  if (threads == 0 || threads > kMostThreads) fail("a block must have 1 to 1024 threads");
  if (grid_dim.x == 0 || grid_dim.y == 0 || grid_dim.z == 0) fail("an empty grid");
  if (grid_dim.y > kMostBlocks || grid_dim.z > kMostBlocks) fail("too many blocks in y or z");
  if (shared_bytes > kMostShared) fail("too much shared memory");
  fibers.resize(threads);
  grid.exchange.assign((threads + kWarp - 1) / kWarp, std::vector<uint64_t>(2 * kWarp));
  constexpr size_t kAlignment = 128, kGuard = 128;
  std::vector<unsigned char> memory(shared_bytes + kAlignment + kGuard);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  grid.shared = memory.data() + (kAlignment - address % kAlignment) % kAlignment;
  for (unsigned z = 0; z < grid_dim.z; ++z) {
    for (unsigned y = 0; y < grid_dim.y; ++y) {
      for (unsigned x = 0; x < grid_dim.x; ++x) {
        grid.block = dim3(x, y, z);
        std::fill(memory.begin(), memory.end(), kPoison);
        run_block();
        const unsigned char* guard = grid.shared + shared_bytes;
        const bool whole = std::all_of(guard, guard + kGuard, [](unsigned char byte) { return byte == kPoison; });
        if (!whole) fail("a write beyond the shared memory");
      }
    }
  }
}

}  // namespace cuda_emulation
