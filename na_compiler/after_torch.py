"""Registers the operators when torch is imported after this package.

torch finds an operator only where it was registered: when it loads an exported program, say. A process that imports
torch first gets them with this package. One that imports this package first, and has not asked for anything of it that
needs torch, gets them at the end of ``import torch``: torch is not imported for them, since much works without it.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register"]

_LOG = logging.getLogger("na_compiler")


def register() -> None:
    """Register torch's operators: now if torch is imported, or else when it is."""
    if sys.modules.get("torch") is not None:
        _register_operators()
    else:
        sys.meta_path.insert(0, _Finder())


def _register_operators() -> None:
    importlib.import_module("na_compiler.bound")
    importlib.import_module("na_compiler.ops.torchscript").register_symbolics()


class _Finder(MetaPathFinder):
    """Finds torch as the other finders do, with a loader that registers the operators as well."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return torch's spec."""
        if fullname != "torch":
            return None
        for finder in sys.meta_path:
            find: Callable[..., ModuleSpec | None] = getattr(finder, "find_spec", lambda *_: None)
            spec = None if finder is self else find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _ThenRegister(self, spec.loader)
                return spec
        return None


class _ThenRegister(Loader):
    """Another loader, and the operators after it."""

    def __init__(self, finder: _Finder, loader: Loader) -> None:
        self._finder, self._loader = finder, loader

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Make the module, as the other loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, and register the operators."""
        # From here on everything is as without us: what reads torch's source finds its own loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        try:
            _register_operators()
        except Exception as error:  # noqa: BLE001 - a torch that we cannot use is still one that others can.
            _LOG.warning("torch.ops.na_compiler has no operators: %s: %s", type(error).__name__, error)
