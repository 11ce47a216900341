"""Parts of random layouts: places, with the ranges of queries and keys that tensors hold there."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch

from na_compiler.place import Place
from na_compiler.problem import Problem
from na_compiler.window import WRAP, group_length, window_bounds

# The parameters of the rule, each by itself and mixed; layouts are drawn.
PROBLEMS = [
    Problem(40, 2, 16, 7),
    Problem(300, 2, 16, 33, stride=5),
    Problem(96, 2, 16, 8, dilation=3),
    Problem(64, 2, 16, 9, is_causal=True),
    Problem(64, 2, 16, 10, 4, 2, is_causal=True),
    Problem(64, 4, 16, 6, 6, heads_kv=2, head_dim_v=24),
    Problem(60, 2, 20, 1),
    Problem((28, 28), 2, 32, 7),
    Problem((28, 28), 2, 32, 7, dilation=(2, 3)),
    Problem((28, 28), 2, 16, (5, 8), (2, 3), is_causal=(True, False)),
    Problem((28, 28), 2, 16, (1, 4), dilation=(4, 1), is_causal=(False, True)),
    Problem((24, 24), 2, 20, 13),
    Problem((20, 20), 2, 16, 5, dilation=4, dtype="bfloat16"),
    Problem((8, 9, 10), 2, 16, (3, 4, 5)),
    Problem((8, 9, 10), 2, 16, 3, dilation=(1, 2, 2), is_causal=(True, False, False)),
    Problem((8, 9, 10), 2, 16, (2, 3, 4), (2, 1, 3)),
    Problem((28, 28), 4, 32, 7, additional_kv=True),
]
_LARGEST = {1: 300, 2: 34, 3: 11}


@dataclass
class Part:
    """A place, and which tokens of the whole the tensors hold there."""

    place: Place
    queries: tuple[slice, ...]
    keys: tuple[Any, ...]

    def of_queries(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[(slice(None), *self.queries)]

    def of_keys(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keys that lie between NaN, which whoever reads around them finds; where windows wrap a copy of them."""
        if not all(isinstance(axis, slice) for axis in self.keys):
            for axis, tokens in enumerate(self.keys, 1):
                chosen = tokens if isinstance(tokens, torch.Tensor) else torch.arange(tensor.shape[axis])[tokens]
                tensor = tensor.index_select(axis, chosen)
            return tensor
        index = (slice(None), *self.keys)
        between = torch.full_like(tensor, math.nan)
        between[index] = tensor[index]
        return between[index]


def seen(problem: Problem, axis: int, tokens: range) -> list[int]:
    """Return the keys along an axis that any of some queries sees, by the rule, one by one."""
    extent, dilation = problem.layout[axis], problem.dilation[axis]
    found: set[int] = set()
    for token in tokens:
        group = token % dilation
        rule = (problem.kernel_size[axis], problem.stride[axis], problem.is_causal[axis], problem.border[axis])
        start, end = window_bounds(token // dilation, group_length(extent, dilation, group), *rule)
        found |= {group + dilation * index for index in range(start, end)}
    return sorted(found)


def draw_layout(problem: Problem) -> Problem:
    """Return the problem for a layout from the smallest one on."""
    least = [kernel * dilation for kernel, dilation in zip(problem.kernel_size, problem.dilation, strict=True)]
    most = _LARGEST[problem.rank]
    return problem.replace(layout=[random.randint(low, max(low, random.choice((low + 3, most)))) for low in least])


def draw_part(problem: Problem) -> Part:
    """Return a random part: few queries or many, and keys that are just enough, or more."""
    queries, keys, first_keys = [], [], []
    for axis, extent in enumerate(problem.layout):
        count = random.choice((1, random.randint(1, extent), extent))
        first = random.randint(0, extent - count)
        queries.append(slice(first, first + count))
        needed = seen(problem, axis, range(first, first + count))
        low, high = needed[0], needed[-1] + 1
        is_tight = random.random() < 0.5
        if problem.border[axis] == WRAP:
            high = min(high, low + extent) if is_tight else low + extent
            keys.append(torch.arange(low, high) % extent)
            first_keys.append(low % extent)
            continue
        if not is_tight:
            low, high = random.randint(0, low), random.randint(high, extent)
        keys.append(slice(low, high))
        first_keys.append(low)
    return Part(Place(problem.layout, [one.start for one in queries], first_keys), tuple(queries), tuple(keys))
