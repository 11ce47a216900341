"""Finds natten: the package, its submodules, and what is installed under its name. Loads nothing before it is asked."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.abc import InspectLoader
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["NAME", "RELEASES", "Finder", "full_version", "is_ours", "other_spec"]

NAME = "natten"
# The last release of each version whose names are known here.
RELEASES = {"0.14": "0.14.6", "0.15": "0.15.1", "0.17": "0.17.5", "0.20": "0.20.1", "0.21": "0.21.6"}


def full_version(version: str) -> str:
    """Return the release that a version means.

    Raises
    ------
    ValueError
        If it is none that is known.

    Examples
    --------
    >>> full_version("0.17"), full_version("0.17.1")
    ('0.17.5', '0.17.1')
    """
    parts = version.split(".") if isinstance(version, str) else []
    minor = ".".join(parts[:2])
    if minor not in RELEASES or len(parts) > 3 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"version must be one of {', '.join(RELEASES)}, or a release of these, got {version!r}")
    return version if len(parts) == 3 else RELEASES[minor]


def is_ours(module: ModuleType | None) -> bool:
    """Return whether a module that is imported was found here."""
    return isinstance(getattr(getattr(module, "__spec__", None), "loader", None), _Loader)


def other_spec() -> ModuleSpec | None:
    """Return the spec of a natten that is not ours, if one is installed."""
    for finder in sys.meta_path:
        find: Callable[..., ModuleSpec | None] = getattr(finder, "find_spec", lambda *_: None)
        spec = None if isinstance(finder, Finder) else find(NAME, None)
        # A folder of this name without __init__.py, such as a checkout's, is no package.
        if spec is not None and spec.origin is not None:
            return spec
    return None


class Finder(importlib.metadata.DistributionFinder):
    """Finds natten where no other finder has it; or, forced, before the others do.

    Parameters
    ----------
    release
        Whose names there are.
    is_forced
        Whether to come before a natten that is installed.
    """

    def __init__(self, release: str, *, is_forced: bool) -> None:
        self.release, self.is_forced = release, is_forced

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of natten, or of one of its submodules."""
        package, _, submodule = fullname.partition(".")
        if package != NAME:
            return None
        if not submodule:
            if not self._is_wanted():
                return None
            return ModuleSpec(fullname, _Loader(self.release), origin=__package__, is_package=True)
        if not is_ours(sys.modules.get(NAME)):
            return None
        contents = _contents(self.release)
        if submodule not in contents:
            return None
        is_package = any(other.startswith(f"{submodule}.") for other in contents)
        return ModuleSpec(fullname, _Loader(self.release), origin=__package__, is_package=is_package)

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        """Return the metadata of natten, for who asks for it or for all there are."""
        name = None if context is None else context.name
        if (name is None or name.lower() == NAME) and self._is_wanted():
            yield _Distribution(self.release)

    def _is_wanted(self) -> bool:
        return self.is_forced or other_spec() is None


def _contents(release: str) -> dict[str, dict[str, Any]]:
    # Loads torch.
    found: dict[str, dict[str, Any]] = importlib.import_module("na_compiler.compat.natten.names").contents(release)
    return found


class _Loader(InspectLoader):
    """Fills a module with the names of a release."""

    def __init__(self, release: str) -> None:
        self._release = release

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module; the package imports its submodules."""
        _, _, submodule = module.__name__.partition(".")
        contents = _contents(self._release)
        names = contents[submodule]
        vars(module).update(names)
        vars(module)["__all__"] = sorted(name for name in names if not name.startswith("_"))
        vars(module)["__doc__"] = f"The names of NATTEN {self._release}, by na_compiler."
        vars(module)["__getattr__"] = _refuse(module.__name__, submodule, self._release)
        if not submodule:
            for name in contents:
                if name:
                    importlib.import_module(f"{NAME}.{name}")

    def get_source(self, fullname: str) -> None:
        """Return none: there is no source."""


def _refuse(module: str, submodule: str, release: str) -> Callable[[str], Any]:
    """Make what is asked for names that a module has not: says in which version they are."""

    def refuse(name: str) -> Any:
        message = f"module {module!r}, which is na_compiler's with the names of {release}, has no attribute {name!r}"
        if not name.startswith("_"):
            for where in dict.fromkeys((submodule, "functional")):
                versions = [version for version, last in RELEASES.items() if name in _contents(last).get(where, {})]
                if versions and not release.startswith(f"{versions[-1]}."):
                    place = ".".join(filter(None, (NAME, where, name)))
                    message += f"; {place} is there by na_compiler.compat.natten.install(version={versions[-1]!r})"
                    break
        raise AttributeError(message, name=name)

    return refuse


class _Distribution(importlib.metadata.Distribution):
    """What is said of natten to who asks which version is installed."""

    def __init__(self, release: str) -> None:
        self._release = release

    def read_text(self, filename: str) -> str | None:
        """Return a file of the metadata."""
        texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {self._release}\n"
            "Summary: The names of NATTEN, by na_compiler\n",
            "top_level.txt": f"{NAME}\n",
        }
        return texts.get(filename)

    def locate_file(self, path: Any) -> Path:
        """Return where a file would be: there are none."""
        return Path(__file__).parent / str(path)
