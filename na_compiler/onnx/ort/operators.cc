// The operators NA1D, NA2D and NA3D for ONNX Runtime: looks at attributes and shapes, finds the kernel, calls it.
//
// Nothing here throws into ONNX Runtime: what goes wrong becomes a status with a sentence.

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "bundle.h"
#include "error.h"
#include "ort_api.h"
#include "paths.h"
#include "tvm.h"

namespace na {
namespace {

constexpr char kDomain[] = "na_compiler";
constexpr char kBundleEntry[] = "na_compiler.bundle";
constexpr char kBundleVariable[] = "NA_COMPILER_BUNDLE";
constexpr const char* kInputs[] = {"query", "key", "value", "additional_keys", "additional_values"};
constexpr size_t kInputCount = 5, kOutputCount = 2;

// OrtErrorCode, ONNXTensorElementDataType, OrtCustomOpInputOutputCharacteristic, OrtMemType.
enum { kFail = 1, kFloat = 1, kFloat16 = 10, kBFloat16 = 16, kUndefined = 0, kRequired = 0, kOptional = 1 };

using Shape = std::vector<int64_t>;

struct Operator : OrtCustomOp {
  const Api* api;
  std::vector<const Bundle*> bundles;
  const char* name;
  size_t rank;
  bool is_cuda;
  ONNXTensorElementDataType element;
};

// Throws what a status says, and releases it.
void check(const Api& api, OrtStatus* status) {
  if (status == nullptr) return;
  std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw Error(message);
}

bool succeeds(const Api& api, OrtStatus* status) {
  if (status == nullptr) return true;
  api.ReleaseStatus(status);
  return false;
}

// Runs something that may throw; returns the status of it.
template <typename Body>
OrtStatus* guarded(const Api& api, const std::string& where, Body body) {
  std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
  } catch (...) {
    message = "an unknown error";
  }
  return api.CreateStatus(kFail, ("na_compiler: " + where + message).c_str());
}

std::string text(const Shape& shape) {
  std::string result;
  for (int64_t size : shape) result += (result.empty() ? "" : ", ") + (size < 0 ? "?" : std::to_string(size));
  return "[" + result + "]";
}

const char* dtype_name(int element) {
  return element == kFloat ? "float32" : element == kFloat16 ? "float16" : element == kBFloat16 ? "bfloat16" : nullptr;
}

// ---- Attributes ----------------------------------------------------------------------------------------------------

// Whether a node has an attribute at all, of any type that can be asked for.
bool has_attribute(const Api& api, const OrtKernelInfo* info, const char* name) {
  int64_t integer;
  float number;
  size_t size = 0;
  return succeeds(api, api.KernelInfoGetAttribute_int64(info, name, &integer)) ||
         succeeds(api, api.KernelInfoGetAttribute_float(info, name, &number)) ||
         succeeds(api, api.KernelInfoGetAttribute_string(info, name, nullptr, &size)) ||
         succeeds(api, api.KernelInfoGetAttributeArray_float(info, name, nullptr, &(size = 0)));
}

std::vector<int64_t> integers(const Api& api, const OrtKernelInfo* info, const char* name, size_t rank,
                              const int64_t* otherwise) {
  size_t size = 0;
  std::string wanted = std::string(name) + " must be " + std::to_string(rank) + " ints, one per axis";
  if (!succeeds(api, api.KernelInfoGetAttributeArray_int64(info, name, nullptr, &size))) {
    if (otherwise == nullptr || has_attribute(api, info, name)) throw Error(wanted + ", and is missing or something else");
    return std::vector<int64_t>(rank, *otherwise);
  }
  // ONNX Runtime gives an attribute of another type as a list of no ints.
  if (size == 0) throw Error(wanted + ", and is empty or something else");
  if (size != rank) throw Error(wanted + ", got " + std::to_string(size));
  std::vector<int64_t> values(size);
  check(api, api.KernelInfoGetAttributeArray_int64(info, name, values.data(), &size));
  return values;
}

// ---- A node --------------------------------------------------------------------------------------------------------

struct Tensor {
  bool is_there = false;
  int element = kUndefined;
  Shape shape;
  void* data = nullptr;
  OrtValue* value = nullptr;
};

void read_type(const Api& api, const OrtTensorTypeAndShapeInfo* info, Tensor& tensor) {
  size_t rank = 0;
  check(api, api.GetTensorElementType(info, &tensor.element));
  check(api, api.GetDimensionsCount(info, &rank));
  tensor.shape.resize(rank);
  check(api, api.GetDimensions(info, tensor.shape.data(), rank));
}

// A kernel for the shapes that it was found for.
struct Found {
  Shape query, key, value;
  int element;
  bool additional;
  Match match;
};

class Node {
 public:
  Node(const Operator& op, const OrtKernelInfo* info) : op_(op), api_(*op.api) {
    char name[256];
    size_t size = sizeof name;
    if (succeeds(api_, api_.KernelInfo_GetNodeName(info, name, &size)) && name[0] != '\0') {
      where_ = "node " + std::string(name) + " (" + op.name + "): ";
    } else {
      where_ = std::string(op.name) + ": ";
    }
  }

  const Api& api() const { return api_; }
  const std::string& where() const { return where_; }

  void read(const OrtKernelInfo* info) {
    static const int64_t kOne = 1, kZero = 0;
    attributes_.kernel_size = integers(api_, info, "kernel_size", op_.rank, nullptr);
    attributes_.stride = integers(api_, info, "stride", op_.rank, &kOne);
    attributes_.dilation = integers(api_, info, "dilation", op_.rank, &kOne);
    attributes_.is_causal = integers(api_, info, "is_causal", op_.rank, &kZero);
    for (int64_t flag : attributes_.is_causal) {
      if (flag != 0 && flag != 1) throw Error("is_causal must be 0 or 1 per axis, got " + std::to_string(flag));
    }
    if (succeeds(api_, api_.KernelInfoGetAttribute_float(info, "scale", &scale_))) {
      has_scale_ = true;
      if (!std::isfinite(scale_)) throw Error("scale must be finite");
    } else if (has_attribute(api_, info, "scale")) {
      throw Error("scale must be a float, and is of another type");
    }
    look_ahead(info);
  }

  void compute(OrtKernelContext* context) {
    Tensor inputs[kInputCount];
    read_inputs(context, inputs);
    Problem problem = pose(inputs);
    Found found = find(inputs, problem);
    Shape lse_shape(inputs[0].shape.begin(), inputs[0].shape.end() - 1);
    Shape output_shape = lse_shape;
    output_shape.push_back(inputs[2].shape.back());
    Tensor output = make_output(context, 0, output_shape, inputs[0].element);
    Tensor lse = make_output(context, 1, lse_shape, kFloat);
    if (inputs[0].shape[0] == 0) return;
    run(context, found, inputs, output, lse);
  }

 private:
  // Finds the kernel when the session is made, if the model fixes the shapes: better an error then than later.
  void look_ahead(const OrtKernelInfo* info) {
    size_t count = 0;
    if (op_.is_cuda || !succeeds(api_, api_.KernelInfo_GetInputCount(info, &count))) return;
    Tensor inputs[kInputCount];
    for (size_t i = 0; i < std::min(count, kInputCount); ++i) {
      OrtTypeInfo* type = nullptr;
      if (!succeeds(api_, api_.KernelInfo_GetInputTypeInfo(info, i, &type)) || type == nullptr) continue;
      const OrtTensorTypeAndShapeInfo* tensor = nullptr;
      if (succeeds(api_, api_.CastTypeInfoToTensorInfo(type, &tensor)) && tensor != nullptr) {
        read_type(api_, tensor, inputs[i]);
        inputs[i].is_there = true;
      }
      api_.ReleaseTypeInfo(type);
    }
    for (Tensor& input : inputs) {
      if (!input.is_there) continue;
      // Batch, and the number of additional keys, are any.
      size_t axes = &input < inputs + 3 ? 1 : 2;
      for (size_t axis = 0; axis < input.shape.size(); ++axis) {
        if (axis < axes && input.shape[axis] < 0) input.shape[axis] = 1;
        if (input.shape[axis] < 0) return;
      }
      if (input.shape.empty()) return;  // A shape that is not known at all looks like a scalar's.
    }
    if (inputs[0].is_there && inputs[1].is_there && inputs[2].is_there) find(inputs, pose(inputs));
  }

  void read_inputs(OrtKernelContext* context, Tensor (&inputs)[kInputCount]) const {
    size_t count = 0;
    check(api_, api_.KernelContext_GetInputCount(context, &count));
    for (size_t i = 0; i < std::min(count, kInputCount); ++i) {
      const OrtValue* value = nullptr;
      check(api_, api_.KernelContext_GetInput(context, i, &value));
      if (value == nullptr) continue;
      OrtTensorTypeAndShapeInfo* info = nullptr;
      check(api_, api_.GetTensorTypeAndShape(value, &info));
      std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> owner(
          info, api_.ReleaseTensorTypeAndShapeInfo);
      Tensor& tensor = inputs[i];
      read_type(api_, info, tensor);
      tensor.is_there = true;
      tensor.value = const_cast<OrtValue*>(value);
      check(api_, api_.GetTensorMutableData(tensor.value, &tensor.data));
    }
  }

  Tensor make_output(OrtKernelContext* context, size_t index, const Shape& shape, int element) const {
    Tensor tensor;
    size_t count = 0;
    check(api_, api_.KernelContext_GetOutputCount(context, &count));
    if (index < count) {
      check(api_, api_.KernelContext_GetOutput(context, index, shape.data(), shape.size(), &tensor.value));
    }
    if (tensor.value != nullptr) check(api_, api_.GetTensorMutableData(tensor.value, &tensor.data));
    tensor.is_there = tensor.value != nullptr;
    tensor.shape = shape;
    tensor.element = element;
    return tensor;
  }

  // Checks the inputs, and returns the problem that they pose.
  Problem pose(const Tensor (&inputs)[kInputCount]) const {
    const Shape& query = inputs[0].shape;
    if (inputs[3].is_there != inputs[4].is_there) {
      throw Error("additional_keys and additional_values come together, and one is missing");
    }
    if (dtype_name(inputs[0].element) == nullptr) {
      throw Error("query must be float32, float16 or bfloat16, and has ONNX's element type " +
                  std::to_string(inputs[0].element));
    }
    if (query.size() != op_.rank + 3) {
      throw Error("query must have " + std::to_string(op_.rank + 3) + " dimensions, got shape " + text(query));
    }
    Problem problem = attributes_;
    problem.layout.assign(query.begin() + 1, query.end() - 2);
    problem.heads = query[op_.rank + 1];
    problem.head_dim = query[op_.rank + 2];
    problem.dtype = dtype_name(inputs[0].element);
    const Shape &key = inputs[1].shape, &value = inputs[2].shape;
    problem.heads_kv = key.size() == query.size() ? key[op_.rank + 1] : 0;
    problem.head_dim_v = value.size() == query.size() ? value[op_.rank + 2] : 0;
    Shape keys(query.begin(), query.end() - 2);
    int64_t additional = inputs[3].is_there && inputs[3].shape.size() == 4 ? inputs[3].shape[1] : 0;
    Shape more{query[0], additional};
    for (Shape* shape : {&keys, &more}) shape->push_back(problem.heads_kv);
    for (size_t i = 1; i < kInputCount; ++i) {
      if (i >= 3 && !inputs[i].is_there) continue;
      Shape expected = i < 3 ? keys : more;
      expected.push_back(i % 2 == 1 ? problem.head_dim : problem.head_dim_v);
      if (inputs[i].shape != expected) {
        throw Error(std::string(kInputs[i]) + " must have shape " + text(expected) + " where query has " + text(query) +
                    ", got " + text(inputs[i].shape));
      }
      if (inputs[i].element != inputs[0].element) {
        throw Error(std::string(kInputs[i]) + " must have query's type, " + problem.dtype);
      }
    }
    problem.check();
    problem.additional_kv = inputs[3].is_there && additional > 0;
    return problem;
  }

  // The kernel for some inputs: the last one that was found, if it is for the same.
  Found find(const Tensor (&inputs)[kInputCount], const Problem& problem) {
    const Found* last = last_.load(std::memory_order_acquire);
    const Shape &query = inputs[0].shape, &key = inputs[1].shape, &value = inputs[2].shape;
    auto same = [](const Shape& one, const Shape& other) {
      return one.size() == other.size() && std::equal(one.begin() + 1, one.end(), other.begin() + 1);
    };
    if (last != nullptr && last->element == inputs[0].element && last->additional == problem.additional_kv &&
        same(last->query, query) && same(last->key, key) && same(last->value, value)) {
      return *last;
    }
    int device = 0;
    if (op_.is_cuda && inputs[0].value != nullptr) device = device_of(inputs[0]);
    Match match = na::find(op_.bundles, problem, op_.is_cuda, device);
    auto found = std::make_unique<Found>(Found{query, key, value, inputs[0].element, problem.additional_kv, match});
    std::lock_guard<std::mutex> lock(mutex_);
    last_.store(found.get(), std::memory_order_release);
    found_.push_back(std::move(found));  // Another thread may still read the one before.
    return *found_.back();
  }

  const OrtMemoryInfo* memory_of(const Tensor& tensor) const {
    const OrtMemoryInfo* memory = nullptr;
    check(api_, api_.GetTensorMemoryInfo(tensor.value, &memory));
    return memory;
  }

  int device_of(const Tensor& tensor) const {
    int device = 0;
    check(api_, api_.MemoryInfoGetId(memory_of(tensor), &device));
    return device;
  }

  void run(OrtKernelContext* context, const Found& found, Tensor (&inputs)[kInputCount], Tensor& output, Tensor& lse) {
    std::vector<Tensor> spaces;
    std::vector<std::unique_ptr<float[]>> memory;
    auto allocate = [&](Tensor& tensor) {
      size_t count = 1;
      for (int64_t size : tensor.shape) count *= static_cast<size_t>(size);
      if (op_.is_cuda) {
        check(api_, api_.KernelContext_GetScratchBuffer(context, memory_of(inputs[0]), count * sizeof(float),
                                                        &tensor.data));
      } else {
        memory.emplace_back(new float[count]);
        tensor.data = memory.back().get();
      }
    };
    if (!lse.is_there) allocate(lse);
    int64_t additional = found.additional ? inputs[3].shape[1] : 0;
    for (const Buffer& buffer : found.match.kernel->workspace) {
      Tensor space;
      space.element = kFloat;
      space.shape = {inputs[0].shape[0]};
      int64_t padded = (additional + found.match.kernel->multiple - 1) / found.match.kernel->multiple * found.match.kernel->multiple;
      for (int64_t extent : buffer) space.shape.push_back(extent < 0 ? padded : extent);
      allocate(space);
      spaces.push_back(std::move(space));
    }
    std::vector<Tensor*> tensors;
    for (size_t i = 0; i < (found.additional ? kInputCount : 3); ++i) tensors.push_back(&inputs[i]);
    size_t scale_at = tensors.size();
    tensors.push_back(&output);
    tensors.push_back(&lse);
    for (Tensor& space : spaces) tensors.push_back(&space);
    call_kernel(context, found, tensors, scale_at, op_.is_cuda ? device_of(inputs[0]) : 0);
  }

  void call_kernel(OrtKernelContext* context, const Found& found, const std::vector<Tensor*>& tensors, size_t scale_at,
                   int device) {
    // Of the inputs there are at most 6 dimensions, of a workspace a few more.
    std::vector<Shape> strides(tensors.size());
    std::vector<DLTensor> views(tensors.size());
    std::vector<TVMFFIAny> arguments;
    for (size_t i = 0; i < tensors.size(); ++i) {
      Tensor& tensor = *tensors[i];
      Shape& steps = strides[i];
      steps.assign(tensor.shape.size(), 1);
      for (size_t axis = steps.size() - 1; axis > 0; --axis) steps[axis - 1] = steps[axis] * tensor.shape[axis];
      DLTensor& view = views[i];
      std::memset(&view, 0, sizeof view);
      view.data = tensor.data;
      view.device = {op_.is_cuda ? kDLCUDA : kDLCPU, device};
      view.ndim = static_cast<int32_t>(tensor.shape.size());
      view.dtype = {static_cast<uint8_t>(tensor.element == kBFloat16 ? kDLBfloat : kDLFloat),
                    static_cast<uint8_t>(tensor.element == kFloat ? 32 : 16), 1};
      view.shape = tensor.shape.data();
      view.strides = steps.data();
      TVMFFIAny any;
      std::memset(&any, 0, sizeof any);
      if (i == scale_at) {
        any.type_index = kTVMFFIFloat;
        any.v_float64 = has_scale_ ? scale_ : 1.0 / std::sqrt(static_cast<double>(found.query.back()));
        arguments.push_back(any);
      }
      std::memset(&any, 0, sizeof any);
      any.type_index = kTVMFFIDLTensorPtr;
      any.v_ptr = &view;
      arguments.push_back(any);
    }
    std::unique_ptr<CurrentStream> current;
    if (op_.is_cuda) {
      void* stream = nullptr;
      check(api_, api_.KernelContext_GetGPUComputeStream(context, &stream));
      current = std::make_unique<CurrentStream>(device, stream);
    }
    call(api_, *found.match.function, context, arguments.data(), static_cast<int>(arguments.size()));
  }

  const Operator& op_;
  const Api& api_;
  std::string where_;
  Problem attributes_;
  float scale_ = 0;
  bool has_scale_ = false;
  std::atomic<const Found*> last_{nullptr};
  std::mutex mutex_;
  std::vector<std::unique_ptr<const Found>> found_;
};

// ---- What ONNX Runtime calls ---------------------------------------------------------------------------------------

OrtStatus* create(const OrtCustomOp* custom_op, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
  auto op = static_cast<const Operator*>(custom_op);
  std::string where = std::string(op->name) + ": ";
  return guarded(*op->api, "", [&] {
    auto node = std::make_unique<Node>(*op, info);
    where = node->where();
    try {
      node->read(info);
    } catch (const std::exception& error) {
      throw Error(where + error.what());
    }
    *kernel = node.release();
  });
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
  auto node = static_cast<Node*>(kernel);
  return guarded(node->api(), node->where(), [&] { node->compute(context); });
}

// The output has query's sizes but the last, which is value's, and symbols where they have some. Says nothing where it
// knows nothing.
OrtStatus* infer(const OrtCustomOp* custom_op, OrtShapeInferContext* context) {
  auto op = static_cast<const Operator*>(custom_op);
  const Api& api = *op->api;
  return guarded(api, std::string(op->name) + ": ", [&] {
    size_t count = 0;
    if (!succeeds(api, api.ShapeInferContext_GetInputCount(context, &count)) || count < 3) return;
    std::vector<int64_t> sizes;
    std::vector<const char*> symbols;
    int element = kUndefined;
    for (size_t input : {size_t{0}, size_t{2}}) {
      OrtTensorTypeAndShapeInfo* info = nullptr;
      if (!succeeds(api, api.ShapeInferContext_GetInputTypeShape(context, input, &info)) || info == nullptr) return;
      Tensor tensor;
      read_type(api, info, tensor);
      if (tensor.shape.size() != op->rank + 3) return;  // Not known, or wrong: said when the node runs.
      std::vector<const char*> names(tensor.shape.size(), "");
      check(api, api.GetSymbolicDimensions(info, names.data(), names.size()));
      if (input == 0) {
        sizes = tensor.shape;
        symbols = names;
        element = tensor.element;
      } else {
        sizes.back() = tensor.shape.back();
        symbols.back() = names.back();
      }
    }
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api, api.CreateTensorTypeAndShapeInfo(&info));
    std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> owner(
        info, api.ReleaseTensorTypeAndShapeInfo);
    check(api, api.SetTensorElementType(info, element));
    check(api, api.SetDimensions(info, sizes.data(), sizes.size()));
    check(api, api.SetSymbolicDimensions(info, symbols.data(), symbols.size()));
    // Of the output only: nobody says whether the node has an lse, and where it has none, ONNX Runtime up to 1.26 ends
    // the process if it is given a shape.
    check(api, api.ShapeInferContext_SetOutputTypeShape(context, 0, info));
  });
}

Operator make(const Api* api, const std::vector<const Bundle*>& bundles, size_t rank, bool is_cuda,
              ONNXTensorElementDataType element) {
  static const char* const kNames[] = {"NA1D", "NA2D", "NA3D"};
  Operator op;
  std::memset(static_cast<OrtCustomOp*>(&op), 0, sizeof(OrtCustomOp));
  op.api = api;
  op.bundles = bundles;
  op.name = kNames[rank - 1];
  op.rank = rank;
  op.is_cuda = is_cuda;
  op.element = element;
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp* self) { return static_cast<const Operator*>(self)->name; };
  op.GetExecutionProviderType = [](const OrtCustomOp* self) {
    return static_cast<const Operator*>(self)->is_cuda ? "CUDAExecutionProvider" : "CPUExecutionProvider";
  };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return kInputCount; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return kOutputCount; };
  op.GetInputType = [](const OrtCustomOp* self, size_t) { return static_cast<const Operator*>(self)->element; };
  op.GetOutputType = [](const OrtCustomOp* self, size_t i) -> ONNXTensorElementDataType {
    return i == 0 ? static_cast<const Operator*>(self)->element : kFloat;
  };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) -> int { return i < 3 ? kRequired : kOptional; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t i) -> int { return i == 0 ? kRequired : kOptional; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) -> OrtMemType { return 0; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.KernelDestroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
  op.InferOutputShapeFn = infer;
  return op;
}

// The bundles of a session: the one that its options name, or those of the environment, colons between them.
std::vector<const Bundle*> open_bundles(const Api& api, const OrtSessionOptions* options) {
  int is_there = 0;
  check(api, api.HasSessionConfigEntry(options, kBundleEntry, &is_there));
  if (is_there) {
    size_t size = 0;
    check(api, api.GetSessionConfigEntry(options, kBundleEntry, nullptr, &size));
    std::string folder(size, '\0');
    check(api, api.GetSessionConfigEntry(options, kBundleEntry, &folder[0], &size));
    return {&Bundle::open(folder.c_str())};  // Up to its 0.
  }
  std::vector<const Bundle*> bundles;
  if (const char* named = std::getenv(kBundleVariable)) {
    for (const std::string& folder : split(named)) bundles.push_back(&Bundle::open(folder));
  }
  if (bundles.empty()) {
    throw Error(std::string("no bundle of kernels is named; add the session config entry ") + kBundleEntry +
                " before registering the library, or set " + kBundleVariable);
  }
  return bundles;
}

}  // namespace
}  // namespace na

// What ONNX Runtime looks for in a library of operators. Sessions keep pointers to what is made here, and nobody says
// when the last one is gone: it is never freed. It is a few kilobytes for each session options object.
extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  using namespace na;
  const OrtApi* table = base->GetApi(kApiVersion);
  if (table == nullptr) {
    // Only what every version has can be called: a status, to say so.
    const OrtApi* oldest = base->GetApi(1);
    auto create_status = reinterpret_cast<OrtStatus* (*)(int, const char*)>(*reinterpret_cast<void* const*>(oldest));
    std::string message = std::string("na_compiler: needs ONNX Runtime 1.21 or later, this is ") +
                          base->GetVersionString();
    return create_status(kFail, message.c_str());
  }
  auto api = new Api(table);
  return guarded(*api, "", [&] {
    std::vector<const Bundle*> bundles = open_bundles(*api, options);
    OrtCustomOpDomain* domain = nullptr;
    check(*api, api->CreateCustomOpDomain(kDomain, &domain));
    for (size_t rank = 1; rank <= 3; ++rank) {
      for (bool is_cuda : {false, true}) {
        // One for each type: in ONNX Runtime 1.21 an operator of any type may have one input only.
        for (ONNXTensorElementDataType element : {kFloat, kFloat16, kBFloat16}) {
          check(*api, api->CustomOpDomain_Add(domain, new Operator(make(api, bundles, rank, is_cuda, element))));
        }
      }
    }
    check(*api, api->AddCustomOpDomain(options, domain));
  });
}
