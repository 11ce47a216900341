"""Programs whose images have any size, by one kernel: exported and served without TVM, and compiled by torch once."""

import pytest
import torch
from oracle import check
from processes import run_python
from torch import nn
from torch.export import Dim

import na_compiler
from na_compiler import na2d, specialize
from na_compiler.cli import main
from na_compiler.compiler import serving
from na_compiler.reference import neighborhood_attention
from na_compiler.runtime import bundle as bundles

HEADS, WIDTH = 2, 16
RULES = [{"kernel_size": 5}, {"kernel_size": 3, "dilation": 2, "stride": 2}]
# Serves a program at the sizes of some inputs, in a process that has no compiler.
SERVE = """
    import sys

    sys.modules["tvm"] = None  # As if it were not installed.
    import torch
    import na_compiler

    folder = sys.argv[1]
    model = torch.export.load(f"{folder}/model.pt2").module()
    torch.save([model(image) for image in torch.load(f"{folder}/images.pt")], f"{folder}/outputs.pt")
"""


class Backbone(nn.Module):
    """Two layers with windows, of an image of any size."""

    def __init__(self):
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in RULES)

    def forward(self, image, attend=na2d):
        for projection, rule in zip(self.projections, RULES, strict=True):
            parts = projection(image).unflatten(-1, (3, HEADS, WIDTH // HEADS)).unbind(-3)
            image = image + attend(*parts, **rule).flatten(-2)
        return image


def exactly(model, image):
    """What a model computes, by the reference."""
    return model.double()(image.double(), lambda *parts, **rule: neighborhood_attention(*parts, **rule)[0]).detach()


def draw_sizes(count):
    """Sizes from the smallest one that all windows fit on. (Of a square torch makes a program of squares.)"""
    return [(6, 7), (6, 6), *(tuple(torch.randint(6, 40, (2,)).tolist()) for _ in range(count - 2))]


@pytest.mark.full
def test_an_exported_model_at_sizes_that_nobody_named(tmp_path, seed):
    model = Backbone().eval()
    dims = {1: Dim("height", min=6, max=4096), 2: Dim("width", min=6, max=4096)}
    program = torch.export.export(model, (torch.randn(1, 9, 10, WIDTH),), dynamic_shapes=(dims,))
    torch.export.save(program, tmp_path / "model.pt2")
    assert main([str(tmp_path / "model.pt2"), "-o", str(tmp_path / "kernels"), "--with-runtime"]) == 0
    images = [torch.randn(1, *size, WIDTH) for size in draw_sizes(50)]
    torch.save(images, tmp_path / "images.pt")
    named = {"NA_COMPILER_BUNDLE": tmp_path / "kernels", "NA_COMPILER_CACHE": tmp_path / "none", "NA_COMPILER_JIT": "0"}
    run_python(SERVE, str(tmp_path), **named)
    for image, output in zip(images, torch.load(tmp_path / "outputs.pt"), strict=True):
        check("output", output.detach(), exactly(model, image), "float32")


def test_torch_compiles_once_for_all_sizes(monkeypatch, tmp_path, seed):
    """And so do we."""
    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path))
    monkeypatch.setattr(na_compiler.compiler.kernels, "_kernels", {})
    monkeypatch.setattr(na_compiler.ops.kernels, "_kernels", {})
    monkeypatch.setattr(serving, "_served", {})
    monkeypatch.setattr(bundles, "_loaded", [])
    made, make = [], na_compiler.compiler.kernels.make_entry
    monkeypatch.setattr(
        na_compiler.compiler.kernels, "make_entry", lambda spec, *rest: made.append(spec.problem) or make(spec, *rest)
    )
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph

    specialize("never")
    try:
        model = Backbone().eval()
        compiled = torch.compile(model, dynamic=True, backend=counted)
        images = [torch.randn(1, *size, WIDTH) for size in draw_sizes(5)]
        outputs = [compiled(image).detach() for image in images]
    finally:
        specialize(None)
    assert len(graphs) == 1
    assert len(made) == len(RULES)
    assert all(problem.is_open for problem in made)
    for image, output in zip(images, outputs, strict=True):
        check("output", output, exactly(model, image), "float32")
