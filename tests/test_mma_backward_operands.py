"""The backward on mma.sync with a bias by relative position and a key mask: emulated; planted faults; plans."""

from __future__ import annotations

import itertools
import random

import oracle
import pytest
import torch
from cuda_emulator import ORDERS, Emulator, EmulatorError
from draws import some
from oracle import check_backward, draw
from test_mma_backward import _ARGUMENTS as ARGUMENTS
from test_mma_backward import CASES, TARGET, differentiate, emulate
from test_mma_backward import _config as config_of

from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem
from na_compiler.schedules.choose import choose
from na_compiler.schedules.mma.backward import bias, lists, planner
from na_compiler.schedules.mma.backward.config import MmaBackward
from na_compiler.schedules.mma.backward.plan import SweepPlan
from na_compiler.target import Target

BIAS, MASK = ("relative_position_bias",), ("key_mask",)
# Half a minute to two each.
HEAVY = ("additional 3d grouped ring", "head_dim 256", "2d grouped ring", "additional head_dim 256")
# Dilation groups of other lengths, so that there are blocks without queries, and queries beyond the end.
RAGGED = Problem(50, 2, 16, 5, 1, 3, dtype="bfloat16"), config_of((16,), (1,))
_EACH = itertools.product([name for name in CASES if name not in HEAVY], [BIAS, MASK, BIAS + MASK])


@pytest.mark.parametrize(
    ("name", "operands"),
    [
        *some(_EACH, 2, "mma backward operands"),
        *(pytest.param(name, BIAS + MASK, marks=pytest.mark.full) for name in HEAVY),
    ],
)
def test_matches_the_reference(name, operands, seed):
    problem, config = CASES[name]
    emulate(problem.replace(operands=operands), config, **ARGUMENTS.get(name, {}))


@pytest.mark.parametrize("operands", some([(BIAS,), (MASK,), (BIAS + MASK,)], 1, "ragged"))
def test_blocks_without_queries(operands, seed):
    """Their parts of the gradient of biases are 0."""
    problem, config = RAGGED
    emulate(problem.replace(operands=operands), config, orders=[random.choice(ORDERS)], batch=2)


@pytest.mark.parametrize("tables", [1, 2, 4])
def test_any_number_of_tables(tables, monkeypatch, seed):
    """Of a warp, for four lanes that meet a row's keys at once: where they are fewer lanes wait for their turn."""
    monkeypatch.setattr(SweepPlan, "bias_tables", tables)
    problem = Problem(30, 1, 8, 7, dtype="bfloat16", operands=BIAS)
    emulate(problem, config_of((16,), (2,)), orders=ORDERS[:1])


def _apart(self, places, sees, eight, e):
    """Add to sums, of which all lanes read theirs before any is written, as lanes of a GPU may."""
    totals = self._totals(places, eight, e)
    self.block.sync_warp()
    self._write(places, sees, totals)


def test_lanes_add_to_other_sums(monkeypatch, seed):
    """The same bits, whether lanes come one after another or all at once, and whichever warp runs first."""
    problem, config = Problem((9, 12), 2, 16, (5, 3), dtype="float16", operands=BIAS + MASK), config_of((4, 4), (2, 1))
    spec, example, found = KernelSpec(problem, "backward", TARGET, config), draw(problem, batch=2), []
    for order in ORDERS:
        emulator = Emulator.of(spec)
        found.append(differentiate(emulator, problem, config, example, order=order))
        monkeypatch.setattr(bias.BiasSums, "_add", _apart)
    check_backward(example, found[0])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_hidden_keys(monkeypatch, seed):
    """They have no gradients and no influence, however large they are; queries that see none have no gradients."""
    problem, config = Problem(90, 1, 16, 33, dtype="bfloat16", operands=MASK), config_of((16,), (2,), chunk=1)
    emulator = Emulator.of(KernelSpec(problem, "backward", TARGET, config))
    mask = torch.zeros(4, 90, dtype=torch.bool)
    mask[1], mask[2, :20], mask[3] = True, True, torch.rand(90) < 0.2
    monkeypatch.setattr(oracle, "draw_others", lambda *given: {"key_mask": mask})
    example = draw(problem, batch=4)
    _, key, value = example.inputs
    key[~mask], value[~mask] = 3e38, -3e38
    grads = differentiate(emulator, problem, config, example, order=random.choice(ORDERS))
    check_backward(example, grads)
    blind = example.lse.isneginf()
    assert blind[0].all()
    assert blind[2].any()
    assert grads[0][blind].eq(0).all()
    assert grads[1][~mask].eq(0).all()
    assert grads[2][~mask].eq(0).all()


@pytest.mark.parametrize("name", some(["relative_position_bias", "key"], 1, "not finite with a bias"))
def test_numbers_that_are_not_finite(name, seed):
    problem = Problem(40, 1, 16, 9, dtype="bfloat16", operands=BIAS + MASK)
    spoiled = {name: random.choice([float("nan"), float("inf")])}
    emulate(problem, config_of((16,), (2,)), orders=ORDERS[:1], spreads=True, spoiled=spoiled)


# ---------------------------------------------------------------------------------------------- planted faults
_SMALL = Problem((9, 13), 1, 16, (5, 3), dtype="bfloat16"), config_of((4, 4), (2, 1))


def _finds(operands, case=_SMALL, **options):
    with pytest.raises((EmulatorError, AssertionError)) as found:
        emulate(case[0].replace(operands=operands), case[1], orders=ORDERS[:1], **options)
    return str(found.value)


def test_fault_free_is_right(seed):
    emulate(_SMALL[0].replace(operands=BIAS + MASK), _SMALL[1])


def test_finds_queries_beyond_the_end(monkeypatch, seed):
    """Their gradients are not stored, but would be added to those of biases."""
    init = lists.WindowLists.__init__

    def everybody(self, block, rows, work):
        with monkeypatch.context() as inner:
            inner.setattr(type(work), "within", lambda *given: None)
            init(self, block, rows, work)

    monkeypatch.setattr(lists.WindowLists, "__init__", everybody)
    assert "grad_relative_position_bias" in _finds(BIAS)


@pytest.mark.parametrize("axis", some([0, 1], 1, "places"))
def test_finds_a_wrong_place(axis, monkeypatch, seed):
    right = lists.steps_of
    monkeypatch.setattr(
        lists, "steps_of", lambda problem: [step + (i == axis) for i, step in enumerate(right(problem))]
    )
    _finds(BIAS)


def test_finds_a_table_that_lanes_share(monkeypatch, seed):
    """Whoever reads a sum before another lane has written it loses that one's part."""
    monkeypatch.setattr(bias.BiasSums, "_add", _apart)
    init = bias.BiasSums.__init__

    def shared(self, products):
        init(self, products)
        self._table = self._own

    monkeypatch.setattr(bias.BiasSums, "__init__", shared)
    assert "grad_relative_position_bias" in _finds(BIAS)


def test_finds_sums_that_are_not_cleared(monkeypatch, seed):
    monkeypatch.setattr(bias.BiasSums, "clear", lambda self: None)
    _finds(BIAS)


def test_finds_sums_read_before_all_warps_are_done(monkeypatch, seed):
    store = bias.BiasSums.store

    def at_once(self, item):
        with monkeypatch.context() as inner:
            inner.setattr(self.block, "sync", lambda: None)
            store(self, item)

    monkeypatch.setattr(bias.BiasSums, "store", at_once)
    assert "grad_relative_position_bias" in _finds(BIAS)


def test_finds_keys_that_are_shown(monkeypatch, seed):
    monkeypatch.setattr(lists.WindowLists, "_fill_hidden", lambda self, low: None)
    _finds(MASK)


def test_finds_another_key_hidden(monkeypatch, seed):
    at = lists.MaskBytes.at
    monkeypatch.setattr(lists.MaskBytes, "at", lambda self, position: at(self, [position[0], position[1] ^ 1]))
    _finds(MASK, (_SMALL[0].replace(layout=(9, 14)), _SMALL[1]))


# ---------------------------------------------------------------------------------------------- plans
@pytest.mark.parametrize("operands", [BIAS, MASK, BIAS + MASK])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_120"])
def test_is_chosen(operands, architecture):
    target = Target.parse(f"cuda:{architecture}")
    for problem in (Problem((56, 56), 4, 32, 7, dtype="float16"), Problem((64, 64), 8, 64, 13, dtype="bfloat16")):
        config = choose(problem.replace(operands=operands), target, "backward").config
        assert isinstance(config, MmaBackward)
        assert config.plan(problem.replace(operands=operands)).shared_bytes <= target.shared_memory


def test_says_which_tables_are_too_large():
    problem = Problem((128, 128), 4, 32, 63, dtype="float16", operands=BIAS)
    assert "at most 8192 biases a head in the backward, not 15625" in choose(problem, TARGET, "backward").reason
    assert planner.unsuited(problem.replace(kernel_size=45)) is None
