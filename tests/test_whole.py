"""`na_compiler.whole`: linear layers, activations and norms by our schedules, and what cannot be compiled whole."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional

from na_compiler import NeighborhoodAttention1D, NeighborhoodAttention2D, Problem
from na_compiler.passes.load import load_whole_model
from na_compiler.runtime.whole import load_whole
from na_compiler.target import Target
from na_compiler.whole import compile_whole


@pytest.mark.parametrize("target", ["llvm:x86-64", "llvm:x86-64-v3", "llvm:x86-64-v4"])
def test_linear_layers_of_any_size(target, seed):
    import tvm

    from na_compiler.whole.dense import dense, pack

    parsed = Target.parse(target)
    if not parsed.runs_here:
        pytest.skip(f"this machine does not run {target}")
    for has_bias in (True, False):
        inputs, outputs = random.choice([1, 3, 17, 48]), random.choice([1, 7, 33, 64, 96])
        function = tvm.compile(dense(inputs, outputs, parsed, has_bias=has_bias), target=parsed.to_tvm())["main"]
        weight, bias = torch.randn(outputs, inputs), torch.randn(outputs) if has_bias else None
        packed = torch.from_numpy(pack(weight.numpy(), parsed))
        for rows in (1, 5, 6, 13, 14, 15, 200):
            x, output = torch.randn(rows, inputs), torch.full((rows, outputs), torch.nan)
            function(x, packed, *([bias] if has_bias else []), output)
            expected = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
            assert ((output - expected).norm() / expected.norm()).item() < 1e-5


class Functions(nn.Module):
    """Everything that has a form of its own, behind one attention."""

    def __init__(self):
        super().__init__()
        self.attn = NeighborhoodAttention1D(32, 2, 3)
        self.norms = nn.ModuleList([nn.LayerNorm(32), nn.LayerNorm(32, elementwise_affine=False), nn.LayerNorm(20)])
        self.narrow = nn.Linear(32, 20, bias=False)

    def forward(self, x):
        y = self.attn(x)
        y = torch.stack([functional.gelu(4 * y), functional.gelu(4 * y, approximate="tanh"), functional.silu(9 * y)])
        y = torch.cat([y, torch.sigmoid(20 * y), torch.tanh(9 * y), torch.erf(3 * y), torch.tanh(y * 1e-4) * 1e4])
        y = self.norms[1](self.norms[0](y) + y)
        return self.norms[2](self.narrow(y)), y.softmax(-1), y.square().mean(-1)


def test_activations_and_norms(tmp_path, seed):
    model, x = Functions().eval(), torch.randn(2, 9, 32)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("B", min=1, max=8)},))
        compile_whole(program, tmp_path / "model.so")
        whole = load_whole(tmp_path / "model.so")
        for batch in (1, 2, 5):
            x = torch.randn(batch, 9, 32)
            for result, expected in zip(map(torch.from_dlpack, whole(x)), model(x), strict=True):
                assert ((result - expected).norm() / expected.norm()).item() < 1e-5


class Limits(nn.Module):
    """What must not make a number of NaN."""

    def __init__(self):
        super().__init__()
        self.attn = NeighborhoodAttention1D(16, 2, 3)

    def forward(self, x):
        y = x + 0 * self.attn(torch.ones_like(x))
        functions = (torch.relu, torch.tanh, torch.sigmoid, torch.erf, functional.relu6, functional.silu)
        first = [*(function(y) for function in functions), functional.gelu(y, approximate="tanh"), y.clamp(-1, 2)]
        pairs = [torch.maximum(y, y.roll(1, -1)), torch.minimum(y, y.roll(1, -1))]
        return torch.stack([*first, *pairs]), y.softmax(-1), functional.layer_norm(y, (16,))


def test_not_finite_where_pytorch_is(tmp_path, seed):
    model, x = Limits().eval(), 3 * torch.randn(4, 9, 16)
    x[0, 3, 5], x[1, 4, 2], x[2, 0, 7] = math.nan, math.inf, -math.inf
    with torch.no_grad():
        compile_whole(torch.export.export(model, (x,)), tmp_path / "model.so")
        for result, expected in zip(
            map(torch.from_dlpack, load_whole(tmp_path / "model.so")(x)), model(x), strict=True
        ):
            torch.testing.assert_close(result, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


# Operators that compare, or might make a number of NaN: what torch returns for NaN and infinities.
ORDERS = {
    "max": lambda x: x.max(),
    "min": lambda x: x.min(),
    "max of an axis": lambda x: x.max(1)[0],
    "argmax": lambda x: x.argmax(-1),
    "argmin": lambda x: x.argmin(1),
    "max_pool1d": lambda x: functional.max_pool1d(x, 2),
    "max_pool2d": lambda x: functional.max_pool2d(x[:, None], 3, 2, 1, ceil_mode=True),
    "max_pool3d": lambda x: functional.max_pool3d(x[None, None], 2),
    "sort": lambda x: x.sort(-1)[0],
    "sort, descending": lambda x: x.sort(1, descending=True)[0],
    "argsort": lambda x: x.argsort(-1),
    "topk": lambda x: x.topk(3, -1)[0],
    "topk, the least": lambda x: x.topk(3, -1, largest=False)[0],
    "places of topk": lambda x: x.topk(3, -1)[1],
    "bucketize": lambda x: torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0])),
    "ne": lambda x: x != x.roll(1, -1),
    "ne, itself": lambda x: x != x,  # noqa: PLR0124
    "eq": lambda x: x == x.roll(1, -1),
    "lt": lambda x: x < x.roll(1, -1),
    "ge": lambda x: x >= x.roll(1, -1),
    "isnan": torch.isnan,
    "where": lambda x: torch.where(x > 0, x, 2 * x),
    "masked_fill": lambda x: x.masked_fill(x > 0, 1.0),
    "clamp_min": lambda x: x.clamp_min(0.1),
    "clamp_max": lambda x: x.clamp_max(0.1),
    "hardtanh": functional.hardtanh,
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
    "leaky_relu": functional.leaky_relu,
    "prelu": lambda x: functional.prelu(x, torch.full((1,), 0.2)),
    "elu": lambda x: functional.elu(x, 0.7),
    "selu": functional.selu,
    "celu": lambda x: functional.celu(x, 0.7),
    "softplus": functional.softplus,
    "sign": torch.sign,
    "round": torch.round,
    "sum": lambda x: x.sum(-1),
    "mean": lambda x: x.mean(1),
    "cumsum": lambda x: x.cumsum(-1),
    "var": lambda x: x.var(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
}


class Orders(nn.Module):
    """All of them, behind attention."""

    def __init__(self):
        super().__init__()
        self.attn = NeighborhoodAttention1D(16, 2, 3)

    def forward(self, x):
        return (self.attn(torch.ones_like(x)), *(function(x) for function in ORDERS.values()))


def test_orders_with_numbers_that_are_not_finite(tmp_path, seed):
    model, x = Orders().eval(), 3 * torch.randn(4, 8, 16)
    x[0, 3, 5], x[1, 4, 2], x[2, 0, 7], x[2, 0, 9], x[3, 1, 15] = math.nan, math.inf, -math.inf, math.nan, -math.nan
    with torch.no_grad():
        compile_whole(torch.export.export(model, (x,)), tmp_path / "model.so")
        results = list(map(torch.from_dlpack, load_whole(tmp_path / "model.so")(x)))[1:]
    wrong = []
    for name, result in zip(ORDERS, results, strict=True):
        expected = ORDERS[name](x)
        if not torch.allclose(result.double(), expected.double(), rtol=1e-5, atol=1e-5, equal_nan=True):
            wrong.append(name)
    assert not wrong


def test_a_median_is_refused(seed):
    """TVM's code for it ends the process."""

    class Median(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = NeighborhoodAttention1D(16, 2, 3)

        def forward(self, x):
            return self.attn(x).median(-1)[0]

    program = torch.export.export(Median().eval(), (torch.randn(1, 8, 16),))
    with pytest.raises(RuntimeError, match=r"median.dim cannot be compiled.*sort would do"):
        compile_whole(program, "model.so")


def test_attention_is_the_scheduled_function_and_linear_layers_are_ours(seed):
    """Of the default lowering there would be functions of those names."""
    from na_compiler.whole.attention import Attention
    from na_compiler.whole.frontend import from_program
    from na_compiler.whole.linear import schedule_linear

    target = Target.parse("llvm")
    model = nn.Sequential(NeighborhoodAttention2D(32, 2, 3), NeighborhoodAttention2D(32, 2, 3)).eval()
    attention = Attention(target)
    module = from_program(torch.export.export(model, (torch.randn(1, 9, 9, 32),)), attention)
    assert attention.problems == {Problem((9, 9), 2, 16, 3): 2}
    module, count = schedule_linear(module, target)
    assert count == 4
    names = [variable.name_hint for variable in module.get_global_vars()]
    assert sorted(names) == ["linear_32_32_bias", "linear_32_96_bias", "main", "na2d"]
    text = module["main"].script()
    assert "R.matmul" not in text
    assert text.count("R.call_tir") == 6


@pytest.mark.parametrize("kind", ["program", "onnx_ir", "proto", "external"])
def test_masked_attention_becomes_neighborhood_attention_here_too(kind, tmp_path, seed):
    from na_compiler.passes.masks import axis_mask

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(32, 96)
            self.register_buffer("mask", torch.from_numpy(np.kron(axis_mask(6, 5), axis_mask(10, 3))))

        def forward(self, x):
            query, key, value = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind()
            y = functional.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)
            return y.transpose(1, 2).flatten(-2)

    model, x = Masked().eval(), torch.randn(2, 60, 32)
    with torch.no_grad():
        if kind == "program":
            exported = torch.export.export(model, (x,))
        else:
            program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
            exported = program.model_proto if kind == "proto" else program.model
        if kind == "external":
            program.save(tmp_path / "model.onnx", external_data=True)
            assert (tmp_path / "model.onnx.data").is_file()
            exported = load_whole_model(str(tmp_path / "model.onnx"))
        assert compile_whole(exported, tmp_path / "model.so") == {Problem((6, 10), 2, 16, (5, 3)): 1}
        torch.testing.assert_close(
            torch.from_dlpack(load_whole(tmp_path / "model.so")(x)), model(x), rtol=1e-4, atol=1e-5
        )


def test_what_cannot_be_compiled_whole(tmp_path, seed):
    x = torch.randn(1, 9, 32)
    layer = NeighborhoodAttention1D(32, 2, 3).eval()
    program = torch.export.export(layer, (x,))
    for target, told in (("cuda:sm_90a", "got target cuda:sm_90a"), ("llvm:aarch64", "got target llvm:aarch64")):
        with pytest.raises(ValueError, match=told):
            compile_whole(program, tmp_path / "model.so", target)
    with pytest.raises(TypeError, match=r"model must be a torch\.export.* got NeighborhoodAttention1D"):
        compile_whole(layer, tmp_path / "model.so")
    with pytest.raises(ValueError, match="has no neighborhood attention in it"):
        compile_whole(torch.export.export(nn.Linear(32, 3), (x,)), tmp_path / "model.so")
    dynamic = torch.export.export(layer, (x,), dynamic_shapes=({1: Dim("X", min=3, max=64)},))
    with pytest.raises(ValueError, match="export the model with a fixed layout"):
        compile_whole(dynamic, tmp_path / "model.so")
    with pytest.raises(FileNotFoundError, match="no file"):
        load_whole(tmp_path / "model.so")
    assert list(tmp_path.iterdir()) == []
