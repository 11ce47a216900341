"""``na-compile``: the command line, as a user types it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import na_compiler
from na_compiler import Problem
from na_compiler.cli import bench, main
from na_compiler.compiler import cache, kernels


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache, a process that has no kernels, and lines that are not broken."""
    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "220")
    monkeypatch.setattr(kernels, "_kernels", {})
    return tmp_path


def test_is_installed():
    command = Path(sys.executable).with_name("na-compile")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert "bench" in done.stdout
    assert "cache" in done.stdout
    assert subprocess.run([sys.executable, "-m", "na_compiler.cli", "--help"], check=True, stdout=subprocess.PIPE)


class TestCache:
    def test_list(self, folder, capsys):
        for direction in ("forward", "backward"):
            na_compiler.compile(Problem((5, 6), 1, 8, 3), direction=direction)
        assert main(["cache", "list"]) == 0
        printed = capsys.readouterr().out
        assert f"2 kernels in {folder}" in printed
        assert "na2d layout=5x6 heads=1 head_dim=8 kernel_size=3x3 float32" in printed
        assert "backward" in printed

    def test_list_as_json(self, folder, capsys):
        na_compiler.compile(Problem((5, 6), 1, 8, 3))
        assert main(["cache", "list", "--json"]) == 0
        data = json.loads(capsys.readouterr().out)
        assert data["folder"] == str(folder)
        (kernel,) = data["kernels"]
        assert Problem.from_dict(kernel["problem"]) == Problem((5, 6), 1, 8, 3)
        assert kernel["bytes"] > 1000

    def test_list_of_none(self, folder, capsys):
        assert main(["cache", "list"]) == 0
        assert "0 kernels" in capsys.readouterr().out

    def test_clear(self, folder, capsys):
        na_compiler.compile(Problem((5, 6), 1, 8, 3))
        assert main(["cache", "clear"]) == 0
        assert re.search(r"deleted 1 kernel from", capsys.readouterr().out)
        assert list(cache.entries()) == []
        assert main(["cache", "clear"]) == 0
        assert "deleted 0 kernels" in capsys.readouterr().out


class TestBench:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        """The suite's forms at sizes that take no time, and torch's threads as they were."""
        problems = [Problem((10, 11), 2, 16, 3), Problem(40, 2, 16, 9)]
        suite = [bench._windowed("2-D", problems[0], 55, 50, 35), bench._windowed("1-D", problems[1], 30, 27, None)]
        suite.append(bench.Case("dense", Problem((6, 6), 2, 16, 6), {"dense SDPA": 1.0}, {"dense SDPA": 1.0}))
        monkeypatch.setattr(bench, "CPU_SUITE", tuple(suite))
        threads = torch.get_num_threads()
        yield
        torch.set_num_threads(threads)

    @pytest.fixture
    def one_row(self, monkeypatch):
        """One forward, and nothing else."""
        case = bench.Case("2-D", Problem((10, 11), 2, 16, 3), {"gather": None})
        monkeypatch.setattr(bench, "CPU_SUITE", (case,))
        monkeypatch.setattr(bench, "measure_overheads", lambda seconds: {})

    def test_tables_and_json(self, folder, capsys):
        arguments = [
            "bench",
            "--suite",
            "cpu",
            "--seconds",
            "0.2",
            "--threads",
            "1",
            "--skip",
            "FlexAttention",
        ]
        assert main([*arguments, "--goals"]) == 0
        printed = capsys.readouterr().out
        assert "time over ours" in printed
        assert "masked SDPA" in printed
        assert "2-D, backward" in printed
        assert "(55)" in printed
        assert main([*arguments, "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert "1 threads" in figures["machine"]
        assert [row["direction"] for row in figures["rows"]] == ["forward", "backward"] * 3
        for row in figures["rows"]:
            assert row["failures"] == {}
            for name, ratio in row["ratios"].items():
                assert ratio == pytest.approx(row["milliseconds"][name] / row["milliseconds"]["na_compiler"])
        assert set(figures["rows"][0]["ratios"]) == {"masked SDPA", "gather"}
        assert any("4x4" in name for name in figures["overheads"])

    def test_a_competitor_that_fails_is_a_result(self, folder, one_row, capsys, monkeypatch):
        from na_compiler.cli import competitors

        def fails(inputs):
            raise RuntimeError("not on this machine")

        monkeypatch.setattr(competitors, "gather", fails)
        assert main(["bench", "--seconds", "0.1", "--threads", "1"]) == 0
        assert "gather does not run here: RuntimeError: not on this machine" in capsys.readouterr().out

    def test_a_wrong_result_is_not_timed(self, folder, one_row, capsys, monkeypatch):
        from na_compiler.cli import competitors

        right = competitors.gather
        monkeypatch.setattr(competitors, "gather", lambda inputs: lambda: right(inputs)() * 1.001)
        assert main(["bench", "--seconds", "0.1", "--threads", "1"]) == 0
        assert "gather is wrong: relative error 1.0e-03" in capsys.readouterr().out

    def test_ours_must_be_right(self, folder, one_row, capsys, monkeypatch):
        from na_compiler import functional

        right = functional.na2d
        monkeypatch.setattr(functional, "na2d", lambda *a, **k: right(*a, **k) * 1.001)
        assert main(["bench", "--seconds", "0.1", "--threads", "1"]) == 1
        assert "na_compiler is wrong" in capsys.readouterr().err

    def test_bad_arguments(self, folder, capsys):
        assert main(["bench", "--threads", "0"]) == 1
        assert "--threads must be at least 1, got 0" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            main(["bench", "--suite", "gpu?"])


@pytest.mark.full
def test_flex_attention_competes(folder, capsys):
    """Compiling it takes long."""
    from na_compiler.cli import competitors
    from na_compiler.reference import neighborhood_attention

    for problem in (Problem(256, 2, 32, 31), Problem((16, 16), 2, 32, 5)):
        inputs = competitors.Inputs.draw(problem, 1)
        try:
            output = competitors.flex_attention(inputs)()
        except Exception as error:  # noqa: BLE001
            pytest.skip(f"torch cannot compile FlexAttention for {problem} here: {error}")
        expected = neighborhood_attention(inputs.query, inputs.key, inputs.value, problem.kernel_size)[0]
        assert (output - expected).norm() < 1e-5 * expected.norm()
