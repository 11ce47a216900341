"""`na_compiler.onnx.export`: from torch to a file, which runs everywhere, and back to the problems."""

import logging

import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx_models import run, session, to_numpy, to_torch
from oracle import TOLERANCE
from torch import nn
from torch.export import Dim

from na_compiler import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D, na1d, na2d
from na_compiler.onnx import add_bodies, export, problems, translation_table
from na_compiler.problem import Problem


class Mixed(nn.Module):
    """Modules and plain calls, several windows, lse, grouped queries and additional keys."""

    def __init__(self):
        super().__init__()
        self.first = NeighborhoodAttention2D(16, 2, 3)
        self.second = NeighborhoodAttention2D(16, 2, (3, 4), (1, 2), 2, (False, True))
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        x = x + self.first(x)
        x = x + self.second(self.norm(x))
        heads = x.unflatten(-1, (4, 4))
        keys, values = heads[..., :2, :], heads[..., 2:, :]
        more = keys[:, 0], values[:, 0]
        output, lse = na2d(heads, keys, values, 5, None, None, False, 0.5, *more, return_lse=True)
        row = na1d(heads[:, 0], heads[:, 0], heads[:, 0], 3, is_causal=True)
        return x + output.flatten(-2) + lse.sum(-1, keepdim=True) + row.flatten(-2)[:, None]


MIXED = [
    Problem((8, 9), 2, 8, 3),
    Problem((8, 9), 2, 8, (3, 4), (1, 2), 2, (False, True)),
    Problem((8, 9), 4, 4, 5, heads_kv=2, additional_kv=True),
    Problem(9, 4, 4, 3, is_causal=True),
]
BATCH = ({0: Dim("batch", min=1, max=64)},)
TOKENS = ({0: Dim("batch", min=1, max=64), 1: Dim("X", min=8, max=64), 2: Dim("Y", min=9, max=64)},)


def error(result, expected):
    return ((to_torch(result).double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("dynamic", "shapes"),
    [(None, [(2, 8, 9)]), (BATCH, [(2, 8, 9), (1, 8, 9), (5, 8, 9)]), (TOKENS, [(2, 8, 9), (3, 11, 13)])],
    ids=["fixed", "batch", "layout"],
)
def test_one_file_for_every_runtime(dtype, dynamic, shapes, tmp_path, seed):
    model = Mixed().eval()
    path = tmp_path / "model.onnx"
    halved = Mixed().eval().to(getattr(torch, dtype))
    halved.load_state_dict(model.state_dict())
    x = torch.randn(2, 8, 9, 16)
    export(halved, (x.to(getattr(torch, dtype)),), path, dynamic, input_names=["x"], output_names=["y"])
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    assert {function.name for function in proto.functions} == {"NA1D", "NA2D"}
    if dynamic is not TOKENS:
        assert list(problems(path)) == [problem.replace(dtype=dtype) for problem in MIXED]
    for shape in shapes:
        x = torch.randn(*shape, 16)
        with torch.no_grad():
            expected = model(x)
        inputs = {"x": to_numpy(x.to(getattr(torch, dtype)))}
        # A few roundings to the dtype lie between input and output.
        limit = 3 * TOLERANCE[dtype]
        assert error(run(session(proto), inputs)[0], expected) < limit
        assert error(ReferenceEvaluator(proto).run(None, inputs)[0], expected) < limit


def test_bfloat16_is_exported_with_a_word_about_it(tmp_path, seed, caplog):
    model = NeighborhoodAttention2D(16, 2, 3).bfloat16().eval()
    x = torch.randn(2, 8, 9, 16)
    with caplog.at_level(logging.WARNING, "na_compiler"):
        program = export(model, (x.bfloat16(),), dynamic_shapes=BATCH, input_names=["x"])
    assert "the model computes in bfloat16" in caplog.text
    proto = program.model_proto
    assert {value.type.tensor_type.elem_type for value in proto.graph.output} == {onnx.TensorProto.BFLOAT16}
    with torch.no_grad():
        expected = model.float()(x)
    (result,) = ReferenceEvaluator(proto).run(None, {"x": to_numpy(x.bfloat16())})
    assert error(result, expected) < 3 * TOLERANCE["bfloat16"]


@pytest.mark.parametrize(
    ("module", "shape"),
    [(NeighborhoodAttention1D(16, 2, 5), (2, 12, 16)), (NeighborhoodAttention3D(16, 2, 3), (2, 4, 5, 6, 16))],
    ids=["1-D", "3-D"],
)
def test_modules_of_other_ranks(module, shape, seed):
    x = torch.randn(shape)
    proto = export(module, (x,), input_names=["x"]).model_proto
    with torch.no_grad():
        assert error(run(session(proto), {"x": x.numpy()})[0], module(x)) < 1e-5
    assert module.training  # As it was.


def test_the_table_serves_who_calls_torch_s_exporter(seed):
    x = torch.randn(2, 8, 9, 16)
    model = Mixed().eval()
    program = torch.onnx.export(
        model, (x,), dynamo=True, custom_translation_table=translation_table(), input_names=["x"], verbose=False
    )
    assert not program.model.functions
    add_bodies(program.model)
    with torch.no_grad():
        assert error(run(session(program.model_proto), {"x": x.numpy()})[0], model(x)) < 3e-5


def test_an_exported_program_is_taken_as_well():
    program = torch.export.export(Mixed().eval(), (torch.randn(2, 8, 9, 16),), dynamic_shapes=BATCH)
    assert list(problems(export(program).model)) == MIXED


def test_large_weights_go_to_a_file_of_their_own(tmp_path, monkeypatch):
    from na_compiler.onnx import exporter

    x = torch.randn(1, 8, 9, 16)
    export(Mixed(), (x,), tmp_path / "small.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]
    monkeypatch.setattr(exporter, "_EXTERNAL_BYTES", 1000)
    model = Mixed().eval()
    export(model, (x,), tmp_path / "large.onnx", input_names=["x"])
    assert (tmp_path / "large.onnx.data").stat().st_size > 1000
    assert list(problems(tmp_path / "large.onnx")) == MIXED
    loaded = onnxruntime.InferenceSession(tmp_path / "large.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        assert error(loaded.run(None, {"x": x.numpy()})[0], model(x)) < 3e-5


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="body must be one of generic, blocked, got 'fast'"):
        export(Mixed(), (), body="fast")
    with pytest.raises(ValueError, match="opset must be at least 18, got 17; 21 would work"):
        export(Mixed(), (), opset=17)


def test_importing_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, na_compiler.onnx; assert 'torch' not in sys.modules and 'tvm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
