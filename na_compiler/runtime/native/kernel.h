// What kernels compute, and how they are called.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "table.h"
#include "tvm.h"

namespace na {

// What a kernel computes: na_compiler.Problem.
struct Problem {
  // Of an open layout, which a kernel learns when it is called, 0 along each axis.
  std::vector<int64_t> layout, kernel_size, stride, dilation, is_causal;
  int64_t heads = 0, heads_kv = 0, head_dim = 0, head_dim_v = 0;
  bool additional_kv = false;
  std::string dtype;
  // The other options that it has, in the order of `options()`.
  std::vector<std::string> operands;
  // What windows do at the ends of each axis; nothing where they shift on all. Canonical, as Problem's in Python.
  std::vector<std::string> border;

  // Whether it has the operands of an option; those of none it has always.
  bool has(const std::string& option) const;
  // Has an option from now on; to be called in the order of `options()`.
  void take(const std::string& option);
  // Has a border from now on, as an operator says it, after everything else that it has. Throws Error as `check`.
  void take_border(const std::string& words);
  // What the terms of an operand's shape come to for some batch and additional keys.
  std::vector<int64_t> shape_of(const TableOperand& operand, int64_t batch, int64_t additional) const;

  bool operator==(const Problem& other) const;
  bool is_open() const { return !layout.empty() && layout[0] == 0; }
  // The same with an open layout.
  Problem opened() const;
  // As Problem's str in Python.
  std::string text() const;
  // Throws Error if attributes do not fit the layout, as Problem does.
  void check() const;
  void check_border(size_t axis) const;
};

// An extent of a buffer that a kernel needs beside its inputs and outputs; -1 is the number of additional keys.
using Buffer = std::vector<int64_t>;

// Extents of an open layout: what the tensors hold along the first axis, and the second and third below it; how many parts
// of some size that is, which only workspaces have.
constexpr int64_t kHeld = -10, kParts = -20;

// Kernels count positions in 32 bits, and add windows to them: na_compiler.place.LONGEST_AXIS.
constexpr int64_t kLongestAxis = int64_t{1} << 30;

// What a kernel is called with at one place: na_compiler.operands.Argument. Of a shape's extents, which numbers have none
// of, -1 is the number of additional keys, -2 the batch, and -3 that too, or 0 where nothing is given.
struct Operand {
  std::string name, role, dtype;
  std::vector<int64_t> shape;
  bool is_free = false;
  // Of one whose role is "place": where in a larger layout the tensors lie. Known once there is a layout.
  int64_t number = 0;
};

// A file that a manifest names.
struct File {
  std::string library, sha256;
  int64_t bytes = 0;
};

struct Kernel {
  std::string key;
  File file;
  Problem problem;
  bool is_forward = true;
  std::string target;
  std::vector<Buffer> workspace;
  int64_t multiple = 1;
  std::vector<Operand> operands;
  // What it asks of query, key, value and the like: bytes that addresses and strides are multiples of, and whether heads
  // lie one after another.
  int64_t alignment = 1;
  bool adjacent_heads = false;

  bool is_cuda() const { return target.rfind("cuda", 0) == 0; }
  // Of a kernel for an open layout, what it is for a problem of which tensors hold all. Throws Error for an axis that is
  // too long.
  Kernel closed(const Problem& whole) const;
  // The shape of a buffer of its workspace. Throws Error if it has more elements than can be counted.
  std::vector<int64_t> shape_of(const Buffer& buffer, int64_t batch, int64_t additional) const;
  // That a tensor is what it takes for an operand. Throws Error, which names the operand, what it must be and what it is.
  void check(const Operand& operand, const DLTensor& tensor, int64_t batch, int64_t additional) const;
  // In a few words, why it cannot read a tensor where it is, on which a GPU might fault; empty if it can.
  std::string misplaced(const DLTensor& tensor) const;
};

}  // namespace na
