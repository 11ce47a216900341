// What a bundle's manifest says: docs/bundle-format.md, na_compiler/runtime/manifest.py.
#pragma once

#include <string>
#include <vector>

#include "kernel.h"

namespace na {

// A file that a bundle has beside its kernels: a launcher, or a library of TVM's, for an architecture.
struct ExtraFile {
  std::string kind, machine;
  File file;
};

struct Manifest {
  // Of what the bundle was made with; `abi` is how kernels are called.
  std::string package_version, abi, tvm_version, ffi_version;
  std::vector<Kernel> kernels;
  std::vector<ExtraFile> files;

  // Reads the text of a manifest, and checks all that can be checked without the files. Throws Error.
  static Manifest parse(const std::string& text);
};

// Some eight thousand kernels.
constexpr int64_t kMaxManifestBytes = 8 << 20;

}  // namespace na
