// What a node is told by its attributes, as ONNX Runtime has them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ort_api.h"

namespace na {

// An int for each axis; `otherwise` on each where the attribute is left out, if it may be.
std::vector<int64_t> integers(const Api& api, const OrtKernelInfo* info, const char* name, size_t rank,
                              const int64_t* otherwise);

std::string read_word(const Api& api, const OrtKernelInfo* info, const char* name, const char* otherwise);

// Whether a node has an attribute at all, of any type that can be asked for.
bool has_attribute(const Api& api, const OrtKernelInfo* info, const char* name);

// Refuses a name that an attribute of ours may have been meant by.
void refuse_mistaken(const Api& api, const OrtKernelInfo* info);

}  // namespace na
