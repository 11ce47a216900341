#include "attributes.h"

#include <cctype>
#include <set>

#include "error.h"
#include "status.h"
#include "table.h"

namespace na {
namespace {

// The parameters, and the numbers of the table.
const std::vector<std::string>& attributes() {
  static const auto made = [] {
    auto names = new std::vector<std::string>{"kernel_size", "stride", "dilation", "is_causal"};
    for (const TableOperand* operand : number_operands()) names->push_back(operand->name);
    for (const TableOperand* operand : word_operands()) names->push_back(operand->name);
    return names;
  }();
  return *made;
}

// Names that an attribute of ours is taken for: what it is called elsewhere, and what is next to it on a keyboard.
std::set<std::string> mistaken_names() {
  std::set<std::string> names = {
      "axis",        "bias",           "border",        "causal",      "dilation_rate", "head_dim",
      "heads",       "is_causals",     "kernel",        "kernel_shape", "kernelsize",   "left_window_size",
      "mask",        "num_heads",      "pads",          "padding",     "qk_norm",       "qk_scale",
      "right_window_size", "rpb",      "size",          "sm_scale",    "softcap",       "softmax_scale",
      "unidirectional", "window",      "window_left",   "window_right", "window_size",
  };
  for (const std::string& attribute : attributes()) {
    std::string name = attribute, upper = name, camel, bare;
    for (char& letter : upper) letter = static_cast<char>(std::toupper(static_cast<unsigned char>(letter)));
    for (size_t i = 0; i < name.size(); ++i) {
      bool begins = i > 0 && name[i - 1] == '_';
      if (name[i] != '_') camel += begins ? upper[i] : name[i];
      if (name[i] != '_') bare += name[i];
      names.insert(name.substr(0, i) + name.substr(i + 1));  // One letter less, one twice, two in the other order.
      names.insert(name.substr(0, i) + name[i] + name.substr(i));
      if (i > 0) names.insert(name.substr(0, i - 1) + name[i] + name[i - 1] + name.substr(i + 1));
    }
    std::string title = name;
    title[0] = upper[0];
    names.insert({name + "s", name + "_", "_" + name, name + " ", " " + name, upper, title, camel, bare});
  }
  for (const std::string& attribute : attributes()) names.erase(attribute);
  return names;
}

}  // namespace

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
  std::string wanted = sentence({name, " must be ", rank, " ints, one per axis"});
  if (!succeeds(api, api.KernelInfoGetAttributeArray_int64(info, name, nullptr, &size))) {
    if (otherwise == nullptr || has_attribute(api, info, name)) {
      throw Error({wanted, ", and is missing or something else"});
    }
    return std::vector<int64_t>(rank, *otherwise);
  }
  // ONNX Runtime gives an attribute of another type as a list of no ints.
  if (size == 0) throw Error({wanted, ", and is empty or something else"});
  if (size != rank) throw Error({wanted, ", got ", size});
  std::vector<int64_t> values(size);
  check(api, api.KernelInfoGetAttributeArray_int64(info, name, values.data(), &size));
  return values;
}

std::string read_word(const Api& api, const OrtKernelInfo* info, const char* name, const char* otherwise) {
  size_t size = 0;
  // Of a text that is there it says the size, and that there is no place for it.
  succeeds(api, api.KernelInfoGetAttribute_string(info, name, nullptr, &size));
  if (size == 0) {
    if (has_attribute(api, info, name)) throw Error({name, " must be a string, and is of another type"});
    return otherwise;
  }
  std::string word(size, '\0');
  check(api, api.KernelInfoGetAttribute_string(info, name, word.data(), &size));
  return word.c_str();
}

// ONNX Runtime does not check the names of attributes, and says of a node's only whether it has one of a name: an
// attribute that is not ours is found if it has a name that is likely.
void refuse_mistaken(const Api& api, const OrtKernelInfo* info) {
  static const auto names = new std::set<std::string>(mistaken_names());
  for (const std::string& name : *names) {
    size_t size = 0;
    if (!succeeds(api, api.KernelInfoGetAttributeArray_int64(info, name.c_str(), nullptr, &size)) &&
        !has_attribute(api, info, name.c_str())) {
      continue;
    }
    std::string known;
    for (const std::string& attribute : attributes()) known += (known.empty() ? "" : ", ") + attribute;
    throw Error({"it has an attribute ", name, ", which is unknown; known are ", known});
  }
}

}  // namespace na
