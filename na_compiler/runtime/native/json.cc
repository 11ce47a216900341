#include "json.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>

#include "error.h"

namespace na {

class JsonReader {
 public:
  explicit JsonReader(const std::string& text) : at_(text.c_str()), end_(text.c_str() + text.size()) {}

  Json document() {
    Json value = read(0);
    skip();
    if (at_ != end_) fail();
    return value;
  }

 private:
  // Deeper than any manifest; a limit, so that no file makes the reader run out of stack.
  static constexpr int kDepth = 64;

  [[noreturn]] void fail() const { throw Error("it is no JSON"); }

  void skip() {
    while (at_ < end_ && std::strchr(" \t\r\n", *at_) != nullptr && *at_ != '\0') ++at_;
  }

  bool take(char expected) {
    skip();
    if (at_ >= end_ || *at_ != expected) return false;
    ++at_;
    return true;
  }

  void word(const char* expected) {
    size_t length = std::strlen(expected);
    if (static_cast<size_t>(end_ - at_) < length || std::memcmp(at_, expected, length) != 0) fail();
    at_ += length;
  }

  Json read(int depth) {
    skip();
    if (at_ >= end_ || depth > kDepth) fail();
    Json value;
    switch (*at_) {
      case '{':
        return object(depth);
      case '[':
        return array(depth);
      case '"':
        return string();
      case 't':
      case 'f':
        value.kind_ = Json::Kind::kBoolean;
        value.boolean_ = *at_ == 't';
        word(value.boolean_ ? "true" : "false");
        return value;
      case 'n':
        word("null");
        return value;
      default:
        return number();
    }
  }

  Json object(int depth) {
    Json value;
    value.kind_ = Json::Kind::kObject;
    ++at_;
    if (take('}')) return value;
    do {
      skip();
      if (at_ >= end_ || *at_ != '"') fail();
      Json name = string();
      if (!take(':')) fail();
      value.members_.emplace_back(std::move(name), read(depth + 1));
    } while (take(','));
    if (!take('}')) fail();
    return value;
  }

  Json array(int depth) {
    Json value;
    value.kind_ = Json::Kind::kArray;
    ++at_;
    if (take(']')) return value;
    do {
      value.array_.push_back(read(depth + 1));
    } while (take(','));
    if (!take(']')) fail();
    return value;
  }

  Json number() {
    Json value;
    value.kind_ = Json::Kind::kNumber;
    char* after = nullptr;
    value.number_ = std::strtod(at_, &after);  // The text ends in a 0.
    if (after == at_ || after > end_) fail();
    value.written_.assign(at_, static_cast<const char*>(after));
    at_ = after;
    return value;
  }

  Json string() {
    Json value;
    value.kind_ = Json::Kind::kString;
    const char* start = at_;
    value.string_ = text();
    value.written_.assign(start, at_);
    return value;
  }

  std::string text() {
    std::string result;
    for (++at_; at_ < end_ && *at_ != '"'; ++at_) {
      if (*at_ != '\\') {
        result += *at_;
        continue;
      }
      if (++at_ >= end_) fail();
      static const char kPlain[] = "\"\\/bfnrt";
      static const char kMeant[] = "\"\\/\b\f\n\r\t";
      if (*at_ == 'u') {
        append_utf8(result, hexadecimal());
      } else if (const char* found = std::strchr(kPlain, *at_); found != nullptr && *at_ != '\0') {
        result += kMeant[found - kPlain];
      } else {
        fail();
      }
    }
    if (at_ >= end_) fail();
    ++at_;
    return result;
  }

  // Of \uXXXX; leaves the place at its last digit. Halves of a pair stay apart: paths of a bundle are ASCII.
  unsigned hexadecimal() {
    if (end_ - at_ < 5) fail();
    char digits[5] = {at_[1], at_[2], at_[3], at_[4], 0};
    char* after = nullptr;
    unsigned code = static_cast<unsigned>(std::strtoul(digits, &after, 16));
    if (after != digits + 4) fail();
    at_ += 4;
    return code;
  }

  static void append_utf8(std::string& to, unsigned code) {
    if (code < 0x80) {
      to += static_cast<char>(code);
    } else if (code < 0x800) {
      to += static_cast<char>(0xC0 | code >> 6);
      to += static_cast<char>(0x80 | (code & 0x3F));
    } else {
      to += static_cast<char>(0xE0 | code >> 12);
      to += static_cast<char>(0x80 | (code >> 6 & 0x3F));
      to += static_cast<char>(0x80 | (code & 0x3F));
    }
  }

  const char* at_;
  const char* end_;
};

Json Json::parse(const std::string& text) { return JsonReader(text).document(); }

bool Json::boolean() const {
  if (kind_ != Kind::kBoolean) throw Error("it has something else where true or false should be");
  return boolean_;
}

int64_t Json::integer() const {
  if (kind_ != Kind::kNumber || number_ != std::floor(number_) || std::fabs(number_) > 9e15) {
    throw Error("it has something else where an integer should be");
  }
  return static_cast<int64_t>(number_);
}

const std::string& Json::string() const {
  if (kind_ != Kind::kString) throw Error("it has something else where a text should be");
  return string_;
}

const std::vector<Json>& Json::array() const {
  if (kind_ != Kind::kArray) throw Error("it has something else where a list should be");
  return array_;
}

std::vector<int64_t> Json::integers() const {
  std::vector<int64_t> result;
  for (const Json& each : array()) result.push_back(each.kind_ == Kind::kBoolean ? each.boolean_ : each.integer());
  return result;
}

const Json* Json::find(const char* name) const {
  for (const auto& member : members_) {
    if (member.first.string_ == name) return &member.second;
  }
  return nullptr;
}

const Json& Json::operator[](const char* name) const {
  const Json* found = find(name);
  if (found == nullptr) throw Error(std::string("it has no ") + name);
  return *found;
}

std::string Json::canonical(const char* without) const {
  std::string text;
  switch (kind_) {
    case Kind::kNull:
      return "null";
    case Kind::kBoolean:
      return boolean_ ? "true" : "false";
    case Kind::kArray:
      for (const Json& each : array_) text += (text.empty() ? "" : ", ") + each.canonical("");
      return "[" + text + "]";
    case Kind::kObject: {
      std::map<std::string, std::string> sorted;
      for (const auto& member : members_) {
        if (member.first.string_ != without) {
          sorted[member.first.string_] = member.first.written_ + ": " + member.second.canonical("");
        }
      }
      for (const auto& member : sorted) text += (text.empty() ? "" : ", ") + member.second;
      return "{" + text + "}";
    }
    default:
      return written_;
  }
}

}  // namespace na
