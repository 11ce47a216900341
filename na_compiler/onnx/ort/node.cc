#include "node.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "attributes.h"
#include "error.h"
#include "pool.h"
#include "status.h"

namespace na {
namespace {

// Sizes that a node remembers the kernel for.
constexpr size_t kMostFound = 4096;

std::string text(const Shape& shape) {
  std::string result;
  for (int64_t size : shape) result += (result.empty() ? "" : ", ") + (size < 0 ? "?" : std::to_string(size));
  return "[" + result + "]";
}

const char* dtype_name(int element) {
  switch (element) {
    case kFloat: return "float32";
    case kFloat16: return "float16";
    case kBFloat16: return "bfloat16";
    case kBool: return "bool";
    case kInt64: return "int64";
    default: return nullptr;
  }
}

bool is_problems(int element) { return element == kFloat || element == kFloat16 || element == kBFloat16; }

// How many additional keys there are: what the first tensor has that has some.
int64_t additional_of(const Inputs& inputs, size_t rank) {
  const auto& operands = input_operands();
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!inputs[i].is_there || !operands[i]->has_additional()) continue;
    return inputs[i].shape.size() == operands[i]->axes(rank) ? inputs[i].shape[operands[i]->additional_axis(rank)] : 0;
  }
  return 0;
}

}  // namespace

int element_of(const TableOperand& operand, int same) {
  if (operand.dtype == "same") return same;
  return operand.dtype == "bool" ? kBool : operand.is_integer() ? kInt64 : kFloat;
}

void read_type(const Api& api, const OrtTensorTypeAndShapeInfo* info, Tensor& tensor) {
  size_t rank = 0;
  check(api, api.GetTensorElementType(info, &tensor.element));
  check(api, api.GetDimensionsCount(info, &rank));
  tensor.shape.resize(rank);
  check(api, api.GetDimensions(info, tensor.shape.data(), rank));
}

Node::Node(const Operator& op, const OrtKernelInfo* info) : op_(op), api_(*op.api) {
  char name[256];
  size_t size = sizeof name;
  if (succeeds(api_, api_.KernelInfo_GetNodeName(info, name, &size)) && name[0] != '\0') {
    where_ = sentence({"node ", name, " (", op.name, "): "});
  } else {
    where_ = sentence({op.name, ": "});
  }
}

void Node::read(const OrtKernelInfo* info) {
  static const int64_t kOne = 1, kZero = 0;
  refuse_mistaken(api_, info);
  attributes_.kernel_size = integers(api_, info, "kernel_size", op_.rank, nullptr);
  attributes_.stride = integers(api_, info, "stride", op_.rank, &kOne);
  attributes_.dilation = integers(api_, info, "dilation", op_.rank, &kOne);
  attributes_.is_causal = integers(api_, info, "is_causal", op_.rank, &kZero);
  for (int64_t flag : attributes_.is_causal) {
    if (flag != 0 && flag != 1) throw Error({"is_causal must be 0 or 1 per axis, got ", flag});
  }
  for (const TableOperand* operand : number_operands()) numbers_.push_back(read_number(info, *operand));
  border_ = read_word(api_, info, "border", "shift");
  look_ahead(info);
}

Node::Number Node::read_number(const OrtKernelInfo* info, const TableOperand& operand) const {
  const char* name = operand.name.c_str();
  Number number;
  number.operand = &operand;
  float real = 0;
  if (operand.is_integer() ? succeeds(api_, api_.KernelInfoGetAttribute_int64(info, name, &number.integer))
                           : succeeds(api_, api_.KernelInfoGetAttribute_float(info, name, &real))) {
    number.is_there = true;
    number.real = real;
    if (!std::isfinite(real)) throw Error({operand.name, " must be finite"});
  } else if (has_attribute(api_, info, name)) {
    throw Error({operand.name, " must be ", (operand.is_integer() ? "an int" : "a float"), ", and is of another type"});
  } else if (!operand.otherwise.empty()) {
    number.is_there = true;
    number.real = std::strtod(operand.otherwise.c_str(), nullptr);
    number.integer = static_cast<int64_t>(number.real);
  }
  return number;
}

void Node::compute(OrtKernelContext* context) {
  Inputs inputs = read_inputs(context);
  Problem problem = pose(inputs);
  std::shared_ptr<const Found> found = find(inputs, problem);
  int64_t batch = inputs[0].shape[0];
  std::vector<Tensor> outputs;
  for (const TableOperand* output : output_operands()) {
    outputs.push_back(make_output(context, outputs.size(), problem.shape_of(*output, batch, 0),
                                  element_of(*output, inputs[0].element)));
  }
  if (batch > 0) run(context, *found, inputs, outputs);
}

// Finds the kernel when the session is made, if the model fixes the shapes: better an error then than later.
void Node::look_ahead(const OrtKernelInfo* info) {
  size_t count = 0;
  if (op_.is_cuda || !succeeds(api_, api_.KernelInfo_GetInputCount(info, &count))) return;
  const auto& operands = input_operands();
  Inputs inputs(operands.size());
  for (size_t i = 0; i < std::min(count, inputs.size()); ++i) {
    OrtTypeInfo* type = nullptr;
    if (!succeeds(api_, api_.KernelInfo_GetInputTypeInfo(info, i, &type)) || type == nullptr) continue;
    const OrtTensorTypeAndShapeInfo* tensor = nullptr;
    if (succeeds(api_, api_.CastTypeInfoToTensorInfo(type, &tensor)) && tensor != nullptr) {
      read_type(api_, tensor, inputs[i]);
      inputs[i].is_there = true;
    }
    api_.ReleaseTypeInfo(type);
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    Tensor& input = inputs[i];
    if (!input.is_there) continue;
    const TableOperand& operand = *operands[i];
    for (size_t axis = 0; axis < input.shape.size(); ++axis) {
      // Batch, and the number of additional keys, are any.
      bool is_any = (axis == 0 && operand.is_batched()) ||
                    (operand.has_additional() && axis == operand.additional_axis(op_.rank));
      if (is_any && input.shape[axis] < 0) input.shape[axis] = 1;
      if (input.shape[axis] < 0) return;
    }
    if (input.shape.empty()) return;  // A shape that is not known at all looks like a scalar's.
  }
  if (inputs[0].is_there && inputs[1].is_there && inputs[2].is_there) find(inputs, pose(inputs));
}

Inputs Node::read_inputs(OrtKernelContext* context) const {
  size_t count = 0;
  Inputs inputs(input_operands().size());
  check(api_, api_.KernelContext_GetInputCount(context, &count));
  for (size_t i = 0; i < std::min(count, inputs.size()); ++i) {
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
  return inputs;
}

Tensor Node::make_output(OrtKernelContext* context, size_t index, const Shape& shape, int element) const {
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
Problem Node::pose(const Inputs& inputs) const {
  const Shape& query = inputs[0].shape;
  if (!is_problems(inputs[0].element)) {
    throw Error({"query must be float32, float16 or bfloat16, and has ONNX's element type ", inputs[0].element});
  }
  if (query.size() != op_.rank + 3) {
    throw Error({"query must have ", op_.rank + 3, " dimensions, got shape ", text(query)});
  }
  Problem problem = attributes_;
  problem.layout.assign(query.begin() + 1, query.end() - 2);
  problem.heads = query[op_.rank + 1];
  problem.head_dim = query[op_.rank + 2];
  problem.dtype = dtype_name(inputs[0].element);
  const Shape &key = inputs[1].shape, &value = inputs[2].shape;
  problem.heads_kv = key.size() == query.size() ? key[op_.rank + 1] : 0;
  problem.head_dim_v = value.size() == query.size() ? value[op_.rank + 2] : 0;
  int64_t additional = additional_of(inputs, op_.rank);
  for (size_t i = 1; i < inputs.size(); ++i) {
    const TableOperand& operand = *input_operands()[i];
    if (operand.is_later() && !inputs[i].is_there) continue;
    Shape expected = problem.shape_of(operand, query[0], additional);
    if (inputs[i].shape != expected) {
      throw Error({operand.name, " must have shape ", text(expected), " where query has ", text(query), ", got ",
                   text(inputs[i].shape)});
    }
    int element = element_of(operand, inputs[0].element);
    if (inputs[i].element != element) {
      throw Error(
          {operand.name, " must ", (operand.dtype == "same" ? "have query's type, " : "be "), dtype_name(element)});
    }
  }
  take_options(inputs, problem);
  problem.take_border(border_);
  return problem;
}

// The options that a node has operands for. Operands without additional keys are none.
void Node::take_options(const Inputs& inputs, Problem& problem) const {
  for (const std::string& option : options()) {
    size_t missing = 0, there = 0;
    bool is_empty = false;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const TableOperand& operand = *input_operands()[i];
      if (operand.option != option) continue;
      ++(inputs[i].is_there ? there : missing);
      bool has_additional = inputs[i].is_there && operand.has_additional();
      is_empty = is_empty || (has_additional && inputs[i].shape[operand.additional_axis(op_.rank)] == 0);
    }
    for (const Number& number : numbers_) {
      if (number.operand->option == option) ++(number.is_there ? there : missing);
    }
    if (there > 0 && missing > 0) throw Error({names_of(option), " come together, and one is missing"});
    if (there > 0 && !is_empty) problem.take(option);
  }
}

// The batch is any.
bool Node::Found::is_for(const Inputs& inputs, const Problem& problem) const {
  auto same = [](const Shape& one, const Shape& other) {
    return one.size() == other.size() && std::equal(one.begin() + 1, one.end(), other.begin() + 1);
  };
  return element == inputs[0].element && additional == problem.additional_kv && operands == problem.operands &&
         same(query, inputs[0].shape) && same(key, inputs[1].shape) && same(value, inputs[2].shape);
}

// The kernel for some inputs: the last one that was found, if it is for the same.
std::shared_ptr<const Node::Found> Node::find(const Inputs& inputs, const Problem& problem) {
  std::shared_ptr<const Found> last = std::atomic_load_explicit(&last_, std::memory_order_acquire);
  if (last != nullptr && last->is_for(inputs, problem)) return last;
  const Shape &query = inputs[0].shape, &key = inputs[1].shape, &value = inputs[2].shape;
  // The shapes are checked: of key and value, these sizes are not query's.
  Shape at = query;
  at[0] = inputs[0].element;
  at.insert(at.end(), {problem.heads_kv, problem.head_dim_v});
  for (const std::string& option : options()) at.push_back(problem.has(option));
  std::lock_guard<std::mutex> lock(mutex_);
  auto found = found_.find(at);
  if (found == found_.end()) {
    int device = 0;
    if (op_.is_cuda && inputs[0].value != nullptr) device = device_of(inputs[0]);
    Match match = na::find(op_.bundles, problem, op_.is_cuda, device,
                           ", or make the session without the operator library: then the model's own function runs");
    Found made{query, key, value, inputs[0].element, problem.additional_kv, problem.operands, match};
    if (found_.size() >= kMostFound) found_.clear();
    found = found_.emplace(std::move(at), std::make_shared<const Found>(std::move(made))).first;
  }
  std::atomic_store_explicit(&last_, found->second, std::memory_order_release);
  return found->second;
}

const OrtMemoryInfo* Node::memory_of(const Tensor& tensor) const {
  const OrtMemoryInfo* memory = nullptr;
  check(api_, api_.GetTensorMemoryInfo(tensor.value, &memory));
  return memory;
}

int Node::device_of(const Tensor& tensor) const {
  int device = 0;
  check(api_, api_.MemoryInfoGetId(memory_of(tensor), &device));
  return device;
}

void Node::run(OrtKernelContext* context, const Found& found, Inputs& inputs, std::vector<Tensor>& outputs) {
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
  for (Tensor& output : outputs) {
    if (!output.is_there) allocate(output);
  }
  int64_t additional = found.additional ? additional_of(inputs, op_.rank) : 0;
  for (const Buffer& buffer : found.match.kernel->workspace) {
    Tensor space;
    space.element = kFloat;
    space.shape = found.match.kernel->shape_of(buffer, inputs[0].shape[0], additional);
    allocate(space);
    spaces.push_back(std::move(space));
  }
  // In the order in which the kernel's manifest names its operands; none where one is a number.
  auto tensor_of = [&](const Operand& operand) -> Tensor* {
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (operand.name == input_operands()[i]->name) return &inputs[i];
    }
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (operand.name == output_operands()[i]->name) return &outputs[i];
    }
    throw Error({"the kernel takes ", operand.name, ", which the operator does not have"});
  };
  std::vector<Tensor*> tensors;
  size_t space = 0;
  for (const Operand& operand : found.match.kernel->operands) {
    if (operand.role == "workspace") {
      tensors.push_back(&spaces.at(space++));
    } else {
      tensors.push_back(operand.role == "scalar" || operand.role == "place" ? nullptr : tensor_of(operand));
    }
  }
  call(context, found, tensors);
}

void Node::add_number(Arguments& arguments, const Operand& operand, const Found& found) const {
  if (operand.role == "place") return arguments.add(operand.number);
  for (const Number& number : numbers_) {
    if (number.operand->name != operand.name) continue;
    if (number.operand->is_integer()) return arguments.add(number.integer);
    // Only the scale may be missing here.
    double otherwise = 1.0 / std::sqrt(static_cast<double>(found.query.back()));
    return arguments.add(number.is_there ? number.real : otherwise);
  }
  throw Error({"the kernel takes ", operand.name, ", which the operator does not have"});
}

// Calls a kernel with tensors in the order of its operands; there is none where the operand is a number.
void Node::call(OrtKernelContext* context, const Found& found, const std::vector<Tensor*>& tensors) {
  const Kernel& kernel = *found.match.kernel;
  int device = op_.is_cuda ? device_of(*tensors[0]) : 0;
  std::vector<Shape> strides(tensors.size());
  Arguments arguments(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Operand& operand = kernel.operands[i];
    if (tensors[i] == nullptr) {
      add_number(arguments, operand, found);
      continue;
    }
    const Tensor& tensor = *tensors[i];
    size_t rank = tensor.shape.size();
    strides[i].assign(rank, 1);
    for (size_t axis = rank - 1; axis > 0; --axis) strides[i][axis - 1] = strides[i][axis] * tensor.shape[axis];
    DLTensor view = na::view(tensor.data, op_.is_cuda, device, dtype_name(tensor.element), rank, tensor.shape.data(),
                             strides[i].data());
    std::string misplaced = operand.is_free ? kernel.misplaced(view) : "";
    if (!misplaced.empty()) throw Error({operand.name, " cannot be read where it is: ", misplaced});
    arguments.add(view);
  }
  std::unique_ptr<CurrentStream> current;
  if (op_.is_cuda) {
    void* stream = nullptr;
    check(api_, api_.KernelContext_GetGPUComputeStream(context, &stream));
    current = std::make_unique<CurrentStream>(device, stream);
  }
  OnSessionPool pool(api_, context, *found.match.function);
  arguments.call(*found.match.function);
}

}  // namespace na
