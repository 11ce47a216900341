"""`HostLibrary`: shared libraries of this package that are compiled on the machine they are for, once."""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from na_compiler.runtime.folders import cache_folder

__all__ = ["HostCompileError", "HostLibrary", "NoCompilerError", "c_compiler", "cxx_compiler", "digest"]

_LOG = logging.getLogger("na_compiler")
# Where libraries went for which the cache could not be written.
_temporary: dict[str, Path] = {}


class HostCompileError(RuntimeError):
    """The system's compiler failed."""


class NoCompilerError(HostCompileError):
    """There is no compiler."""


def c_compiler() -> tuple[str, ...] | None:
    """Return the system's C compiler, with its arguments: ``CC``, or the first of the usual names on the path."""
    return _compiler("CC", "cc", "gcc", "clang")


def cxx_compiler() -> tuple[str, ...] | None:
    """Return the system's C++ compiler, with its arguments: ``CXX``, or the first of the usual names on the path."""
    return _compiler("CXX", "c++", "g++", "clang++")


def _compiler(variable: str, *names: str) -> tuple[str, ...] | None:
    named = os.environ.get(variable)
    # A path with spaces, or a command with arguments, as make reads it: "gcc -m64", "ccache gcc".
    commands = [(named,), tuple(shlex.split(named))] if named else [(name,) for name in names]
    found = ((shutil.which(command), arguments) for command, *arguments in commands)
    return next(((path, *arguments) for path, arguments in found if path), None)


@dataclass(frozen=True)
class HostLibrary:
    """A shared library, and how it is compiled.

    Parameters
    ----------
    name
        Of the file.
    what
        What it is, as errors say it.
    sources
        What the compiler is given: a C++ file first, or a C file.
    options
        Before the sources.
    libraries
        After them.
    parts
        All files that it is made of; default ``sources``.
    compiler
        For a library for another architecture; default: this machine's for C or C++.
    """

    name: str
    what: str
    sources: tuple[Path, ...]
    options: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    parts: tuple[Path, ...] = ()
    compiler: tuple[str, ...] | None = None

    def build(self, folder: Path | None = None) -> Path:
        """Build it, or find it built.

        Parameters
        ----------
        folder
            Where to put it. Default: the cache, where it is built once; where that cannot be written, a temporary
            folder of this process.

        Raises
        ------
        NoCompilerError
            If there is no compiler.
        HostCompileError
            If it fails.
        OSError
            If ``folder`` cannot be written.
        """
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            return self._compile(folder)
        # This machine's compiler is no part of the name: a library is found where there is none.
        another = () if self.compiler is None else (*self.compiler,)
        key = digest(*(self.parts or self.sources), texts=(*self.options, *self.libraries, *another))
        path = cache_folder() / "host" / key / self.name
        for place in (path, _temporary.get(key)):
            if place is not None and place.is_file():
                return place
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return self._compile(path.parent)
        except OSError:
            folder = Path(tempfile.mkdtemp(prefix="na_compiler-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            _temporary[key] = self._compile(folder)
            return _temporary[key]

    def _compile(self, folder: Path) -> Path:
        is_c = self.sources[0].suffix == ".c"
        compiler = self.compiler or (c_compiler() if is_c else cxx_compiler())
        if compiler is None:
            language, variable = ("C", "CC") if is_c else ("C++", "CXX")
            raise NoCompilerError(
                f"{self.what} needs a {language} compiler, and none was found; install one, set {variable}, or bring "
                f"{self.name} from a machine that has one"
            )
        started = time.perf_counter()
        # Built beside its place and renamed into it, so that it is whole or not there.
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as temporary:
            made = Path(temporary) / self.name
            command = [*compiler, *self.options, "-shared", "-fPIC", "-o", str(made), *self._given(), *self.libraries]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
            except (OSError, subprocess.CalledProcessError) as error:
                detail = (getattr(error, "stderr", None) or str(error)).strip()
                raise HostCompileError(f"{' '.join(compiler)} could not build {self.what}: {detail}") from error
            made.replace(folder / self.name)
        _LOG.info("built %s in %.1f s", folder / self.name, time.perf_counter() - started)
        return folder / self.name

    def _given(self) -> list[str]:
        """Return the sources as arguments: C++ first, and C as C behind it."""
        first, *others = map(str, self.sources)
        return [first, *(["-x", "c", *others, "-x", "none"] if others else [])]


def digest(*sources: Path, texts: tuple[str, ...] = ()) -> str:
    """Return a hash of sources, and of texts beside them."""
    hashed = hashlib.sha256()
    for source in sorted(sources):
        hashed.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    hashed.update("\0".join(texts).encode())
    return hashed.hexdigest()[:16]
