"""Models that split attention, scores, softmax and sums: one kernel in a graph, and what keeps them from it."""

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch_graphs import close, targets

from na_compiler import Problem, passes
from na_compiler.compat.natten.names import contents
from na_compiler.passes.views import copies

OLD, LAST = (contents(release)["functional"] for release in ("0.15.1", "0.17.5"))


class Splitting(nn.Module):
    """As the published models have it: a bias by relative position, and dropout between softmax and sums.

    Parameters
    ----------
    style
        Which of them: how they scale, and turn heads last.
    """

    def __init__(self, style, rank=2, dim=32, heads=2, kernel_size=3, dilation=2, has_bias=True, causal=False):
        super().__init__()
        self.style, self.rank, self.heads, self.causal = style, rank, heads, causal
        self.kernel_size, self.dilation = kernel_size, dilation
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.rpb = nn.Parameter(torch.randn(heads, *[2 * kernel_size - 1] * rank)) if has_bias else None
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        parameters = self.kernel_size, self.dilation
        if self.rank == 3:  # The first axis has its own.
            parameters = self.kernel_size, self.kernel_size, self.dilation, self.dilation
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).movedim((-3, -2), (0, 2)).unbind()
        if self.style == "first":
            query = query * query.shape[-1] ** -0.5
            scores = OLD[f"natten{self.rank}dqkrpb"](query, key, self.rpb, *parameters)
            weights = self.dropout(scores.softmax(dim=-1))
            y = OLD[f"natten{self.rank}dav"](weights, value, *parameters)
            return self.proj(y.permute(0, *range(2, self.rank + 2), 1, self.rank + 2).flatten(-2))
        if self.style == "second":
            query = query / query.shape[-1] ** 0.5
            scores = OLD[f"natten{self.rank}dqkrpb"](query, key, self.rpb, *parameters)
            weights = self.dropout(nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(x.dtype))
            y = OLD[f"natten{self.rank}dav"](weights, value, *parameters)
            return self.proj(y.movedim(1, -2).contiguous().flatten(-2))
        causal = [self.causal, *[False] * (self.rank - 1)]
        scores = LAST[f"na{self.rank}d_qk"](query, key, *parameters, is_causal=causal)
        weights = torch.softmax(scores * query.shape[-1] ** -0.5, -1)
        y = LAST[f"na{self.rank}d_av"](weights, value, *parameters, is_causal=causal)
        # It looks at strides: rows of a head are beside each other.
        y = y.view(x.shape[0], self.heads, -1, y.shape[-1])
        return self.proj(y.transpose(1, 2).reshape(x.shape))


STYLES = {
    "first": dict(),
    "second": dict(rank=1, kernel_size=5),
    "third": dict(has_bias=False, causal=True, kernel_size=4),
    "three axes": dict(rank=3, dilation=1),
}


def made(name):
    style = "first" if name == "three axes" else name
    return Splitting(style, **STYLES[name])


def layout_of(name):
    return {1: (13,), 2: (8, 9), 3: (3, 4, 5)}[STYLES[name].get("rank", 2)]


@pytest.mark.parametrize("name", STYLES)
def test_exported_programs_get_one_kernel(name, seed):
    model, layout = made(name).eval(), layout_of(name)
    x = torch.randn(2, *layout, 32)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("B", max=8)},), strict=False)
    assert passes.canonicalise(program) == 1
    (site,) = passes.collect(program)
    assert site.is_ours
    causal = [model.causal, *[False] * (len(layout) - 1)]
    options = ("relative_position_bias",) if model.rpb is not None else ()
    wanted = Problem(layout, 2, 16, model.kernel_size, 1, model.dilation, causal, operands=options)
    assert site.problem == wanted
    assert not any("window_" in str(target) or "softmax" in str(target) for target in targets(program))
    assert copies(program.graph_module) == []
    program.validate()
    close(program.module()(x), model(x))
    close(program.module()(x[:1]), model(x[:1]))


@pytest.mark.parametrize("name", ["first", "third"])
def test_compiled_models_get_one_kernel(name, seed, caplog):
    model, x = made(name).eval(), torch.randn(2, *layout_of(name), 32)
    torch._dynamo.reset()
    with caplog.at_level("INFO", "na_compiler"):
        result = torch.compile(model, backend="na_compiler", fullgraph=True)(x)
    assert "scores, softmax and sums become one kernel" in caplog.text
    expected = model(x)
    close(result, expected)
    grad = torch.randn_like(result)
    mine, theirs = (torch.autograd.grad(y, [*model.parameters()], grad) for y in (result, expected))
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).norm() < 1e-4 * other.norm()


class Between(nn.Module):
    def __init__(self, do):
        super().__init__()
        self.do = do
        self.rpb = nn.Parameter(torch.randn(2, 5, 5))

    def forward(self, query, key, value):
        scores = LAST["na2d_qk"](query, key, 3, 1, rpb=self.rpb)
        return self.do(scores, value)


def sums(weights, value, kernel_size=3, dilation=1, **more):
    return LAST["na2d_av"](weights, value, kernel_size, dilation, **more)


# What is between scores and sums, and what is said of it.
OTHERS = {
    "dropped": (lambda s, v: sums(nn.functional.dropout(s.softmax(-1), 0.5, training=True), v), "weights are dropped"),
    "read": (lambda s, v: (sums(w := s.softmax(-1), v), w), "softmax is read as well"),
    "no softmax": (sums, "its sums are not of a softmax"),
    "two": (lambda s, v: sums(s.softmax(-1).softmax(-1), v), "between its scores and its softmax"),
    "over heads": (lambda s, v: sums(s.softmax(1), v), "its softmax is over dimension 1"),
    "masked": (lambda s, v: sums((s + torch.ones(9)).softmax(-1), v), "adds something else than biases"),
    "scaled bias": (lambda s, v: sums((s * 2.0).softmax(-1), v), "not the only ones"),
    "normalised": (lambda s, v: sums(s.softmax(-1) * 2, v), "its sums are not of a softmax"),
    "other windows": (lambda s, v: sums(s.softmax(-1), v, dilation=2), "of other windows, or not the only ones"),
    "nowhere": (lambda s, v: sums(torch.ones(1, 2, 7, 6, 9), v), "its weights come from"),
    "causal sums": (lambda s, v: sums(s.softmax(-1), v, is_causal=(True, False)), "other windows"),
    "rounded": (lambda s, v: sums(torch.div(s, 0.1, rounding_mode="floor").softmax(-1), v), "more than a number"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_what_does_more_than_attend_stays_as_it_was(kind, seed, caplog):
    do, said = OTHERS[kind]
    tensors = tuple(torch.randn(3, 1, 2, 7, 6, 16).unbind())
    model = Between(do)
    program = torch.export.export(model, tensors, strict=False)
    before = targets(program)
    with caplog.at_level("INFO", "na_compiler"):
        assert passes.canonicalise(program) == 0
    assert "split attention stays as it is" in caplog.text
    assert said in caplog.text
    assert targets(program) == before


CAUSAL = [3, 3], [1, 1], [True, False]


@pytest.mark.parametrize("by", [None, 0.0, -1.0])
def test_columns_without_a_key_that_take_part_keep_it_as_it_was(by, seed, caplog):
    """As nothing of NATTEN's leaves them, and whoever calls the operators themselves may."""

    class Taking(nn.Module):
        def forward(self, query, key, value):
            scores = torch.ops.na_compiler.window_scores(query, key, *CAUSAL)
            if by is not None:
                scores = torch.ops.na_compiler.window_hide(scores, by, *CAUSAL)
            return torch.ops.na_compiler.window_sums(scores.softmax(-1), value, *CAUSAL)

    program = torch.export.export(Taking(), torch.randn(3, 1, 2, 7, 6, 16).unbind(), strict=False)
    before = targets(program)
    with caplog.at_level("INFO", "na_compiler"):
        assert passes.canonicalise(program) == 0
    assert "take part" in caplog.text
    assert targets(program) == before


def test_output_has_the_strides_of_sums_where_they_are_looked_at(seed):
    class Looking(nn.Module):
        def forward(self, query, key, value):
            scores = OLD["natten2dqk"](query, key, 3, 1)
            output = OLD["natten2dav"](scores.softmax(-1), value, 3, 1)
            return output.view(-1, *output.shape[2:]), output

    tensors = torch.randn(3, 2, 2, 7, 6, 16).unbind()
    program = torch.export.export(Looking(), tensors, strict=False)
    assert passes.canonicalise(program) == 1
    for one, other in zip(program.module()(*tensors), Looking()(*tensors), strict=True):
        close(one, other)
        assert one.stride() == other.stride()


def test_what_is_written_in_between_keeps_it_as_it_was(seed, caplog):
    def model(query, key, value):
        query = query + 0
        scores = OLD["natten2dqk"](query, key, 3, 1)
        query.add_(1.0)
        return OLD["natten2dav"](scores.softmax(-1), value, 3, 1) + query

    tensors = torch.randn(3, 1, 2, 7, 6, 16).unbind()
    torch._dynamo.reset()
    with caplog.at_level("INFO", "na_compiler"):
        result = torch.compile(model, backend="na_compiler", fullgraph=True)(*tensors)
    assert "writes into a tensor between its scores and its sums" in caplog.text
    close(result, model(*tensors))


def test_half_precision_and_its_bias(seed):
    model = Between(lambda scores, value: sums(scores.softmax(-1), value)).bfloat16()
    tensors = tuple(torch.randn(3, 1, 2, 7, 6, 16).bfloat16().unbind())
    program = torch.export.export(model, tensors, strict=False)
    assert passes.canonicalise(program) == 1
    expected = model.double()(*(tensor.double() for tensor in tensors))
    error = (program.module()(*tensors).double() - expected).norm() / expected.norm()
    assert error < 1e-2
