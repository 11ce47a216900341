"""NATTEN's modules, functions and operators become ours, under any name; what ours cannot do stays, and is said."""

import importlib
import operator

import natten_stub
import pytest
import torch
from torch import fx, nn
from torch_graphs import close

import na_compiler
from na_compiler import NeighborhoodAttention2D, Problem, passes
from na_compiler.passes.canonicalise_torch import Canonicalise
from na_compiler.reference import neighborhood_attention

OURS = list(na_compiler.ops.operators.OPERATORS.values())


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
