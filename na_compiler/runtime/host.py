"""`HostLibrary`: shared libraries of this package that are compiled on the machine they are for, once."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from na_compiler.runtime.folders import cache_folder, loadable, process_folder
from na_compiler.runtime.temporary import clear_leftovers, temporary_folder

__all__ = ["HostCompileError", "HostLibrary", "NoCompilerError", "c_compiler", "cxx_compiler", "digest"]

_LOG = logging.getLogger("na_compiler")
# Of temporary folders.
_PREFIX = ".building-"


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
        if os.path.isfile(path):  # noqa: PTH113 - Path's raises where a folder cannot be read
            with contextlib.suppress(OSError):  # The cache deletes first what was not used longest.
                os.utime(path)
            return loadable(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            clear_leftovers(path.parent, _PREFIX)
            return loadable(self._compile(path.parent))
        except OSError as error:
            kept = process_folder() / "host" / key / self.name
            if not kept.is_file():
                _LOG.info("the cache in %s cannot be used: %s", cache_folder(), error)
                kept.parent.mkdir(parents=True, exist_ok=True)
                self._compile(kept.parent)
            return loadable(kept)

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
        with temporary_folder(folder, _PREFIX) as temporary:
            made = temporary / self.name
            command = [*compiler, *self.options, "-shared", "-fPIC", "-o", str(made), *self._given(), *self.libraries]
            try:
                # In English, so that what it says can be known.
                environment = {**os.environ, "LC_ALL": "C"}
                subprocess.run(command, check=True, capture_output=True, text=True, env=environment)  # noqa: S603
            except (OSError, subprocess.CalledProcessError) as error:
                detail = (getattr(error, "stderr", None) or str(error)).strip()
                if os.strerror(errno.ENOSPC) in detail:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
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
