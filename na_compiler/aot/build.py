"""`build_library`: compiles the torch operators for programs without Python, with the system's C++ compiler."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import subprocess
import tempfile
import time
from pathlib import Path

from na_compiler.onnx.ort.build import cxx_compiler
from na_compiler.runtime.bundle import FORMAT
from na_compiler.runtime.folders import cache_folder, runtime_library
from na_compiler.runtime.kernel import ABI

__all__ = ["LIBRARY", "build_library", "header_folder"]

_LOG = logging.getLogger("na_compiler")
LIBRARY = "libna_compiler_torch.so"
# The stable ABI of torch 2.11: the library runs with every later version as well.
_TORCH = "0x020b000000000000"
_FLAGS = (
    "-std=c++20",
    "-O2",
    "-s",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-pthread",
)


def header_folder() -> Path:
    """Return the folder of ``na_compiler.h``, which a program includes."""
    return Path(__file__).parent


def build_library(folder: str | Path | None = None) -> Path:
    """Build the library of torch operators, or find it built.

    Parameters
    ----------
    folder
        Where to put it. Default: the cache, where it is built once for each version of this package.

    Returns
    -------
    Path
        The library: load it with ``dlopen``, or link the program with it. It finds ``libtvm_ffi.so`` and
        ``libtvm_runtime.so`` in the folders of ``NA_COMPILER_TVM_LIB``, in the bundle, beside itself, or where they are
        on this machine.

    Raises
    ------
    RuntimeError
        If there is no C++ compiler, or it fails.

    Notes
    -----
    A Python process needs it not, and cannot have it beside ``import na_compiler``: both define the same operators.
    """
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return _compile(Path(folder) / LIBRARY)
    path = cache_folder() / "host" / f"torch-{_fingerprint()}" / LIBRARY
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    return _compile(path)


def _compile(path: Path) -> Path:
    compiler = cxx_compiler()
    if compiler is None:
        raise RuntimeError(
            f"the library of torch operators needs a C++ compiler, and none was found; install one, set CXX, or bring "
            f"{LIBRARY} from a machine that has one"
        )
    started = time.perf_counter()
    sources = [str(header_folder() / "torch_library.cc"), "-x", "c", str(_package() / "runtime" / "launcher.c")]
    with tempfile.TemporaryDirectory(prefix=".building-", dir=path.parent) as temporary:
        made = Path(temporary) / path.name
        torch = [f"-L{_folder('torch') / 'lib'}", "-ltorch_cpu", "-ldl"]
        command = [compiler, *_FLAGS, *_definitions(), "-o", str(made), *sources, *torch]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
        except (OSError, subprocess.CalledProcessError) as error:
            detail = (getattr(error, "stderr", None) or str(error)).strip()
            raise RuntimeError(f"{compiler} could not build the library of torch operators: {detail}") from error
        made.replace(path)
    _LOG.info("built %s in %.1f s", path, time.perf_counter() - started)
    return path


def _definitions() -> list[str]:
    folders = [str(_folder("tvm_ffi") / "lib")]
    try:
        folders.append(str(runtime_library().parent))
    except FileNotFoundError:
        _LOG.info("no libtvm_runtime.so is installed here: the library has to find one where it runs")
    return [
        f"-I{_folder('torch') / 'include'}",
        f"-I{_folder('tvm_ffi') / 'include'}",
        f"-DTORCH_TARGET_VERSION={_TORCH}",
        f"-DNA_BUNDLE_FORMAT={FORMAT}",
        f"-DNA_KERNEL_ABI={ABI}",
        f'-DNA_TVM_FOLDERS="{":".join(folders)}"',
    ]


def _package() -> Path:
    return Path(__file__).parent.parent


@functools.cache
def _folder(package: str) -> Path:
    """Return where a package is installed, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"building the library of torch operators needs the headers of {package}; install it")
    return Path(spec.origin).parent


def _fingerprint() -> str:
    digest = hashlib.sha256()
    sources = [*header_folder().glob("*.cc"), *header_folder().glob("*.h"), _package() / "runtime" / "launcher.c"]
    sources += [*(_package() / "onnx" / "ort").glob("*.cc"), *(_package() / "onnx" / "ort").glob("*.h")]
    for source in sorted(sources):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    digest.update("\0".join((cxx_compiler() or "", *_FLAGS, *_definitions())).encode())
    return digest.hexdigest()[:16]
