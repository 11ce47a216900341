#include "error.h"

#include <cstring>

namespace na {

Part::Part(const char* text) : text_(text), size_(std::strlen(text)) {}

void Part::append_to(std::string& sentence) const {
  if (text_ == nullptr) {
    sentence += std::to_string(number_);
  } else {
    sentence.append(text_, size_);
  }
}

std::string sentence(std::initializer_list<Part> parts) {
  std::string made;
  for (const Part& part : parts) part.append_to(made);
  return made;
}

Error::Error(std::initializer_list<Part> parts) : std::runtime_error(sentence(parts)) {}

}  // namespace na
