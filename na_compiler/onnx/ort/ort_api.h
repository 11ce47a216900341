// ONNX Runtime's C API, as far as it is used here, without a header of ONNX Runtime's.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ort_slots.h"

struct OrtApi;
struct OrtCustomOp;
struct OrtCustomOpDomain;
struct OrtEnv;
struct OrtKernelContext;
struct OrtKernelInfo;
struct OrtMemoryInfo;
struct OrtRunOptions;
struct OrtSession;
struct OrtSessionOptions;
struct OrtShapeInferContext;
struct OrtStatus;
struct OrtTensorTypeAndShapeInfo;
struct OrtTypeInfo;
struct OrtValue;

// Enumerations of the C API are ints.
using ONNXTensorElementDataType = int;
using OrtAllocatorType = int;
using OrtCustomOpInputOutputCharacteristic = int;
using OrtErrorCode = int;
using OrtLoggingLevel = int;
using OrtMemType = int;

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

#define NA_ORT_MEMBER(number, name, result, ...) result (*name)(__VA_ARGS__);
struct OrtCustomOp {
  uint32_t version;
  NA_ORT_CUSTOM_OP(NA_ORT_MEMBER)
};
#undef NA_ORT_MEMBER
static_assert(sizeof(OrtCustomOp) == 26 * sizeof(void*), "OrtCustomOp of version 21 has 26 members");

namespace na {

constexpr uint32_t kApiVersion = 21;

// The functions of the C API, by their names.
struct Api {
#define NA_ORT_SLOT(number, name, result, ...) result (*name)(__VA_ARGS__);
  NA_ORT_SLOTS(NA_ORT_SLOT)
#undef NA_ORT_SLOT

  explicit Api(const OrtApi* api) {
    auto slots = reinterpret_cast<void* const*>(api);
#define NA_ORT_SLOT(number, name, result, ...) name = reinterpret_cast<result (*)(__VA_ARGS__)>(slots[number]);
    NA_ORT_SLOTS(NA_ORT_SLOT)
#undef NA_ORT_SLOT
  }
};

}  // namespace na
