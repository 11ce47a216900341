"""Configs as text: what ``repr`` writes of one, read back without running anything that a text says."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["parse"]


def parse(text: str, kinds: Iterable[type]) -> Any:
    """Return the object of which ``repr`` writes a text.

    Parameters
    ----------
    text
        A call of one of the classes with keywords, whose values are numbers, words, ``None``, tuples, and such calls.
    kinds
        The dataclasses that may be named.

    Raises
    ------
    ValueError
        If it is anything else, or not as ``repr`` writes it: one config has one text.

    Examples
    --------
    >>> from na_compiler.schedules.shared.config_text import parse
    >>> from na_compiler.workspace import Workspace
    >>> parse("Workspace(buffers=((2, 3),), multiple=1)", [Workspace])
    Workspace(buffers=((2, 3),), multiple=1)
    """
    known = {kind.__name__: kind for kind in kinds}
    try:
        found = _value(ast.parse(text, mode="eval").body, known)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{_shown(text)} is no config: {error}") from None
    if repr(found) != text:
        raise ValueError(f"{_shown(text)} is not how this version writes it, which is {found!r}")
    return found


def _value(node: ast.expr, known: Mapping[str, type]) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str | None):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        return -_value(node.operand, known)
    if isinstance(node, ast.Tuple):
        return tuple(_value(one, known) for one in node.elts)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        if node.func.id not in known:
            raise ValueError(f"no config is called {node.func.id}; known are {', '.join(sorted(known))}")
        return known[node.func.id](**{str(one.arg): _value(one.value, known) for one in node.keywords})
    raise ValueError(f"{_shown(ast.unparse(node))} has no place in a config")


def _shown(text: str) -> str:
    return text if len(text) <= 80 else text[:80] + "..."
