// What this machine runs: na_compiler.devices, in C++.
#pragma once

#include <set>
#include <string>

namespace na {

// The features of the CPU that the operating system lets programs use, by Linux's names. Empty where it does not say.
const std::set<std::string>& cpu_features();

// How good a target is on a CPU of this architecture with some features: the higher the better, -1 where it does not run.
int cpu_order(const std::string& target, const std::set<std::string>& features);

// The same for a CUDA device.
int cuda_order(const std::string& target, int capability);

// 10 times the major plus the minor compute capability of a device; 0 where there is none.
int cuda_capability(int device);

}  // namespace na
