"""`na_compiler.reference`: the oracle itself, against loops over the published definition and against torch."""

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


def test_arguments_are_checked():
    query, key, value = torch.zeros(3, 1, 5, 1, 4)
    with pytest.raises(ValueError, match="kernel_size=5 would work"):
        neighborhood_attention(query, key, value, 7)
