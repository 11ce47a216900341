#include "devices.h"

#include <dlfcn.h>

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <vector>

// The instruction sets and what they take: na_compiler.devices.cpu.feature_table(), when this was built.
#ifndef NA_CPU_FEATURES
#error "build this with the options of na_compiler.runtime.native.flags()"
#endif

namespace na {
namespace {

#if defined(__x86_64__)
constexpr char kMachine[] = "x86-64";
#elif defined(__aarch64__)
constexpr char kMachine[] = "aarch64";
#else
constexpr char kMachine[] = "";
#endif

std::vector<std::string> split_at(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

}  // namespace

const std::set<std::string>& cpu_features() {
  static const auto* features = [] {
    auto* found = new std::set<std::string>;
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; std::getline(file, line);) {
      if (line.compare(0, 5, "flags") != 0) continue;
      std::istringstream words(line.substr(line.find(':') + 1));
      for (std::string word; words >> word;) found->insert(word);
      break;
    }
    return found;
  }();
  return *features;
}

int cpu_order(const std::string& target, const std::set<std::string>& features) {
  int order = 0;
  for (const std::string& one : split_at(NA_CPU_FEATURES, ';')) {
    std::vector<std::string> parts = split_at(one, ':');  // Architecture, name, features that it adds, if any.
    if (parts[0] != kMachine) continue;
    if (parts.size() > 2) {
      for (const std::string& feature : split_at(parts[2], ',')) {
        if (features.count(feature) == 0) return -1;
      }
    }
    if (target == "llvm:" + parts[1]) return order;
    ++order;
  }
  return -1;
}

std::string best_cpu_target() {
  std::string best = "no CPU that kernels are compiled for";
  int order = -1;
  for (const std::string& one : split_at(NA_CPU_FEATURES, ';')) {
    std::string target = "llvm:" + split_at(one, ':')[1];
    if (cpu_order(target, cpu_features()) > order) {
      order = cpu_order(target, cpu_features());
      best = target;
    }
  }
  return best;
}

// Machine code runs on its own generation, from its own capability on; code with instructions of one architecture
// (sm_90a) on that alone, and so does Tegra's. Blocks for 8.0 may take more shared memory than 8.6 and 8.9 have. See
// na_compiler/devices/cuda.py.
int cuda_order(const std::string& target, int capability) {
  static const std::string kPrefix = "cuda:sm_";
  if (target.compare(0, kPrefix.size(), kPrefix) != 0) return -1;
  char* after = nullptr;
  int built = static_cast<int>(std::strtol(target.c_str() + kPrefix.size(), &after, 10));
  bool is_specific = *after != '\0';
  auto is_tegra = [](int number) { return number == 87 || number == 88 || number == 110; };
  bool is_alone = is_specific || is_tegra(built) || is_tegra(capability);
  bool has_room = built != 80 || (capability != 86 && capability != 89);
  bool runs = is_alone ? built == capability : built / 10 == capability / 10 && built <= capability && has_room;
  return runs ? 2 * built + is_specific : -1;
}

const std::vector<int>& cuda_capabilities() {
  static const auto* found = [] {
    // CUdevice_attribute, in cuda.h.
    constexpr int kMajor = 75, kMinor = 76;
    auto* capabilities = new std::vector<int>;
    void* driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (driver == nullptr) return capabilities;
    auto init = reinterpret_cast<int (*)(unsigned)>(dlsym(driver, "cuInit"));
    auto devices = reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDeviceGetCount"));
    auto get = reinterpret_cast<int (*)(int*, int)>(dlsym(driver, "cuDeviceGet"));
    auto attribute = reinterpret_cast<int (*)(int*, int, int)>(dlsym(driver, "cuDeviceGetAttribute"));
    int count = 0;
    if (!init || !devices || !get || !attribute || init(0) || devices(&count)) return capabilities;
    for (int device = 0; device < count; ++device) {
      int handle = 0, major = 0, minor = 0;
      bool is_known = !get(&handle, device) && !attribute(&major, kMajor, handle) && !attribute(&minor, kMinor, handle);
      capabilities->push_back(is_known ? 10 * major + minor : 0);
    }
    return capabilities;
  }();
  return *found;
}

}  // namespace na
