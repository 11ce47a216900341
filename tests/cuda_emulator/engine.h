// What the machine's parts know of each other, and kernels do not.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <deque>
#include <vector>

#include "machine.h"

enum class Wait { none, warp, warpgroup, named, mbarrier, done };
struct Store { const CUtensorMap* map; int at[5]; uint32_t source; };
// A copy of bytes in one piece, or its addition to what is there.
struct Bulk { uchar* target; uint32_t source, bytes; bool adds, is_read; std::vector<uchar> data; };
struct Copy { uint32_t target; const uchar* source; uint32_t bytes, whole = 16; };
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool runs = false;
  uchar* stack = nullptr;
  Wait wait = Wait::none;
  uint32_t address = 0;
  int parity = 0, barrier = 0;
  long generation = 0;
  size_t pending = 0;
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
  std::vector<Store> stores;
  std::vector<Bulk> bulks;
  const void* polled = nullptr;
  uint32_t seen = 0;
  int polls = 0;
  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> copy_groups;
};
extern Fiber fibers[THREADS];
inline Fiber& self() { return fibers[thread_number]; }
// Lets others run until what the thread waits for is there.
void block_on(Wait wait);
void run_block(int threads, void (*body)());

// Swizzles exchange 16-byte chunks by the number of the 128-byte line: spans of 32, 64, 128 bytes are 1, 2, 3.
inline uint32_t swizzled(uint32_t address, int swizzle) {
  return address ^ (((address >> 7) & ((1 << swizzle) - 1)) << 4);
}
uchar* guarded(size_t bytes, int fill);
void mbarrier_bytes(uint32_t address, long count);
// The first TMA load that has not landed and for which a thread waits lands; returns whether there was one.
bool land_awaited(int threads);
void forget_loads();
bool any_loads();
// All threads of a warpgroup are at a wait: the groups that it waits for run.
void run_groups(int warpgroup);
inline float element(int kind, uint16_t bits) { return kind ? f16_to_float(bits) : bf16_to_float(bits); }
