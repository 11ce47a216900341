#include "bundle.h"

#include <cstdlib>
#include <memory>
#include <set>

#include "devices.h"
#include "error.h"
#include "file.h"
#include "sha256.h"

namespace na {
namespace {

std::string gpu_here(int capability) { return sentence({"cuda:sm_", capability, capability == 90 ? "a" : ""}); }

void check_file(const std::string& folder, const File& file) {
  // By its size first: what is endless is not read.
  std::string content;
  try {
    content = read_file(folder + "/" + file.library, file.bytes);
  } catch (const TooLargeError&) {
  }
  if (static_cast<int64_t>(content.size()) != file.bytes || sha256(content) != file.sha256) {
    throw Error({file.library, " is not the file that was put in"});
  }
}

}  // namespace

Bundle::Bundle(std::string folder, const std::string& manifest) : folder_(std::move(folder)) {
  try {
    try {
      manifest_ = Manifest::parse(manifest);
    } catch (const Error& error) {
      throw Error({"manifest.json: ", error.what()});
    }
    check_version(manifest_.ffi_version, {folder_});
    check_files();
  } catch (const Error& error) {
    throw Error({"the bundle in ", folder_, " cannot be used: ", error.what(), "; make it again with na-compile"});
  }
  check_machine();
}

void Bundle::check_files() const {
  for (const Kernel& kernel : manifest_.kernels) check_file(folder_, kernel.file);
  for (const ExtraFile& extra : manifest_.files) check_file(folder_, extra.file);
}

void Bundle::check_machine() const {
  if (manifest_.kernels.empty()) return;
  std::set<std::string> targets;
  bool has_cuda = false;
  for (const Kernel& kernel : manifest_.kernels) {
    if (cpu_order(kernel.target, cpu_features()) >= 0) return;
    has_cuda = has_cuda || kernel.is_cuda();
    targets.insert(kernel.target);
  }
  std::vector<int> gpus = has_cuda ? cuda_capabilities() : std::vector<int>();
  for (int capability : gpus) {
    for (const std::string& target : targets) {
      if (cuda_order(target, capability) >= 0) return;
    }
  }
  std::string all, here = best_cpu_target(), instead = here;
  for (const std::string& target : targets) all += (all.empty() ? "" : ", ") + target;
  if (!gpus.empty()) {
    instead = gpu_here(gpus[0]);
    here += " with " + instead;
  }
  throw Error({"the bundle in ", folder_, " has kernels for ", all, " only, and this machine is ", here,
               "; make it again with --target ", instead});
}

const Bundle& Bundle::open(const std::string& folder) {
  static std::mutex mutex;
  static auto bundles = new std::map<std::pair<std::string, std::string>, const Bundle*>;
  std::unique_ptr<char, void (*)(void*)> resolved(realpath(folder.c_str(), nullptr), std::free);
  if (resolved == nullptr) throw Error({"there is no bundle in ", folder, ": no such folder"});
  std::string path = resolved.get(), manifest;
  if (!is_there(path + "/manifest.json")) throw Error({"there is no bundle in ", folder, ": it has no manifest.json"});
  try {
    manifest = read_file(path + "/manifest.json", kMaxManifestBytes);
  } catch (const Error& error) {
    throw Error({"the bundle in ", path, " cannot be used: ", error.what(), "; make it again with na-compile"});
  }
  std::lock_guard<std::mutex> lock(mutex);
  // Kept by what it says, not by all of its text. One for each bundle that the process ever opened.
  const Bundle*& bundle = (*bundles)[{path, sha256(manifest)}];
  if (bundle == nullptr) bundle = new Bundle(path, manifest);
  return *bundle;
}

const Kernel* Bundle::find(const Problem& problem, bool is_cuda, int capability, std::string& why) const {
  const Kernel* best = nullptr;
  int best_order = -1;
  std::string others;
  for (const Kernel& kernel : manifest_.kernels) {
    if (!kernel.is_forward || !(kernel.problem == problem)) continue;
    int order = is_cuda ? cuda_order(kernel.target, capability) : cpu_order(kernel.target, cpu_features());
    others += (others.empty() ? "" : ", ") + kernel.target;
    if (order > best_order) {
      best_order = order;
      best = &kernel;
    }
  }
  if (best == nullptr) {
    why += (why.empty() ? "the bundle in " : ", and that in ") + folder_;
    why += others.empty() ? sentence({" has ", manifest_.kernels.size(), " kernels for other problems"})
                          : sentence({" has the problem for ", others, " only"});
  }
  return best;
}

const Function& Bundle::function(const Kernel& kernel) const {
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = functions_.find(&kernel);
  if (found != functions_.end()) return found->second;
  try {
    // Hashed when the bundle was opened, and once more before it runs.
    check_file(folder_, kernel.file);
    Function loaded = load_function(folder_ + "/" + kernel.file.library, kernel.is_cuda(), {folder_});
    return functions_.emplace(&kernel, loaded).first->second;
  } catch (const Error& error) {
    throw Error(
        {"the kernel for ", kernel.problem.text(), " in the bundle in ", folder_, " cannot be used: ", error.what()});
  }
}

Match find(const std::vector<const Bundle*>& bundles, const Problem& problem, bool is_cuda, int device,
           const char* advice) {
  int capability = 0;
  if (is_cuda && device >= 0 && static_cast<size_t>(device) < cuda_capabilities().size()) {
    capability = cuda_capabilities()[static_cast<size_t>(device)];
  }
  std::string why;
  for (const Bundle* bundle : bundles) {
    if (const Kernel* kernel = bundle->find(problem, is_cuda, capability, why)) {
      return {std::shared_ptr<const Kernel>(std::shared_ptr<const Kernel>(), kernel), &bundle->function(*kernel)};
    }
  }
  std::string likewise;
  for (const Bundle* bundle : bundles) {
    if (const Kernel* kernel = bundle->find(problem.opened(), is_cuda, capability, likewise)) {
      return {std::make_shared<const Kernel>(kernel->closed(problem)), &bundle->function(*kernel)};
    }
  }
  std::string place = "this CPU";
  if (is_cuda) {
    place = "CUDA device " + std::to_string(device) + ", compute capability " + std::to_string(capability / 10) + "." +
            std::to_string(capability % 10);
  }
  throw Error(
      {"there is no kernel for ", problem.text(), " on ", place, ": ", why, "; compile it with na-compile", advice});
}

}  // namespace na
