// Reads JSON as manifests have it: docs/bundle-format.md, na_compiler/runtime/manifest.py.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace na {

// What every reader of JSON holds exactly, be its numbers doubles.
constexpr int64_t kMaxInteger = (int64_t{1} << 53) - 1;

// A value: null, a boolean, an integer, a text, a list or an object. No object says a name twice.
struct Json {
  using List = std::vector<Json>;
  using Object = std::vector<std::pair<std::string, Json>>;
  std::variant<std::monostate, bool, int64_t, std::string, List, Object> value;

  // Throws Error where the text is not a manifest's.
  static Json parse(const std::string& text);

  template <typename T>
  const T* as() const {
    return std::get_if<T>(&value);
  }
  // A member of an object; null where there is none, or it is no object.
  const Json* find(const std::string& name) const;
  // The text that Python's json.dumps(sort_keys=True) makes of it; of an object without one member.
  std::string canonical(const std::string& without = "") const;
};

}  // namespace na
