// Runs a model that AOTInductor compiled, with neighborhood attention from a bundle, without Python.
//
//   main MODEL.pt2 KERNELS OUTPUT.bin INPUT.bin 1x3x64x64 [INPUT.bin SHAPE ...]
//
// MODEL.pt2 and KERNELS are what export.py of this folder wrote; files of inputs hold float32 numbers, and so will
// OUTPUT.bin.
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <chrono>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "na_compiler.h"

namespace {

std::vector<int64_t> parse_shape(const std::string& text) {
  std::vector<int64_t> shape;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, 'x');) shape.push_back(std::stoll(part));
  return shape;
}

at::Tensor read(const std::string& path, const std::vector<int64_t>& shape) {
  at::Tensor tensor = at::empty(shape);
  std::ifstream file(path, std::ios::binary);
  if (!file.read(static_cast<char*>(tensor.data_ptr()), tensor.nbytes())) throw std::runtime_error("cannot read " + path);
  return tensor;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6 || argc % 2 != 0) {
    std::cerr << "usage: main MODEL.pt2 KERNELS OUTPUT.bin INPUT.bin 1x3x64x64 [INPUT.bin SHAPE ...]\n";
    return 2;
  }
  try {
    // Linked with libna_compiler_torch.so, the program has the operators. This is where their kernels are.
    if (na_compiler_load_bundle(argv[2]) != 0) throw std::runtime_error(na_compiler_last_error());
    torch::inductor::AOTIModelPackageLoader model(argv[1]);
    at::Device device(model.get_metadata().at("AOTI_DEVICE_KEY"));
    std::vector<at::Tensor> inputs;
    for (int i = 4; i < argc; i += 2) inputs.push_back(read(argv[i], parse_shape(argv[i + 1])).to(device));
    at::Tensor output = model.run(inputs)[0].cpu().contiguous();

    constexpr int kRuns = 20;
    auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kRuns; ++i) model.run(inputs)[0].cpu();
    std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - start;
    std::cout << "output " << output.sizes() << ", " << elapsed.count() / kRuns << " ms a run\n";

    std::ofstream(argv[3], std::ios::binary).write(static_cast<const char*>(output.data_ptr()), output.nbytes());
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
