// The whole library as one translation unit.
// clang-format off
#include "../../runtime/native/native.cc"
#include "pool.cc"
#include "attributes.cc"
#include "node.cc"
#include "operators.cc"
