// The whole library as one translation unit: it is built on users' machines, and so in half of the time.
// clang-format off
#include "json.cc"
#include "sha256.cc"
#include "tvm.cc"
#include "bundle.cc"
#include "operators.cc"
