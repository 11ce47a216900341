#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace na {

// A part of a sentence: text, or a whole number. It lives as long as what it is made of.
class Part {
 public:
  Part(const char* text);
  Part(const std::string& text) : text_(text.data()), size_(text.size()) {}
  template <class Number, class = std::enable_if_t<std::is_integral_v<Number> && sizeof(Number) >= sizeof(int)>>
  Part(Number number) : number_(static_cast<int64_t>(number)) {}

  void append_to(std::string& sentence) const;

 private:
  const char* text_ = nullptr;
  size_t size_ = 0;
  int64_t number_ = 0;
};

// Puts a sentence together in one call: a sum of strings is a call a part, with what to do where that call throws.
std::string sentence(std::initializer_list<Part> parts);

// What went wrong, in a sentence. Becomes an error of the host's where the library is left.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
  Error(std::initializer_list<Part> parts);
};

}  // namespace na
