"""What the layers of 0.14 to 0.17 share: a bias by relative position, dropout of attention weights, padding."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor, nn

from na_compiler.compat.natten.older import fused
from na_compiler.compat.natten.split import Flags, Ints, attend
from na_compiler.ops.projection import split_projection
from na_compiler.traced import canonical_parameters

__all__ = ["OldNeighborhoodAttention"]

_LOG = logging.getLogger("na_compiler")


@functools.cache
def _say_that_weights_are_dropped(layer: str) -> None:
    _LOG.info(
        "%s drops attention weights: in training it takes the split operators, which are exact, and several times as "
        "slow as the kernel that attn_drop=0 and inference take",
        layer,
    )


class OldNeighborhoodAttention(nn.Module):
    """Multi-head neighborhood attention, channels last, with the parameters ``qkv``, ``rpb`` and ``proj``.

    Parameters
    ----------
    rank
        Axes of the layout.
    dim
        Channels of input and output; a multiple of ``num_heads``.
    num_heads
        Attention heads.
    kernel_size, dilation, is_causal
        An int (or bool), or one for each axis.
    has_bias
        Whether there is ``rpb``, ``[num_heads, 2 kernel_size - 1, ...]``, added to the scores by relative position.
    qkv_bias
        Whether the projection to query, key and value has a bias.
    qk_scale
        Of the scores; default ``(dim // num_heads) ** -0.5``.
    attn_drop, proj_drop
        Dropout probabilities of attention weights, and after the output projection.
    pads
        Whether an input smaller than ``kernel_size * dilation`` is padded, before ``qkv``, and the output cropped;
        otherwise it is refused.

    Raises
    ------
    ValueError
        If arguments do not fit each other, and on call, if the input does not.

    Notes
    -----
    While attention weights are dropped, in training with ``attn_drop`` other than 0, it takes the split operators, and
    the log says so once; otherwise one kernel.
    """

    def __init__(
        self,
        rank: int,
        dim: int,
        num_heads: int,
        kernel_size: Ints,
        dilation: Ints | None,
        is_causal: Flags | None,
        has_bias: bool,
        qkv_bias: bool,
        qk_scale: float | None,
        attn_drop: float,
        proj_drop: float,
        pads: bool,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim < 1 or dim % num_heads:
            near = max(dim // max(num_heads, 1), 1) * max(num_heads, 1)
            raise ValueError(
                f"dim must be a multiple of num_heads, both at least 1, got dim={dim} and num_heads={num_heads}; "
                f"dim={near} with num_heads={max(num_heads, 1)} would work"
            )
        self.rank, self.num_heads, self.head_dim, self.pads = rank, num_heads, dim // num_heads, pads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        parameters = canonical_parameters(rank, kernel_size, 1, dilation, is_causal)
        self.kernel_size, _, self.dilation, self.is_causal = parameters
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        if has_bias:
            self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * size - 1 for size in self.kernel_size)))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        else:
            self.register_parameter("rpb", None)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Attend.

        Parameters
        ----------
        x
            ``[batch, *layout, dim]``.

        Returns
        -------
        Tensor
            Of the same shape.
        """
        if x.dim() != self.rank + 2 or x.shape[-1] != self.qkv.in_features:
            raise ValueError(
                f"the input of {type(self).__name__} must have {self.rank + 2} dimensions, the last of them "
                f"{self.qkv.in_features} (dim), got shape {tuple(x.shape)}"
            )
        layout = x.shape[1:-1]
        if self.pads:
            x = self._padded(x)
        query, key, value = split_projection(self.qkv(x), self.num_heads, self.head_dim)
        drops = self.training and self.attn_drop.p > 0
        if drops:
            if not torch.compiler.is_compiling():
                _say_that_weights_are_dropped(type(self).__name__)
            attended = attend(
                query, key, value, self.kernel_size, self.dilation, self.is_causal, self.scale, self.rpb, self.attn_drop
            )
        else:
            attended = fused(query, key, value, self.kernel_size, self.dilation, self.is_causal, self.rpb, self.scale)
        attended = attended.flatten(-2)
        for axis, extent in enumerate(layout, 1):
            attended = attended.narrow(axis, 0, extent)
        return self.proj_drop(self.proj(attended))  # type: ignore[no-any-return]

    def _padded(self, x: Tensor) -> Tensor:
        """Return the input with zeros at the end of each axis that is smaller than the window."""
        missing = [
            max(size * step - extent, 0)
            for size, step, extent in zip(self.kernel_size, self.dilation, x.shape[1:-1], strict=True)
        ]
        if not any(missing):
            return x
        amounts = [0, 0]
        for amount in reversed(missing):
            amounts += [0, amount]
        return nn.functional.pad(x, amounts)

    def extra_repr(self) -> str:
        """Return what the representation shows beside the submodules."""
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, kernel_size={self.kernel_size}, "
            f"dilation={self.dilation}, is_causal={self.is_causal}, rel_pos_bias={self.rpb is not None}"
        )
