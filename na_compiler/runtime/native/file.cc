#include "file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

namespace na {
namespace {

struct Descriptor {
  int number;
  ~Descriptor() {
    if (number >= 0) close(number);
  }
};

}  // namespace

bool is_there(const std::string& path) {
  struct stat status;
  return lstat(path.c_str(), &status) == 0;
}

std::string name_of(const std::string& path) { return path.substr(path.rfind('/') + 1); }

std::string read_file(const std::string& path, int64_t limit) {
  Descriptor file{open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC)};
  if (file.number < 0) throw Error(errno == ENOENT ? name_of(path) + " is missing" : "cannot read " + path);
  struct stat status;
  if (fstat(file.number, &status) != 0) throw Error({"cannot read ", path});
  if (!S_ISREG(status.st_mode)) throw Error({name_of(path), " is no regular file"});
  if (status.st_size > limit) {
    throw TooLargeError({name_of(path), " has ", status.st_size, " bytes, and should have ", limit, " at most"});
  }
  std::string content(static_cast<size_t>(status.st_size), '\0');
  size_t at = 0;
  while (at < content.size()) {
    ssize_t count = read(file.number, &content[at], content.size() - at);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) throw Error({"cannot read ", path});
    at += static_cast<size_t>(count);
  }
  return content;
}

}  // namespace na
