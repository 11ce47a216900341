"""Step 4: run the model in ONNX Runtime, from Python, with the operator library and without it, and compare with torch.

python run.py [FOLDER]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from export import make_model, read_photograph

import na_compiler.onnx


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build")
    image = read_photograph(folder / "photograph.ppm")
    with torch.no_grad():
        expected = make_model()(torch.from_numpy(image)).numpy()
    for name in ("with the operator library", "without it"):
        options = onnxruntime.SessionOptions()
        if name == "with the operator library":
            na_compiler.onnx.register(options, folder / "classifier.bundle", library=folder / "libna_compiler_ort.so")
        session = onnxruntime.InferenceSession(folder / "classifier.onnx", options)
        for batch in (1, 3):  # The batch is dynamic.
            (scores,) = session.run(None, {"image": np.repeat(image, batch, 0)})
            error = np.linalg.norm(scores - expected) / np.linalg.norm(np.repeat(expected, batch, 0))
            if not error < 1e-5:
                raise SystemExit(f"{name}, batch {batch}: not torch's output, relative error {error:.1e}")
        started = time.perf_counter()
        for _ in range(5):
            session.run(None, {"image": image})
        milliseconds = (time.perf_counter() - started) / 5e-3
        print(f"{name}: torch's output, relative error {error:.1e}; {milliseconds:.1f} ms an image")
    np.savetxt(folder / "torch.txt", expected[0], fmt="%.9g")
    print("best classes:", *np.argsort(-expected[0])[:5])


if __name__ == "__main__":
    main()
