"""The mask function: a window stays a window, and everything else becomes the mask that SDPA gets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing

from na_compiler.integrations.transformers.patterns import Window, window_of
from na_compiler.integrations.transformers.say import say
from na_compiler.passes.decline import DeclinedError, need

__all__ = ["FEWEST_TOKENS", "WindowMask", "na_mask"]

# Shorter sequences are left to SDPA: there is little to gain where a call takes longer than what it computes, and a
# kernel has at least as many tokens.
FEWEST_TOKENS = 64


class WindowMask(Tensor):
    """A mask ``[batch, 1, queries, keys]`` that is known to be a window, and that nobody has made yet.

    Anything that is computed with it is computed with the mask itself, a tensor of booleans: where a model slices it,
    adds to it or hands it to another attention function, it gets what it expects.

    Parameters
    ----------
    window
        What it is, but for padding.
    keys
        ``[batch, queries]``: False hides a key, which is padding, from all queries; ``None`` without padding.
    make
        Returns the mask. Called once, when it is needed.
    shape
        Of the mask.
    device
        Where it is.
    """

    window: Window
    keys: Tensor | None

    @staticmethod
    def __new__(
        cls: type[WindowMask],
        window: Window,
        keys: Tensor | None,
        make: Callable[[], Tensor],
        shape: tuple[int, ...],
        device: torch.device,
    ) -> WindowMask:
        """Return a tensor without memory."""
        made: WindowMask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)  # noqa: SLF001
        made.window, made.keys = window, keys
        made._make = functools.cache(make)
        return made

    _make: Callable[[], Tensor]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment] # noqa: SLF001

    def made(self) -> Tensor:
        """Return the mask: True where a query sees a key."""
        return self._make()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute with the mask itself; on its way to another device it stays a window."""
        options = kwargs or {}
        if function is torch.ops.aten._to_copy.default and options.get("dtype") in {None, torch.bool}:  # noqa: SLF001
            source, device = args[0], options.get("device") or args[0].device
            keys = None if source.keys is None else source.keys.to(device)
            return cls(source.window, keys, lambda: source.made().to(device), tuple(source.shape), device)
        args, kwargs = tree_map_only(WindowMask, WindowMask.made, (args, options))
        return function(*args, **kwargs)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"WindowMask({self.window}, shape={tuple(self.shape)})"


def na_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    config: Any = None,
    **options: Any,
) -> Tensor | None:
    """Return a `WindowMask` for a whole sequence with a window, and for anything else what SDPA gets.

    Parameters
    ----------
    batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device, config, **options
        What transformers calls a function of its ``AttentionMaskInterface`` with.

    Returns
    -------
    Tensor or None
        ``[batch, 1, queries, keys]``, booleans; ``None`` where ``is_causal`` says it all.
    """
    sizes = (batch_size, q_length, kv_length, q_offset, kv_offset)
    if is_tracing(attention_mask):  # Passes look at masks by their content; anything else would break the graph.
        traced: Tensor | None = sdpa_mask(
            *sizes, mask_function, attention_mask, device=device, config=config, **options
        )
        return traced
    make: Callable[..., Tensor | None] = functools.partial(
        sdpa_mask, *sizes, mask_function, attention_mask, device=device, config=config
    )
    try:
        window = _window(q_length, kv_length, q_offset, kv_offset, mask_function)
        keys = _keys(q_length, attention_mask)
    except DeclinedError as why:
        say(getattr(config, "model_type", "a model"), str(why))
        return make(**options)
    always = options | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    whole: Callable[[], Any] = functools.partial(make, **always)
    return WindowMask(window, keys, whole, (batch_size, 1, q_length, kv_length), torch.device(device))


def _window(
    queries: int, keys: int, first_query: int | Tensor, first_key: int, mask_function: Callable[..., Any]
) -> Window:
    """Return the window that a kernel computes; decline what it does not."""
    need(type(queries) is int and type(keys) is int, "sizes that are not known")
    window = window_of(mask_function)
    # Keys that are there already: the window begins before the first query.
    need(int(first_query) == 0 and first_key == 0 and keys >= queries, "steps with keys of before (decoding)")
    need(window.is_causal or keys == queries, "windows that look to both sides, over keys of other sequences")
    need(queries > window.kernel_size, f"sequences of at most {window.kernel_size} tokens, which is the window")
    need(queries >= FEWEST_TOKENS, f"sequences of less than {FEWEST_TOKENS} tokens")
    return window


def _keys(queries: int, attention_mask: Tensor | None) -> Tensor | None:
    """Return which tokens are no padding, ``[batch, queries]``; ``None`` where all are."""
    if attention_mask is None:
        return None
    # Beyond its end a mask hides what there is, also where it hides nothing itself.
    need(attention_mask.shape[1] >= queries, "sequences that are longer than the mask of their tokens")
    if bool(attention_mask[:, :queries].all()):
        return None
    return attention_mask[:, :queries].bool()
