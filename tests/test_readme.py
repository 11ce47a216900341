"""The README and the pages of docs/: their snippets run, their links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from na_compiler.compat.natten import uninstall

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "examples").rglob("README.md"))]


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def run(path, folder, monkeypatch):
    """Run a page's snippets in order, as one program; returns what it leaves."""
    from na_compiler.runtime import bundle

    monkeypatch.chdir(folder)
    monkeypatch.setattr(bundle, "_loaded", [])
    namespace = {}
    for snippet in blocks(path, "python"):
        exec(compile(snippet, path.name, "exec"), namespace)
    return namespace


def test_python_of_the_readme(tmp_path, monkeypatch, capsys):
    """Also what a snippet says that it prints."""
    assert len(blocks(README, "python")) >= 6
    namespace = run(README, tmp_path, monkeypatch)
    assert "na2d layout=56x56 heads=4 head_dim=32 kernel_size=7x7 float32\n" in capsys.readouterr().out
    assert (tmp_path / "layer.pt2").is_file()
    assert (tmp_path / "kernels" / "manifest.json").is_file()
    x, layer = namespace["x"], namespace["layer"]
    expected = layer(x).detach()
    for name in ("session", "fast"):
        (result,) = namespace[name].run(None, {"x": x.numpy()})
        assert (torch.from_numpy(result) - expected).norm() < 1e-5 * expected.norm(), name


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page, "python")], ids=lambda page: page.name)
def test_python_of_the_docs(page, tmp_path, monkeypatch, capsys):
    try:
        run(page, tmp_path, monkeypatch)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"transformers", "diffusers"}:
            raise
        pytest.skip(f"needs what is not installed here: {error.name}")
    finally:
        uninstall()  # A page makes `import natten` mean ours.
    printed = capsys.readouterr().out
    if page.name == "semantics.md":
        message = re.search(r"^# (kernel_size \* dilation .*)\n# (.*)$", page.read_text(), re.MULTILINE)
        assert f"{message[1]} {message[2]}\n" in printed


LINES = [
    (page.name, line) for page in PAGES for block in blocks(page, "sh") for line in block.splitlines() if line[0] != "#"
]


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}: {line}" for page, line in LINES])
def test_shell_snippets(page, line, tmp_path, monkeypatch):
    monkeypatch.setenv("NA_COMPILER_TUNED", str(tmp_path / "tuned.jsonl"))
    command, *arguments = shlex.split(line)
    program = Path(sys.executable).with_name(command)
    done = subprocess.run([program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def slug(heading):
    """Return the anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)), link


def test_every_example_says_what_it_is():
    folders = [path for path in (ROOT / "examples").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert all((folder / "README.md").is_file() for folder in folders)
    listed = (ROOT / "examples" / "README.md").read_text()
    scripts = [path.name for path in (ROOT / "examples").glob("*.py")]
    assert all(f"[{name}](" in listed for name in (*scripts, *(folder.name for folder in folders)))


def test_folders_of_the_tree_exist():
    """The tree in the page on the architecture."""
    lines = (ROOT / "docs" / "architecture.md").read_text()
    tree = lines[lines.index("    na_compiler/\n") :].splitlines()
    folder, count = ROOT, 0
    for line in tree:
        if not line.startswith("    "):
            break
        indent = len(line) - len(line.lstrip())
        names = re.split(r" {2,}", line.strip())[0].split(", ")
        if indent == 4:
            folder = ROOT / names[0]
        for name in names:
            path = ROOT / name if indent == 4 else folder / name
            assert path.exists(), path
            count += 1
    assert count > 15


def test_make_targets_exist():
    for page in TEXTS:
        own = page.with_name("Makefile")
        makefile = own if own.is_file() else ROOT / "Makefile"
        targets = re.findall(r"^([a-z-]+):", makefile.read_text(), re.MULTILINE)
        assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= set(targets)


def test_what_the_onnx_snippet_imports_comes_with_what_it_installs():
    """By the requirements of the extras that the README's line names."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = README.read_text()
    section = text[text.index("## ONNX") :]
    (extra,) = re.match(r".*?pip install '\.\[(\w+)\]'", section, re.DOTALL).groups()
    needed = re.findall(r"^import (\w+)$", blocks(README, "python")[-1] + section, re.MULTILINE)
    names, pending = set(), [extra]
    while pending:
        for requirement in extras[pending.pop()]:
            own = re.match(r"na-compiler\[(\w+)\]", requirement)
            if own:
                pending.append(own[1])
            else:
                names.add(re.match(r"[\w-]+", requirement)[0].replace("-", "_"))
    assert "onnxruntime" in needed
    assert set(needed) - {"torch", "na_compiler"} <= names
