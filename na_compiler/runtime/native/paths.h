#pragma once

#include <algorithm>
#include <string>
#include <vector>

namespace na {

// The parts of a list of paths, which has colons between them.
inline std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  for (size_t at = 0; at < text.size();) {
    size_t next = std::min(text.find(':', at), text.size());
    if (next > at) parts.push_back(text.substr(at, next - at));
    at = next + 1;
  }
  return parts;
}

}  // namespace na
