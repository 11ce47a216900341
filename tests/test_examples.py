"""The examples that are scripts: each run as a user runs it."""

import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(folder, *options):
    command = [sys.executable, EXAMPLES / "denoise.py", folder, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(printed, folder):
    error = float(re.search(r"relative error on a \d+x\d+ crop (\S+)", printed)[1])
    assert error < 1e-5
    rows = {name.strip(): float(value) for name, value in re.findall(r"│ ([^│]+?) +│[^│]*│ +([\d.]+) │", printed)}
    noisy, ours = rows.pop("none: the noisy picture"), rows.pop("na_compiler")
    assert set(rows) == {"scikit-image", "scikit-image, fast mode"}
    assert ours > noisy + 6
    assert ours > max(rows.values()) - 2
    height, width, _ = matplotlib.image.imread(folder / "denoise.png").shape
    assert width > height > 500
    return noisy, ours


def test_transformers_prefill(capsys):
    """The two ways agree, which it checks; a machine that runs tests tells nothing of their times."""
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'na-compiler[transformers]'")
    import transformers_prefill

    transformers_prefill.main(
        ["--tokens", "64", "--window", "16", "--layers", "1", "--hidden", "64", "--heads", "2", "--repeats", "1"]
    )
    assert re.match(r"mistral, window 16 of 64 tokens: sdpa [\d.]+ ms, na_compiler [\d.]+ ms", capsys.readouterr().out)


def test_denoise(tmp_path):
    """On a part of the photograph."""
    folder = tmp_path / "new" / "folder"
    check(run(folder, "--size", "160"), folder)


@pytest.mark.full
def test_denoise_the_whole_photograph(tmp_path):
    noisy, ours = check(run(tmp_path), tmp_path)
    assert 20.5 < noisy < 21.5
    assert ours > 29.3
