"""Exported files in other hands: converters to float16, importers that know no functions, runtimes of other makers."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_models import one_node, session
from torch import nn
from torch.export import Dim

from na_compiler import NeighborhoodAttention2D, Problem, na2d
from na_compiler.onnx import DOMAIN, export, inline_bodies
from na_compiler.reference import neighborhood_attention

# Rounding to float16 on the way in, between layers, and on the way out.
HALF = 4e-3


class Two(nn.Module):
    """Two layers, whose lse nobody reads."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(NeighborhoodAttention2D(16, 2, 3), NeighborhoodAttention2D(16, 2, (3, 4), 1, 2))

    def forward(self, x):
        return self.layers(x)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a model, and its file for each body, once with functions and once of standard operators."""
    folder, model = tmp_path_factory.mktemp("exported"), Two().eval()
    x = torch.randn(1, 8, 9, 16)
    files = {}
    for body in ("generic", "blocked"):
        for standard in (False, True):
            files[body, standard] = folder / f"{body}{standard}.onnx"
            dynamic = ({0: Dim("batch", min=1, max=64)},)
            names = {"input_names": ["x"], "output_names": ["y"]}
            export(model, (x,), files[body, standard], dynamic, body=body, standard=standard, **names)
    return model, files


def error(result, expected):
    return np.linalg.norm(result.astype(np.float64) - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("body", ["generic", "blocked"])
def test_standard_files_have_standard_operators_only(exported, body, seed):
    model, files = exported
    proto = onnx.load(files[body, True])
    onnx.checker.check_model(proto, full_check=True)
    assert not proto.functions
    assert {opset.domain for opset in proto.opset_import} == {""}
    assert {node.domain for node in proto.graph.node} == {""}
    for batch in (1, 3):
        x = torch.randn(batch, 8, 9, 16)
        expected = model(x).detach().double().numpy()
        for standard in (False, True):
            loaded = session(onnx.load(files[body, standard]))
            assert error(loaded.run(None, {"x": x.numpy()})[0], expected) < 1e-5


def converters():
    made = {}
    for name in ("onnxconverter_common.float16", "onnxruntime.transformers.float16"):
        made[name] = pytest.param(name, id=name.partition(".")[0])
    return list(made.values())


@pytest.mark.parametrize("keep_io", [False, True], ids=["all", "keep_io_types"])
@pytest.mark.parametrize("standard", [False, True], ids=["functions", "standard"])
@pytest.mark.parametrize("converter", converters())
def test_converters_to_float16(exported, converter, standard, keep_io, seed):
    module = pytest.importorskip(converter, reason=f"needs {converter}")
    model, files = exported
    proto = module.convert_float_to_float16(onnx.load(files["generic", standard]), keep_io_types=keep_io)
    x = torch.randn(2, 8, 9, 16)
    given = x.numpy() if keep_io else x.numpy().astype(np.float16)
    (result,) = session(proto).run(None, {"x": given})
    assert result.dtype == (np.float32 if keep_io else np.float16)
    assert error(result, model(x).detach().double().numpy()) < HALF


@pytest.mark.parametrize("body", ["generic", "blocked"])
def test_openvino_computes_standard_files(exported, body, seed):
    openvino = pytest.importorskip("openvino", reason="needs openvino")
    model, files = exported
    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32"}  # Where the machine has bfloat16 it computes in that otherwise.
    compiled = core.compile_model(core.read_model(files[body, True]), "CPU", options)
    x = torch.randn(2, 8, 9, 16)
    assert error(compiled([x.numpy()])[0], model(x).detach().double().numpy()) < 1e-5


def test_tvm_imports_standard_files(seed, tmp_path):
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    model, x = Two().eval(), torch.randn(2, 8, 9, 16)
    program = export(model, (x,), tmp_path / "standard.onnx", body="blocked", standard=True, input_names=["x"])
    module = from_onnx(program.model_proto, keep_params_in_input=False)
    machine = relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())
    result = machine["main"](tvm.runtime.tensor(x.numpy()))
    result = result if hasattr(result, "numpy") else result[0]
    assert error(result.numpy(), model(x).detach().double().numpy()) < 1e-5


def test_lse_stays_where_it_is_read(seed):
    class Reads(nn.Module):
        def forward(self, x):
            output, lse = na2d(x, x, x, 3, return_lse=True)
            return na2d(output, x, x, 3), lse

    x = torch.randn(1, 6, 7, 2, 8)
    proto = export(Reads(), (x,), input_names=["x"]).model_proto
    assert [len(node.output) for node in proto.graph.node if node.domain == DOMAIN] == [2, 2]
    wanted = [tensor.numpy() for tensor in Reads()(x)]
    for each in (proto, ir.serde.serialize_model(inline_bodies(ir.serde.deserialize_model(proto)))):
        for result, expected in zip(session(each).run(None, {"x": x.numpy()}), wanted, strict=True):
            assert error(result, expected) < 1e-5


def test_bodies_in_the_place_of_nodes_in_any_model(seed):
    """With additional keys and lse, and a layout that is dynamic."""
    problem = Problem((8, 9), 2, 8, 3, additional_kv=True)
    proto = ir.serde.serialize_model(inline_bodies(ir.serde.deserialize_model(one_node(problem, body=None))))
    onnx.checker.check_model(proto, full_check=True)
    assert {node.domain for node in proto.graph.node} == {""}
    tensors = [torch.randn(1, 6, 11, 2, 8) for _ in range(3)] + [torch.randn(1, 5, 2, 8) for _ in range(2)]
    names = [value.name for value in proto.graph.input]
    output, lse = session(proto).run(None, {n: t.numpy() for n, t in zip(names, tensors, strict=True)})
    exact = [tensor.double() for tensor in tensors]
    expected = neighborhood_attention(*exact[:3], 3, 1, 1, False, None, *exact[3:])
    assert error(output, expected[0].numpy()) < 1e-5
    assert error(lse, expected[1].numpy()) < 1e-5


def test_export_leaves_every_module_in_its_mode():
    model = Two().train()
    model.layers[1].eval()  # Frozen.
    before = {name: module.training for name, module in model.named_modules()}
    export(model, (torch.randn(1, 8, 9, 16),))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert set(before.values()) == {True, False}


def test_the_command_line_writes_standard_files(exported, tmp_path, capsys, seed):
    from na_compiler import cli

    model, files = exported
    given, made = str(files["generic", False]), str(tmp_path / "standard.onnx")
    assert cli.main(["standard-onnx", given, "-o", made, "--body", "blocked"]) == 0
    assert "2 of our operators" in " ".join(capsys.readouterr().out.split())
    proto, x = onnx.load(made), torch.randn(2, 8, 9, 16)
    assert {node.domain for node in proto.graph.node} == {""}
    assert error(session(proto).run(None, {"x": x.numpy()})[0], model(x).detach().double().numpy()) < 1e-5
    assert cli.main(["standard-onnx", given, "-o", given]) == 1
