// All of this folder, for a library that is one translation unit: libraries are built on users' machines, and so in half
// of the time.
// clang-format off
#include "error.cc"
#include "file.cc"
#include "json.cc"
#include "sha256.cc"
#include "devices.cc"
#include "tvm.cc"
#include "table.cc"
#include "kernel.cc"
#include "border.cc"
#include "manifest.cc"
#include "bundle.cc"
