"""Seeded draws of parameters: some of them in each run, another few in the next, and all with ``--full``."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["some"]


def some(parameters: Iterable[Any], count: int, name: str) -> list[Any]:
    """Return parameters for ``pytest.mark.parametrize``; all but ``count`` of them are marked as full.

    Parameters
    ----------
    parameters
        All of them; tuples where a test has several.
    count
        How many are drawn by the session's seed, which the report's header prints.
    name
        Of the test, so that each has a draw of its own.
    """
    everything = list(parameters)
    seed = int(os.environ["NA_COMPILER_TEST_SEED"])
    drawn = set(random.Random(f"{seed} {name}").sample(range(len(everything)), min(count, len(everything))))
    marks = [() if number in drawn else (pytest.mark.full,) for number in range(len(everything))]
    return [
        pytest.param(*(values if isinstance(values, tuple) else (values,)), marks=mark)
        for values, mark in zip(everything, marks, strict=True)
    ]
