// The slots of ONNX Runtime's C API that are used here, as the API's version 21 has them (ONNX Runtime 1.21 and every
// later one: the API only ever grows at its end). Declared here, so that building needs no header of ONNX Runtime;
// tests/test_onnx_ort.py compares numbers and types with the header where one is installed.
#pragma once

// SLOT(number, name, result, parameters...)
#define NA_ORT_SLOTS(SLOT)                                                                                             \
  SLOT(0, CreateStatus, OrtStatus*, OrtErrorCode, const char*)                                                         \
  SLOT(2, GetErrorMessage, const char*, const OrtStatus*)                                                              \
  SLOT(3, CreateEnv, OrtStatus*, OrtLoggingLevel, const char*, OrtEnv**)                                               \
  SLOT(7, CreateSession, OrtStatus*, const OrtEnv*, const char*, const OrtSessionOptions*, OrtSession**)               \
  SLOT(9, Run, OrtStatus*, OrtSession*, const OrtRunOptions*, const char* const*, const OrtValue* const*, size_t,      \
       const char* const*, size_t, OrtValue**)                                                                         \
  SLOT(10, CreateSessionOptions, OrtStatus*, OrtSessionOptions**)                                                      \
  SLOT(24, SetIntraOpNumThreads, OrtStatus*, OrtSessionOptions*, int)                                                  \
  SLOT(26, CreateCustomOpDomain, OrtStatus*, const char*, OrtCustomOpDomain**)                                         \
  SLOT(27, CustomOpDomain_Add, OrtStatus*, OrtCustomOpDomain*, const OrtCustomOp*)                                     \
  SLOT(28, AddCustomOpDomain, OrtStatus*, OrtSessionOptions*, OrtCustomOpDomain*)                                      \
  SLOT(49, CreateTensorWithDataAsOrtValue, OrtStatus*, const OrtMemoryInfo*, void*, size_t, const int64_t*, size_t,    \
       ONNXTensorElementDataType, OrtValue**)                                                                          \
  SLOT(51, GetTensorMutableData, OrtStatus*, OrtValue*, void**)                                                        \
  SLOT(55, CastTypeInfoToTensorInfo, OrtStatus*, const OrtTypeInfo*, const OrtTensorTypeAndShapeInfo**)                \
  SLOT(57, CreateTensorTypeAndShapeInfo, OrtStatus*, OrtTensorTypeAndShapeInfo**)                                      \
  SLOT(58, SetTensorElementType, OrtStatus*, OrtTensorTypeAndShapeInfo*, ONNXTensorElementDataType)                    \
  SLOT(59, SetDimensions, OrtStatus*, OrtTensorTypeAndShapeInfo*, const int64_t*, size_t)                              \
  SLOT(60, GetTensorElementType, OrtStatus*, const OrtTensorTypeAndShapeInfo*, ONNXTensorElementDataType*)             \
  SLOT(61, GetDimensionsCount, OrtStatus*, const OrtTensorTypeAndShapeInfo*, size_t*)                                  \
  SLOT(62, GetDimensions, OrtStatus*, const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)                              \
  SLOT(63, GetSymbolicDimensions, OrtStatus*, const OrtTensorTypeAndShapeInfo*, const char**, size_t)                  \
  SLOT(65, GetTensorTypeAndShape, OrtStatus*, const OrtValue*, OrtTensorTypeAndShapeInfo**)                            \
  SLOT(68, CreateMemoryInfo, OrtStatus*, const char*, OrtAllocatorType, int, OrtMemType, OrtMemoryInfo**)              \
  SLOT(69, CreateCpuMemoryInfo, OrtStatus*, OrtAllocatorType, OrtMemType, OrtMemoryInfo**)                             \
  SLOT(72, MemoryInfoGetId, OrtStatus*, const OrtMemoryInfo*, int*)                                                    \
  SLOT(85, KernelInfoGetAttribute_float, OrtStatus*, const OrtKernelInfo*, const char*, float*)                        \
  SLOT(86, KernelInfoGetAttribute_int64, OrtStatus*, const OrtKernelInfo*, const char*, int64_t*)                      \
  SLOT(87, KernelInfoGetAttribute_string, OrtStatus*, const OrtKernelInfo*, const char*, char*, size_t*)               \
  SLOT(88, KernelContext_GetInputCount, OrtStatus*, const OrtKernelContext*, size_t*)                                  \
  SLOT(89, KernelContext_GetOutputCount, OrtStatus*, const OrtKernelContext*, size_t*)                                 \
  SLOT(90, KernelContext_GetInput, OrtStatus*, const OrtKernelContext*, size_t, const OrtValue**)                      \
  SLOT(91, KernelContext_GetOutput, OrtStatus*, OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)         \
  SLOT(92, ReleaseEnv, void, OrtEnv*)                                                                                  \
  SLOT(93, ReleaseStatus, void, OrtStatus*)                                                                            \
  SLOT(94, ReleaseMemoryInfo, void, OrtMemoryInfo*)                                                                    \
  SLOT(95, ReleaseSession, void, OrtSession*)                                                                          \
  SLOT(96, ReleaseValue, void, OrtValue*)                                                                              \
  SLOT(98, ReleaseTypeInfo, void, OrtTypeInfo*)                                                                        \
  SLOT(99, ReleaseTensorTypeAndShapeInfo, void, OrtTensorTypeAndShapeInfo*)                                            \
  SLOT(100, ReleaseSessionOptions, void, OrtSessionOptions*)                                                           \
  SLOT(130, AddSessionConfigEntry, OrtStatus*, OrtSessionOptions*, const char*, const char*)                           \
  SLOT(162, KernelInfoGetAttributeArray_float, OrtStatus*, const OrtKernelInfo*, const char*, float*, size_t*)         \
  SLOT(163, KernelInfoGetAttributeArray_int64, OrtStatus*, const OrtKernelInfo*, const char*, int64_t*, size_t*)       \
  SLOT(193, KernelContext_GetGPUComputeStream, OrtStatus*, const OrtKernelContext*, void**)                            \
  SLOT(194, GetTensorMemoryInfo, OrtStatus*, const OrtValue*, const OrtMemoryInfo**)                                   \
  SLOT(228, RegisterCustomOpsLibrary_V2, OrtStatus*, OrtSessionOptions*, const char*)                                  \
  SLOT(230, KernelInfo_GetInputCount, OrtStatus*, const OrtKernelInfo*, size_t*)                                       \
  SLOT(234, KernelInfo_GetInputTypeInfo, OrtStatus*, const OrtKernelInfo*, size_t, OrtTypeInfo**)                      \
  SLOT(237, HasSessionConfigEntry, OrtStatus*, const OrtSessionOptions*, const char*, int*)                            \
  SLOT(238, GetSessionConfigEntry, OrtStatus*, const OrtSessionOptions*, const char*, char*, size_t*)                  \
  SLOT(244, KernelInfo_GetNodeName, OrtStatus*, const OrtKernelInfo*, char*, size_t*)                                  \
  SLOT(267, ShapeInferContext_GetInputCount, OrtStatus*, const OrtShapeInferContext*, size_t*)                         \
  SLOT(268, ShapeInferContext_GetInputTypeShape, OrtStatus*, const OrtShapeInferContext*, size_t,                      \
       OrtTensorTypeAndShapeInfo**)                                                                                    \
  SLOT(270, ShapeInferContext_SetOutputTypeShape, OrtStatus*, const OrtShapeInferContext*, size_t,                     \
       const OrtTensorTypeAndShapeInfo*)                                                                               \
  SLOT(271, SetSymbolicDimensions, OrtStatus*, OrtTensorTypeAndShapeInfo*, const char**, size_t)                       \
  SLOT(274, KernelContext_ParallelFor, OrtStatus*, const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t,   \
       void*)                                                                                                          \
  SLOT(277, KernelContext_GetScratchBuffer, OrtStatus*, const OrtKernelContext*, const OrtMemoryInfo*, size_t, void**)

// Members of OrtCustomOp after its version, each a pointer. MEMBER(number, name, result, parameters...)
#define NA_ORT_CUSTOM_OP(MEMBER)                                                                                       \
  MEMBER(1, CreateKernel, void*, const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*)                              \
  MEMBER(2, GetName, const char*, const OrtCustomOp*)                                                                  \
  MEMBER(3, GetExecutionProviderType, const char*, const OrtCustomOp*)                                                 \
  MEMBER(4, GetInputType, ONNXTensorElementDataType, const OrtCustomOp*, size_t)                                       \
  MEMBER(5, GetInputTypeCount, size_t, const OrtCustomOp*)                                                             \
  MEMBER(6, GetOutputType, ONNXTensorElementDataType, const OrtCustomOp*, size_t)                                      \
  MEMBER(7, GetOutputTypeCount, size_t, const OrtCustomOp*)                                                            \
  MEMBER(8, KernelCompute, void, void*, OrtKernelContext*)                                                             \
  MEMBER(9, KernelDestroy, void, void*)                                                                                \
  MEMBER(10, GetInputCharacteristic, OrtCustomOpInputOutputCharacteristic, const OrtCustomOp*, size_t)                 \
  MEMBER(11, GetOutputCharacteristic, OrtCustomOpInputOutputCharacteristic, const OrtCustomOp*, size_t)                \
  MEMBER(12, GetInputMemoryType, OrtMemType, const OrtCustomOp*, size_t)                                               \
  MEMBER(13, GetVariadicInputMinArity, int, const OrtCustomOp*)                                                        \
  MEMBER(14, GetVariadicInputHomogeneity, int, const OrtCustomOp*)                                                     \
  MEMBER(15, GetVariadicOutputMinArity, int, const OrtCustomOp*)                                                       \
  MEMBER(16, GetVariadicOutputHomogeneity, int, const OrtCustomOp*)                                                    \
  MEMBER(17, CreateKernelV2, OrtStatus*, const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**)              \
  MEMBER(18, KernelComputeV2, OrtStatus*, void*, OrtKernelContext*)                                                    \
  MEMBER(19, InferOutputShapeFn, OrtStatus*, const OrtCustomOp*, OrtShapeInferContext*)                                \
  MEMBER(20, GetStartVersion, int, const OrtCustomOp*)                                                                 \
  MEMBER(21, GetEndVersion, int, const OrtCustomOp*)                                                                   \
  MEMBER(22, GetMayInplace, size_t, int**, int**)                                                                      \
  MEMBER(23, ReleaseMayInplace, void, int*, int*)                                                                      \
  MEMBER(24, GetAliasMap, size_t, int**, int**)                                                                        \
  MEMBER(25, ReleaseAliasMap, void, int*, int*)
