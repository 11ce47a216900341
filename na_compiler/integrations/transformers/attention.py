"""The attention function: windows run in `na1d`, and all else as it does without us."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from na_compiler.functional import na1d
from na_compiler.integrations.transformers.masks import WindowMask
from na_compiler.integrations.transformers.say import say
from na_compiler.parameters import DTYPES, LONGEST_HEAD
from na_compiler.passes.decline import DeclinedError, need
from na_compiler.window import CUT

__all__ = ["na_attention_forward"]

# What SDPA has not, and ignores or refuses: a model that has it computes it in a function of its own.
_NOT_IN_SDPA = {"indices": "keys chosen one by one", "s_aux": "sinks", "softcap": "a softcap"}


def na_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend, as a function of transformers' ``AttentionInterface``.

    Parameters
    ----------
    module
        The layer.
    query
        ``[batch, heads, queries, head_dim]``.
    key
        ``[batch, heads_kv, keys, head_dim]``; ``heads`` is a multiple of ``heads_kv``, and nothing is repeated.
    value
        ``[batch, heads_kv, keys, head_dim_v]``.
    attention_mask
        What our mask function returned. Where that is a `WindowMask`, `na1d` computes the layer.
    dropout
        Of the weights. Other than 0 it is left to SDPA.
    scaling
        Of the scores. Default ``head_dim ** -0.5``.
    **options
        ``s_aux``: a logit for each head that takes part in the softmax and has no value (sinks); None without them.
        The rest goes to SDPA.

    Returns
    -------
    (Tensor, None)
        ``[batch, queries, heads, head_dim_v]``.

    Notes
    -----
    With a sink the denominator of the softmax is ``exp(lse) + exp(sink)``, so that the output is the one without it
    times ``sigmoid(lse - sink)``.
    """
    if isinstance(attention_mask, WindowMask):
        try:
            _check(query, key, value, attention_mask, dropout, options)
            return _attend(query, key, value, attention_mask, scaling, options.get("s_aux")), None
        except DeclinedError as why:
            say(_kind(module), str(why))
            attention_mask = attention_mask.made()
    if any(options.get(name) is not None for name in _NOT_IN_SDPA):
        return _eager(module, query, key, value, attention_mask, dropout, scaling, options)
    output: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )
    return output


def _check(
    query: Tensor, key: Tensor, value: Tensor, mask: WindowMask, dropout: float, options: dict[str, Any]
) -> None:
    """Decline what `na1d` does not compute."""
    batch, _, queries, keys = mask.shape
    fits = query.shape[2] == queries and key.shape[2] == value.shape[2] == keys
    same = query.shape[0] == key.shape[0] == value.shape[0] == batch
    need(fits and same, "layers with other tokens than their mask has")
    need(query.shape[1] % key.shape[1] == 0 and key.shape[1] == value.shape[1], "heads that are no groups")
    dtype = str(query.dtype).removeprefix("torch.")
    need(dtype in DTYPES and query.dtype == key.dtype == value.dtype, f"layers in {dtype}")
    need(query.device.type in {"cpu", "cuda"}, f"layers on {query.device.type}")
    width = max(query.shape[3], value.shape[3])
    need(width <= LONGEST_HEAD, f"layers with a head_dim of {width}")
    need(dropout == 0, "dropout of attention weights, in training")
    for name, what in (_NOT_IN_SDPA | {"position_bias": "a bias by position"}).items():
        need(name == "s_aux" or options.get(name) is None, f"layers with {what}")
    need(not options.get("output_attentions"), "weights that are wanted as an output")


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: WindowMask, scaling: float | None, sink: Tensor | None
) -> Tensor:
    tokens, window, keys = query.shape[2], mask.window, mask.keys
    # A static cache hands over all of its keys; none behind the last query is seen.
    rows = [tensor[:, :, :tokens].transpose(1, 2) for tensor in (query, key, value)]
    more = window.padded(tokens) - tokens
    if more:
        rows = [functional.pad(row, (0, 0, 0, 0, 0, more)) for row in rows]
        if keys is None and not window.is_causal:  # Windows that look ahead would see what is added.
            keys = torch.ones(rows[0].shape[0], tokens, dtype=torch.bool, device=query.device)
        keys = None if keys is None else functional.pad(keys, (0, more))
    attend = functools.partial(
        na1d, *rows, window.kernel_size, window.stride, is_causal=window.is_causal, scale=scaling, key_mask=keys,
        border=CUT,
    )  # fmt: skip
    output: Tensor
    if sink is None:
        output = attend()
        return output[:, :tokens]
    output, lse = attend(return_lse=True)
    kept = torch.sigmoid(lse - sink.float())
    return (output * kept[..., None].to(output.dtype))[:, :tokens]


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Attend by the model's own function, where SDPA has not what the model needs."""
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    what = " and ".join(what for name, what in _NOT_IN_SDPA.items() if options.get(name) is not None)
    if function is None:
        raise ValueError(
            f"attn_implementation='na_compiler' leaves this layer to SDPA, which has no {what} as "
            f"{type(module).__name__} needs it; attn_implementation='eager' would do"
        )
    say(_kind(module), f"what has {what}, where it is not in our kernels", to="its own eager attention")
    queries, keys = query.shape[2], key.shape[2]
    if mask is None and queries > 1 and options.get("is_causal", getattr(module, "is_causal", True)):
        # What SDPA does for `is_causal`: the first query sees the first key.
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None and mask.dtype is torch.bool:
        mask = torch.where(mask, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    result: tuple[Tensor, Tensor | None] = function(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **options
    )
    return result


def _kind(module: nn.Module) -> str:
    return str(getattr(getattr(module, "config", None), "model_type", type(module).__name__))
