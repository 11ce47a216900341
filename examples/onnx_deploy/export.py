"""Step 1: write the classifier as ONNX, and a photograph for it.

    python export.py [FOLDER]

The weights are drawn at random from a fixed seed: what is shown is that every way of running the model gives what torch
gives.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from skimage import data, transform
from torch.export import Dim

import na_compiler.onnx

sys.path.insert(0, str(Path(__file__).parents[1]))
from models.nat import Classifier

SIZE = 224
# Of ImageNet, as classify.cc has them.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)


def make_model() -> Classifier:
    torch.manual_seed(0)
    return Classifier("dinat_femto").eval()


def write_photograph(path: Path) -> None:
    """Write the photograph as a PPM: a line of text, then bytes, which any program can read."""
    pixels = transform.resize(data.astronaut(), (SIZE, SIZE), anti_aliasing=True)
    path.write_bytes(f"P6 {SIZE} {SIZE} 255\n".encode() + np.rint(255 * pixels).astype(np.uint8).tobytes())


def read_photograph(path: Path) -> np.ndarray:
    """Return a photograph as the model takes it, ``[1, 3, height, width]``."""
    raw = path.read_bytes()
    header, _, pixels = raw.partition(b"\n")
    _, width, height, _ = header.split()
    image = np.frombuffer(pixels, np.uint8).reshape(int(height), int(width), 3)
    return ((image / np.float32(255) - MEAN) / DEVIATION).transpose(2, 0, 1)[None]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build")
    folder.mkdir(parents=True, exist_ok=True)
    write_photograph(folder / "photograph.ppm")
    started = time.perf_counter()
    na_compiler.onnx.export(
        make_model(),
        (torch.zeros(2, 3, SIZE, SIZE),),
        folder / "classifier.onnx",
        dynamic_shapes=({0: Dim("batch", min=1, max=64)},),
        input_names=["image"],
        output_names=["scores"],
    )
    print(f"exported in {time.perf_counter() - started:.1f} s to {folder / 'classifier.onnx'}, with the problems")
    for problem, count in na_compiler.onnx.problems(folder / "classifier.onnx").items():
        print(f"  {count} x {problem}")


if __name__ == "__main__":
    main()
