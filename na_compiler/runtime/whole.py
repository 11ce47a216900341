"""`load_whole`: runs a model that `na_compiler.whole.compile_whole` compiled, with TVM's runtime alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from na_compiler.runtime.folders import loadable
from na_compiler.runtime.library import load_runtime

if TYPE_CHECKING:
    import tvm_ffi

__all__ = ["Whole", "load_whole"]

_CPU = 1
_POOLED = 2  # tvm::runtime::memory::AllocatorType: memory is kept for the next call.


class Whole:
    """A loaded model. Make one with `load_whole`."""

    def __init__(self, module: tvm_ffi.Module) -> None:
        self._machine = module["vm_load_executable"]()
        self._machine["vm_initialization"](_CPU, 0, _POOLED)
        self._main = self._machine["main"]

    def __call__(self, *inputs: object) -> tvm_ffi.Tensor | Sequence[tvm_ffi.Tensor]:
        """Run the model.

        Parameters
        ----------
        *inputs
            Contiguous arrays on the CPU: NumPy's, torch's, or of any library with DLPack.

        Returns
        -------
        tvm_ffi.Tensor or a sequence of such
            ``numpy.from_dlpack`` and ``torch.from_dlpack`` take them.
        """
        import tvm_ffi  # noqa: PLC0415

        return self._main(*map(tvm_ffi.from_dlpack, inputs))


def load_whole(path: str | Path) -> Whole:
    """Load a model.

    Parameters
    ----------
    path
        What ``na-compile MODEL --whole`` wrote. It is native code: to load it is to trust who made it.

    Raises
    ------
    FileNotFoundError
        If there is no such file, or no runtime library of TVM's.
    OSError
        If its file system and that for temporary files both forbid to run what is on them.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    import tvm_ffi  # noqa: PLC0415

    load_runtime()
    return Whole(tvm_ffi.load_module(str(loadable(Path(path)))))
