"""Which window a mask function of transformers is, told by what it is made of.

transformers composes masks from functions of indices: ``and_masks(sliding_window_overlay(w), causal_mask_function)``,
with more around them for packed sequences, images or what a model adds. They are known by the names of the functions
that made them and by what those hold on to. What is not known completely is declined, and computed from its mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from na_compiler.passes.decline import DeclinedError, need

__all__ = ["Window", "window_of"]

_MODULE = "transformers.masking_utils"
# What is said of a mask with one of these in it, by the function of transformers that made it; the first that is.
_LEFT = {
    "packed_sequence_mask_function": "sequences packed one after another (packed positions)",
    "remap_positions_for_packed_sequence": "sequences packed one after another (packed positions)",
    "blockwise_overlay": "tokens, of images perhaps, that see each other in both directions",
    "or_masks": "tokens, of images perhaps, that see each other in both directions",
}
# What is left of a mask without a window.
_FULL = {
    "bidirectional_mask_function": "full attention in both directions",
    "causal_mask_function": "full causal attention",
}
# A window's function, what it holds the size in, and the function that it comes with.
_WINDOWS = (
    ("sliding_window_overlay", "sliding_window", "causal_mask_function"),
    ("chunked_overlay", "chunk_size", "causal_mask_function"),
    ("sliding_window_bidirectional_overlay", "sliding_window", "bidirectional_mask_function"),
)


@dataclass(frozen=True)
class Window:
    """A window along the tokens, cut off at the ends of the sequence.

    Parameters
    ----------
    kernel_size
        Tokens that a query sees at most, itself among them.
    stride
        1 for a sliding window; ``kernel_size`` for chunks, in which a query sees what is before it in its own chunk.
    is_causal
        Whether a query sees none behind it. Otherwise as many before it as behind it.
    """

    kernel_size: int
    stride: int = 1
    is_causal: bool = True

    def padded(self, tokens: int) -> int:
        """Return how many tokens the kernel gets: at least those there are, and few different numbers of them.

        A kernel is compiled for a number of tokens, and prompts have all lengths. Tokens that are added behind a
        causal sequence are seen by no other, so that the result is the same; behind others they have to be hidden. At
        most an eighth is added, or 63 tokens.
        """
        step = max(64, 1 << max(tokens.bit_length() - 4, 0))
        return -(-tokens // step) * step


def window_of(mask_function: Callable[..., Any]) -> Window:
    """Return the window that a mask function is.

    Parameters
    ----------
    mask_function
        As transformers hands it to a mask interface: of batch, head, query and key indices.

    Raises
    ------
    DeclinedError
        If it is another mask, or may be; says what is known of it.
    """
    parts = [(_maker(part), part) for part in _parts(mask_function)]
    names = sorted(name for name, _ in parts)
    for name, left in _LEFT.items():
        need(name not in names, left)
    for name, left in _FULL.items():
        need(names != [name], left)
    for overlay, held, direction in _WINDOWS:
        if names == sorted([direction, overlay]):
            values = _held(dict(parts)[overlay])
            size: Any = values.get(held)
            need(type(size) is int and size > 0, f"a window of {size!r}")
            if overlay == "chunked_overlay":
                need(not bool(values["left_padding"].any()), "chunks that begin behind each sequence's own padding")
                return Window(size, stride=size)
            return Window(size) if direction == "causal_mask_function" else Window(2 * size + 1, is_causal=False)
    raise DeclinedError(f"a mask that is not known here ({', '.join(names)})")


def _parts(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Yield the functions that must all hold."""
    if _maker(function) == "and_masks":
        for part in _held(function)["mask_functions"]:
            yield from _parts(part)
    else:
        yield function


def _maker(function: Callable[..., Any]) -> str:
    """Return the name of a function of transformers, or of the one that returned it."""
    name = getattr(function, "__qualname__", type(function).__name__)
    return name.partition(".")[0] if getattr(function, "__module__", None) == _MODULE else f"{name} of its own"


def _held(function: Callable[..., Any]) -> dict[str, Any]:
    return dict(inspect.getclosurevars(function).nonlocals)
