"""Writes what ``main.cc`` runs: a model by AOTInductor, its kernels, the library of operators; says how to build it.

python examples/aot_cpp/export.py build/aot_cpp
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from torch.export import Dim

from na_compiler import aot

sys.path.insert(0, str(Path(__file__).parent.parent))
from models.nat import Classifier

SIZE = 64


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/aot_cpp").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    model = Classifier("dinat_pocket").eval()
    image = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        program = torch.export.export(model, (image,), dynamic_shapes=({0: Dim("batch", min=1, max=64)},))
        aot.package(program, folder / "model.pt2", bundle=folder / "kernels")
        expected = model(image)
    library = aot.build_library(folder)
    shutil.copy(aot.header_folder() / "na_compiler.h", folder)
    np.asarray(image).tofile(folder / "input.bin")
    np.asarray(expected).tofile(folder / "expected.bin")
    print(f"wrote model.pt2, kernels, {library.name} and na_compiler.h to {folder}; to build and run:")
    here = Path(__file__).parent
    print(f"  cmake -S {here} -B {folder}/build -DNA_COMPILER={folder} "
          f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}")  # fmt: skip
    print(f"  cmake --build {folder}/build")
    shape = "x".join(map(str, image.shape))
    print(f"  {folder}/build/main {folder}/model.pt2 {folder}/kernels {folder}/output.bin {folder}/input.bin {shape}")


if __name__ == "__main__":
    main()
