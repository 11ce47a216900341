"""What is left to other kernels is said once for each kind, in one line of the log."""

from __future__ import annotations

import logging

import torch

__all__ = ["say"]

_LOG = logging.getLogger("na_compiler")
_said: set[tuple[str, str, str]] = set()


def say(model: str, what: str, to: str = "SDPA") -> None:
    """Log that something is left to another kernel, the first time that it is.

    Parameters
    ----------
    model
        The kind of model, ``config.model_type``.
    what
        What is left, in the plural.
    to
        What computes it.
    """
    if not torch.compiler.is_compiling() and (model, what, to) not in _said:
        _said.add((model, what, to))
        _LOG.info("%s: left to %s: %s", model, to, what)
