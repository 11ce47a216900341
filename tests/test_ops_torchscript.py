"""`na_compiler.ops.torchscript`: what is older than torch.export, as users call it."""

import copy
import importlib.util
import io
import warnings

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import na_compiler
import na_compiler.onnx
from na_compiler import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    fvcore_handles,
    na2d,
)
from na_compiler.problem import Problem

pytestmark = pytest.mark.filterwarnings("ignore")
LAYERS = [
    (lambda: NeighborhoodAttention1D(16, 2, 3, dilation=2), (9, 16)),
    (lambda: NeighborhoodAttention2D(16, 2, (3, 4), (1, 2), is_causal=(True, False), proj_drop=0.5), (7, 6, 16)),
    (lambda: NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True), (7, 6, 16)),
    (lambda: NeighborhoodAttention3D(16, 2, (3, 1, 2), qkv_bias=False, qk_scale=0.5), (4, 5, 3, 16)),
]


class Attend(nn.Module):
    def forward(self, x):
        return na2d(x, x, 2 * x, (3, 4), is_causal=(True, False))


class Sizes(nn.Module):
    """Asks tensors for their sizes, which are tensors themselves while torch.jit.trace records."""

    def forward(self, x, keys, values):
        return na2d(
            x, x, 2 * x, (min(7, x.shape[1]), 3), scale=0.5 * x.shape[-1] ** -0.5, additional_keys=keys,
            additional_values=values, return_lse=True,
        )  # fmt: skip


def results(model, inputs):
    found = model(*inputs)
    return found if isinstance(found, tuple) else (found,)


class TestTrace:
    def test_operators(self, seed):
        traced = torch.jit.trace(Attend(), torch.randn(1, 6, 9, 2, 8))
        x = torch.randn(3, 6, 9, 2, 8)
        assert torch.equal(traced(x), Attend()(x))
        # What counters of operations look for.
        kinds = [node.kind() for node in traced.inlined_graph.nodes()]
        assert kinds.count("na_compiler::na2d") == 1

    def test_sizes_are_numbers(self, seed):
        inputs = (torch.randn(1, 6, 9, 2, 8), torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2, 8))
        traced = torch.jit.trace(Sizes(), inputs)
        for one, other in zip(traced(*inputs), Sizes()(*inputs), strict=True):
            assert torch.equal(one, other)

    def test_the_default_scale_is_no_reason_for_a_warning(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error", torch.jit.TracerWarning)
            torch.jit.trace(Attend(), torch.randn(1, 6, 9, 2, 8))


class TestScript:
    @pytest.mark.parametrize(("make", "shape"), LAYERS)
    def test_layers(self, make, shape, seed):
        model = nn.Sequential(make(), nn.Linear(16, 3)).eval()
        scripted = torch.jit.script(copy.deepcopy(model))
        assert scripted.state_dict().keys() == model.state_dict().keys()
        file = io.BytesIO()
        torch.jit.save(scripted, file)
        file.seek(0)
        x = torch.randn(2, *shape)
        for one in (scripted, torch.jit.load(file)):
            assert torch.equal(one(x), model(x))
            for result in (one(x), model(x)):
                result.square().sum().backward()
            for name, parameter in one.named_parameters():
                assert torch.equal(parameter.grad, model.get_parameter(name).grad), name
            model.zero_grad()

    def test_dropout_and_refusals(self, seed):
        scripted = torch.jit.script(LAYERS[1][0]())
        x = torch.randn(2, 7, 6, 16)
        assert scripted.training
        assert not torch.equal(scripted(x), scripted(x))
        for wrong in (x[0], x[..., 1:]):
            with pytest.raises(torch.jit.Error, match=r"the input must be \[batch, \*layout, 16\]"):
                scripted(wrong)

    def test_functions_say_what_to_do(self):
        def attend(x):
            return na2d(x, x, x, 3)

        for function in (attend, na2d):
            with pytest.raises(RuntimeError, match=r"na2d cannot be scripted: call torch.ops.na_compiler.na2d"):
                torch.jit.script(function)

    def test_the_operator_that_is_named_works(self, seed):
        def attend(x):
            return torch.ops.na_compiler.na2d(x, x, x, [3, 3], [1, 1], [1, 1], [0, 0], 0.5)[0]

        x = torch.randn(1, 6, 9, 2, 8)
        assert torch.equal(torch.jit.script(attend)(x), na2d(x, x, x, 3, scale=0.5))


def exported(model, inputs, dynamic=None, **options):
    """What `torch.onnx.export` made before it was made of torch.export, with its defaults."""
    file = io.BytesIO()
    names = ["x", "keys", "values"][: len(inputs)]
    torch.onnx.export(model, inputs, file, dynamo=False, input_names=names, dynamic_axes=dynamic, **options)
    proto = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(proto, full_check=True)
    return proto


def session_of(proto, folder):
    """With our library: the model has no bodies."""
    na_compiler.save_bundle(folder, map(na_compiler.KernelSpec.make, na_compiler.onnx.problems(proto)))
    options = onnxruntime.SessionOptions()
    na_compiler.onnx.register(options, folder)
    return onnxruntime.InferenceSession(proto.SerializeToString(), options)


class TestExporterBefore:
    """`torch.onnx.export(..., dynamo=False)`."""

    @pytest.mark.parametrize("opset", [None, 13])
    @pytest.mark.parametrize("name", ["plain", "sizes", "scripted", "biased"])
    def test_runs(self, name, opset, tmp_path, seed):
        inputs = (torch.randn(1, 6, 9, 2, 8), torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2, 8))
        model = {"plain": Attend(), "sizes": Sizes()}.get(name)
        if name == "scripted":
            layer = nn.Sequential(NeighborhoodAttention2D(16, 2, 3)).eval()
            model, inputs = torch.jit.script(layer), (torch.randn(1, 6, 9, 16),)
        if name == "biased":
            model, inputs = NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True).eval(), (torch.randn(1, 6, 9, 16),)
        inputs = inputs if name == "sizes" else inputs[:1]
        proto = exported(model, inputs, opset_version=opset)
        (node,) = [node for node in proto.graph.node if node.domain]
        assert (node.domain, node.op_type) == ("na_compiler", "NA2D")
        session = session_of(proto, tmp_path / "bundle")
        fed = {one.name: tensor.numpy() for one, tensor in zip(session.get_inputs(), inputs, strict=True)}
        for result, expected in zip(session.run(None, fed), results(model, inputs), strict=True):
            np.testing.assert_allclose(result, expected.detach().numpy(), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("with_bodies", [True, False])
    def test_a_dynamic_batch(self, with_bodies, tmp_path, seed):
        """Shapes are those of the example while it exports, and inference has to follow what it computes of them."""
        model = nn.Sequential(NeighborhoodAttention2D(16, 2, 3), NeighborhoodAttention2D(16, 4, 5)).eval()
        proto = exported(model, (torch.randn(2, 6, 9, 16),), {"x": {0: "batch"}})
        if with_bodies:
            loaded = ir.from_proto(proto)
            na_compiler.onnx.add_bodies(loaded, "blocked")
            assert len(loaded.functions) == 3, "one for each fixed layout and window, and the generic one"
            session = onnxruntime.InferenceSession(ir.to_proto(loaded).SerializeToString())
        else:
            session = session_of(proto, tmp_path / "bundle")
        for batch in (2, 3):
            x = torch.randn(batch, 6, 9, 16)
            (output,) = session.run(None, {"x": x.numpy()})
            np.testing.assert_allclose(output, model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


class TestFvcore:
    def test_handles(self, seed):
        """Of the graph that fvcore makes them count: a trace."""
        x, keys = torch.randn(2, 6, 9, 2, 8), torch.randn(2, 3, 2, 8)
        graph = torch.jit.trace(Sizes(), (x, keys, keys)).inlined_graph
        (node,) = [node for node in graph.nodes() if node.kind() == "na_compiler::na2d"]
        counted = fvcore_handles()[node.kind()](list(node.inputs()), list(node.outputs()))
        assert counted == Problem((6, 9), 2, 8, (6, 3)).flops(2, additional=3) // 2

    @pytest.mark.skipif(importlib.util.find_spec("fvcore") is None, reason="fvcore is not installed")
    @pytest.mark.parametrize(("make", "shape"), LAYERS)
    def test_the_counter(self, make, shape, seed):
        from fvcore.nn import FlopCountAnalysis

        model, x = nn.Sequential(make(), nn.Linear(16, 3)), torch.randn(2, *shape)
        counted = FlopCountAnalysis(model, x).set_op_handle(**fvcore_handles())
        with FlopCounterMode(display=False) as expected:
            model(x)
        assert 2 * counted.total() == expected.get_total_flops()
        assert not counted.unsupported_ops()
