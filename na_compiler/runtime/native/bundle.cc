#include "bundle.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <tuple>

#include "devices.h"
#include "error.h"
#include "json.h"
#include "sha256.h"

// The manifest's format that this reads: na_compiler.runtime.bundle.FORMAT, when this was built.
#ifndef NA_BUNDLE_FORMAT
#define NA_BUNDLE_FORMAT 4
#endif
// How kernels are called: na_compiler.runtime.kernel.ABI.
#ifndef NA_KERNEL_ABI
#define NA_KERNEL_ABI 2
#endif

namespace na {
namespace {

std::string read_file(const std::string& path) {
  std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (file == nullptr) throw Error("cannot read " + path);
  std::string content;
  char block[1 << 16];
  while (size_t count = std::fread(block, 1, sizeof block, file.get())) content.append(block, count);
  if (std::ferror(file.get())) throw Error("cannot read " + path);
  return content;
}

std::string join(const std::vector<int64_t>& values) {
  std::string text;
  for (int64_t value : values) text += (text.empty() ? "" : "x") + std::to_string(value);
  return text;
}

Problem read_problem(const Json& json) {
  Problem problem;
  problem.layout = json["layout"].integers();
  problem.kernel_size = json["kernel_size"].integers();
  problem.stride = json["stride"].integers();
  problem.dilation = json["dilation"].integers();
  problem.is_causal = json["is_causal"].integers();
  problem.heads = json["heads"].integer();
  problem.heads_kv = json["heads_kv"].integer();
  problem.head_dim = json["head_dim"].integer();
  problem.head_dim_v = json["head_dim_v"].integer();
  problem.additional_kv = json["additional_kv"].boolean();
  problem.dtype = json["dtype"].string();
  return problem;
}

Kernel read_kernel(const Json& json) {
  Kernel kernel;
  kernel.problem = read_problem(json["problem"]);
  kernel.target = json["target"].string();
  kernel.library = json["library"].string();
  kernel.name = json["function"].string();
  kernel.sha256 = json["sha256"].string();
  if (kernel.library.empty() || kernel.library[0] == '/' || kernel.library.find("..") != std::string::npos) {
    throw Error("it names a library outside of it, " + kernel.library);
  }
  const Json* workspace = json.find("workspace");
  if (workspace != nullptr && !workspace->is_null()) {
    for (const Json& shape : (*workspace)["buffers"].array()) {
      Buffer buffer;
      for (const Json& extent : shape.array()) buffer.push_back(extent.is_string() ? -1 : extent.integer());
      kernel.workspace.push_back(buffer);
    }
    kernel.multiple = (*workspace)["multiple"].integer();
    if (kernel.multiple < 1) throw Error("it has a workspace that is none");
  }
  kernel.alignment = json["alignment"].integer();
  kernel.adjacent_heads = json["adjacent_heads"].boolean();
  if (kernel.alignment < 1) throw Error("it has an alignment that is none");
  return kernel;
}

}  // namespace

bool Problem::operator==(const Problem& other) const {
  auto key = [](const Problem& p) {
    return std::tie(p.layout, p.kernel_size, p.stride, p.dilation, p.is_causal, p.heads, p.heads_kv, p.head_dim,
                    p.head_dim_v, p.additional_kv, p.dtype);
  };
  return key(*this) == key(other);
}

std::string Problem::text() const {
  std::string text = "na" + std::to_string(layout.size()) + "d layout=" + join(layout) +
                     " heads=" + std::to_string(heads);
  if (heads_kv != heads) text += " heads_kv=" + std::to_string(heads_kv);
  text += " head_dim=" + std::to_string(head_dim);
  if (head_dim_v != head_dim) text += " head_dim_v=" + std::to_string(head_dim_v);
  text += " kernel_size=" + join(kernel_size);
  std::vector<int64_t> ones(layout.size(), 1), zeros(layout.size(), 0);
  if (stride != ones) text += " stride=" + join(stride);
  if (dilation != ones) text += " dilation=" + join(dilation);
  if (is_causal != zeros) text += " is_causal=" + join(is_causal);
  return text + (additional_kv ? " additional_kv " : " ") + dtype;
}

void Problem::check() const {
  auto on_axis = [](size_t axis) { return " on axis " + std::to_string(axis); };
  for (size_t axis = 0; axis < layout.size(); ++axis) {
    int64_t kernel = kernel_size[axis], step = stride[axis], gap = dilation[axis];
    if (kernel < 1) throw Error("kernel_size must be at least 1, got " + std::to_string(kernel) + on_axis(axis));
    if (gap < 1) throw Error("dilation must be at least 1, got " + std::to_string(gap) + on_axis(axis));
    if (step < 1 || step > kernel) {
      throw Error("stride must be at least 1 and at most kernel_size=" + std::to_string(kernel) + on_axis(axis) +
                  ", got " + std::to_string(step));
    }
    // Without a product, which might overflow.
    if (kernel > layout[axis] / gap) {
      throw Error("kernel_size * dilation must be at most the layout's " + std::to_string(layout[axis]) + " tokens" +
                  on_axis(axis) + ", got kernel_size=" + std::to_string(kernel) + " and dilation=" + std::to_string(gap));
    }
  }
  if (heads_kv < 1 || heads % heads_kv != 0) {
    throw Error("query's heads must be a multiple of key's, got " + std::to_string(heads) + " and " +
                std::to_string(heads_kv));
  }
}

std::vector<int64_t> Kernel::shape_of(const Buffer& buffer, int64_t batch, int64_t additional) const {
  int64_t padded = (additional + multiple - 1) / multiple * multiple;
  std::vector<int64_t> shape = {batch};
  for (int64_t extent : buffer) shape.push_back(extent < 0 ? padded : extent);
  return shape;
}

std::string Kernel::misplaced(const DLTensor& tensor) const {
  int64_t last = tensor.ndim - 1;
  if (tensor.strides[last] != 1) return "the elements of its rows must lie together";
  int64_t elements = std::max<int64_t>(8 * alignment / tensor.dtype.bits, 1);
  std::string multiple_of = " must be a multiple of ";
  if (reinterpret_cast<uintptr_t>(tensor.data) % alignment != 0) {
    return "its address" + multiple_of + std::to_string(alignment);
  }
  for (int64_t axis = 0; axis < last; ++axis) {
    if (tensor.strides[axis] % elements != 0) return "its strides" + multiple_of + std::to_string(elements) + " elements";
  }
  // Additional keys have one axis of tokens only, and strides of their own for heads.
  if (adjacent_heads && last > 3 && tensor.strides[last - 1] != tensor.shape[last]) {
    return "its heads must lie " + std::to_string(tensor.shape[last]) + " elements apart";
  }
  return "";
}

Bundle::Bundle(std::string folder, const std::string& manifest) : folder_(std::move(folder)) {
  try {
    read(manifest);
  } catch (const Error& error) {
    throw Error("the bundle in " + folder_ + " cannot be used: " + error.what() + "; make it again with na-compile");
  }
}

void Bundle::read(const std::string& manifest) {
  Json json = Json::parse(manifest);
  int64_t format = json["format"].integer();
  if (format != NA_BUNDLE_FORMAT) {
    throw Error("its format is " + std::to_string(format) + ", this library reads " + std::to_string(NA_BUNDLE_FORMAT));
  }
  const Json& versions = json["versions"];
  if (versions["abi"].string() != std::to_string(NA_KERNEL_ABI)) {
    throw Error("it is of na_compiler " + versions["na_compiler"].string() + ", whose kernels are called in another way");
  }
  if (sha256(json.canonical("digest")) != json["digest"].string()) throw Error("manifest.json was edited");
  ffi_version_ = versions["apache-tvm-ffi"].string();
  for (const Json& kernel : json["kernels"].array()) {
    if (kernel["direction"].string() == "forward") kernels_.push_back(read_kernel(kernel));
  }
}

const Bundle& Bundle::open(const std::string& folder) {
  static std::mutex mutex;
  static auto bundles = new std::map<std::pair<std::string, std::string>, const Bundle*>;
  char* resolved = realpath(folder.c_str(), nullptr);
  if (resolved == nullptr) throw Error("there is no bundle in " + folder + ": no such folder");
  std::string path = resolved;
  std::free(resolved);
  std::string manifest;
  try {
    manifest = read_file(path + "/manifest.json");
  } catch (const Error&) {
    throw Error("there is no bundle in " + folder + ": it has no manifest.json");
  }
  std::lock_guard<std::mutex> lock(mutex);
  const Bundle*& bundle = (*bundles)[{path, manifest}];
  if (bundle == nullptr) bundle = new Bundle(path, manifest);
  return *bundle;
}

const Kernel* Bundle::find(const Problem& problem, bool is_cuda, int capability, std::string& why) const {
  const Kernel* best = nullptr;
  int best_order = -1;
  std::string others;
  for (const Kernel& kernel : kernels_) {
    if (!(kernel.problem == problem)) continue;
    int order = is_cuda ? cuda_order(kernel.target, capability) : cpu_order(kernel.target, cpu_features());
    others += (others.empty() ? "" : ", ") + kernel.target;
    if (order > best_order) {
      best_order = order;
      best = &kernel;
    }
  }
  if (best == nullptr) {
    why += (why.empty() ? "the bundle in " : ", and that in ") + folder_;
    why += others.empty() ? " has " + std::to_string(kernels_.size()) + " kernels for other problems"
                          : " has the problem for " + others + " only";
  }
  return best;
}

const Function& Bundle::function(const Kernel& kernel) const {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = functions_.find(&kernel);
  if (found != functions_.end()) return found->second;
  std::string path = folder_ + "/" + kernel.library;
  try {
    if (sha256(read_file(path)) != kernel.sha256) throw Error(kernel.library + " is not the file that was put in");
    Function loaded = load_function(path, kernel.name, kernel.is_cuda(), {folder_}, ffi_version_);
    return functions_.emplace(&kernel, loaded).first->second;
  } catch (const Error& error) {
    throw Error("the kernel for " + kernel.problem.text() + " in the bundle in " + folder_ + " cannot be used: " +
                error.what());
  }
}

Match find(const std::vector<const Bundle*>& bundles, const Problem& problem, bool is_cuda, int device,
           const char* advice) {
  int capability = is_cuda ? cuda_capability(device) : 0;
  std::string why;
  for (const Bundle* bundle : bundles) {
    if (const Kernel* kernel = bundle->find(problem, is_cuda, capability, why)) {
      return {kernel, &bundle->function(*kernel)};
    }
  }
  std::string place = "this CPU";
  if (is_cuda) {
    place = "CUDA device " + std::to_string(device) + ", compute capability " + std::to_string(capability / 10) + "." +
            std::to_string(capability % 10);
  }
  throw Error("there is no kernel for " + problem.text() + " on " + place + ": " + why + "; compile it with na-compile" +
              advice);
}

}  // namespace na
