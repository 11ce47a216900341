// The machine that runs the CUDA C++ that TVM generates, on a CPU, one thread block after another: what kernels and its
// parts share.
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
//
// Kernels are compiled with kernel.h, which names the instructions as TVM does. What instructions do is compiled once, into
// the other files: threads.cc, memory.cc, products.cc, and program.cc, which reads what to launch.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define CUDART_INF_F INFINITY
#define CUDART_NAN_F NAN
typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned short ushort;
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
// CUDA's return the number beside a NaN.
inline float max(float a, float b) { return std::fmax(a, b); }
inline float min(float a, float b) { return std::fmin(a, b); }

// Ends the process with a message.
[[noreturn]] void die(const char* format, ...);

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

// ------------------------------------------------------------------------------------------------ threads
constexpr size_t SHARED = 227 << 10;
constexpr int THREADS = 1024;
extern bool late_loads, late_products, descending, greedy;
extern Index threadIdx, blockIdx, blockDim, gridDim;
extern int thread_number;  // Of its block, counted along x first.
extern uint32_t exchange[THREADS];
void warp_point();
uint32_t from_lane(uint32_t value, int lane);
uint ballot(bool holds);
void named_add(uint id, uint count);
void bar_sync(uint id, uint count);
void __syncthreads();
void mbarrier_init(uint32_t address, uint32_t count);
void mbarrier_arrive(uint32_t address, uint32_t count);
void mbarrier_expect(uint32_t address, uint32_t bytes);
void mbarrier_wait(uint32_t address, int parity);

// ------------------------------------------------------------------------------------------------ memory
struct CUtensorMap {
  int rank;
  uchar* base;
  int64_t extent[5], stride[5];
  int box[5], step[5], swizzle;
};
extern uchar shared_memory[SHARED];
uint32_t shared_address(const void* pointer);
void check_global(const uchar* address, size_t count);
uint32_t poll(const void* address);
uint32_t add_global(const void* address, uint32_t value);
void tma_load(uint32_t target, const void* map, const int* at, int rank, uint32_t barrier);
void tma_store(const void* map, const int* at, int rank, uint32_t source);
void tma_store_wait();
void bulk(const void* target, uint32_t source, uint32_t bytes, bool adds);
void bulk_wait(bool only_read);
void copy_async(uint32_t target, const void* source, uint32_t bytes, uint32_t whole = 16);
void copies_commit();
void copies_wait(size_t pending);

// ------------------------------------------------------------------------------------------------ products
struct Product {
  int columns, kind, transposed_a, transposed_b;
  bool from_registers, accumulates;
  float* accumulator[128];
  uint32_t* registers[4];
  uint64_t a, b;
};
void wgmma_push(const Product& product);
void wgmma_commit();
void wgmma_wait(size_t pending);
void load_matrices(uint32_t (&found)[4], uint32_t address, bool transposed);
void store_matrices(uint32_t address, const uint32_t* values, int count);
void multiply(int kind, float* const (&target)[4], const uint32_t (&given)[6], const float (&added)[4]);
void multiply_tf32(float* const (&target)[4], const uint32_t (&given)[6], const float (&added)[4]);

// ------------------------------------------------------------------------------------------------ launches
struct Argument { void* pointer; CUtensorMap map; int64_t whole; float real; };
extern Argument arguments[64];
// Of a program, ended by one without a name.
struct Kernel { const char* name; void (*run)(); };
extern Kernel kernels[];
