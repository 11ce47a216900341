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
    """Register torch's operators, and how they take shards: now if these parts of torch are imported, or else then."""
    _after("torch", _register_operators, "torch.ops.na_compiler has no operators")
    _after("torch.distributed.tensor", _register_sharding, "na_compiler's operators take no DTensor")


def _after(name: str, action: Callable[[], None], failed: str) -> None:
    if sys.modules.get(name) is not None:
        action()
    else:
        sys.meta_path.insert(0, _Finder(name, action, failed))


def _register_operators() -> None:
    importlib.import_module("na_compiler.bound")
    importlib.import_module("na_compiler.ops.torchscript").register_symbolics()


def _register_sharding() -> None:
    importlib.import_module("na_compiler.bound")
    importlib.import_module("na_compiler.distributed.sharding").register()


class _Finder(MetaPathFinder):
    """Finds a module as the other finders do, with a loader that does something after it.

    Parameters
    ----------
    name
        Of the module.
    action
        What is done when it is imported.
    failed
        What to say if that raises.
    """

    def __init__(self, name: str, action: Callable[[], None], failed: str) -> None:
        self.name, self.action, self.failed = name, action, failed

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's spec."""
        if fullname != self.name:
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
    """Another loader, and what is done after it."""

    def __init__(self, finder: _Finder, loader: Loader) -> None:
        self._finder, self._loader = finder, loader

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Make the module, as the other loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, and do what comes after it."""
        # From here on everything is as without us: what reads the module's source finds its own loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        try:
            self._finder.action()
        except Exception as error:  # noqa: BLE001 - a torch that we cannot use is still one that others can.
            _LOG.warning("%s: %s: %s", self._finder.failed, type(error).__name__, error)
