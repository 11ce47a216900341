"""The passes over ONNX models."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

pytest.importorskip("onnxscript", reason="needs the extra onnx")

import onnxruntime

import na_compiler.onnx
from na_compiler import NeighborhoodAttention2D, Problem, passes
from na_compiler.passes.masks import axis_mask

BATCH = {0: Dim("B", min=1, max=64)}


def run(program, x):
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([NeighborhoodAttention2D(32, 2, 3, dilation=d) for d in (1, 2, 1)])

    def forward(self, image):
        x = image.permute(0, 2, 3, 1)
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_collect_finds_each_layer_with_its_problem(tmp_path):
    x = torch.randn(2, 32, 8, 9)
    model = na_compiler.onnx.export(Encoder().eval(), (x,), dynamic_shapes=(BATCH,)).model
    sites = passes.collect(model)
    assert [site.layer for site in sites] == ["layers.0", "layers.1", "layers.2"]
    assert all(site.dynamic == ("batch",) and site.is_ours for site in sites)
    near, far = Problem((8, 9), 2, 16, 3), Problem((8, 9), 2, 16, 3, dilation=2)
    assert {problem: len(found) for problem, found in sites.problems().items()} == {near: 2, far: 1}


def test_collect_at_other_resolutions():
    x = torch.randn(2, 32, 8, 9)
    dims = {0: Dim("B", min=1, max=64), 2: Dim("X", min=6, max=64), 3: Dim("Y", min=6, max=64)}
    model = na_compiler.onnx.export(Encoder().eval(), (x,), dynamic_shapes=(dims,)).model
    sites = passes.collect(model)
    assert [site.problem for site in sites] == [None] * 3
    assert sites[0].dynamic == ("batch", "layout[0]", "layout[1]")
    sites = passes.collect(model, [{"image": (1, 32, 12, 16)}, {"image": (4, 32, 20, 7)}])
    assert {site.problem.layout for site in sites} == {(12, 16), (20, 7)}
    with pytest.raises(ValueError, match="dimension 1 of input image is 32 in this model, got 3"):
        passes.collect(model, [{"image": (1, 3, 12, 16)}])
    with pytest.raises(ValueError, match="no input 'x'; its inputs are image"):
        passes.collect(model, [{"x": (1, 32, 12, 16)}])


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("kind", ["bool", "float", "lowest", "bfloat16", "broken"])
def test_masked_attention_becomes_neighborhood_attention(kind, opset, seed):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(32, 96)
            mask = torch.from_numpy(np.kron(axis_mask(6, 5), axis_mask(10, 3, dilation=2)))
            if kind == "broken":
                mask[7, 30] ^= True
            if kind in {"float", "lowest"}:
                hidden = -torch.inf if kind == "float" else torch.finfo(torch.float32).min
                mask = torch.zeros(60, 60).masked_fill(~mask, hidden)
            if kind == "bfloat16":
                mask = torch.zeros(60, 60).masked_fill(~mask, torch.finfo(torch.bfloat16).min).bfloat16()
            self.register_buffer("mask", mask)

        def forward(self, x):
            query, key, value = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind()
            y = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=self.mask, scale=0.3)
            return y.transpose(1, 2).flatten(-2)

    model, x = Masked().eval(), torch.randn(2, 60, 32)
    if kind == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    program = torch.onnx.export(model, (x,), dynamo=True, opset_version=opset, dynamic_shapes=(BATCH,), verbose=False)
    changed = passes.canonicalise(program.model)
    sites = passes.collect(program.model)
    if kind == "broken":
        assert (changed, sites) == (0, ())
        return
    assert changed == 1
    dtype = "bfloat16" if kind == "bfloat16" else "float32"
    assert [site.problem for site in sites] == [Problem((6, 10), 2, 16, (5, 3), dilation=(1, 2), dtype=dtype)]
    assert not {"Softmax", "Attention", "MatMul_1"} & {node.op_type for node in program.model.graph}
    if kind == "bfloat16":
        return  # ONNX Runtime has no products of bfloat16 on a CPU.
    for rows in (x, x[:1]):
        np.testing.assert_allclose(run(program, rows), model(rows).detach().numpy(), rtol=1e-4, atol=1e-5)
