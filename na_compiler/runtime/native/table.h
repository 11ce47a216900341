// The table of operands, na_compiler.operands.TABLE, as it was when this was built: what operators take is said there.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace na {

// An operand that problems may have.
struct TableOperand {
  // The dtype may be `same`: that of the problem.
  std::string name, role, dtype;
  // What a problem has it for; empty where every problem has it.
  std::string option;
  // Of a number that may be left out though every problem has it, as it is written; else empty.
  std::string otherwise;
  // In the problem's terms, such as `batch` and `layout`.
  std::vector<std::string> shape;

  bool is_word() const { return role == "parameter"; }
  bool is_input() const { return role == "input"; }
  bool is_integer() const { return dtype == "int64"; }
  // Whether a call may leave it out.
  bool is_later() const { return !option.empty() || !otherwise.empty(); }
  // Whether each batch entry has its own: in front.
  bool is_batched() const { return !shape.empty() && shape[0] == "batch"; }
  // How many axes it has, and which of them counts additional keys, where the layout has so many axes.
  size_t axes(size_t rank) const;
  bool has_additional() const;
  size_t additional_axis(size_t rank) const;
};

const std::vector<TableOperand>& operand_table();
// Those of a role, in the table's order.
const std::vector<const TableOperand*>& input_operands();
const std::vector<const TableOperand*>& number_operands();
const std::vector<const TableOperand*>& output_operands();
// Parts of a problem that are words, with which no kernel is called.
const std::vector<const TableOperand*>& word_operands();
// Inputs, numbers, outputs: what a forward is called with, before its workspace.
const std::vector<const TableOperand*>& forward_operands();
// What problems have operands for, beside those that every problem has.
const std::vector<std::string>& options();
// The operands of an option, which come together, for messages.
std::string names_of(const std::string& option);

}  // namespace na
