// What single warps compute with: asynchronous copies (cp.async), ldmatrix and mma.sync. Part of emulator.h.
#pragma once

// ------------------------------------------------------------------------------------------------ cp.async
inline void copy_land(const Copy& copy) {
  if (copy.bytes) memcpy(shared_memory + copy.target, copy.source, copy.bytes);
  memset(shared_memory + copy.target + copy.bytes, 0, copy.whole - copy.bytes);
}
inline void copy_async(uint32_t target, const void* source, uint32_t bytes, uint32_t whole = 16) {
  if (target % whole || target + whole > SHARED) die("cp.async to %u of shared memory", target);
  if (bytes > whole) die("cp.async of %u bytes", bytes);
  if ((uintptr_t)source % whole) die("cp.async from an address that is not a multiple of %u", whole);
  if (bytes) check_global((const uchar*)source, whole);
  Copy copy{target, (const uchar*)source, bytes, whole};
  if (late_loads) self().copies.push_back(copy);
  else copy_land(copy);
}
inline void tvm_builtin_ptx_cp_async_cg_src_size_async_cg_shared_global_16(uint32_t target, const void* source, uint32_t bytes) {
  copy_async(target, source, bytes);
}
inline void tvm_builtin_ptx_cp_async_ca_async_ca_shared_global_8(uint32_t target, const void* source) {
  copy_async(target, source, 8, 8);
}
inline void tvm_builtin_ptx_cp_async_commit_group_async_commit_group() {
  self().copy_groups.push_back(self().copies);
  self().copies.clear();
}
inline void copies_wait(size_t pending) {
  for (auto& groups = self().copy_groups; groups.size() > pending; groups.pop_front())
    for (auto& copy : groups.front()) copy_land(copy);
}
#define COPIES_WAIT(n) inline void tvm_builtin_ptx_cp_async_wait_group_async_wait_group_##n() { copies_wait(n); }
COPIES_WAIT(0) COPIES_WAIT(1) COPIES_WAIT(2) COPIES_WAIT(3) COPIES_WAIT(4)

// ------------------------------------------------------------------------------------------------ ldmatrix
// Wavefronts for each eight rows that one matrix is read by: 1 where they lie in different banks.
inline long matrix_reads = 0, matrix_wavefronts = 0;
inline void count_wavefronts(const uint32_t* rows) {
  int hits[8] = {0}, most = 0;
  for (int i = 0; i < 8; i++) {
    bool again = false;
    for (int k = 0; k < i; k++) again |= rows[k] == rows[i];
    if (!again) most = max(most, ++hits[rows[i] / 16 % 8]);
  }
  matrix_reads++, matrix_wavefronts += most;
}
inline void load_matrices(uint32_t (&found)[4], uint32_t address, bool transposed) {
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

// ------------------------------------------------------------------------------------------------ mma.sync
inline uint32_t operands[THREADS][6];
inline void multiply(int kind, float* const (&target)[4], const uint32_t (&given)[6], const float (&added)[4]) {
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
#define MULTIPLY(name, kind)                                                                                              \
  inline void tvm_builtin_ptx_mma_sync_aligned_m16n8k16_row_col_f32_##name##_##name##_f32(                                \
      float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,        \
      uint32_t b1, float c0, float c1, float c2, float c3) {                                                              \
    multiply(kind, {&d0, &d1, &d2, &d3}, {a0, a1, a2, a3, b0, b1}, {c0, c1, c2, c3});                                     \
  }
MULTIPLY(bf16, 0)
MULTIPLY(f16, 1)

// ------------------------------------------------------------------------------------------------ TF32
// Of float32 to the nearest, halves away from zero; the products do not look at the last 13 bits.
inline void tvm_builtin_ptx_cvt_tf32_f32_rna_tf32_f32(uint32_t& target, float value) {
  memcpy(&target, &value, 4);
  if (value != value) target = 0x7fffffff;
  else target = (target + 0x1000) & 0xffffe000;
}
inline float tf32(uint32_t bits) {
  float value;
  bits &= 0xffffe000;
  memcpy(&value, &bits, 4);
  return value;
}
inline void tvm_builtin_ptx_mma_sync_aligned_m16n8k8_row_col_f32_tf32_tf32_f32(
    float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
    float c0, float c1, float c2, float c3) {
  const uint32_t given[6] = {a0, a1, a2, a3, b0, b1};
  float sum[4] = {c0, c1, c2, c3};
  int thread = thread_number, warp = thread & ~31, lane = thread & 31;
  memcpy(operands[thread], given, sizeof given);
  warp_point();
  for (int i = 0; i < 4; i++) {
    int row = lane / 4 + 8 * (i >> 1), column = lane % 4 * 2 + (i & 1);
    for (int k = 0; k < 8; k++)
      sum[i] += tf32(operands[warp + row % 8 * 4 + k % 4][row / 8 + 2 * (k / 4)]) *
                tf32(operands[warp + column * 4 + k % 4][4 + k / 4]);
  }
  warp_point();
  d0 = sum[0], d1 = sum[1], d2 = sum[2], d3 = sum[3];
}
inline void tvm_builtin_ptx_st_vec_global_v4_f32(const void* address, float a, float b, float c, float d) {
  if ((uintptr_t)address % 16) die("st.global.v4 to an address that is not a multiple of 16");
  check_global((const uchar*)address, 16);
  const float given[4] = {a, b, c, d};
  memcpy((void*)address, given, 16);
}
