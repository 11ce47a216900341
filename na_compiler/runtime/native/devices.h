// What this machine runs: na_compiler.devices, in C++.
#pragma once

#include <set>
#include <string>
#include <vector>

namespace na {

// The features of the CPU that the operating system lets programs use, by Linux's names. Empty where it does not say.
const std::set<std::string>& cpu_features();

// How good a target is on a CPU of this architecture with some features: the higher the better, -1 where it does not run.
int cpu_order(const std::string& target, const std::set<std::string>& features);

// The same for a CUDA device.
int cuda_order(const std::string& target, int capability);

// The best target for this CPU: what to compile for.
std::string best_cpu_target();

// 10 times the major plus the minor compute capability of each CUDA device of this machine.
const std::vector<int>& cuda_capabilities();

}  // namespace na
