"""Steps of schedules are known by the names of their blocks: each name by one list or step, and none left over."""

import contextlib

import pytest

pytest.importorskip("tvm")

from na_compiler.compiler.build import lowered
from na_compiler.compiler.spec import KernelSpec
from na_compiler.problem import Problem
from na_compiler.schedules.cpu import backward, forward, tangent
from na_compiler.schedules.cpu import schedule as cpu
from na_compiler.schedules.simt import backward as direct_backward
from na_compiler.schedules.simt import forward as direct_forward
from na_compiler.schedules.simt import schedule as simt
from na_compiler.schedules.simt import tangent as direct_tangent

# Together they have every block that there is: ragged groups, padded rows, chunks, additional keys, masks on all axes,
# biases by relative position and a key mask.
_PROBLEMS = (
    Problem((30, 29), 4, 40, (7, 5), (2, 1), (1, 3), (False, True), additional_kv=True, heads_kv=2, head_dim_v=24),
    Problem(2100, 1, 64, 2001, is_causal=True),
    Problem((8, 9, 10), 2, 7, 3, is_causal=True, dtype="float16"),
    Problem((9, 10), 2, 8, 3, operands=("relative_position_bias", "key_mask")),
    # A table of biases that is not spread over lanes.
    Problem((70, 75), 1, 8, (69, 70), operands=("relative_position_bias",)),
)
# For CPUs also those of an open layout.
_OPEN = (Problem((None, None), 2, 8, 3),)
_LISTS = {"_ROWS": simt._ROWS, "_LAST": simt._LAST, "_FIRST": simt._FIRST, "_EACH": simt._EACH}


def _lower(target):
    for problem in _PROBLEMS + (_OPEN if target.startswith("llvm") else ()):
        for direction in ("forward", "backward", "tangent"):
            if direction != "tangent" or not problem.operands:  # Which have no tangents.
                lowered(KernelSpec.make(problem, target, direction))


def _seen(module, monkeypatch, target):
    """Return the names that the steps of all problems have."""
    seen, steps = set(), module.steps

    def watched(schedule):
        found = steps(schedule)
        seen.update(schedule.get(block).name_hint for block in found)
        return found

    monkeypatch.setattr(module, "steps", watched)
    _lower(target)
    return seen


def test_every_name_of_a_list_is_that_of_a_block(monkeypatch):
    assert sum(map(len, _LISTS.values())) == len(set().union(*_LISTS.values())), "a name is in two lists"
    assert simt._LONG <= simt._FIRST | simt._EACH
    seen = _seen(simt, monkeypatch, "cuda:sm_80")
    assert {name.removeprefix("additional_").removeprefix("strip_") for name in seen} == set().union(*_LISTS.values())


def test_every_name_of_what_stays_as_it_is_is_that_of_a_block(monkeypatch):
    seen = _seen(cpu, monkeypatch, "llvm:x86-64-v3")
    assert {name.removeprefix("additional_") for name in seen} >= cpu._AS_WRITTEN


@pytest.mark.parametrize(
    ("target", "module", "kind", "name", "direction"),
    [
        ("llvm:x86-64-v3", forward, "block", "inverse", "forward"),
        ("llvm:x86-64-v3", forward, "reduction", "total", "forward"),
        ("llvm:x86-64-v3", backward, "block", "query_store", "backward"),
        ("llvm:x86-64-v3", tangent, "block", "tangent_weight", "tangent"),
        ("cuda:sm_80", direct_forward, "block", "lse", "forward"),
        ("cuda:sm_80", direct_tangent, "block", "tangent_seen", "tangent"),
        ("cuda:sm_80", direct_backward, "block", "slope", "backward"),
    ],
)
def test_a_renamed_block_is_an_error_that_names_it(monkeypatch, target, module, kind, name, direction):
    original = getattr(module, kind)

    @contextlib.contextmanager
    def renamed(given, *arguments, **options):
        with original("another" if given == name else given, *arguments, **options) as iterators:
            yield iterators

    monkeypatch.setattr(module, kind, renamed)
    with pytest.raises(ValueError, match=rf"\b({name}|'?another'?)\b"):
        lowered(KernelSpec.make(_PROBLEMS[0], target, direction))


def test_a_step_that_no_longer_claims_its_block_is_an_error(monkeypatch):
    monkeypatch.setattr(cpu._Steps, "store", lambda *_: None)
    with pytest.raises(ValueError, match="no step of the schedule for CPUs claims the blocks output"):
        lowered(KernelSpec.make(_PROBLEMS[0], "llvm:x86-64-v3"))
