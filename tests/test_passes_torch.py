"""Copies in front of a kernel, calls of a kernel by its key, and `torch.compile` with the passes as its backend."""

import copy

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch_graphs import Encoder, close, targets

import na_compiler
from na_compiler import NeighborhoodAttention1D, NeighborhoodAttention2D, passes
from na_compiler.passes.masks import axis_mask
from na_compiler.passes.views import copies


def test_copies_go_where_only_attention_reads_them(seed):
    class Copies(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(32, 96)

        def forward(self, x):
            query, key, value = self.qkv(x).reshape(*x.shape[:-1], 3, 2, 16).permute(3, 0, 1, 2, 4, 5).unbind()
            query, key = query.contiguous(), key.contiguous()
            output = na_compiler.na2d(query, key, value.clone(), 3)
            return output + key  # The copy of key has another reader.

    model, x = Copies().eval(), torch.randn(1, 6, 7, 32)
    expected = model(x)
    program = torch.export.export(model, (x,))
    assert len(copies(program.graph_module)) == 3
    assert passes.canonicalise(program) == 3
    assert copies(program.graph_module) == []
    assert sum("contiguous" in str(target) for target in targets(program)) == 1
    close(program.module()(x), expected)


def test_a_copy_that_gives_rows_their_stride_stays(seed):
    class Turned(nn.Module):
        def forward(self, x):
            rows = x.transpose(-1, -2).contiguous()
            return na_compiler.na1d(rows, rows, rows, 3)

    x = torch.randn(1, 9, 16, 2)
    program = torch.export.export(Turned(), (x,))
    assert passes.canonicalise(program) == 0
    close(program.module()(x), Turned()(x))


def test_graphs_that_write_keep_their_copies(seed):
    def function(x):
        kept = x.clone()
        x.mul_(2.0)
        return na_compiler.na1d(kept, kept, kept, 3) + x

    found = []

    def backend(module, inputs):
        found.append(passes.canonicalise(module))
        return module.forward

    x = torch.randn(1, 9, 2, 16)
    close(torch.compile(function, backend=backend)(x.clone()), function(x.clone()))
    assert found == [0]


def test_bind_calls_a_kernel_by_key_or_fails(seed, tmp_path, monkeypatch):
    model, x = NeighborhoodAttention1D(32, 2, 5).eval(), torch.randn(2, 11, 32)
    expected = model(x)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("B", max=8)},))
    assert passes.bind(program) == 1
    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path / "empty"))
    with pytest.raises(KeyError, match=r"no kernel [0-9a-f]{32} in a loaded bundle or the cache"):
        program.module()(x)
    passes.compile(torch.export.export(model, (x,)))
    close(program.module()(x), expected)
    torch.export.save(program, tmp_path / "bound.pt2")
    close(torch.export.load(tmp_path / "bound.pt2").module()(x[:1]), expected[:1])
    from na_compiler.passes.bind_torch import unbind

    assert unbind(program) == 1
    close(program.module()(x), expected)
    dynamic = torch.export.export(model, (x,), dynamic_shapes=({1: Dim("X", min=5, max=64)},))
    with pytest.raises(ValueError, match=r"cannot be bound: its layout\[0\] is dynamic"):
        passes.bind(dynamic)


def test_backend_compiles_before_the_first_call(seed, tmp_path, monkeypatch):
    from na_compiler.compiler import cache

    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path))
    torch._dynamo.reset()
    model = Encoder()
    x = torch.randn(1, 8, 9, 32)
    trained = copy.deepcopy(model)
    with torch.no_grad():
        compiled = torch.compile(model.eval(), backend="na_compiler", fullgraph=True)
        close(compiled(x), model(x))
    assert [entry.info.direction for entry in cache.entries()] == ["forward"] * 2
    torch.compile(trained.train(), backend="na_compiler", fullgraph=True)(x).square().sum().backward()
    assert sorted(entry.info.direction for entry in cache.entries()) == ["backward"] * 2 + ["forward"] * 2
    model(x).square().sum().backward()
    for mine, wanted in zip(trained.parameters(), model.parameters(), strict=True):
        close(mine.grad, wanted.grad)


def test_backend_takes_a_buffer_for_constant_until_it_changes(seed, caplog):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.from_numpy(axis_mask(20, 5)))

        def forward(self, query):
            return nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=self.mask)

    torch._dynamo.reset()
    model, query = Masked(), torch.randn(1, 2, 20, 16)
    compiled = torch.compile(model, backend="na_compiler", fullgraph=True)
    with torch.no_grad(), caplog.at_level("INFO", logger="na_compiler"):
        close(compiled(query), model(query))
        assert "1 neighborhood attentions" in caplog.text
        model.mask[3, 9] = True
        close(compiled(query), model(query))
        assert "a mask that was a neighborhood has changed" in caplog.text
        model.mask[3, 9] = False
        caplog.clear()
        close(compiled(query), model(query))
        model.mask = torch.from_numpy(axis_mask(20, 7))
        close(compiled(query), model(query))


def test_a_mask_that_was_taken_as_constant_is_kept_on_the_host():
    """What is allocated on a device during a user's call may belong to a CUDA graph."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from na_compiler.passes.backend import _Constant

    with FakeTensorMode():
        kept = _Constant(0, torch.empty(4, 4, dtype=torch.bool, device="cuda"))
    assert kept.value.device.type == "cpu"


def test_inductor_copies_nothing_in_front_of_a_kernel(seed):
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    model, x = NeighborhoodAttention2D(32, 2, 3).eval(), torch.randn(1, 8, 9, 32)
    with torch.no_grad():
        result, (code,) = run_and_get_code(torch.compile(model, backend="na_compiler", fullgraph=True), x)
    close(result, model(x))
    body = code[code.index("def call(") :]
    before = body[: body.index("na_compiler.na2d")]
    assert "addmm" in before
    # A copy would be a kernel of Inductor's own, or a clone, between the projection and the call.
    assert "cpp_fused" not in before
    assert "copy" not in before
    assert "clone" not in before


def test_layers_of_different_scales_compiled_one_after_the_other(seed):
    torch._dynamo.reset()
    for heads in (1, 2, 4):
        layer, x = NeighborhoodAttention1D(32, heads, 5).eval(), torch.randn(1, 11, 32)
        with torch.no_grad():
            close(torch.compile(layer, fullgraph=True, backend="na_compiler")(x), layer(x))
