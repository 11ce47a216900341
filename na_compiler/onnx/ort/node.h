// A node NA1D, NA2D or NA3D of a session.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "bundle.h"
#include "ort_api.h"

namespace na {

// Of ONNXTensorElementDataType.
enum { kUndefined = 0, kFloat = 1, kInt64 = 7, kBool = 9, kFloat16 = 10, kBFloat16 = 16 };

using Shape = std::vector<int64_t>;

// An operator of one rank, for one kind of device and one type.
struct Operator : OrtCustomOp {
  const Api* api;
  std::vector<const Bundle*> bundles;
  const char* name;
  size_t rank;
  bool is_cuda;
  ONNXTensorElementDataType element;
};

struct Tensor {
  bool is_there = false;
  int element = kUndefined;
  Shape shape;
  void* data = nullptr;
  OrtValue* value = nullptr;
};

// What a node is given, in the order of `input_operands()`.
using Inputs = std::vector<Tensor>;

void read_type(const Api& api, const OrtTensorTypeAndShapeInfo* info, Tensor& tensor);

// ONNX's type of an operand, where the problem's is known.
int element_of(const TableOperand& operand, int same);

class Node {
 public:
  Node(const Operator& op, const OrtKernelInfo* info);

  const Api& api() const { return api_; }
  // The node's name and operator, to begin what is said of it.
  const std::string& where() const { return where_; }

  // Reads its attributes. Throws Error.
  void read(const OrtKernelInfo* info);
  // Runs it. Throws Error.
  void compute(OrtKernelContext* context);

 private:
  // A kernel, and what it was found for.
  struct Found {
    Shape query, key, value;
    int element;
    bool additional;
    std::vector<std::string> operands;
    Match match;

    bool is_for(const Inputs& inputs, const Problem& problem) const;
  };

  // A number that the node gives, or may leave out.
  struct Number {
    const TableOperand* operand = nullptr;
    bool is_there = false;
    double real = 0;
    int64_t integer = 0;
  };

  Number read_number(const OrtKernelInfo* info, const TableOperand& operand) const;
  void look_ahead(const OrtKernelInfo* info);
  Inputs read_inputs(OrtKernelContext* context) const;
  Tensor make_output(OrtKernelContext* context, size_t index, const Shape& shape, int element) const;
  Problem pose(const Inputs& inputs) const;
  void take_options(const Inputs& inputs, Problem& problem) const;
  std::shared_ptr<const Found> find(const Inputs& inputs, const Problem& problem);
  const OrtMemoryInfo* memory_of(const Tensor& tensor) const;
  int device_of(const Tensor& tensor) const;
  void run(OrtKernelContext* context, const Found& found, Inputs& inputs, std::vector<Tensor>& outputs);
  void call(OrtKernelContext* context, const Found& found, const std::vector<Tensor*>& tensors);
  void add_number(Arguments& arguments, const Operand& operand, const Found& found) const;

  const Operator& op_;
  const Api& api_;
  std::string where_;
  Problem attributes_;
  std::string border_;
  std::vector<Number> numbers_;
  // What was found, by what it was found for; all is forgotten when there is too much, since kernels for an open layout
  // serve any number of sizes. Whoever uses one holds it. The last one is read and written as a whole.
  std::shared_ptr<const Found> last_;
  std::mutex mutex_;
  std::map<Shape, std::shared_ptr<const Found>> found_;
};

}  // namespace na
