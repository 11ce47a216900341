#pragma once

#include <stdexcept>
#include <string>

namespace na {

// What went wrong, in a sentence. Becomes an error of the host's where the library is left.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace na
