#include "table.h"

#include <algorithm>

// na_compiler.runtime.native.operand_table: an operand's fields with spaces between them, - where there is nothing.
#ifndef NA_OPERANDS
#error "the table of operands is missing: build with the flags of na_compiler.runtime.native"
#endif

namespace na {
namespace {

std::vector<std::string> split_at(char mark, const std::string& text) {
  std::vector<std::string> parts(1);
  for (char letter : text) {
    if (letter == mark) {
      parts.emplace_back();
    } else {
      parts.back() += letter;
    }
  }
  return parts;
}

std::vector<TableOperand> parse(const std::string& text) {
  std::vector<TableOperand> table;
  for (const std::string& line : split_at(';', text)) {
    std::vector<std::string> fields = split_at(' ', line);
    for (std::string& field : fields) {
      if (field == "-") field.clear();
    }
    TableOperand operand{fields[0], fields[1], fields[2], fields[3], fields[4], {}};
    if (!fields[5].empty()) operand.shape = split_at(',', fields[5]);
    table.push_back(operand);
  }
  return table;
}

// How many axes a term stands for.
size_t axes_of_term(const std::string& term, size_t rank) { return term == "layout" || term == "offsets" ? rank : 1; }

}  // namespace

size_t TableOperand::axes(size_t rank) const {
  size_t count = 0;
  for (const std::string& term : shape) count += axes_of_term(term, rank);
  return count;
}

bool TableOperand::has_additional() const {
  return std::find(shape.begin(), shape.end(), "additional") != shape.end();
}

size_t TableOperand::additional_axis(size_t rank) const {
  size_t axis = 0;
  for (const std::string& term : shape) {
    if (term == "additional") break;
    axis += axes_of_term(term, rank);
  }
  return axis;
}

const std::vector<TableOperand>& operand_table() {
  static const auto made = new std::vector<TableOperand>(parse(NA_OPERANDS));
  return *made;
}

namespace {

std::vector<const TableOperand*>* find_with(const std::string& roles) {
  auto found = new std::vector<const TableOperand*>;
  for (const std::string& role : split_at(' ', roles)) {
    for (const TableOperand& operand : operand_table()) {
      if (operand.role == role) found->push_back(&operand);
    }
  }
  return found;
}

}  // namespace

const std::vector<const TableOperand*>& input_operands() {
  static const auto found = find_with("input");
  return *found;
}

const std::vector<const TableOperand*>& number_operands() {
  static const auto found = find_with("scalar");
  return *found;
}

const std::vector<const TableOperand*>& output_operands() {
  static const auto found = find_with("output");
  return *found;
}

const std::vector<const TableOperand*>& word_operands() {
  static const auto found = find_with("parameter");
  return *found;
}

const std::vector<const TableOperand*>& forward_operands() {
  static const auto found = find_with("input scalar output");
  return *found;
}

const std::vector<std::string>& options() {
  static const auto made = [] {
    auto found = new std::vector<std::string>;
    for (const TableOperand& operand : operand_table()) {
      bool is_new = std::find(found->begin(), found->end(), operand.option) == found->end();
      if (!operand.option.empty() && is_new) found->push_back(operand.option);
    }
    return found;
  }();
  return *made;
}

std::string names_of(const std::string& option) {
  std::string names;
  for (const TableOperand& operand : operand_table()) {
    if (operand.option == option) names += (names.empty() ? "" : " and ") + operand.name;
  }
  return names;
}

}  // namespace na
