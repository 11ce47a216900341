#include "kernel.h"

#include <algorithm>
#include <tuple>

#include "error.h"
#include "json.h"

namespace na {
namespace {

// For this option a problem has a member of its own: na_compiler.operands.ADDITIONAL_KV.
constexpr char kAdditional[] = "additional_kv";

std::string join(const std::vector<int64_t>& values) {
  std::string text;
  for (int64_t value : values) text += (text.empty() ? "" : "x") + std::to_string(value);
  return text;
}

}  // namespace

bool Problem::operator==(const Problem& other) const {
  auto key = [](const Problem& p) {
    return std::tie(p.layout, p.kernel_size, p.stride, p.dilation, p.is_causal, p.heads, p.heads_kv, p.head_dim,
                    p.head_dim_v, p.additional_kv, p.operands, p.border, p.dtype);
  };
  return key(*this) == key(other);
}

std::string Problem::text() const {
  std::string text = sentence({"na", layout.size(), "d layout=", is_open() ? "any" : join(layout), " heads=", heads});
  if (heads_kv != heads) text += sentence({" heads_kv=", heads_kv});
  text += sentence({" head_dim=", head_dim});
  if (head_dim_v != head_dim) text += sentence({" head_dim_v=", head_dim_v});
  text += sentence({" kernel_size=", join(kernel_size)});
  std::vector<int64_t> ones(layout.size(), 1), zeros(layout.size(), 0);
  if (stride != ones) text += sentence({" stride=", join(stride)});
  if (dilation != ones) text += sentence({" dilation=", join(dilation)});
  if (is_causal != zeros) text += sentence({" is_causal=", join(is_causal)});
  if (!border.empty()) {
    for (size_t axis = 0; axis < border.size(); ++axis) text += (axis == 0 ? " border=" : ",") + border[axis];
  }
  if (additional_kv) text += " additional_kv";
  for (const std::string& option : operands) text += sentence({" ", option});
  return sentence({text, " ", dtype});
}

Problem Problem::opened() const {
  Problem open = *this;
  open.layout.assign(layout.size(), 0);
  return open;
}

bool Problem::has(const std::string& option) const {
  if (option.empty()) return true;
  if (option == kAdditional) return additional_kv;
  return std::find(operands.begin(), operands.end(), option) != operands.end();
}

void Problem::take(const std::string& option) {
  if (option == kAdditional) {
    additional_kv = true;
  } else {
    operands.push_back(option);
  }
}

std::vector<int64_t> Problem::shape_of(const TableOperand& operand, int64_t batch, int64_t additional) const {
  std::vector<int64_t> shape;
  for (const std::string& term : operand.shape) {
    if (term == "layout") {
      shape.insert(shape.end(), layout.begin(), layout.end());
    } else if (term == "offsets") {
      for (int64_t extent : kernel_size) shape.push_back(2 * extent - 1);
    } else {
      shape.push_back(term == "batch"      ? batch
                      : term == "additional" ? additional
                      : term == "heads"      ? heads
                      : term == "heads_kv"   ? heads_kv
                      : term == "head_dim"   ? head_dim
                                             : head_dim_v);
    }
  }
  return shape;
}

void Problem::check() const {
  auto on_axis = [](size_t axis) { return sentence({" on axis ", axis}); };
  for (size_t axis = 0; axis < layout.size(); ++axis) {
    int64_t kernel = kernel_size[axis], step = stride[axis], gap = dilation[axis];
    if (kernel < 1) throw Error({"kernel_size must be at least 1, got ", kernel, on_axis(axis)});
    if (gap < 1) throw Error({"dilation must be at least 1, got ", gap, on_axis(axis)});
    if (step < 1 || step > kernel) {
      throw Error({"stride must be at least 1 and at most kernel_size=", kernel, on_axis(axis), ", got ", step});
    }
    if (!is_open()) check_border(axis);
  }
  if (heads_kv < 1 || heads % heads_kv != 0) {
    throw Error({"query's heads must be a multiple of key's, got ", heads, " and ", heads_kv});
  }
}

Kernel Kernel::closed(const Problem& whole) const {
  Kernel made = *this;
  made.problem = whole;
  for (size_t axis = 0; axis < whole.layout.size(); ++axis) {
    if (whole.layout[axis] < kLongestAxis) continue;
    throw Error({"a kernel for any layout takes fewer than ", kLongestAxis, " tokens on each axis, got ",
                 whole.layout[axis], " on axis ", axis});
  }
  size_t numbers = 0;
  for (Operand& operand : made.operands) {
    for (int64_t& extent : operand.shape) {
      if (extent <= kHeld) extent = whole.layout[static_cast<size_t>(kHeld - extent)];
    }
    // Three an axis: the length of the whole, and the first query and the first key, which are 0.
    if (operand.role == "place" && numbers++ % 3 == 0) operand.number = whole.layout[(numbers - 1) / 3];
  }
  return made;
}

std::vector<int64_t> Kernel::shape_of(const Buffer& buffer, int64_t batch, int64_t additional) const {
  int64_t padded = (additional + multiple - 1) / multiple * multiple;
  std::vector<int64_t> shape = {batch};
  int64_t elements = std::max<int64_t>(batch, 1);
  for (int64_t extent : buffer) {
    shape.push_back(extent < 0 ? padded : extent);
    if (shape.back() > 0 && elements > kMaxInteger / shape.back()) throw Error("its workspace is too large to be had");
    elements *= std::max<int64_t>(shape.back(), 1);
  }
  return shape;
}

void Kernel::check(const Operand& operand, const DLTensor& tensor, int64_t batch, int64_t additional) const {
  auto text = [](const std::vector<int64_t>& shape) {
    std::string listed;
    for (int64_t size : shape) listed += (listed.empty() ? "" : ", ") + std::to_string(size);
    return "[" + listed + "]";
  };
  std::vector<int64_t> wanted, got(tensor.shape, tensor.shape + tensor.ndim);
  for (int64_t extent : operand.shape) wanted.push_back(extent >= 0 ? extent : extent == -1 ? additional : batch);
  if (got != wanted) throw Error({operand.name, " must have shape ", text(wanted), ", got ", text(got)});
  DLDataType type = type_of(operand.dtype);
  if (tensor.dtype.code != type.code || tensor.dtype.bits != type.bits) {
    throw Error({operand.name, " must be ", operand.dtype, ", and is of another type"});
  }
}

std::string Kernel::misplaced(const DLTensor& tensor) const {
  int64_t last = tensor.ndim - 1;
  if (tensor.strides[last] != 1) return "the elements of its rows must lie together";
  int64_t elements = std::max<int64_t>(8 * alignment / tensor.dtype.bits, 1);
  std::string multiple_of = " must be a multiple of ";
  if (reinterpret_cast<uintptr_t>(tensor.data) % alignment != 0) {
    return sentence({"its address", multiple_of, alignment});
  }
  for (int64_t axis = 0; axis < last; ++axis) {
    if (tensor.strides[axis] % elements != 0) return sentence({"its strides", multiple_of, elements, " elements"});
  }
  // Additional keys have one axis of tokens only, and strides of their own for heads.
  if (adjacent_heads && last > 3 && tensor.strides[last - 1] != tensor.shape[last]) {
    return sentence({"its heads must lie ", tensor.shape[last], " elements apart"});
  }
  return "";
}

}  // namespace na
