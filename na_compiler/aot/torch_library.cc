// torch.ops.na_compiler.na1d, na2d and na3d on torch's stable ABI: for programs without Python, such as one that runs a
// package of AOTInductor. The schemas are those of na_compiler/ops/schema.py; kernels come from bundles.
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
#include "na_compiler.h"

// launcher.c, which is linked in: parallel loops of kernels on a pool of the host.
extern "C" {
void na_compiler_use_pool(void* run, void* threads);
int na_compiler_launch(void* loop, void* data, int tasks);
}

namespace na {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

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

// Only what was found is kept: at most an entry for each kernel of the bundles and device.
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

const char* dtype_name(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    default: throw Error("tensors must be float32, bfloat16 or float16");
  }
}

Problem problem_of(const std::array<Tensor, 3>& tensors, bool has_additional, const Ints& kernel_size,
                   const Ints& stride, const Ints& dilation, const Ints& is_causal) {
  const auto& [query, key, value] = tensors;
  Problem problem;
  int64_t rank = query.dim() - 3;
  for (int64_t axis = 1; axis <= rank; ++axis) problem.layout.push_back(query.size(axis));
  problem.heads = query.size(rank + 1);
  problem.head_dim = query.size(rank + 2);
  problem.heads_kv = key.size(rank + 1);
  problem.head_dim_v = value.size(rank + 2);
  problem.kernel_size = kernel_size;
  problem.stride = stride;
  problem.dilation = dilation;
  problem.is_causal = is_causal;
  problem.additional_kv = has_additional;
  problem.dtype = dtype_name(query);
  return problem;
}

Match look(const Problem& problem, bool is_cuda, int device) {
  problem.check();
  std::vector<const Bundle*> loaded = bundles().all();
  if (loaded.empty()) {
    throw Error("there is no kernel for " + problem.text() +
                ": no bundle is loaded; call na_compiler_load_bundle, or set NA_COMPILER_BUNDLE");
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

// What the operator has, by the name that the kernel's manifest has for it.
struct Named {
  const char* name;
  Tensor tensor;
};

const Tensor& tensor_of(const std::vector<Named>& given, const Operand& operand) {
  for (const Named& one : given) {
    if (operand.name == one.name) return one.tensor;
  }
  throw Error("the kernel takes " + operand.name + ", which the operator does not have");
}

// Calls a kernel with its operands, and with a workspace that is made for it. The scale is the only number.
void run(const Match& match, const std::vector<Named>& given, double scale, int64_t additional) {
  const Kernel& kernel = *match.kernel;
  const Tensor& query = given[0].tensor;
  std::vector<Tensor> tensors;
  tensors.reserve(kernel.operands.size());
  Arguments arguments(kernel.operands.size());
  size_t space = 0;
  for (const Operand& operand : kernel.operands) {
    if (operand.role == "scalar") {
      if (operand.name != "scale") throw Error("the kernel takes " + operand.name + ", which the operator does not have");
      arguments.add(scale);
      continue;
    }
    if (operand.role == "workspace") {
      Ints sizes = kernel.shape_of(kernel.workspace.at(space++), query.size(0), additional);
      tensors.push_back(empty(query, sizes, ScalarType::Float));
    } else {
      tensors.push_back(tensor_of(given, operand));
    }
    Tensor& tensor = tensors.back();
    if (operand.is_free && !kernel.misplaced(view_of(tensor)).empty()) tensor = copy(tensor);
    arguments.add(view_of(tensor));
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

template <int rank>
std::tuple<Tensor, Tensor> forward(const Tensor query, const Tensor key, const Tensor value, Ints kernel_size,
                                   Ints stride, Ints dilation, Ints is_causal, double scale,
                                   std::optional<Tensor> additional_keys, std::optional<Tensor> additional_values) {
  size_t axes = rank;
  if (query.dim() != rank + 3 || key.dim() != rank + 3 || value.dim() != rank + 3) {
    throw Error("query, key and value must have " + std::to_string(rank + 3) + " dimensions");
  }
  if (kernel_size.size() != axes || stride.size() != axes || dilation.size() != axes || is_causal.size() != axes) {
    throw Error("kernel_size, stride, dilation and is_causal must have " + std::to_string(rank) + " values");
  }
  for (int64_t flag : is_causal) {
    if (flag != 0 && flag != 1) throw Error("is_causal must be 0 or 1 per axis, got " + std::to_string(flag));
  }
  if (additional_keys.has_value() != additional_values.has_value()) {
    throw Error("additional_keys and additional_values come together");
  }
  if (additional_keys.has_value() && (additional_keys->dim() != 4 || additional_values->dim() != 4)) {
    throw Error("additional_keys and additional_values must have 4 dimensions");
  }
  bool has_additional = additional_keys.has_value() && additional_keys->size(1) > 0;
  bool is_cuda = query.is_cuda();
  int device = is_cuda ? query.get_device_index() : 0;

  thread_local Key at;
  at.assign({rank, is_cuda, device, has_additional, static_cast<int64_t>(query.scalar_type()), key.size(rank + 1),
             value.size(rank + 2)});
  for (int axis = 1; axis < rank + 3; ++axis) at.push_back(query.size(axis));
  for (const Ints* values : {&kernel_size, &stride, &dilation, &is_causal}) {
    at.insert(at.end(), values->begin(), values->end());
  }
  Match match{nullptr, nullptr};
  {
    std::shared_lock<std::shared_mutex> lock(table_mutex);
    auto found = table().find(at);
    if (found != table().end()) match = found->second;
  }
  if (match.kernel == nullptr) {
    match = look(problem_of({query, key, value}, has_additional, kernel_size, stride, dilation, is_causal), is_cuda,
                 device);
    if (!is_cuda) use_torchs_pool(*match.function);
    std::unique_lock<std::shared_mutex> lock(table_mutex);
    table()[at] = match;
  }

  Ints sizes;
  for (int axis = 0; axis < rank + 2; ++axis) sizes.push_back(query.size(axis));
  Tensor lse = empty(query, sizes, ScalarType::Float);
  sizes.push_back(value.size(rank + 2));
  Tensor output = empty(query, sizes, query.scalar_type());
  if (query.size(0) == 0) return {output, lse};
  std::vector<Named> given = {{"query", query}, {"key", key}, {"value", value}, {"output", output}, {"lse", lse}};
  if (has_additional) {
    given.push_back({"additional_keys", *additional_keys});
    given.push_back({"additional_values", *additional_values});
  }
  run(match, given, scale, has_additional ? additional_keys->size(1) : 0);
  return {output, lse};
}

template <int rank>
std::tuple<Tensor, Tensor> guarded(const Tensor query, const Tensor key, const Tensor value, Ints kernel_size,
                                   Ints stride, Ints dilation, Ints is_causal, double scale,
                                   std::optional<Tensor> additional_keys, std::optional<Tensor> additional_values) {
  try {
    return forward<rank>(query, key, value, std::move(kernel_size), std::move(stride), std::move(dilation),
                         std::move(is_causal), scale, std::move(additional_keys), std::move(additional_values));
  } catch (const std::exception& error) {
    throw std::runtime_error("na_compiler: na" + std::to_string(rank) + "d: " + error.what());
  }
}

}  // namespace
}  // namespace na

#define NA_SCHEMA                                                                                                   \
  "(Tensor query, Tensor key, Tensor value, int[] kernel_size, int[] stride, int[] dilation, int[] is_causal, "     \
  "float scale, Tensor? additional_keys=None, Tensor? additional_values=None) -> (Tensor output, Tensor lse)"

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
    library.def("na1d" NA_SCHEMA);
    library.def("na2d" NA_SCHEMA);
    library.def("na3d" NA_SCHEMA);
    na::not_defined.clear();
  } catch (const std::exception& error) {
    na::not_defined = error.what();
    std::fprintf(stderr, "na_compiler: this process has the operators already, and keeps those\n");
  }
}

STABLE_TORCH_LIBRARY_IMPL(na_compiler, CPU, library) {
  if (!na::not_defined.empty()) return;
  library.impl("na1d", TORCH_BOX(&na::guarded<1>));
  library.impl("na2d", TORCH_BOX(&na::guarded<2>));
  library.impl("na3d", TORCH_BOX(&na::guarded<3>));
}

STABLE_TORCH_LIBRARY_IMPL(na_compiler, CUDA, library) {
  if (!na::not_defined.empty()) return;
  library.impl("na1d", TORCH_BOX(&na::guarded<1>));
  library.impl("na2d", TORCH_BOX(&na::guarded<2>));
  library.impl("na3d", TORCH_BOX(&na::guarded<3>));
}

#define NA_EXPORT __attribute__((visibility("default")))

extern "C" NA_EXPORT int na_compiler_load_bundle(const char* folder) {
  try {
    if (!na::not_defined.empty()) {
      throw na::Error("the operators of this process are not this library's, which would not use the bundle: " +
                      na::not_defined);
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
