"""`na_compiler.schedules.sm90.backward.fused`: its CUDA in the emulator, against the reference."""

from __future__ import annotations

import pytest
from test_sm90_backward import emulate

from na_compiler.problem import Problem
from na_compiler.schedules.sm90.backward.fused.config import Sm90Fused

CASES = {
    "1d": (Problem(300, 1, 128, 129, dtype="bfloat16"), Sm90Fused((64,), (64,))),
    "1d stride": (Problem(420, 2, 128, 96, 16, dtype="float16"), Sm90Fused((64,), (64,), together=1)),
    "2d": (Problem((19, 37), 2, 128, (7, 9), dtype="bfloat16"), Sm90Fused((4, 16), (8, 8))),
    "2d stride": (Problem((24, 40), 1, 128, (12, 16), (4, 8), dtype="bfloat16"), Sm90Fused((8, 8), (4, 16))),
    "3d": (Problem((5, 7, 17), 2, 128, (3, 5, 4), dtype="bfloat16"), Sm90Fused((2, 4, 8), (2, 4, 8))),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(name, seed):
    problem, config = CASES[name]
    emulate(problem, config)
