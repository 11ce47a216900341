"""`na_compiler.schedules.sm90.backward.fused`: its CUDA in the emulator, against the reference; planted faults; limits.

The emulator runs thread blocks one after another, so it sees a wrong turn as a deadlock or a wrong sum, but neither a
missing fence nor two blocks that add at once: `tests/gpu` asks for the same bits of runs on a GPU.
"""

from __future__ import annotations

import random
import re
import zlib

import pytest
from cuda_emulator import EmulatorError
from test_sm90_backward import _ORDERS, emulate

from na_compiler.problem import Problem
from na_compiler.schedules.sm90.backward.fused import adder, consumer, convert, work
from na_compiler.schedules.sm90.backward.fused.config import Sm90Fused

# Tiles of every rank that lie across each other, every order and walk that is not that of the axes, every parameter.
CASES = {
    "1d": (Problem(300, 1, 128, 129, dtype="bfloat16"), Sm90Fused((64,), (64,))),
    "1d stride": (Problem(420, 2, 128, 96, 16, dtype="float16"), Sm90Fused((64,), (64,), together=1)),
    "1d causal grouped": (Problem(300, 4, 128, 65, is_causal=True, heads_kv=2, dtype="bfloat16"),
                          Sm90Fused((64,), (64,), together=3)),
    "2d": (Problem((19, 37), 2, 128, (7, 9), dtype="bfloat16"), Sm90Fused((4, 16), (8, 8))),
    "2d stride": (Problem((24, 40), 1, 128, (12, 16), (4, 8), dtype="bfloat16"),
                  Sm90Fused((8, 8), (4, 16), order=(1, 0), walk=(1, 0))),
    "2d dilated causal": (Problem((31, 29), 1, 128, 7, (2, 1), (3, 2), (False, True), dtype="float16"),
                          Sm90Fused((4, 16), (8, 8), walk=(1, 0), together=2)),
    "3d": (Problem((5, 7, 17), 2, 128, (3, 5, 4), dtype="bfloat16"), Sm90Fused((2, 4, 8), (2, 4, 8))),
    "3d stride": (Problem((9, 10, 18), 1, 128, (9, 6, 8), (1, 3, 4), dtype="bfloat16"),
                  Sm90Fused((4, 4, 4), (2, 4, 8), order=(1, 2, 0), walk=(2, 0, 1))),
}  # fmt: skip
_SOME = 2


@pytest.fixture(autouse=True)
def _drawn(request, session_seed):
    """About half of the planted faults in a run, other ones in each: it is compiling them that takes long."""
    name = request.node.name
    is_one_of_many = name.startswith("test_finds") and not request.config.getoption("--full")
    if is_one_of_many and zlib.crc32(f"{session_seed} {name}".encode()) % 2:
        pytest.skip("not drawn in this run: --full runs all")


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(name, seed):
    problem, config = CASES[name]
    emulate(problem, config)


@pytest.mark.parametrize("number", range(_SOME))
def test_some_match_the_reference(number, session_seed, seed):
    """Some of the cases, other ones in each run, in one of the orders, of one batch entry or two."""
    name = random.Random(session_seed).sample(sorted(CASES), _SOME)[number]
    print(name)
    problem, config = CASES[name]
    emulate(problem, config, orders=[random.choice(_ORDERS)], batch=random.choice((1, 2)))


# ---------------------------------------------------------------------------------------------- planted faults
_SMALL = CASES["1d"]


def _finds(problem, config, **options):
    """Whether the emulator or the comparison finds a fault; returns what it says."""
    with pytest.raises((EmulatorError, AssertionError)) as found:
        emulate(problem, config, **options)
    assert "was not planted" not in str(found.value)
    return str(found.value)


def test_finds_a_wrong_turn(monkeypatch, seed):
    """A block that waits for one more than there are before it."""
    before = work.FusedWork.before
    monkeypatch.setattr(work.FusedWork, "before", lambda self, cursor: before(self, cursor) + 1)
    assert "deadlock" in _finds(*_SMALL, orders=_ORDERS[:1])


def test_finds_tiles_taken_in_another_order(monkeypatch, seed):
    """Numbers along the axes as they are, while turns count them by other axes."""
    monkeypatch.setattr(work, "_tile_of_number", lambda plan, number: number)
    assert "deadlock" in _finds(*CASES["2d stride"], orders=_ORDERS[:1])


def test_finds_a_turn_that_is_not_passed_on(seed):
    def edit(text):
        return re.sub(r"tvm_builtin_ptx_red_release_gpu_global_add_u32\([^;]*\);", ";", text)

    assert "deadlock" in _finds(*_SMALL, edit=edit, orders=_ORDERS[:1])


def test_finds_a_part_that_replaces_those_before(seed):
    """The first one is stored, and all others must be added."""
    found = r"cp_reduce_async_bulk_s2g_reduce_async_bulk_global_shared__cta_bulk_group_add_f32\("
    name = "cp_async_bulk_s2g_async_bulk_global_shared__cta_bulk_group("
    _finds(
        *_SMALL, edit=lambda text: re.sub(rf"(?<=tvm_builtin_ptx_){found}(?=[^;]*;)", name, text), orders=_ORDERS[:1]
    )


@pytest.mark.parametrize("name", ["part", "part_empty"])
def test_finds_a_missing_wait_for_a_part(name, monkeypatch, seed):
    block = adder.FusedBlock
    wait = block.wait
    monkeypatch.setattr(block, "wait", lambda self, which, *rest: which == name or wait(self, which, *rest))
    _finds(*_SMALL)


def test_finds_a_copy_that_is_not_waited_for(seed):
    """Shared memory given back while the copy still reads it."""
    name = "tvm_builtin_ptx_cp_async_bulk_wait_group_async_bulk_wait_group_read_0();"
    _finds(*_SMALL, edit=lambda text: text.replace(name, ";"), orders=_ORDERS[1:])


def test_finds_warpgroups_that_do_not_meet(monkeypatch, seed):
    """Gradients of scores read before the other warpgroup has written them."""
    monkeypatch.setattr(consumer.FusedConsumer, "_meet", lambda self: None)
    _finds(*_SMALL)


def test_finds_parts_in_another_order_of_registers(monkeypatch, seed):
    monkeypatch.setattr(convert, "_pairs", lambda half: [8 * half + i for i in range(8)])
    _finds(*_SMALL, orders=_ORDERS[:1])


# ---------------------------------------------------------------------------------------------- limits
_PROBLEM = Problem((19, 37), 2, 128, (7, 9), dtype="bfloat16")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"head_dim": 64}, "takes 128 as head_dim, not 64 and 128"),
        ({"head_dim_v": 64}, "takes 128 as head_dim, not 128 and 64"),
        ({"dtype": "float32"}, "not float32"),
        ({"additional_kv": True}, "additional keys"),
    ],
)
def test_names_what_it_does_not_take(changed, named):
    given = {"layout": (19, 37), "heads": 2, "head_dim": 128, "kernel_size": (7, 9), "head_dim_v": 128,
             "dtype": "bfloat16", **changed}  # fmt: skip
    with pytest.raises(NotImplementedError, match=named):
        Sm90Fused((4, 16), (8, 8)).plan(Problem(**given))


@pytest.mark.parametrize(
    ("choices", "named"),
    [
        ({"key_tile": (4, 8)}, r"key_tile must be a box of 64 .* as \(1, 64\), got \(4, 8\)"),
        ({"query_tile": (64,)}, r"query_tile must be a box of 64 .* got \(64,\)"),
        ({"query_tile": (16, 4)}, "query_tile must have a multiple of 8 tokens"),
        ({"order": (1, 1)}, r"order must name each of 2 axes once, as \(0, 1\), or none, got \(1, 1\)"),
        ({"walk": (1,)}, "walk must name each"),
        ({"stages": 3}, "stages=3, slopes=2 and parts=2 need 264336 bytes of shared memory, of which there are 232448"),
        ({"parts": 0}, "parts must be between 1 and 3"),
        ({"together": 0}, "together must be at least 1, got 0"),
    ],
)
def test_names_a_choice_that_is_none(choices, named):
    with pytest.raises(ValueError, match=named):
        Sm90Fused(**{"key_tile": (4, 16), "query_tile": (8, 8), **choices}).plan(_PROBLEM)
