"""The README: its snippets run, its links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_python_snippets(tmp_path, monkeypatch, capsys):
    """In order, as one program: also what a snippet says that it prints."""
    from na_compiler.runtime import bundle

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bundle, "_loaded", [])
    namespace = {}
    snippets = blocks("python")
    assert len(snippets) >= 6
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "na2d layout=56x56 heads=4 head_dim=32 kernel_size=7x7 float32\n" in printed
    message = re.search(r"^# (kernel_size \* dilation .*)\n# (.*)$", TEXT, re.MULTILINE)
    assert f"{message[1]} {message[2]}\n" in printed
    assert (tmp_path / "layer.pt2").is_file()
    assert (tmp_path / "kernels" / "manifest.json").is_file()
    x, layer = namespace["x"], namespace["layer"]
    expected = layer(x).detach()
    for name in ("session", "fast"):
        (result,) = namespace[name].run(None, {"x": x.numpy()})
        assert (torch.from_numpy(result) - expected).norm() < 1e-5 * expected.norm(), name


@pytest.mark.parametrize(
    "line", [line for block in blocks("sh") for line in block.splitlines() if not line.startswith("#")]
)
def test_shell_snippets(line, tmp_path):
    command, *arguments = shlex.split(line)
    program = Path(sys.executable).with_name(command)
    done = subprocess.run([program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_links_and_folders_exist():
    for link in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        assert (ROOT / link).exists(), link
    tree = TEXT[TEXT.index("    na_compiler/\n") :].splitlines()
    folder = ROOT
    for line in tree:
        if not line.startswith("    "):
            break
        indent = len(line) - len(line.lstrip())
        names = re.split(r" {2,}", line.strip())[0].split(", ")
        folder = ROOT if indent == 4 else ROOT / "na_compiler"
        for name in names:
            assert (folder / name).exists(), name


def test_make_targets_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", TEXT, re.MULTILINE)) <= set(targets)
