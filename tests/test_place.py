"""`na_compiler.place`, and the rule for a part of a layout in `counting` and `reference`."""

import random

import pytest
import torch
from border_problems import PROBLEMS as BORDERED
from place_draws import PROBLEMS, draw_layout, draw_part, seen

from na_compiler import Place
from na_compiler.counting import keys_needed
from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_attention
from na_compiler.schedules.choose import choose
from na_compiler.target import Target
from na_compiler.window import group_range


def parameters(problem):
    return {name: getattr(problem, name) for name in ("kernel_size", "stride", "dilation", "is_causal", "border")}


def test_ranges_of_dilation_groups(seed):
    for _ in range(200):
        dilation, first, count = random.randint(1, 7), random.randint(0, 30), random.randint(0, 30)
        for group in range(dilation):
            held = [token // dilation for token in range(first, first + count) if token % dilation == group]
            begin, end = group_range(first, count, dilation, group)
            assert list(range(begin, end)) == held


@pytest.mark.parametrize("problem", [*PROBLEMS, *BORDERED], ids=str)
def test_keys_needed_are_those_that_windows_reach(problem, seed):
    for _ in range(10):
        if problem.border[0] == "shift" and not problem.has_borders:
            problem = draw_layout(problem)
        for axis, extent in enumerate(problem.layout):
            first = random.randrange(extent)
            count = random.randint(1, extent - first)
            keys = seen(problem, axis, range(first, first + count))
            rule = (problem.kernel_size, problem.stride, problem.dilation, problem.is_causal, problem.border)
            found = keys_needed(extent, first, count, *(values[axis] for values in rule))
            assert found == (keys[0], keys[-1] + 1)


@pytest.mark.parametrize("problem", [*PROBLEMS, *(one for one in BORDERED if not one.operands)], ids=str)
def test_parts_of_the_reference_are_the_whole(problem, seed):
    """Also between NaN, with a bias by relative position and a key mask."""
    if not problem.has_borders:
        problem = draw_layout(problem)
    tokens = (2, *problem.layout)
    query = torch.randn(*tokens, 2, 3, dtype=torch.float64)
    key, value = torch.randn(*tokens, 1, 3, dtype=torch.float64), torch.randn(*tokens, 1, 5, dtype=torch.float64)
    mask = torch.rand(tokens) < 0.8
    bias = torch.randn(2, *(2 * extent - 1 for extent in problem.kernel_size), dtype=torch.float64)
    named = {"relative_position_bias": None if any(":" in border for border in problem.border) else bias}
    whole = neighborhood_attention(query, key, value, **parameters(problem), key_mask=mask, **named)
    for _ in range(3):
        part = draw_part(problem)
        held = part.of_keys(mask.double()).bool()
        found = neighborhood_attention(
            part.of_queries(query), part.of_keys(key), part.of_keys(value), **parameters(problem), key_mask=held,
            place=part.place, **named,
        )  # fmt: skip
        for result, expected in zip(found, whole, strict=True):
            torch.testing.assert_close(result, part.of_queries(expected))


def test_a_key_too_few_is_refused_with_the_numbers(seed):
    for _ in range(60):
        problem = draw_layout(random.choice(PROBLEMS))
        part = draw_part(problem)
        axis = random.randrange(problem.rank)
        needed = seen(problem, axis, range(part.queries[axis].start, part.queries[axis].stop))
        queries = [one.stop - one.start for one in part.queries]
        keys = [one.stop - one.start for one in part.keys]
        part.place.check(problem, queries, keys)
        first = list(part.place.keys)
        if random.random() < 0.5 or needed[0] + 1 == problem.layout[axis]:
            keys[axis] = needed[-1] - first[axis]
        else:
            keys[axis] = problem.layout[axis] - needed[0] - 1
            first[axis] = needed[0] + 1
        place = Place(problem.layout, part.place.queries, first)
        with pytest.raises(ValueError, match=rf"tokens from {needed[0]} up to {needed[-1] + 1} of the .* axis {axis}"):
            place.check(problem, queries, keys)


def test_a_circle_may_be_held_from_anywhere():
    problem = Problem(12, 1, 4, 5, border="wrap")
    Place(12, 0, 10).check(problem, [1], [5])
    with pytest.raises(ValueError, match=r"tokens from -2 up to 3 .* place.keys=10 and 5 tokens would work"):
        Place(12, 0, 11).check(problem, [1], [5])
    Place(12, 0, 7).check(problem, [10], [12])
    with pytest.raises(ValueError, match="tokens from 0 up to 12 "):
        Place(12, 0, 7).check(problem, [10], [11])


def test_open_problems_are_named_and_refused():
    """A layout that is known only when a kernel is called, by families that have no such kernels."""
    problem = Problem((None, None), 2, 8, 5)
    assert problem.is_open
    assert problem == Problem((9, 9), 2, 8, 5).opened() == Problem.from_dict(problem.to_dict())
    assert str(problem).startswith("na2d layout=any heads=2")
    assert problem.replace(layout=(9, 9)) == Problem((9, 9), 2, 8, 5)
    for target, family in (("cuda:sm_80", "mma"), ("cuda:sm_80", "simt"), ("cuda:sm_90a", "sm90")):
        with pytest.raises(NotImplementedError, match=f"{family} has no kernels for an open layout"):
            choose(problem, Target.parse(target), "forward")
    for count in (lambda: problem.tokens, problem.pairs, problem.flops):
        with pytest.raises(ValueError, match=r"problem.replace\(layout=...\) has"):
            count()
    with pytest.raises(ValueError, match="border must not be 'clamp' with an open layout"):
        problem.replace(border="clamp")
    with pytest.raises(ValueError, match="layout must have at least one token"):
        Problem((None, 9), 2, 8, 5)


def test_what_is_no_place():
    for arguments, message in (
        (((0, 4),), r"place.layout must be 1, 2 or 3 ints .* got \(0, 4\)"),
        (((4,) * 4,), "place.layout must be 1, 2 or 3 ints"),
        ((2**30,), "from 1 to 1073741823"),
        (("8",), "place.layout must be"),
        (((8, 8), (1,)), r"place.queries must be an int or 2 ints .* got \(1,\)"),
        (((8, 8), 0, True), "place.keys must be an int or 2 ints"),
        (((8, 8), (0, 8)), "place.queries must be from 0 to 7 on axis 1, .* got 8"),
        (((8, 8), 0, (-1, 0)), "place.keys must be from 0 to 7 on axis 0, .* got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            Place(*arguments)
    assert Place.of_numbers(Place((9, 8), 1, (2, 3)).numbers()) == Place((9, 8), (1, 1), (2, 3))
    with pytest.raises(ValueError, match="three numbers for each axis"):
        Place.of_numbers([1, 2])


def test_tensors_that_do_not_fit_the_place():
    query, key, mask = torch.zeros(1, 6, 2, 4), torch.zeros(1, 8, 1, 4), torch.ones(1, 8, dtype=torch.bool)
    for place, changes, message in (
        (
            Place(12, 7),
            {},
            "place.queries must be at most 6 of the 12 tokens on axis 0 for a query that holds 6, got 7",
        ),
        (Place(12, 0, 5), {}, "place.keys must be at most 4 of the 12 tokens on axis 0 for a key that holds 8, got 5"),
        (Place(5), {}, "query must hold at most the 5 tokens of place.layout on axis 0, got 6"),
        (Place(7), {}, "key must hold at most the 7 tokens"),
        (Place((12, 3)), {}, "query must have the 2 axes of place.layout"),
        (Place(12), {"query": query[:, :0]}, "with at least one token on each"),
        (Place(12), {"value": key[:, 1:]}, r"value must have key's batch and layout, \(1, 8\)"),
        (Place(12), {"key": key[None]}, "key must have query's batch, 1, and 4 dimensions"),
        (Place(12), {"key_mask": mask[:, :6]}, r"key_mask must have shape \[batch, layout\], here \(1, 8\)"),
        (Place(4, 0), {"query": query[:, :4], "key": key[:, :4], "value": key[:, :4]}, "kernel_size=4 would work"),
    ):
        tensors = {"query": query, "key": key, "value": key, "key_mask": None, **changes}
        with pytest.raises(ValueError, match=message):
            neighborhood_attention(**tensors, kernel_size=5, place=place)
    neighborhood_attention(query, key, key, 5, key_mask=mask, place=Place(12))
