#include "json.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "error.h"

namespace na {
namespace {

class JsonReader {
 public:
  explicit JsonReader(const std::string& text) : at_(text.data()), end_(text.data() + text.size()) {}

  Json document() {
    Json value = read(1);
    skip();
    if (at_ != end_) fail();
    return value;
  }

 private:
  static constexpr int kMaxDepth = 16;

  [[noreturn]] void fail() const { throw Error("it is no JSON"); }

  bool is_at(char expected) const { return at_ < end_ && *at_ == expected; }

  void skip() {
    while (at_ < end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\r' || *at_ == '\n')) ++at_;
  }

  bool take(char expected) {
    skip();
    if (!is_at(expected)) return false;
    ++at_;
    return true;
  }

  void word(const char* expected) {
    size_t length = std::strlen(expected);
    if (static_cast<size_t>(end_ - at_) < length || std::memcmp(at_, expected, length) != 0) fail();
    at_ += length;
  }

  // `depth`: of a list or object that begins here.
  Json read(int depth) {
    skip();
    if (at_ >= end_) fail();
    switch (*at_) {
      case '{':
        return {object(depth)};
      case '[':
        return {list(depth)};
      case '"':
        return {text()};
      case 't':
        word("true");
        return {true};
      case 'f':
        word("false");
        return {false};
      case 'n':
        word("null");
        return {};
      default:
        return {integer()};
    }
  }

  void enter(int depth) {
    if (depth > kMaxDepth) {
      throw Error({"its lists and objects lie more than ", kMaxDepth, " deep in one another"});
    }
    ++at_;
  }

  Json::Object object(int depth) {
    Json::Object members;
    enter(depth);
    if (take('}')) return members;
    do {
      skip();
      if (!is_at('"')) fail();
      std::string name = text();
      if (!take(':')) fail();
      members.emplace_back(std::move(name), read(depth + 1));
    } while (take(','));
    if (!take('}')) fail();
    check_names(members);
    return members;
  }

  static void check_names(const Json::Object& members) {
    std::vector<const std::string*> names;
    for (const auto& member : members) names.push_back(&member.first);
    std::sort(names.begin(), names.end(), [](auto one, auto other) { return *one < *other; });
    auto same = [](auto one, auto other) { return *one == *other; };
    auto twice = std::adjacent_find(names.begin(), names.end(), same);
    if (twice != names.end()) throw Error({"it says '", **twice, "' twice"});
  }

  Json::List list(int depth) {
    Json::List values;
    enter(depth);
    if (take(']')) return values;
    do {
      values.push_back(read(depth + 1));
    } while (take(','));
    if (!take(']')) fail();
    return values;
  }

  int64_t integer() {
    const char* start = at_;
    bool is_negative = is_at('-');
    if (is_negative) ++at_;
    const char* digits = at_;
    int64_t number = 0;
    bool is_large = false;
    for (; at_ < end_ && *at_ >= '0' && *at_ <= '9'; ++at_) {
      number = is_large ? 0 : 10 * number + (*at_ - '0');
      is_large = is_large || number > kMaxInteger;
    }
    if (at_ == digits || (*digits == '0' && at_ - digits > 1)) fail();
    if (is_large || (is_negative && number == 0) || is_at('.') || is_at('e') || is_at('E')) {
      while (at_ < end_ && *at_ != '\0' && std::strchr("0123456789.eE+-", *at_) != nullptr) ++at_;
      std::string written(start, std::min<ptrdiff_t>(at_ - start, 24));
      throw Error({"it has the number ", written, ", and numbers are integers of at most 53 bits"});
    }
    return is_negative ? -number : number;
  }

  // Between quotes; nothing is escaped.
  std::string text() {
    const char* start = ++at_;
    while (at_ < end_ && *at_ != '"') {
      if (*at_ < ' ') fail();
      ++at_;
    }
    if (at_ >= end_) fail();
    return std::string(start, at_++);
  }

  const char* at_;
  const char* end_;
};

void append(std::string& to, const Json& json, const std::string& without) {
  if (json.as<std::monostate>() != nullptr) {
    to += "null";
  } else if (auto flag = json.as<bool>()) {
    to += *flag ? "true" : "false";
  } else if (auto number = json.as<int64_t>()) {
    to += std::to_string(*number);
  } else if (auto text = json.as<std::string>()) {
    to += '"' + *text + '"';
  } else if (auto list = json.as<Json::List>()) {
    to += '[';
    for (const Json& each : *list) {
      if (&each != &list->front()) to += ", ";
      append(to, each, "");
    }
    to += ']';
  } else {
    std::vector<const std::pair<std::string, Json>*> sorted;
    for (const auto& member : *json.as<Json::Object>()) {
      if (without.empty() || member.first != without) sorted.push_back(&member);
    }
    std::sort(sorted.begin(), sorted.end(), [](auto one, auto other) { return one->first < other->first; });
    to += '{';
    for (const auto* member : sorted) {
      if (member != sorted.front()) to += ", ";
      to += '"' + member->first + "\": ";
      append(to, member->second, "");
    }
    to += '}';
  }
}

}  // namespace

Json Json::parse(const std::string& text) {
  for (unsigned char byte : text) {
    if (byte == '\t' || byte == '\n' || byte == '\r' || (byte >= ' ' && byte <= '~' && byte != '\\')) continue;
    char shown[8];
    std::snprintf(shown, sizeof shown, "0x%02x", byte);
    throw Error({"it has the byte ", shown, ", and a manifest is ASCII without backslashes"});
  }
  return JsonReader(text).document();
}

const Json* Json::find(const std::string& name) const {
  auto object = as<Object>();
  if (object == nullptr) return nullptr;
  for (const auto& member : *object) {
    if (member.first == name) return &member.second;
  }
  return nullptr;
}

std::string Json::canonical(const std::string& without) const {
  std::string text;
  append(text, *this, without);
  return text;
}

}  // namespace na
