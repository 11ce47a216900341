// Threads of a block are fibers: they wait for their warp, warpgroup, barriers, and run in turn.
#include <map>
#include <string>

#include "engine.h"

bool late_loads = true, late_products = true, descending = false, greedy = false;
Index threadIdx, blockIdx, blockDim, gridDim;
int thread_number;
Fiber fibers[THREADS];
uint32_t exchange[THREADS];

static constexpr size_t STACK = 256 << 10;
static jmp_buf scheduler_place;
static int thread_count;
static void (*kernel_body)();

// Contexts begin fibers; jumps, which make no call of the system, leave them and go on with them.
void block_on(Wait wait) {
  Fiber& fiber = self();
  fiber.wait = wait;
  if (!_setjmp(fiber.place)) _longjmp(scheduler_place, 1);
}
static void go_on(Fiber& fiber) {
  if (_setjmp(scheduler_place)) return;
  if (fiber.runs) _longjmp(fiber.place, 1);
  fiber.runs = true;
  setcontext(&fiber.context);
}
void warp_point() { block_on(Wait::warp); }
static void fiber_main() {
  kernel_body();
  Fiber& fiber = self();
  if (!fiber.open.empty()) die("thread %d ends with products that were never committed", thread_number);
  for (auto& group : fiber.groups)
    if (!group.empty()) die("thread %d ends with products that were never waited for", thread_number);
  if (!fiber.stores.empty()) die("thread %d ends with TMA stores that were never waited for", thread_number);
  if (!fiber.bulks.empty()) die("thread %d ends with copies in bulk that were never waited for", thread_number);
  if (!fiber.copies.empty()) die("thread %d ends with copies that were never committed", thread_number);
  for (auto& group : fiber.copy_groups)
    if (!group.empty()) die("thread %d ends with copies that were never waited for", thread_number);
  block_on(Wait::done);
}

// ------------------------------------------------------------------------------------------------ barriers
struct NamedBarrier { int count = 0, expected = 0; long generation = 0; };
static NamedBarrier named[16];
void named_add(uint id, uint count) {
  if (id > 15 || count % 32) die("named barrier %u for %u threads", id, count);
  NamedBarrier& barrier = named[id];
  if (barrier.count && barrier.expected != (int)count) die("named barrier %u is given %u threads and %d", id, count, barrier.expected);
  barrier.expected = count;
  if (++barrier.count == (int)count) barrier.count = 0, barrier.generation++;
}
void bar_sync(uint id, uint count) {
  self().barrier = id;
  self().generation = named[id & 15].generation;
  named_add(id, count);
  if (named[id].generation == self().generation) block_on(Wait::named);
}
void __syncthreads() { bar_sync(0, thread_count); }

struct MBarrier { int count, pending; long bytes; int phase; };
static std::map<uint32_t, MBarrier> mbarriers;
static MBarrier& mbarrier(uint32_t address) {
  auto found = mbarriers.find(address);
  if (found == mbarriers.end()) die("no mbarrier was initialised at %u", address);
  return found->second;
}
static void mbarrier_check(uint32_t address, MBarrier& barrier) {
  if (barrier.pending < 0) die("more arrivals at mbarrier %u than it counts", address);
  if (barrier.pending == 0 && barrier.bytes == 0) barrier.phase ^= 1, barrier.pending = barrier.count;
}
void mbarrier_bytes(uint32_t address, long count) {
  MBarrier& barrier = mbarrier(address);
  barrier.bytes -= count;
  mbarrier_check(address, barrier);
}
void mbarrier_init(uint32_t address, uint32_t count) {
  if (address % 8 || count < 1 || count >= 1 << 20) die("an mbarrier at %u for %u arrivals", address, count);
  mbarriers[address] = MBarrier{(int)count, (int)count, 0, 0};
}
void mbarrier_arrive(uint32_t address, uint32_t count) {
  MBarrier& barrier = mbarrier(address);
  barrier.pending -= count;
  mbarrier_check(address, barrier);
}
void mbarrier_expect(uint32_t address, uint32_t bytes) {
  MBarrier& barrier = mbarrier(address);
  // Of PTX: the range of a transaction count.
  if (bytes >= 1 << 20) die("an mbarrier waits for %u bytes at once", bytes);
  barrier.bytes += bytes, barrier.pending -= 1;
  mbarrier_check(address, barrier);
}
void mbarrier_wait(uint32_t address, int parity) {
  Fiber& fiber = self();
  fiber.address = address, fiber.parity = parity;
  while (mbarrier(address).phase == parity) block_on(Wait::mbarrier);
}

// ------------------------------------------------------------------------------------------------ values of other lanes
uint32_t from_lane(uint32_t value, int lane) {
  int thread = thread_number;
  exchange[thread] = value;
  warp_point();
  uint32_t found = exchange[thread / 32 * 32 + lane];
  warp_point();
  return found;
}
uint ballot(bool holds) {
  int thread = thread_number;
  exchange[thread] = holds;
  warp_point();
  uint found = 0;
  for (int lane = 0; lane < 32; lane++) found |= exchange[thread / 32 * 32 + lane] << lane;
  warp_point();
  return found;
}

// ------------------------------------------------------------------------------------------------ one thread block
static const char* names[] = {"nothing", "its warp", "its warpgroup", "a named barrier", "an mbarrier", "nothing, it ended"};
static bool ready(Fiber& fiber) {
  switch (fiber.wait) {
    case Wait::none: return true;
    case Wait::named: return named[fiber.barrier].generation != fiber.generation;
    case Wait::mbarrier: return mbarrier(fiber.address).phase != fiber.parity;
    default: return false;
  }
}
static bool all_wait(int first, int count, Wait wait) {
  for (int t = first; t < first + count; t++)
    if (fibers[t].wait != wait) return false;
  return true;
}
// A warp goes on when all of its threads wait, but those that have ended: rows that share a warp may part, and each
// exchanges values with its own row only.
static bool warp_waits(int first, int threads) {
  bool waits = false;
  for (int t = first; t < first + 32 && t < threads; t++) {
    if (fibers[t].wait != Wait::warp && fibers[t].wait != Wait::done) return false;
    waits |= fibers[t].wait == Wait::warp;
  }
  return waits;
}
// Runs the lanes of a warp that wait for nothing; returns whether there were any.
static bool run_lanes(int first, int end) {
  bool progress = false;
  for (int n = 0; n < end - first; n++) {
    int t = descending ? end - 1 - n : first + n;
    if (fibers[t].wait == Wait::done || !ready(fibers[t])) continue;
    fibers[t].wait = Wait::none;
    thread_number = t;
    threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
    go_on(fibers[t]);
    progress = true;
  }
  return progress;
}
void run_block(int threads, void (*body)()) {
  thread_count = threads;
  kernel_body = body;
  memset(shared_memory, 0xff, sizeof shared_memory);
  for (auto& barrier : named) barrier = NamedBarrier();
  mbarriers.clear();
  forget_loads();
  for (int t = 0; t < threads; t++) {
    Fiber& fiber = fibers[t];
    fiber.wait = Wait::none;
    fiber.groups.clear(), fiber.open.clear(), fiber.stores.clear();
    fiber.bulks.clear(), fiber.polls = 0;
    fiber.copies.clear(), fiber.copy_groups.clear();
    if (!fiber.stack) fiber.stack = (uchar*)malloc(STACK);
    fiber.runs = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;  // It never returns.
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (;;) {
    bool progress = false;
    int ended = 0;
    int warps = (threads + 31) / 32;
    for (int n = 0; n < warps && !(greedy && progress); n++) {
      int first = (descending ? warps - 1 - n : n) * 32, end = min(first + 32, threads);
      // A warp goes on alone until it waits for others.
      while (run_lanes(first, end)) {
        progress = true;
        if (!warp_waits(first, threads)) {
          if (greedy) break;
          continue;
        }
        for (int t = first; t < end; t++)
          if (fibers[t].wait == Wait::warp) fibers[t].wait = Wait::none;
        if (greedy) break;
      }
      for (int t = first; t < end; t++) ended += fibers[t].wait == Wait::done;
    }
    if (ended == threads) break;
    for (int group = 0; group < threads / 128; group++)
      if (all_wait(group * 128, 128, Wait::warpgroup)) run_groups(group), progress = true;
    if (!progress) progress = land_awaited(threads);
    if (!progress) {
      std::string text;
      for (int t = 0; t < threads; t += 32) {
        Fiber& fiber = fibers[t];
        text += "\n  warp " + std::to_string(t / 32) + " waits for " + names[(int)fiber.wait];
        if (fiber.wait == Wait::named) text += " " + std::to_string(fiber.barrier);
        if (fiber.wait == Wait::mbarrier) text += " " + std::to_string(fiber.address) + ", parity " + std::to_string(fiber.parity);
      }
      die("deadlock in block %d,%d,%d%s", blockIdx.x, blockIdx.y, blockIdx.z, text.c_str());
    }
  }
  if (any_loads()) die("the block ended with TMA loads that nothing waited for");
}
