"""`na_compiler.borders`: the rule against its published form, the reference against the rule, problems and refusals."""

import itertools
import random

import pytest
import torch
from border_problems import BIAS, PROBLEMS, SMALL, draw_problem

from na_compiler.counting import most_queries, visible_pairs, widest_inverse, widest_union
from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_mask, relative_places
from na_compiler.runtime.jit import command_for
from na_compiler.schedules.choose import choose
from na_compiler.target import Target
from na_compiler.window import group_length, query_bounds, window_bounds


def published(index, length, kernel_size, stride, is_causal, border):
    """The rule as it is said: a window in its place, of which what lies outside is cut off."""
    left = int(border[4:]) if border.startswith("cut:") else kernel_size // 2
    if is_causal:
        start, end = index // stride * stride + stride - 1 - kernel_size + 1, index + 1
    else:
        start = index // stride * stride + stride // 2 - left
        end = start + kernel_size
    return (start, end) if border == "wrap" else (max(start, 0), min(end, length))


def rules(length):
    """Every rule of an axis with borders: kernel size, stride, causality, border."""
    for kernel_size in range(1, 2 * length + 2):
        for stride in range(1, kernel_size + 1):
            yield from ((kernel_size, stride, is_causal, "cut") for is_causal in (False, True))
            if kernel_size <= length and length % stride == 0:
                yield kernel_size, stride, False, "wrap"
        yield from ((kernel_size, 1, False, f"cut:{left}") for left in range(kernel_size))


def test_agrees_with_the_published_rule_everywhere():
    for length in range(1, 11):
        for rule in rules(length):
            bounds = [window_bounds(index, length, *rule) for index in range(length)]
            assert bounds == [published(index, length, *rule) for index in range(length)], (length, rule)


def test_queries_of_keys_are_those_whose_windows_have_them():
    for length in range(1, 9):
        for rule in rules(length):
            windows = [{key % length for key in range(*window_bounds(i, length, *rule))} for i in range(length)]
            for key in range(length):
                first, end = query_bounds(key, length, *rule)
                seeing = [index for index in range(length) if key in windows[index]]
                assert sorted(index % length for index in range(first, end)) == seeing, (length, rule, key)


def test_counts_along_an_axis(seed):
    """The closed forms, token by token."""
    for length in random.sample(range(1, 60), 12):
        drawn = list(rules(min(length, 14)))
        for kernel_size, *rest, border in random.sample(drawn, min(40, len(drawn))):
            if border == "wrap" and length % rest[0]:
                continue
            rule = (kernel_size, *rest, border)
            windows = [window_bounds(index, length, *rule) for index in range(length)]
            assert visible_pairs(length, *rule) == sum(end - start for start, end in windows), (length, rule)
            seen = [query_bounds(key, length, *rule) for key in range(length)]
            assert most_queries(length, *rule) == max(end - first for first, end in seen), (length, rule)
            for queries in {1, length, random.randint(1, length)}:
                blocks = range(0, length, queries)
                widest = max(windows[min(first + queries, length) - 1][1] - windows[first][0] for first in blocks)
                found = widest_union(length, kernel_size, *rest, queries, border)
                assert found == widest, (length, rule, queries)
                # The same numbers as keys, and the queries that see them.
                widest = max(seen[min(first + queries, length) - 1][1] - seen[first][0] for first in blocks)
                found = widest_inverse(length, kernel_size, *rest, queries, border)
                assert found == widest, (length, rule, queries)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_reference_is_the_rule(rank, seed):
    for _ in range(12):
        problem = draw_problem(rank)
        mask = neighborhood_mask(problem)
        biases = relative_places(problem, torch.arange(problem.tokens))
        places = list(itertools.product(*map(range, problem.layout)))
        for query in random.sample(range(problem.tokens), min(problem.tokens, 8)):
            seen = {}
            for axis, place in enumerate(places[query]):
                dilation, layout = problem.dilation[axis], problem.layout[axis]
                index, length = place // dilation, group_length(layout, dilation, place % dilation)
                rule = [getattr(problem, name)[axis] for name in ("kernel_size", "stride", "is_causal", "border")]
                bounds = window_bounds if rule[-1] == "shift" else published
                keys = range(*bounds(index, length, *rule))
                seen[axis] = {key % length * dilation + place % dilation: key - index + rule[0] - 1 for key in keys}
            expected = {}
            for key in itertools.product(*seen.values()):
                number = 0
                for axis, along in enumerate(key):
                    number = number * (2 * problem.kernel_size[axis] - 1) + seen[axis][along]
                expected[key] = number
            found = {place: int(biases[query, at]) for at, place in enumerate(places) if mask[query, at]}
            assert found == expected, (problem, query)
        assert problem.pairs() == mask.sum()


SAME = [
    # Causal windows of NATTEN's rule end there already; only the last stride group differs, if it is not whole.
    (dict(is_causal=True, border="cut"), dict(is_causal=True)),
    (dict(stride=3, is_causal=True, border="cut"), dict(stride=3, is_causal=True)),
    (dict(border="cut:4"), dict(is_causal=True)),
    (dict(border="cut:2"), dict(border="cut")),
    (dict(kernel_size=1, border="cut"), dict(kernel_size=1)),
    (dict(kernel_size=12, border="wrap"), dict(kernel_size=12)),
    (dict(kernel_size=99, stride=20, border="clamp"), dict(kernel_size=12, stride=12)),
    (dict(kernel_size=99, dilation=5, border="clamp"), dict(kernel_size=2, dilation=5)),
    (dict(border=["shift"]), dict()),
]


@pytest.mark.parametrize(("one", "other"), SAME, ids=str)
def test_equal_problems_are_equal(one, other):
    first, second = (Problem(12, 1, 8, **{"kernel_size": 5, **changes}) for changes in (one, other))
    assert first == second
    assert torch.equal(neighborhood_mask(first), neighborhood_mask(second))
    assert Problem.from_dict(first.to_dict()) == first
    assert ("border" in first.to_dict()) == first.has_borders


def test_what_kernels_are_tested_with_is_no_other_problem():
    assert all(problem.has_borders for problem in (*PROBLEMS, *SMALL))


def test_a_problem_that_only_looks_alike_keeps_its_border():
    ragged = Problem(11, 1, 8, 5, 3, is_causal=True)
    assert ragged.replace(border="cut") != ragged
    assert not torch.equal(neighborhood_mask(ragged.replace(border="cut")), neighborhood_mask(ragged))
    whole = Problem(12, 1, 8, 12, operands=(BIAS,))
    assert whole.replace(border="wrap") != whole  # The bias tells how far around a key is.


def test_chunked_attention_is_cut(seed):
    tokens, chunk = random.randint(5, 40), random.randint(1, 12)
    problem = Problem(tokens, 1, 8, chunk, chunk, is_causal=True, border="cut")
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    assert torch.equal(neighborhood_mask(problem), (i // chunk == j // chunk) & (j <= i))


REFUSED = [
    (dict(border="cyclic"), "border must be one of 'shift', 'cut', .* got 'cyclic'; e.g. \\('cut',\\)"),
    (dict(border=("cut", "cut")), "or 1 of these .*got \\('cut', 'cut'\\)"),
    (dict(border=1), "border must be .* got 1"),
    (dict(border="cut:-1"), "border must be .* got 'cut:-1'"),
    (dict(border="cut:01"), "border must be .* got 'cut:01'"),
    (dict(border="cut:5"), "LEFT less than kernel_size=5 on axis 0, got 5; border='cut:4' would work"),
    (dict(border="cut:1", stride=2), "must have stride=1 and no causality on axis 0, got stride=2; border='cut' would"),
    (dict(border="cut:1", is_causal=True), "got is_causal=True; border='cut' would work"),
    (dict(border="cut", stride=6), "stride must be at most kernel_size=5 on axis 0, got 6; stride=5 would work"),
    (dict(border="cut", dilation=13), "dilation must be at most the layout's 12 tokens .* got 13; dilation=12 would"),
    (dict(border="wrap", kernel_size=13), "kernel_size \\* dilation must be at most .* kernel_size=12 would work"),
    (dict(border="wrap", stride=5), "stride must divide the 12 tokens .* got 5; stride=4 would work"),
    (dict(border="wrap", kernel_size=2, dilation=5), "dilation must divide the layout's 12 tokens .* dilation=4 would"),
    (dict(border="wrap", is_causal=True), "border='wrap' must have is_causal=False on axis 0"),
    (dict(border="clamp", dilation=13), "dilation must be at most .* also with border='clamp', got 13; dilation=12"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=str)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        Problem(12, 1, 8, **{"kernel_size": 5, **changes})


def test_families_without_borders_say_so():
    problem = Problem((20, 28), 1, 64, (7, 9), dtype="bfloat16", border=("cut", "shift"))
    choice = choose(problem, Target.parse("cuda:sm_90a"), "forward")
    assert choice.config.family == "mma"
    assert choice.reason == "sm90 has no kernels with border='cut'."


def test_no_family_with_a_border(monkeypatch):
    monkeypatch.setattr("na_compiler.schedules.choose.FAMILIES", ("sm90",))
    problem = Problem((20, 28), 1, 64, 7, dtype="bfloat16", border="wrap")
    with pytest.raises(NotImplementedError, match="sm90 has no kernels with border='wrap'"):
        choose(problem, Target.parse("cuda:sm_90a"), "forward")


def test_the_command_that_compiles_a_problem(capsys, monkeypatch):
    problem = Problem((12, 20), 1, 8, 5, border=("wrap", "cut:1"))
    words = command_for(problem, "forward", "llvm").split()
    monkeypatch.setattr("sys.argv", [*words[:-2], "--dry-run"])
    from na_compiler.cli import main

    main()
    assert "border=wrap,cut:1" in capsys.readouterr().out
