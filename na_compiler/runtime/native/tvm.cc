#include "tvm.h"

#include <dlfcn.h>
#include <sys/statvfs.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <mutex>

#include "error.h"
#include "paths.h"

// Folders of TVM's libraries on the machine that this was built on, colons between them.
#ifndef NA_TVM_FOLDERS
#define NA_TVM_FOLDERS ""
#endif

namespace na {
namespace {

// ---- Loading -------------------------------------------------------------------------------------------------------

// The functions of libtvm_ffi that are called.
struct Ffi {
  decltype(&TVMFFIFunctionGetGlobal) get_global;
  decltype(&TVMFFIFunctionCall) call;
  decltype(&TVMFFIObjectDecRef) release;
  decltype(&TVMFFIErrorMoveFromRaised) take_error;
  decltype(&TVMFFIEnvSetStream) set_stream;
  TVMFFIVersion version;
};

std::string own_folder() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(&own_folder), &info) || info.dli_fname == nullptr) return ".";
  std::string path = info.dli_fname;
  size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

// What to do about a library that cannot be loaded, where the reason is where it lies; dlopen's own sentence tells of a
// segment.
std::string advice(const std::string& path) {
  struct statvfs system;
  if (statvfs(path.c_str(), &system) != 0 || (system.f_flag & ST_NOEXEC) == 0) return "";
  return "; its file system is mounted noexec, from which no library can be loaded: copy the folder to one that is not, "
         "and name that";
}

// Where TVM's libraries may be: what the user says, what came with the bundle, beside this library, where they were
// when it was built.
std::vector<std::string> places(const std::vector<std::string>& folders) {
  std::vector<std::string> all;
  if (const char* named = std::getenv("NA_COMPILER_TVM_LIB")) all = split(named);
  all.insert(all.end(), folders.begin(), folders.end());
  all.push_back(own_folder());
  for (const std::string& folder : split(NA_TVM_FOLDERS)) all.push_back(folder);
  return all;
}

// Loads a library for everybody: those that are loaded after it find its functions in the process.
void* load_global(const char* name, const std::vector<std::string>& folders) {
  // A process must not have two of it: each would have its own table of functions.
  if (void* there = dlopen(name, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD)) return there;
  std::string problems;
  for (const std::string& folder : places(folders)) {
    std::string path = folder + "/" + name;
    if (access(path.c_str(), F_OK) != 0) continue;
    if (void* loaded = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL)) return loaded;
    problems += std::string("; ") + dlerror() + advice(path);
  }
  if (void* loaded = dlopen(name, RTLD_NOW | RTLD_GLOBAL)) return loaded;  // Where the system looks.
  std::string message = sentence({"cannot load ", name, problems, "; looked in"});
  for (const std::string& folder : places(folders)) message += sentence({" ", folder});
  throw Error({message,
               "; set NA_COMPILER_TVM_LIB to the folders that have libtvm_ffi.so and libtvm_runtime.so, with a "
               "colon between them"});
}

template <typename F>
F symbol(void* library, const char* name) {
  void* found = dlsym(library, name);
  if (found == nullptr) throw Error({"libtvm_ffi.so has no ", name, "; it is of another version"});
  return reinterpret_cast<F>(found);
}

const Ffi& load_ffi(const std::vector<std::string>& folders) {
  static std::mutex mutex;
  static Ffi* loaded = nullptr;
  std::lock_guard<std::mutex> lock(mutex);
  if (loaded == nullptr) {
    void* library = load_global("libtvm_ffi.so", folders);
    load_global("libtvm_runtime.so", folders);  // Kernels call functions of it.
    auto made = new Ffi;
    made->get_global = symbol<decltype(made->get_global)>(library, "TVMFFIFunctionGetGlobal");
    made->call = symbol<decltype(made->call)>(library, "TVMFFIFunctionCall");
    made->release = symbol<decltype(made->release)>(library, "TVMFFIObjectDecRef");
    made->take_error = symbol<decltype(made->take_error)>(library, "TVMFFIErrorMoveFromRaised");
    made->set_stream = symbol<decltype(made->set_stream)>(library, "TVMFFIEnvSetStream");
    symbol<decltype(&TVMFFIGetVersion)>(library, "TVMFFIGetVersion")(&made->version);
    loaded = made;
  }
  return *loaded;
}

const Ffi& ffi() { return load_ffi({}); }

TVMFFIAny make(int32_t type) {
  TVMFFIAny any;
  std::memset(&any, 0, sizeof any);
  any.type_index = type;
  return any;
}

// The message of the error that the last call on this thread left.
std::string error_message() {
  TVMFFIObjectHandle error = nullptr;
  ffi().take_error(&error);
  if (error == nullptr) return "an unknown error";
  const TVMFFIErrorCell* cell = TVMFFIErrorGetCellPtr(error);
  std::string message(cell->message.data, cell->message.size);
  ffi().release(error);
  return message;
}

TVMFFIAny call_global(const char* name, TVMFFIAny* arguments, int count) {
  TVMFFIByteArray bytes{name, std::strlen(name)};
  TVMFFIObjectHandle function = nullptr;
  if (ffi().get_global(&bytes, &function) != 0 || function == nullptr) {
    throw Error({"libtvm_ffi.so has no function ", name, "; it is of another version"});
  }
  TVMFFIAny result = make(kTVMFFINone);
  int failed = ffi().call(function, arguments, count, &result);
  ffi().release(function);
  if (failed) throw Error(error_message());
  return result;
}

}  // namespace

void check_version(const std::string& ffi_version, const std::vector<std::string>& folders) {
  const TVMFFIVersion& version = load_ffi(folders).version;
  // Compatible within a minor version.
  std::string here = std::to_string(version.major) + "." + std::to_string(version.minor);
  if (ffi_version != here && ffi_version.rfind(here + ".", 0) != 0) {
    throw Error({"it was made with apache-tvm-ffi ", ffi_version, ", and ", here, ".", version.patch, " is here"});
  }
}

Function load_function(const std::string& library, bool is_cuda, const std::vector<std::string>& folders) {
  load_ffi(folders);
  if (is_cuda) load_global("libtvm_runtime_cuda.so", folders);
  TVMFFIAny path = make(kTVMFFIRawStr);
  path.v_c_str = library.c_str();
  TVMFFIAny module;
  try {
    module = call_global("ffi.ModuleLoadFromFile", &path, 1);
  } catch (const Error& error) {
    throw Error({error.what(), advice(library)});
  }
  TVMFFIAny arguments[3] = {module, make(kTVMFFIRawStr), make(kTVMFFIBool)};
  arguments[1].v_c_str = "main";
  arguments[2].v_int64 = 1;  // Look into imported modules as well.
  TVMFFIAny function = call_global("ffi.ModuleGetFunction", arguments, 3);
  if (function.type_index < kTVMFFIStaticObjectBegin) throw Error("it has no function main");
  Function result;
  // Module and function are kept for as long as the process lives: sessions come and go.
  result.handle = function.v_obj;
  if (void* handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD)) {
    result.parallel_launch = static_cast<void**>(dlsym(handle, "__TVMBackendParallelLaunch"));
    dlclose(handle);
  }
  return result;
}

DLDataType type_of(const std::string& dtype) {
  if (dtype == "bool") return {static_cast<uint8_t>(kDLBool), 8, 1};
  if (dtype == "int64") return {static_cast<uint8_t>(kDLInt), 64, 1};
  return {static_cast<uint8_t>(dtype == "bfloat16" ? kDLBfloat : kDLFloat),
          static_cast<uint8_t>(dtype == "float32" ? 32 : 16), 1};
}

DLTensor view(const void* data, bool is_cuda, int device, const std::string& dtype, size_t rank, const int64_t* shape,
              const int64_t* strides) {
  DLTensor made;
  std::memset(&made, 0, sizeof made);
  made.data = const_cast<void*>(data);
  made.device = {is_cuda ? kDLCUDA : kDLCPU, device};
  made.ndim = static_cast<int32_t>(rank);
  made.dtype = type_of(dtype);
  made.shape = const_cast<int64_t*>(shape);
  made.strides = const_cast<int64_t*>(strides);
  return made;
}

void Arguments::add(const DLTensor& view) {
  views_.push_back(view);
  values_.push_back(make(kTVMFFIDLTensorPtr));
  values_.back().v_ptr = &views_.back();
}

void Arguments::add(double number) {
  values_.push_back(make(kTVMFFIFloat));
  values_.back().v_float64 = number;
}

void Arguments::add(int64_t number) {
  values_.push_back(make(kTVMFFIInt));
  values_.back().v_int64 = number;
}

void Arguments::call(const Function& function) {
  TVMFFIAny result = make(kTVMFFINone);
  int failed = ffi().call(function.handle, values_.data(), static_cast<int>(values_.size()), &result);
  if (failed) throw Error(error_message());
}

CurrentStream::CurrentStream(int device, void* stream) : device_(device) {
  if (ffi().set_stream(kDLCUDA, device, stream, &before_) != 0) throw Error(error_message());
}

CurrentStream::~CurrentStream() { ffi().set_stream(kDLCUDA, device_, before_, nullptr); }

}  // namespace na
