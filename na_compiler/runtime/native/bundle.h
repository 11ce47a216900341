// Bundles of compiled kernels, as na_compiler.save_bundle writes them.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "manifest.h"
#include "tvm.h"

namespace na {

class Bundle {
 public:
  // The bundle of a folder: checked before anything of it is used, once, and again if its manifest has changed. Never
  // freed, as sessions may use it until the process ends. Throws Error.
  static const Bundle& open(const std::string& folder);

  const std::string& folder() const { return folder_; }

  // The kernel for a problem that runs best on the CPU, or on a CUDA device; null where there is none, and `why` says
  // what there is instead.
  const Kernel* find(const Problem& problem, bool is_cuda, int capability, std::string& why) const;

  // Its function, loaded when it is first asked for. Throws Error if its library was changed since the bundle was opened.
  const Function& function(const Kernel& kernel) const;

 private:
  Bundle(std::string folder, const std::string& manifest);
  // That all files are what was put in, and that this machine runs a kernel.
  void check_files() const;
  void check_machine() const;

  std::string folder_;
  Manifest manifest_;
  mutable std::mutex mutex_;
  mutable std::map<const Kernel*, Function> functions_;
};

// A kernel, ready to be called: a bundle's, or what its kernel for an open layout is for a problem.
struct Match {
  std::shared_ptr<const Kernel> kernel;
  const Function* function;
};

// The kernel for a problem of the first bundle that has one; or else one for an open layout. Throws Error if there is
// none, with some advice.
Match find(const std::vector<const Bundle*>& bundles, const Problem& problem, bool is_cuda, int device,
           const char* advice);

}  // namespace na
