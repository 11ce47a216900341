"""The names of NATTEN 0.14 to 0.17: split operators, biases by relative position, layers that pad and drop."""

from __future__ import annotations

import inspect
import itertools
import random

import pytest
import torch
from processes import run_python
from torch import nn

from na_compiler.compat.natten import layer as layer_module
from na_compiler.compat.natten import tiles
from na_compiler.compat.natten.names import contents
from na_compiler.compat.natten.split import av, qk
from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_mask
from na_compiler.window import group_length, window_bounds


def expected(query, key, value, kernel_size, dilation, is_causal, scale, bias=None, additional=()):
    """Attention with heads first in float64: a mask, and a bias looked up for each pair of query and key."""
    layout = query.shape[2:-1]
    query, key, value = (tensor.double().flatten(2, -2) for tensor in (query, key, value))
    problem = Problem(layout, query.shape[1], query.shape[-1], kernel_size, 1, dilation, is_causal)
    scores = query @ key.mT * scale
    if bias is not None:
        places = list(itertools.product(*map(range, layout)))
        table = bias.double()
        added = []
        for one, other in itertools.product(places, places):
            axes = zip(other, one, problem.dilation, problem.kernel_size, strict=True)
            offsets = [there // step - here // step + size - 1 for there, here, step, size in axes]
            inside = all(0 <= offset < 2 * k - 1 for offset, k in zip(offsets, problem.kernel_size, strict=True))
            added.append(table[(slice(None), *offsets)] if inside else torch.zeros(len(table)).double())
        scores = scores + torch.stack(added, -1).unflatten(-1, (len(places), len(places)))
    scores = scores.masked_fill(~neighborhood_mask(problem), -torch.inf)
    if additional:
        scores = torch.cat([scores, query @ additional[0].double().mT * scale], -1)
        value = torch.cat([value, additional[1].double()], 2)
    return (scores.softmax(-1) @ value).unflatten(2, layout)


def error(value, reference):
    return ((value - reference).norm() / reference.norm()).item()


def draw():
    """A small problem."""
    rank = random.choice((1, 2, 2, 3))
    kernel_size = [random.randint(1, 4 if rank < 3 else 3) for _ in range(rank)]
    dilation = [random.randint(1, 2) for _ in range(rank)]
    # Of more tokens than a tile has, and not a multiple of those.
    layout = [k * d + random.randint(0, 7 if rank < 3 else 2) for k, d in zip(kernel_size, dilation, strict=True)]
    return layout, kernel_size, dilation, [random.random() < 0.3 for _ in range(rank)]


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_operators(seed, turn, dtype, monkeypatch):
    if turn < 2:  # One tile at a time, where there would be all at once.
        monkeypatch.setattr(tiles, "_AT_A_TIME", 1)
    layout, kernel_size, dilation, is_causal = draw()
    shape = (2, 3, *layout, 5)
    tensors = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]
    bias = torch.randn(3, *(2 * k - 1 for k in kernel_size)).to(dtype).requires_grad_()
    additional = [torch.randn(2, 3, 2, 5).to(dtype).requires_grad_() for _ in range(2)] if turn % 2 else []
    query, key, value = tensors
    scores = qk(query * 0.5, key, kernel_size, dilation, is_causal, bias, *additional[:1])
    output = av(scores.softmax(-1), value, kernel_size, dilation, is_causal, *additional[1:])
    reference = expected(query, key, value, kernel_size, dilation, is_causal, 0.5, bias, additional)
    assert output.dtype == dtype
    grad = torch.randn(shape)
    inputs = [*tensors, bias, *additional]
    mine = torch.autograd.grad(output, inputs, grad.to(dtype))
    theirs = torch.autograd.grad(reference, inputs, grad.double())
    limit = 1e-5 if dtype == torch.float32 else 3e-2
    for one, other in zip((output, *mine), (reference, *theirs), strict=True):
        # With kernel_size 1 and nothing beside it, gradients of the scores vanish.
        scale = max(other.double().norm().item(), 0.1 * grad.norm().item() if dtype != torch.float32 else 1e-2)
        assert (one.double() - other.double()).norm().item() < limit * scale


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_columns_are_the_window_in_order(dilation, is_causal, seed):
    """Of layouts with all remainders of what a tile has: four queries here, and five where there are no more."""
    for tokens in range(3 * dilation, 21):
        position = torch.arange(1.0, tokens + 1)
        places = qk(torch.ones(1, 1, tokens, 1), position.reshape(1, 1, tokens, 1), 3, dilation, is_causal)[0, 0] - 1
        assert places.shape == (tokens, 3)
        wanted = torch.full((tokens, 3), -torch.inf)
        for token in range(tokens):
            group, index = token % dilation, token // dilation
            start, end = window_bounds(index, group_length(tokens, dilation, group), 3, is_causal=is_causal)
            wanted[token, : end - start] = torch.arange(start, end) * dilation + group
        assert torch.equal(places, wanted)
        # Whatever weighs a column without a key, it has no part in sums.
        weights = torch.rand(1, 1, tokens, 3)
        sums = av(weights, position.reshape(1, 1, tokens, 1), 3, dilation, is_causal)[0, 0, :, 0]
        torch.testing.assert_close(sums, (weights[0, 0] * (wanted + 1).clamp_min(0)).sum(-1))
        heads = torch.ops.na_compiler.window_scores(
            torch.ones(1, 1, tokens, 1), position.reshape(1, 1, tokens, 1), [3], [dilation], [is_causal]
        )
        assert torch.equal(heads[0, 0], (wanted + 1).clamp_min(0))


def test_compiled_windows_larger_than_the_layout_are_refused(seed):
    """Also where the layout is a symbol while torch compiles."""
    compiled = torch.compile(lambda tensor: qk(tensor, tensor, 3, 2), backend="eager", fullgraph=True, dynamic=True)
    with pytest.raises(ValueError, match=r"kernel_size=3 \* dilation=2"):
        compiled(torch.randn(1, 1, 5, 4))
    assert compiled(torch.randn(1, 1, 6, 4)).shape == (1, 1, 6, 3)


def test_operators_are_good_citizens(seed):
    tensors = [torch.randn(1, 1, 3, 4, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    weights = torch.randn(1, 1, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    table = torch.randn(1, 5, 3, dtype=torch.float64, requires_grad=True)
    parameters = [3, 2], [1, 2], [True, False]
    for name, given, more in (
        ("scores", tensors, ()),
        ("sums", (weights, tensors[1]), ()),
        ("scatter", (weights, tensors[1]), ()),
        ("bias", (table,), ([3, 4],)),
        ("bias_sums", (weights[0],), ()),
        ("hide", (weights,), (0.5,)),
    ):
        operator = getattr(torch.ops.na_compiler, f"window_{name}").default
        torch.library.opcheck(operator, (*given, *more, *parameters))
        arguments = (*more, *parameters)
        assert torch.autograd.gradcheck(lambda *one, call=operator, rest=arguments: call(*one, *rest), given)
        assert torch.autograd.gradgradcheck(lambda *one, call=operator, rest=arguments: call(*one, *rest), given)


def test_split_operators_refuse():
    query = torch.randn(1, 2, 6, 6, 4)
    with pytest.raises(ValueError, match=r"kernel_size \* dilation"):
        qk(query, query, 4, 2)
    with pytest.raises(ValueError, match="one shape"):
        qk(query, query[:, :1], 3)
    with pytest.raises(ValueError, match=r"\(2, 5, 5\)"):
        qk(query, query, 3, bias=torch.randn(2, 3, 3))
    with pytest.raises(ValueError, match=r"\(1, 2, 6, 6, 9\)"):
        av(torch.randn(1, 2, 6, 6, 8), query, 3)
    with pytest.raises(ValueError, match="additional"):
        qk(query, query, 3, additional_keys=torch.randn(1, 2, 3, 5))
    with pytest.raises(ValueError, match="natten1dqk takes tensors of 4"):
        contents("0.15.1")["functional"]["natten1dqk"](query, query, 3, 1)


def test_arguments_are_where_they_were(seed):
    oldest, old, last = (contents(release)["functional"] for release in ("0.14.6", "0.15.1", "0.17.5"))
    query, key, value = torch.randn(3, 1, 2, 7, 7, 4)
    bias = torch.randn(2, 5, 5)
    scores = qk(query, key, 3, 2, bias=bias)
    assert torch.equal(oldest["natten2dqkrpb"](query, key, bias, 3, 2), scores)
    assert torch.equal(old["na2d_qk_with_bias"](query, key, bias, 3, 2), scores)
    assert torch.equal(last["na2d_qk"](query, key, 3, 2, None, False, bias), scores)
    assert torch.equal(old["natten2dqk"](query, key, 3, 2), qk(query, key, 3, 2))
    weights = scores.softmax(-1)
    assert torch.equal(old["natten2dav"](weights, value, 3, 2), av(weights, value, 3, 2))
    assert torch.equal(last["na2d_av"](weights, value, kernel_size=3, dilation=2), av(weights, value, 3, 2))
    query, key, value = torch.randn(3, 1, 2, 4, 6, 6, 4)
    bias = torch.randn(2, 3, 5, 5)
    scores = qk(query, key, (2, 3, 3), (1, 2, 2), bias=bias)
    assert torch.equal(old["natten3dqkrpb"](query, key, bias, 2, 3, 1, 2), scores)
    assert torch.equal(old["na3d_qk_with_bias"](query, key, bias, 2, 3, 1, 2), scores)
    assert torch.equal(old["na3d_av"](scores, value, 2, 3, 1, 2), av(scores, value, (2, 3, 3), (1, 2, 2)))
    assert torch.equal(last["na3d_qk"](query, key, (2, 3, 3), (1, 2, 2), rpb=bias), scores)
    assert list(inspect.signature(last["na2d_qk"]).parameters)[2:5] == ["kernel_size", "dilation", "additional_keys"]


def test_fifth_argument_of_the_old_na2d_is_the_dilation(seed):
    query, key, value = torch.randn(3, 1, 6, 7, 2, 8)
    first = [tensor.movedim(-2, 1) for tensor in (query, key, value)]
    na2d = contents("0.17.5")["functional"]["na2d"]
    output = na2d(query, key, value, 3, 2, (False, True), None, 0.3)
    assert error(output.movedim(-2, 1), expected(*first, 3, 2, (False, True), 0.3)) < 1e-5
    bias = torch.randn(2, 5, 5)
    output = na2d(query, key, value, 3, 2, False, bias, 0.3)
    assert error(output.movedim(-2, 1), expected(*first, 3, 2, False, 0.3, bias)) < 1e-5


def by_hand(layer, x, kernel_size, dilation, weights=None):
    """What an old layer computes, from its state_dict, in float64."""
    state = {name: tensor.double() for name, tensor in layer.state_dict().items()}
    layout = x.shape[1:-1]
    amounts = [max(kernel_size * dilation - extent, 0) for extent in layout]
    padded = torch.zeros(len(x), *(e + a for e, a in zip(layout, amounts, strict=True)), x.shape[-1]).double()
    padded[(slice(None), *(slice(extent) for extent in layout))] = x.double()
    qkv = padded @ state["qkv.weight"].mT + state["qkv.bias"]
    query, key, value = qkv.unflatten(-1, (3, layer.num_heads, -1)).movedim((-3, -2), (0, 2))
    rank = len(layout)
    output = expected(
        query, key, value, kernel_size, dilation, (False,) * rank, query.shape[-1] ** -0.5, state.get("rpb")
    )
    output = output.movedim(1, -2).flatten(-2)[(slice(None), *(slice(extent) for extent in layout))]
    return output @ state["proj.weight"].mT + state["proj.bias"]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_layers_with_bias_load_checkpoints_strictly(seed, rank):
    """State dicts of NAT's and DiNAT's shapes; an input smaller than the window on one axis."""
    kernel_size, dilation, heads, dim = 3, 2, 2, 8
    state = {
        "rpb": torch.randn(heads, *[2 * kernel_size - 1] * rank),
        "qkv.weight": torch.randn(3 * dim, dim),
        "qkv.bias": torch.randn(3 * dim),
        "proj.weight": torch.randn(dim, dim),
        "proj.bias": torch.randn(dim),
    }
    layout = (5, 7, 6)[:rank]
    x = torch.randn(2, *layout, dim)
    for release, with_bias in (("0.14.6", {}), ("0.15.1", {"bias": True}), ("0.17.5", {"rel_pos_bias": True})):
        layers = contents(release)[""]
        if f"NeighborhoodAttention{rank}D" not in layers:
            assert release == "0.14.6"
            continue
        layer = layers[f"NeighborhoodAttention{rank}D"](
            dim=dim, num_heads=heads, kernel_size=kernel_size, dilation=dilation, **with_bias
        )
        layer.load_state_dict(state, strict=True)
        if release == "0.17.5":
            with pytest.raises(ValueError, match=r"kernel_size \* dilation"):
                layer(x)
            x = torch.randn(2, *(max(extent, kernel_size * dilation) for extent in layout), dim)
        output = layer(x)
        assert output.shape == x.shape
        assert error(output, by_hand(layer, x, kernel_size, dilation)) < 1e-5
        output.sum().backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("has_bias", [False, True])
def test_layers_pad_and_take_one_kernel(has_bias, seed, monkeypatch):
    from na_compiler.compat.natten import layer as module

    monkeypatch.setattr(module, "attend", None)
    layer = contents("0.15.1")[""]["NeighborhoodAttention2D"](8, 2, 3, 2, has_bias)
    assert ("rpb" in layer.state_dict()) == has_bias
    if has_bias:
        nn.init.normal_(layer.rpb)
    x = torch.randn(1, 4, 7, 8)
    assert error(layer.eval()(x), by_hand(layer, x, 3, 2)) < 1e-5


def test_weights_are_dropped_in_training_only(seed, caplog):
    caplog.set_level("INFO", "na_compiler")
    layer_module._say_that_weights_are_dropped.cache_clear()
    layer = contents("0.17.5")[""]["NeighborhoodAttention1D"](8, 2, 3, attn_drop=0.5, use_experimental_ops=True)
    x = torch.randn(1, 6, 8)
    reference = by_hand(layer, x, 3, 1)
    assert error(layer.eval()(x), reference) < 1e-5
    layer.train()
    assert "drops attention weights" not in caplog.text
    drawn = layer(x.expand(600, 6, 8))
    layer(x)
    assert caplog.text.count("NeighborhoodAttention1D drops attention weights: in training") == 1
    assert error(drawn[:1], reference) > 1e-2
    # Each is another; their mean is what there is without.
    assert error(drawn.mean(0, keepdim=True), reference) < 0.2
    layer.attn_drop.p = 1.0
    with torch.no_grad():
        assert torch.allclose(layer(x), layer.proj.bias.expand(1, 6, 8))


STYLES = """
import sys
from na_compiler.compat.natten import install
install("0.15")

import torch
from torch import nn
from natten.functional import natten2dav, natten2dqkrpb  # as transformers has it

class Attention(nn.Module):
    def __init__(self, dim, heads, kernel_size, dilation):
        super().__init__()
        self.heads, self.kernel_size, self.dilation = heads, kernel_size, dilation
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.rpb = nn.Parameter(torch.randn(heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.dropout = nn.Dropout(0.1)

    def split(self, x):
        return x.view(*x.shape[:-1], self.heads, -1).permute(0, 3, 1, 2, 4)

    def forward(self, x):
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        query = query / query.shape[-1] ** 0.5
        scores = natten2dqkrpb(query, key, self.rpb, self.kernel_size, self.dilation)
        weights = self.dropout(nn.functional.softmax(scores, dim=-1))
        context = natten2dav(weights, value, self.kernel_size, self.dilation)
        return context.permute(0, 2, 3, 1, 4).contiguous().flatten(-2)

torch.manual_seed(int(sys.argv[1]))
model = Attention(8, 2, 3, 2).eval()
x = torch.randn(1, 6, 7, 8)
model(x).sum().backward()
program = torch.export.export(model, (x,), strict=False)
torch.testing.assert_close(program.module()(x), model(x))
compiled = torch.compile(model, backend="eager", fullgraph=True)
torch.testing.assert_close(compiled(x), model(x))
torch.save([model.state_dict(), x, model(x).detach()], sys.argv[2])
"""


def test_model_that_splits_runs_unchanged(seed, tmp_path):
    run_python(STYLES, str(seed), str(tmp_path / "made"), NA_COMPILER_NATTEN=None, PYTHONPATH=None)
    state, x, output = torch.load(tmp_path / "made")

    def heads(name):
        return (
            nn.functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"]).unflatten(-1, (2, 4)).movedim(-2, 1)
        )

    query, key, value = map(heads, ("query", "key", "value"))
    reference = expected(query, key, value, 3, 2, False, 0.5, state["rpb"])
    assert error(output, reference.movedim(1, -2).flatten(-2)) < 1e-5


LATEST = """
import sys
import torch
from na_compiler.compat.natten import install
install()

import natten
from natten import NeighborhoodAttention2D, na2d
from natten.functional import merge_attentions
from natten.types import CausalArg2DTypeOrDed, Dimension2DTypeOrDed

class Block(torch.nn.Module):
    def __init__(self, dim: int, kernel_size: Dimension2DTypeOrDed, is_causal: CausalArg2DTypeOrDed = False):
        super().__init__()
        self.attention = NeighborhoodAttention2D(dim, 2, kernel_size, stride=2, dilation=1, is_causal=is_causal)

    def forward(self, x):
        x = x + self.attention(x)
        query = x.unflatten(-1, (2, -1))
        return x + na2d(query, query, query, kernel_size=(3, 4), backend="hopper-fna", torch_compile=False).flatten(-2)

torch.manual_seed(int(sys.argv[1]))
model = Block(16, 3).eval()
x = torch.randn(1, 6, 7, 16, requires_grad=True)
output = model(x)
output.sum().backward()
torch.save([model.state_dict(), x.detach(), output.detach()], sys.argv[2])
"""


def test_model_of_today_runs_unchanged(seed, tmp_path):
    """And with the import edited: the same layers and functions of ours give the same."""
    import na_compiler

    run_python(LATEST, str(seed), str(tmp_path / "made"), NA_COMPILER_NATTEN=None, PYTHONPATH=None)
    state, x, output = torch.load(tmp_path / "made")
    layer = na_compiler.NeighborhoodAttention2D(16, 2, 3, stride=2)
    layer.load_state_dict({name.removeprefix("attention."): tensor for name, tensor in state.items()}, strict=True)
    x = x + layer(x)
    query = x.unflatten(-1, (2, -1))
    assert error(output, x + na_compiler.na2d(query, query, query, (3, 4)).flatten(-2)) < 1e-5
