"""Made what lies here, with the package as it was at commit c2b49c4: files that users of that version have.

Run in a worktree of that commit, with ``PYTHONPATH`` naming it: ``python make.py FOLDER``.
"""

import sys
from pathlib import Path

import numpy as np
import torch

import na_compiler
import na_compiler.onnx


class Net(torch.nn.Module):
    """A layer, and a function with additional keys, several heads a key, and everything else."""

    def __init__(self):
        super().__init__()
        self.layer = na_compiler.NeighborhoodAttention1D(8, 2, 3, dilation=2)

    def forward(self, x, extra):
        x = self.layer(x).unflatten(-1, (4, 2))
        keys = x[:, :, ::2]
        return na_compiler.na1d(
            x, keys, keys, 4, stride=2, is_causal=True, scale=0.7, additional_keys=extra, additional_values=extra
        )


def main(folder):
    """Write a program, a model, a bundle, and what program and model give."""
    torch.manual_seed(0)
    net = Net().eval()
    x, extra = torch.randn(2, 9, 8), torch.randn(2, 3, 2, 2)
    batch = torch.export.Dim("batch", max=64)
    shapes = ({0: batch}, {0: batch})
    with torch.no_grad():
        expected = net(x, extra)
        torch.export.save(torch.export.export(net, (x, extra), dynamic_shapes=shapes), folder / "net.pt2")
    names = {"input_names": ["x", "extra"], "output_names": ["output"]}
    na_compiler.onnx.export(net, (x, extra), folder / "net.onnx", dynamic_shapes=shapes, **names)
    np.savez(folder / "net.npz", x=x, extra=extra, output=expected)
    problem = na_compiler.Problem(9, 2, 4, 3, dilation=2)
    na_compiler.save_bundle(folder / "bundle", [na_compiler.KernelSpec.make(problem, "llvm:x86-64")])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
