"""`register`: gives a session of ONNX Runtime the operators and a bundle of kernels."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from na_compiler.onnx.ort.build import build_library
from na_compiler.runtime.bundle import Bundle

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["BUNDLE_ENTRY", "register"]

BUNDLE_ENTRY = "na_compiler.bundle"


def register(
    session_options: onnxruntime.SessionOptions,
    bundle: str | os.PathLike[str] | Bundle | None = None,
    *,
    library: str | os.PathLike[str] | None = None,
) -> None:
    """Register the operators with the options that sessions are made of.

    Parameters
    ----------
    session_options
        Changed.
    bundle
        Folder of compiled kernels, as `na_compiler.save_bundle` and ``na-compile`` write it; or one that is loaded.
        Default: those of ``NA_COMPILER_BUNDLE``, separated as in ``PATH``.
    library
        The operator library, if it was built elsewhere. Default: built now, or found in the cache.

    Raises
    ------
    RuntimeError
        If the library cannot be built, or, as ONNX Runtime's own exception, if there is no bundle or it is damaged.

    Notes
    -----
    Kernels run on the session's own threads (``intra_op_num_threads``). A bundle is native code: to use one is to trust
    whoever made it.

    A node whose problem has no kernel in the bundle is an error: when the session is made if the model fixes its
    layout, else when it runs. The model's own function is not used in its place.

    Examples
    --------
    >>> import onnxruntime
    >>> options = onnxruntime.SessionOptions()
    >>> register(options, "classifier.bundle")  # doctest: +SKIP
    >>> session = onnxruntime.InferenceSession("classifier.onnx", options)  # doctest: +SKIP
    """
    with contextlib.suppress(ImportError):
        # A process must have one libtvm_ffi.so, and Python's is found by nobody but itself.
        import tvm_ffi  # noqa: F401, PLC0415
    path = Path(build_library() if library is None else library).absolute()
    if not path.is_file():
        raise FileNotFoundError(f"no operator library at {path}; na-compile ort-library -o {path.parent} builds one")
    if bundle is not None:
        folder = bundle.folder if isinstance(bundle, Bundle) else Path(bundle)
        session_options.add_session_config_entry(BUNDLE_ENTRY, str(folder.absolute()))
    session_options.register_custom_ops_library(str(path))
