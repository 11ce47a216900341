"""What a newcomer types first, and reads: help, versions, tables at 80 columns, errors, a report of what there is."""

import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import na_compiler
from na_compiler import Problem, cli
from na_compiler.cli import bench, info, output
from na_compiler.passes.progress import progress_bar

PROBLEM = ["--layout", "56x56", "--heads", "4", "--head-dim", "32", "--kernel-size", "7"]


@pytest.fixture
def narrow(tmp_path, monkeypatch):
    """A terminal of 80 columns, and a cache of its own."""
    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")


def run(capsys, *arguments, status=0):
    assert cli.main(list(map(str, arguments))) == status
    return capsys.readouterr()


def shown_by_exit(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_version(capsys):
    assert shown_by_exit(capsys, "--version") == f"na_compiler {na_compiler.__version__}\n"


def test_help_shows_what_to_type_first(capsys):
    said = shown_by_exit(capsys, "--help")
    assert said.startswith("usage: na-compile MODEL -o BUNDLE")
    assert "package.module:function" in said
    for command in ("problem", "inspect", "plan", "draw", "bench", "cache", "info"):
        assert re.search(rf"^    {command} ", said, re.MULTILINE), command


def test_every_command_has_help_for_every_argument(capsys):
    def parsers(*words):
        said = shown_by_exit(capsys, *words, "--help")
        yield words, said
        listed = re.search(r"^positional arguments:\n  (?:COMMAND|ACTION)\n((?:    .*\n)+)", said, re.MULTILINE)
        for name in re.findall(r"^    (\S+)", listed[1], re.MULTILINE) if listed else ():
            yield from parsers(*words, name)

    found = dict(parsers())
    assert ("cache", "list") in found
    for words, said in found.items():
        # An argument without help stands alone, the next line beginning another one.
        lines = said.splitlines()
        for line, after in zip(lines, [*lines[1:], ""], strict=True):
            if re.match(r"  (-|[A-Z]+$)", line) and not re.match(r"  \S.*?  +\S", line):
                assert after.startswith("    ") or line.strip() in {"COMMAND", "ACTION"}, (words, line)


@pytest.mark.parametrize("place", ["before", "behind"])
def test_verbose_on_either_side_of_the_command(narrow, place, monkeypatch):
    levels = []
    monkeypatch.setattr(logging, "basicConfig", lambda level, **_: levels.append(level))
    arguments = ["-v", "cache", "list"] if place == "before" else ["cache", "list", "-v"]
    assert cli.main(arguments) == 0
    assert cli.main(["cache", "list"]) == 0
    assert levels == [logging.INFO, logging.WARNING]


@pytest.mark.parametrize(
    ("word", "told"), [("bnech", "did you mean bench?"), ("xyzzy", "commands are problem, model"), ("cach", "cache?")]
)
def test_a_mistyped_command(word, told, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([word, "list"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert f"'{word}' is no command" in said
    assert told in said


def test_a_reader_that_has_enough(tmp_path):
    """As ``na-compile ... | head -1``: nothing is said of a broken pipe."""
    code = (
        "import os, sys; reading, writing = os.pipe(); os.dup2(writing, 1); os.close(writing); os.close(reading); "
        "from na_compiler import cli; sys.exit(cli.main(['info']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 1


def test_the_operating_systems_errors_name_the_file(narrow, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "x.png"
    said = run(capsys, "draw", *PROBLEM, "-o", path, status=1).err
    assert "Errno" not in said
    assert str(tmp_path / "file") in said


def words(text):
    return [word for word in re.split(r"[\s│┃]+", text) if word]


def test_tables_do_not_break_words(narrow, capsys, monkeypatch):
    """Of a terminal, as rich takes standard output for one here."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    cases = [
        (
            ["problem", *PROBLEM, "--target", "llvm:x86-64-v4", "--dry-run"],
            ["layout=56x56", "key_block=1x1x10", "head_dim=32"],
        ),
        (["plan", *PROBLEM, "--target", "llvm:x86-64-v3"], ["computed"]),
    ]
    for arguments, whole in cases:
        said = re.sub(r"\x1b\[[0-9;]*m", "", run(capsys, *arguments).out)
        for word in whole:
            assert any(word in found for found in words(said)), (arguments, word, said)


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_table_at_any_width(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    rows = [("na2d layout=56x56", "llvm:x86-64-v4", "1.5"), ("[bold]is no markup", "", "12345.5")]
    output.print_table(("problem", "target", "size"), rows, "a title", numbers=("size",))
    said = capsys.readouterr().out
    for row in rows:
        for word in words(" ".join(row)):
            assert word in words(said), (word, said)


def json_of(said):
    """The one document on standard output."""
    return json.loads(said.out)


def test_json_is_one_document_everywhere(narrow, capsys, monkeypatch, tmp_path):
    case = bench.Case("2-D", Problem((6, 7), 1, 8, 3), {"gather": 50.0})
    monkeypatch.setattr(bench, "CPU_SUITE", (case,))
    monkeypatch.setattr(bench, "measure_overheads", lambda seconds: {})
    bundle = tmp_path / "kernels"
    small = ["--layout", "6x7", "--heads", "1", "--head-dim", "8", "--kernel-size", "3"]
    assert json_of(run(capsys, "problem", *small, "-o", bundle, "--json"))["bundle"] == str(bundle)
    assert json_of(run(capsys, "inspect", bundle, "--json"))["bundle"] == str(bundle)
    assert json_of(run(capsys, "cache", "list", "--json"))["kernels"]
    assert json_of(run(capsys, "plan", *small, "--target", "llvm:x86-64-v3", "--json"))["candidates"][0]["time"] == 1
    assert "versions" in json_of(run(capsys, "info", "--json"))
    timed = run(capsys, "bench", "--seconds", "0.05", "--threads", "1", "--json")
    assert json_of(timed)["rows"][0]["ratios"]["gather"] > 0
    assert "2-D" in timed.err
    assert json_of(run(capsys, "cache", "clear", "--json"))["deleted"] >= 1


def test_our_own_goals_are_shown_only_when_asked_for(narrow, capsys, monkeypatch):
    case = bench.Case("2-D", Problem((6, 7), 1, 8, 3), {"gather": 12345.0})
    monkeypatch.setattr(bench, "CPU_SUITE", (case,))
    monkeypatch.setattr(bench, "measure_overheads", lambda seconds: {})
    arguments = ["bench", "--seconds", "0.05", "--threads", "1"]
    assert "12345" not in run(capsys, *arguments).out
    assert "12345" in run(capsys, *arguments, "--goals").out


def test_bench_of_onnx_judges_only_when_asked(narrow, capsys, monkeypatch):
    onnx_suite = pytest.importorskip("na_compiler.cli.bench_onnx", reason="needs the extra onnxruntime")
    figure = onnx_suite._Figure("masked SDPA over the library", 3.0, ">= 40", reached=False)
    monkeypatch.setattr(onnx_suite, "_models", lambda folder: {})
    monkeypatch.setattr(onnx_suite, "_times", lambda *_: {"library": 0.002})
    for name in ("_speeds", "_memory"):
        monkeypatch.setattr(onnx_suite, name, lambda _: [figure])
    monkeypatch.setattr(onnx_suite, "_library", lambda _: [])
    said = run(capsys, "bench", "--suite", "onnx", "--threads", "1").out
    assert "masked SDPA over the library" in said
    assert "missed" not in said
    assert "40" not in said
    assert "missed" in run(capsys, "bench", "--suite", "onnx", "--threads", "1", "--goals").out


def test_the_progress_bar_knows_how_many_there_are(narrow):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, color_system=None)
    with progress_bar(7, console):
        pass
    assert "0/7" in stream.getvalue()
    assert "0/?" not in stream.getvalue()


def test_info(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("NA_COMPILER_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "/nowhere/cc")
    said = run(capsys, "info").out
    for part in (na_compiler.__version__, "apache-tvm-ffi", "torch", "llvm:", str(tmp_path), "/nowhere/cc"):
        assert part in said
    found = json_of(run(capsys, "info", "--json"))
    assert set(found) == {"versions", "machine", "targets", "compilers", "cache", "environment"}
    assert found["cache"]["kernels"].startswith("0,")
    assert found["compilers"]["C"].startswith("none")
    monkeypatch.delenv("CC")
    assert re.search(r"\d+\.\d+", json_of(run(capsys, "info", "--json"))["compilers"]["C"])


def test_info_says_that_no_variable_is_set(capsys, monkeypatch):
    for name in info._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert run(capsys, "info").out.splitlines()[-1] == "environment: none set"


def test_info_tells_of_what_is_broken(capsys, monkeypatch):
    def broken():
        raise OSError("no such cache")

    monkeypatch.setattr("na_compiler.compiler.cache.entries", broken)
    assert json_of(run(capsys, "info", "--json"))["cache"]["kernels"] == "OSError: no such cache"


def test_what_nobody_foresaw_is_one_sentence(capsys, monkeypatch, caplog):
    def fails():
        raise KeyError("somewhere deep")

    monkeypatch.setattr("na_compiler.compiler.cache.entries", fails)
    said = run(capsys, "cache", "list", status=1)
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "somewhere deep" in said.err
    assert "na-compile info" in said.err


@pytest.mark.parametrize("value", [2**63, 2**70, -(2**70), 10**4000])
def test_numbers_that_no_operator_counts_with(value):
    """The functions, and the command line: refused by name, before torch or TVM sees them."""
    import torch

    tensors = torch.randn(3, 1, 8, 8, 2, 16)
    for name in ("kernel_size", "stride", "dilation"):
        for given in (value, (value, 3)):
            parameters = {"kernel_size": 3, name: given}
            with pytest.raises(ValueError, match=rf"{name} must be .{{,99}}; e\.g\. \(") as caught:
                na_compiler.na2d(*tensors, **parameters)
            assert len(str(caught.value)) < 200
    for name in ("layout", "heads", "head_dim", "heads_kv", "head_dim_v"):
        parameters = {"layout": 8, "heads": 1, "head_dim": 8, "kernel_size": 3, name: value}
        with pytest.raises(ValueError, match=rf"{name} must .{{,99}}; e\.g\. "):
            Problem(**parameters)


@pytest.mark.parametrize("name", ["head_dim", "head_dim_v"])
def test_a_head_is_no_longer_than_what_compiles(name):
    parameters = {"layout": 8, "heads": 1, "head_dim": 8, "kernel_size": 3}
    assert Problem(**parameters | {name: 8192})
    for length in (8193, 10**9):
        with pytest.raises(ValueError, match=f"{name} must be at most 8192, got {length}; {name}=8192 would work"):
            Problem(**parameters | {name: length})


def test_messages_are_short_whatever_was_given():
    for name in ("kernel_size", "stride", "dilation", "is_causal", "layout"):
        parameters = {"layout": (8, 8), "heads": 1, "head_dim": 8, "kernel_size": 3, name: [3] * 100_000}
        with pytest.raises(ValueError, match=name) as caught:
            Problem(**parameters)
        assert len(str(caught.value)) < 300


def attention_node(**attributes):
    import onnx
    from onnx import helper

    tensors = [helper.make_tensor_value_info(n, 1, [1, 8, 8, 2, 16]) for n in ("query", "key", "value", "output")]
    node = helper.make_node("NA2D", ["query", "key", "value"], ["output"], domain="na_compiler", **attributes)
    graph = helper.make_graph([node], "graph", tensors[:3], tensors[3:])
    return onnx.helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("na_compiler", 1)]
    )


@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_size": [3] * 1_000_000},
        {"kernel_size": "abc" * 1_000_000},
        {"kernel_size": [3, 3], "scale": "large"},
        {"kernel_size": [3, 3], "scale": [1.0, 2.0]},
        {"kernel_size": [3, 3], "is_causal": [7] * 1_000_000},
    ],
    ids=["million", "text", "scale", "scales", "flags"],
)
def test_bad_attributes_of_a_model(attributes, narrow, capsys, tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
    pytest.importorskip("onnx_ir", reason="needs the extra onnx")
    onnx.save(attention_node(**attributes), tmp_path / "model.onnx")
    said = run(capsys, tmp_path / "model.onnx", "--dry-run", status=1).err
    assert said.count("\n") == 1
    assert len(said) < 500
    assert "fault of na-compile" not in said
    assert any(name in said for name in attributes)


def test_draw(narrow, capsys, tmp_path):
    matplotlib_image = pytest.importorskip("matplotlib.image", reason="needs the extra draw")
    cases = [
        ["--layout", "12x14", "--kernel-size", "5x3", "--dilation", "2", "--causal", "1x0"],
        ["--layout", "40", "--kernel-size", "9", "--stride", "4"],
        ["--layout", "6x8x8", "--kernel-size", "3"],
        ["--layout", "40x40", "--kernel-size", "13", "--dtype", "bfloat16", "--target", "cuda:sm_90a"],
        ["--layout", "12x14", "--kernel-size", "5", "--target", "cuda:sm_80", "--query", "3x4"],
    ]
    for number, case in enumerate(cases):
        path = tmp_path / "new" / f"{number}.png"
        said = json_of(run(capsys, "draw", *case, "--heads", "1", "--head-dim", "64", "-o", path, "--json"))
        assert all(0 < one["needed"] <= one["pairs"] for one in said["visits"])
        picture = matplotlib_image.imread(path)
        # Something of each colour is on it: what is seen, and the query.
        for red, green, blue in ((61, 111, 165), (242, 142, 43)):
            near = abs(picture[..., :3] * 255 - [red, green, blue]).max(-1) < 3
            assert near.sum() > 50, (case, red)
    told = run(capsys, "draw", *cases[0], "--heads", "1", "--head-dim", "8", "--query", "12x0", status=1).err
    assert "--query must lie between 0x0 and 11x13, got 12x0" in told
    large = ["--layout", "100000", "--kernel-size", "5", "--heads", "1", "--head-dim", "8"]
    assert "more than a picture shows" in run(capsys, "draw", *large, "-o", tmp_path / "x.png", status=1).err


@pytest.mark.parametrize("case", ["20x24 5x7", "40x44 9", "41 7", "8x12x14 3x5x5"])
def test_pictures_label_tokens_and_rule_every_cell(monkeypatch, case, tmp_path):
    figures = pytest.importorskip("matplotlib.figure", reason="needs the extra draw")
    drawn = []
    original = figures.Figure.savefig
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), original(self, *a, **k)))
    layout, kernel_size = case.split()
    command = ["draw", "--layout", layout, "--kernel-size", kernel_size, "--heads", "1", "--head-dim", "32"]
    command += ["--target", "llvm:x86-64-v4"]  # How large a tile is depends on it, and large pictures have no rules.
    assert cli.main([*command, "-o", str(tmp_path / "x.png")]) == 0
    for axes in drawn[0].axes:
        labels = [text.get_text() for text in (*axes.get_xticklabels(), *axes.get_yticklabels())]
        assert all(label.lstrip("\N{MINUS SIGN}").isdigit() or label.startswith("plane") for label in labels)
        rows, columns = axes.images[0].get_array().shape
        shown = [len(axis.get_minorticklocs()) for axis in (axes.yaxis, axes.xaxis)]
        assert shown == [rows - 1, columns - 1]


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("matplotlib", "draw", ["draw", *PROBLEM, "-o", "x.png"]),
        ("onnxruntime", "onnxruntime", ["bench", "--suite", "onnx"]),
        ("onnx_ir", "onnx", ["model.onnx", "--dry-run"]),
    ],
)
def test_what_is_not_installed_is_named_with_its_extra(module, extra, arguments, tmp_path):
    """In a process that cannot import it."""
    code = "import sys; sys.modules[sys.argv[1]] = None; from na_compiler import cli; sys.exit(cli.main(sys.argv[2:]))"
    (tmp_path / "model.onnx").write_bytes(b"")
    command = [sys.executable, "-c", code, module, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert f"pip install 'na-compiler[{extra}]'" in done.stderr


def test_the_description_on_an_index_has_no_dead_links(tmp_path):
    root = Path(__file__).parent.parent
    code = "from setuptools.build_meta import prepare_metadata_for_build_wheel as p; import sys; p(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=root, capture_output=True, check=True)
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    text = metadata.read_text()
    assert f"Version: {na_compiler.__version__}\n" in text
    assert "Description-Content-Type: text/markdown" in text
    description = text.partition("\n\n")[2]
    assert description.lstrip().startswith("# na_compiler")
    links = re.findall(r"\]\(([^)]+)\)", description)
    assert len(links) > 1
    assert all(link.startswith("https://") for link in links), links
