"""What is distributed: a wheel and a source archive, installed and used elsewhere."""

import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path, PurePath

import pytest
from setuptools.config.pyprojecttoml import read_configuration

ROOT = Path(__file__).parent.parent

USE = """
import numpy as np
import na_compiler
from na_compiler.schedules.cpu import planner
assert "site-packages" in planner.__file__
kernel = na_compiler.compile(na_compiler.Problem((5, 6), 1, 8, 3))
query = np.ones((1, 5, 6, 1, 8), np.float32)
assert np.allclose(kernel(query, query, query)[0], 1)
import torch
tensor = torch.ones(1, 5, 6, 1, 8, requires_grad=True)
na_compiler.na2d(tensor, tensor, tensor, 3).sum().backward()
print(na_compiler.__file__)
"""


def pip(python, *arguments):
    command = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    (made,) = folder.glob("*.whl")
    return made


def sources():
    """Return every file of the package in the working tree, by its name in a wheel."""
    return {
        f"{package}/{path.relative_to(ROOT / source)}": path
        for source, package in (("na_compiler", "na_compiler"), ("schedules", "na_compiler/schedules"))
        for path in (ROOT / source).rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }  # fmt: skip


def test_data_of_every_kind_is_named():
    """Files that are no modules are in a wheel where a pattern says so: what one kind lacks, an installation lacks."""
    patterns = read_configuration(ROOT / "pyproject.toml", expand=False)["tool"]["setuptools"]["package-data"]
    named = [(package.replace(".", "/"), pattern) for package, found in patterns.items() for pattern in found]
    data = {name: path for name, path in sources().items() if path.suffix != ".py"}
    assert {"na_compiler/runtime/launcher.c", "na_compiler/compiler/libcudart.map"} <= data.keys()
    for name in data:
        assert any(PurePath(name).match(f"{package}/{pattern}") for package, pattern in named), name


@pytest.mark.full
def test_wheel_holds_every_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert sources().keys() <= names
    assert not any(name.startswith(("tests/", "examples/", "schedules/")) for name in names)


@pytest.mark.full
def test_wheel_works_elsewhere(wheel, tmp_path):
    """In a virtual environment that sees this one's dependencies, and not the working tree."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip(python, "install", "--no-deps", wheel)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    here = {path for path in sys.path if path.endswith("site-packages")}
    # Dependencies; this environment's own editable installation is not found by a path file's lines.
    (site / "dependencies.pth").write_text("\n".join(sorted(here)))
    done = subprocess.run([python, "-c", USE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
    assert subprocess.run(
        [tmp_path / "venv" / "bin" / "na-compile", "cache", "list"], check=True, stdout=subprocess.PIPE
    )


@pytest.mark.full
def test_source_archive_builds_the_same(tmp_path):
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    for name in ("schedules/choose.py", "na_compiler/runtime/launcher.c", "LICENSE", "README.md"):
        assert (source / name).is_file(), name
    # What the description on an index calls to be in the source archive.
    named = re.findall(r"`([^`\n]+)` in the source archive", (source / "PKG-INFO").read_text())
    assert named
    for name in named:
        assert (source / name).exists(), name
    pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source)
    assert list(tmp_path.glob("*.whl"))
