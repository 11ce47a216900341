// TVM's runtime, loaded when a kernel is: this library links to nothing of it.
#pragma once

#include <tvm/ffi/c_api.h>

#include <string>
#include <vector>

struct OrtKernelContext;

namespace na {

struct Api;

// A compiled function and what belongs to it.
struct Function {
  TVMFFIObjectHandle handle = nullptr;
  // Where its library keeps the function that runs its parallel loops; null if it has none.
  void** parallel_launch = nullptr;
};

// Loads a function of a library that was compiled with a version of apache-tvm-ffi. `folders` are looked into for TVM's
// runtime, before the places that were known when this was built. Throws Error.
Function load_function(const std::string& library, const std::string& name, bool is_cuda,
                       const std::vector<std::string>& folders, const std::string& ffi_version);

// Calls a function; its parallel loops run on the pool of the session that the context belongs to. Throws Error.
void call(const Api& api, const Function& function, OrtKernelContext* context, const TVMFFIAny* arguments, int count);

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

// The compute capability of a CUDA device, as 10 * major + minor; 0 where there is none.
int cuda_capability(int device);

}  // namespace na
