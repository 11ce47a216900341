// A program of some kernels: reads what to launch and with what, runs it, writes the tensors back.
#include <unistd.h>

#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <fstream>
#include <string>
#include <utility>

#include "engine.h"

Argument arguments[64];

void die(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fprintf(stderr, "emulator: ");
  vfprintf(stderr, format, arguments);
  fprintf(stderr, "\n");
  fflush(stderr);
  _exit(3);
}

static uchar* read_tensor(const char* path, size_t bytes) {
  uchar* memory = guarded(bytes, 0xff);
  FILE* file = fopen(path, "rb");
  if (!file || fread(memory, 1, bytes, file) != bytes) die("cannot read %s", path);
  fclose(file);
  return memory;
}
static void write_tensor(const char* path, const uchar* memory, size_t bytes) {
  FILE* file = fopen(path, "wb");
  if (!file || fwrite(memory, 1, bytes, file) != bytes) die("cannot write %s", path);
  fclose(file);
}
static void on_fault(int) { die("an access outside the tensors, by thread %d of block %d", thread_number, blockIdx.x); }
static void on_shift(int) {
  die("a shift by a negative number, or by all bits or more, by thread %d of block %d", thread_number, blockIdx.x);
}
static void catch_faults() {
  signal(SIGILL, on_shift);
  signal(SIGSEGV, on_fault);
  signal(SIGBUS, on_fault);
}
int main(int, char** argv) {
  std::string folder = argv[1];
  late_loads = argv[2][0] == '1', late_products = argv[2][1] == '1';
  descending = argv[2][2] == '1', greedy = argv[2][3] == '1';
  catch_faults();
  std::ifstream call(folder + "/call.txt");
  std::string word, name;
  std::vector<std::pair<uchar*, size_t>> given;
  while (call >> word) {
    if (word == "tensor") {
      size_t bytes;
      call >> bytes;
      std::string path = folder + "/" + std::to_string(given.size()) + ".bin";
      given.push_back({read_tensor(path.c_str(), bytes), bytes});
      continue;
    }
    if (word != "launch") die("what is %s", word.c_str());
    int grid[3], block[3], count = 0;
    call >> name;
    for (int& extent : grid) call >> extent;
    for (int& extent : block) call >> extent;
    while (call.peek() != '\n' && call >> word) {
      if (count == 64) die("more than 64 arguments of %s", name.c_str());
      Argument& argument = arguments[count++];
      if (word == "t") { int number; call >> number; argument.pointer = given[number].first; }
      else if (word == "i") call >> argument.whole;
      else if (word == "f") call >> argument.real;
      else if (word == "n") argument.map = CUtensorMap{};
      else {
        CUtensorMap& map = argument.map;
        int number;
        call >> number >> map.rank;
        map.base = given[number].first;
        for (int i = 0; i < map.rank; i++) call >> map.extent[i];
        for (int i = 0; i < map.rank; i++) call >> map.stride[i];
        for (int i = 0; i < map.rank; i++) call >> map.box[i];
        for (int i = 0; i < map.rank; i++) call >> map.step[i];
        call >> map.swizzle;
      }
    }
    Kernel* kernel = kernels;
    while (kernel->name && name != kernel->name) kernel++;
    if (!kernel->name) die("there is no kernel %s", name.c_str());
    blockDim = {block[0], block[1], block[2]}, gridDim = {grid[0], grid[1], grid[2]};
    for (blockIdx.z = 0; blockIdx.z < grid[2]; blockIdx.z++)
      for (blockIdx.y = 0; blockIdx.y < grid[1]; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < grid[0]; blockIdx.x++) run_block(block[0] * block[1] * block[2], kernel->run);
  }
  for (size_t number = 0; number < given.size(); number++)
    write_tensor((folder + "/" + std::to_string(number) + ".bin").c_str(), given[number].first, given[number].second);
  return 0;
}
