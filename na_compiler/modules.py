"""`NeighborhoodAttention1D`, `2D` and `3D`: multi-head attention layers, with NATTEN's parameters and state_dict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from na_compiler.borders import borders_per_axis, joined
from na_compiler.functional import Flags, Ints, na1d, na2d, na3d
from na_compiler.ops.projection import split_projection
from na_compiler.ops.torchscript import Scriptable
from na_compiler.parameters import check_strides
from na_compiler.traced import canonical_parameters, checked_scale
from na_compiler.window import SHIFT

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]

_FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}
# Of biases before training, as NATTEN's layers have them.
_BIAS_SPREAD = 0.02


_PARAMETERS = """
    Parameters
    ----------
    embed_dim
        Channels of input and output; a multiple of ``num_heads``.
    num_heads
        Attention heads.
    kernel_size, stride, dilation, is_causal, border
        An int (or bool, or word), or one for each axis: see `na_compiler.na2d`.
    qkv_bias
        Whether the projection to query, key and value has a bias.
    qk_scale
        Of the scores; default ``(embed_dim // num_heads) ** -0.5``.
    proj_drop
        Dropout probability after the output projection.
    rel_pos_bias
        Whether there is a bias by relative position, the parameter ``rpb``, ``[num_heads, 2 kernel_size - 1, ...]``,
        float32 or of the layer's dtype: see `na_compiler.na2d`.

    Raises
    ------
    ValueError
        If arguments do not fit each other, and on call, if the input does not.

    Notes
    -----
    Parameters are named ``qkv``, ``rpb`` and ``proj`` as in NATTEN, so that checkpoints of its layers, and those of NAT
    and DiNAT, load.
"""


class _NeighborhoodAttention(nn.Module):
    """What the three share: see `NeighborhoodAttention2D`."""

    rank: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: Ints,
        stride: Ints | None = 1,
        dilation: Ints | None = 1,
        is_causal: Flags | None = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        rel_pos_bias: bool = False,
        border: str | Sequence[str] = SHIFT,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            near = max(embed_dim // max(num_heads, 1), 1) * max(num_heads, 1)
            raise ValueError(
                f"embed_dim must be a multiple of num_heads, both at least 1, got embed_dim={embed_dim} and "
                f"num_heads={num_heads}; embed_dim={near} with num_heads={max(num_heads, 1)} would work"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else checked_scale(qk_scale)
        parameters = canonical_parameters(self.rank, kernel_size, stride, dilation, is_causal)
        self.kernel_size, self.stride, self.dilation, self.is_causal = parameters
        check_strides(self.kernel_size, self.stride)
        self.border = borders_per_axis(border, self.rank)
        self.border_words = joined(self.border)
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * size - 1 for size in self.kernel_size)))
            nn.init.trunc_normal_(self.rpb, std=_BIAS_SPREAD)
        else:
            self.register_parameter("rpb", None)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # Of a layer that was pickled before there were biases and borders.
        self._parameters.setdefault("rpb", None)
        self.__dict__.setdefault("border", (SHIFT,) * self.rank)
        self.__dict__.setdefault("border_words", SHIFT)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Attend.

        Parameters
        ----------
        x
            ``[batch, *layout, embed_dim]``.
        key_mask
            ``[batch, *layout]``, bool: False hides a token as a key. Default: none is hidden.

        Returns
        -------
        Tensor
            Of the same shape.
        """
        if x.dim() != self.rank + 2:
            raise ValueError(
                f"the input of {type(self).__name__} must have {self.rank + 2} dimensions, "
                f"[batch, *layout, embed_dim], got shape {tuple(x.shape)}"
            )
        if x.shape[-1] != self.embed_dim:
            raise ValueError(f"the input's last dimension must be embed_dim={self.embed_dim}, got {x.shape[-1]}")
        # Views of one projection: the kernel reads them, and writes their gradients, where they are.
        query, key, value = split_projection(self.qkv(x), self.num_heads, self.head_dim)
        attended: Any = _FUNCTIONS[self.rank](
            query, key, value, self.kernel_size, self.stride, self.dilation, self.is_causal, self.scale,
            relative_position_bias=self.rpb, key_mask=key_mask, border=self.border,
        )  # fmt: skip
        return self.proj_drop(self.proj(attended.flatten(-2)))  # type: ignore[no-any-return]

    def __prepare_scriptable__(self) -> nn.Module:
        """Return what ``torch.jit.script`` compiles in place of the layer: the same in its subset of Python."""
        scripted = Scriptable.__new__(Scriptable)
        scripted.__dict__.update(self.__dict__)  # All that a module carries: parameters, submodules, hooks, mode.
        scripted.rank, scripted.border_words = self.rank, self.border_words
        for name in ("kernel_size", "stride", "dilation", "is_causal"):
            setattr(scripted, name, [int(one) for one in getattr(self, name)])
        return scripted

    def extra_repr(self) -> str:
        """Return what the representation shows beside the submodules."""
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, dilation={self.dilation}, is_causal={self.is_causal}"
            + (", rel_pos_bias=True" if self.rpb is not None else "")
            + (f", border={self.border_words!r}" if self.border_words != SHIFT else "")
        )


class NeighborhoodAttention1D(_NeighborhoodAttention):
    """Multi-head neighborhood attention along one axis, ``[batch, X, embed_dim]``."""

    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    """Multi-head neighborhood attention over two axes, ``[batch, X, Y, embed_dim]``."""

    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    """Multi-head neighborhood attention over three axes, ``[batch, X, Y, Z, embed_dim]``."""

    rank = 3


_EXAMPLE = """
    Examples
    --------
    >>> import torch
    >>> layer = {name}({arguments})
    >>> layer(torch.randn({shape})).shape
    torch.Size([{shape}])
"""
_ARGUMENTS = "embed_dim=32, num_heads=2, kernel_size="
for _class, _arguments, _shape in (
    (NeighborhoodAttention1D, "7", "1, 16, 32"),
    (NeighborhoodAttention2D, "(3, 5), dilation=(2, 1)", "1, 8, 8, 32"),
    (NeighborhoodAttention3D, "3, is_causal=(True, False, False)", "1, 4, 4, 4, 32"),
):
    _class.__doc__ = f"{_class.__doc__}\n{_PARAMETERS}" + _EXAMPLE.format(
        name=_class.__name__, arguments=_ARGUMENTS + _arguments, shape=_shape
    )
