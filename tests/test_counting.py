"""`na_compiler.counting`: closed forms, against the window rule token by token."""

import random

import pytest

from na_compiler.counting import (
    _floor_sum,
    _largest_residue,
    group_lengths,
    most_queries,
    visible_pairs,
    widest_inverse,
    widest_union,
)
from na_compiler.problem import Problem
from na_compiler.window import group_length, query_bounds, window_bounds


def draw_axis():
    """Draw length, kernel size, stride and causality: often with borders that meet, or strides that do not divide."""
    kernel_size = random.randint(1, 40)
    length = kernel_size + random.choice((0, 1, 2, random.randint(0, 20), random.randint(0, 200)))
    return length, kernel_size, random.choice((1, kernel_size, random.randint(1, kernel_size))), random.random() < 0.5


@pytest.fixture(params=range(4))
def axes(request, seed):
    return [draw_axis() for _ in range(100)]


def test_pairs(axes):
    for length, *rule in axes:
        windows = [window_bounds(index, length, *rule) for index in range(length)]
        assert visible_pairs(length, *rule) == sum(end - start for start, end in windows), (length, rule)


def test_most_queries(axes):
    for length, *rule in axes:
        seen = [query_bounds(key, length, *rule) for key in range(length)]
        assert most_queries(length, *rule) == max(end - first for first, end in seen), (length, rule)


def test_widest_union(axes):
    for length, *rule in axes:
        windows = [window_bounds(index, length, *rule) for index in range(length)]
        for queries in {1, length, *(random.randint(1, length) for _ in range(6))}:
            blocks = range(0, length, queries)
            widest = max(windows[min(first + queries, length) - 1][1] - windows[first][0] for first in blocks)
            assert widest_union(length, *rule, queries) == widest, (length, rule, queries)


def test_widest_inverse(axes):
    for length, *rule in axes:
        seen = [query_bounds(key, length, *rule) for key in range(length)]
        for keys in {1, length, *(random.randint(1, length) for _ in range(6))}:
            blocks = range(0, length, keys)
            widest = max(seen[min(first + keys, length) - 1][1] - seen[first][0] for first in blocks)
            assert widest_inverse(length, *rule, keys) == widest, (length, rule, keys)


def test_groups(seed):
    for _ in range(50):
        layout, dilation = random.randint(1, 60), random.randint(1, 9)
        lengths = [group_length(layout, dilation, group) for group in range(dilation)]
        expected = {length: lengths.count(length) for length in lengths}
        assert group_lengths(layout, dilation) == expected


def test_sums_of_quotients(seed):
    for _ in range(300):
        count, step, offset, divisor = (random.randint(*limits) for limits in ((0, 60), (0, 60), (0, 99), (1, 50)))
        assert _floor_sum(count, step, offset, divisor) == sum((step * n + offset) // divisor for n in range(count))
        beyond = random.randint(-50, 50)
        residues = [(step * n + beyond) % divisor for n in range(offset, offset + count + 1)]
        assert _largest_residue(step, divisor, offset, count + 1, beyond) == max(residues)


def test_pairs_of_a_problem(seed):
    for _ in range(50):
        dilation = random.randint(1, 5)
        length, kernel_size, stride, is_causal = draw_axis()
        layout = length * dilation + random.randint(0, dilation - 1)
        pairs = 0
        for token in range(layout):
            group = token % dilation
            start, end = window_bounds(
                token // dilation, group_length(layout, dilation, group), kernel_size, stride, is_causal
            )
            pairs += end - start
        problem = Problem((layout, 3), 2, 8, (kernel_size, 2), (stride, 1), (dilation, 1), (is_causal, False))
        assert problem.pairs() == pairs * 6
        assert problem.flops(2) == 2 * 2 * 2 * pairs * 6 * 16


def test_known_counts_of_large_layouts():
    """With every key seen, and a window of all tokens, the numbers are simple."""
    tokens = 2**31
    assert Problem(tokens, 1, 8, tokens, is_causal=True).pairs() == tokens * (tokens + 1) // 2
    assert visible_pairs(tokens, 2**20) == tokens * 2**20
    assert visible_pairs(tokens, 2**20, is_causal=True) == tokens * 2**20 - 2**19 * (2**20 - 1)
    assert most_queries(tokens, 2**20 + 1) == 2**20 + 1 + 2**19
    assert widest_union(tokens, 2**20, 1, False, 64) == 2**20 + 63
