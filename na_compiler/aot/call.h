// What the operators take: their schema, as the table of operands has it, and what a call gives them on torch's stack.
// Part of torch_library.cc.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace na {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

// What problems have a number of for each axis.
struct Parameters {
  Ints kernel_size, stride, dilation, is_causal;
};
constexpr std::pair<const char*, Ints Parameters::*> kParameters[] = {{"kernel_size", &Parameters::kernel_size},
                                                                      {"stride", &Parameters::stride},
                                                                      {"dilation", &Parameters::dilation},
                                                                      {"is_causal", &Parameters::is_causal}};

const char* dtype_name(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Bool: return "bool";
    case ScalarType::Long: return "int64";
    default: throw Error("tensors must be float32, bfloat16 or float16");
  }
}

// An argument of an operator: an operand of the table, or one of the parameters.
struct Argument {
  const TableOperand* operand = nullptr;
  Ints Parameters::*parameter = nullptr;
};

// Tensors, parameters, numbers, and then what may be left out, in the table's order.
const std::vector<Argument>& arguments_of_operators() {
  static const auto made = [] {
    auto all = new std::vector<Argument>;
    auto add = [&](const std::vector<const TableOperand*>& operands) {
      for (const TableOperand* operand : operands) {
        if (!operand->is_later()) all->push_back({operand});
      }
    };
    add(input_operands());
    for (const auto& [name, parameter] : kParameters) all->push_back({nullptr, parameter});
    add(number_operands());
    for (const TableOperand& operand : operand_table()) {
      if (operand.role != "output" && operand.is_later()) all->push_back({&operand});
    }
    return all;
  }();
  return *made;
}

std::string schema() {
  std::string taken, returned;
  size_t parameter = 0;
  for (const Argument& argument : arguments_of_operators()) {
    taken += taken.empty() ? "" : ", ";
    if (argument.operand == nullptr) {
      taken += std::string("int[] ") + kParameters[parameter++].first;
      continue;
    }
    const TableOperand& operand = *argument.operand;
    taken += operand.is_input() ? "Tensor" : operand.is_word() ? "str" : operand.is_integer() ? "int" : "float";
    if (!operand.option.empty()) taken += "?";
    taken += " " + operand.name;
    if (!operand.is_later()) continue;
    std::string quote = operand.is_word() ? "\"" : "";
    taken += "=" + (operand.option.empty() ? quote + operand.otherwise + quote : "None");
  }
  for (const TableOperand* output : output_operands()) {
    returned += (returned.empty() ? "Tensor " : ", Tensor ") + output->name;
  }
  return "(" + taken + ") -> (" + returned + ")";
}

// What an operator was given for an operand.
struct Given {
  const TableOperand* operand;
  std::optional<Tensor> tensor;
  std::optional<double> number;
  std::optional<int64_t> integer;
  std::string word;

  bool is_there() const { return tensor.has_value() || number.has_value() || integer.has_value(); }
};

// All that an operator was given.
struct Call {
  std::vector<Given> given;
  Parameters parameters;

  const Given& of(const std::string& name) const {
    for (const Given& one : given) {
      if (one.operand->name == name) return one;
    }
    throw Error({"the kernel takes ", name, ", which the operator does not have"});
  }
  const Tensor& tensor(const std::string& name) const {
    const Given& one = of(name);
    if (!one.tensor.has_value()) throw Error({"the kernel takes ", name, ", which is not given"});
    return *one.tensor;
  }
};

template <typename T>
std::optional<T> read_number(StableIValue value, bool may_be_absent) {
  if (may_be_absent) return torch::stable::detail::to<std::optional<T>>(value);
  return torch::stable::detail::to<T>(value);
}

// Takes what is on torch's stack: all of it, since whoever takes a tensor frees it.
Call read_call(StableIValue* stack) {
  Call call;
  for (const Argument& argument : arguments_of_operators()) {
    StableIValue value = *stack++;
    if (argument.operand == nullptr) {
      call.parameters.*argument.parameter = torch::stable::detail::to<Ints>(value);
      continue;
    }
    Given one{argument.operand, {}, {}, {}, {}};
    bool may_be_absent = !one.operand->option.empty();
    if (one.operand->is_word()) {
      one.word = torch::stable::detail::to<std::string>(value);
    } else if (!one.operand->is_input()) {
      if (one.operand->is_integer()) {
        one.integer = read_number<int64_t>(value, may_be_absent);
      } else {
        one.number = read_number<double>(value, may_be_absent);
      }
    } else if (may_be_absent) {
      one.tensor = torch::stable::detail::to<std::optional<Tensor>>(value);
    } else {
      one.tensor = torch::stable::detail::to<Tensor>(value);
    }
    call.given.push_back(std::move(one));
  }
  return call;
}

// How many additional keys there are: what the first tensor has that has some.
int64_t additional_of(const Call& call, size_t rank) {
  for (const Given& one : call.given) {
    if (one.tensor.has_value() && one.operand->has_additional()) {
      return one.tensor->size(static_cast<int64_t>(one.operand->additional_axis(rank)));
    }
  }
  return 0;
}

// The options that a call has operands for. Operands without additional keys are none.
std::vector<std::string> options_of(const Call& call, int64_t additional) {
  std::vector<std::string> found;
  for (const std::string& option : options()) {
    size_t there = 0, missing = 0;
    bool is_empty = false;
    for (const Given& one : call.given) {
      if (one.operand->option != option) continue;
      ++(one.is_there() ? there : missing);
      is_empty = is_empty || (one.operand->has_additional() && additional == 0);
    }
    if (there > 0 && missing > 0) throw Error({names_of(option), " come together"});
    if (there > 0 && !is_empty) found.push_back(option);
  }
  return found;
}

Problem problem_of(const Call& call, const std::vector<std::string>& options) {
  const Tensor &query = call.tensor("query"), &key = call.tensor("key"), &value = call.tensor("value");
  Problem problem;
  int64_t rank = query.dim() - 3;
  for (int64_t axis = 1; axis <= rank; ++axis) problem.layout.push_back(query.size(axis));
  problem.heads = query.size(rank + 1);
  problem.head_dim = query.size(rank + 2);
  problem.heads_kv = key.size(rank + 1);
  problem.head_dim_v = value.size(rank + 2);
  problem.kernel_size = call.parameters.kernel_size;
  problem.stride = call.parameters.stride;
  problem.dilation = call.parameters.dilation;
  problem.is_causal = call.parameters.is_causal;
  for (const std::string& option : options) problem.take(option);
  problem.dtype = dtype_name(query);
  problem.take_border(call.of("border").word);
  return problem;
}

}  // namespace
}  // namespace na
