// Step 5: the same in C++, without Python: classifies a photograph with ONNX Runtime and the operator library.
//
//   classify MODEL BUNDLE LIBRARY PHOTOGRAPH.ppm [SCORES.txt]
//
// Written against ONNX Runtime's C API. Where its header is not installed, that of the operator library declares the
// part that is used here.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <vector>

#if __has_include(<onnxruntime_c_api.h>)
#include <onnxruntime_c_api.h>
static const OrtApi& api = *OrtGetApiBase()->GetApi(21);
#else
#include "ort_api.h"
extern "C" const OrtApiBase* OrtGetApiBase();
constexpr int ORT_LOGGING_LEVEL_WARNING = 2, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1;
constexpr int OrtArenaAllocator = 1, OrtMemTypeDefault = 0;
static const na::Api api(OrtGetApiBase()->GetApi(21));
#endif

static void check(OrtStatus* status) {
  if (status == nullptr) return;
  std::fprintf(stderr, "classify: %s\n", api.GetErrorMessage(status));
  api.ReleaseStatus(status);
  std::exit(1);
}

// Reads a PPM and makes of it what the model was trained on: three planes of normalised colours.
static std::vector<float> read_photograph(const char* path, int64_t& height, int64_t& width) {
  FILE* file = std::fopen(path, "rb");
  int columns = 0, rows = 0;
  if (file == nullptr || std::fscanf(file, "P6 %d %d 255", &columns, &rows) != 2 || std::fgetc(file) != '\n') {
    std::fprintf(stderr, "classify: %s is no PPM\n", path);
    std::exit(1);
  }
  size_t count = static_cast<size_t>(columns) * rows;
  std::vector<unsigned char> pixels(3 * count);
  if (std::fread(pixels.data(), 1, pixels.size(), file) != pixels.size()) {
    std::fprintf(stderr, "classify: %s ends early\n", path);
    std::exit(1);
  }
  std::fclose(file);
  static const float kMean[] = {0.485f, 0.456f, 0.406f}, kDeviation[] = {0.229f, 0.224f, 0.225f};
  std::vector<float> image(3 * count);
  for (size_t i = 0; i < count; ++i) {
    for (int c = 0; c < 3; ++c) image[c * count + i] = (pixels[3 * i + c] / 255.0f - kMean[c]) / kDeviation[c];
  }
  height = rows;
  width = columns;
  return image;
}

int main(int argc, char** argv) {
  if (argc < 5) {
    std::fprintf(stderr, "usage: classify MODEL BUNDLE LIBRARY PHOTOGRAPH.ppm [SCORES.txt]\n");
    return 2;
  }
  OrtEnv* env = nullptr;
  OrtSessionOptions* options = nullptr;
  OrtSession* session = nullptr;
  check(api.CreateEnv(ORT_LOGGING_LEVEL_WARNING, "classify", &env));
  check(api.CreateSessionOptions(&options));
  // The bundle before the library: it is looked for when the library is registered.
  check(api.AddSessionConfigEntry(options, "na_compiler.bundle", argv[2]));
  check(api.RegisterCustomOpsLibrary_V2(options, argv[3]));
  check(api.CreateSession(env, argv[1], options, &session));

  int64_t shape[4] = {1, 3, 0, 0};
  std::vector<float> image = read_photograph(argv[4], shape[2], shape[3]);
  OrtMemoryInfo* memory = nullptr;
  OrtValue *input = nullptr, *output = nullptr;
  check(api.CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  check(api.CreateTensorWithDataAsOrtValue(memory, image.data(), image.size() * sizeof(float), shape, 4,
                                           ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &input));
  const char* input_names[] = {"image"};
  const char* output_names[] = {"scores"};
  check(api.Run(session, nullptr, input_names, &input, 1, output_names, 1, &output));

  OrtTensorTypeAndShapeInfo* info = nullptr;
  int64_t sizes[2] = {0, 0};
  void* data = nullptr;
  check(api.GetTensorTypeAndShape(output, &info));
  check(api.GetDimensions(info, sizes, 2));
  check(api.GetTensorMutableData(output, &data));
  const float* scores = static_cast<float*>(data);
  std::vector<int> order(sizes[1]);
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + 5, order.end(), [&](int a, int b) { return scores[a] > scores[b]; });
  std::printf("best classes:");
  for (int i = 0; i < 5; ++i) std::printf(" %d", order[i]);
  std::printf("\n");
  if (argc > 5) {
    FILE* file = std::fopen(argv[5], "w");
    if (file == nullptr) return 1;
    for (int64_t i = 0; i < sizes[1]; ++i) std::fprintf(file, "%.9g\n", scores[i]);
    std::fclose(file);
  }

  api.ReleaseTensorTypeAndShapeInfo(info);
  api.ReleaseValue(output);
  api.ReleaseValue(input);
  api.ReleaseMemoryInfo(memory);
  api.ReleaseSession(session);
  api.ReleaseSessionOptions(options);
  api.ReleaseEnv(env);
  return 0;
}
