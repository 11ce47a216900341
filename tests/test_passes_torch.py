"""The passes over exported programs and FX graphs: what they find, and that what they make computes the same."""

import copy
import importlib
import operator
import os

import natten_stub
import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.export import Dim

import na_compiler
from na_compiler import NeighborhoodAttention1D, NeighborhoodAttention2D, Problem, passes
from na_compiler.passes.canonicalise_torch import Canonicalise
from na_compiler.passes.masks import axis_mask
from na_compiler.passes.views import copies
from na_compiler.reference import neighborhood_attention

OURS = list(na_compiler.ops.operators.OPERATORS.values())


def close(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def targets(program):
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


class Encoder(nn.Module):
    """Layers of two problems, one of them twice."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([NeighborhoodAttention2D(32, 2, 3, dilation=d) for d in (1, 2, 1)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_collect_finds_each_layer_with_its_problem():
    program = torch.export.export(Encoder().eval(), (torch.randn(2, 8, 9, 32),), dynamic_shapes=({0: Dim("B", max=8)},))
    sites = passes.collect(program)
    assert [site.layer for site in sites] == ["layers.0", "layers.1", "layers.2"]
    assert all(site.dynamic == ("batch",) and site.batch == 2 and site.is_ours for site in sites)
    near, far = Problem((8, 9), 2, 16, 3), Problem((8, 9), 2, 16, 3, dilation=2)
    assert {problem: len(found) for problem, found in sites.problems().items()} == {near: 2, far: 1}
    specs = sites.specs(["llvm:x86-64-v3", "llvm:x86-64-v4"], training=True)
    assert len(specs) == len(set(specs)) == 8


def test_collect_at_other_resolutions():
    dims = {1: 4 * Dim("X", min=2, max=20), 2: Dim("Y", min=6, max=64)}
    program = torch.export.export(Encoder().eval(), (torch.randn(1, 8, 9, 32),), dynamic_shapes=(dims,))
    assert {site.problem.layout for site in passes.collect(program)} == {(8, 9)}
    sites = passes.collect(program, [{"x": (1, 16, 12, 32)}, {"x": (1, 40, 7, 32)}])
    assert {site.problem.layout for site in sites} == {(16, 12), (40, 7)}
    assert sites[0].dynamic == ("layout[0]", "layout[1]")
    with pytest.raises(ValueError, match=r"dimension 1 of input x .*4\*.*got 10"):
        passes.collect(program, [{"x": (1, 10, 12, 32)}])
    with pytest.raises(ValueError, match="dimension 0 of input x is 1 in this model, got 3"):
        passes.collect(program, [{"x": (3, 8, 12, 32)}])
    with pytest.raises(ValueError, match="no input 'y'; its inputs are x"):
        passes.collect(program, [{"y": (1, 8, 12, 32)}])
    with pytest.raises(ValueError, match=r"layers.1: kernel_size \* dilation must be at most"):
        passes.collect(program, [{"x": (1, 4, 12, 32)}])


def test_collect_reads_gqa_additional_keys_and_the_backward(seed):
    class Text(nn.Module):
        def forward(self, query, key, value, more):
            return na_compiler.na1d(query, key, value, 5, is_causal=True, additional_keys=more, additional_values=more)

    tensors = (
        torch.randn(1, 12, 4, 16),
        torch.randn(1, 12, 2, 16),
        torch.randn(1, 12, 2, 16),
        torch.randn(1, 3, 2, 16),
    )
    (site,) = passes.collect(torch.export.export(Text(), tensors))
    problem = Problem(12, 4, 16, 5, is_causal=True, heads_kv=2, additional_kv=True)
    assert site.problem == problem

    def loss(query, key, value, more):
        return torch.autograd.grad(Text()(query, key, value, more).sum(), query)

    tensors = [tensor.requires_grad_() for tensor in tensors]
    joint = fx.experimental.proxy_tensor.make_fx(loss)(*tensors)
    found = passes.collect(joint)
    assert [(site.direction, site.problem) for site in found] == [("forward", problem), ("backward", problem)]


@pytest.mark.parametrize("kind", ["bool", "float", "computed"])
@pytest.mark.parametrize("rank", [1, 2])
def test_masked_attention_becomes_neighborhood_attention(kind, rank, seed):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(32, 96)
            axes = [axis_mask(6, 5), axis_mask(10, 3, dilation=2)] if rank == 2 else [axis_mask(60, 9, is_causal=True)]
            mask = torch.from_numpy(axes[0] if rank == 1 else np.kron(*axes))
            if kind == "float":
                mask = torch.zeros(60, 60).masked_fill(~mask, -torch.inf)
            self.register_buffer("mask", mask)

        def forward(self, x):
            query, key, value = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).contiguous().unbind()
            mask = self.mask
            if kind == "computed":
                mask = mask.logical_not().logical_not()
            y = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
            return y.transpose(1, 2).flatten(-2)

    model, x = Masked().eval(), torch.randn(2, 60, 32)
    expected = model(x)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("B", max=8)},))
    assert passes.canonicalise(program) == 2
    (site,) = passes.collect(program)
    wanted = Problem((6, 10), 2, 16, (5, 3), dilation=(1, 2)) if rank == 2 else Problem(60, 2, 16, 9, is_causal=True)
    assert site.problem == wanted
    assert copies(program.graph_module) == []
    assert not any("contiguous" in str(target) or "attention" in str(target) for target in targets(program))
    program.validate()
    close(program.module()(x), expected)


def test_attention_with_another_mask_is_left_alone(seed):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            mask = torch.from_numpy(axis_mask(20, 5))
            mask[3, 9] = True
            self.register_buffer("mask", mask)
            self.register_buffer("bias", torch.randn(20, 20))

        def forward(self, query, mask):
            attend = nn.functional.scaled_dot_product_attention
            masked = attend(query, query, query, attn_mask=self.mask) + attend(query, query, query, attn_mask=self.bias)
            return masked + attend(query, query, query, attn_mask=mask) + attend(query, query, query)

    query = torch.randn(1, 2, 20, 16)
    program = torch.export.export(Masked(), (query, torch.from_numpy(axis_mask(20, 5))))
    before = targets(program)
    assert passes.canonicalise(program) == 0
    assert targets(program) == before
    assert passes.collect(program) == ()


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


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convert_keeps_everything(rank, seed, monkeypatch):
    layer = natten_stub.install(monkeypatch)[rank]
    model = nn.Sequential(layer(32, 2, 3), nn.Linear(32, 32), layer(32, 2, (2,) * rank, (2,) * rank)).eval()
    model.append(model[0])  # Shared.
    weights = {name: id(weight) for name, weight in model.named_parameters()}
    called = []
    model[2].register_forward_hook(lambda *_: called.append(1))
    x = torch.randn(2, *(9, 6, 4)[:rank], 32)
    expected = model(x)
    called.clear()
    assert na_compiler.convert(model) is model
    assert {type(model[i]).__module__ for i in (0, 2)} == {"na_compiler.modules"}
    assert model[0] is model[3]
    assert {name: id(weight) for name, weight in model.named_parameters()} == weights
    assert not any(module.training for module in model.modules())
    close(model(x), expected)
    assert called == [1]
    alone = na_compiler.convert(layer(32, 2, 3))
    assert type(alone).__name__ == f"NeighborhoodAttention{rank}D"
    assert alone.kernel_size == (3,) * rank


def test_convert_refuses_what_ours_have_not(monkeypatch):
    layers = natten_stub.install(monkeypatch)
    model = nn.Sequential(layers[2](32, 2, 3), layers[2](32, 2, 3))
    model[1].attn_drop = nn.Dropout(0.1)
    with pytest.raises(NotImplementedError, match=r"1 has .*attn_drop"):
        na_compiler.convert(model)
    assert type(model[0]).__module__ == "natten.modules"

    class Own(layers[2]):
        def forward(self, x):
            return super().forward(x) + 1

    assert type(na_compiler.convert(nn.Sequential(Own(32, 2, 3)))[0]) is Own


def test_convert_keeps_a_bias_by_relative_position(seed, monkeypatch):
    """As the layers of NATTEN up to 0.17 have it; one of another shape is left alone."""
    layers = natten_stub.install(monkeypatch)
    model = nn.Sequential(layers[2](32, 2, 3), layers[2](32, 2, 3))
    model[0].rpb, model[1].rpb = nn.Parameter(torch.randn(2, 5, 5)), nn.Parameter(torch.randn(2, 3, 3))
    report = {}
    na_compiler.convert(model, report=report)
    assert report == {"0": "converted", "1": "rpb has shape (2, 3, 3), not (2, 5, 5)"}
    layer, x = model[0], torch.randn(1, 6, 7, 32)
    query, key, value = layer.qkv(x).unflatten(-1, (3, 2, 16)).unbind(-3)
    expected, _ = neighborhood_attention(query, key, value, 3, relative_position_bias=layer.rpb)
    close(layer(x), layer.proj(expected.flatten(-2)))
    assert "rpb" in dict(layer.named_parameters())


def test_nattens_modules_and_functions_in_an_fx_graph(seed, monkeypatch):
    layers = natten_stub.install(monkeypatch)

    graph = fx.Graph()
    x = graph.call_module("layer", (graph.placeholder("x"),))
    heads = graph.call_method("unflatten", (x, -1, (2, 16)))
    both = graph.call_function(layers[2].function, (heads, heads, heads), {"kernel_size": 5, "return_lse": True})
    output = graph.call_function(operator.getitem, (both, 0))
    lse = graph.call_method("unsqueeze", (graph.call_function(operator.getitem, (both, 1)), -1))
    alone = graph.call_function(layers[2].function, (output, output, output, 3))
    graph.output(graph.call_function(operator.mul, (alone, lse)))
    module = fx.GraphModule({"layer": layers[2](32, 2, 3)}, graph).eval()
    x = torch.randn(1, 8, 8, 32)
    expected = module(x)
    fx.passes.shape_prop.ShapeProp(module).propagate(x)
    sites = passes.collect(module)
    assert [site.operator for site in sites] == ["natten.functional.na2d"] * 2
    result = Canonicalise()(module)
    assert result.modified
    assert [node.target for node in module.graph.nodes if node.target in OURS] == [OURS[1]] * 2
    assert type(module.layer) is NeighborhoodAttention2D
    close(module(x), expected)


@pytest.mark.parametrize("namespace", ["natten", "_natten_0b1c2d3"])
def test_nattens_operators(namespace, seed):
    """Also under the name that a loader from a model hub gives them."""
    library = torch.library.Library(namespace, "FRAGMENT")
    natten_stub.register_operators(library, namespace)
    operators = getattr(torch.ops, namespace)

    class Model(nn.Module):
        def forward(self, q, k, v):
            parameters = ([3, 5], [1, 2], [2, 1], [False, True], 0.3)
            first = operators.na2d_forward(q, k, v, *parameters, [8, 8], [8, 8])[0]
            flat = [tensor.flatten(1, 2) for tensor in (first, k, v)]
            second, lse = operators.reference_na2d_forward(*flat, *parameters, [6, 8], 0)
            return second, lse

    tensors = torch.randn(3, 1, 6, 8, 2, 16).unbind()
    expected = Model()(*tensors)
    program = torch.export.export(Model(), tensors)
    problem = Problem((6, 8), 2, 16, (3, 5), (1, 2), (2, 1), (False, True))
    assert [(site.operator, site.problem) for site in passes.collect(program)] == [
        (f"{namespace}::na2d_forward", problem),
        (f"{namespace}::reference_na2d_forward", problem),
    ]
    assert passes.canonicalise(program) == 2
    assert [(site.operator, site.problem) for site in passes.collect(program)] == [("na_compiler::na2d", problem)] * 2
    program.validate()
    for result, wanted in zip(program.module()(*tensors), expected, strict=True):
        close(result, wanted)


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


def masked(mask, **options):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, query, key, value):
            return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=self.mask, **options)

    return Masked().eval()


def heads_first(*shapes, dtype=torch.float32):
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


LIKE = (2, 4, 20, 8)
# What has a neighborhood for a mask and is none of ours all the same: what it is called with, and what is said of it.
NOT_OURS = {
    "float64": (heads_first(LIKE, LIKE, LIKE, dtype=torch.float64), {}, "it is in float64"),
    "a value with batch 1": (heads_first(LIKE, LIKE, (1, 4, 20, 8)), {}, "one batch"),
    "a value with one head": (heads_first(LIKE, LIKE, (2, 1, 20, 8)), {}, "value are 4, 4 and 1"),
    "a query with one head": (heads_first((2, 1, 20, 8), LIKE, LIKE), {}, "value are 1, 4 and 4"),
    "dropout": (heads_first(LIKE, LIKE, LIKE), {"dropout_p": 1.0}, "dropout"),
    "long heads": (heads_first(*[(1, 1, 20, 9000)] * 3), {}, "head_dim is at most 8192 here, and it is 9000"),
    "a scale of infinity": (heads_first(LIKE, LIKE, LIKE), {"scale": float("inf")}, "scale is inf"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_OURS)
def test_what_is_not_ours_stays_as_it_was(kind, seed, caplog):
    tensors, options, said = NOT_OURS[kind]
    model = masked(torch.from_numpy(axis_mask(20, 5)), **options)
    expected = model(*tensors)
    program = torch.export.export(model, tensors)
    before = targets(program)
    with caplog.at_level("INFO", "na_compiler"):
        assert passes.canonicalise(program) == 0
    assert said in caplog.text
    assert "attention with a mask stays as it is" in caplog.text
    assert targets(program) == before
    assert passes.collect(program) == ()
    if kind not in {"float64", "a value with one head"}:
        return  # Inductor takes its seconds.
    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(model, backend="na_compiler", fullgraph=True)(*tensors)
    torch.testing.assert_close(result, expected)


def test_one_head_of_keys_and_values_for_all_is_ours(seed):
    tensors = heads_first(LIKE, (2, 1, 20, 8), (2, 1, 20, 8))
    model = masked(torch.from_numpy(axis_mask(20, 5)))
    program = torch.export.export(model, tensors)
    assert passes.canonicalise(program) == 1
    assert [site.problem for site in passes.collect(program)] == [Problem(20, 4, 8, 5, heads_kv=1)]
    close(program.module()(*tensors), model(*tensors))


def test_masks_that_are_random_or_written_are_no_constants(seed):
    band = torch.from_numpy(axis_mask(20, 5))

    def drawn(query):
        other = torch.rand(()) < 2.0  # Always, but only now.
        mask = torch.logical_and(torch.from_numpy(axis_mask(20, 5)), other)
        return nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)

    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", band.clone())

        def forward(self, query):
            self.mask.fill_(True)
            return nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=self.mask)

    query = torch.randn(LIKE)
    for model in (drawn, Written()):
        torch._dynamo.reset()
        found = []

        def backend(module, inputs, found=found):
            names = [node.name for node in module.graph.find_nodes(op="placeholder")]
            held = {name: value for name, value in zip(names, inputs, strict=True) if value.dtype is torch.bool}
            found.append(passes.canonicalise_torch.canonicalise_torch(module, held))
            return module.forward

        with torch.no_grad():
            close(torch.compile(model, backend=backend, fullgraph=True)(query), model(query))
        assert found == [0]


def test_reading_constants_looks_at_each_node_once():
    """Values that two others are computed from, many times over."""

    class Diamonds(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.from_numpy(axis_mask(20, 5)))

        def forward(self, query):
            mask = self.mask
            for _ in range(60):
                mask = mask.logical_not().logical_not() & mask
            return nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)

    program = torch.export.export(Diamonds(), (torch.randn(LIKE),))
    used = set()
    from na_compiler.passes.sdpa import replace_sdpa

    assert replace_sdpa(program, {"none": torch.ones(1)}, used) == 1


class Branches(nn.Module):
    """Two branches whose nodes have the same names, and copies in one that writes."""

    def forward(self, flag, query):
        def near(query):
            return na_compiler.na1d(query, query, query, 3)

        def far(query):
            return na_compiler.na1d(query, query, query, 5)

        return torch.cond(flag, near, far, (query,))


def test_nodes_of_one_name_in_different_graphs_are_different_ones(seed, tmp_path, monkeypatch):
    query = torch.randn(1, 12, 2, 8)
    model, inputs = Branches(), [(torch.tensor(flag), query) for flag in (True, False)]
    expected = [model(*each) for each in inputs]
    program = torch.export.export(model, inputs[0])
    sites = passes.collect(program)
    assert sites[0].node == sites[1].node, "which is what this is about"
    assert len(set(sites)) == len({site.layer for site in sites}) == len({site.graph for site in sites}) == 2
    assert {site.problem.kernel_size for site in sites} == {(3,), (5,)}
    passes.compile(program)
    assert passes.bind(program) == 2
    for each, wanted in zip(inputs, expected, strict=True):
        close(program.module()(*each), wanted)
    from na_compiler.passes.bind_torch import unbind

    assert unbind(program) == 2
    for each, wanted in zip(inputs, expected, strict=True):
        close(program.module()(*each), wanted)

    from na_compiler.passes.remember import remembered

    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path))
    file = tmp_path / "program"
    file.write_text("any")
    assert remembered(str(file), None, lambda: sites) == sites
    assert remembered(str(file), None, lambda: None) == sites


class TestRemembered:
    """Which sites a file has is kept beside the kernels; whatever else may be in that place is no more than missing."""

    @pytest.fixture
    def find(self, monkeypatch, tmp_path):
        from na_compiler.passes import remember

        monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path / "cache"))

        def find(text, sites=passes.Sites()):  # noqa: B008
            file = tmp_path / "program"
            file.write_text(text)
            return remember.remembered(str(file), None, lambda: sites)

        return find

    @pytest.mark.parametrize("what", ["deep", "list", "pipe", "large"])
    def test_what_is_no_such_file(self, find, tmp_path, what):
        find("any")
        (entry,) = (tmp_path / "cache" / "models").iterdir()
        entry.unlink()
        if what == "pipe":
            os.mkfifo(entry)
        else:
            text = {"deep": "[" * 100_000, "list": '{"sites": [[]]}', "large": " " * (9 << 20) + '{"sites": []}'}
            entry.write_text(text[what])
        known = passes.Sites([passes.Site("node", "layer", "na_compiler::na1d", "forward", None)])
        assert find("any", known) == known
        assert find("any") == known

    def test_there_is_a_bound(self, find, tmp_path, monkeypatch):
        from na_compiler.compiler import cache
        from na_compiler.passes import remember

        monkeypatch.setattr(remember, "_LIMIT", 3)
        for count in range(5):
            find(str(count))
        folder = tmp_path / "cache" / "models"
        assert len(list(folder.iterdir())) == 3
        cache.clear()
        assert not list(folder.iterdir())


def test_a_mask_that_was_taken_as_constant_is_kept_on_the_host():
    """What is allocated on a device during a user's call may belong to a CUDA graph."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from na_compiler.passes.backend import _Constant

    with FakeTensorMode():
        kept = _Constant(0, torch.empty(4, 4, dtype=torch.bool, device="cuda"))
    assert kept.value.device.type == "cpu"


def test_one_problem_twice_in_two_graphs_is_two_sites(seed):
    class Same(nn.Module):
        def forward(self, flag, query):
            def one(query):
                return na_compiler.na1d(query, query, query, 3)

            def other(query):
                return na_compiler.na1d(query, query, query, 3) * 2

            return torch.cond(flag, one, other, (query,))

    dims = (None, {1: Dim("X", min=6, max=64)})
    program = torch.export.export(Same(), (torch.tensor(True), torch.randn(1, 12, 2, 8)), dynamic_shapes=dims)
    assert len(passes.collect(program, [{"query": (1, 14, 2, 8)}])) == 2


def test_masked_attention_inside_control_flow_stays_with_a_line_that_says_why(seed, caplog):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.from_numpy(axis_mask(20, 5)))

        def forward(self, flag, query):
            attend = nn.functional.scaled_dot_product_attention

            def masked(query):
                return attend(query, query, query, attn_mask=self.mask)

            def dense(query):
                return attend(query, query, query)

            return torch.cond(flag, masked, dense, (query,))

    inputs = (torch.tensor(True), torch.randn(1, 2, 20, 8))
    program = torch.export.export(Branches(), inputs)
    with caplog.at_level("INFO", "na_compiler"):
        assert passes.canonicalise(program) == 0
    (said,) = [one.message for one in caplog.records if "stays as it is" in one.message]
    assert "inside control flow (true_graph_0)" in said
    close(program.module()(*inputs), Branches()(*inputs))


def test_nattens_functions_that_ours_cannot_do_stay(seed, monkeypatch, caplog):
    layers = natten_stub.install(monkeypatch)

    def made(arguments, dtype=torch.float32):
        graph = fx.Graph()
        x = graph.placeholder("x")
        graph.output(graph.call_function(layers[1].function, (x, x, x), arguments))
        module = fx.GraphModule({}, graph)
        x = torch.randn(1, 12, 2, 8, dtype=dtype)
        fx.passes.shape_prop.ShapeProp(module).propagate(x)
        return module

    for module, said in [
        (made({"kernel_size": 3}, torch.float64), "dtype must be one of float32"),
        (made({"kernel_size": 3, "scale": float("inf")}), "scale is inf"),
    ]:
        caplog.clear()
        with caplog.at_level("INFO", "na_compiler"):
            assert passes.canonicalise(module) == 0
        assert said in caplog.text
    assert passes.canonicalise(made({"kernel_size": 3})) == 1


def test_natten_from_a_model_hub_is_known_by_what_it_is(seed, caplog):
    _, layers = natten_stub.make("natten_cuda_3f2a.build")
    model = nn.Sequential(layers[2](32, 2, 3), nn.Linear(32, 32), layers[2](32, 2, 5)).eval()
    x, report = torch.randn(1, 8, 9, 32), {}
    expected = model(x)
    with caplog.at_level("INFO", "na_compiler"):
        assert na_compiler.convert(model, report=report) is model
    assert type(model[0]) is NeighborhoodAttention2D
    assert report == {"0": "converted", "2": "converted"}
    assert "converted 2 modules of NATTEN's: 0, 2" in caplog.text
    close(model(x), expected)

    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(layers[1].function, (x, x, x), {"kernel_size": 3}))
    module, x = fx.GraphModule({}, graph), torch.randn(1, 12, 2, 8)
    expected = module(x)
    fx.passes.shape_prop.ShapeProp(module).propagate(x)
    assert passes.canonicalise(module) == 1
    close(module(x), expected)


def test_convert_says_what_it_left_alone(caplog):
    _, layers = natten_stub.make("another")

    class Own(layers[2]):
        def forward(self, x):
            return super().forward(x) + 1

    class NeighborhoodAttention2D(nn.Module):
        """Of that name, and no relation: it calls nothing of NATTEN's."""

        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
            self.num_heads, self.scale, self.kernel_size = 2, 0.5, 3

        def forward(self, x):
            return self.proj(self.qkv(x)[..., :8])

    class NeighborhoodAttention(nn.Module):
        pass

    normed = layers[2](32, 2, 3)
    normed.q_norm = nn.LayerNorm(16)
    parts = {
        "own": (Own(32, 2, 3), "computes something of its own"),
        "namesake": (NeighborhoodAttention2D(), "does not call na2d"),
        "alike": (NeighborhoodAttention(), "NeighborhoodAttention is not a class that is known here"),
        "normed": (normed, "q_norm inside, which is not known"),
    }
    model = nn.ModuleDict({name: module for name, (module, _) in parts.items()} | {"fine": layers[2](32, 2, 3)})
    report = {}
    with caplog.at_level("WARNING", "na_compiler"):
        na_compiler.convert(model, report=report)
    assert report.pop("fine") == "converted"
    for name, (module, said) in parts.items():
        assert said in report[name]
        assert f"{name} was left alone" in caplog.text
        assert model[name] is module
    caplog.clear()
    with caplog.at_level("WARNING", "na_compiler"):
        na_compiler.convert(nn.Linear(3, 3))
    assert "no layer of Linear is one that is known here" in caplog.text


@pytest.mark.parametrize("version", ["015", "017"])
def test_convert_says_nothing_of_what_is_ours(version, caplog):
    """Layers under NATTEN's names as well: they have a bias and padding, which those of the package have not."""
    made = importlib.import_module(f"na_compiler.compat.natten.layers_{version}")

    class Own(made.NeighborhoodAttention2D):
        pass

    model, report = nn.Sequential(made.NeighborhoodAttention2D(32, 2, 3), Own(32, 2, 3), nn.Linear(32, 32)), {}
    kinds = list(map(type, model))
    with caplog.at_level("INFO", "na_compiler"):
        na_compiler.convert(model, report=report)
    assert list(map(type, model)) == kinds
    assert not report
    assert [(one.levelname, "is this package's" in one.message) for one in caplog.records] == [("INFO", True)]


def test_layers_that_ours_cannot_do_do_not_keep_a_model_from_being_compiled(monkeypatch, caplog):
    layers = natten_stub.install(monkeypatch)
    model = nn.Sequential(layers[2](32, 2, 3), layers[2](32, 2, 3))
    model[1].attn_drop = nn.Dropout(0.1)
    module = fx.GraphModule(model, sequence(2))
    assert passes.canonicalise(module) == 1
    assert "1 was left alone: it has attn_drop=0.1" in caplog.text


def sequence(count):
    """Return the graph of some modules, one after the other."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    for place in range(count):
        x = graph.call_module(str(place), (x,))
    graph.output(x)
    return graph
