// The operators NA1D, NA2D and NA3D for ONNX Runtime: what it calls to know of them, and to run them.
//
// Nothing here throws into ONNX Runtime: what goes wrong becomes a status with a sentence.

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "error.h"
#include "node.h"
#include "paths.h"
#include "status.h"

namespace na {
namespace {

constexpr char kDomain[] = "na_compiler";
constexpr char kBundleEntry[] = "na_compiler.bundle";
constexpr char kBundleVariable[] = "NA_COMPILER_BUNDLE";

// OrtCustomOpInputOutputCharacteristic.
enum { kRequired = 0, kOptional = 1 };

OrtStatus* create(const OrtCustomOp* custom_op, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
  auto op = static_cast<const Operator*>(custom_op);
  std::string where = sentence({op->name, ": "});
  return guarded(*op->api, "", [&] {
    auto node = std::make_unique<Node>(*op, info);
    where = node->where();
    try {
      node->read(info);
    } catch (const std::exception& error) {
      throw Error({where, error.what()});
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
  return guarded(api, sentence({op->name, ": "}), [&] {
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
    // A size that is neither a number nor a symbol would be taken for -1.
    for (size_t axis = 0; axis < sizes.size(); ++axis) {
      if (sizes[axis] < 0 && symbols[axis][0] == '\0') return;
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
  op.GetInputTypeCount = [](const OrtCustomOp*) { return input_operands().size(); };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return output_operands().size(); };
  op.GetInputType = [](const OrtCustomOp* self, size_t i) -> ONNXTensorElementDataType {
    return element_of(*input_operands()[i], static_cast<const Operator*>(self)->element);
  };
  op.GetOutputType = [](const OrtCustomOp* self, size_t i) -> ONNXTensorElementDataType {
    return element_of(*output_operands()[i], static_cast<const Operator*>(self)->element);
  };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) -> int {
    return input_operands()[i]->is_later() ? kOptional : kRequired;
  };
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

// The domain for some bundles. Sessions keep pointers to what is made here, and nobody says when the last one is gone: it
// is never freed, and made once for each list of bundles.
OrtCustomOpDomain* domain_for(const OrtApi* table, const Api& api, const std::vector<const Bundle*>& bundles) {
  static std::mutex mutex;
  static auto domains = new std::map<std::pair<const OrtApi*, std::vector<const Bundle*>>, OrtCustomOpDomain*>;
  std::lock_guard<std::mutex> lock(mutex);
  auto found = domains->find({table, bundles});
  if (found != domains->end()) return found->second;
  auto kept = new Api(api);
  OrtCustomOpDomain* domain = nullptr;
  check(api, api.CreateCustomOpDomain(kDomain, &domain));
  for (size_t rank = 1; rank <= 3; ++rank) {
    for (bool is_cuda : {false, true}) {
      // One for each type: in ONNX Runtime 1.21 an operator of any type may have one input only.
      for (ONNXTensorElementDataType element : {kFloat, kFloat16, kBFloat16}) {
        check(api, api.CustomOpDomain_Add(domain, new Operator(make(kept, bundles, rank, is_cuda, element))));
      }
    }
  }
  return (*domains)[{table, bundles}] = domain;
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
    throw Error({"no bundle of kernels is named; add the session config entry ", kBundleEntry,
                 " before registering the library, or set ", kBundleVariable});
  }
  return bundles;
}

}  // namespace
}  // namespace na

// What ONNX Runtime looks for in a library of operators.
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
  Api api(table);
  return guarded(api, "", [&] {
    check(api, api.AddCustomOpDomain(options, domain_for(table, api, open_bundles(api, options))));
  });
}
