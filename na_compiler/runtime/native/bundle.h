// Bundles of compiled kernels, as na_compiler.save_bundle writes them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "tvm.h"

namespace na {

// What a kernel computes: na_compiler.Problem.
struct Problem {
  std::vector<int64_t> layout, kernel_size, stride, dilation, is_causal;
  int64_t heads = 0, heads_kv = 0, head_dim = 0, head_dim_v = 0;
  bool additional_kv = false;
  std::string dtype;

  bool operator==(const Problem& other) const;
  // As Problem's str in Python.
  std::string text() const;
  // Throws Error if attributes do not fit the layout, as Problem does.
  void check() const;
};

// An extent of a buffer that a kernel needs beside its inputs and outputs; -1 is the number of additional keys.
using Buffer = std::vector<int64_t>;

struct Kernel {
  Problem problem;
  std::string target, library, name, sha256;
  std::vector<Buffer> workspace;
  int64_t multiple = 1;
  // What it asks of query, key, value and the like: bytes that addresses and strides are multiples of, and whether heads
  // lie one after another.
  int64_t alignment = 1;
  bool adjacent_heads = false;

  bool is_cuda() const { return target.rfind("cuda", 0) == 0; }
  // The shape of a buffer of its workspace.
  std::vector<int64_t> shape_of(const Buffer& buffer, int64_t batch, int64_t additional) const;
  // In a few words, why it cannot read a tensor where it is, on which a GPU might fault; empty if it can.
  std::string misplaced(const DLTensor& tensor) const;
};

class Bundle {
 public:
  // The bundle of a folder: read once, again if its manifest has changed. Never freed, as sessions may use it until the
  // process ends. Throws Error.
  static const Bundle& open(const std::string& folder);

  const std::string& folder() const { return folder_; }

  // The kernel for a problem that runs best on the CPU, or on a CUDA device; null where there is none, and `why` says
  // what there is instead.
  const Kernel* find(const Problem& problem, bool is_cuda, int capability, std::string& why) const;

  // Its function, loaded when it is first asked for. Throws Error if its library is damaged.
  const Function& function(const Kernel& kernel) const;

 private:
  Bundle(std::string folder, const std::string& manifest);
  void read(const std::string& manifest);

  std::string folder_;
  std::string ffi_version_;
  std::vector<Kernel> kernels_;
  mutable std::mutex mutex_;
  mutable std::map<const Kernel*, Function> functions_;
};

// A kernel, ready to be called.
struct Match {
  const Kernel* kernel;
  const Function* function;
};

// The kernel for a problem of the first bundle that has one. Throws Error if none has, with some advice.
Match find(const std::vector<const Bundle*>& bundles, const Problem& problem, bool is_cuda, int device,
           const char* advice);

}  // namespace na
