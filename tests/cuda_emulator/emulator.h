// Runs the CUDA C++ that TVM generates on a CPU, one thread block after another.
//
// CUDA threads are cooperative fibers: a fiber runs until it meets something to wait for, so warps drift apart as far as
// the program lets them. Asynchronous work happens as early or as late as the program allows:
//   late_loads     TMA loads land only when no thread can go on, and only where one waits for them (finds missing
//                  waits), and copies when their group is waited for; otherwise at issue (finds buffers that are
//                  overwritten too early)
//   late_products  wgmma and TMA stores happen when they are waited for (finds operands that change too early, and
//                  results that are read too early); otherwise when their group is committed
//   descending     the last warp and lane run first
//   greedy         the first warp that can go on always does, before those behind it get on (finds missing waits for
//                  warps that are slow); copies in bulk let others go first before they read
// What a program must not do ends the process with a message: a deadlock, a barrier used wrongly, an address outside
// shared memory or the tensors, a descriptor that is not aligned.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <vector>

#define CUDART_INF_F INFINITY
#define CUDART_NAN_F NAN
typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned short ushort;
using std::max;  // But for numbers: CUDA's return the other one beside a NaN.
inline float max(float a, float b) { return std::fmax(a, b); }
using std::ptrdiff_t;
using std::min;
inline float min(float a, float b) { return std::fmin(a, b); }

[[noreturn]] inline void die(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fprintf(stderr, "emulator: ");
  vfprintf(stderr, format, arguments);
  fprintf(stderr, "\n");
  fflush(stderr);
  _exit(3);
}

// ------------------------------------------------------------------------------------------------ 16-bit numbers
inline float bf16_to_float(uint16_t bits) {
  uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}
inline uint16_t float_to_bf16(float value) {
  uint32_t wide;
  memcpy(&wide, &value, 4);
  if ((wide & 0x7fffffff) > 0x7f800000) return (wide >> 16) | 0x40;
  return (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
}
inline float f16_to_float(uint16_t bits) {
  _Float16 value;
  memcpy(&value, &bits, 2);
  return (float)value;
}
inline uint16_t float_to_f16(float value) {
  _Float16 narrow = (_Float16)value;
  uint16_t bits;
  memcpy(&bits, &narrow, 2);
  return bits;
}
struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  explicit nv_bfloat16(float value) : bits(float_to_bf16(value)) {}
  operator float() const { return bf16_to_float(bits); }
};
struct half {
  uint16_t bits;
  half() = default;
  explicit half(float value) : bits(float_to_f16(value)) {}
  operator float() const { return f16_to_float(bits); }
};
inline float __bfloat162float(nv_bfloat16 value) { return value; }
inline nv_bfloat16 __float2bfloat16_rn(float value) { return nv_bfloat16(value); }
inline float __half2float(half value) { return value; }
inline half __float2half_rn(float value) { return half(value); }
struct uint2 { uint x, y; };
struct uint4 { uint x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct Index { int x = 0, y = 0, z = 0; };

// ------------------------------------------------------------------------------------------------ fibers
constexpr size_t STACK = 256 << 10, SHARED = 227 << 10;
constexpr int THREADS = 1024;
inline bool late_loads = true, late_products = true, descending = false, greedy = false;
inline Index threadIdx, blockIdx;
inline int thread_number;  // Of its block, counted along x first.
inline Index blockDim, gridDim;
alignas(1024) inline uchar shared_memory[SHARED];

enum class Wait { none, warp, warpgroup, named, mbarrier, done };
struct Product {
  int columns, kind, transposed_a, transposed_b;
  bool from_registers, accumulates;
  float* accumulator[128];
  uint32_t* registers[4];
  uint64_t a, b;
};
struct CUtensorMap {
  int rank;
  uchar* base;
  int64_t extent[5], stride[5];
  int box[5], step[5], swizzle;
};
struct Store { const CUtensorMap* map; int at[5]; uint32_t source; };
// A copy of bytes in one piece, or its addition to what is there.
struct Bulk { uchar* target; uint32_t source, bytes; bool adds, is_read; std::vector<uchar> data; };
struct Copy { uint32_t target; const uchar* source; uint32_t bytes, whole = 16; };
struct Fiber {
  ucontext_t context;
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
inline Fiber fibers[THREADS];
inline ucontext_t scheduler_context;
inline int thread_count;
inline void (*kernel_body)();

inline Fiber& self() { return fibers[thread_number]; }
inline void block_on(Wait wait) {
  Fiber& fiber = self();
  fiber.wait = wait;
  swapcontext(&fiber.context, &scheduler_context);
}
inline void warp_point() { block_on(Wait::warp); }
inline void fiber_main() {
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
inline NamedBarrier named[16];
inline void named_add(uint id, uint count) {
  if (id > 15 || count % 32) die("named barrier %u for %u threads", id, count);
  NamedBarrier& barrier = named[id];
  if (barrier.count && barrier.expected != (int)count) die("named barrier %u is given %u threads and %d", id, count, barrier.expected);
  barrier.expected = count;
  if (++barrier.count == (int)count) barrier.count = 0, barrier.generation++;
}
inline void bar_sync(uint id, uint count) {
  self().barrier = id;
  self().generation = named[id & 15].generation;
  named_add(id, count);
  if (named[id].generation == self().generation) block_on(Wait::named);
}
inline void __syncthreads() { bar_sync(0, thread_count); }

struct MBarrier { int count, pending; long bytes; int phase; };
inline std::map<uint32_t, MBarrier> mbarriers;
inline MBarrier& mbarrier(uint32_t address) {
  auto found = mbarriers.find(address);
  if (found == mbarriers.end()) die("no mbarrier was initialised at %u", address);
  return found->second;
}
inline void mbarrier_check(uint32_t address, MBarrier& barrier) {
  if (barrier.pending < 0) die("more arrivals at mbarrier %u than it counts", address);
  if (barrier.pending == 0 && barrier.bytes == 0) barrier.phase ^= 1, barrier.pending = barrier.count;
}
inline void mbarrier_bytes(uint32_t address, long count) {
  MBarrier& barrier = mbarrier(address);
  barrier.bytes -= count;
  mbarrier_check(address, barrier);
}

// ------------------------------------------------------------------------------------------------ memory
struct Tensor { uchar* begin; size_t bytes; };
inline std::vector<Tensor> tensors;
inline void check_global(const uchar* address, size_t count) {
  for (auto& tensor : tensors)
    if (address >= tensor.begin && address + count <= tensor.begin + tensor.bytes) return;
  die("a copy reaches outside the tensors");
}
// A tensor ends where a page begins that may not be touched.
inline uchar* guarded(size_t bytes, int fill) {
  size_t page = 4096, body = (bytes + page - 1) / page * page + page;
  uchar* memory = (uchar*)mmap(nullptr, body + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) die("no memory for %zu bytes", bytes);
  mprotect(memory + body, page, PROT_NONE);
  uchar* begin = memory + body - (bytes + 15) / 16 * 16;
  memset(begin, fill, bytes);
  tensors.push_back({begin, bytes});
  return begin;
}
inline uint32_t shared_address(const void* pointer) {
  ptrdiff_t place = (const uchar*)pointer - shared_memory;
  if (place < 0 || place >= (ptrdiff_t)SHARED) die("an address outside shared memory");
  return (uint32_t)place;
}
// Swizzles exchange 16-byte chunks by the number of the 128-byte line: spans of 32, 64, 128 bytes are 1, 2, 3.
inline uint32_t swizzled(uint32_t address, int swizzle) {
  return address ^ (((address >> 7) & ((1 << swizzle) - 1)) << 4);
}

// ------------------------------------------------------------------------------------------------ TMA
template <class F>
inline void tma_walk(const CUtensorMap* map, const int* at, F visit) {
  int count[5] = {1, 1, 1, 1, 1};
  for (int i = 0; i < map->rank; i++) count[i] = (map->box[i] + map->step[i] - 1) / map->step[i];
  int row = 0, place[5];
  for (place[4] = 0; place[4] < count[4]; place[4]++)
    for (place[3] = 0; place[3] < count[3]; place[3]++)
      for (place[2] = 0; place[2] < count[2]; place[2]++)
        for (place[1] = 0; place[1] < count[1]; place[1]++, row++) {
          bool inside = true;
          int64_t offset = 0;
          for (int i = 1; i < map->rank; i++) {
            int64_t x = (int64_t)at[i] + (int64_t)place[i] * map->step[i];
            inside &= x >= 0 && x < map->extent[i];
            offset += x * map->stride[i];
          }
          for (int column = 0; column < count[0]; column++) {
            int64_t x = (int64_t)at[0] + column, element = map->stride[0];
            bool there = inside && x >= 0 && x < map->extent[0];
            visit((row * count[0] + column) * element, there ? map->base + offset + x * element : nullptr);
          }
        }
}
struct Load { const CUtensorMap* map; int at[5]; uint32_t target, barrier; };
inline std::deque<Load> loads;
inline void tma_land(const Load& load) {
  long bytes = 0;
  const size_t element = load.map->stride[0];
  tma_walk(load.map, load.at, [&](uint32_t place, uchar* source) {
    uint32_t value = 0;
    if (source) check_global(source, element), memcpy(&value, source, element);
    uint32_t target = swizzled(load.target + place, load.map->swizzle);
    if (target + element > SHARED) die("a TMA load beyond shared memory");
    memcpy(shared_memory + target, &value, element);
    bytes += element;
  });
  mbarrier_bytes(load.barrier, bytes);
}
inline void tma_check(const CUtensorMap* map, const std::vector<int>& at, uint32_t place) {
  if (!map->base) die("TMA with a tensor map that was not encoded");
  if ((uintptr_t)map->base % 16) die("a tensor map of an address that is no multiple of 16");
  if ((int)at.size() != map->rank) die("%zu coordinates for a map of rank %d", at.size(), map->rank);
  if (place % (128 << map->swizzle)) die("TMA at %u of shared memory, which is not aligned", place);
  int64_t row = map->box[0] * map->stride[0];
  if (map->swizzle && row != 16 << map->swizzle) die("a box as wide as its swizzle is expected");
  // On an H100 it is an illegal instruction otherwise, whatever the swizzle.
  if (at[0] * map->stride[0] % 16) die("TMA begins %ld bytes along the innermost axis, which is no multiple of 16", (long)(at[0] * map->stride[0]));
}
inline void tma_load(uint32_t target, const void* map, std::vector<int> at, uint32_t barrier) {
  Load load{(const CUtensorMap*)map, {}, target, barrier};
  tma_check(load.map, at, target);
  std::copy(at.begin(), at.end(), load.at);
  if (late_loads) loads.push_back(load);
  else tma_land(load);
}
inline void tma_store_now(const Store& store) {
  tma_walk(store.map, store.at, [&](uint32_t place, uchar* target) {
    if (target) check_global(target, 2), memcpy(target, shared_memory + swizzled(store.source + place, store.map->swizzle), 2);
  });
}
inline void tma_store(const void* map, std::vector<int> at, uint32_t source) {
  Store store{(const CUtensorMap*)map, {}, source};
  tma_check(store.map, at, source);
  if (store.map->stride[0] != 2) die("TMA stores of elements of %ld bytes are not emulated", (long)store.map->stride[0]);
  std::copy(at.begin(), at.end(), store.at);
  self().stores.push_back(store);
  if (!late_products) tma_store_now(store);
}
inline void tma_store_wait() {
  if (late_products)
    for (auto& store : self().stores) tma_store_now(store);
  self().stores.clear();
}

// ------------------------------------------------------------------------------------------------ bulk copies, turns
inline void bulk_read(Bulk& bulk) {
  if (!bulk.is_read) bulk.data.assign(shared_memory + bulk.source, shared_memory + bulk.source + bulk.bytes);
  bulk.is_read = true;
}
inline void bulk_write(Bulk& bulk) {
  bulk_read(bulk);
  if (!bulk.adds) memcpy(bulk.target, bulk.data.data(), bulk.bytes);
  else
    for (uint32_t place = 0; place < bulk.bytes; place += 4) {
      float sum, term;
      memcpy(&sum, bulk.target + place, 4), memcpy(&term, &bulk.data[place], 4);
      sum += term;
      memcpy(bulk.target + place, &sum, 4);
    }
}
inline void bulk(const void* target, uint32_t source, uint32_t bytes, bool adds) {
  if ((uintptr_t)target % 16 || source % 16 || bytes % 16) die("a copy of %u bytes in bulk, from %u, not all multiples of 16", bytes, source);
  if (source + bytes > SHARED) die("a copy in bulk from beyond shared memory");
  check_global((const uchar*)target, bytes);
  Bulk made{(uchar*)target, source, bytes, adds, false, {}};
  if (!late_products) bulk_write(made);
  self().bulks.push_back(made);
}
inline void bulk_wait(bool only_read) {
  if (greedy) block_on(Wait::none);
  for (auto& one : self().bulks) {
    if (!late_products) continue;
    if (only_read) bulk_read(one);
    else bulk_write(one);
  }
  if (!only_read) self().bulks.clear();
}
// Blocks run one after another, so what a thread waits for in global memory is there, or never comes.
inline uint32_t poll(const void* address) {
  Fiber& fiber = self();
  uint32_t value;
  check_global((const uchar*)address, 4);
  memcpy(&value, address, 4);
  fiber.polls = address == fiber.polled && value == fiber.seen ? fiber.polls + 1 : 0;
  fiber.polled = address, fiber.seen = value;
  if (fiber.polls > 3) die("deadlock in block %d: a thread waits for a number in global memory, which is %u, to change", blockIdx.x, value);
  return value;
}
inline uint32_t add_global(const void* address, uint32_t value) {
  uint32_t before;
  check_global((const uchar*)address, 4);
  memcpy(&before, address, 4);
  value += before;
  memcpy((void*)address, &value, 4);
  return before;
}

// ------------------------------------------------------------------------------------------------ wgmma
inline float element(int kind, uint16_t bits) { return kind ? f16_to_float(bits) : bf16_to_float(bits); }
// Element of an operand in shared memory: `along` the columns of the product (or its rows), `depth` in the sum.
inline float operand(uint64_t descriptor, int depth, int along, int transposed, int kind) {
  uint32_t start = (descriptor & 0x3fff) << 4, leading = ((descriptor >> 16) & 0x3fff) << 4;
  uint32_t stride = ((descriptor >> 32) & 0x3fff) << 4;
  int layout = descriptor >> 62;
  if (!layout || ((descriptor >> 49) & 7)) die("a descriptor with no swizzle, or with a base offset");
  int swizzle = 4 - layout, span = 16 << swizzle, width = span / 2;
  uint32_t address = transposed ? start + (along / width) * leading + (depth / 8) * stride + (depth % 8) * span + (along % width) * 2
                                : start + (along / 8) * stride + (along % 8) * span + depth * 2;
  if (address + 2 > SHARED) die("a product reads beyond shared memory");
  uint16_t bits;
  memcpy(&bits, shared_memory + swizzled(address, swizzle), 2);
  return element(kind, bits);
}
inline void run_product(int warpgroup, size_t number) {
  static float a[64][16], b[16][256], sum[64][256];
  auto product = [&](int thread) -> Product& { return fibers[warpgroup * 128 + thread].groups.front()[number]; };
  Product& first = product(0);
  int columns = first.columns;
  for (int t = 0; t < 128; t++) {
    Product& other = product(t);
    if (other.b != first.b || other.columns != columns || other.accumulates != first.accumulates || (!first.from_registers && other.a != first.a))
      die("threads of a warpgroup issue different products");
    if (!first.from_registers) continue;
    int row = (t / 32) * 16 + (t % 32) / 4;
    for (int i = 0; i < 4; i++) {
      uint32_t pair = *other.registers[i];
      float* target = &a[row + (i & 1) * 8][(t % 4) * 2 + (i >> 1) * 8];
      target[0] = element(first.kind, pair & 0xffff), target[1] = element(first.kind, pair >> 16);
    }
  }
  if (!first.from_registers)
    for (int r = 0; r < 64; r++)
      for (int k = 0; k < 16; k++) a[r][k] = operand(first.a, k, r, first.transposed_a, first.kind);
  for (int k = 0; k < 16; k++)
    for (int n = 0; n < columns; n++) b[k][n] = operand(first.b, k, n, first.transposed_b, first.kind);
  for (int r = 0; r < 64; r++) {
    for (int n = 0; n < columns; n++) sum[r][n] = 0;
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < columns; n++) sum[r][n] += a[r][k] * b[k][n];
  }
  for (int t = 0; t < 128; t++) {
    Product& other = product(t);
    for (int i = 0; i < columns / 2; i++) {
      float value = sum[(t / 32) * 16 + (t % 32) / 4 + ((i >> 1) & 1) * 8][(i >> 2) * 8 + (t % 4) * 2 + (i & 1)];
      *other.accumulator[i] = other.accumulates ? *other.accumulator[i] + value : value;
    }
  }
}
// All threads of a warpgroup are at a wait: run the groups that it waits for.
inline void run_groups(int warpgroup) {
  Fiber* threads = fibers + warpgroup * 128;
  for (int t = 1; t < 128; t++)
    if (threads[t].pending != threads[0].pending || threads[t].groups.size() != threads[0].groups.size()) die("threads of a warpgroup wait for different groups");
  while (threads[0].groups.size() > threads[0].pending) {
    for (size_t i = 0; i < threads[0].groups.front().size(); i++) run_product(warpgroup, i);
    for (int t = 0; t < 128; t++) threads[t].groups.pop_front();
  }
  for (int t = 0; t < 128; t++) threads[t].wait = Wait::none;
}
inline void wgmma_push(Product&& product) {
  // What the accumulators held is gone once a product that does not add to it may have begun.
  if (late_products && !product.accumulates)
    for (int i = 0; i < product.columns / 2; i++) *product.accumulator[i] = NAN;
  self().open.push_back(product);
}
inline void wgmma_wait(size_t pending) {
  self().pending = pending;
  block_on(Wait::warpgroup);
}
inline void wgmma_commit() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
  if (!late_products) wgmma_wait(0);
}

// ------------------------------------------------------------------------------------------------ one thread block
inline const char* names[] = {"nothing", "its warp", "its warpgroup", "a named barrier", "an mbarrier", "nothing, it ended"};
inline bool ready(Fiber& fiber) {
  switch (fiber.wait) {
    case Wait::none: return true;
    case Wait::named: return named[fiber.barrier].generation != fiber.generation;
    case Wait::mbarrier: return mbarrier(fiber.address).phase != fiber.parity;
    default: return false;
  }
}
inline bool all_wait(int first, int count, Wait wait) {
  for (int t = first; t < first + count; t++)
    if (fibers[t].wait != wait) return false;
  return true;
}
// A warp goes on when all of its threads wait, but those that have ended: rows that share a warp may part, and each
// exchanges values with its own row only.
inline bool warp_waits(int first, int threads) {
  bool waits = false;
  for (int t = first; t < first + 32 && t < threads; t++) {
    if (fibers[t].wait != Wait::warp && fibers[t].wait != Wait::done) return false;
    waits |= fibers[t].wait == Wait::warp;
  }
  return waits;
}
// Runs the lanes of a warp that wait for nothing; returns whether there were any.
inline bool run_lanes(int first, int end) {
  bool progress = false;
  for (int n = 0; n < end - first; n++) {
    int t = descending ? end - 1 - n : first + n;
    if (fibers[t].wait == Wait::done || !ready(fibers[t])) continue;
    fibers[t].wait = Wait::none;
    thread_number = t;
    threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
    swapcontext(&scheduler_context, &fibers[t].context);
    progress = true;
  }
  return progress;
}
inline void run_block(int threads, void (*body)()) {
  thread_count = threads;
  kernel_body = body;
  memset(shared_memory, 0xff, sizeof shared_memory);
  for (auto& barrier : named) barrier = NamedBarrier();
  mbarriers.clear();
  loads.clear();
  for (int t = 0; t < threads; t++) {
    Fiber& fiber = fibers[t];
    fiber.wait = Wait::none;
    fiber.groups.clear(), fiber.open.clear(), fiber.stores.clear();
    fiber.bulks.clear(), fiber.polls = 0;
    fiber.copies.clear(), fiber.copy_groups.clear();
    if (!fiber.stack) fiber.stack = (uchar*)malloc(STACK);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = &scheduler_context;
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
    for (size_t i = 0; !progress && i < loads.size(); i++)
      for (int t = 0; t < threads && !progress; t++)
        if (fibers[t].wait == Wait::mbarrier && fibers[t].address == loads[i].barrier) {
          Load load = loads[i];
          loads.erase(loads.begin() + i);
          tma_land(load);
          progress = true;
        }
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
  if (!loads.empty()) die("the block ended with TMA loads that nothing waited for");
}

// ------------------------------------------------------------------------------------------------ what kernels call
inline uint32_t exchange[THREADS];
inline uint32_t from_lane(uint32_t value, int lane) {
  int thread = thread_number;
  exchange[thread] = value;
  warp_point();
  uint32_t found = exchange[thread / 32 * 32 + lane];
  warp_point();
  return found;
}
inline int __shfl_sync(uint, int value, int lane, int = 32) { return (int)from_lane((uint32_t)value, lane & 31); }
inline float float_from_lane(float value, int lane) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = from_lane(bits, lane);
  memcpy(&value, &bits, 4);
  return value;
}
inline float __shfl_sync(uint, float value, int lane, int = 32) { return float_from_lane(value, lane & 31); }
inline float __shfl_down_sync(uint, float value, int distance, int = 32) {
  int lane = thread_number & 31;
  return float_from_lane(value, lane + distance > 31 ? lane : lane + distance);
}
inline uint __activemask() { return 0xffffffffu; }
inline float __shfl_xor_sync(uint, float value, int distance, int = 32) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = from_lane(bits, (thread_number & 31) ^ distance);
  memcpy(&value, &bits, 4);
  return value;
}
inline void tvm_builtin_ptx_shfl_sync_bfly_b32_f32_f32_u32_u32_u32(float& target, float value, uint32_t distance, uint32_t, uint32_t) {
  target = __shfl_xor_sync(0xffffffffu, value, distance);
}
inline uint tvm_builtin_ballot_sync(uint, int predicate) {
  int thread = thread_number;
  exchange[thread] = predicate != 0;
  warp_point();
  uint found = 0;
  for (int lane = 0; lane < 32; lane++) found |= exchange[thread / 32 * 32 + lane] << lane;
  warp_point();
  return found;
}
inline uint32_t tvm_builtin_cuda_cvta_generic_to_shared(const void* pointer) { return shared_address(pointer); }
inline void tvm_builtin_cuda_cta_sync() { __syncthreads(); }
inline void tvm_builtin_cuda_warp_sync() { warp_point(); }
inline uint tvm_builtin_elect_one_sync_op() { return (thread_number & 31) == 0; }
inline void tvm_builtin_ptx_bar_sync_count_sync(uint id, uint count) { bar_sync(id, count); }
inline void tvm_builtin_ptx_bar_arrive_arrive(uint id, uint count) { named_add(id, count); }
inline void tvm_builtin_ptx_mbarrier_init_init_shared_b64(uint32_t address, uint32_t count) {
  if (address % 8 || count < 1 || count >= 1 << 20) die("an mbarrier at %u for %u arrivals", address, count);
  mbarriers[address] = MBarrier{(int)count, (int)count, 0, 0};
}
inline void tvm_builtin_ptx_mbarrier_arrive_arrive_shared_b64(uint32_t address, uint32_t count) {
  MBarrier& barrier = mbarrier(address);
  barrier.pending -= count;
  mbarrier_check(address, barrier);
}
inline void tvm_builtin_ptx_mbarrier_arrive_expect_tx_arrive_expect_tx_shared_b64(uint32_t address, uint32_t bytes) {
  MBarrier& barrier = mbarrier(address);
  // Of PTX: the range of a transaction count.
  if (bytes >= 1 << 20) die("an mbarrier waits for %u bytes at once", bytes);
  barrier.bytes += bytes, barrier.pending -= 1;
  mbarrier_check(address, barrier);
}
inline void tvm_builtin_cuda_mbarrier_wait(void* pointer, int parity) {
  Fiber& fiber = self();
  fiber.address = shared_address(pointer), fiber.parity = parity;
  while (mbarrier(fiber.address).phase == parity) block_on(Wait::mbarrier);
}
inline void tvm_builtin_ptx_fence_mbarrier_init_mbarrier_init_release_cluster() {}
inline void tvm_builtin_ptx_fence_proxy_proxy_async_shared__cta() {}
inline void tvm_builtin_ptx_ex2_approx_ftz_f32(float& target, float value) { target = exp2f(value); }
inline void tvm_builtin_ptx_min_NaN_f32(float& target, float a, float b) { target = a != a ? a : b != b ? b : min(a, b); }
inline void tvm_builtin_ptx_sub_rn_ftz_f32(float& target, float a, float b) { target = a - b; }
inline void tvm_builtin_ptx_rcp_approx_ftz_f32(float& target, float value) { target = 1.f / value; }
inline void tvm_builtin_ptx_lg2_approx_ftz_f32(float& target, float value) { target = log2f(value); }
inline void tvm_builtin_ptx_cvt_bf16x2_f32_rn_bf16x2_f32(uint32_t& target, float high, float low) {
  target = ((uint32_t)float_to_bf16(high) << 16) | float_to_bf16(low);
}
inline void tvm_builtin_ptx_cvt_f16x2_f32_rn_f16x2_f32(uint32_t& target, float high, float low) {
  target = ((uint32_t)float_to_f16(high) << 16) | float_to_f16(low);
}
template <int N>
inline void store_matrices(uint32_t address, const uint32_t (&values)[N]) {
  int thread = thread_number, warp = thread / 32 * 32, lane = thread % 32;
  exchange[thread] = address;
  warp_point();
  for (int matrix = 0; matrix < N; matrix++) {
    uint32_t row = exchange[warp + 8 * matrix + lane / 4];
    if (row % 16) die("stmatrix at %u", row);
    memcpy(shared_memory + row + lane % 4 * 4, &values[matrix], 4);
  }
  warp_point();
}
inline void tvm_builtin_ptx_stmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  store_matrices<4>(address, {a, b, c, d});
}
inline void tvm_builtin_ptx_stmatrix_sync_aligned_m8n8_x2_shared_b16(uint32_t address, uint32_t a, uint32_t b) {
  store_matrices<2>(address, {a, b});
}
inline void tvm_builtin_ptx_ld_vec_global_nc_v4_u32(uint& a, uint& b, uint& c, uint& d, const void* address) {
  if ((uintptr_t)address % 16) die("a load of 16 bytes at an address that is no multiple of 16");
  uint words[4];
  memcpy(words, address, sizeof words);
  a = words[0], b = words[1], c = words[2], d = words[3];
}
inline void tvm_builtin_ptx_ld_vec_shared_v2_f32(float& a, float& b, uint32_t address) {
  if (address % 8) die("a load of 8 bytes at %u of shared memory", address);
  memcpy(&a, shared_memory + address, 4), memcpy(&b, shared_memory + address + 4, 4);
}
inline void tvm_builtin_ptx_ld_vec_shared_v4_f32(float& a, float& b, float& c, float& d, uint32_t address) {
  if (address % 16 || address + 16 > SHARED) die("a load of 16 bytes at %u of shared memory", address);
  memcpy(&a, shared_memory + address, 4), memcpy(&b, shared_memory + address + 4, 4);
  memcpy(&c, shared_memory + address + 8, 4), memcpy(&d, shared_memory + address + 12, 4);
}
#define TMA_LOAD(n) tvm_builtin_ptx_cp_async_bulk_tensor_g2s_cluster_async_bulk_tensor_##n##d_shared__cluster_global_mbarrier__complete_tx__bytes
#define TMA_STORE(n) tvm_builtin_ptx_cp_async_bulk_tensor_s2g_async_bulk_tensor_##n##d_global_shared__cta_tile_bulk_group
inline void TMA_LOAD(2)(uint32_t to, const void* map, int a, int b, uint32_t barrier) { tma_load(to, map, {a, b}, barrier); }
inline void TMA_LOAD(3)(uint32_t to, const void* map, int a, int b, int c, uint32_t barrier) { tma_load(to, map, {a, b, c}, barrier); }
inline void TMA_LOAD(4)(uint32_t to, const void* map, int a, int b, int c, int d, uint32_t barrier) { tma_load(to, map, {a, b, c, d}, barrier); }
inline void TMA_LOAD(5)(uint32_t to, const void* map, int a, int b, int c, int d, int e, uint32_t barrier) { tma_load(to, map, {a, b, c, d, e}, barrier); }
inline void TMA_STORE(3)(const void* map, int a, int b, int c, uint32_t from) { tma_store(map, {a, b, c}, from); }
inline void TMA_STORE(4)(const void* map, int a, int b, int c, int d, uint32_t from) { tma_store(map, {a, b, c, d}, from); }
inline void TMA_STORE(5)(const void* map, int a, int b, int c, int d, int e, uint32_t from) { tma_store(map, {a, b, c, d, e}, from); }
inline void tvm_builtin_ptx_cp_async_bulk_commit_group_async_bulk_commit_group() {}
inline void tvm_builtin_ptx_cp_async_bulk_wait_group_async_bulk_wait_group_read_0() { tma_store_wait(), bulk_wait(true); }
inline void tvm_builtin_ptx_cp_async_bulk_wait_group_async_bulk_wait_group_0() { tma_store_wait(), bulk_wait(false); }
inline void tvm_builtin_ptx_cp_async_bulk_s2g_async_bulk_global_shared__cta_bulk_group(const void* to, uint32_t from, uint32_t bytes) { bulk(to, from, bytes, false); }
inline void tvm_builtin_ptx_cp_reduce_async_bulk_s2g_reduce_async_bulk_global_shared__cta_bulk_group_add_f32(const void* to, uint32_t from, uint32_t bytes) {
  bulk(to, from, bytes, true);
}
inline void tvm_builtin_ptx_fence_proxy_proxy_async_global() {}
inline void tvm_builtin_ptx_ld_acquire_gpu_global_u32(uint32_t& target, const void* address) { target = poll(address); }
inline void tvm_builtin_ptx_red_release_gpu_global_add_u32(const void* address, uint32_t value) { add_global(address, value); }
inline void tvm_builtin_ptx_atom_global_add_u32(uint32_t& target, const void* address, uint32_t value) { target = add_global(address, value); }
inline void tvm_builtin_ptx_st_vec_global_v4_u32(const void* address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  if ((uintptr_t)address % 16) die("a store of 16 bytes at an address that is no multiple of 16");
  check_global((const uchar*)address, 16);
  uint32_t words[4] = {a, b, c, d};
  memcpy((void*)address, words, sizeof words);
}
inline void tvm_builtin_ptx_st_vec_shared_v4_f32(uint32_t address, float a, float b, float c, float d) {
  if (address % 16) die("a store of 16 bytes at %u of shared memory", address);
  float numbers[4] = {a, b, c, d};
  memcpy(shared_memory + address, numbers, sizeof numbers);
}
inline void ptx_wgmma_encode_matrix_descriptor(uint64_t* target, void* address, int leading, int stride, int swizzle) {
  uint64_t layout = swizzle == 3 ? 1 : swizzle == 2 ? 2 : swizzle == 1 ? 3 : 0;
  *target = ((uint64_t)(shared_address(address) >> 4) & 0x3fff) | ((uint64_t)leading << 16) | ((uint64_t)stride << 32) | (layout << 62);
}
template <class E, int N>
inline void na_pin(E (&)[N]) {}
inline void tvm_builtin_ptx_wgmma_fence_fence_sync_aligned() {}
inline void tvm_builtin_ptx_wgmma_commit_group_commit_group_sync_aligned() { wgmma_commit(); }
inline void tvm_builtin_ptx_wgmma_wait_group_wait_group_sync_aligned_0() { wgmma_wait(0); }
inline void tvm_builtin_ptx_wgmma_wait_group_wait_group_sync_aligned_1() { wgmma_wait(1); }

#include "warp_products.h"

// ------------------------------------------------------------------------------------------------ files
inline uchar* read_tensor(const char* path, size_t bytes) {
  uchar* memory = guarded(bytes, 0xff);
  FILE* file = fopen(path, "rb");
  if (!file || fread(memory, 1, bytes, file) != bytes) die("cannot read %s", path);
  fclose(file);
  return memory;
}
inline void write_tensor(const char* path, const uchar* memory, size_t bytes) {
  FILE* file = fopen(path, "wb");
  if (!file || fwrite(memory, 1, bytes, file) != bytes) die("cannot write %s", path);
  fclose(file);
}
inline void on_fault(int) { die("an access outside the tensors, by thread %d of block %d", thread_number, blockIdx.x); }
inline void catch_faults() {
  signal(SIGSEGV, on_fault);
  signal(SIGBUS, on_fault);
}
