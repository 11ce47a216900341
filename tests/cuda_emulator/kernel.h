// What generated kernels are compiled with, in place of CUDA's headers: instructions by the names that TVM gives them.
#pragma once
#include "machine.h"

// ------------------------------------------------------------------------------------------------ threads and barriers
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
inline uint tvm_builtin_ballot_sync(uint, int predicate) { return ballot(predicate != 0); }
inline void tvm_builtin_cuda_cta_sync() { __syncthreads(); }
inline void tvm_builtin_cuda_warp_sync() { warp_point(); }
inline uint tvm_builtin_elect_one_sync_op() { return (thread_number & 31) == 0; }
inline void tvm_builtin_ptx_bar_sync_count_sync(uint id, uint count) { bar_sync(id, count); }
inline void tvm_builtin_ptx_bar_arrive_arrive(uint id, uint count) { named_add(id, count); }
inline void tvm_builtin_ptx_mbarrier_init_init_shared_b64(uint32_t address, uint32_t count) { mbarrier_init(address, count); }
inline void tvm_builtin_ptx_mbarrier_arrive_arrive_shared_b64(uint32_t address, uint32_t count) { mbarrier_arrive(address, count); }
inline void tvm_builtin_ptx_mbarrier_arrive_expect_tx_arrive_expect_tx_shared_b64(uint32_t address, uint32_t bytes) {
  mbarrier_expect(address, bytes);
}
inline void tvm_builtin_cuda_mbarrier_wait(void* pointer, int parity) { mbarrier_wait(shared_address(pointer), parity); }
inline void tvm_builtin_ptx_fence_mbarrier_init_mbarrier_init_release_cluster() {}
inline void tvm_builtin_ptx_fence_proxy_proxy_async_shared__cta() {}

// ------------------------------------------------------------------------------------------------ arithmetic
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

// ------------------------------------------------------------------------------------------------ memory
inline uint32_t tvm_builtin_cuda_cvta_generic_to_shared(const void* pointer) { return shared_address(pointer); }
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
inline void tvm_builtin_ptx_st_vec_global_v4_f32(const void* address, float a, float b, float c, float d) {
  if ((uintptr_t)address % 16) die("st.global.v4 to an address that is not a multiple of 16");
  check_global((const uchar*)address, 16);
  const float given[4] = {a, b, c, d};
  memcpy((void*)address, given, 16);
}
inline void tvm_builtin_ptx_st_vec_shared_v4_f32(uint32_t address, float a, float b, float c, float d) {
  if (address % 16) die("a store of 16 bytes at %u of shared memory", address);
  float numbers[4] = {a, b, c, d};
  memcpy(shared_memory + address, numbers, sizeof numbers);
}
#define TMA_LOAD(n) tvm_builtin_ptx_cp_async_bulk_tensor_g2s_cluster_async_bulk_tensor_##n##d_shared__cluster_global_mbarrier__complete_tx__bytes
#define TMA_STORE(n) tvm_builtin_ptx_cp_async_bulk_tensor_s2g_async_bulk_tensor_##n##d_global_shared__cta_tile_bulk_group
inline void TMA_LOAD(2)(uint32_t to, const void* map, int a, int b, uint32_t barrier) {
  int at[] = {a, b};
  tma_load(to, map, at, 2, barrier);
}
inline void TMA_LOAD(3)(uint32_t to, const void* map, int a, int b, int c, uint32_t barrier) {
  int at[] = {a, b, c};
  tma_load(to, map, at, 3, barrier);
}
inline void TMA_LOAD(4)(uint32_t to, const void* map, int a, int b, int c, int d, uint32_t barrier) {
  int at[] = {a, b, c, d};
  tma_load(to, map, at, 4, barrier);
}
inline void TMA_LOAD(5)(uint32_t to, const void* map, int a, int b, int c, int d, int e, uint32_t barrier) {
  int at[] = {a, b, c, d, e};
  tma_load(to, map, at, 5, barrier);
}
inline void TMA_STORE(3)(const void* map, int a, int b, int c, uint32_t from) {
  int at[] = {a, b, c};
  tma_store(map, at, 3, from);
}
inline void TMA_STORE(4)(const void* map, int a, int b, int c, int d, uint32_t from) {
  int at[] = {a, b, c, d};
  tma_store(map, at, 4, from);
}
inline void TMA_STORE(5)(const void* map, int a, int b, int c, int d, int e, uint32_t from) {
  int at[] = {a, b, c, d, e};
  tma_store(map, at, 5, from);
}
inline void tvm_builtin_ptx_cp_async_bulk_commit_group_async_bulk_commit_group() {}
inline void tvm_builtin_ptx_cp_async_bulk_wait_group_async_bulk_wait_group_read_0() { tma_store_wait(), bulk_wait(true); }
inline void tvm_builtin_ptx_cp_async_bulk_wait_group_async_bulk_wait_group_0() { tma_store_wait(), bulk_wait(false); }
inline void tvm_builtin_ptx_cp_async_bulk_s2g_async_bulk_global_shared__cta_bulk_group(const void* to, uint32_t from, uint32_t bytes) { bulk(to, from, bytes, false); }
inline void tvm_builtin_ptx_cp_reduce_async_bulk_s2g_reduce_async_bulk_global_shared__cta_bulk_group_add_f32(const void* to, uint32_t from, uint32_t bytes) {
  bulk(to, from, bytes, true);
}
inline void tvm_builtin_ptx_cp_async_cg_src_size_async_cg_shared_global_16(uint32_t target, const void* source, uint32_t bytes) {
  copy_async(target, source, bytes);
}
inline void tvm_builtin_ptx_cp_async_ca_async_ca_shared_global_8(uint32_t target, const void* source) {
  copy_async(target, source, 8, 8);
}
inline void tvm_builtin_ptx_cp_async_commit_group_async_commit_group() { copies_commit(); }
#define COPIES_WAIT(n) inline void tvm_builtin_ptx_cp_async_wait_group_async_wait_group_##n() { copies_wait(n); }
COPIES_WAIT(0) COPIES_WAIT(1) COPIES_WAIT(2) COPIES_WAIT(3) COPIES_WAIT(4)

// ------------------------------------------------------------------------------------------------ products
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
inline void tvm_builtin_ptx_ldmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t address) {
  uint32_t found[4];
  load_matrices(found, address, false);
  a = found[0], b = found[1], c = found[2], d = found[3];
}
inline void tvm_builtin_ptx_ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t address) {
  uint32_t found[4];
  load_matrices(found, address, true);
  a = found[0], b = found[1], c = found[2], d = found[3];
}
inline void tvm_builtin_ptx_stmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  uint32_t values[] = {a, b, c, d};
  store_matrices(address, values, 4);
}
inline void tvm_builtin_ptx_stmatrix_sync_aligned_m8n8_x2_shared_b16(uint32_t address, uint32_t a, uint32_t b) {
  uint32_t values[] = {a, b};
  store_matrices(address, values, 2);
}
#define MULTIPLY(name, kind)                                                                                              \
  inline void tvm_builtin_ptx_mma_sync_aligned_m16n8k16_row_col_f32_##name##_##name##_f32(                                \
      float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,        \
      uint32_t b1, float c0, float c1, float c2, float c3) {                                                              \
    multiply(kind, {&d0, &d1, &d2, &d3}, {a0, a1, a2, a3, b0, b1}, {c0, c1, c2, c3});                                     \
  }
MULTIPLY(bf16, 0)
MULTIPLY(f16, 1)
// Of float32 to the nearest, halves away from zero.
inline void tvm_builtin_ptx_cvt_tf32_f32_rna_tf32_f32(uint32_t& target, float value) {
  memcpy(&target, &value, 4);
  if (value != value) target = 0x7fffffff;
  else target = (target + 0x1000) & 0xffffe000;
}
inline void tvm_builtin_ptx_mma_sync_aligned_m16n8k8_row_col_f32_tf32_tf32_f32(
    float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
    float c0, float c1, float c2, float c3) {
  multiply_tf32({&d0, &d1, &d2, &d3}, {a0, a1, a2, a3, b0, b1}, {c0, c1, c2, c3});
}
