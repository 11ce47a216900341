// torch.ops.na_compiler.na1d, na2d and na3d on torch's stable ABI: for programs without Python, such as one that runs a
// package of AOTInductor. What they take is what the table of operands says, as na_compiler/ops/schema.py has it; kernels
// come from bundles, whose manifest says what each is called with.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "../runtime/native/native.cc"
#include "call.h"
#include "na_compiler.h"

// launcher.c, which is linked in: parallel loops of kernels on a pool of the host.
extern "C" {
void na_compiler_use_pool(void* run, void* threads);
int na_compiler_launch(void* loop, void* data, int tasks);
}

namespace na {
namespace {

thread_local std::string last_error;

// ---- Bundles -------------------------------------------------------------------------------------------------------

class Bundles {
 public:
  // The last one comes first; the same one again takes the place of what was there.
  void add(const char* folder) {
    const Bundle& bundle = Bundle::open(folder);
    std::lock_guard<std::mutex> lock(mutex_);
    auto is_there = [&](const Bundle* other) { return other->folder() == bundle.folder(); };
    bundles_.erase(std::remove_if(bundles_.begin(), bundles_.end(), is_there), bundles_.end());
    bundles_.insert(bundles_.begin(), &bundle);
  }

  std::vector<const Bundle*> all() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!looked_) {
      const char* named = std::getenv("NA_COMPILER_BUNDLE");
      std::vector<const Bundle*> opened;
      for (const std::string& folder : split(named ? named : "")) opened.push_back(&Bundle::open(folder));
      named_ = opened;
      looked_ = true;
    }
    std::vector<const Bundle*> all = bundles_;
    all.insert(all.end(), named_.begin(), named_.end());
    return all;
  }

 private:
  std::mutex mutex_;
  std::vector<const Bundle*> bundles_, named_;
  bool looked_ = false;
};

Bundles& bundles() {
  static auto made = new Bundles;
  return *made;
}

// ---- Looking kernels up --------------------------------------------------------------------------------------------

// All that decides which kernel it is, as numbers.
using Key = std::vector<int64_t>;

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 14695981039346656037ull;  // FNV-1a.
    for (int64_t value : key) hash = (hash ^ static_cast<uint64_t>(value)) * 1099511628211ull;
    return static_cast<size_t>(hash);
  }
};

// What was found. Kernels for an open layout serve any number of sizes: all is forgotten when there are too many, and
// looked for again.
constexpr size_t kMostFound = 4096;

std::unordered_map<Key, Match, Hash>& table() {
  static auto made = new std::unordered_map<Key, Match, Hash>;
  return *made;
}

std::shared_mutex table_mutex;

// Bundles that are added come first: what was found in others is looked for again.
void forget() {
  std::unique_lock<std::shared_mutex> lock(table_mutex);
  table().clear();
}

Match look(const Problem& problem, bool is_cuda, int device) {
  problem.check();
  std::vector<const Bundle*> loaded = bundles().all();
  if (loaded.empty()) {
    throw Error({"there is no kernel for ", problem.text(),
                 ": no bundle is loaded; call na_compiler_load_bundle, or set NA_COMPILER_BUNDLE"});
  }
  return find(loaded, problem, is_cuda, device, "");
}

// ---- Calling -------------------------------------------------------------------------------------------------------

void use_torchs_pool(const Function& function) {
  if (function.parallel_launch == nullptr) return;
  static const bool set = [] {
    na_compiler_use_pool(reinterpret_cast<void*>(&torch_parallel_for), reinterpret_cast<void*>(&torch_get_num_threads));
    return true;
  }();
  static_cast<void>(set);
  __atomic_store_n(function.parallel_launch, reinterpret_cast<void*>(&na_compiler_launch), __ATOMIC_RELEASE);
}

Tensor empty(const Tensor& like, const Ints& sizes, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.data(), sizes.size()), type);
}

// The stream that torch launches on. The function is there in a torch for CUDA only, and not among the global symbols of
// a Python process, which loads torch's libraries each for itself: it is asked for where it is.
void* current_stream(int device) {
  using Get = int (*)(int32_t, void**);
  static auto get = reinterpret_cast<Get>([] {
    constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return dlsym(library == nullptr ? RTLD_DEFAULT : library, kName);
  }());
  void* stream = nullptr;
  if (get == nullptr || get(device, &stream) != 0) throw Error("torch does not say on which CUDA stream it is");
  return stream;
}

DLTensor view_of(const Tensor& tensor) {
  return view(tensor.const_data_ptr(), tensor.is_cuda(), tensor.is_cuda() ? tensor.get_device_index() : 0,
              dtype_name(tensor), static_cast<size_t>(tensor.dim()), tensor.sizes().data(), tensor.strides().data());
}

// Not torch::stable::contiguous: it returns a tensor as it is whose last dimension has one element, at whatever stride.
Tensor copy(const Tensor& tensor) {
  Tensor copied = torch::stable::new_empty(tensor, tensor.sizes());
  torch::stable::copy_(copied, tensor);
  return copied;
}

// Calls a kernel with its operands, as its manifest has them, and with a workspace that is made for it.
void run(const Match& match, const Call& call, const std::vector<Tensor>& outputs, int64_t additional) {
  const Kernel& kernel = *match.kernel;
  const Tensor& query = call.tensor("query");
  std::vector<Tensor> tensors;
  tensors.reserve(kernel.operands.size());
  Arguments arguments(kernel.operands.size());
  size_t space = 0, output = 0;
  for (const Operand& operand : kernel.operands) {
    if (operand.role == "place") {
      arguments.add(operand.number);
      continue;
    }
    if (operand.role == "scalar") {
      const Given& one = call.of(operand.name);
      if (one.integer.has_value()) {
        arguments.add(*one.integer);
      } else {
        arguments.add(one.number.value());
      }
      continue;
    }
    if (operand.role == "workspace") {
      Ints sizes = kernel.shape_of(kernel.workspace.at(space++), query.size(0), additional);
      tensors.push_back(empty(query, sizes, ScalarType::Float));
    } else if (operand.role == "output") {
      tensors.push_back(outputs.at(output++));
    } else {
      Tensor tensor = call.tensor(operand.name);
      kernel.check(operand, view_of(tensor), query.size(0), additional);
      bool is_readable = operand.is_free ? kernel.misplaced(view_of(tensor)).empty() : tensor.is_contiguous();
      tensors.push_back(is_readable ? tensor : copy(tensor));
    }
    arguments.add(view_of(tensors.back()));
  }
  std::unique_ptr<torch::stable::accelerator::DeviceGuard> guard;
  std::unique_ptr<CurrentStream> stream;
  if (query.is_cuda()) {
    int device = query.get_device_index();
    // A kernel makes its tensors' device the current one; torch does not expect that of an operator.
    guard = std::make_unique<torch::stable::accelerator::DeviceGuard>(device);
    stream = std::make_unique<CurrentStream>(device, current_stream(device));
  }
  arguments.call(*match.function);
}

void check(const Call& call, size_t rank) {
  for (const Given& one : call.given) {
    size_t axes = one.operand->axes(rank);
    if (one.tensor.has_value() && static_cast<size_t>(one.tensor->dim()) != axes) {
      throw Error({one.operand->name, " must have ", axes, " dimensions, got ", one.tensor->dim()});
    }
  }
  for (const auto& [name, parameter] : kParameters) {
    if ((call.parameters.*parameter).size() != rank) {
      throw Error({name, " must have ", rank, " values"});
    }
  }
  for (int64_t flag : call.parameters.is_causal) {
    if (flag != 0 && flag != 1) throw Error({"is_causal must be 0 or 1 per axis, got ", flag});
  }
}

// The kernel for a call, looked for where none like it was seen before.
Match find_for(const Call& call, int rank, const std::vector<std::string>& options) {
  const Tensor &query = call.tensor("query"), &key = call.tensor("key"), &value = call.tensor("value");
  bool is_cuda = query.is_cuda();
  int device = is_cuda ? query.get_device_index() : 0;
  thread_local Key at;
  at.assign({rank, is_cuda, device, static_cast<int64_t>(query.scalar_type()), key.size(rank + 1),
             value.size(rank + 2)});
  for (int axis = 1; axis < rank + 3; ++axis) at.push_back(query.size(axis));
  for (const auto& [name, parameter] : kParameters) {
    const Ints& values = call.parameters.*parameter;
    at.insert(at.end(), values.begin(), values.end());
  }
  for (const std::string& option : na::options()) {
    at.push_back(std::find(options.begin(), options.end(), option) != options.end());
  }
  for (const TableOperand* operand : word_operands()) {
    const std::string& word = call.of(operand->name).word;
    at.push_back(static_cast<int64_t>(word.size()));
    at.insert(at.end(), word.begin(), word.end());
  }
  {
    std::shared_lock<std::shared_mutex> lock(table_mutex);
    auto found = table().find(at);
    if (found != table().end()) return found->second;
  }
  Match match = look(problem_of(call, options), is_cuda, device);
  if (!is_cuda) use_torchs_pool(*match.function);
  std::unique_lock<std::shared_mutex> lock(table_mutex);
  if (table().size() >= kMostFound) table().clear();
  table()[at] = match;
  return match;
}

std::vector<Tensor> forward(const Call& call, int rank) {
  check(call, static_cast<size_t>(rank));
  int64_t additional = additional_of(call, static_cast<size_t>(rank));
  std::vector<std::string> options = options_of(call, additional);
  Match match = find_for(call, rank, options);
  const Tensor& query = call.tensor("query");
  std::vector<Tensor> outputs;
  for (const TableOperand* output : output_operands()) {
    ScalarType type = output->dtype == "same" ? query.scalar_type() : ScalarType::Float;
    outputs.push_back(empty(query, match.kernel->problem.shape_of(*output, query.size(0), additional), type));
  }
  if (query.size(0) > 0) run(match, call, outputs, additional);
  return outputs;
}

template <int rank>
void boxed(StableIValue* stack, uint64_t, uint64_t) {
  try {
    std::vector<Tensor> outputs = forward(read_call(stack), rank);
    for (const Tensor& output : outputs) *stack++ = torch::stable::detail::from(output);
  } catch (const std::exception& error) {
    throw std::runtime_error("na_compiler: na" + std::to_string(rank) + "d: " + error.what());
  }
}

}  // namespace
}  // namespace na

namespace na {
namespace {

// Why the operators are not this library's; empty where they are. In a process in which the Python package has
// registered its own, nothing is registered here: an exception in a static initializer would end the process.
std::string not_defined = "their definition did not run";

}  // namespace
}  // namespace na

// A fragment: a second definition of a namespace as a whole crashes torch.
STABLE_TORCH_LIBRARY_FRAGMENT(na_compiler, library) {
  try {
    library.def(("na1d" + na::schema()).c_str());
    library.def(("na2d" + na::schema()).c_str());
    library.def(("na3d" + na::schema()).c_str());
    na::not_defined.clear();
  } catch (const std::exception& error) {
    na::not_defined = error.what();
    std::fprintf(stderr, "na_compiler: this process has the operators already, and keeps those\n");
  }
}

STABLE_TORCH_LIBRARY_IMPL(na_compiler, CPU, library) {
  if (!na::not_defined.empty()) return;
  library.impl("na1d", &na::boxed<1>);
  library.impl("na2d", &na::boxed<2>);
  library.impl("na3d", &na::boxed<3>);
}

STABLE_TORCH_LIBRARY_IMPL(na_compiler, CUDA, library) {
  if (!na::not_defined.empty()) return;
  library.impl("na1d", &na::boxed<1>);
  library.impl("na2d", &na::boxed<2>);
  library.impl("na3d", &na::boxed<3>);
}

#define NA_EXPORT __attribute__((visibility("default")))

extern "C" NA_EXPORT int na_compiler_load_bundle(const char* folder) {
  try {
    if (!na::not_defined.empty()) {
      throw na::Error(
          {"the operators of this process are not this library's, which would not use the bundle: ", na::not_defined});
    }
    na::bundles().add(folder);
    na::forget();
    return 0;
  } catch (const std::exception& error) {
    na::last_error = error.what();
    return -1;
  }
}

extern "C" NA_EXPORT const char* na_compiler_last_error(void) { return na::last_error.c_str(); }
