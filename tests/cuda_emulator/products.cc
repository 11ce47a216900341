// What multiplies matrices: wgmma, for a warpgroup; ldmatrix, stmatrix and mma.sync, for a warp.
#include <utility>

#include "engine.h"

// ------------------------------------------------------------------------------------------------ wgmma
// Element of an operand in shared memory: `along` the columns of the product (or its rows), `depth` in the sum.
static float operand(uint64_t descriptor, int depth, int along, int transposed, int kind) {
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
static void run_product(int warpgroup, size_t number) {
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
void run_groups(int warpgroup) {
  Fiber* threads = fibers + warpgroup * 128;
  for (int t = 1; t < 128; t++)
    if (threads[t].pending != threads[0].pending || threads[t].groups.size() != threads[0].groups.size()) die("threads of a warpgroup wait for different groups");
  while (threads[0].groups.size() > threads[0].pending) {
    for (size_t i = 0; i < threads[0].groups.front().size(); i++) run_product(warpgroup, i);
    for (int t = 0; t < 128; t++) threads[t].groups.pop_front();
  }
  for (int t = 0; t < 128; t++) threads[t].wait = Wait::none;
}
void wgmma_push(const Product& product) {
  // What the accumulators held is gone once a product that does not add to it may have begun.
  if (late_products && !product.accumulates)
    for (int i = 0; i < product.columns / 2; i++) *product.accumulator[i] = NAN;
  self().open.push_back(product);
}
void wgmma_wait(size_t pending) {
  self().pending = pending;
  block_on(Wait::warpgroup);
}
void wgmma_commit() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
  if (!late_products) wgmma_wait(0);
}

// ------------------------------------------------------------------------------------------------ ldmatrix, stmatrix
// Wavefronts for each eight rows that one matrix is read by: 1 where they lie in different banks.
static long matrix_reads = 0, matrix_wavefronts = 0;
static void count_wavefronts(const uint32_t* rows) {
  int hits[8] = {0}, most = 0;
  for (int i = 0; i < 8; i++) {
    bool again = false;
    for (int k = 0; k < i; k++) again |= rows[k] == rows[i];
    if (!again) most = max(most, ++hits[rows[i] / 16 % 8]);
  }
  matrix_reads++, matrix_wavefronts += most;
}
void load_matrices(uint32_t (&found)[4], uint32_t address, bool transposed) {
  int thread = thread_number, warp = thread & ~31, lane = thread & 31;
  if (address % 16 || address + 16 > SHARED) die("ldmatrix at %u", address);
  exchange[thread] = address;
  warp_point();
  for (int matrix = 0; matrix < 4; matrix++) {
    if (lane == 0) count_wavefronts(exchange + warp + 8 * matrix);
    uint16_t pair[2];
    for (int i = 0; i < 2; i++) {
      int along = lane % 4 * 2 + i, row = transposed ? along : lane / 4, column = transposed ? lane / 4 : along;
      memcpy(&pair[i], shared_memory + exchange[warp + 8 * matrix + row] + column * 2, 2);
    }
    found[matrix] = pair[0] | (uint32_t)pair[1] << 16;
  }
  warp_point();
}
void store_matrices(uint32_t address, const uint32_t* values, int count) {
  int thread = thread_number, warp = thread / 32 * 32, lane = thread % 32;
  exchange[thread] = address;
  warp_point();
  for (int matrix = 0; matrix < count; matrix++) {
    uint32_t row = exchange[warp + 8 * matrix + lane / 4];
    if (row % 16) die("stmatrix at %u", row);
    memcpy(shared_memory + row + lane % 4 * 4, &values[matrix], 4);
  }
  warp_point();
}

// ------------------------------------------------------------------------------------------------ mma.sync
static uint32_t operands[THREADS][6];
void multiply(int kind, float* const (&target)[4], const uint32_t (&given)[6], const float (&added)[4]) {
  int thread = thread_number, warp = thread & ~31, lane = thread & 31;
  memcpy(operands[thread], given, sizeof given);
  warp_point();
  auto half_of = [&](uint32_t pair, int k) { return element(kind, k & 1 ? pair >> 16 : pair & 0xffff); };
  float sum[4];
  for (int i = 0; i < 4; i++) {
    int row = lane / 4 + 8 * (i >> 1), column = lane % 4 * 2 + (i & 1);
    sum[i] = added[i];
    for (int k = 0; k < 16; k++)
      sum[i] += half_of(operands[warp + row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)], k) *
                half_of(operands[warp + column * 4 + k % 8 / 2][4 + k / 8], k);
  }
  warp_point();
  for (int i = 0; i < 4; i++) *target[i] = sum[i];
}

// Products of TF32 do not look at the last 13 bits.
static float tf32(uint32_t bits) {
  float value;
  bits &= 0xffffe000;
  memcpy(&value, &bits, 4);
  return value;
}
void multiply_tf32(float* const (&target)[4], const uint32_t (&given)[6], const float (&added)[4]) {
  int thread = thread_number, warp = thread & ~31, lane = thread & 31;
  memcpy(operands[thread], given, sizeof given);
  warp_point();
  float sum[4];
  for (int i = 0; i < 4; i++) {
    int row = lane / 4 + 8 * (i >> 1), column = lane % 4 * 2 + (i & 1);
    sum[i] = added[i];
    for (int k = 0; k < 8; k++)
      sum[i] += tf32(operands[warp + row % 8 * 4 + k % 4][row / 8 + 2 * (k / 4)]) *
                tf32(operands[warp + column * 4 + k % 4][4 + k / 4]);
  }
  warp_point();
  for (int i = 0; i < 4; i++) *target[i] = sum[i];
}
