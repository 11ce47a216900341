"""Models of other libraries: their layers run in our kernels."""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["convert"]

_LOG = logging.getLogger("na_compiler")


def convert(model: nn.Module, *, report: dict[str, str] | None = None) -> nn.Module:
    """Let what is neighborhood attention in a model run in our kernels, and say what became of it.

    Parameters
    ----------
    model
        Changed in place. Parameters, buffers, hooks and the training flag are kept, not copied: an optimizer that has
        the parameters still has them.
    report
        Gets what became of each layer that may be neighborhood attention, by its qualified name: ``"converted"``, or
        why it was left alone. The log has the same.

    Returns
    -------
    nn.Module
        The model; or its replacement, where the model is one of NATTEN's modules itself.

    Raises
    ------
    NotImplementedError
        For a module of NATTEN's with something that ours have not; see `na_compiler.passes.natten`. Nothing is changed
        then.

    Notes
    -----
    It knows NATTEN's modules, under any name; models of transformers with sliding windows or chunks, for which it
    chooses ``attn_implementation="na_compiler"`` (see `na_compiler.integrations.transformers`); and the layers of
    diffusers with neighborhood attention, which get a processor (`na_compiler.integrations.diffusers`).

    Examples
    --------
    >>> report = {}
    >>> model = na_compiler.convert(model, report=report)  # doctest: +SKIP
    """
    from na_compiler.passes.natten import convert_modules, is_ours  # noqa: PLC0415

    model, found = convert_modules(model, strict=True)
    others: dict[str, str] = {}
    integration = _integration("transformers")
    if integration is not None:
        others |= integration.convert_layers(model, integration.NAME)
    integration = _integration("diffusers")
    if integration is not None:
        others |= integration.convert_layers(model)
    _tell(others)
    if report is not None:
        report.update(found | others)
    if not found | others and any(map(is_ours, model.modules())):
        name = type(model).__name__
        _LOG.info("convert: the neighborhood attention in %s is this package's; nothing was changed", name)
    elif not found | others:
        _LOG.warning("convert: no layer of %s is one that is known here; nothing was changed", type(model).__name__)
    return model


def _integration(library: str) -> ModuleType | None:
    """Return what is here for a library's models: nobody has any whose library is not imported, or too old."""
    if sys.modules.get(library) is None:
        return None
    try:
        return importlib.import_module(f"na_compiler.integrations.{library}")
    except ImportError as error:
        _LOG.info("convert: models of %s are left alone: %s", library, error)
        return None


def _tell(report: dict[str, str]) -> None:
    layers: dict[str, list[str]] = {}
    for name, what in report.items():
        layers.setdefault(what, []).append(name)
    for what, names in layers.items():
        _LOG.info("%d layers: %s: %s", len(names), what, ", ".join(names))
