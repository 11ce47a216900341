"""Windows that are cut or wrap, on mma.sync: forward and backward in the emulator, against the reference."""

from __future__ import annotations

import itertools

import pytest
from border_problems import BIAS, MASK
from cuda_emulator import ORDERS, EmulatorError
from draws import some
from test_mma import emulate as emulate_forward
from test_mma_backward import TARGET, emulate
from test_mma_backward import _config as config_of

from na_compiler.problem import Problem
from na_compiler.schedules.choose import choose
from na_compiler.schedules.mma.backward import planner as backward_planner
from na_compiler.schedules.mma.config import Mma
from na_compiler.schedules.mma.planner import candidates
from na_compiler.schedules.shared import key_mask, work

BF16, FP16 = "bfloat16", "float16"
# A problem, a warp's box, the warps, and the tile of a ring; all keys are kept as well, in both directions.
CASES = {
    "2d": (Problem((19, 23), 2, 32, (7, 5), dtype=BF16, border="cut"), (4, 4), (2, 1), (4, 8)),
    "2d bias mask": (
        Problem((13, 18), 2, 32, (7, 6), dtype=FP16, border="cut", operands=(BIAS, MASK)), (4, 4), (1, 2), (2, 8)),
    "left": (
        Problem((13, 14), 2, 32, (5, 7), 1, (2, 1), dtype=BF16, border=("cut", "cut:2"), operands=(BIAS,)),
        (4, 4), (1, 2), (2, 8)),
    "stride causal": (
        Problem((24, 21), 1, 32, 9, (4, 5), 1, (True, False), dtype=FP16, border=("shift", "cut")),
        (2, 8), (2, 1), (4, 8)),
    "1d": (Problem(200, 1, 32, 65, dtype=BF16, border="cut"), (16,), (2,), (32,)),
    "1d ahead": (
        Problem(150, 2, 16, 40, dtype=FP16, border="cut:0", heads_kv=1, operands=(MASK,)), (16,), (2,), (32,)),
    "longer than the layout": (
        Problem(20, 2, 16, 50, dtype=BF16, border="cut", operands=(BIAS, MASK)), (16,), (2,), (32,)),
    "chunks": (
        Problem(37, 2, 16, 64, 64, is_causal=True, dtype=BF16, border="cut", additional_kv=True), (16,), (2,), (32,)),
    "3d": (
        Problem((7, 6, 9), 2, 16, (9, 3, 4), (1, 3, 1), (1, 1, 2), dtype=BF16, border="cut"),
        (2, 2, 4), (2, 1, 1), (2, 2, 8)),
    "wrap": (Problem((12, 20), 2, 32, (7, 5), dtype=BF16, border="wrap"), (4, 4), (2, 1), (4, 8)),
    "wrap bias mask": (
        Problem((10, 16), 2, 32, (5, 9), (2, 1), dtype=FP16, border="wrap", operands=(BIAS, MASK)),
        (4, 4), (1, 2), (2, 8)),
    "wrap and cut": (
        Problem((12, 14), 4, 16, (5, 7), (1, 3), (2, 1), heads_kv=2, additional_kv=True, dtype=BF16,
                border=("wrap", "cut"), operands=(MASK,)),
        (4, 4), (1, 2), (2, 8)),
    "1d wrap": (Problem(96, 1, 32, 61, 4, dtype=BF16, border="wrap", operands=(BIAS,)), (16,), (2,), (32,)),
    "all of a circle": (Problem(20, 2, 16, 20, dtype=FP16, border="wrap", operands=(BIAS, MASK)), (16,), (2,), (16,)),
    "3d wrap": (
        Problem((6, 6, 9), 2, 16, (5, 3, 4), dtype=BF16, border=("wrap", "shift", "wrap"), operands=(MASK,)),
        (2, 2, 4), (2, 1, 1), (2, 2, 8)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "is_ring"), some([(name, ring) for name in CASES for ring in (False, True)], 2, "cut forward")
)
def test_forward(name, is_ring, seed):
    problem, warp_box, warps, tile = CASES[name]
    emulate_forward(problem, Mma(warp_box, warps, tile if is_ring else None), orders=ORDERS[:1])


@pytest.mark.parametrize(
    ("name", "is_ring"), some([(name, ring) for name in CASES for ring in (False, True)], 2, "cut backward")
)
def test_backward(name, is_ring, seed):
    problem, warp_box, warps, tile = CASES[name]
    emulate(problem, config_of(warp_box, warps, *([tile] * 2 if is_ring else []), stages=2))


@pytest.mark.parametrize("name", some(CASES, 1, "cut planned"))
def test_planned_configs(name, seed):
    problem = CASES[name][0]
    emulate_forward(problem, candidates(problem, TARGET.shared_memory, 1)[0].config, orders=ORDERS[:1])
    emulate(problem, backward_planner.candidates(problem, TARGET.shared_memory, 1)[0].config, orders=ORDERS[1:])


def test_finds_windows_that_are_not_cut(monkeypatch, seed):
    """Taken for as long as the others they would reach beyond an end."""
    monkeypatch.setattr(work.Work, "extent", lambda self, axis: self.plan.problem.kernel_size[axis])
    with pytest.raises(AssertionError, match=r"relative error|not finite"):
        emulate_forward(Problem(60, 1, 16, 9, dtype=BF16, border="cut"), Mma((16,), (2,), None), orders=ORDERS[:1])


def test_finds_copies_that_do_not_go_around(monkeypatch, seed):
    monkeypatch.setattr(work.Work, "wraps", False)
    with pytest.raises((AssertionError, EmulatorError)):
        emulate_forward(Problem(64, 1, 16, 9, dtype=BF16, border="wrap"), Mma((16,), (2,), None), orders=ORDERS[:1])


def _straight(self, position):
    """Return the byte at a position that is not taken modulo the axis."""
    return key_mask.T.Cast("int32", self._flat[key_mask.index64(position[0] * self._steps[0])])


def test_finds_a_key_mask_that_does_not_go_around(monkeypatch, seed):
    monkeypatch.setattr(key_mask.MaskBytes, "at", _straight)
    problem = Problem(64, 2, 16, 9, dtype=BF16, border="wrap", operands=(MASK,))
    with pytest.raises((AssertionError, EmulatorError)):
        emulate_forward(problem, Mma((16,), (2,), None), orders=ORDERS[:1])


def test_is_chosen():
    problem = Problem((56, 56), 4, 32, 7, dtype=FP16)
    for border, direction in itertools.product((("cut", "shift"), ("cut:1", "wrap")), ("forward", "backward")):
        assert choose(problem.replace(border=border), TARGET, direction).config.family == "mma"
