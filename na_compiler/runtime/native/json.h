// Reads JSON: what a bundle's manifest is written in.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace na {

// A value of JSON. Asking it for what it is not throws Error.
class Json {
 public:
  // Throws Error where the text is no JSON.
  static Json parse(const std::string& text);

  bool is_null() const { return kind_ == Kind::kNull; }
  bool is_string() const { return kind_ == Kind::kString; }
  bool boolean() const;
  int64_t integer() const;
  const std::string& string() const;
  const std::vector<Json>& array() const;
  std::vector<int64_t> integers() const;
  // A member of an object. `find` returns null where there is none.
  const Json& operator[](const char* name) const;
  const Json* find(const char* name) const;
  // The text that Python's json.dumps(sort_keys=True) makes of it, if json.dumps wrote it; without one member.
  std::string canonical(const char* without) const;

 private:
  friend class JsonReader;
  enum class Kind { kNull, kBoolean, kNumber, kString, kArray, kObject };
  Kind kind_ = Kind::kNull;
  bool boolean_ = false;
  double number_ = 0;
  std::string string_;
  // Of numbers and strings: as they are written.
  std::string written_;
  std::vector<Json> array_;
  // Of objects: the names, too, are values.
  std::vector<std::pair<Json, Json>> members_;
};

}  // namespace na
