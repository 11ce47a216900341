"""`na_compiler.reference`: the oracle itself, against loops over the published definition and against torch."""

import itertools
import math
import random

import pytest
import torch

from na_compiler import reference
from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_attention, neighborhood_mask


def neighbors(problem, token):
    """Return the keys of a token, found with plain loops over the definition."""
    keys = [()]
    axes = (problem.layout, problem.kernel_size, problem.stride, problem.dilation, problem.is_causal)
    for x, layout, kernel, stride, dilation, causal in zip(token, *axes, strict=True):
        group = [y for y in range(layout) if y % dilation == x % dilation]
        index, length = group.index(x), len(group)
        if causal:
            leader = min((index // stride) * stride + stride - 1, length - 1)
            window = [i for i in range(length) if leader - kernel + 1 <= i <= index]
        else:
            leader = min((index // stride) * stride + stride // 2, length - 1)
            first = min(max(leader - kernel // 2, 0), length - kernel)
            window = list(range(first, first + kernel))
        keys = [(*key, group[i]) for key in keys for i in window]
    return keys


def random_problem():
    rank = random.randint(1, 3)
    layout = [random.randint(1, 7) for _ in range(rank)]
    dilation = [random.randint(1, extent) for extent in layout]
    kernel = [random.randint(1, extent // d) for extent, d in zip(layout, dilation, strict=True)]
    stride = [random.randint(1, k) for k in kernel]
    causal = [random.random() < 0.5 for _ in layout]
    return Problem(layout, 4, 3, kernel, stride, dilation, causal, random.choice([1, 2, 4]), 5)


def test_agrees_with_loops_over_the_definition(seed):
    for _ in range(20):
        problem = random_problem()
        tokens = (2, *problem.layout)
        query = torch.randn(*tokens, problem.heads, 3, dtype=torch.float64)
        key = torch.randn(*tokens, problem.heads_kv, 3, dtype=torch.float64)
        value = torch.randn(*tokens, problem.heads_kv, 5, dtype=torch.float64)
        extra_key, extra_value = torch.randn(2, 2, problem.heads_kv, 3), torch.randn(2, 2, problem.heads_kv, 5)
        extra_key, extra_value = extra_key.double(), extra_value.double()
        parameters = (problem.kernel_size, problem.stride, problem.dilation, problem.is_causal)
        output, lse = neighborhood_attention(query, key, value, *parameters, 0.7, extra_key, extra_value)
        for _ in range(6):
            batch, head = random.randrange(2), random.randrange(problem.heads)
            token = tuple(random.randrange(extent) for extent in problem.layout)
            seen = neighbors(problem, token)
            shared = head // problem.group_size
            keys = torch.stack([key[(batch, *place, shared)] for place in seen] + list(extra_key[batch, :, shared]))
            values = torch.stack(
                [value[(batch, *place, shared)] for place in seen] + list(extra_value[batch, :, shared])
            )
            scores = 0.7 * keys @ query[(batch, *token, head)]
            torch.testing.assert_close(output[(batch, *token, head)], scores.softmax(0) @ values)
            torch.testing.assert_close(lse[(batch, *token, head)], scores.logsumexp(0))


def test_full_window_is_plain_attention(seed):
    query, key, value = torch.randn(3, 2, 3, 4, 2, 8, dtype=torch.float64)
    output, _ = neighborhood_attention(query, key, value, (3, 4))
    first = [tensor.flatten(1, 2).transpose(1, 2) for tensor in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*first)
    torch.testing.assert_close(output.flatten(1, 2).transpose(1, 2), expected)


def test_causal_full_window_is_causal_attention(seed):
    query, key, value = torch.randn(3, 2, 9, 2, 8, dtype=torch.float64)
    output, _ = neighborhood_attention(query, key, value, 9, is_causal=True)
    first = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*first, is_causal=True)
    torch.testing.assert_close(output.transpose(1, 2), expected)


def test_gradients(seed):
    inputs = [torch.randn(1, 5, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *t: neighborhood_attention(*t, 3, is_causal=True), inputs)


def test_blocks_of_queries_change_nothing(seed, monkeypatch):
    inputs = [torch.randn(1, 6, 7, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    whole = neighborhood_attention(*inputs, (3, 5))
    gradients = torch.autograd.grad(whole[0].square().sum(), inputs)
    monkeypatch.setattr(reference, "_SCORES", 5 * 2 * 42)
    parts = neighborhood_attention(*inputs, (3, 5))
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts[0].square().sum(), inputs), gradients)


def test_some_queries_only(seed):
    query, key, value = torch.randn(3, 2, 6, 7, 2, 4, dtype=torch.float64)
    output, lse = neighborhood_attention(query, key, value, 3)
    rows = torch.tensor([40, 0, 13])
    some, some_lse = neighborhood_attention(query, key, value, 3, tokens=rows)
    torch.testing.assert_close(some, output.flatten(1, 2)[:, rows])
    torch.testing.assert_close(some_lse, lse.flatten(1, 2)[:, rows])


def test_scale_of_zero_is_zero(seed):
    query, key, value = torch.randn(3, 1, 5, 1, 4, dtype=torch.float64)
    _, lse = neighborhood_attention(query, key, value, 3, scale=0.0)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(3)))


def test_mask_counts_the_window():
    assert (neighborhood_mask(Problem((5, 6), 1, 1, (3, 2), dilation=(1, 2))).sum(1) == 6).all()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["query", "key", "value", "grad_output", "grad_lse"])
def test_not_finite_where_a_loop_over_the_window_is(where, number, seed):
    """Each query by itself, over the keys that it sees: what autograd makes of that in plain PyTorch."""
    problem = random_problem().replace(heads=2, heads_kv=1)
    tensors = {
        "query": torch.randn(1, *problem.layout, 2, 3, dtype=torch.float64),
        "key": torch.randn(1, *problem.layout, 1, 3, dtype=torch.float64),
        "value": torch.randn(1, *problem.layout, 1, 5, dtype=torch.float64),
        "grad_output": torch.randn(1, *problem.layout, 2, 5, dtype=torch.float64),
        "grad_lse": torch.randn(1, *problem.layout, 2, dtype=torch.float64),
    }
    spoilt = tensors[where].view(-1)
    spoilt[random.randrange(len(spoilt))] = number
    inputs = [tensors[name].requires_grad_() for name in ("query", "key", "value")]
    query, key, value = inputs
    grads = tensors["grad_output"], tensors["grad_lse"]
    outputs, lses = torch.empty_like(grads[0]), torch.empty_like(grads[1])
    for token in itertools.product(*map(range, problem.layout)):
        seen = tuple(torch.tensor(neighbors(problem, token)).T)
        for head in range(2):
            scores = (key[(0, *seen, 0)] * query[(0, *token, head)]).sum(-1) * 3**-0.5
            weights = (scores - scores.detach().max()).exp()
            outputs[(0, *token, head)] = (weights[:, None] * value[(0, *seen, 0)]).sum(0) / weights.sum()
            lses[(0, *token, head)] = scores.detach().max() + weights.sum().log()
    expected = [outputs, lses, *torch.autograd.grad((outputs, lses), inputs, grads)]
    parameters = (problem.kernel_size, problem.stride, problem.dilation, problem.is_causal)
    results = neighborhood_attention(*inputs, *parameters)
    results = [*results, *torch.autograd.grad(results, inputs, grads)]
    assert not all(result.isfinite().all() for result in results)
    for result, reference_result in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference_result, equal_nan=True)


@pytest.mark.parametrize(("number", "query"), [(-math.inf, 1.0), (math.inf, 1.0), (math.inf, -1.0)])
def test_scores_without_a_softmax(number, query):
    """All scores minus infinity, or one plus infinity: NaN, lse as well."""
    queries, keys = torch.full((1, 5, 1, 1), query), torch.full((1, 5, 1, 1), number)
    output, lse = neighborhood_attention(queries, keys, torch.ones(1, 5, 1, 1), 3)
    assert output.isnan().all()
    assert lse.isnan().all()


def test_arguments_are_checked():
    query, key, value = torch.zeros(3, 1, 5, 1, 4)
    with pytest.raises(ValueError, match="kernel_size=5 would work"):
        neighborhood_attention(query, key, value, 7)
