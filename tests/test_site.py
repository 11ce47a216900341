"""The site of the documentation: its pictures are those of the present code, and a broken link fails."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from na_compiler import cli

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
NEEDS_SPHINX = pytest.mark.skipif(importlib.util.find_spec("furo") is None, reason="needs the extra docs (make docs)")


def pictures():
    spec = importlib.util.spec_from_file_location("docs_conf", DOCS / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PICTURES


def test_every_picture_is_shown():
    text = "".join(page.read_text() for page in DOCS.glob("*.md"))
    names = {path.stem for path in (DOCS / "pictures").glob("*.png")}
    assert names == {*pictures(), "way-of-a-call"}
    assert all(f"](pictures/{name}.png)" in text for name in names)


def test_every_page_is_in_the_contents():
    """What is in none of them fails ``make docs``."""
    listed = set((DOCS / "index.md").read_text().split())
    assert {page.stem for page in DOCS.glob("*.md")} - {"index"} <= listed


@pytest.mark.parametrize("name", ["stride", "hopper"])
def test_pictures_are_up_to_date(name, tmp_path):
    """``make docs`` draws them again."""
    image = pytest.importorskip("matplotlib.image", reason="needs the extra draw")
    path = tmp_path / "picture.png"
    assert cli.main(["draw", "--heads", "1", *pictures()[name].split(), "-o", str(path)]) == 0
    drawn, kept = image.imread(path), image.imread(DOCS / "pictures" / f"{name}.png")
    assert drawn.shape == kept.shape
    # Fonts differ from machine to machine, what is drawn does not.
    assert (abs(drawn - kept).max(-1) > 0.2).mean() < 0.02


def build(source, target):
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", source, target]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.full
@NEEDS_SPHINX
def test_the_site_is_built(tmp_path):
    done = build(DOCS, tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api.html").read_text()
    for name in ("na2d", "Problem", "save_bundle", "Family"):
        assert f">{name}<" in page
    assert (tmp_path / "_images" / "stride.png").is_file()


@pytest.mark.full
@NEEDS_SPHINX
@pytest.mark.parametrize("text", ["[a page](nowhere.md)", "![a picture](pictures/none.png)", "[a place](cuda.md#none)"])
def test_a_broken_link_fails(text, tmp_path):
    shutil.copytree(DOCS, tmp_path / "docs")
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    conf = tmp_path / "docs" / "conf.py"
    conf.write_text(conf.read_text().replace("def setup(", "def _unused("))
    page = tmp_path / "docs" / "speed.md"
    page.write_text(page.read_text() + f"\n{text}\n")
    done = build(tmp_path / "docs", tmp_path / "site")
    assert done.returncode != 0
    assert "speed.md" in done.stderr
