// What moves data: TMA, copies in bulk, cp.async; and where it may.
#include <sys/mman.h>

#include <algorithm>

#include "engine.h"

alignas(1024) uchar shared_memory[SHARED];
struct Tensor { uchar* begin; size_t bytes; };
static std::vector<Tensor> tensors;
void check_global(const uchar* address, size_t count) {
  for (auto& tensor : tensors)
    if (address >= tensor.begin && address + count <= tensor.begin + tensor.bytes) return;
  die("a copy reaches outside the tensors");
}
// A tensor ends where a page begins that may not be touched.
uchar* guarded(size_t bytes, int fill) {
  size_t page = 4096, body = (bytes + page - 1) / page * page + page;
  uchar* memory = (uchar*)mmap(nullptr, body + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) die("no memory for %zu bytes", bytes);
  mprotect(memory + body, page, PROT_NONE);
  uchar* begin = memory + body - (bytes + 15) / 16 * 16;
  memset(begin, fill, bytes);
  tensors.push_back({begin, bytes});
  return begin;
}
uint32_t shared_address(const void* pointer) {
  ptrdiff_t place = (const uchar*)pointer - shared_memory;
  if (place < 0 || place >= (ptrdiff_t)SHARED) die("an address outside shared memory");
  return (uint32_t)place;
}

// ------------------------------------------------------------------------------------------------ TMA
template <class F>
static void tma_walk(const CUtensorMap* map, const int* at, F visit) {
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
static std::deque<Load> loads;
static void tma_land(const Load& load) {
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
static void tma_check(const CUtensorMap* map, const int* at, int rank, uint32_t place) {
  if (!map->base) die("TMA with a tensor map that was not encoded");
  if ((uintptr_t)map->base % 16) die("a tensor map of an address that is no multiple of 16");
  if (rank != map->rank) die("%d coordinates for a map of rank %d", rank, map->rank);
  if (place % (128 << map->swizzle)) die("TMA at %u of shared memory, which is not aligned", place);
  int64_t row = map->box[0] * map->stride[0];
  if (map->swizzle && row != 16 << map->swizzle) die("a box as wide as its swizzle is expected");
  // On an H100 it is an illegal instruction otherwise, whatever the swizzle.
  if (at[0] * map->stride[0] % 16) die("TMA begins %ld bytes along the innermost axis, which is no multiple of 16", (long)(at[0] * map->stride[0]));
}
void tma_load(uint32_t target, const void* map, const int* at, int rank, uint32_t barrier) {
  Load load{(const CUtensorMap*)map, {}, target, barrier};
  tma_check(load.map, at, rank, target);
  std::copy(at, at + rank, load.at);
  if (late_loads) loads.push_back(load);
  else tma_land(load);
}
static void tma_store_now(const Store& store) {
  tma_walk(store.map, store.at, [&](uint32_t place, uchar* target) {
    if (target) check_global(target, 2), memcpy(target, shared_memory + swizzled(store.source + place, store.map->swizzle), 2);
  });
}
void tma_store(const void* map, const int* at, int rank, uint32_t source) {
  Store store{(const CUtensorMap*)map, {}, source};
  tma_check(store.map, at, rank, source);
  if (store.map->stride[0] != 2) die("TMA stores of elements of %ld bytes are not emulated", (long)store.map->stride[0]);
  std::copy(at, at + rank, store.at);
  self().stores.push_back(store);
  if (!late_products) tma_store_now(store);
}
void tma_store_wait() {
  if (late_products)
    for (auto& store : self().stores) tma_store_now(store);
  self().stores.clear();
}
bool land_awaited(int threads) {
  for (size_t i = 0; i < loads.size(); i++)
    for (int t = 0; t < threads; t++)
      if (fibers[t].wait == Wait::mbarrier && fibers[t].address == loads[i].barrier) {
        Load load = loads[i];
        loads.erase(loads.begin() + i);
        tma_land(load);
        return true;
      }
  return false;
}
void forget_loads() { loads.clear(); }
bool any_loads() { return !loads.empty(); }

// ------------------------------------------------------------------------------------------------ bulk copies, turns
static void bulk_read(Bulk& bulk) {
  if (!bulk.is_read) bulk.data.assign(shared_memory + bulk.source, shared_memory + bulk.source + bulk.bytes);
  bulk.is_read = true;
}
static void bulk_write(Bulk& bulk) {
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
void bulk(const void* target, uint32_t source, uint32_t bytes, bool adds) {
  if ((uintptr_t)target % 16 || source % 16 || bytes % 16) die("a copy of %u bytes in bulk, from %u, not all multiples of 16", bytes, source);
  if (source + bytes > SHARED) die("a copy in bulk from beyond shared memory");
  check_global((const uchar*)target, bytes);
  Bulk made{(uchar*)target, source, bytes, adds, false, {}};
  if (!late_products) bulk_write(made);
  self().bulks.push_back(made);
}
void bulk_wait(bool only_read) {
  if (greedy) block_on(Wait::none);
  for (auto& one : self().bulks) {
    if (!late_products) continue;
    if (only_read) bulk_read(one);
    else bulk_write(one);
  }
  if (!only_read) self().bulks.clear();
}
// Blocks run one after another, so what a thread waits for in global memory is there, or never comes.
uint32_t poll(const void* address) {
  Fiber& fiber = self();
  uint32_t value;
  check_global((const uchar*)address, 4);
  memcpy(&value, address, 4);
  fiber.polls = address == fiber.polled && value == fiber.seen ? fiber.polls + 1 : 0;
  fiber.polled = address, fiber.seen = value;
  if (fiber.polls > 3) die("deadlock in block %d: a thread waits for a number in global memory, which is %u, to change", blockIdx.x, value);
  return value;
}
uint32_t add_global(const void* address, uint32_t value) {
  uint32_t before;
  check_global((const uchar*)address, 4);
  memcpy(&before, address, 4);
  value += before;
  memcpy((void*)address, &value, 4);
  return before;
}

// ------------------------------------------------------------------------------------------------ cp.async
static void copy_land(const Copy& copy) {
  if (copy.bytes) memcpy(shared_memory + copy.target, copy.source, copy.bytes);
  memset(shared_memory + copy.target + copy.bytes, 0, copy.whole - copy.bytes);
}
void copy_async(uint32_t target, const void* source, uint32_t bytes, uint32_t whole) {
  if (target % whole || target + whole > SHARED) die("cp.async to %u of shared memory", target);
  if (bytes > whole) die("cp.async of %u bytes", bytes);
  if ((uintptr_t)source % whole) die("cp.async from an address that is not a multiple of %u", whole);
  if (bytes) check_global((const uchar*)source, whole);
  Copy copy{target, (const uchar*)source, bytes, whole};
  if (late_loads) self().copies.push_back(copy);
  else copy_land(copy);
}
void copies_commit() {
  self().copy_groups.push_back(self().copies);
  self().copies.clear();
}
void copies_wait(size_t pending) {
  for (auto& groups = self().copy_groups; groups.size() > pending; groups.pop_front())
    for (auto& copy : groups.front()) copy_land(copy);
}
