"""``na-compile bench --suite sizes``: one open kernel over images of many sizes."""

import json
import os

import pytest
import torch

from na_compiler.cli import bench_sizes, main
from na_compiler.compiler import serving
from na_compiler.runtime.jit import specialization, specialize


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    specialize(None)


@pytest.mark.full
def test_the_suite_and_what_it_leaves_behind(threads, monkeypatch, capsys):
    monkeypatch.setattr(bench_sizes, "_DILATIONS", (2,))
    monkeypatch.setattr(bench_sizes, "_SMALLEST", 14)
    monkeypatch.setattr(bench_sizes, "_LARGEST", 20)
    monkeypatch.setattr(serving, "_served", {})
    before = specialization(), os.environ["NA_COMPILER_CACHE"]
    options = ["--sizes", "2", "--threads", "1", "--skip", "FlexAttention, dynamic", "--json"]
    assert main(["bench", "--suite", "sizes", *options]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert set(row["competitors"]) == {"a kernel of its own", "masked SDPA"}
    for one in row["competitors"].values():
        assert 1 <= one["sizes"] <= 2
        assert one["total"] > 0
        assert one["open"] > 0
    assert row["open"]["all sizes, first call of each"] >= row["open"]["all sizes, repeated"]
    assert (specialization(), os.environ["NA_COMPILER_CACHE"]) == before
