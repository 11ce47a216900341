#include "manifest.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "error.h"
#include "json.h"
#include "sha256.h"
#include "table.h"

// The manifest's format that this reads: na_compiler.runtime.bundle.FORMAT, when this was built.
#ifndef NA_BUNDLE_FORMAT
#define NA_BUNDLE_FORMAT 6
#endif
// How kernels are called: na_compiler.runtime.kernel.ABI.
#ifndef NA_KERNEL_ABI
#define NA_KERNEL_ABI 2
#endif

namespace na {
namespace {

// ---- Checking values -----------------------------------------------------------------------------------------------

// A value of a manifest, and where it is, which is spelled out only in what is said of a wrong one.
class Said {
 public:
  explicit Said(const Json& json, const Said* parent = nullptr, const char* name = nullptr, size_t index = 0)
      : json_(json), parent_(parent), name_(name), index_(index) {}

  std::string place() const {
    if (parent_ == nullptr) return "";
    std::string before = parent_->place();
    if (name_ == nullptr) return sentence({before, "[", index_, "]"});
    return sentence({before, before.empty() ? "" : ".", name_});
  }

  [[noreturn]] void refuse(const std::string& wanted) const {
    std::string got = json_.canonical();
    if (got.size() > 40) got = got.substr(0, 40) + "...";
    std::string where = place();
    throw Error({(where.empty() ? "it" : where), " must be ", wanted, ", got ", got});
  }

  // Of an object: that it has these members, and no others.
  void has_exactly(const std::vector<const char*>& names) const {
    auto object = json_.as<Json::Object>();
    if (object == nullptr) refuse("an object");
    std::string within = place();
    if (!within.empty()) within += ".";
    for (const auto& member : *object) {
      bool is_known = std::any_of(names.begin(), names.end(), [&](const char* name) { return member.first == name; });
      if (!is_known) throw Error({within, member.first.substr(0, 40), " is unknown"});
    }
    for (const char* name : names) {
      if (json_.find(name) == nullptr) throw Error({within, name, " is missing"});
    }
  }

  // A member, which is there.
  Said operator[](const char* name) const { return Said(*json_.find(name), this, name); }

  template <typename Each>
  auto list(size_t low, size_t high, Each each) const {
    auto values = json_.as<Json::List>();
    if (values == nullptr || values->size() < low || values->size() > high) {
      refuse(high == kAnyNumber ? "a list" : sentence({"a list of ", low, " to ", high}));
    }
    std::vector<decltype(each(*this))> made;
    for (size_t i = 0; i < values->size(); ++i) made.push_back(each(Said((*values)[i], this, nullptr, i)));
    return made;
  }

  int64_t integer(int64_t low = 1, int64_t high = kMaxInteger) const {
    auto number = json_.as<int64_t>();
    if (number == nullptr || *number < low || *number > high) {
      refuse(sentence({"an integer from ", low, " to ", high}));
    }
    return *number;
  }

  // One of some words with the number of an axis behind it, which is returned; -1 if it is none.
  int64_t axis_of(std::initializer_list<const char*> words) const {
    auto said = json_.as<std::string>();
    if (said == nullptr || said->empty() || said->back() < '0' || said->back() > '2') return -1;
    std::string word = said->substr(0, said->size() - 1);
    bool is_known = std::any_of(words.begin(), words.end(), [&](const char* one) { return word == one; });
    return is_known ? said->back() - '0' : -1;
  }

  // Whether it is a number of queries, as `axis_of` reads it, divided by a size.
  bool is_parts() const {
    auto said = json_.as<std::string>();
    if (said == nullptr || said->size() < 10 || said->size() > 24 || said->rfind("queries", 0) != 0) return false;
    bool is_size = said->find_first_not_of("0123456789", 9) == std::string::npos && (*said)[9] != '0';
    return (*said)[7] >= '0' && (*said)[7] <= '2' && (*said)[8] == '/' && is_size;
  }

  bool is_null() const { return json_.as<std::monostate>() != nullptr; }

  int64_t power_of_two(int64_t high) const {
    auto number = json_.as<int64_t>();
    if (number == nullptr || *number < 1 || *number > high || (*number & (*number - 1)) != 0) {
      refuse(sentence({"a power of two from 1 to ", high}));
    }
    return *number;
  }

  bool flag() const {
    auto flag = json_.as<bool>();
    if (flag == nullptr) refuse("true or false");
    return *flag;
  }

  const std::string& one_of(std::initializer_list<const char*> texts) const {
    std::string wanted;
    for (const char* text : texts) {
      if (is(text)) return *json_.as<std::string>();
      wanted += (wanted.empty() ? "" : " or ") + std::string(text);
    }
    refuse(wanted);
  }

  // Whether it is an object with a member of a name.
  bool has(const char* name) const { return json_.find(name) != nullptr; }

  // Whether it is an object with a member that is this text.
  bool has(const char* name, const char* text) const {
    const Json* member = json_.find(name);
    return member != nullptr && Said(*member).is(text);
  }

  bool is(const char* text) const {
    auto said = json_.as<std::string>();
    return said != nullptr && *said == text;
  }

  // A text of these characters: `a` stands for small letters, `A` for large ones, `0` for digits.
  // Behind one of some prefixes.
  const std::string& name(const char* characters, size_t high, const char* wanted,
                          std::initializer_list<const char*> prefixes = {""}) const {
    auto said = json_.as<std::string>();
    if (said == nullptr) refuse(wanted);
    size_t start = std::string::npos;
    for (const char* prefix : prefixes) {
      if (said->rfind(prefix, 0) == 0) start = std::strlen(prefix);
    }
    if (start == std::string::npos || said->size() <= start || said->size() - start > high) refuse(wanted);
    for (char letter : said->substr(start)) {
      char kind = letter >= 'a' && letter <= 'z' ? 'a' : letter >= 'A' && letter <= 'Z' ? 'A' : letter;
      if (letter >= '0' && letter <= '9') kind = '0';
      if (std::string(characters).find(kind) == std::string::npos) refuse(wanted);
    }
    return *said;
  }

  static constexpr size_t kAnyNumber = SIZE_MAX;

 private:
  const Json& json_;
  const Said* parent_;
  const char* name_;
  size_t index_;
};

// ---- The schema ----------------------------------------------------------------------------------------------------

constexpr size_t kMaxRank = 3;
constexpr int64_t kLongestHead = 8192;  // LONGEST_HEAD of na_compiler.problem.

std::vector<int64_t> read_per_axis(const Said& said) {
  return said.list(1, kMaxRank, [](const Said& each) { return each.integer(); });
}

// A layout: integers, or null on each axis where it is open, which is 0 here.
std::vector<int64_t> read_layout(const Said& said) {
  auto each = [](const Said& extent) { return extent.is_null() ? 0 : extent.integer(); };
  std::vector<int64_t> layout = said.list(1, kMaxRank, each);
  auto open = static_cast<size_t>(std::count(layout.begin(), layout.end(), 0));
  if (open != 0 && open != layout.size()) said.refuse("known on each axis, or on none");
  return layout;
}

// A problem's options beside the additional keys: names of the table, in its order.
void read_options(const Said& said, Problem& problem) {
  std::vector<std::string> known = options(), found;
  said.list(1, 64, [&](const Said& each) {
    found.push_back(each.name("a0_", 64, "at most 64 letters, digits and _"));
    return 0;
  });
  for (const std::string& option : known) {
    if (option != "additional_kv" && std::count(found.begin(), found.end(), option) == 1) problem.take(option);
  }
  if (problem.operands != found) said.refuse("names of operands that this version knows, in its order");
}

// A problem's border, which is canonical in a manifest.
void read_border(const Said& said, Problem& problem) {
  static const char kWanted[] = "shift, cut, cut:LEFT or wrap";
  auto each = [](const Said& word) { return word.name("a0:", 32, kWanted); };
  std::vector<std::string> found = said.list(1, kMaxRank, each);
  if (found.size() != problem.layout.size()) throw Error({said.place(), " has another number of values than axes"});
  std::string words;
  for (const std::string& word : found) words += (words.empty() ? "" : ",") + word;
  try {
    problem.take_border(words);
  } catch (const Error& error) {
    throw Error({said.place(), ": ", error.what()});
  }
  if (problem.border != found) said.refuse("as problems are written that are the same");
}

Problem read_problem(const Said& said) {
  // There only where there are some: so a problem is called as it was before there were any.
  bool has_operands = said.has("operands");
  std::vector<const char*> names = {"layout",    "heads",    "head_dim",   "kernel_size",   "stride", "dilation",
                                    "is_causal", "heads_kv", "head_dim_v", "additional_kv", "dtype"};
  bool has_border = said.has("border");
  if (has_operands) names.push_back("operands");
  if (has_border) names.push_back("border");
  said.has_exactly(names);
  Problem problem;
  problem.layout = read_layout(said["layout"]);
  problem.heads = said["heads"].integer();
  problem.head_dim = said["head_dim"].integer(1, kLongestHead);
  problem.kernel_size = read_per_axis(said["kernel_size"]);
  problem.stride = read_per_axis(said["stride"]);
  problem.dilation = read_per_axis(said["dilation"]);
  problem.is_causal = said["is_causal"].list(1, kMaxRank, [](const Said& each) { return int64_t{each.flag()}; });
  problem.heads_kv = said["heads_kv"].integer();
  problem.head_dim_v = said["head_dim_v"].integer(1, kLongestHead);
  problem.additional_kv = said["additional_kv"].flag();
  if (has_operands) read_options(said["operands"], problem);
  problem.dtype = said["dtype"].one_of({"float32", "bfloat16", "float16"});
  for (const auto* values : {&problem.kernel_size, &problem.stride, &problem.dilation, &problem.is_causal}) {
    if (values->size() != problem.layout.size()) throw Error({said.place(), " has another number of values than axes"});
  }
  if (has_border && problem.is_open()) said["border"].refuse("left out where the layout is open");
  if (has_border) read_border(said["border"], problem);
  problem.check();
  return problem;
}

std::string read_digest(const Said& said) {
  static const char kWanted[] = "64 hexadecimal digits";
  const std::string& digest = said.name("a0", 64, kWanted);
  if (digest.size() != 64 || digest.find_first_of("ghijklmnopqrstuvwxyz") != std::string::npos) said.refuse(kWanted);
  return digest;
}

File read_file_of(const Said& said) {
  static const char kWanted[] = "a name of letters, digits and _.+-, at most 255";
  File file;
  file.library = said["library"].name("aA0_.+-", 255, kWanted);
  if (file.library[0] == '.') said["library"].refuse(kWanted);
  file.bytes = said["bytes"].integer();
  file.sha256 = read_digest(said["sha256"]);
  return file;
}

Buffer read_buffer(const Said& said) {
  Buffer buffer = said.list(1, 32, [](const Said& each) {
    return each.is("additional") ? -1 : each.is_parts() ? kParts : each.integer();
  });
  int64_t elements = 1;
  for (int64_t extent : buffer) {
    if (extent > kMaxInteger / elements) said.refuse(sentence({"of at most ", kMaxInteger, " elements"}));
    elements *= std::max<int64_t>(extent, 1);
  }
  return buffer;
}

Operand read_operand(const Said& said) {
  bool is_scalar = said.has("role", "scalar") || said.has("role", "place");
  if (is_scalar) {
    said.has_exactly({"name", "role", "dtype"});
  } else {
    said.has_exactly({"name", "role", "dtype", "shape", "strides"});
  }
  Operand operand;
  operand.name = said["name"].name("a0_", 64, "at most 64 letters, digits and _");
  operand.role = said["role"].one_of({"input", "scalar", "place", "output", "workspace"});
  operand.dtype = said["dtype"].name("a0", 32, "a dtype");
  if (is_scalar) return operand;
  operand.shape = said["shape"].list(0, 33, [](const Said& each) {
    int64_t axis = each.axis_of({"queries", "keys"});
    if (axis >= 0) return kHeld - axis;
    if (each.is_parts()) return kParts;
    return each.is("additional") ? -1 : each.is("batch") ? -2 : each.is("given") ? -3 : each.integer();
  });
  operand.is_free = said["strides"].one_of({"free", "compact"}) == "free";
  return operand;
}

// That a kernel takes what it is given here, in that order.
void check_operands(const Kernel& kernel) {
  std::vector<std::string> given, takes;
  bool has_place = !kernel.problem.is_open();
  for (const TableOperand* operand : forward_operands()) {
    if (operand->role == "output" && !has_place) {
      has_place = true;
      for (size_t axis = 0; axis < kernel.problem.layout.size(); ++axis) {
        for (const char* name : {"length", "first_query", "first_key"}) given.push_back(sentence({name, axis}));
      }
    }
    if (kernel.problem.has(operand->option)) given.push_back(operand->name);
  }
  for (size_t i = 0; i < kernel.workspace.size(); ++i) given.push_back(sentence({"workspace", i}));
  for (const Operand& operand : kernel.operands) takes.push_back(operand.name);
  if (takes != given) {
    throw Error({"its kernel for ", kernel.problem.text(), " takes other operands than those of this version"});
  }
}

// That extents which a call knows are of axes that an open layout has, and that C++ knows what they are.
void check_extents(const Kernel& kernel) {
  int64_t beyond = kHeld - (kernel.problem.is_open() ? static_cast<int64_t>(kernel.problem.layout.size()) : 0);
  for (const Operand& operand : kernel.operands) {
    for (int64_t extent : operand.shape) {
      if (extent > beyond) continue;
      throw Error({"its kernel for ", kernel.problem.text(), " takes ", operand.name, " of a layout that it has not"});
    }
  }
  for (const Buffer& buffer : kernel.workspace) {
    if (std::count(buffer.begin(), buffer.end(), kParts) != 0) {
      throw Error({"its kernel for ", kernel.problem.text(), " has a workspace that C++ cannot make"});
    }
  }
}

Kernel read_kernel(const Said& said) {
  said.has_exactly({"key", "library", "bytes", "sha256", "problem", "direction", "target", "workspace", "operands",
                    "alignment", "adjacent_heads"});
  Kernel kernel;
  kernel.key = said["key"].name("a0", 64, "at most 64 letters and digits");
  kernel.file = read_file_of(said);
  kernel.problem = read_problem(said["problem"]);
  kernel.is_forward = said["direction"].one_of({"forward", "backward", "tangent"}) == "forward";
  // A target that is unknown here is one for other machines.
  kernel.target = said["target"].name("a0_-", 32, "llvm:INSTRUCTION_SET or cuda:ARCHITECTURE", {"llvm:", "cuda:"});
  Said workspace = said["workspace"];
  workspace.has_exactly({"buffers", "multiple"});
  kernel.workspace = workspace["buffers"].list(0, 64, read_buffer);
  kernel.multiple = workspace["multiple"].integer(1, 1 << 20);
  kernel.operands = said["operands"].list(0, 128, read_operand);
  if (kernel.is_forward) {
    check_operands(kernel);
    check_extents(kernel);
  }
  kernel.alignment = said["alignment"].power_of_two(4096);
  kernel.adjacent_heads = said["adjacent_heads"].flag();
  return kernel;
}

ExtraFile read_extra(const Said& said) {
  said.has_exactly({"kind", "machine", "library", "bytes", "sha256"});
  ExtraFile extra;
  extra.kind = said["kind"].one_of({"launcher", "runtime", "runtime-cuda"});
  extra.machine = said["machine"].name("a0_-", 32, "an architecture, such as x86-64");
  extra.file = read_file_of(said);
  return extra;
}

void check_unique(std::vector<std::string> names, const char* what) {
  std::sort(names.begin(), names.end());
  auto twice = std::adjacent_find(names.begin(), names.end());
  if (twice != names.end()) throw Error({what, " has ", *twice, " twice"});
}

}  // namespace

Manifest Manifest::parse(const std::string& text) {
  Json json = Json::parse(text);
  const Json* format = json.find("format");
  if (format == nullptr) throw Error("it has no format");
  if (format->as<int64_t>() == nullptr || *format->as<int64_t>() != NA_BUNDLE_FORMAT) {
    const int64_t* number = format->as<int64_t>();
    throw Error({"its format is ", (number == nullptr ? "no number" : std::to_string(*number)),
                 ", and this version of na_compiler reads ", NA_BUNDLE_FORMAT});
  }
  Said said(json);
  said.has_exactly({"format", "versions", "kernels", "files", "digest"});
  Manifest manifest;
  Said versions = said["versions"];
  versions.has_exactly({"na_compiler", "abi", "apache-tvm", "apache-tvm-ffi"});
  auto version = [&](const char* name) { return versions[name].name("aA0.+!_-", 64, "a version"); };
  manifest.package_version = version("na_compiler");
  manifest.abi = version("abi");
  manifest.tvm_version = version("apache-tvm");
  manifest.ffi_version = version("apache-tvm-ffi");
  manifest.kernels = said["kernels"].list(0, Said::kAnyNumber, read_kernel);
  manifest.files = said["files"].list(0, Said::kAnyNumber, read_extra);
  std::string digest = read_digest(said["digest"]);
  if (manifest.abi != std::to_string(NA_KERNEL_ABI)) {
    throw Error({"it is of na_compiler ", manifest.package_version, ", whose kernels are called in another way (ABI ",
                 manifest.abi, ", here ", NA_KERNEL_ABI, ")"});
  }
  if (sha256(json.canonical("digest")) != digest) throw Error("it was edited");
  std::vector<std::string> keys, files;
  for (const Kernel& kernel : manifest.kernels) keys.push_back(kernel.key);
  for (const ExtraFile& extra : manifest.files) files.push_back(sentence({"a ", extra.kind, " for ", extra.machine}));
  check_unique(keys, "kernels");
  check_unique(files, "files");
  return manifest;
}

}  // namespace na
