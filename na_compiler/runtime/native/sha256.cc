#include "sha256.h"

#include <cmath>
#include <cstdint>
#include <cstring>

namespace na {
namespace {

uint32_t rotate(uint32_t word, int by) { return word >> by | word << (32 - by); }

// The first 32 bits behind the point of a root of the first primes: square roots begin the hash, cube roots are the
// constants of its rounds. (The standard defines them so; a double holds more than enough bits of them.)
struct Constants {
  uint32_t start[8];
  uint32_t rounds[64];

  Constants() {
    int found = 0;
    for (int candidate = 2; found < 64; ++candidate) {
      bool is_prime = true;
      for (int divisor = 2; divisor * divisor <= candidate; ++divisor) is_prime = is_prime && candidate % divisor != 0;
      if (!is_prime) continue;
      if (found < 8) start[found] = fraction(std::sqrt(static_cast<double>(candidate)));
      rounds[found++] = fraction(std::cbrt(static_cast<double>(candidate)));
    }
  }

  static uint32_t fraction(double root) {
    return static_cast<uint32_t>(static_cast<uint64_t>(std::ldexp(root - std::floor(root), 32)));
  }
};

void digest_block(const unsigned char* block, const Constants& constants, uint32_t (&hash)[8]) {
  uint32_t words[64];
  for (int i = 0; i < 16; ++i) {
    words[i] = static_cast<uint32_t>(block[4 * i]) << 24 | block[4 * i + 1] << 16 | block[4 * i + 2] << 8 |
               block[4 * i + 3];
  }
  for (int i = 16; i < 64; ++i) {
    uint32_t early = words[i - 15], late = words[i - 2];
    words[i] = words[i - 16] + (rotate(early, 7) ^ rotate(early, 18) ^ early >> 3) + words[i - 7] +
               (rotate(late, 17) ^ rotate(late, 19) ^ late >> 10);
  }
  uint32_t v[8];
  std::memcpy(v, hash, sizeof v);
  for (int i = 0; i < 64; ++i) {
    uint32_t first = v[7] + (rotate(v[4], 6) ^ rotate(v[4], 11) ^ rotate(v[4], 25)) + ((v[4] & v[5]) ^ (~v[4] & v[6])) +
                     constants.rounds[i] + words[i];
    uint32_t second = (rotate(v[0], 2) ^ rotate(v[0], 13) ^ rotate(v[0], 22)) +
                      ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
    std::memmove(v + 1, v, 7 * sizeof v[0]);
    v[4] += first;
    v[0] = first + second;
  }
  for (int i = 0; i < 8; ++i) hash[i] += v[i];
}

}  // namespace

std::string sha256(const std::string& data) {
  static const Constants constants;
  uint32_t hash[8];
  std::memcpy(hash, constants.start, sizeof hash);
  auto bytes = reinterpret_cast<const unsigned char*>(data.data());
  size_t whole = data.size() / 64 * 64;
  for (size_t at = 0; at < whole; at += 64) digest_block(bytes + at, constants, hash);
  // The rest, a 1 bit, zeros, and the length in bits.
  unsigned char last[128] = {};
  size_t rest = data.size() - whole;
  std::memcpy(last, bytes + whole, rest);
  last[rest] = 0x80;
  size_t size = rest < 56 ? 64 : 128;
  uint64_t bits = static_cast<uint64_t>(data.size()) * 8;
  for (int i = 0; i < 8; ++i) last[size - 1 - i] = static_cast<unsigned char>(bits >> 8 * i);
  for (size_t at = 0; at < size; at += 64) digest_block(last + at, constants, hash);
  static const char kDigits[] = "0123456789abcdef";
  std::string result;
  for (uint32_t word : hash) {
    for (int shift = 28; shift >= 0; shift -= 4) result += kDigits[word >> shift & 15];
  }
  return result;
}

}  // namespace na
