#pragma once

#include <string>

namespace na {

// SHA-256 (FIPS 180-4) of some bytes, as 64 hexadecimal digits.
std::string sha256(const std::string& data);

}  // namespace na
