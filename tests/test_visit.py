"""What families say that they visit is what their kernels visit."""

import functools
import itertools
import random

import pytest

from na_compiler import Problem
from na_compiler.reference import neighborhood_mask
from na_compiler.schedules.choose import choose, family_of
from na_compiler.schedules.cpu.visit import visit as cpu_visit
from na_compiler.schedules.shared.visit import Visit, window_of
from na_compiler.target import Target

PROBLEMS = [
    Problem((20, 28), 1, 64, (7, 9), dtype="bfloat16"),
    Problem((21, 30), 1, 64, (5, 6), dilation=(2, 3), is_causal=(True, False), dtype="bfloat16"),
    Problem(150, 1, 64, 33, stride=8, dtype="bfloat16"),
    Problem((9, 10, 11), 1, 64, (5, 3, 4), stride=(1, 2, 1), is_causal=(False, False, True), dtype="bfloat16"),
    Problem((4, 300), 1, 64, (3, 200), dtype="bfloat16"),
    Problem((20, 28), 1, 64, (7, 40), dtype="bfloat16", border="cut"),
]
TARGETS = ["llvm:x86-64-v4", "llvm:x86-64-v3", "cuda:sm_90a", "cuda:sm_80"]


def visits_of(problem, target, direction="forward"):
    config = choose(problem, Target.parse(target), direction).config
    return functools.partial(family_of(config).visit, problem, config)


def test_windows_are_those_of_the_reference(seed):
    for problem in PROBLEMS:
        mask = neighborhood_mask(problem)
        places = list(itertools.product(*map(range, problem.layout)))
        for number in random.sample(range(problem.tokens), 20):
            seen = {place for place, is_seen in zip(places, mask[number].tolist(), strict=True) if is_seen}
            windows = [window_of(problem, axis, place) for axis, place in enumerate(places[number])]
            assert set(itertools.product(*windows)) == seen


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_a_visit_has_every_key_of_its_queries(problem, target, direction, seed):
    """And each pair once, counted as the window rule counts them."""
    visit = visits_of(problem, target, direction)
    mask = neighborhood_mask(problem)
    numbers = {place: number for number, place in enumerate(itertools.product(*map(range, problem.layout)))}
    for place in random.sample(list(numbers), 12):
        found = visit(place)
        keys = list(found.visited())
        queries = list(itertools.product(*found.queries))
        assert place in queries
        assert len(set(keys)) == len(keys)
        assert found.pairs() == len(keys) * len(queries)
        rows = mask[[numbers[query] for query in queries]]
        assert rows.sum() == found.needed(problem)
        counts = rows.sum(0)
        assert {key: int(counts[numbers[key]]) for key in keys} == found.seen(problem)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_visits_cut_the_layout_into_tiles(problem, target, direction):
    visit = visits_of(problem, target, direction)
    found: dict[Visit, None] = {}
    for place in itertools.product(*map(range, problem.layout)):
        found[visit(place)] = None
    assert sum(len(list(itertools.product(*one.queries))) for one in found) == problem.tokens


def test_a_cpu_tile_is_where_the_description_puts_it(seed):
    """The same in integers as the TensorIR of `places`."""
    pytest.importorskip("tvm")
    from tvm import sym

    from na_compiler.schedules.cpu.places import AxisPlaces

    simplify = sym.Analyzer().simplify
    for problem in PROBLEMS[:3]:
        config = choose(problem, Target.parse("llvm:x86-64-v4"), "forward").config
        plan = config.plan(problem)
        for place in [tuple(map(random.randrange, problem.layout)) for _ in range(10)]:
            found = cpu_visit(plan, place)
            for axis, token, queries, keys in zip(
                plan.axes[-problem.rank :], place, found.queries, found.keys[0], strict=True
            ):
                if axis.chunks > 1:
                    continue
                places = AxisPlaces(axis)
                group, index = token % axis.dilation, token // axis.dilation
                tile = index % axis.strip // axis.tile
                strip = places.strip(group * axis.strips + index // axis.strip)
                at = lambda value: int(simplify(value))  # noqa: E731
                assert at(strip.query_token(places.query(strip, tile, 0))) == queries[0]
                first = places.tile_offset(strip, tile)
                assert at(places.key(strip, first)) == keys[0]
                assert at(places.key(strip, first + axis.visited - 1)) == keys[-1]
