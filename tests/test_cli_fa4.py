"""`na_compiler.cli.fa4`: what FA4 is given: the order of tokens, the blocks; and what is said without it."""

from __future__ import annotations

import random

import pytest
import torch

from na_compiler.cli import bench_hopper, fa4, gpu_peers
from na_compiler.problem import Problem
from na_compiler.reference import neighborhood_mask

PROBLEMS = [
    Problem((16, 24), 1, 8, (5, 8), (1, 4), dtype="bfloat16"),
    Problem((4, 8, 12), 1, 8, (4, 3, 5), (2, 1, 3), dtype="bfloat16"),
    Problem(640, 1, 8, 200, 16, dtype="bfloat16"),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_blocks_are_those_of_the_mask(problem, seed):
    boxes = fa4._boxes(problem.layout)
    for tiles in (fa4.Tiles.of(problem), fa4.Tiles(random.choice(boxes), random.choice(boxes))):
        numbers = torch.arange(problem.tokens).reshape(1, *problem.layout, 1, 1)
        queries, keys = (fa4.in_tiles(numbers, tile).flatten() for tile in (tiles.query, tiles.key))
        mask = neighborhood_mask(problem)[queries][:, keys]
        blocks = mask.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).transpose(1, 2).flatten(2)
        seen, whole = tiles.blocks(problem)
        assert torch.equal(seen, blocks.any(-1))
        assert torch.equal(whole, blocks.all(-1))


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_tiles_waste_least(problem):
    boxes = fa4._boxes(problem.layout)
    counts = [int(fa4.Tiles(query, key).blocks(problem)[0].sum()) for query in boxes for key in boxes]
    assert int(fa4.Tiles.of(problem).blocks(problem)[0].sum()) == min(counts)


def test_the_order_of_tiles_and_back(seed):
    tensor = torch.randn(2, 4, 8, 12, 3, 5)
    for tile in fa4._boxes((4, 8, 12)):
        assert torch.equal(fa4.in_layout(fa4.in_tiles(tensor, tile), (4, 8, 12), tile), tensor)


def test_what_it_is_not_given():
    assert "128" in fa4.refusal(Problem((9, 10), 1, 8, 3))
    assert "causality" in fa4.refusal(Problem(256, 1, 8, 3, is_causal=True))
    assert all(fa4.refusal(problem) is None for problem in PROBLEMS)


def test_a_line_says_that_it_is_absent(monkeypatch, capsys):
    """And the suite goes on without it."""
    timed = []

    def time(row, direction, skip, seconds, console):
        timed.append(skip)
        raise RuntimeError("far enough")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU")
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
    monkeypatch.setattr(bench_hopper, "_time", time)
    monkeypatch.setattr(fa4, "_PACKAGES", ("cutlass_that_is_not_here",))
    from na_compiler.cli import main

    assert main(["bench", "--suite", "hopper"]) == 1
    assert timed == [["FA4 kernel"]]
    said = "".join(capsys.readouterr())
    assert "without FA4 kernel: no module cutlass_that_is_not_here here" in said
    assert gpu_peers.missing("ours") is None
