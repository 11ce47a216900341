"""The site: `make docs`. Warnings are errors, so that a broken link or reference fails."""

import subprocess
import sys
from pathlib import Path

import na_compiler

sys.path.insert(0, str(Path(__file__).parent))
import way_of_a_call

project = "na_compiler"
version = release = na_compiler.__version__
author = "The na_compiler developers"
copyright = author  # noqa: A001 - Sphinx's name

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"na_compiler {version}"
exclude_patterns = ["api/generated/*.rst.tmp"]

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

napoleon_google_docstring = False
napoleon_use_rtype = False
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
maximum_signature_line_length = 100
# Single backticks in docstrings name things of this package, or are words.
default_role = "code"

# What the pictures show, so that they are those of the present code.
PICTURES = {
    "dilated-causal": "--layout 24x28 --head-dim 32 --kernel-size 5 --dilation 2 --causal 1x0 --target llvm:x86-64-v4",
    "stride": "--layout 64 --head-dim 32 --kernel-size 13 --stride 4 --target llvm:x86-64-v4",
    "hopper": "--layout 128x128 --head-dim 128 --kernel-size 33 --dtype bfloat16 --target cuda:sm_90a",
    "planes": "--layout 12x16x16 --head-dim 32 --kernel-size 5 --target llvm:x86-64-v4",
}


def setup(_app: object) -> None:
    """Draw the pictures."""
    for name, arguments in PICTURES.items():
        path = Path(__file__).parent / "pictures" / f"{name}.png"
        command = [sys.executable, "-m", "na_compiler.cli", "draw", "--heads", "1", *arguments.split(), "-o", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
    way_of_a_call.draw(Path(__file__).parent / "pictures" / "way-of-a-call.png")
