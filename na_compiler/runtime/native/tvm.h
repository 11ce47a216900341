// TVM's runtime, loaded when a kernel is: this library links to nothing of it.
#pragma once

#include <tvm/ffi/c_api.h>

#include <string>
#include <vector>

namespace na {

// A compiled function and what belongs to it.
struct Function {
  TVMFFIObjectHandle handle = nullptr;
  // Where its library keeps the function that runs its parallel loops; null if it has none.
  void** parallel_launch = nullptr;
};

// Loads TVM's runtime, and checks that libraries which were compiled with a version of apache-tvm-ffi run on it.
// `folders` are looked into before the places that were known when this was built. Throws Error.
void check_version(const std::string& ffi_version, const std::vector<std::string>& folders);

// Loads the function `main` of a library. Throws Error.
Function load_function(const std::string& library, bool is_cuda, const std::vector<std::string>& folders);

// A function that runs the parallel loops of a kernel, as TVM declares it (tvm/runtime/c_backend_api.h).
struct Environment {
  void* sync_handle;
  int32_t num_task;
};
using Loop = int (*)(int task, Environment* environment, void* data);
using Launcher = int (*)(Loop loop, void* data, int tasks);

// What DLPack calls a dtype of manifests.
DLDataType type_of(const std::string& dtype);

// A view of a tensor for a kernel; shape and strides stay the caller's, and have to live as long.
DLTensor view(const void* data, bool is_cuda, int device, const std::string& dtype, size_t rank, const int64_t* shape,
              const int64_t* strides);

// What a kernel is called with.
class Arguments {
 public:
  // So many tensors at most.
  explicit Arguments(size_t tensors) { views_.reserve(tensors); }
  void add(const DLTensor& view);
  void add(double number);
  void add(int64_t number);
  // Throws Error.
  void call(const Function& function);

 private:
  std::vector<DLTensor> views_;
  std::vector<TVMFFIAny> values_;
};

// Makes a stream the current one of a CUDA device for this thread, as long as it lives.
class CurrentStream {
 public:
  CurrentStream(int device, void* stream);
  ~CurrentStream();
  CurrentStream(const CurrentStream&) = delete;
  CurrentStream& operator=(const CurrentStream&) = delete;

 private:
  int device_;
  void* before_ = nullptr;
};

}  // namespace na
