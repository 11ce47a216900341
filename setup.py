"""What pyproject.toml cannot say: packages, and the description on a package index.

Packages are found, so that a family of kernels is a folder and no line here; ``schedules/`` is na_compiler.schedules.

The description is the README without what is dead there. An index shows the text alone. A link to a file of the source
tree, or a picture in it, leads nowhere there, and the project has no address to complete them with: a link becomes its
text, with the file's name, and a picture its caption.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup


def without_relative_links(text: str) -> str:
    """Return Markdown whose links all lead somewhere, wherever it is shown."""
    text = re.sub(r"!\[([^\]]*)\]\((?!https?://)[^)]+\)", r"*\1: the picture is in the source archive.*", text)

    def plain(match: re.Match) -> str:
        name, target = match[1], match[2]
        target = target.partition("#")[0]
        return name if name.strip("`") == target else f"{name} (`{target}` in the source archive)"

    return re.sub(r"\[([^\]]+)\]\((?!https?://|#)([^)]+)\)", plain, text)


setup(
    packages=[
        *find_packages(include=["na_compiler", "na_compiler.*"]),
        "na_compiler.schedules",
        *(f"na_compiler.schedules.{name}" for name in find_packages("schedules")),
    ],
    long_description=without_relative_links((Path(__file__).parent / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
