#pragma once

#include <cstdint>
#include <string>

#include "error.h"

namespace na {

struct TooLargeError : Error {
  using Error::Error;
};

// Whether something is in a place, if only a link to nothing.
bool is_there(const std::string& path);

// Reads a regular file: anything else in its place, such as a pipe, might never end. Throws Error, also for a file of
// more bytes than the limit.
std::string read_file(const std::string& path, int64_t limit);

// The part of a path behind its last slash.
std::string name_of(const std::string& path);

}  // namespace na
