"""Makes ``import natten`` mean this package, where it is asked for: models that call NATTEN run unchanged.

Three ways to ask: `install`, before the model is imported; ``python -m na_compiler.compat.natten script.py``, for
scripts that nobody wants to edit; the environment variable ``NA_COMPILER_NATTEN``, which is read when ``na_compiler``
is imported. A NATTEN that is installed is never shadowed, unless `install` is told to.

Which names there are depends on the version asked for: those of 0.21 by default, those of 0.14 to 0.17 with the split
operators (``na2d_qk``, ``natten2dqkrpb`` and so on) only by name, since models choose their way by what they find.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys

from na_compiler.compat.natten.finder import NAME, Finder, full_version, is_ours, other_spec

__all__ = ["VARIABLE", "install", "install_from_environment", "uninstall"]

_LOG = logging.getLogger("na_compiler")
# "1" asks for the latest version's names, a version for that one's; empty and "0" for nothing.
VARIABLE = "NA_COMPILER_NATTEN"


def install(version: str = "0.21", *, force: bool = False) -> bool:
    """Make ``import natten`` mean this package.

    Parameters
    ----------
    version
        Whose names there are: ``"0.14"``, ``"0.15"``, ``"0.17"``, ``"0.20"`` or ``"0.21"``, or a release of these such
        as ``"0.17.5"``. Default ``"0.21"``. ``natten.__version__`` is the release, or the last one of the version.
    force
        Whether to shadow a NATTEN that is installed. Default False.

    Returns
    -------
    bool
        Whether ``import natten`` means this package now; not where another one is installed and ``force`` is False.

    Raises
    ------
    ValueError
        For a version that is not known.
    RuntimeError
        If natten was imported already, as another version or, with ``force``, as another package: what was taken from
        it would stay.

    Notes
    -----
    Nothing is imported before ``import natten`` is: torch neither. ``importlib.util.find_spec("natten")`` and
    ``importlib.metadata.version("natten")`` find it as well.

    Examples
    --------
    >>> from na_compiler.compat import natten as compat
    >>> compat.install()
    True
    >>> import natten
    >>> natten.na2d(*torch.randn(3, 1, 8, 8, 2, 16), kernel_size=3).shape
    torch.Size([1, 8, 8, 2, 16])
    >>> compat.uninstall()
    """
    release = full_version(version)
    imported = sys.modules.get(NAME)
    if imported is not None and is_ours(imported):
        if imported.__version__ != release:
            raise RuntimeError(
                f"natten was imported already, with the names of {imported.__version__}: install "
                f"version={version!r} before that, or in another process"
            )
        return True
    if force and imported is not None:
        raise RuntimeError("natten was imported already, and is not ours: install before that, or in another process")
    if not force and (imported is not None or other_spec() is not None):
        _LOG.warning("natten is installed, and is left as it is; install(force=True) would shadow it")
        return False
    _remove_finders()
    sys.meta_path.insert(0, Finder(release, is_forced=force))
    importlib.invalidate_caches()
    return True


def uninstall() -> None:
    """Undo `install`: later imports of natten find what they found before. What was imported stays with who has it."""
    _remove_finders()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == NAME and is_ours(module):
            del sys.modules[name]


def install_from_environment() -> bool:
    """Call `install` as the environment variable ``NA_COMPILER_NATTEN`` says; return whether natten means ours.

    Raises
    ------
    ValueError
        If the variable is neither ``0``, nor ``1``, nor a version that is known.
    """
    value = os.environ.get(VARIABLE, "").strip()
    if value in {"", "0"}:
        return False
    try:
        return install() if value == "1" else install(value)
    except ValueError as error:
        raise ValueError(f"the environment variable {VARIABLE} must be 0, 1 or a version: {error}") from None


def _remove_finders() -> None:
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Finder)]
